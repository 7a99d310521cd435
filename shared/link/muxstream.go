package link

import (
	"encoding/binary"
	"errors"
	"io"
	"os"
	"sync"
	"time"

	"github.com/relais-mta/relais/shared/fault"
)

// muxStream is Stream over a muxSession.
type muxStream struct {
	session *muxSession
	id      uint32

	readable chan struct{} // a token when there is something new to read
	writable chan struct{} // a token when there is something new about writing
	readEnd  deadline
	writeEnd deadline

	mu         sync.Mutex
	in         []byte // received, not read; at most muxWindow
	inOffset   int    // of the first unread byte
	uncredited int    // bytes read that the peer does not know of
	window     int    // bytes we may send
	closed     bool   // by us
	peerDone   bool   // closed by the peer
}

func newMuxStream(session *muxSession, id uint32) *muxStream {
	return &muxStream{session: session, id: id, window: muxWindow, readable: make(chan struct{}, 1), writable: make(chan struct{}, 1)}
}

// errStreamClosed is for streams that we closed.
var errStreamClosed = fault.New(fault.Unavailable, "link.Stream", "the stream is closed")

// Read returns what has arrived, or waits.
func (s *muxStream) Read(p []byte) (int, error) {
	for {
		n, credit, err := s.take(p)
		if credit > 0 {
			// A failure ends the session, which the next call tells of.
			_ = s.session.write(muxCredit, s.id, binary.BigEndian.AppendUint32(nil, uint32(credit)))
		}
		if n > 0 || err != nil || len(p) == 0 {
			return n, err
		}
		select {
		case <-s.readable:
		case <-s.readEnd.passed():
			return 0, os.ErrDeadlineExceeded
		case <-s.session.done:
			if n, _, err := s.take(p); n > 0 || err != nil { // arrived just before the end
				return n, err
			}
			return 0, s.session.Err()
		}
	}
}

// take moves unread bytes to p. A credit is for the peer.
func (s *muxStream) take(p []byte) (n, credit int, err error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.closed {
		return 0, 0, errStreamClosed
	}
	n = copy(p, s.in[s.inOffset:])
	s.inOffset += n
	if s.inOffset == len(s.in) {
		s.in, s.inOffset = s.in[:0], 0
		if n == 0 && s.peerDone {
			return 0, 0, io.EOF
		}
	}
	if s.uncredited += n; s.uncredited >= muxWindow/2 {
		credit, s.uncredited = s.uncredited, 0
	}
	return n, credit, nil
}

// deliver appends what the peer sent; false if it sent more than it may.
func (s *muxStream) deliver(data []byte) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.closed {
		return true // thrown away; the peer learns of the close and stops
	}
	if len(s.in)-s.inOffset+s.uncredited+len(data) > muxWindow {
		return false
	}
	if s.inOffset > 0 && len(s.in)+len(data) > muxWindow {
		s.in = s.in[:copy(s.in, s.in[s.inOffset:])]
		s.inOffset = 0
	}
	s.in = append(s.in, data...)
	signal(s.readable)
	return true
}

// Write sends p in short frames as the peer reads.
func (s *muxStream) Write(p []byte) (int, error) {
	written := 0
	for written < len(p) {
		select {
		case <-s.writeEnd.passed():
			return written, os.ErrDeadlineExceeded
		default:
		}
		n, err := s.reserve(min(len(p)-written, muxMaxData))
		if err != nil {
			return written, err
		}
		if n > 0 {
			if err := s.session.write(muxData, s.id, p[written:written+n]); err != nil {
				return written, err
			}
			written += n
			continue
		}
		select {
		case <-s.writable:
		case <-s.writeEnd.passed():
			return written, os.ErrDeadlineExceeded
		case <-s.session.done:
			return written, s.session.Err()
		}
	}
	return written, nil
}

// reserve takes up to n bytes of the window.
func (s *muxStream) reserve(n int) (int, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.closed {
		return 0, errStreamClosed
	}
	if s.peerDone {
		return 0, fault.New(fault.Unavailable, "link.Stream", "the peer closed the stream")
	}
	n = min(n, s.window)
	s.window -= n
	return n, nil
}

// grant adds to the window; false if it grows beyond what it ever was.
func (s *muxStream) grant(n uint32) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	if int64(s.window)+int64(n) > muxWindow {
		return false
	}
	s.window += int(n)
	signal(s.writable)
	return true
}

func (s *muxStream) peerClosed() {
	s.mu.Lock()
	s.peerDone = true
	over := s.closed
	s.mu.Unlock()
	signal(s.readable)
	signal(s.writable)
	if over {
		s.session.forget(s.id)
	}
}

// Close ends both directions; what was written before still arrives.
func (s *muxStream) Close() error {
	s.mu.Lock()
	if s.closed {
		s.mu.Unlock()
		return nil
	}
	s.closed = true
	s.in, s.inOffset = nil, 0
	over := s.peerDone
	s.mu.Unlock()
	signal(s.readable)
	signal(s.writable)
	err := s.session.write(muxClose, s.id, nil)
	if over {
		s.session.forget(s.id)
	}
	return err
}

// SetDeadline sets both deadlines.
func (s *muxStream) SetDeadline(t time.Time) error {
	return errors.Join(s.SetReadDeadline(t), s.SetWriteDeadline(t))
}

// SetReadDeadline ends waits of Read at t; zero: never.
func (s *muxStream) SetReadDeadline(t time.Time) error {
	s.readEnd.set(t)
	signal(s.readable) // a wait that goes on looks at the new deadline
	return nil
}

// SetWriteDeadline ends waits of Write at t; zero: never.
func (s *muxStream) SetWriteDeadline(t time.Time) error {
	s.writeEnd.set(t)
	signal(s.writable) // a wait that goes on looks at the new deadline
	return nil
}

// SetPriority changes nothing on TCP: streams take turns frame by frame, which
// is what short messages need.
func (s *muxStream) SetPriority(Priority) {}

// signal leaves a token unless there is one.
func signal(channel chan struct{}) {
	select {
	case channel <- struct{}{}:
	default:
	}
}

// deadline is a moment that can be moved and waited for.
type deadline struct {
	mu    sync.Mutex
	timer *time.Timer
	over  chan struct{}
}

// passed returns a channel that is closed when the deadline has passed.
func (d *deadline) passed() <-chan struct{} {
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.over == nil {
		d.over = make(chan struct{})
	}
	return d.over
}

// set moves the deadline; zero removes it. Channels given out before are of no
// use any more.
func (d *deadline) set(t time.Time) {
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.timer != nil {
		d.timer.Stop()
	}
	d.timer, d.over = nil, make(chan struct{})
	if t.IsZero() {
		return
	}
	over := d.over
	d.timer = time.AfterFunc(time.Until(t), func() { close(over) })
}
