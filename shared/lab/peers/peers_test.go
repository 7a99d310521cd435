package peers

import (
	"context"
	"crypto/tls"
	"fmt"
	"net"
	"net/netip"
	"net/smtp"
	"slices"
	"strings"
	"testing"
	"time"
)

// free returns an address that nobody listens on, one of the block that fleets
// take theirs from, which no interface lists. Tests that run at once give different
// numbers: nothing holds a port until a server does.
func free(t *testing.T, n int) netip.AddrPort {
	t.Helper()
	l, err := net.Listen("tcp", fmt.Sprintf("127.30.1.%d:0", n))
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	return l.Addr().(*net.TCPAddr).AddrPort()
}

// TestServers starts each server, whole and without what can be taken from it,
// and reads a mail that it was given over TLS, where its TLS works.
func TestServers(t *testing.T) {
	type start func(context.Context, Config) (*Server, error)
	for n, tc := range []struct {
		name    string
		start   start
		without []string
		offers  []string
	}{
		{"Postfix", Postfix, nil, []string{"8BITMIME", "SMTPUTF8", "CHUNKING", "PIPELINING", "DSN"}},
		{"Postfix without", Postfix, []string{"8BITMIME", "SMTPUTF8", "CHUNKING", "PIPELINING", "DSN"}, nil},
		{"Exim", Exim, nil, []string{"8BITMIME", "SMTPUTF8", "CHUNKING", "PIPELINING"}},
		{"Exim without", Exim, []string{"8BITMIME", "SMTPUTF8", "CHUNKING", "PIPELINING"}, nil},
		{"OpenSMTPD", OpenSMTPD, nil, []string{"8BITMIME", "DSN"}},
	} {
		t.Run(tc.name, func(t *testing.T) {
			t.Parallel()
			s, err := tc.start(t.Context(), Config{Dir: t.TempDir(), Addr: free(t, n+1), Host: "mx.peer.test", Domain: "peer.test", Without: tc.without})
			if err != nil {
				t.Fatal(err)
			}
			t.Cleanup(s.Close)
			offered := give(t, s, tc.name != "OpenSMTPD", "Subject: x\r\n\r\nline\r\n..dots\r\n.\r\n\r\n")
			for _, keyword := range []string{"8BITMIME", "SMTPUTF8", "CHUNKING", "PIPELINING", "DSN"} {
				if got := slices.Contains(offered, keyword); got != slices.Contains(tc.offers, keyword) {
					t.Errorf("offers %s: %v", keyword, got)
				}
			}
			ctx, cancel := context.WithTimeout(t.Context(), 30*time.Second)
			defer cancel()
			mails, err := s.Wait(ctx, 1)
			if err != nil || len(mails) != 1 {
				t.Fatalf("%d mails, %v\n%s", len(mails), err, s.Log())
			}
			if m := &mails[0]; string(m.Body) != "line\r\n..dots\r\n.\r\n\r\n" || m.Field("subject") != "x" || !strings.Contains(m.Field("Received"), "mx.peer.test") {
				t.Errorf("it arrived as %q", m.Content)
			}
		})
	}
}

// give hands a mail to the server and returns the keywords it offers.
func give(t *testing.T, s *Server, encrypted bool, text string) (offered []string) {
	t.Helper()
	c, err := smtp.Dial(s.cfg.Addr.String())
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	for _, keyword := range []string{"8BITMIME", "SMTPUTF8", "CHUNKING", "PIPELINING", "DSN"} {
		if ok, _ := c.Extension(keyword); ok {
			offered = append(offered, keyword)
		}
	}
	if encrypted {
		if err := c.StartTLS(&tls.Config{InsecureSkipVerify: true}); err != nil { // nobody signed it
			t.Fatalf("%v\n%s", err, s.Log())
		}
	}
	w, err := mail(c)
	if err == nil {
		if _, err = w.Write([]byte(text)); err == nil {
			err = w.Close()
		}
	}
	if err != nil {
		t.Fatalf("%v\n%s", err, s.Log())
	}
	_ = c.Quit()
	return offered
}

type writeCloser interface {
	Write([]byte) (int, error)
	Close() error
}

func mail(c *smtp.Client) (writeCloser, error) {
	if err := c.Mail("joe@client.test"); err != nil {
		return nil, err
	}
	if err := c.Rcpt("ann@peer.test"); err != nil {
		return nil, err
	}
	return c.Data()
}
