package smtpconn

import (
	"fmt"
	"io"
	"log/slog"
	"net/netip"
	"runtime"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/emersion/go-smtp"
)

// Each sequence has been used to make one server see the end of a message where
// another does not. None may end the data here, and none may be delivered.
var smuggling = []struct{ name, sequence, reply string }{
	{"LF . LF", "\n.\n", "554 5.6.0"},
	{"LF . CRLF", "\n.\r\n", "554 5.6.0"},
	{"LF . CR", "\n.\r", "554 5.6.0"},
	{"CR . CR", "\r.\r", "554 5.6.0"},
	{"CR . LF", "\r.\n", "554 5.6.0"},
	{"CR . CRLF", "\r.\r\n", "554 5.6.0"},
	{"CRLF . LF", "\r\n.\n", "554 5.6.0"},
	{"CRLF . CR", "\r\n.\r", "554 5.6.0"},
	{"CRLF . CR CR LF", "\r\n.\r\r\n", "554 5.6.0"},
	{"CRLF . CR X", "\r\n.\rX", "554 5.6.0"},
	{"CRLF NUL . CRLF", "\r\n\x00.\r\n", "554 5.6.0"},
	{"CRLF . NUL CRLF", "\r\n.\x00\r\n", "554 5.6.0"},
	{"CR NUL LF . CR NUL LF", "\r\x00\n.\r\x00\n", "554 5.6.0"},
	{"CR CR LF . CRLF", "\r\r\n.\r\n", "554 5.6.0"},
	{"LF CR . CRLF", "\n\r.\r\n", "554 5.6.0"},
	{"LF LF . LF LF", "\n\n.\n\n", "554 5.6.0"},
	{"bare CR in text", "a\rb", "554 5.6.0"},
	{"bare LF in text", "a\nb", "554 5.6.0"},
	{"NUL in text", "a\x00b", "554 5.6.0"},
}

const smuggled = "MAIL FROM:<evil@example.com>\r\nRCPT TO:<victim@example.net>\r\nDATA\r\nSubject: smuggled\r\n\r\nx\r\n.\r\n"

func TestSmuggling(t *testing.T) {
	_, backend, addr := start(t, OfferSTARTTLS, func(_ *Config, l *Limits) { l.MaxConnections, l.MaxConnectionsPerIP = 1000, 1000 })
	for _, tt := range smuggling {
		for _, prefix := range []string{"Subject: x\r\n\r\nhello", ""} {
			text := prefix + tt.sequence + smuggled
			// Whole, and cut at every place around the sequence.
			cuts := []int{0}
			for at := len(prefix); at <= len(prefix)+len(tt.sequence)+1; at++ {
				cuts = append(cuts, at)
			}
			for _, cut := range cuts {
				t.Run(fmt.Sprintf("%s/%d/%d", tt.name, len(prefix), cut), func(t *testing.T) {
					p := dial(t, addr)
					p.begin()
					if cut > 0 {
						p.send(text[:cut])
					}
					// The rest may meet a closed socket.
					_, _ = io.WriteString(p.Conn, text[cut:])
					p.expect(tt.reply)
					p.expectEnd()
				})
			}
		}
	}
	if got := backend.got(); len(got) != 0 {
		t.Errorf("%d messages were taken, such as %q", len(got), got[0])
	}
}

// One octet at a time, the end must be found where it is and nowhere else.
func TestDataByteByByte(t *testing.T) {
	_, backend, addr := start(t, OfferSTARTTLS, nil)
	p := dial(t, addr)
	p.begin()
	for _, c := range []byte("a\r\n..\r\n.b\r\n\r\n.\r\n") {
		p.send(string(c))
	}
	p.expect("250 2.0.0")
	if got := backend.got(); len(got) != 1 || got[0] != "a\r\n.\r\nb\r\n\r\n" {
		t.Errorf("stored %q", got)
	}
}

func TestBadCommandLines(t *testing.T) {
	tests := []struct{ name, line, reply string }{
		{"bare LF", "NOOP\n", "500 5.5.2"},
		{"bare LF before a good line", "NOOP\nNOOP\r\n", "500 5.5.2"},
		{"bare CR", "NO\rOP\r\n", "500 5.5.2"},
		{"CR CR LF", "NOOP\r\r\n", "500 5.5.2"},
		{"NUL", "NOOP\x00\r\n", "500 5.5.2"},
		{"only LF", "\n", "500 5.5.2"},
		{"too long", "NOOP " + strings.Repeat("x", maxCommandBytes) + "\r\n", "500 5.5.2"},
		{"endless", "NOOP " + strings.Repeat("x", inputBytes), "500 5.5.2"},
		{"endless without a space", strings.Repeat("x", inputBytes), "500 5.5.2"},
	}
	_, _, addr := start(t, OfferSTARTTLS, func(_ *Config, l *Limits) { l.MaxConnections, l.MaxConnectionsPerIP = 100, 100 })
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			p := dial(t, addr)
			p.do("EHLO c", "250-")
			p.send(tt.line)
			p.expect(tt.reply)
			p.expectEnd()
		})
	}
}

func TestMessageLimits(t *testing.T) {
	line := strings.Repeat("x", 98) + "\r\n"
	tests := []struct{ name, data, reply string }{
		{"line of 998", strings.Repeat("y", 998) + "\r\n", "250"},
		{"line of 999", strings.Repeat("y", 999) + "\r\n", "554 5.6.0"},
		{"stuffed line of 998", "." + "." + strings.Repeat("y", 997) + "\r\n", "250"},
		{"line longer than the buffer", strings.Repeat("y", 3*inputBytes) + "\r\n", "554 5.6.0"},
		{"just fits", strings.Repeat(line, 1000), "250"},
		{"one octet more", strings.Repeat(line, 1000) + "\r\n", "552 5.3.4"},
		{"refused by the session", "refuse\r\n" + strings.Repeat(line, 900), "550 5.6.0"},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			_, _, addr := start(t, OfferSTARTTLS, nil)
			p := dial(t, addr)
			p.begin()
			p.send(tt.data + ".\r\n")
			p.expect(tt.reply)
			// The session goes on, in step.
			p.do("NOOP", "250")
			p.do("MAIL FROM:<>", "250")
		})
	}
}

func TestSessionLimits(t *testing.T) {
	t.Run("commands", func(t *testing.T) {
		_, _, addr := start(t, OfferSTARTTLS, func(_ *Config, l *Limits) { l.MaxCommandsPerSession = 3 })
		p := dial(t, addr)
		for range 3 {
			p.do("NOOP", "250")
		}
		p.do("NOOP", "421 4.7.0")
		p.expectEnd()
	})
	t.Run("errors", func(t *testing.T) {
		_, _, addr := start(t, OfferSTARTTLS, func(_ *Config, l *Limits) { l.MaxErrorsPerSession = 2 })
		p := dial(t, addr)
		p.do("FOO", "500")
		p.do("FOO", "500")
		p.do("NOOP", "421 4.7.0")
		p.expectEnd()
	})
	t.Run("messages", func(t *testing.T) {
		_, _, addr := start(t, OfferSTARTTLS, func(_ *Config, l *Limits) { l.MaxMessagesPerSession = 1 })
		p := dial(t, addr)
		p.begin()
		p.send("x\r\n.\r\n")
		p.expect("250")
		p.do("MAIL FROM:<>", "421 4.7.0")
		p.expectEnd()
	})
	t.Run("silence", func(t *testing.T) {
		inBubble(t, testLimits(), func(p *peer, _ *Server, _ *recorder) {
			p.send("NOO")
			p.expect("421 4.4.2")
			p.expectEnd()
		})
	})
	t.Run("silence in data", func(t *testing.T) {
		inBubble(t, testLimits(), func(p *peer, _ *Server, backend *recorder) {
			p.begin()
			p.send("half a message\r\n")
			p.expect("421 4.4.2")
			p.expectEnd()
			if got := backend.got(); len(got) != 0 {
				t.Errorf("stored %q", got)
			}
		})
	})
	t.Run("end in data", func(t *testing.T) {
		s, backend, addr := start(t, OfferSTARTTLS, nil)
		p := dial(t, addr)
		p.begin()
		p.send("half a message\r\n.\r")
		_ = p.Close()
		if err := s.Shutdown(t.Context()); err != nil { // waits for the session
			t.Fatal(err)
		}
		if got := backend.got(); len(got) != 0 {
			t.Errorf("stored %q", got)
		}
	})
}

func TestConnectionLimits(t *testing.T) {
	s, _, addr := start(t, OfferSTARTTLS, func(_ *Config, l *Limits) { l.MaxConnections, l.MaxConnectionsPerIP = 3, 2 })
	first, second := dial(t, addr), dial(t, addr)
	refused := connect(t, addr)
	refused.expect("421 4.7.0 Too many connections from your address")
	refused.expectEnd()
	first.do("QUIT", "221")
	first.expectEnd()
	dial(t, addr).do("NOOP", "250")
	second.do("NOOP", "250")
	t.Run("all clients", func(t *testing.T) {
		_, _, addr := start(t, OfferSTARTTLS, func(_ *Config, l *Limits) { l.MaxConnections, l.MaxConnectionsPerIP = 1, 1 })
		dial(t, addr).do("NOOP", "250")
		connect(t, addr).expect("421 4.3.2 Too many connections, try again later")
	})
	s.mu.Lock()
	defer s.mu.Unlock()
	if len(s.conns) != 2 || len(s.clients) != 1 {
		t.Errorf("%d connections of %d clients are counted, want 2 of 1", len(s.conns), len(s.clients))
	}
}

func TestClientOf(t *testing.T) {
	for ip, want := range map[string]string{
		"192.0.2.1":            "192.0.2.1",
		"2001:db8:1:2:3:4:5:6": "2001:db8:1:2::",
		"2001:db8:1:2::":       "2001:db8:1:2::",
	} {
		if got := ClientOf(netip.MustParseAddr(ip)); got != netip.MustParseAddr(want) {
			t.Errorf("ClientOf(%s) = %v, want %s", ip, got, want)
		}
	}
}

// A defect in a session costs that session, and is logged.
func TestPanicInSession(t *testing.T) {
	var log lockedBuffer
	_, backend, addr := start(t, OfferSTARTTLS, func(c *Config, _ *Limits) {
		c.Logger = slog.New(slog.NewTextHandler(&log, nil))
		inner := c.NewSession
		c.NewSession = func(conn *Conn) smtp.Session { return panicking{inner(conn)} }
	})
	p := dial(t, addr)
	p.do("EHLO c", "250-")
	p.do("MAIL FROM:<panic@example.com>", "421 4.0.0")
	p.expectEnd()
	// go-smtp logs after it has answered.
	for deadline := time.Now().Add(10 * time.Second); !strings.Contains(log.String(), "a defect"); {
		if time.Now().After(deadline) {
			t.Fatalf("the log holds %q", log.String())
		}
		runtime.Gosched()
	}
	p = dial(t, addr)
	p.begin()
	p.send("x\r\n.\r\n")
	p.expect("250")
	if len(backend.got()) != 1 {
		t.Error("the next session does not work")
	}
}

type panicking struct{ smtp.Session }

func (s panicking) Mail(from string, opts *smtp.MailOptions) error {
	if strings.Contains(s.Session.(*recordedSession).conn.Argument(), "panic@") {
		panic("a defect")
	}
	return s.Session.Mail(from, opts)
}

type lockedBuffer struct {
	mu sync.Mutex
	b  strings.Builder
}

func (l *lockedBuffer) Write(p []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.Write(p)
}

func (l *lockedBuffer) String() string {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.String()
}
