package main

import (
	"bufio"
	"bytes"
	"net"
	"net/netip"
	"strconv"
	"sync"
	"sync/atomic"
	"time"

	"github.com/relais-mta/relais/shared/fault"
)

// mood is how a mail host of the benchmark answers.
type mood int32

const (
	takes mood = iota // every message
	later             // sessions, but no recipient: 452
	busy              // nothing at all: 421 instead of a greeting
)

const (
	sinkTimeout   = 2 * time.Minute
	maxSinkLine   = 4096
	maxRecipients = 1 << 23 // of one class of mail
)

// sinks are the mail hosts of the benchmark: as little SMTP as can be, so that
// the machine's time goes to the relay.
type sinks struct {
	seen  *seen
	conns sync.WaitGroup

	mu        sync.Mutex
	listeners []net.Listener
	open      map[net.Conn]struct{}
	closed    bool
}

func newSinks(s *seen) *sinks { return &sinks{seen: s, open: make(map[net.Conn]struct{})} }

// listen opens a host whose mood may change.
func (s *sinks) listen(at netip.AddrPort, m *atomic.Int32) error {
	l, err := net.Listen("tcp", at.String())
	if err != nil {
		return fault.Wrap(err, fault.Unavailable, "benchdeep.listen", "no mail host can listen on %s", at)
	}
	s.mu.Lock()
	s.listeners = append(s.listeners, l)
	s.mu.Unlock()
	s.conns.Go(func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return // closed
			}
			if !s.keep(c) {
				return
			}
			s.conns.Go(func() {
				s.serve(c, mood(m.Load()))
				s.mu.Lock()
				delete(s.open, c)
				s.mu.Unlock()
				_ = c.Close() // the peer sees it
			})
		}
	})
	return nil
}

func (s *sinks) keep(c net.Conn) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.closed {
		_ = c.Close() // nobody waits for it
		return false
	}
	s.open[c] = struct{}{}
	return true
}

func (s *sinks) close() {
	s.mu.Lock()
	s.closed = true
	for _, l := range s.listeners {
		_ = l.Close() // ends its loop
	}
	for c := range s.open {
		_ = c.Close() // ends its session
	}
	s.mu.Unlock()
	s.conns.Wait()
}

// sinkSession is one SMTP session of a mail host.
type sinkSession struct {
	seen *seen
	mood mood
	r    *bufio.Reader
	w    *bufio.Writer
	to   []byte // local part of the recipient that was taken last
	data bool
}

func (s *sinks) serve(c net.Conn, m mood) {
	if c.SetDeadline(time.Now().Add(sinkTimeout)) != nil {
		return
	}
	if m == busy {
		s.seen.attempt(nil)
		_, _ = c.Write([]byte("421 4.3.2 Too busy, come back later\r\n")) // the peer is sent away
		return
	}
	ss := &sinkSession{seen: s.seen, mood: m, r: bufio.NewReaderSize(c, maxSinkLine), w: bufio.NewWriterSize(c, 512)}
	_, _ = ss.w.WriteString("220 sink ESMTP\r\n") // errors stay with the writer
	for {
		if ss.r.Buffered() == 0 && ss.w.Flush() != nil {
			return
		}
		line, err := ss.r.ReadSlice('\n')
		if err != nil || !ss.command(bytes.TrimRight(line, "\r\n")) {
			_ = ss.w.Flush() // the last reply, if anybody listens
			return
		}
		if !ss.data {
			continue
		}
		ss.data = false
		if c.SetDeadline(time.Now().Add(sinkTimeout)) != nil || !ss.body() {
			return
		}
	}
}

// command answers one command and reports whether the session goes on.
func (ss *sinkSession) command(line []byte) bool {
	reply := "250 2.0.0 OK\r\n"
	verb := bytes.ToUpper(line[:min(4, len(line))])
	switch string(verb) {
	case "EHLO":
		reply = "250-sink\r\n250-PIPELINING\r\n250-ENHANCEDSTATUSCODES\r\n250 8BITMIME\r\n"
	case "MAIL", "RSET":
		ss.to = ss.to[:0]
	case "RCPT":
		local := localPart(line)
		ss.seen.attempt(local)
		if ss.mood == later {
			reply = "452 4.2.2 Mailbox full\r\n"
			break
		}
		ss.to = append(ss.to[:0], local...)
	case "DATA":
		if len(ss.to) == 0 {
			reply = "503 5.5.1 No recipient\r\n"
			break
		}
		reply, ss.data = "354 Go on\r\n", true
	case "QUIT":
		_, _ = ss.w.WriteString("221 2.0.0 Bye\r\n") // errors stay with the writer
		return false
	}
	_, err := ss.w.WriteString(reply)
	return err == nil
}

// body reads a message and answers its final dot.
func (ss *sinkSession) body() bool {
	if ss.w.Flush() != nil {
		return false
	}
	for {
		line, err := ss.r.ReadSlice('\n')
		if err != nil && err != bufio.ErrBufferFull {
			return false
		}
		if err == nil && len(line) == 3 && line[0] == '.' {
			break
		}
	}
	ss.seen.take(ss.to)
	_, err := ss.w.WriteString("250 2.0.0 Taken\r\n")
	return err == nil
}

func localPart(line []byte) []byte {
	from, to := bytes.IndexByte(line, '<'), bytes.LastIndexByte(line, '@')
	if from < 0 || to < from {
		return nil
	}
	return line[from+1 : to]
}

// Classes of mail, the first letter of a recipient's local part; its number
// follows.
const (
	backlogMail = 'b'
	speedMail   = 't'
	promptMail  = 'p'
)

// seen is what the mail hosts saw. It costs a bit a message, so that the
// benchmark itself needs little memory.
type seen struct {
	taken      [3]marks
	tried      marks // mail of the backlog that a host was offered
	backlog    int   // numbers of it that count
	attempts   atomic.Int64
	duplicates atomic.Int64
	armed      atomic.Bool
	first      chan time.Time // the first attempt after arm
	mu         sync.Mutex
	firstAt    []time.Time // attempt of each prompt mail, by number
}

// marks is a set of numbers.
type marks struct {
	bits [maxRecipients / 64]atomic.Uint64
	n    atomic.Int64
	last atomic.Int64 // when the last one was added, Unix nanoseconds
}

func newSeen(backlog int) *seen { return &seen{first: make(chan time.Time, 1), backlog: backlog} }

func classOf(b byte) int {
	return bytes.IndexByte([]byte{backlogMail, speedMail, promptMail}, b)
}

func parseLocal(local []byte) (class, number int, ok bool) {
	if len(local) < 2 {
		return 0, 0, false
	}
	class = classOf(local[0])
	number, err := strconv.Atoi(string(local[1:]))
	return class, number, class >= 0 && err == nil && number >= 0 && number < maxRecipients
}

// arm makes the next attempt report itself on first.
func (s *seen) arm() {
	select {
	case <-s.first:
	default:
	}
	s.armed.Store(true)
}

// attempt notes a recipient that was offered, or with nil a session that was.
func (s *seen) attempt(local []byte) {
	s.attempts.Add(1)
	if s.armed.Load() && s.armed.CompareAndSwap(true, false) {
		s.first <- time.Now()
	}
	class, n, ok := parseLocal(local)
	switch {
	case !ok:
	case class == classOf(backlogMail) && n < s.backlog:
		s.tried.add(n)
	case class == classOf(promptMail):
		now := time.Now()
		s.mu.Lock()
		for len(s.firstAt) <= n {
			s.firstAt = append(s.firstAt, time.Time{})
		}
		if s.firstAt[n].IsZero() {
			s.firstAt[n] = now
		}
		s.mu.Unlock()
	}
}

func (s *seen) attemptOf(n int) time.Time {
	s.mu.Lock()
	defer s.mu.Unlock()
	if n >= len(s.firstAt) {
		return time.Time{}
	}
	return s.firstAt[n]
}

// take notes a message that was taken.
func (s *seen) take(local []byte) {
	class, n, ok := parseLocal(local)
	if !ok {
		return
	}
	if !s.taken[class].add(n) {
		s.duplicates.Add(1)
	}
}

// add reports false if the number is there already.
func (m *marks) add(n int) bool {
	bit := uint64(1) << (n % 64)
	if m.bits[n/64].Or(bit)&bit != 0 {
		return false
	}
	m.last.Store(time.Now().UnixNano())
	m.n.Add(1)
	return true
}

// count returns how many messages of a class were taken.
func (s *seen) count(class byte) int64 { return s.taken[classOf(class)].n.Load() }

func (s *seen) lastTaken(class byte) time.Time {
	return time.Unix(0, s.taken[classOf(class)].last.Load())
}
