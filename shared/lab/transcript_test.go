package lab

import (
	"io"
	"net"
	"strings"
	"testing"
	"time"
)

func TestParseTranscript(t *testing.T) {
	const head = "# odd\nexpect failed/rcpt/550 no\n"
	for _, bad := range []string{"", "# only\n", "expect x y\n", head + "sing\n", head + "raw 250\n", head + "repeat x y\n", head + "repeat 0 y\n", head + "flood \"\"\n"} {
		if _, err := ParseTranscript("bad", bad); err == nil {
			t.Errorf("%q was taken", bad)
		}
	}
	h, err := ParseTranscript("good", head+"say 220 hi\n---\nsay 221 again\n")
	if err != nil || h.About != "odd" || h.Expect != "failed/rcpt/550" || h.Reason != "no" || len(h.parts) != 2 {
		t.Errorf("%+v, %v", h, err)
	}
}

// TestPlayTranscript goes through every step over two connections.
func TestPlayTranscript(t *testing.T) {
	h, err := ParseTranscript("steps", "# all\nexpect x y\nsay 220 hi\nread EHLO\nraw \"250-a\\n\"\nrepeat 2 250-b\ndrip 250 c\nread DATA\nsay 354 go\ndata\nsay 250 ok\nwait\n---\nsay 554 no\n")
	if err != nil {
		t.Fatal(err)
	}
	for n, tc := range []struct{ send, want string }{
		{"EHLO x\r\nDATA\r\na\r\n.b\r\n.\r\nQUIT\r\n", "220 hi\r\n250-a\n250-b\r\n250-b\r\n250 c\r\n354 go\r\n250 ok\r\n"},
		{"", "554 no\r\n"},
		{"", "554 no\r\n"},
	} {
		client, server := net.Pipe()
		go h.Play(t.Context(), server, n, time.Millisecond)
		go func() { _, _ = io.WriteString(client, tc.send) }() // ends with the connection
		if err := client.SetDeadline(time.Now().Add(testPatience)); err != nil {
			t.Fatal(err)
		}
		got := make([]byte, len(tc.want))
		if _, err := io.ReadFull(client, got); err != nil || string(got) != tc.want {
			t.Errorf("connection %d: %q, %v", n, got, err)
		}
		client.Close()
	}
}

// TestHostileHostsOfTheFarm finds a host of the corpus through the DNS.
func TestHostileHostsOfTheFarm(t *testing.T) {
	l := startLab(t, func(c *Config) { c.Hostile = true })
	c, err := net.Dial("tcp", l.mxAddr(t, "mx:greeting-http.hostile.test"))
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	all, err := io.ReadAll(c)
	if err != nil || !strings.HasPrefix(string(all), "HTTP/1.1 400") {
		t.Errorf("%q, %v", all, err)
	}
}
