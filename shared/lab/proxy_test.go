package lab

import (
	"os"
	"strings"
	"testing"
	"time"
)

// silent checks that nothing arrives for a moment.
func (c *talk) silent() {
	c.t.Helper()
	if err := c.conn.SetReadDeadline(time.Now().Add(100 * time.Millisecond)); err != nil {
		c.t.Fatal(err)
	}
	if b, err := c.in.Peek(1); !os.IsTimeout(err) {
		c.t.Fatalf("got %q, %v; want silence", b, err)
	}
	if err := c.conn.SetReadDeadline(time.Now().Add(testPatience)); err != nil {
		c.t.Fatal(err)
	}
}

func TestProxyModes(t *testing.T) {
	l := startLab(t, nil)
	p, err := NewProxy("127.0.0.1:0", l.mxAddr(t, Free))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := p.Close(); err != nil {
			t.Error(err)
		}
	})
	c := dial(t, p.Addr(), "127.0.0.7").hello()
	if r := c.mail("a@sender.test", "accept-1@free.test", message("p@x")); !strings.HasPrefix(r, "250") {
		t.Fatal(r)
	}
	heard := func(name string) func(Report) bool {
		return func(r Report) bool {
			for _, h := range r.Lanes[0].Hello {
				if h == name {
					return true
				}
			}
			return false
		}
	}
	p.SetMode(ProxyFreeze)
	c.send("EHLO frozen.sender.test\r\n")
	c.silent()
	if heard("frozen.sender.test")(l.Report()) {
		t.Error("frozen: the command passed")
	}
	p.SetMode(ProxyPass)
	c.want("250")

	p.SetMode(ProxyHalfOpen)
	c.send("EHLO half.sender.test\r\n")
	await(t, l, "half open: the command passes", heard("half.sender.test"))
	c.silent()
	p.SetMode(ProxyPass)
	c.want("250")

	p.SlowBytesPerSecond = 400
	p.SetMode(ProxySlow)
	begun := time.Now()
	c.do("NOOP "+strings.Repeat("x", 94), "250")
	if took := time.Since(begun); took < 200*time.Millisecond {
		t.Errorf("100 bytes at 400 a second took %s", took)
	}
	p.SetMode(ProxyCut)
	c.wantClosed()
	again := dial(t, p.Addr(), "127.0.0.7")
	again.wantClosed()
	p.SetMode(ProxyPass)
	dial(t, p.Addr(), "127.0.0.7").hello()
}

func TestIdleClientsAreToldSo(t *testing.T) {
	l := startLab(t, func(c *Config) { c.IdleTime = 50 * time.Millisecond })
	c := dial(t, l.mxAddr(t, Free), "127.0.0.7")
	c.want("220")
	c.want("421 4.4.2")
	c.wantClosed()
}
