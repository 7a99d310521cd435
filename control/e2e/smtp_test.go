package e2e

import (
	"crypto/tls"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/relais-mta/relais/shared/lab"
	"github.com/relais-mta/relais/shared/lab/fleet"
)

// TestSwaksGetsTheRightCodes tries with an independent client what must not
// work, and what must.
func TestSwaksGetsTheRightCodes(t *testing.T) {
	swaks := need(t, "swaks")
	// swaks is slow with much text: what is too large begins at a mebibyte here.
	f := start(t, fleet.Config{Open: true, Policy: map[string]string{"submission": "max_message_bytes = 1048576\n"}})
	r := f.Relays[0]
	starttls, tlsPort := []string{"--server", r.Submission(), "--tls"}, []string{"--server", r.Submissions(), "--tls-on-connect"}
	auth := []string{"--auth", "PLAIN", "--auth-user", f.User, "--auth-password", f.Secret}
	login := []string{"--auth", "LOGIN", "--auth-user", f.User, "--auth-password", f.Secret}
	from, to := []string{"--from", "me@" + fleet.Domain}, []string{"--to", "accept-1@gmail.test"}
	big := filepath.Join(t.TempDir(), "big")
	if err := os.WriteFile(big, []byte(strings.Repeat(strings.Repeat("x", 76)+"\n", 1<<20/76)), 0o600); err != nil {
		t.Fatal(err)
	}
	join := func(lists ...[]string) (out []string) {
		for _, l := range lists {
			out = append(out, l...)
		}
		return out
	}
	for _, tc := range []struct {
		name string
		args []string
		want string
		ok   bool
	}{
		{"AUTH before TLS", join([]string{"--server", r.Submission()}, auth, from, to), "", false},
		{"no AUTH", join(starttls, from, to), "530 5.7.0", false},
		{"wrong password", join(starttls, []string{"--auth", "PLAIN", "--auth-user", f.User, "--auth-password", "rs1_wrong"}, from, to), "535 5.7.8", false},
		{"foreign From", join(starttls, auth, []string{"--from", "me@other.test"}, to), "550 5.7.1", false},
		{"foreign header From", join(starttls, auth, from, to, []string{"--header", "From: boss@other.test"}), "550 5.7.1", false},
		{"oversize", join(starttls, auth, from, to, []string{"--body", "@" + big}), "552 5.3.4", false},
		{"relaying on 25", join([]string{"--server", r.Inbound()}, from, []string{"--to", "accept-1@gmail.test"}), "550 5.7.1", false},
		{"postmaster on 25", join([]string{"--server", r.Inbound()}, from, []string{"--to", "postmaster@" + fleet.Domain}), "550 5.7.1", false},
		{"forged return path on 25", join([]string{"--server", r.Inbound()}, from, []string{"--to", "rabcdefghijklmnopqrstuvwxyz234567abcdefghijklmnopqrstuvwx@rp." + fleet.Domain}), "550 5.7.1", false},
		{"PLAIN after STARTTLS", join(starttls, auth, from, to), "250 2.0.0", true},
		{"LOGIN after STARTTLS", join(starttls, login, from, to), "250 2.0.0", true},
		{"implicit TLS", join(tlsPort, auth, from, to), "250 2.0.0", true},
	} {
		t.Run(tc.name, func(t *testing.T) {
			out, err := command(t, swaks, tc.args...)
			if (err == nil) != tc.ok || !strings.Contains(out, tc.want) {
				t.Errorf("exit %v, want success %v and %q:\n%s", err, tc.ok, tc.want, out)
			}
		})
	}
	if err := f.Lab.WaitFor(within(t, time.Minute), func(r lab.Report) bool { return r.Accepted == 3 }); err != nil {
		t.Errorf("the three good mails did not arrive: %v", err)
	}
}

// TestPythonSubmits sends with Python's smtplib and reads what arrived.
func TestPythonSubmits(t *testing.T) {
	python := need(t, "python3")
	f := start(t, fleet.Config{Open: true})
	r := f.Relays[0]
	host, port, _ := strings.Cut(r.Submissions(), ":")
	script := fmt.Sprintf(`
import smtplib, ssl
from email.message import EmailMessage
m = EmailMessage()
m["From"], m["To"], m["Bcc"] = "Me <me@%[1]s>", "accept-1@gmail.test", "accept-2@yahoo.test"
m["Subject"] = "Grüße"
m.set_content("Bonjour à tous\n.\n..dots\nend\n")
ctx = ssl.create_default_context(cafile=%[2]q)
with smtplib.SMTP_SSL(%[3]q, %[4]s, context=ctx) as s:
    s.login(%[5]q, %[6]q)
    print(s.send_message(m))
`, fleet.Domain, f.CAFile, host, port, f.User, f.Secret)
	if out, err := command(t, python, "-c", script); err != nil || strings.TrimSpace(out) != "{}" {
		t.Fatalf("%v\n%s", err, out)
	}
	if err := f.Lab.WaitFor(within(t, time.Minute), func(r lab.Report) bool { return r.Accepted == 2 }); err != nil {
		t.Fatal(err)
	}
	for _, p := range f.Lab.Providers() {
		for m, err := range f.Lab.Mails(p.Name) {
			if err != nil {
				t.Fatal(err)
			}
			_, content, err := f.Lab.Mail(p.Name, m.ID)
			if err != nil {
				t.Fatal(err)
			}
			text := string(content)
			if strings.Contains(text, "Bcc:") || strings.Contains(text, "for <") {
				t.Errorf("Bcc or the other recipient shows:\n%s", text)
			}
			if !strings.Contains(text, "\r\n\r\n") || !strings.Contains(text, "\r\n.\r\n..dots\r\nend\r\n") {
				t.Errorf("the body is not what was sent:\n%q", text)
			}
		}
	}
}

// TestSmugglingIsRefused sends sequences that some servers take for the end of
// the data, in one write and byte by byte.
func TestSmugglingIsRefused(t *testing.T) {
	f := start(t, fleet.Config{Open: true})
	r := f.Relays[0]
	hidden := "MAIL FROM:<ceo@" + fleet.Domain + ">\r\nRCPT TO:<accept-9@gmail.test>\r\nDATA\r\nFrom: ceo@" + fleet.Domain + "\r\n\r\nsmuggled\r\n.\r\n"
	for _, end := range []string{"\n.\n", "\n.\r\n", "\r.\r", "\r.\r\n", "\r\n.\n", "\r\n.\r", "\n.\r", "\r\n\x00.\r\n", "\r\n.\x00\r\n"} {
		for _, whole := range []bool{true, false} {
			t.Run(fmt.Sprintf("%q whole=%v", end, whole), func(t *testing.T) {
				c := dial(t, r.Submission())
				c.startTLS(f.ClientTLS(r))
				c.cmd("EHLO client.test", "250")
				c.cmd("AUTH PLAIN "+plain(f.User, f.Secret), "235")
				c.cmd("MAIL FROM:<me@"+fleet.Domain+">", "250")
				c.cmd("RCPT TO:<accept-1@gmail.test>", "250")
				c.cmd("DATA", "354")
				text := "From: me@" + fleet.Domain + "\r\n\r\nfirst" + end + hidden
				if whole {
					c.send(text)
				} else {
					for i := range len(text) {
						c.send(text[i : i+1])
					}
				}
				if reply := c.reply(); !strings.HasPrefix(reply, "5") {
					t.Errorf("got %q, want a refusal", reply)
				}
			})
		}
	}
	if n, err := f.InQueue(t.Context()); err != nil || n != 0 || f.Lab.Report().Accepted != 0 {
		t.Errorf("%d queued, %d arrived, %v: nothing of it may be accepted", n, f.Lab.Report().Accepted, err)
	}
}

// TestCommandsBehindSTARTTLSAreNotObeyed injects a command in clear text behind
// STARTTLS (CVE-2011-0411).
func TestCommandsBehindSTARTTLSAreNotObeyed(t *testing.T) {
	f := start(t, fleet.Config{Open: true})
	r := f.Relays[0]
	c := dial(t, r.Submission())
	c.cmd("EHLO client.test", "250")
	c.send("STARTTLS\r\nNOOP\r\n")
	if reply := c.reply(); strings.HasPrefix(reply, "220") {
		conn := tls.Client(c.conn, f.ClientTLS(r))
		if err := conn.Handshake(); err == nil {
			t.Error("TLS began although commands had been sent behind STARTTLS")
		}
	}
}

// TestInboundTakesSignedReturnPaths bounces a delivered mail to the return path
// it carried.
func TestInboundTakesSignedReturnPaths(t *testing.T) {
	f := start(t, fleet.Config{Open: true})
	r := f.Relays[0]
	submitted, err := f.Submit(within(t, time.Minute), fleet.Stream{Recipients: recipients(t, f, 2), Size: 800, Connections: 2, Tag: "in"})
	if err != nil {
		t.Fatal(err)
	}
	settle(t, f, submitted)
	paths := 0
	for _, p := range f.Lab.Providers() {
		for m, err := range f.Lab.Mails(p.Name) {
			if err != nil {
				t.Fatal(err)
			}
			c := dial(t, r.Inbound())
			c.cmd("EHLO mx.test", "250")
			c.cmd("MAIL FROM:<>", "250")
			c.cmd("RCPT TO:<"+strings.ToUpper(m.From)+">", "250")
			c.cmd("DATA", "354")
			c.send("From: MAILER-DAEMON@mx.test\r\nSubject: undeliverable\r\n\r\nNo such user.\r\n.\r\n")
			c.expect("250 2")
			c.cmd("MAIL FROM:<>", "250")
			c.cmd("RCPT TO:<x"+m.From[1:]+">", "550 5.7.1")
			paths++
		}
	}
	if paths != 2 {
		t.Errorf("%d return paths tried, want 2", paths)
	}
	inbound := 0
	if err := f.NewLedger().Read(t.Context(), func(_ *fleet.Relay, e *fleet.Event) {
		if e.Type == "inbound" {
			inbound++
		}
	}); err != nil || inbound != 2 {
		t.Errorf("%d inbound events, %v; want 2", inbound, err)
	}
}
