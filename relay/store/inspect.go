package store

import (
	"bytes"
	"errors"
	"io"
	"io/fs"

	"github.com/dgraph-io/badger/v4"

	"github.com/relais-mta/relais/relay"
	"github.com/relais-mta/relais/shared/fault"
	"github.com/relais-mta/relais/shared/ids"
)

// spaces are the key spaces that this release writes, but for SpaceMeta.
var spaces = []byte{SpaceRule, SpaceHeld, SpaceAttempt, SpaceInbound, SpaceMessage, SpaceOutbox, SpaceQueue, SpaceState, SpaceWaiting, SpaceDeadline, SpaceGiven, SpaceTaken}

func knownSpace(b byte) bool { return bytes.IndexByte(spaces, b) >= 0 }

func knownMeta(key []byte) bool {
	return bytes.Equal(key, keyFormat) || bytes.Equal(key, KeyOutbox) || bytes.Equal(key, KeyDeadlines)
}

// Cursor walks over the keys of one prefix in order. Several cursors of one
// snapshot may be open at once, which is how records of different kinds are
// merged without holding either in memory.
type Cursor struct {
	it      *badger.Iterator
	started bool
	prefix  []byte
}

// Cursor returns a cursor before the first key that begins with prefix. Close
// it before the snapshot.
func (v *Snapshot) Cursor(prefix []byte) *Cursor {
	opt := badger.DefaultIteratorOptions
	opt.Prefix = prefix
	opt.PrefetchValues = false
	return &Cursor{it: v.view.txn.NewIterator(opt), prefix: prefix}
}

// Next moves to the next key and reports whether there is one.
func (c *Cursor) Next() bool {
	if c.started {
		c.it.Next()
	} else {
		c.it.Seek(c.prefix)
		c.started = true
	}
	return c.it.Valid()
}

// Key is the key at hand, valid until Next.
func (c *Cursor) Key() []byte { return c.it.Item().Key() }

// Value appends the value at hand to dst.
func (c *Cursor) Value(dst []byte) ([]byte, error) {
	err := c.it.Item().Value(func(value []byte) error {
		dst = append(dst, value...)
		return nil
	})
	if err != nil {
		return dst, readFault(err)
	}
	return dst, nil
}

// Close ends the cursor.
func (c *Cursor) Close() { c.it.Close() }

// Strays calls f for every key that no part of this release writes: those of
// unknown spaces and the unknown ones among the store's own records.
func (v *Snapshot) Strays(f func(key, value []byte) bool) error {
	more := true
	err := v.Iterate([]byte{SpaceMeta}, nil, false, func(key, value []byte) bool {
		if !knownMeta(key) {
			more = f(key, value)
		}
		return more
	})
	for b := 1; b < 256 && more && err == nil; b++ {
		if knownSpace(byte(b)) {
			continue
		}
		err = v.Iterate([]byte{byte(b)}, nil, false, func(key, value []byte) bool {
			more = f(key, value)
			return more
		})
	}
	return err
}

// BodyFile is a file in the body directory.
type BodyFile struct {
	Kind   relay.BodyKind
	Number uint64
	Bytes  int64 // used, or allocated of a segment that is written to
}

// BodyFiles returns the body files that the store knows, in no order.
func (s *Store) BodyFiles() []BodyFile {
	s.ledger.mu.Lock()
	defer s.ledger.mu.Unlock()
	out := make([]BodyFile, 0, len(s.ledger.files))
	for number, u := range s.ledger.files {
		out = append(out, BodyFile{Kind: u.kind, Number: number, Bytes: u.end})
	}
	return out
}

// CheckRef says whether a reference can be right without reading the body:
// its file exists and holds its range. Errors are faults: NotFound for a file
// that is missing, Invalid for a range that cannot be.
func (s *Store) CheckRef(ref relay.BodyRef) error {
	const op = "store.CheckRef"
	if ref.Kind == relay.BodyNone {
		return nil
	}
	s.ledger.mu.Lock()
	u := s.ledger.files[ref.Segment]
	known, end := u != nil && u.kind == ref.Kind, int64(0)
	if known {
		end = u.end
	}
	s.ledger.mu.Unlock()
	if !known {
		return fault.New(fault.NotFound, op, "the body's file is missing")
	}
	if ref.Kind == relay.BodyFile {
		end = ref.Offset + ref.Length // its size is found out by reading it
	}
	if ref.Offset < recordHeaderBytes || ref.HeaderBytes > ref.Length || ref.Length > end-ref.Offset {
		return fault.New(fault.Invalid, op, "the body's place, offset %d and length %d, is not within its file of %d bytes", ref.Offset, ref.Length, end)
	}
	return nil
}

// CheckBody reads a whole body and the header in front of it. header is false
// when only that is wrong, which harms nothing until the index is lost.
func (s *Store) CheckBody(ref relay.BodyRef, id ids.Message) (header bool, err error) {
	if ref.Kind == relay.BodyNone {
		return true, nil
	}
	r, err := s.OpenBody(ref)
	if err != nil {
		return false, err
	}
	defer r.Close()
	if err := r.Verify(); err != nil {
		return false, err
	}
	var h [recordHeaderBytes]byte
	if _, err := r.handle.file.ReadAt(h[:], ref.Offset-recordHeaderBytes); err != nil {
		return false, nil
	}
	rec, ok := parseRecordHeader(h[:])
	return ok && rec.Message == id && rec.Length == ref.Length && rec.CRC32C == ref.CRC32C, nil
}

// RepairHeader writes the header in front of a body again.
func (s *Store) RepairHeader(ref relay.BodyRef, id ids.Message) error {
	f, err := s.fs.Open(s.refPath(ref))
	if err == nil {
		var h [recordHeaderBytes]byte
		putRecordHeader(h[:], id, ref)
		if err = f.WriteVectors([][]byte{h[:]}, ref.Offset-recordHeaderBytes); err == nil {
			err = f.Sync()
		}
		if cerr := f.Close(); err == nil {
			err = cerr
		}
	}
	if err != nil {
		return diskFault(err, "store.RepairHeader")
	}
	return nil
}

// RemoveBodyFile removes a file of the body directory that nothing refers to.
func (s *Store) RemoveBodyFile(f BodyFile) error {
	ref := relay.BodyRef{Kind: f.Kind, Segment: f.Number}
	s.handles.forget(ref)
	if err := s.fs.Remove(s.refPath(ref)); err != nil {
		return diskFault(err, "store.RemoveBodyFile")
	}
	s.ledger.mu.Lock()
	defer s.ledger.mu.Unlock()
	delete(s.ledger.files, f.Number)
	return nil
}

// scanPieceBytes is how much of a body file is looked through at once.
const scanPieceBytes = 64 << 10

// FindBodies calls f for every body in the file whose header is whole, found
// without the index: this is how mail is saved whose envelope is lost. What lies
// between is looked through for the next header.
func (s *Store) FindBodies(file BodyFile, f func(Record, relay.BodyRef) error) error {
	const op = "store.FindBodies"
	ref := relay.BodyRef{Kind: file.Kind, Segment: file.Number}
	opened, err := s.fs.Open(s.refPath(ref))
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return diskFault(err, op)
	}
	defer opened.Close()
	buf := make([]byte, scanPieceBytes)
	for at := int64(0); ; {
		n, err := opened.ReadAt(buf, at)
		if n < recordHeaderBytes {
			if err == nil || errors.Is(err, io.EOF) {
				return nil
			}
			return fault.Wrap(err, fault.Unavailable, op, "a body file cannot be read")
		}
		step := int64(n - recordHeaderBytes + 1)
		for i := 0; i+recordHeaderBytes <= n; i++ {
			if buf[i] != recordMagic[0] {
				continue
			}
			rec, ok := parseRecordHeader(buf[i:n])
			if !ok {
				continue
			}
			found := relay.BodyRef{
				Kind: file.Kind, Segment: file.Number, Offset: at + int64(i) + recordHeaderBytes,
				Length: rec.Length, HeaderBytes: rec.HeaderBytes, CRC32C: rec.CRC32C,
			}
			if err := f(rec, found); err != nil {
				return err
			}
			step = int64(i) + recordHeaderBytes + rec.Length
			break
		}
		at += step
	}
}
