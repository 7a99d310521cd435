package main

import (
	"bytes"
	"fmt"
	"net"
	"strconv"
	"sync"
	"sync/atomic"
	"time"
)

// sink is all mail exchangers of the benchmark: one listener, a goroutine per
// connection, and a look at no more of what comes than its commands, the number
// of the message and the end of the data.
type sink struct {
	listener net.Listener
	serving  sync.WaitGroup

	mu    sync.Mutex
	conns map[net.Conn]struct{}

	run     atomic.Pointer[arrivals]
	foreign atomic.Int64 // mails that no run of this program sent
}

// arrivals are the mails of one run.
type arrivals struct {
	number int // of the run
	base   time.Time
	at     []int64 // by message: nanoseconds since base when the final dot was answered for the first time; 0: never
	copies []int32
	left   atomic.Int64
	done   chan struct{} // closed when every mail that was waited for is there
	closed atomic.Bool
	extra  atomic.Int64 // second and later copies
}

// Bounds of a connection.
const (
	sinkBufferBytes = 128 << 10
	maxSinkHead     = 16 << 10 // the number of the message stands within the first so many bytes
)

// idField carries the run and the number of a message.
const idField = "\nX-Bench: "

func newSink(addr string) (*sink, error) {
	l, err := net.Listen("tcp", addr)
	if err != nil {
		return nil, err
	}
	s := &sink{listener: l, conns: make(map[net.Conn]struct{})}
	s.serving.Go(s.accept)
	return s, nil
}

// expect begins a run of messages, of which none has arrived.
func (s *sink) expect(number, messages int, base time.Time) *arrivals {
	a := &arrivals{number: number, base: base, at: make([]int64, messages), copies: make([]int32, messages), done: make(chan struct{})}
	a.left.Store(int64(messages))
	s.run.Store(a)
	return a
}

// arrived books a mail.
func (a *arrivals) arrived(message int, now time.Time) {
	if atomic.AddInt32(&a.copies[message], 1) > 1 {
		a.extra.Add(1)
		return
	}
	atomic.StoreInt64(&a.at[message], max(int64(now.Sub(a.base)), 1))
	a.settle(1)
}

// settle says that n mails are not waited for any more.
func (a *arrivals) settle(n int) {
	if a.left.Add(int64(-n)) <= 0 && !a.closed.Swap(true) {
		close(a.done)
	}
}

func (s *sink) accept() {
	for {
		c, err := s.listener.Accept()
		if err != nil {
			return
		}
		s.mu.Lock()
		s.conns[c] = struct{}{}
		s.mu.Unlock()
		s.serving.Go(func() {
			k := sinkConn{sink: s, Conn: c, buf: make([]byte, sinkBufferBytes)}
			_ = k.serve() // a broken connection is the peer's to notice
			_ = c.Close()
			s.mu.Lock()
			delete(s.conns, c)
			s.mu.Unlock()
		})
	}
}

func (s *sink) close() {
	_ = s.listener.Close()
	s.mu.Lock()
	for c := range s.conns {
		_ = c.Close()
	}
	s.mu.Unlock()
	s.serving.Wait()
}

// sinkConn is one session.
type sinkConn struct {
	sink *sink
	net.Conn
	buf  []byte
	r, w int
	out  []byte
}

var (
	endOfData = []byte("\r\n.\r\n")
	helloText = "250-sink\r\n250-PIPELINING\r\n250-SIZE 52428800\r\n250-8BITMIME\r\n250 ENHANCEDSTATUSCODES\r\n"
)

func (k *sinkConn) serve() error {
	k.out = append(k.out, "220 sink ESMTP\r\n"...)
	for {
		line, err := k.line()
		if err != nil {
			return err
		}
		if len(line) < 4 {
			k.out = append(k.out, "500 5.5.2 What?\r\n"...)
			continue
		}
		switch string(bytes.ToUpper(line[:4])) {
		case "EHLO":
			k.out = append(k.out, helloText...)
		case "MAIL", "RCPT", "RSET", "NOOP", "HELO":
			k.out = append(k.out, "250 2.0.0 OK\r\n"...)
		case "DATA":
			k.out = append(k.out, "354 Go on\r\n"...)
			if err := k.data(); err != nil {
				return err
			}
		case "QUIT":
			k.out = append(k.out, "221 2.0.0 Bye\r\n"...)
			return k.flush()
		default:
			k.out = append(k.out, "502 5.5.1 Not here\r\n"...)
		}
	}
}

func (k *sinkConn) flush() error {
	if len(k.out) == 0 {
		return nil
	}
	_, err := k.Write(k.out)
	k.out = k.out[:0]
	return err
}

// fill reads more, after it has said what the peer may wait for.
func (k *sinkConn) fill() error {
	if err := k.flush(); err != nil {
		return err
	}
	if k.r == k.w {
		k.r, k.w = 0, 0
	} else if k.w == len(k.buf) {
		if k.r == 0 {
			return fmt.Errorf("a line has more than %d bytes", len(k.buf))
		}
		k.w = copy(k.buf, k.buf[k.r:k.w])
		k.r = 0
	}
	n, err := k.Read(k.buf[k.w:])
	k.w += n
	if n > 0 {
		return nil
	}
	return err
}

func (k *sinkConn) line() ([]byte, error) {
	for {
		if i := bytes.IndexByte(k.buf[k.r:k.w], '\n'); i >= 0 {
			line := k.buf[k.r : k.r+i]
			k.r += i + 1
			return bytes.TrimSuffix(line, []byte("\r")), nil
		}
		if err := k.fill(); err != nil {
			return nil, err
		}
	}
}

// data reads a message. What cannot be the beginning of its end is dropped as
// it comes.
func (k *sinkConn) data() error {
	run, message := -1, 0
	for read := 0; ; {
		have := k.buf[k.r:k.w]
		if run < 0 && read == 0 {
			// RFC 5322: the field is in the header section, and that comes first.
			run, message = findID(have[:min(len(have), maxSinkHead)])
		}
		if i := bytes.Index(have, endOfData); i >= 0 {
			k.r += i + len(endOfData)
			break
		}
		if run >= 0 || len(have) >= maxSinkHead {
			keep := min(len(have), len(endOfData)-1)
			read += len(have) - keep
			k.r = k.w - keep
		}
		if err := k.fill(); err != nil {
			return err
		}
	}
	a := k.sink.run.Load()
	if a == nil || run != a.number || message < 0 || message >= len(a.at) {
		k.sink.foreign.Add(1)
	} else {
		a.arrived(message, time.Now())
	}
	k.out = append(k.out, "250 2.0.0 Taken\r\n"...)
	return nil
}

// findID returns the run and number of a message, -1 and 0 if they are not in
// head as a whole.
func findID(head []byte) (run, message int) {
	i := bytes.Index(head, []byte(idField))
	if i < 0 {
		return -1, 0
	}
	value, _, whole := bytes.Cut(head[i+len(idField):], []byte("\r\n"))
	first, second, ok := bytes.Cut(value, []byte("-"))
	if !ok || !whole {
		return -1, 0
	}
	run, err := strconv.Atoi(string(first))
	if err != nil {
		return -1, 0
	}
	if message, err = strconv.Atoi(string(second)); err != nil {
		return -1, 0
	}
	return run, message
}
