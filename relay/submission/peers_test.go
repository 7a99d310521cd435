package submission

import (
	"net"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
)

// Clients that other people wrote must get through, and get the right codes
// when they should not. scripts/debian-peers.sh installs them.

func lookPath(t *testing.T, name string) string {
	t.Helper()
	path, err := exec.LookPath(name)
	if err != nil {
		t.Fatalf("%s is missing: run scripts/debian-peers.sh", name)
	}
	return path
}

func TestPythonSubmits(t *testing.T) {
	python := lookPath(t, "python3")
	w := newWorld(t, nil)
	script := filepath.Join(t.TempDir(), "submit.py")
	if err := os.WriteFile(script, []byte(`
import smtplib, ssl, sys
from email.message import EmailMessage
implicit, explicit, user, secret = sys.argv[1:]
context = ssl.create_default_context()
context.check_hostname = False
context.verify_mode = ssl.CERT_NONE
message = EmailMessage()
message["From"] = "Joé <joe@acme.example>"
message["To"] = "ann@example.net, bob@example.net"
message["Bcc"] = "carl@example.net"
message["Subject"] = "python"
message.set_content("line\n.dots\n..\n\n")
host, port = implicit.rsplit(":", 1)
with smtplib.SMTP_SSL(host, int(port), context=context) as s:
    s.login(user, secret)
    s.send_message(message)
    s.send_message(message)
host, port = explicit.rsplit(":", 1)
with smtplib.SMTP(host, int(port)) as s:
    s.starttls(context=context)
    s.login(user, secret)
    s.send_message(message)
    try:
        s.sendmail("joe@acme.example", ["ann@example.net"], "From: x@foreign.example\r\n\r\nx\r\n")
    except smtplib.SMTPDataError as e:
        print("refused", e.smtp_code)
`), 0o600); err != nil {
		t.Fatal(err)
	}
	out, err := exec.CommandContext(t.Context(), python, script, w.implicit, w.explicit, w.user, testSecret).CombinedOutput()
	if err != nil || string(out) != "refused 550\n" {
		t.Fatalf("python says %q, error %v", out, err)
	}
	if n := w.spool.count(); n != 3 {
		t.Fatalf("%d messages were accepted, want 3", n)
	}
	got := w.spool.last(t)
	if len(got.env.Recipients) != 3 || !strings.HasSuffix(got.text, "\r\n\r\nline\r\n.dots\r\n..\r\n\r\n") || strings.Contains(got.text, "carl@") {
		t.Errorf("accepted for %v: %q", got.env.Recipients, got.text)
	}
}

func TestSwaks(t *testing.T) {
	swaks := lookPath(t, "swaks")
	w := newWorld(t, nil)
	host, implicit, err := net.SplitHostPort(w.implicit)
	if err != nil {
		t.Fatal(err)
	}
	_, explicit, err := net.SplitHostPort(w.explicit)
	if err != nil {
		t.Fatal(err)
	}
	login := []string{"--auth-user", w.user, "--auth-password", testSecret}
	over465 := []string{"--port", implicit, "--tls-on-connect"}
	over587 := []string{"--port", explicit, "--tls"}
	tests := []struct {
		name string
		args [][]string
		want string // in swaks' transcript
	}{
		{"PLAIN on 465", [][]string{over465, login, {"--auth", "PLAIN"}}, "250 2.0.0 OK queued as msg_"},
		{"LOGIN on 587", [][]string{over587, login, {"--auth", "LOGIN"}}, "250 2.0.0 OK queued as msg_"},
		{"pipelined", [][]string{over587, login, {"--auth", "PLAIN", "--pipeline"}}, "250 2.0.0 OK queued as msg_"},
		{"wrong secret", [][]string{over465, {"--auth", "PLAIN", "--auth-user", w.user, "--auth-password", "no"}}, "535 5.7.8"},
		{"no AUTH", [][]string{over465}, "530 5.7.0"},
		{"no TLS", [][]string{{"--port", explicit}}, "530 5.7.0"},
		{"foreign From", [][]string{over465, login, {"--auth", "PLAIN", "--header", "From: ann@foreign.example"}}, "550 5.7.1 foreign.example"},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			args := []string{"--server", host, "--from", "joe@acme.example", "--to", "ann@example.net", "--ehlo", "client.example", "--timeout", "60"}
			for _, a := range tt.args {
				args = append(args, a...)
			}
			out, err := exec.CommandContext(t.Context(), swaks, args...).CombinedOutput()
			if !strings.Contains(string(out), tt.want) {
				t.Errorf("swaks %v: error %v, want %q in\n%s", args, err, tt.want, out)
			}
		})
	}
}

func TestSwaksBehindABalancer(t *testing.T) {
	swaks := lookPath(t, "swaks")
	w := newWorldWith(t, nil, func(o *Options) { o.Proxies = []netip.Prefix{netip.MustParsePrefix("127.0.0.1/32")} })
	host, port, err := net.SplitHostPort(w.explicit)
	if err != nil {
		t.Fatal(err)
	}
	for _, version := range []string{"1", "2"} {
		family := "TCP4"
		if version == "2" {
			family = "AF_INET"
		}
		out, err := exec.CommandContext(t.Context(), swaks, "--server", host, "--port", port, "--tls", "--auth", "PLAIN", "--auth-user", w.user, "--auth-password", testSecret,
			"--from", "joe@acme.example", "--to", "ann@example.net", "--ehlo", "client.example", "--timeout", "60",
			"--proxy-version", version, "--proxy-family", family, "--proxy-source", "192.0.2.7", "--proxy-source-port", "40000", "--proxy-dest", "192.0.2.8", "--proxy-dest-port", "587").CombinedOutput()
		if !strings.Contains(string(out), "250 2.0.0 OK queued as msg_") {
			t.Fatalf("swaks with version %s: error %v\n%s", version, err, out)
		}
		if got := w.spool.last(t); got.env.ClientIP != netip.MustParseAddr("192.0.2.7") || !strings.HasPrefix(got.text, "Received: from client.example ([192.0.2.7])") {
			t.Errorf("version %s: the client is %v in %q", version, got.env.ClientIP, got.text)
		}
	}
}
