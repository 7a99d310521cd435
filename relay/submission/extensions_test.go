package submission

import (
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/relais-mta/relais/relay"
)

// chunk is a BDAT command with its octets; the last one ends the message.
func chunk(text string, last bool) string {
	word := ""
	if last {
		word = " LAST"
	}
	return fmt.Sprintf("BDAT %d%s\r\n%s", len(text), word, text)
}

func TestChunking(t *testing.T) {
	w := newWorld(t, nil)
	p := w.login(t)
	message := strings.ReplaceAll(goodMessage, "\n", "\r\n") + ".\r\n..\r\nend"
	for _, size := range []int{1, 7, 100, len(message)} {
		p.do("MAIL FROM:<bounce@acme.example>", "250")
		p.do("RCPT TO:<ann@example.net>", "250")
		for rest := message; rest != ""; {
			n := min(size, len(rest))
			p.send(chunk(rest[:n], n == len(rest)))
			p.expect("250")
			rest = rest[n:]
		}
		if got := w.spool.last(t); !strings.HasSuffix(got.text, "\r\nHello  Ann\r\n\r\n.\r\n..\r\nend\r\n") || got.env.BinaryMIME {
			t.Errorf("in chunks of %d it is stored as %q, binary %v", size, got.text, got.env.BinaryMIME)
		}
	}
	if n := w.spool.count(); n != 4 {
		t.Errorf("%d messages were accepted, want 4", n)
	}
	// What a rule refuses is answered at its chunk; the client's pipelined rest is
	// no message, and the session goes on.
	p.do("MAIL FROM:<bounce@acme.example>", "250")
	p.do("RCPT TO:<ann@example.net>", "250")
	p.send(chunk("From: x@foreign.example\r\n\r\n", false) + chunk("QUIT\r\n", true))
	p.expect("550 5.7.1")
	p.expect("503 5.5.1")
	p.do("MAIL FROM:<bounce@acme.example>", "250")
	p.do("RCPT TO:<ann@example.net>", "250")
	p.send(chunk(message[:20], false) + "RSET\r\n") // given up: the body must not stay in the store
	p.expect("250")
	p.expect("250")
	p.mail(goodMessage, "250")
	if n := w.spool.count(); n != 5 {
		t.Errorf("%d messages were accepted, want 5", n)
	}
}

func TestBinaryMIME(t *testing.T) {
	const header = "From: joe@acme.example\r\nDate: Thu, 1 Jan 2026 00:00:00 +0000\r\nMessage-ID: <1@acme.example>\r\nMIME-Version: 1.0\r\nContent-Type: application/octet-stream\r\nContent-Transfer-Encoding: binary\r\n"
	w := newWorld(t, nil)
	p := w.login(t)
	for _, tt := range []struct {
		name, message, want string
		binary              bool
	}{
		{"octets", header + "\r\n\x00\r\n.\r\n\n\r\xff", "250", true},
		{"no line end at the end", header + "\r\nabc", "250", true},
		{"text after all", header + "\r\nabc\r\n", "250", false},
		{"a long line", header + "\r\n" + strings.Repeat("x", 5000) + "\r\n", "250", true},
		{"bare LF in the header section", "A: b\n" + header + "\r\nabc", "554 5.6.0", false},
		{"NUL in the header section", "A: \x00\r\n" + header + "\r\nabc", "554 5.6.0", false},
		{"a long line in the header section", "A: " + strings.Repeat("x", 1000) + "\r\n" + header + "\r\nabc", "554 5.6.0", false},
	} {
		p.do("MAIL FROM:<bounce@acme.example> BODY=BINARYMIME", "250")
		p.do("RCPT TO:<ann@example.net>", "250")
		p.send(chunk(tt.message, true))
		if p.expect(tt.want); tt.want != "250" {
			continue
		}
		got := w.spool.last(t)
		if !strings.HasSuffix(got.text, tt.message) || got.env.BinaryMIME != tt.binary {
			t.Errorf("%s: stored as %q, binary %v", tt.name, got.text, got.env.BinaryMIME)
		}
	}
}

// A message needs SMTPUTF8 when its header section does, not because the client
// said the word.
func TestSMTPUTF8(t *testing.T) {
	w := newWorld(t, nil)
	p := w.login(t)
	for _, tt := range []struct {
		name, params, rcpt, subject string
		want                        string
		needs, eightBit             bool
	}{
		{"only the word", " SMTPUTF8", "ann@example.net", "hello", "250", false, false},
		{"address", " SMTPUTF8", "jos\u00e9@b\u00fccher.example", "hello", "250", false, false},
		{"header", " SMTPUTF8", "ann@example.net", "h\u00e9llo", "250", true, true},
		{"header that is not UTF-8", " SMTPUTF8", "ann@example.net", "h\xe9llo", "550 5.6.0", false, false},
		{"a client of old", "", "ann@example.net", "h\xe9llo", "250", false, true},
	} {
		p.do("MAIL FROM:<bounce@acme.example>"+tt.params, "250")
		p.do("RCPT TO:<"+tt.rcpt+">", "250")
		p.do("DATA", "354")
		p.send("From: joe@acme.example\r\nSubject: " + tt.subject + "\r\n\r\nbody\r\n.\r\n")
		if p.expect(tt.want); tt.want != "250" {
			continue
		}
		got := w.spool.last(t)
		if got.env.SMTPUTF8 != tt.needs || got.env.EightBit != tt.eightBit {
			t.Errorf("%s: needs SMTPUTF8 %v, 8-bit %v", tt.name, got.env.SMTPUTF8, got.env.EightBit)
		}
		if protocol := " with UTF8SMTPSA"; strings.Contains(got.text, protocol) != (tt.params != "") {
			t.Errorf("%s: trace field in %q", tt.name, got.text)
		}
	}
	if got := w.spool.accepted[1].env.Recipients[0].Address.String(); got != "jos\u00e9@xn--bcher-kva.example" {
		t.Errorf("the address is %q", got)
	}
}

func TestFutureRelease(t *testing.T) {
	w := newWorld(t, nil)
	p := w.login(t)
	for _, tt := range []struct {
		params, field, want string
		wait, lives         time.Duration // until the first attempt, and from then to the expiry
	}{
		{" HOLDFOR=90", "", "250", 90 * time.Second, 24 * time.Hour},
		{" HOLDFOR=90", "X-Relais-Expire: 61s\n", "250", 90 * time.Second, 61 * time.Second},
		{" HOLDUNTIL=2020-01-01T00:00:00Z", "", "250", 0, 24 * time.Hour},
		{" HOLDFOR=90", "X-Relais-Send-At: 2020-01-01T00:00:00Z\n", "550 5.6.0", 0, 0},
	} {
		p.do("MAIL FROM:<bounce@acme.example>"+tt.params, "250")
		p.do("RCPT TO:<ann@example.net>", "250")
		p.do("DATA", "354")
		p.send(strings.ReplaceAll(tt.field+goodMessage, "\n", "\r\n") + ".\r\n")
		if p.expect(tt.want); tt.want != "250" {
			continue
		}
		env := w.spool.last(t).env
		start := env.AcceptedAt
		if !env.NotBefore.IsZero() {
			start = env.NotBefore
		}
		if wait := start.Sub(env.AcceptedAt); wait > tt.wait || wait < tt.wait-20*time.Second || env.ExpiresAt.Sub(start) != tt.lives {
			t.Errorf("%s %s: accepted %v, not before %v, expires %v", tt.params, tt.field, env.AcceptedAt, env.NotBefore, env.ExpiresAt)
		}
	}
}

// Python's smtplib knows SMTPUTF8 and passes DSN's parameters on.
func TestPythonSubmitsWithExtensions(t *testing.T) {
	python := lookPath(t, "python3")
	w := newWorld(t, nil)
	script := filepath.Join(t.TempDir(), "submit.py")
	if err := os.WriteFile(script, []byte(`
import smtplib, ssl, sys
from email.message import EmailMessage
addr, user, secret = sys.argv[1:]
context = ssl.create_default_context()
context.check_hostname = False
context.verify_mode = ssl.CERT_NONE
message = EmailMessage()
message["From"] = "José <josé@acme.example>"
message["To"] = "bärbel@bücher.example"
message["Subject"] = "grüße"
message.set_content("line\n")
host, port = addr.rsplit(":", 1)
with smtplib.SMTP_SSL(host, int(port), context=context) as s:
    s.login(user, secret)
    for name in ("smtputf8", "dsn", "chunking", "binarymime", "futurerelease"):
        if not s.has_extn(name):
            print("lacks", name)
    s.send_message(message)
    s.sendmail("joe@acme.example", ["ann@example.net"], "From: joe@acme.example\r\n\r\nx\r\n", mail_options=["RET=FULL", "ENVID=job+2B7"], rcpt_options=["NOTIFY=SUCCESS,DELAY", "ORCPT=rfc822;ann@example.net"])
`), 0o600); err != nil {
		t.Fatal(err)
	}
	out, err := exec.CommandContext(t.Context(), python, script, w.implicit, w.user, testSecret).CombinedOutput()
	if err != nil || len(out) > 0 {
		t.Fatalf("python says %q, error %v", out, err)
	}
	first, second := w.spool.accepted[0].env, w.spool.accepted[1].env
	if !first.SMTPUTF8 || first.Sender.String() != "jos\u00e9@acme.example" || first.Recipients[0].Address.String() != "b\u00e4rbel@xn--bcher-kva.example" {
		t.Errorf("the first is %+v", first)
	}
	want := relay.Recipient{Address: second.Recipients[0].Address, Notify: relay.NotifySuccess | relay.NotifyDelay, ORCPT: "rfc822;ann@example.net"}
	if second.EnvID != "job+2B7" || !second.RetFull || second.Recipients[0] != want {
		t.Errorf("the second is %+v", second)
	}
}
