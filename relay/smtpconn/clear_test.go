package smtpconn

import (
	"strings"
	"testing"
)

// In a test network a client may log in without TLS; one that likes TLS gets it.
func TestClearText(t *testing.T) {
	_, backend, addr := start(t, ClearText, nil)
	p := dial(t, addr)
	if hello := p.do("EHLO c", "250-"); !strings.Contains(hello, "STARTTLS") || !strings.Contains(hello, "AUTH PLAIN") {
		t.Errorf("EHLO in clear text: %s", hello)
	}
	p.do("AUTH PLAIN AGEAd3Jvbmc=", "535 5.7.8")
	p.do("AUTH PLAIN AGEAcmlnaHQ=", "235 2.7.0")
	p.begin()
	p.send("x\r\n.\r\n")
	p.expect("250 2.0.0")
	if got := backend.got(); len(got) != 1 {
		t.Errorf("stored %q", got)
	}
	q := dial(t, addr)
	q.do("EHLO c", "250-")
	q.startTLS()
	q.do("EHLO c", "250-")
	q.do("AUTH PLAIN AGEAcmlnaHQ=", "235 2.7.0")
}
