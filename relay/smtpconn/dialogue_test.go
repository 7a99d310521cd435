package smtpconn

import (
	"crypto/tls"
	"fmt"
	"strings"
	"testing"
	"time"

	"github.com/relais-mta/relais/relay/trace"
)

// Who watches sees the dialogue in clear, under TLS too, and no secret of it.
func TestTraceOfASubmission(t *testing.T) {
	var hub trace.Hub
	w, err := hub.Watch(trace.Filter{Incoming: true})
	if err != nil {
		t.Fatal(err)
	}
	_, _, addr := start(t, RequireSTARTTLS, func(cfg *Config, _ *Limits) { cfg.Trace, cfg.Kind = &hub, trace.Submission })
	p := dial(t, addr)
	p.send("EHLO c\r\nSTARTTLS\r\n")
	p.expect("250")
	p.expect("220")
	_, clientTLS := testTLS()
	conn := tls.Client(p.Conn, clientTLS)
	p = newPeer(t, conn)
	for _, step := range [][2]string{
		{"EHLO c", "250"}, {"AUTH PLAIN AGEAd3Jvbmc=", "535"}, {"AUTH PLAIN", "334"}, {"AGEAd3Jvbmc=", "535"}, {"AGEAd3Jvbmc=", "500"}, {"AUTH PLAIN AGEAcmlnaHQ=", "235"},
		{"MAIL FROM:<a@a.example>", "250"}, {"RCPT TO:<b@b.example>", "250"}, {"DATA", "354"}, {"Subject: hush\r\n\r\nhush\r\n.", "250"}, {"QUIT", "221"},
	} {
		p.send(step[0] + "\r\n")
		p.expect(step[1])
	}
	_ = p.Close()
	var got strings.Builder
	for deadline := time.After(10 * time.Second); !strings.Contains(got.String(), "* the session is over\n"); {
		select {
		case <-w.Ready():
			for _, l := range w.Take() {
				fmt.Fprintln(&got, l.Side, l.Text)
			}
		case <-deadline:
			t.Fatalf("the session goes on in\n%s", got.String())
		}
	}
	at := 0
	for _, want := range []string{
		"* 127.0.0.1 connects to " + addr + "\n", "> 220 mx.example", "< EHLO c\n", "< STARTTLS\n", "* TLS 1.3, ", "< EHLO c\n", "< AUTH PLAIN (secret)\n", "> 535",
		"< AUTH PLAIN\n", "> 334", "< (secret)\n> 535", "< (no command, 12 octets)\n> 500", "< AUTH PLAIN (secret)\n> 235", "< MAIL FROM:<a@a.example>\n> 250",
		"< DATA\n> 354", "* a message of 23 octets\n> 250", "< QUIT\n> 221", "* the session is over\n",
	} {
		i := strings.Index(got.String()[at:], want)
		if i < 0 {
			t.Fatalf("%q is missing behind %q in\n%s", want, got.String()[:at], got.String())
		}
		at += i + len(want)
	}
	for _, secret := range []string{"AGEA", "hush"} {
		if strings.Contains(got.String(), secret) {
			t.Errorf("%q is shown in\n%s", secret, got.String())
		}
	}
}
