package e2e

import (
	"bufio"
	"crypto/tls"
	"encoding/base64"
	"net"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/relais-mta/relais/shared/lab/fleet"
)

// replyTimeout bounds one reply.
const replyTimeout = 20 * time.Second

// client speaks SMTP line by line, so that a test can say what no library would.
type client struct {
	t    *testing.T
	conn net.Conn
	in   *bufio.Reader
}

func dial(t *testing.T, addr string) *client {
	t.Helper()
	c := dialQuiet(t, addr)
	c.expect("220")
	return c
}

func dialQuiet(t *testing.T, addr string) *client {
	t.Helper()
	conn, err := net.DialTimeout("tcp", addr, replyTimeout)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = conn.Close() })
	return &client{t: t, conn: conn, in: bufio.NewReader(conn)}
}

func (c *client) startTLS(cfg *tls.Config) {
	c.t.Helper()
	c.cmd("EHLO client.test", "250")
	c.cmd("STARTTLS", "220")
	conn := tls.Client(c.conn, cfg)
	if err := conn.Handshake(); err != nil {
		c.t.Fatalf("TLS: %v", err)
	}
	c.conn, c.in = conn, bufio.NewReader(conn)
}

func (c *client) send(text string) {
	c.t.Helper()
	if _, err := c.conn.Write([]byte(text)); err != nil {
		c.t.Logf("writing %q: %v", text, err)
	}
}

// cmd sends a line and expects a reply that begins with want.
func (c *client) cmd(line, want string) string {
	c.t.Helper()
	c.send(line + "\r\n")
	return c.expect(want)
}

// expect reads one reply and compares its beginning.
func (c *client) expect(want string) string {
	c.t.Helper()
	reply := c.reply()
	if !strings.HasPrefix(reply, want) {
		c.t.Errorf("got %q, want %s…", reply, want)
	}
	return reply
}

func (c *client) reply() string {
	c.t.Helper()
	var lines []string
	for {
		if err := c.conn.SetReadDeadline(time.Now().Add(replyTimeout)); err != nil {
			c.t.Fatal(err)
		}
		line, err := c.in.ReadString('\n')
		if err != nil {
			return strings.Join(lines, "\n") + "[" + err.Error() + "]"
		}
		line = strings.TrimRight(line, "\r\n")
		lines = append(lines, line)
		if len(line) < 4 || line[3] != '-' {
			return strings.Join(lines, "\n")
		}
	}
}

func plain(user, secret string) string {
	return base64.StdEncoding.EncodeToString([]byte("\x00" + user + "\x00" + secret))
}

// relayCommand runs relais-relay against a running relay.
func relayCommand(t *testing.T, r *fleet.Relay, args ...string) []byte {
	t.Helper()
	out, err := exec.Command(filepath.Join(binaries, "relais-relay"), append(args, "--data", r.Dir)...).CombinedOutput()
	if err != nil {
		t.Fatalf("relais-relay %v: %v\n%s", args, err, out)
	}
	return out
}

// queueWhy returns what queue why says of a message, and nothing once the message
// is not in the queue: it may have been delivered since it was listed.
func queueWhy(t *testing.T, r *fleet.Relay, id string, flags ...string) []byte {
	t.Helper()
	args := append([]string{"queue", "why", id, "--data", r.Dir}, flags...)
	out, err := exec.Command(filepath.Join(binaries, "relais-relay"), args...).CombinedOutput()
	switch {
	case err == nil:
		return out
	case strings.Contains(string(out), id+" is not in the queue"):
		return nil
	}
	t.Fatalf("relais-relay %v: %v\n%s", args, err, out)
	return nil
}

// command runs a program and returns its output whatever its exit code.
func command(t *testing.T, name string, args ...string) (string, error) {
	t.Helper()
	out, err := exec.CommandContext(within(t, time.Minute), name, args...).CombinedOutput()
	return string(out), err
}

// need fails the test when a peer is not installed.
func need(t *testing.T, program string) string {
	t.Helper()
	path, err := exec.LookPath(program)
	if err != nil {
		t.Fatalf("%s is not installed: run scripts/debian-peers.sh as root", program)
	}
	return path
}
