package smtpconn

import (
	"bytes"
	"crypto/tls"
	"encoding/binary"
	"io"
	"net/netip"
	"strings"
	"testing"
	"time"

	"github.com/emersion/go-smtp"
)

func proxy2(command, family byte, body []byte) string {
	header := append([]byte(proxySignature), command, family)
	return string(append(binary.BigEndian.AppendUint16(header, uint16(len(body))), body...))
}

func TestParseProxy(t *testing.T) {
	four := []byte{192, 0, 2, 1, 10, 0, 0, 1, 0, 25, 4, 0}
	six := append(netip.MustParseAddr("2001:db8::1").AsSlice(), make([]byte, 20)...)
	mapped := append(netip.MustParseAddr("::ffff:192.0.2.1").AsSlice(), make([]byte, 20)...)
	for _, tt := range []struct{ name, header, want string }{
		{"v1 IPv4", "PROXY TCP4 192.0.2.1 10.0.0.1 40000 25\r\n", "192.0.2.1"},
		{"v1 IPv6", "PROXY TCP6 2001:db8::1 ::1 65535 0\r\n", "2001:db8::1"},
		{"v1 unknown", "PROXY UNKNOWN\r\n", ""},
		{"v1 unknown with words", "PROXY UNKNOWN ffff::1 ffff::2 1 2\r\n", ""},
		{"v1 wrong family", "PROXY TCP4 2001:db8::1 ::1 1 2\r\n", "!"},
		{"v1 mixed", "PROXY TCP4 192.0.2.1 ::1 1 2\r\n", "!"},
		{"v1 port", "PROXY TCP4 192.0.2.1 10.0.0.1 70000 25\r\n", "!"},
		{"v1 port with zeros", "PROXY TCP4 192.0.2.1 10.0.0.1 01 25\r\n", "!"},
		{"v1 zone", "PROXY TCP6 fe80::1%lo ::1 1 2\r\n", "!"},
		{"v1 two spaces", "PROXY  TCP4 192.0.2.1 10.0.0.1 1 2\r\n", "!"},
		{"v1 bare LF", "PROXY TCP4 192.0.2.1 10.0.0.1 1 2\n", "!"},
		{"v1 cut off", "PROXY TCP4 192.0.2.1", "!"},
		{"v1 endless", "PROXY TCP4 " + strings.Repeat("1", 500) + "\r\n", "!"},
		{"v1 nobody", "PROXY TCP4 0.0.0.0 10.0.0.1 1 2\r\n", "!"},
		{"v2 IPv4", proxy2(0x21, 0x11, four), "192.0.2.1"},
		{"v2 IPv4 with TLVs", proxy2(0x21, 0x11, append(bytes.Clone(four), 4, 0, 1, 0)), "192.0.2.1"},
		{"v2 IPv6", proxy2(0x21, 0x21, six), "2001:db8::1"},
		{"v2 mapped", proxy2(0x21, 0x21, mapped), "192.0.2.1"},
		{"v2 local", proxy2(0x20, 0, nil), ""},
		{"v2 unspecified family", proxy2(0x21, 0, nil), ""},
		{"v2 short", proxy2(0x21, 0x11, four[:8]), "!"},
		{"v2 UDP", proxy2(0x21, 0x12, four), "!"},
		{"v2 version", proxy2(0x31, 0x11, four), "!"},
		{"v2 command", proxy2(0x22, 0x11, four), "!"},
		{"v2 too long", proxy2(0x21, 0x11, make([]byte, 5000)), "!"},
		{"v2 cut off", proxy2(0x21, 0x11, four)[:20], "!"},
		{"none", "EHLO client.example\r\n", "!"},
		{"nothing", "", "!"},
	} {
		r := strings.NewReader(tt.header + "EHLO c\r\n")
		if tt.want == "!" {
			r = strings.NewReader(tt.header)
		}
		got, err := parseProxy(r)
		rest, _ := io.ReadAll(r)
		switch {
		case tt.want == "!":
			if err == nil {
				t.Errorf("%s: %v, want an error", tt.name, got)
			}
		case err != nil || tt.want == "" && got.IsValid() || tt.want != "" && got.String() != tt.want:
			t.Errorf("%s: %v, %v; want %q", tt.name, got, err, tt.want)
		case string(rest) != "EHLO c\r\n":
			t.Errorf("%s: what follows is %q", tt.name, rest)
		}
	}
}

func FuzzParseProxy(f *testing.F) {
	f.Add([]byte("PROXY TCP4 192.0.2.1 10.0.0.1 40000 25\r\n"))
	f.Add([]byte(proxy2(0x21, 0x11, make([]byte, 12))))
	f.Fuzz(func(t *testing.T, input []byte) {
		if a, err := parseProxy(bytes.NewReader(input)); err == nil && a.IsValid() && (a.IsUnspecified() || a.Is4In6() || a.Zone() != "") {
			t.Errorf("%q names %v", input, a)
		}
	})
}

// The header comes before TLS; limits and trace fields go by the client it names.
func TestProxiedClients(t *testing.T) {
	var seen []netip.Addr
	_, backend, addr := start(t, ImplicitTLS, func(c *Config, l *Limits) {
		c.Proxies = []netip.Prefix{netip.MustParsePrefix("127.0.0.0/8")}
		l.MaxConnectionsPerIP = 1
		inner := c.NewSession
		c.NewSession = func(conn *Conn) smtp.Session { seen = append(seen, conn.Remote()); return inner(conn) }
	})
	_, clientTLS := testTLS()
	connectAs := func(header string) *peer {
		p := connect(t, addr)
		p.send(header)
		secured := tls.Client(p.Conn, clientTLS)
		if err := secured.Handshake(); err != nil {
			t.Fatal(err)
		}
		return newPeer(t, secured)
	}
	one := connectAs("PROXY TCP4 192.0.2.1 10.0.0.1 40000 465\r\n")
	one.expect("220")
	again := connectAs("PROXY TCP4 192.0.2.1 10.0.0.1 40001 465\r\n")
	again.expect("421 4.7.0")
	again.expectEnd()
	two := connectAs(proxy2(0x21, 0x11, []byte{192, 0, 2, 2, 10, 0, 0, 1, 0, 25, 4, 0}))
	two.expect("220")
	two.begin()
	two.do("Subject: x\r\n\r\nx\r\n.", "250")
	if len(seen) != 1 || seen[0] != netip.MustParseAddr("192.0.2.2") || len(backend.got()) != 1 {
		t.Errorf("sessions of %v, messages %q", seen, backend.got())
	}
	_ = one.Close()
	check := connectAs(proxy2(0x20, 0, nil)) // the balancer looks whether we are there
	check.expect("220")
	for deadline := time.Now().Add(10 * time.Second); ; {
		p := connectAs("PROXY TCP4 192.0.2.1 10.0.0.1 40002 465\r\n")
		if line := p.reply(); strings.HasPrefix(line, "220") {
			break
		} else if time.Now().After(deadline) {
			t.Fatalf("the place of a client that left is not free: %q", line)
		}
	}
	p := connect(t, addr) // no header: not a word
	p.send("EHLO client.example\r\n")
	p.expectEnd()
}

// Whoever is not named as a balancer cannot claim to be another.
func TestProxyHeaderFromAnybodyElse(t *testing.T) {
	_, _, addr := start(t, OfferSTARTTLS, func(c *Config, _ *Limits) {
		c.Proxies = []netip.Prefix{netip.MustParsePrefix("192.0.2.0/24")}
	})
	p := dial(t, addr)
	p.do("PROXY TCP4 198.51.100.1 10.0.0.1 40000 25", "500 5.5.2")
	p.do("EHLO c", "250-")
}
