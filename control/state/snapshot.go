package state

import (
	"bufio"
	"bytes"
	"encoding/binary"
	"errors"
	"hash/crc32"
	"io"

	"github.com/hashicorp/go-memdb"
	"google.golang.org/protobuf/proto"

	"github.com/relais-mta/relais/control/command"
	"github.com/relais-mta/relais/shared/fault"
)

// A snapshot is a magic, a format version and a list of sections
//
//	type u16 | version u16 | count u32 | length u32 | payload | crc32c u32
//
// whose payload is count rows, each with a u32 length in front. The checksum
// covers the section from its type on. A large table is several sections of
// the same type. The last section has type 0 and no rows.
const (
	snapshotMagic        = "RLSS"
	snapshotFormat       = 1
	sectionVersion       = 1
	sectionEnd           = 0
	sectionHeaderBytes   = 12
	sectionTargetBytes   = 1 << 20
	maxSectionBytes      = sectionTargetBytes + 2*command.MaxBytes
	snapshotVersionBytes = 2
)

var castagnoli = crc32.MakeTable(crc32.Castagnoli)

func (t *table[T]) sectionNumber() uint16 { return t.section }

// dump calls fn with every row in key order.
func (t *table[T]) dump(txn *memdb.Txn, fn func([]byte) error) error {
	var err error
	each(txn, t, "id", nil, func(row *T) bool {
		err = fn(t.encode(row))
		return err == nil
	})
	return err
}

// load inserts an encoded row, keeping its revision.
func (t *table[T]) load(a *applier, encoded []byte) error {
	row, err := t.decode(encoded)
	if err != nil {
		return err
	}
	a.index = *t.revision(row)
	return put(a, t, row)
}

// WriteTo writes a snapshot of the reader's moment. It implements io.WriterTo.
func (r *Reader) WriteTo(w io.Writer) (int64, error) {
	sw := &sectionWriter{w: bufio.NewWriterSize(w, 64<<10)}
	sw.raw([]byte(snapshotMagic))
	sw.raw(binary.BigEndian.AppendUint16(nil, snapshotFormat))
	p := readProgress(r.txn)
	sw.begin(sectionProgress)
	sw.row(encodeProgress(p))
	for _, t := range sections {
		sw.begin(t.sectionNumber())
		if err := t.dump(r.txn, func(b []byte) error { sw.row(b); return sw.err }); err != nil {
			return sw.n, err
		}
	}
	sw.begin(sectionEnd)
	sw.flush(true)
	if sw.err == nil {
		sw.err = sw.w.Flush()
	}
	return sw.n, sw.err
}

type sectionWriter struct {
	w       *bufio.Writer
	n       int64
	err     error
	kind    uint16
	count   uint32
	payload []byte
}

func (s *sectionWriter) raw(b []byte) {
	if s.err == nil {
		var n int
		n, s.err = s.w.Write(b)
		s.n += int64(n)
	}
}

func (s *sectionWriter) begin(kind uint16) {
	s.flush(false)
	s.kind = kind
}

func (s *sectionWriter) row(b []byte) {
	s.payload = binary.BigEndian.AppendUint32(s.payload, uint32(len(b)))
	s.payload = append(s.payload, b...)
	s.count++
	if len(s.payload) >= sectionTargetBytes {
		s.flush(false)
	}
}

// flush writes the rows gathered so far; an empty section only if forced.
func (s *sectionWriter) flush(force bool) {
	if s.count == 0 && !force {
		return
	}
	var head [sectionHeaderBytes]byte
	binary.BigEndian.PutUint16(head[0:], s.kind)
	binary.BigEndian.PutUint16(head[2:], sectionVersion)
	binary.BigEndian.PutUint32(head[4:], s.count)
	binary.BigEndian.PutUint32(head[8:], uint32(len(s.payload)))
	sum := crc32.Update(crc32.Checksum(head[:], castagnoli), castagnoli, s.payload)
	s.raw(head[:])
	s.raw(s.payload)
	s.raw(binary.BigEndian.AppendUint32(nil, sum))
	s.payload, s.count = s.payload[:0], 0
}

// Restore replaces the state by the one in the snapshot. The new state is
// built beside the old one and swapped in only when it is whole and its hash
// is the one it was written with.
func (s *Store) Restore(r io.Reader) error {
	const op = "state.Restore"
	br := bufio.NewReaderSize(r, 64<<10)
	head := make([]byte, len(snapshotMagic)+snapshotVersionBytes)
	if _, err := io.ReadFull(br, head); err != nil || !bytes.HasPrefix(head, []byte(snapshotMagic)) {
		return fault.New(fault.Invalid, op, "this is not a snapshot of a control plane")
	}
	if v := binary.BigEndian.Uint16(head[len(snapshotMagic):]); v != snapshotFormat {
		return fault.Wrap(command.ErrUnknown, fault.Invalid, op, "the snapshot has format %d, this program reads %d: install a newer release", v, snapshotFormat)
	}
	db := newDB()
	a := &applier{txn: db.Txn(true)}
	defer a.txn.Abort()
	var want *progress
	for {
		kind, rows, err := readSection(br)
		if err != nil {
			return err
		}
		if kind == sectionEnd {
			break
		}
		if kind == sectionProgress {
			if len(rows) != 1 || want != nil {
				return fault.New(fault.Invalid, op, "the snapshot does not hold exactly one progress row")
			}
			if want, err = decodeProgress(rows[0]); err != nil {
				return err
			}
			continue
		}
		if err := a.loadSection(kind, rows); err != nil {
			return err
		}
	}
	if want == nil {
		return fault.New(fault.Invalid, op, "the snapshot does not hold exactly one progress row")
	}
	if want.hash != a.progress.hash {
		return fault.New(fault.Invalid, op, "the rows of the snapshot do not add up to its state hash: take another snapshot")
	}
	if c := get(a.txn, clusterTable, "id", singleton); c != nil && c.FSMVersion > command.FSMVersion {
		return fault.Wrap(command.ErrUnknown, fault.Invalid, op, "the cluster works at version %d of the commands, this program knows %d: this directory was written by a newer release, install that or a newer one", c.FSMVersion, command.FSMVersion)
	}
	want.counts = a.progress.counts
	writeProgress(a.txn, want)
	a.txn.Commit()
	s.db.Store(db)
	s.diverged.Store(nil)
	s.notify(want.viewIndex)
	return nil
}

func (a *applier) loadSection(kind uint16, rows [][]byte) error {
	for _, t := range sections {
		if t.sectionNumber() != kind {
			continue
		}
		for _, b := range rows {
			if err := t.load(a, b); err != nil {
				return err
			}
		}
		return nil
	}
	return fault.Wrap(command.ErrUnknown, fault.Invalid, "state.Restore", "the snapshot holds a section of unknown type %d: install a newer release", kind)
}

func readSection(r io.Reader) (kind uint16, rows [][]byte, err error) {
	const op = "state.Restore"
	torn := func(err error) error {
		if errors.Is(err, io.EOF) || errors.Is(err, io.ErrUnexpectedEOF) {
			return fault.New(fault.Invalid, op, "the snapshot ends in the middle")
		}
		return fault.Wrap(err, fault.Internal, op, "the snapshot cannot be read")
	}
	var head [sectionHeaderBytes]byte
	if _, err := io.ReadFull(r, head[:]); err != nil {
		return 0, nil, torn(err)
	}
	kind = binary.BigEndian.Uint16(head[0:])
	if v := binary.BigEndian.Uint16(head[2:]); v != sectionVersion {
		return 0, nil, fault.Wrap(command.ErrUnknown, fault.Invalid, op, "section %d of the snapshot has version %d, this program reads %d: install a newer release", kind, v, sectionVersion)
	}
	count, length := binary.BigEndian.Uint32(head[4:]), binary.BigEndian.Uint32(head[8:])
	if length > maxSectionBytes {
		return 0, nil, fault.New(fault.Invalid, op, "section %d of the snapshot has %d bytes, allowed are %d", kind, length, maxSectionBytes)
	}
	body := make([]byte, int(length)+4)
	if _, err := io.ReadFull(r, body); err != nil {
		return 0, nil, torn(err)
	}
	payload := body[:length]
	if sum := crc32.Update(crc32.Checksum(head[:], castagnoli), castagnoli, payload); sum != binary.BigEndian.Uint32(body[length:]) {
		return 0, nil, fault.New(fault.Invalid, op, "section %d of the snapshot is damaged: its checksum does not match", kind)
	}
	for len(payload) >= 4 {
		n := int(binary.BigEndian.Uint32(payload))
		if n > len(payload)-4 {
			break
		}
		rows = append(rows, payload[4:4+n])
		payload = payload[4+n:]
	}
	if len(payload) != 0 || uint32(len(rows)) != count {
		return 0, nil, fault.New(fault.Invalid, op, "section %d of the snapshot does not hold the %d rows it announces", kind, count)
	}
	return kind, rows, nil
}

func encodeProgress(p *progress) []byte {
	sum := p.hash.bytes()
	m := &command.Progress{Index: p.index, LastMs: p.lastMillis, ViewIndex: p.viewIndex, Hash: sum[:]}
	for _, c := range p.checkpoints {
		m.Checkpoints = append(m.Checkpoints, &command.Checkpoint{Index: c.Index, Hash: c.Hash[:]})
	}
	b, err := marshal.Marshal(m)
	if err != nil {
		panic("state: progress does not encode: " + err.Error()) // it holds numbers and bytes only
	}
	return b
}

func decodeProgress(b []byte) (*progress, error) {
	var m command.Progress
	if err := proto.Unmarshal(b, &m); err != nil || len(m.GetHash()) != 32 {
		return nil, fault.New(fault.Invalid, "state.Restore", "the progress row of the snapshot cannot be read")
	}
	p := &progress{index: m.GetIndex(), lastMillis: m.GetLastMs(), viewIndex: m.GetViewIndex(), hash: splitHash([32]byte(m.GetHash()))}
	for _, c := range m.GetCheckpoints() {
		if len(c.GetHash()) != 32 || len(p.checkpoints) == maxCheckpoints {
			return nil, fault.New(fault.Invalid, "state.Restore", "the checkpoints of the snapshot cannot be read")
		}
		p.checkpoints = append(p.checkpoints, Checkpoint{Index: c.GetIndex(), Hash: [32]byte(c.GetHash())})
	}
	return p, nil
}
