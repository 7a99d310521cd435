package smtpconn

import (
	"bytes"
	"errors"
	"io"
	"log/slog"
	"net"
	"net/netip"
	"testing"
	"time"
)

// script is a socket that yields its input in pieces and takes all output.
type script struct {
	net.Conn
	in   []byte
	step int
	out  bytes.Buffer
}

func (s *script) Read(p []byte) (int, error) {
	if len(s.in) == 0 {
		return 0, io.EOF
	}
	n := copy(p[:min(s.step, len(p))], s.in)
	s.in = s.in[n:]
	return n, nil
}

func (s *script) Write(p []byte) (int, error)      { return s.out.Write(p) }
func (s *script) Close() error                     { return nil }
func (s *script) SetDeadline(time.Time) error      { return nil }
func (s *script) SetReadDeadline(time.Time) error  { return nil }
func (s *script) SetWriteDeadline(time.Time) error { return nil }

// reference reads a message one octet at a time, as slowly and plainly as the
// rules of RFC 5321 section 4.5.2 can be said.
func reference(input []byte) (message []byte, used int, ok bool) {
	var line []byte
	for i, b := range input {
		var last byte
		if len(line) > 0 {
			last = line[len(line)-1]
		}
		if b == 0 || (b == '\n') != (last == '\r') {
			return nil, 0, false
		}
		if line = append(line, b); b != '\n' {
			continue
		}
		if string(line) == ".\r\n" {
			return message, i + 1, true
		}
		message = append(message, bytes.TrimPrefix(line, []byte("."))...)
		line = nil
	}
	return nil, 0, false
}

// However the message is cut into reads, it is taken if and only if the plain
// reading takes it, with the same text, and what follows it stays unread.
func FuzzData(f *testing.F) {
	for _, tt := range smuggling {
		f.Add([]byte("hello"+tt.sequence+smuggled), 3)
	}
	f.Add([]byte("a\r\n..\r\n.b\r\n\r\n.\r\nNOOP\r\n"), 1)
	f.Add([]byte(".\r\n"), 2)
	f.Add(append(bytes.Repeat([]byte("x"), inputBytes-1), "\r\n.\r\n"...), inputBytes)
	m, err := newMetrics("fuzz", nil)
	if err != nil {
		f.Fatal(err)
	}
	server := &Server{cfg: Config{Name: "fuzz", Hostname: "mx.example", Logger: slog.New(slog.DiscardHandler)}, metrics: m}
	limits := testLimits()
	limits.MaxLineBytes, limits.MaxMessageBytes = 1<<30, 1<<30
	f.Fuzz(func(t *testing.T, input []byte, step int) {
		s := &script{in: input, step: max(step, 1)}
		c := newConn(server, s, OfferSTARTTLS, netip.Addr{}, limits)
		c.in = make([]byte, inputBytes)
		c.mode, c.data = modeData, dataState{lineStart: true}
		var got []byte
		var err error
		for err == nil {
			var chunk []byte
			chunk, err = c.Chunk()
			got = append(got, chunk...)
		}
		want, used, ok := reference(input)
		if taken := errors.Is(err, io.EOF); taken != ok {
			t.Fatalf("input %q by %d: taken is %v, want %v (%v)", input, s.step, taken, ok, err)
		}
		if !ok {
			return
		}
		if !bytes.Equal(got, want) {
			t.Errorf("input %q by %d: %q, want %q", input, s.step, got, want)
		}
		if left := c.w - c.r + len(s.in); left != len(input)-used {
			t.Errorf("input %q by %d: %d octets are left, want %d", input, s.step, left, len(input)-used)
		}
	})
}

func BenchmarkChunk(b *testing.B) {
	m, err := newMetrics("bench", nil)
	if err != nil {
		b.Fatal(err)
	}
	server := &Server{cfg: Config{Name: "bench", Logger: slog.New(slog.DiscardHandler)}, metrics: m}
	input := append(bytes.Repeat([]byte("Dear reader, this is a line of text as most of them are, with words.\r\n"), 146), ".\r\n"...)
	s := &script{step: inputBytes}
	c := newConn(server, s, OfferSTARTTLS, netip.Addr{}, testLimits())
	c.in = make([]byte, inputBytes)
	b.SetBytes(int64(len(input)))
	b.ReportAllocs()
	for b.Loop() {
		s.in, c.mode, c.data = input, modeData, dataState{lineStart: true}
		for {
			if _, err := c.Chunk(); err != nil {
				break
			}
		}
	}
}
