package lab

import (
	"bufio"
	"context"
	"crypto/tls"
	"fmt"
	"log/slog"
	"net"
	"net/netip"
	"strings"
	"testing"
	"time"
)

const testPatience = 20 * time.Second

func startLab(t testing.TB, change func(*Config)) *Lab {
	t.Helper()
	cfg := Config{
		Seed: 1, Mode: Open, Dir: t.TempDir(), Logger: slog.New(slog.DiscardHandler),
		SlowDelay: 20 * time.Millisecond, Small: 2,
	}
	if change != nil {
		change(&cfg)
	}
	l, err := Start(context.Background(), cfg)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := l.Close(); err != nil {
			t.Errorf("Close: %v", err)
		}
	})
	return l
}

// tuned returns a change of Config that sets the limits of one provider.
func tuned(provider string, change func(*Profile)) func(*Config) {
	return func(c *Config) {
		c.Tune = func(p *Profile) {
			if p.Name == provider {
				change(p)
			}
		}
	}
}

func (l *Lab) mxAddr(t testing.TB, provider string) string {
	t.Helper()
	for _, p := range l.Providers() {
		if p.Name == provider {
			return netip.AddrPortFrom(p.Addrs[0], l.SMTPPort()).String()
		}
	}
	t.Fatalf("no provider %q", provider)
	return ""
}

func await(t testing.TB, l *Lab, what string, cond func(Report) bool) Report {
	t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), testPatience)
	defer cancel()
	if err := l.WaitFor(ctx, cond); err != nil {
		t.Fatalf("%s: %v; report %+v", what, err, l.Report())
	}
	return l.Report()
}

// talk is a client that sends lines and reads replies.
type talk struct {
	t    testing.TB
	conn net.Conn
	in   *bufio.Reader
}

func dial(t testing.TB, addr, source string) *talk {
	t.Helper()
	d := net.Dialer{Timeout: testPatience, LocalAddr: &net.TCPAddr{IP: net.ParseIP(source)}}
	conn, err := d.Dial("tcp", addr)
	if err != nil {
		t.Fatal(err)
	}
	if err := conn.SetDeadline(time.Now().Add(testPatience)); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = conn.Close() }) // often closed already
	return &talk{t: t, conn: conn, in: bufio.NewReader(conn)}
}

func (c *talk) send(text string) {
	c.t.Helper()
	if _, err := c.conn.Write([]byte(text)); err != nil {
		c.t.Fatalf("send %q: %v", text, err)
	}
}

// read returns one reply, its lines joined by "|".
func (c *talk) read() (string, error) {
	var lines []string
	for {
		line, err := c.in.ReadString('\n')
		if err != nil {
			return strings.Join(lines, "|"), err
		}
		line = strings.TrimRight(line, "\r\n")
		lines = append(lines, line)
		if len(line) < 4 || line[3] != '-' {
			return strings.Join(lines, "|"), nil
		}
	}
}

// want reads one reply and checks how it starts.
func (c *talk) want(prefix string) string {
	c.t.Helper()
	got, err := c.read()
	if err != nil || !strings.HasPrefix(got, prefix) {
		c.t.Fatalf("reply %q (%v), want %q…", got, err, prefix)
	}
	return got
}

func (c *talk) do(line, prefix string) string {
	c.t.Helper()
	c.send(line + "\r\n")
	return c.want(prefix)
}

// wantClosed checks that the server closed without another reply.
func (c *talk) wantClosed() {
	c.t.Helper()
	if got, err := c.read(); err == nil || got != "" {
		c.t.Fatalf("reply %q (%v), want the connection closed", got, err)
	}
}

// hello greets; the connection is ready for MAIL.
func (c *talk) hello() *talk {
	c.t.Helper()
	c.want("220 ")
	c.do("EHLO out.sender.test", "250")
	return c
}

func (c *talk) startTLS(l *Lab, name string) *talk {
	c.t.Helper()
	c.do("STARTTLS", "220")
	conn := tls.Client(c.conn, &tls.Config{RootCAs: l.CAPool(), ServerName: name})
	if err := conn.Handshake(); err != nil {
		c.t.Fatalf("handshake: %v", err)
	}
	c.conn, c.in = conn, bufio.NewReader(conn)
	c.do("EHLO out.sender.test", "250")
	return c
}

// mail sends one message to one recipient and returns the reply that ended
// the transaction.
func (c *talk) mail(from, to, content string) string {
	c.t.Helper()
	c.send(fmt.Sprintf("MAIL FROM:<%s>\r\n", from))
	c.want("250")
	c.send(fmt.Sprintf("RCPT TO:<%s>\r\n", to))
	if reply, err := c.read(); err != nil || reply[0] != '2' {
		if err == nil && !strings.HasPrefix(reply, "421") {
			c.do("RSET", "250")
		}
		return reply
	}
	c.do("DATA", "354")
	c.send(content + ".\r\n")
	reply, err := c.read()
	if err != nil {
		return ""
	}
	return reply
}

func message(id string) string {
	return "From: a@sender.test\r\nTo: b@example.test\r\nMessage-ID: <" + id + ">\r\nSubject: hello\r\n\r\nBody.\r\n"
}
