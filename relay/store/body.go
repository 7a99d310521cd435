package store

import (
	"encoding/binary"
	"errors"
	"fmt"
	"hash/crc32"
	"path/filepath"
	"sync"

	"golang.org/x/sys/unix"

	"github.com/relais-mta/relais/relay"
	"github.com/relais-mta/relais/shared/fault"
	"github.com/relais-mta/relais/shared/ids"
)

// Every body on disk, in a segment or in a file of its own, has this header in
// front, so that mail can be found without the index:
//
//	0  magic "RLbd"   4  version   5..7 zero   8 message id   24 length
//	32 header bytes   36 CRC-32C of the body   40..43 zero    44 CRC-32C of octets 0..43
const (
	recordHeaderBytes = 48
	recordVersion     = 1
)

var recordMagic = [4]byte{'R', 'L', 'b', 'd'}

var castagnoli = crc32.MakeTable(crc32.Castagnoli)

// A body waits in memory in the smallest of these buffers, because a file of its
// own costs ten times what its bytes do: a name, an inode and a sync of each. On
// ext4 more, for it passes over every inode that was freed a moment ago before it
// gives one out.
const (
	smallBodyBytes     = 16 << 10 // most bodies fit in
	mediumBodyBytes    = 64 << 10
	largeBodyBytes     = 256 << 10
	maxBodyMemoryBytes = 1 << 20 // the most that one body keeps in memory
)

// maxLargeBodiesBytes is the most that the buffers of more than mediumBodyBytes
// take together. A body that finds no room goes into a file of its own.
const maxLargeBodiesBytes = 32 << 20

// bodyBuffers are the buffers of each size.
var bodyBuffers = [...]struct {
	bytes int
	pool  *sync.Pool
}{
	{smallBodyBytes, bufferPool(smallBodyBytes)},
	{mediumBodyBytes, bufferPool(mediumBodyBytes)},
	{largeBodyBytes, bufferPool(largeBodyBytes)},
	{maxBodyMemoryBytes, bufferPool(maxBodyMemoryBytes)},
}

const mediumBuffer = 1 // in bodyBuffers

func bufferPool(bytes int) *sync.Pool {
	return &sync.Pool{New: func() any { b := make([]byte, 0, bytes); return &b }}
}

// Body is a message being received: an io.Writer that keeps at most 1 MiB in
// memory, or 64 KiB when all bodies together keep too much, and spills larger
// messages into a file of their own. After the last
// Write call Seal, then hand it to queue.Accept, which consumes it, or Discard
// it. One goroutine uses it at a time.
type Body struct {
	s        *Store
	ref      relay.BodyRef
	holder   *[]byte // pooled owner of buf
	size     int     // of it, in bodyBuffers
	buf      []byte  // record header and the body's bytes that are not in file yet
	file     File
	path     string
	fileEnd  int64 // bytes written to file, record header included
	sealed   bool
	ready    bool // prepared for a batch
	consumed bool // committed: the store owns the bytes now
	err      error
}

// NewBody begins a body.
func (s *Store) NewBody() *Body {
	holder := bodyBuffers[0].pool.Get().(*[]byte)
	return &Body{s: s, holder: holder, buf: (*holder)[:recordHeaderBytes]}
}

// Write appends bytes of the message, header section first. Its errors are
// faults: NoSpace when the disk is full, Unavailable when it failed.
func (b *Body) Write(p []byte) (int, error) {
	if b.err != nil {
		return 0, b.err
	}
	if b.sealed {
		return 0, fault.New(fault.Internal, "store.Body.Write", "the body is sealed already")
	}
	b.ref.CRC32C = crc32.Update(b.ref.CRC32C, castagnoli, p)
	b.ref.Length += int64(len(p))
	written := len(p)
	for len(p) > 0 {
		if len(b.buf) == cap(b.buf) {
			b.grow()
		}
		if b.err != nil {
			return written - len(p), b.err
		}
		n := copy(b.buf[len(b.buf):cap(b.buf)], p)
		b.buf = b.buf[:len(b.buf)+n]
		p = p[n:]
	}
	return written, nil
}

// grow makes room in a full buffer: by a larger one, then by spilling.
func (b *Body) grow() {
	if b.file == nil && b.size+1 < len(bodyBuffers) && b.s.reserveLarge(b.size, b.size+1) {
		b.resize(b.size + 1)
		return
	}
	if b.err = b.spill(); b.err == nil && b.size > mediumBuffer {
		b.s.freeLarge(b.size)
		b.resize(mediumBuffer)
	}
}

// resize moves what is in the buffer into one of another size. What buffers of
// the sizes count for is the caller's.
func (b *Body) resize(to int) {
	holder := bodyBuffers[to].pool.Get().(*[]byte)
	buf := append((*holder)[:0], b.buf...)
	bodyBuffers[b.size].pool.Put(b.holder)
	b.holder, b.buf, b.size = holder, buf, to
}

// largeBytes is what a buffer takes of maxLargeBodiesBytes.
func largeBytes(size int) int64 {
	if size <= mediumBuffer {
		return 0
	}
	return int64(bodyBuffers[size].bytes)
}

// reserveLarge takes room for a buffer in place of a smaller one, if there is any.
func (s *Store) reserveLarge(from, to int) bool {
	more := largeBytes(to) - largeBytes(from)
	if s.largeBodies.Add(more) > maxLargeBodiesBytes && more > 0 {
		s.largeBodies.Add(-more)
		return false
	}
	return true
}

func (s *Store) freeLarge(size int) { s.largeBodies.Add(-largeBytes(size)) }

func (b *Body) spill() error {
	const op = "store.Body.Write"
	if b.file == nil {
		b.ref.Segment = b.s.nextFile.Add(1)
		b.path = b.s.bodyPath(b.ref.Segment)
		f, err := b.s.fs.Create(b.path)
		if err != nil {
			return diskFault(err, op)
		}
		b.file = f
	}
	if err := b.file.WriteVectors([][]byte{b.buf}, b.fileEnd); err != nil {
		return diskFault(err, op)
	}
	b.fileEnd += int64(len(b.buf))
	b.buf = b.buf[:0]
	return nil
}

// Len is the number of bytes written so far.
func (b *Body) Len() int64 { return b.ref.Length }

// Seal ends the body and records the length of its header section and the
// SHA-256 of its relaxed-canonical body, which go into its reference.
func (b *Body) Seal(headerBytes int64, bodyHash [32]byte) error {
	if b.err != nil {
		return b.err
	}
	if headerBytes < 0 || headerBytes > b.ref.Length {
		return fault.Field("store.Body.Seal", "header_bytes", "is %d of a body of %d bytes", headerBytes, b.ref.Length)
	}
	b.ref.HeaderBytes, b.ref.BodyHash, b.sealed = headerBytes, bodyHash, true
	b.ref.Kind = relay.BodySegment
	if b.file != nil {
		b.ref.Kind, b.ref.Offset = relay.BodyFile, recordHeaderBytes
	}
	return nil
}

// Ref is the body's place on disk. It is complete once the batch that carries
// the body is committed.
func (b *Body) Ref() relay.BodyRef { return b.ref }

// Bytes returns the body while all of it is in memory, else nil. It is valid
// until the body is committed or discarded.
func (b *Body) Bytes() []byte {
	if b.file != nil || b.buf == nil {
		return nil
	}
	return b.buf[recordHeaderBytes:]
}

// prepare writes the record header and, for a body with a file of its own,
// makes the file and its name durable.
func (b *Body) prepare(id ids.Message) error {
	const op = "store.Commit"
	if b.err != nil {
		return b.err
	}
	if !b.sealed || b.consumed {
		return fault.New(fault.Internal, op, "a body must be sealed and is committed once")
	}
	if b.file == nil {
		putRecordHeader(b.buf, id, b.ref)
		return nil
	}
	if b.ready {
		return nil
	}
	if err := b.syncFile(id); err != nil {
		b.err = diskFault(err, op)
		b.s.diskFailed(b.err)
		return b.err
	}
	b.ready = true
	return nil
}

func (b *Body) syncFile(id ids.Message) error {
	if len(b.buf) > 0 {
		if err := b.spill(); err != nil {
			return err
		}
	}
	var header [recordHeaderBytes]byte
	putRecordHeader(header[:], id, b.ref)
	if err := b.file.WriteVectors([][]byte{header[:]}, 0); err != nil {
		return err
	}
	if err := b.file.Sync(); err != nil {
		return err
	}
	return b.s.fs.SyncDir(b.s.bodyDir)
}

func putRecordHeader(h []byte, id ids.Message, ref relay.BodyRef) {
	h = h[:recordHeaderBytes]
	clear(h)
	copy(h, recordMagic[:])
	h[4] = recordVersion
	copy(h[8:24], id[:])
	binary.BigEndian.PutUint64(h[24:], uint64(ref.Length))
	binary.BigEndian.PutUint32(h[32:], uint32(ref.HeaderBytes))
	binary.BigEndian.PutUint32(h[36:], ref.CRC32C)
	binary.BigEndian.PutUint32(h[44:], crc32.Checksum(h[:44], castagnoli))
}

// Record is the header in front of a body on disk.
type Record struct {
	Message     ids.Message
	Length      int64
	HeaderBytes int64
	CRC32C      uint32
}

// parseRecordHeader reads what putRecordHeader wrote.
func parseRecordHeader(h []byte) (r Record, ok bool) {
	if len(h) < recordHeaderBytes || [4]byte(h[:4]) != recordMagic || h[4] != recordVersion ||
		crc32.Checksum(h[:44], castagnoli) != binary.BigEndian.Uint32(h[44:]) {
		return r, false
	}
	copy(r.Message[:], h[8:24])
	r.Length = int64(binary.BigEndian.Uint64(h[24:]))
	r.HeaderBytes = int64(binary.BigEndian.Uint32(h[32:]))
	r.CRC32C = binary.BigEndian.Uint32(h[36:])
	return r, r.Length >= 0
}

// Discard gives up a body that was not committed. It is safe to call after a
// commit, where it does nothing.
func (b *Body) Discard() {
	if b.consumed {
		return
	}
	b.freeBuffer()
	if b.file != nil {
		_ = b.file.Close() // nobody will read it
		if err := b.s.fs.Remove(b.path); err != nil {
			b.s.log.Warn("cannot remove the file of an abandoned body; the next start sweeps it", "file", b.path, "error", err)
		}
		b.file = nil
	}
	b.consumed = true
}

// committed is called by the committer when the bytes are the store's.
func (b *Body) committed() {
	b.freeBuffer()
	if b.file != nil {
		_ = b.file.Close() // synced before; a close cannot lose anything now
		b.file = nil
	}
	b.consumed = true
}

func (b *Body) freeBuffer() {
	if b.holder == nil {
		return
	}
	b.s.freeLarge(b.size)
	bodyBuffers[b.size].pool.Put(b.holder)
	b.holder, b.buf, b.size = nil, nil, 0
}

func (s *Store) bodyPath(number uint64) string {
	return filepath.Join(s.bodyDir, fmt.Sprintf("%016x.body", number))
}

func (s *Store) segmentPath(number uint64) string {
	return filepath.Join(s.bodyDir, fmt.Sprintf("%016x.seg", number))
}

func (s *Store) refPath(ref relay.BodyRef) string {
	if ref.Kind == relay.BodyFile {
		return s.bodyPath(ref.Segment)
	}
	return s.segmentPath(ref.Segment)
}

// diskFault turns an error of the operating system into a fault.
func diskFault(err error, op string) error {
	var f *fault.Error
	if errors.As(err, &f) {
		return err
	}
	if isNoSpace(err) {
		return fault.Wrap(err, fault.NoSpace, op, "the disk is full")
	}
	return fault.Wrap(err, fault.Unavailable, op, "the disk does not take writes")
}

func isNoSpace(err error) bool {
	return errors.Is(err, unix.ENOSPC) || errors.Is(err, unix.EDQUOT)
}
