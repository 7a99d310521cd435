package lab

import (
	"bytes"
	"io"
	"strings"
	"time"
)

// say queues a reply. A newline in it starts another line of the same reply.
func (s *session) say(reply string) {
	code := reply[:min(3, len(reply))]
	for {
		line, rest, more := strings.Cut(reply, "\n")
		if !strings.HasPrefix(line, code) {
			line = code + " " + line
		}
		s.out = append(s.out, line...)
		if len(line) > 3 {
			sep := byte(' ')
			if more {
				sep = '-'
			}
			s.out[len(s.out)-len(line)+3] = sep
		}
		s.out = append(s.out, '\r', '\n')
		if !more {
			return
		}
		reply = rest
	}
}

// refuse queues a reply and counts it for n recipients when it refuses.
func (s *session) refuse(reply string, n int) {
	s.say(reply)
	if reply != "" {
		s.lane.refuse(reply[0], n)
		s.farm.moved()
	}
}

func (s *session) flush() error {
	if len(s.out) == 0 {
		return nil
	}
	if err := s.conn.SetWriteDeadline(time.Now().Add(replyTimeout)); err != nil {
		return err
	}
	_, err := s.conn.Write(s.out)
	s.out = s.out[:0]
	return err
}

// fill reads more input into dst. Replies wait until input runs dry, so a
// pipelined group is answered in one packet (RFC 2920 section 3.2).
func (s *session) fill(dst []byte) (int, error) {
	if err := s.flush(); err != nil {
		return 0, err
	}
	if err := s.conn.SetReadDeadline(time.Now().Add(s.farm.idle)); err != nil {
		return 0, err
	}
	n, err := s.conn.Read(dst)
	if n > 0 {
		return n, nil
	}
	if err == nil {
		err = io.ErrNoProgress
	}
	return 0, err
}

// line returns the next command without its line end, valid until the next
// read.
func (s *session) line() ([]byte, error) {
	scanned := s.r
	for {
		if i := bytes.IndexByte(s.in[scanned:s.w], '\n'); i >= 0 {
			line := s.in[s.r : scanned+i]
			s.r = scanned + i + 1
			if n := len(line); n > 0 && line[n-1] == '\r' {
				return line[:n-1], nil
			}
			s.p.fault("command ended by a bare LF", s.source, "")
			return line, nil
		}
		scanned = s.w
		if s.w-s.r > maxCommandBytes {
			return nil, errTooLong
		}
		if s.r > 0 {
			copy(s.in, s.in[s.r:s.w])
			s.w -= s.r
			scanned -= s.r
			s.r = 0
		}
		n, err := s.fill(s.in[s.w:])
		if err != nil {
			return nil, err
		}
		s.w += n
	}
}
