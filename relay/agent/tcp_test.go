package agent

import (
	"context"
	"io"
	"net"
	"sync"
	"testing"
	"time"

	"github.com/relais-mta/relais/shared/pki/pkitest"
)

// withoutUDP returns an address that reaches c over TCP alone.
func withoutUDP(t *testing.T, c *controlServer) string {
	t.Helper()
	tcp, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	var running sync.WaitGroup
	running.Go(func() {
		for {
			in, err := tcp.Accept()
			if err != nil {
				return
			}
			out, err := net.Dial("tcp", c.address)
			if err != nil {
				t.Error(err)
				return
			}
			for _, pair := range [][2]net.Conn{{in, out}, {out, in}} {
				running.Go(func() {
					_, _ = io.Copy(pair[0], pair[1])
					_, _ = pair[0].Close(), pair[1].Close()
				})
			}
		}
	})
	t.Cleanup(func() {
		_ = tcp.Close()
		running.Wait()
	})
	return tcp.Addr().String()
}

func TestWorksWithoutUDP(t *testing.T) {
	c := startControl(t, pkitest.New(t))
	address := withoutUDP(t, c)
	c.servers = []string{address}
	dir := t.TempDir()
	jo := c.joinOptions(dir)
	jo.Servers, jo.DialTimeout = []string{address}, time.Second
	result, err := Join(context.Background(), jo)
	if err != nil {
		t.Fatal(err)
	}
	a, stop := running(t, dir)
	answer, err := c.next().send(bigView(c, result.Node, 10))
	mustAck(t, answer, err, 10)
	if health := a.Health(); health.Transport != "tcp" || health.Revision != 10 || health.Problem != "" {
		t.Errorf("health %+v", health)
	}
	stop()
	c.stop()
}
