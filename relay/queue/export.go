package queue

import (
	"bufio"
	"bytes"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"hash/crc32"
	"io"
	"time"

	"github.com/relais-mta/relais/relay"
	"github.com/relais-mta/relais/relay/store"
	"github.com/relais-mta/relais/shared/fault"
	"github.com/relais-mta/relais/shared/ids"
)

// An exported queue is
//
//	"RELAISQX" | format u16
//	records: type u8 | length u32 | payload | CRC-32C u32 of all before
//
// in big-endian order. The first record is the header, as JSON. Each message is
// one message record,
//
//	id [16] | envelope length u32 | envelope | states u32 | (index u16 | length u32 | state)…
//
// and its body in pieces of at most 64 KiB. The last record holds the number of
// messages, so a file that was cut off is told apart.
const (
	exportMagic      = "RELAISQX"
	exportFormat     = 1
	exportHeader     = 1
	exportMessage    = 2
	exportBody       = 3
	exportEnd        = 4
	exportPieceBytes = 64 << 10
	// maxExportRecordBytes is room for a message with MaxRecipients recipients
	// whose states all carry long replies.
	maxExportRecordBytes = 64 << 20
)

var castagnoli = crc32.MakeTable(crc32.Castagnoli)

// ExportHeader says where an exported queue comes from.
type ExportHeader struct {
	Export    ids.Message `json:"export"` // name of this export
	Cluster   ids.Cluster `json:"cluster"`
	Node      ids.Node    `json:"node"`
	CreatedAt time.Time   `json:"created_at"`
}

// ExportCount is what an export holds.
type ExportCount struct {
	Messages   int   `json:"messages"`
	Recipients int   `json:"recipients"` // that are not final
	Bytes      int64 `json:"bytes"`      // of bodies
	InDoubt    int   `json:"in_doubt"`   // of the recipients, those who may have the mail already
	Damaged    int   `json:"damaged"`    // messages left out because their body cannot be read
}

// doubtful counts the recipients that may have the mail already.
func doubtful(states map[uint16]relay.RecipientState) (n int) {
	for _, s := range states {
		if s.InDoubt > 0 && !s.State.Final() {
			n++
		}
	}
	return n
}

// Export writes every message of the queue with the state of its recipients
// and its body. Nobody may deliver from the queue meanwhile, or afterwards: the
// mail belongs to whoever imports it. A message whose body is damaged is left
// out, counted, and given to damaged.
func (q *Queue) Export(w io.Writer, h ExportHeader, progress func(ExportCount), damaged func(ids.Message, error)) (ExportCount, error) {
	const op = "queue.Export"
	var count ExportCount
	text, err := json.Marshal(h)
	if err != nil {
		return count, fault.Wrap(err, fault.Internal, op, "the header cannot be written")
	}
	e := &exporter{w: bufio.NewWriterSize(w, 256<<10), q: q}
	_, e.err = e.w.Write(binary.BigEndian.AppendUint16([]byte(exportMagic), exportFormat))
	e.record(exportHeader, text)
	snap := q.st.Snapshot()
	defer snap.Close()
	err = snap.Iterate([]byte{store.SpaceMessage}, nil, false, func(k, v []byte) bool {
		id, ok := store.ParseMessageKey(k)
		if !ok {
			return true
		}
		if err := e.message(id, v, &count); err != nil {
			count.Damaged++
			damaged(id, err)
		} else if e.err == nil {
			progress(count)
		}
		return e.err == nil
	})
	if err != nil {
		return count, err
	}
	e.record(exportEnd, binary.BigEndian.AppendUint64(nil, uint64(count.Messages)))
	if e.err == nil {
		e.err = e.w.Flush()
	}
	return count, fault.Wrap(e.err, fault.Internal, op, "the export cannot be written: is there space left?")
}

type exporter struct {
	w     *bufio.Writer
	q     *Queue
	buf   []byte
	piece []byte
	err   error // of writing
}

func (e *exporter) record(kind byte, payload []byte) {
	if e.err != nil {
		return
	}
	e.buf = binary.BigEndian.AppendUint32(append(e.buf[:0], kind), uint32(len(payload)))
	e.buf = append(e.buf, payload...)
	e.buf = binary.BigEndian.AppendUint32(e.buf, crc32.Checksum(e.buf, castagnoli))
	_, e.err = e.w.Write(e.buf)
}

// message writes one message. Its error is about reading it; nothing of it was
// written then.
func (e *exporter) message(id ids.Message, value []byte, count *ExportCount) error {
	env, _, err := parseEnvelope(id, value)
	if err != nil {
		return err
	}
	read, err := e.q.readMessage(id, nil)
	if err != nil {
		return err
	}
	var body *store.BodyReader
	if env.Body.Kind != relay.BodyNone {
		if body, err = e.q.st.OpenBody(env.Body); err != nil {
			return err
		}
		defer body.Close()
		if err := body.Verify(); err != nil {
			return err
		}
	}
	b := append(append(make([]byte, 0, 1024), id[:]...), binary.BigEndian.AppendUint32(nil, uint32(len(value)))...)
	b = append(b, value...)
	b = appendStates(b, env, read.states)
	open := len(env.Recipients)
	for _, s := range read.states {
		if s.State.Final() {
			open--
		}
	}
	e.record(exportMessage, b)
	e.body(body, env.Body.Length)
	if e.err != nil {
		return nil // of writing, or of a disk that is failing: the file is cut off
	}
	count.Messages++
	count.Recipients += open
	count.InDoubt += doubtful(read.states)
	count.Bytes += env.Body.Length
	return nil
}

// appendStates appends the states of a message's recipients that are stored.
func appendStates(b []byte, env *relay.Envelope, states map[uint16]relay.RecipientState) []byte {
	b = binary.BigEndian.AppendUint32(b, uint32(len(states)))
	for i := range env.Recipients {
		s, ok := states[uint16(i)]
		if !ok {
			continue
		}
		state := appendState(nil, &s)
		b = binary.BigEndian.AppendUint16(b, uint16(i))
		b = binary.BigEndian.AppendUint32(b, uint32(len(state)))
		b = append(b, state...)
	}
	return b
}

// body writes a body in pieces.
func (e *exporter) body(body *store.BodyReader, length int64) {
	if len(e.piece) == 0 {
		e.piece = make([]byte, exportPieceBytes)
	}
	for off := int64(0); off < length && e.err == nil; {
		n, err := body.ReadAt(e.piece, off)
		if n == 0 && err != nil {
			e.err = err
			return
		}
		e.record(exportBody, e.piece[:n])
		off += int64(n)
	}
}

// exportReader reads records and checks their sums.
type exportReader struct {
	r   *bufio.Reader
	buf []byte
}

func exportDamaged(cause error) error {
	return &fault.Error{Kind: fault.Invalid, Op: "queue.Import", Field: "file", Public: "the exported queue is damaged or cut short: export it again", Cause: cause}
}

// openExport reads the header.
func openExport(r io.Reader) (*exportReader, ExportHeader, error) {
	const op = "queue.Import"
	e := &exportReader{r: bufio.NewReaderSize(r, 256<<10)}
	var h ExportHeader
	head := make([]byte, len(exportMagic)+2)
	if _, err := io.ReadFull(e.r, head); err != nil || !bytes.HasPrefix(head, []byte(exportMagic)) {
		return nil, h, fault.Field(op, "file", "it is not an exported queue")
	}
	if v := binary.BigEndian.Uint16(head[len(exportMagic):]); v != exportFormat {
		return nil, h, fault.Field(op, "file", "the exported queue has format %d, this program reads %d: use a newer release", v, exportFormat)
	}
	kind, payload, err := e.next()
	if err == nil && kind != exportHeader {
		err = fmt.Errorf("record %d where the header belongs", kind)
	}
	if err == nil {
		err = json.Unmarshal(payload, &h)
	}
	if err != nil {
		return nil, h, exportDamaged(err)
	}
	return e, h, nil
}

// next returns the next record; its payload is valid until the one after.
func (e *exportReader) next() (kind byte, payload []byte, err error) {
	var head [5]byte
	if _, err := io.ReadFull(e.r, head[:]); err != nil {
		return 0, nil, exportDamaged(err)
	}
	length := binary.BigEndian.Uint32(head[1:])
	if length > maxExportRecordBytes {
		return 0, nil, exportDamaged(fmt.Errorf("a record of %d bytes", length))
	}
	if cap(e.buf) < int(length)+4 {
		e.buf = make([]byte, int(length)+4)
	}
	e.buf = e.buf[:int(length)+4]
	if _, err := io.ReadFull(e.r, e.buf); err != nil {
		return 0, nil, exportDamaged(err)
	}
	payload = e.buf[:length]
	if crc32.Update(crc32.Checksum(head[:], castagnoli), castagnoli, payload) != binary.BigEndian.Uint32(e.buf[length:]) {
		return 0, nil, exportDamaged(errors.New("a checksum does not match"))
	}
	return head[0], payload, nil
}

// exported is a message of an export.
type exported struct {
	env    *relay.Envelope
	states map[uint16]relay.RecipientState
	class  string // of the events that say it was taken; empty: of an import
}

// message returns the next message, nil at the end. Its body follows.
func (e *exportReader) message(seen int) (*exported, error) {
	kind, p, err := e.next()
	if err != nil {
		return nil, err
	}
	if kind == exportEnd {
		if len(p) != 8 || binary.BigEndian.Uint64(p) != uint64(seen) {
			return nil, exportDamaged(fmt.Errorf("%d messages of another number", seen))
		}
		return nil, nil
	}
	var id ids.Message
	if kind != exportMessage || len(p) < len(id)+4 {
		return nil, exportDamaged(fmt.Errorf("record %d where a message belongs", kind))
	}
	copy(id[:], p)
	p = p[len(id):]
	take := func(n int) []byte { // nil if there is less
		if n < 0 || len(p) < n {
			p = nil
			return nil
		}
		b := p[:n]
		p = p[n:]
		return b
	}
	number := func() int {
		b := take(4)
		if b == nil {
			return -1
		}
		return int(binary.BigEndian.Uint32(b))
	}
	m := &exported{states: make(map[uint16]relay.RecipientState)}
	envelope := take(number())
	if m.env, _, err = parseEnvelope(id, bytes.Clone(envelope)); err != nil {
		return nil, exportDamaged(err)
	}
	for range max(0, number()) {
		index := take(2)
		if index == nil {
			return nil, exportDamaged(errors.New("a state is cut off"))
		}
		s, err := parseState(take(number()))
		if err != nil {
			return nil, exportDamaged(err)
		}
		m.states[binary.BigEndian.Uint16(index)] = s
	}
	return m, nil
}

// body hands the pieces of a message's body to w.
func (e *exportReader) body(ref relay.BodyRef, w io.Writer) error {
	var sum uint32
	for left := ref.Length; left > 0; {
		kind, p, err := e.next()
		if err != nil {
			return err
		}
		if kind != exportBody || len(p) == 0 || int64(len(p)) > left {
			return exportDamaged(fmt.Errorf("record %d where a body belongs", kind))
		}
		sum = crc32.Update(sum, castagnoli, p)
		left -= int64(len(p))
		if _, err := w.Write(p); err != nil {
			return err
		}
	}
	if ref.Length > 0 && sum != ref.CRC32C {
		return exportDamaged(errors.New("a body's checksum does not match"))
	}
	return nil
}

// CheckExport reads a whole export and checks every sum.
func CheckExport(r io.Reader) (ExportHeader, ExportCount, error) {
	var count ExportCount
	e, h, err := openExport(r)
	if err != nil {
		return h, count, err
	}
	for {
		m, err := e.message(count.Messages)
		if err != nil || m == nil {
			return h, count, err
		}
		if err := e.body(m.env.Body, io.Discard); err != nil {
			return h, count, err
		}
		count.Messages++
		count.Bytes += m.env.Body.Length
		count.Recipients += len(m.env.Recipients)
		count.InDoubt += doubtful(m.states)
		for _, s := range m.states {
			if s.State.Final() {
				count.Recipients--
			}
		}
	}
}
