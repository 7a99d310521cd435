package store

import (
	"container/list"
	"errors"
	"hash/crc32"
	"io"
	"io/fs"
	"sync"
	"sync/atomic"

	"github.com/relais-mta/relais/relay"
	"github.com/relais-mta/relais/shared/fault"
)

// maxOpenBodyFiles bounds the files kept open for reading.
const maxOpenBodyFiles = 128

// handleKey tells a segment from a body file of the same number.
type handleKey struct {
	kind   relay.BodyKind
	number uint64
}

// handle is an open file that several readers share. The cache holds one
// reference, each reader another; the last one closes it.
type handle struct {
	key  handleKey
	file File
	refs atomic.Int32
}

func (h *handle) release() {
	if h.refs.Add(-1) == 0 {
		_ = h.file.Close() // only read from
	}
}

// handles keeps the most recently read files open.
type handles struct {
	mu    sync.Mutex
	byKey map[handleKey]*list.Element
	order *list.List // front: most recent
}

func newHandles() *handles {
	return &handles{byKey: make(map[handleKey]*list.Element), order: list.New()}
}

func (h *handles) get(s *Store, ref relay.BodyRef) (*handle, error) {
	key := handleKey{ref.Kind, ref.Segment}
	h.mu.Lock()
	defer h.mu.Unlock()
	if e := h.byKey[key]; e != nil {
		h.order.MoveToFront(e)
		found := e.Value.(*handle)
		found.refs.Add(1)
		return found, nil
	}
	f, err := s.fs.Open(s.refPath(ref))
	if err != nil {
		return nil, err
	}
	opened := &handle{key: key, file: f}
	opened.refs.Store(2)
	if ref.Kind == relay.BodyFile {
		opened.refs.Store(1) // read once or twice in its life: not worth a place
		return opened, nil
	}
	h.byKey[key] = h.order.PushFront(opened)
	if h.order.Len() > maxOpenBodyFiles {
		h.remove(h.order.Back())
	}
	return opened, nil
}

func (h *handles) remove(e *list.Element) {
	old := h.order.Remove(e).(*handle)
	delete(h.byKey, old.key)
	old.release()
}

func (h *handles) forget(ref relay.BodyRef) {
	h.mu.Lock()
	defer h.mu.Unlock()
	if e := h.byKey[handleKey{ref.Kind, ref.Segment}]; e != nil {
		h.remove(e)
	}
}

func (h *handles) close() {
	h.mu.Lock()
	defer h.mu.Unlock()
	for h.order.Len() > 0 {
		h.remove(h.order.Back())
	}
}

// BodyReader reads a stored body. It may be used by several goroutines.
type BodyReader struct {
	ref    relay.BodyRef
	handle *handle
	closed atomic.Bool
}

// OpenBody opens a stored body for reading in pieces. Errors are faults:
// NotFound when the file is gone, Unavailable when the disk fails.
func (s *Store) OpenBody(ref relay.BodyRef) (*BodyReader, error) {
	if ref.Kind == relay.BodyNone {
		return nil, fault.New(fault.NotFound, "store.OpenBody", "the message has no body")
	}
	h, err := s.handles.get(s, ref)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, fault.Wrap(err, fault.NotFound, "store.OpenBody", "the body's file is missing")
	}
	if err != nil {
		return nil, fault.Wrap(err, fault.Unavailable, "store.OpenBody", "the body cannot be opened")
	}
	return &BodyReader{ref: ref, handle: h}, nil
}

// ReadAt implements io.ReaderAt over the body alone: offset 0 is its first byte.
func (r *BodyReader) ReadAt(p []byte, off int64) (int, error) {
	if off < 0 {
		return 0, fault.New(fault.Internal, "store.BodyReader.ReadAt", "negative offset")
	}
	if off >= r.ref.Length {
		return 0, io.EOF
	}
	short := false
	if rest := r.ref.Length - off; int64(len(p)) > rest {
		p, short = p[:rest], true
	}
	n, err := r.handle.file.ReadAt(p, r.ref.Offset+off)
	switch {
	case n == len(p) && short:
		return n, io.EOF
	case n == len(p):
		return n, nil
	case errors.Is(err, io.EOF):
		return n, corrupt(r.ref, "its file ends too early")
	}
	return n, fault.Wrap(err, fault.Unavailable, "store.BodyReader.ReadAt", "the body cannot be read")
}

// Size is the length of the body in bytes.
func (r *BodyReader) Size() int64 { return r.ref.Length }

// Verify reads the whole body and compares its checksum. A damaged body is an
// Internal fault that must not be retried.
func (r *BodyReader) Verify() error {
	pool := bodyBuffers[mediumBuffer].pool
	holder := pool.Get().(*[]byte)
	defer pool.Put(holder)
	buf := (*holder)[:cap(*holder)]
	var sum uint32
	for off := int64(0); off < r.ref.Length; {
		n, err := r.ReadAt(buf, off)
		sum = crc32.Update(sum, castagnoli, buf[:n])
		off += int64(n)
		if err != nil && !errors.Is(err, io.EOF) {
			return err
		}
	}
	if sum != r.ref.CRC32C {
		return corrupt(r.ref, "its checksum is wrong")
	}
	return nil
}

// Close lets go of the file.
func (r *BodyReader) Close() error {
	if !r.closed.Swap(true) {
		r.handle.release()
	}
	return nil
}

// ReadBody reads the whole body into dst, which is grown if it is too small,
// and checks its checksum. Use it for small bodies and OpenBody for
// larger ones. A damaged body is an Internal fault that must not be retried.
func (s *Store) ReadBody(ref relay.BodyRef, dst []byte) ([]byte, error) {
	h, err := s.handles.get(s, ref)
	if err != nil {
		if errors.Is(err, fs.ErrNotExist) {
			return nil, fault.Wrap(err, fault.NotFound, "store.ReadBody", "the body's file is missing")
		}
		return nil, fault.Wrap(err, fault.Unavailable, "store.ReadBody", "the body cannot be opened")
	}
	defer h.release()
	if int64(cap(dst)) < ref.Length {
		dst = make([]byte, ref.Length)
	}
	dst = dst[:ref.Length]
	if n, err := h.file.ReadAt(dst, ref.Offset); n < len(dst) {
		if errors.Is(err, io.EOF) {
			return nil, corrupt(ref, "its file ends too early")
		}
		return nil, fault.Wrap(err, fault.Unavailable, "store.ReadBody", "the body cannot be read")
	}
	if crc32.Checksum(dst, castagnoli) != ref.CRC32C {
		return nil, corrupt(ref, "its checksum is wrong")
	}
	return dst, nil
}

func corrupt(ref relay.BodyRef, how string) error {
	kind := "segment"
	if ref.Kind == relay.BodyFile {
		kind = "file"
	}
	return &fault.Error{
		Kind: fault.Internal, Op: "store.ReadBody", Retry: fault.RetryNever,
		Public: "the stored message is damaged: " + how,
		Cause:  fault.New(fault.Internal, "", "body %s %d, offset %d, length %d", kind, ref.Segment, ref.Offset, ref.Length),
	}
}
