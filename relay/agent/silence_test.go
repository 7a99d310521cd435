package agent

import (
	"errors"
	"net"
	"net/netip"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/relais-mta/relais/shared/link"
	"github.com/relais-mta/relais/shared/pki/pkitest"
	"github.com/relais-mta/relais/shared/wire"
)

// path forwards UDP and TCP at one port to a server, and stops to.
type path struct {
	t       *testing.T
	server  string
	udp     *net.UDPConn
	tcp     net.Listener
	noUDP   atomic.Bool // drop datagrams
	running sync.WaitGroup

	mu      sync.Mutex
	flows   map[netip.AddrPort]*net.UDPConn
	streams map[*frozen]struct{}
}

// frozen is a connection's switch: what comes is thrown away.
type frozen struct{ atomic.Bool }

func newPath(t *testing.T, server string) *path {
	t.Helper()
	p := &path{t: t, server: server, flows: make(map[netip.AddrPort]*net.UDPConn), streams: make(map[*frozen]struct{})}
	var err error
	for range 16 { // until a port is free for both
		if p.tcp, err = net.Listen("tcp", "127.0.0.1:0"); err != nil {
			t.Fatal(err)
		}
		if p.udp, err = net.ListenUDP("udp", net.UDPAddrFromAddrPort(p.tcp.Addr().(*net.TCPAddr).AddrPort())); err == nil {
			break
		}
		_ = p.tcp.Close()
	}
	if err != nil {
		t.Fatal(err)
	}
	p.running.Go(p.serveUDP)
	p.running.Go(p.serveTCP)
	t.Cleanup(func() {
		_, _ = p.udp.Close(), p.tcp.Close()
		p.running.Wait()
	})
	return p
}

func (p *path) address() string { return p.tcp.Addr().String() }

func (p *path) serveUDP() {
	defer func() {
		for _, up := range p.flows {
			_ = up.Close()
		}
	}()
	buffer := make([]byte, 2048)
	for {
		n, from, err := p.udp.ReadFromUDPAddrPort(buffer)
		if errors.Is(err, net.ErrClosed) {
			return
		}
		if err != nil || p.noUDP.Load() {
			continue
		}
		up := p.flows[from]
		if up == nil {
			raw, err := net.Dial("udp", p.server)
			if err != nil {
				p.t.Error(err)
				return
			}
			up = raw.(*net.UDPConn)
			p.flows[from] = up
			p.running.Go(func() { p.answers(up, from) })
		}
		_, _ = up.Write(buffer[:n]) // a datagram that is lost is sent again
	}
}

func (p *path) answers(up *net.UDPConn, to netip.AddrPort) {
	buffer := make([]byte, 2048)
	for {
		n, err := up.Read(buffer)
		if errors.Is(err, net.ErrClosed) {
			return
		}
		if err == nil && !p.noUDP.Load() {
			_, _ = p.udp.WriteToUDPAddrPort(buffer[:n], to)
		}
	}
}

func (p *path) serveTCP() {
	for {
		in, err := p.tcp.Accept()
		if err != nil {
			return
		}
		out, err := net.Dial("tcp", p.server)
		if err != nil {
			p.t.Error(err)
			return
		}
		stuck := &frozen{}
		p.mu.Lock()
		p.streams[stuck] = struct{}{}
		p.mu.Unlock()
		for _, pair := range [][2]net.Conn{{in, out}, {out, in}} {
			p.running.Go(func() { stuck.pass(pair[0], pair[1]) })
		}
	}
}

// pass forwards until an end closes. Once frozen it tells neither of the other.
func (f *frozen) pass(to, from net.Conn) {
	buffer := make([]byte, 16<<10)
	for {
		n, err := from.Read(buffer)
		if f.Load() {
			if err != nil {
				_ = from.Close()
				return
			}
			continue
		}
		if n > 0 {
			if _, err := to.Write(buffer[:n]); err != nil {
				return
			}
		}
		if err != nil {
			_, _ = to.Close(), from.Close()
			return
		}
	}
}

// freeze lets the connections that there are carry nothing any more.
func (p *path) freeze() {
	p.mu.Lock()
	defer p.mu.Unlock()
	for stuck := range p.streams {
		stuck.Store(true)
	}
}

const (
	testLook     = 50 * time.Millisecond // a silent server is given up after half a second
	rareReportMs = 60_000                // reports tell nothing within a test
)

// joinedBy is a relay whose way to its server is a path, and which watches the
// server's pulse fast.
func (c *controlServer) joinedBy(t *testing.T, look time.Duration) (*Agent, *path) {
	t.Helper()
	c.mu.Lock()
	c.reportMs = rareReportMs
	c.mu.Unlock()
	dir, _ := c.joined()
	p := newPath(t, c.address)
	a, _ := running(t, dir, func(a *Agent) {
		a.options.Servers = []string{p.address()}
		a.lookPeriod = look
	})
	return a, p
}

// TestSilenceOverUDPLeadsToTCP blocks UDP under a linked relay.
func TestSilenceOverUDPLeadsToTCP(t *testing.T) {
	c := startControl(t, pkitest.New(t))
	a, p := c.joinedBy(t, testLook)
	if s := c.next(); s.link.Transport() != "quic" {
		t.Fatalf("linked over %s", s.link.Transport())
	}
	waitFor(t, "the welcome", a.Connected)
	start := time.Now()
	p.noUDP.Store(true)
	// A session over UDP may have come about just before.
	for s := c.next(); s.link.Transport() != "tcp"; s = c.next() {
		t.Logf("linked over %s once more", s.link.Transport())
	}
	t.Logf("linked over TCP after %v", time.Since(start))
	waitFor(t, "the relay to say so", func() bool { return a.Connected() && a.Health().Transport == "tcp" })
}

// TestSilenceOverTCPLeadsToANewConnection lets a firewall forget the connection.
func TestSilenceOverTCPLeadsToANewConnection(t *testing.T) {
	c := startControl(t, pkitest.New(t))
	p := newPath(t, c.address)
	p.noUDP.Store(true)
	c.mu.Lock()
	c.reportMs = rareReportMs
	c.mu.Unlock()
	dir, _ := c.joined()
	a, _ := running(t, dir, func(a *Agent) {
		a.options.Servers = []string{p.address()}
		a.lookPeriod = testLook
	})
	for i := range 2 {
		s := c.next()
		if s.link.Transport() != "tcp" {
			t.Errorf("linked over %s", s.link.Transport())
		}
		waitFor(t, "the welcome", a.Connected)
		if i == 0 {
			p.freeze()
			waitFor(t, "the silence to be noticed", func() bool { return !a.Connected() })
			close(s.over) // the server never learns that the relay left
		}
	}
}

// TestQuietServerIsAskedAndKept has a server that speaks when it is asked alone.
func TestQuietServerIsAskedAndKept(t *testing.T) {
	c := startControl(t, pkitest.New(t))
	a, _ := c.joinedBy(t, 4*testLook) // its answer is due within six looks, on a busy machine too
	s := c.next()
	waitFor(t, "two questions", func() bool { return s.probes.Load() >= 2 })
	if c.mu.Lock(); len(c.hellos) != 1 || !a.Connected() {
		t.Errorf("%d sessions, connected %v", len(c.hellos), a.Connected())
	}
	c.mu.Unlock()
}

// TestServerOfTheReleaseBeforeIsNotAsked has a server that announces nothing and
// would end the session at a Probe.
func TestServerOfTheReleaseBeforeIsNotAsked(t *testing.T) {
	c := startControl(t, pkitest.New(t))
	c.mu.Lock()
	c.capabilities = 0
	c.mu.Unlock()
	dir, _ := c.joined()
	a, _ := running(t, dir, func(a *Agent) { a.lookPeriod = 5 * time.Millisecond })
	s := c.next()
	for range 5 { // 100 ms apart: each pause would be silence enough
		select {
		case <-s.reports:
		case <-time.After(patience):
			t.Fatal("no report")
		}
	}
	if c.mu.Lock(); len(c.hellos) != 1 || s.probes.Load() != 0 || !a.Connected() {
		t.Errorf("%d sessions, %d questions, connected %v", len(c.hellos), s.probes.Load(), a.Connected())
	}
	c.mu.Unlock()
}

// pipeStream is a stream that is not of a session.
type pipeStream struct{ net.Conn }

func (pipeStream) SetPriority(link.Priority) {}

// TestPartsOfAFrameAreBytesOfTheServer reads a long frame slowly.
func TestPartsOfAFrameAreBytesOfTheServer(t *testing.T) {
	var p pulse
	near, far := net.Pipe()
	defer near.Close()
	conn := wire.NewConn(listening{pipeStream{near}, &p}, wire.MaxFrameBytes)
	frame, err := wire.AppendFrame(nil, &wire.ViewChunk{Data: make([]byte, 100)})
	if err != nil {
		t.Fatal(err)
	}
	received := make(chan error, 1)
	go func() {
		_, err := conn.Receive()
		received <- err
	}()
	for _, b := range frame {
		if _, err := far.Write([]byte{b}); err != nil {
			t.Fatal(err)
		}
		waitFor(t, "the byte to count", func() bool { return p.spoke.Swap(false) })
	}
	if err := <-received; err != nil {
		t.Error(err)
	}
}
