package lab

import (
	"errors"
	"fmt"
	"net"
	"sync"
	"time"
)

const (
	proxyChunkBytes  = 16 << 10
	maxProxyConns    = 1024
	proxyDialTimeout = 5 * time.Second
)

// ProxyMode is how a Proxy treats what passes through it.
type ProxyMode int

// The modes.
const (
	ProxyPass     ProxyMode = iota // as if it were not there
	ProxyCut                       // connections are closed, new ones too, at once
	ProxyFreeze                    // connections stay, new ones are taken, nothing passes
	ProxyHalfOpen                  // what the client sends passes, nothing comes back
	ProxySlow                      // at most SlowBytesPerSecond in each direction
)

// Proxy is a TCP proxy on loopback that can fail like a network. Bytes held
// back by a mode pass once the mode allows it: nothing is lost or reordered
// unless the connection is cut.
type Proxy struct {
	SlowBytesPerSecond int // for ProxySlow; set before the mode is; default 1000

	ln      net.Listener
	target  string
	serving sync.WaitGroup

	mu      sync.Mutex
	mode    ProxyMode
	changed chan struct{} // closed and replaced when mode changes
	conns   map[net.Conn]struct{}
	closed  bool
}

// NewProxy listens on addr (port 0 finds one) and connects to target.
func NewProxy(addr, target string) (*Proxy, error) {
	ln, err := net.Listen("tcp", addr)
	if err != nil {
		return nil, fmt.Errorf("lab: proxy: %w", err)
	}
	p := &Proxy{
		SlowBytesPerSecond: 1000, ln: ln, target: target,
		changed: make(chan struct{}), conns: make(map[net.Conn]struct{}),
	}
	p.serving.Go(p.accept)
	return p, nil
}

// Addr returns where the proxy listens.
func (p *Proxy) Addr() string { return p.ln.Addr().String() }

// SetMode changes the mode, for open connections too.
func (p *Proxy) SetMode(m ProxyMode) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.mode = m
	close(p.changed)
	p.changed = make(chan struct{})
	if m == ProxyCut {
		p.cutLocked()
	}
}

func (p *Proxy) cutLocked() {
	for c := range p.conns {
		_ = c.Close() // both copiers of the pair notice
	}
}

// Close ends the proxy and all its connections.
func (p *Proxy) Close() error {
	err := p.ln.Close()
	p.mu.Lock()
	p.closed = true
	close(p.changed)
	p.changed = make(chan struct{})
	p.cutLocked()
	p.mu.Unlock()
	p.serving.Wait()
	return err
}

func (p *Proxy) accept() {
	for {
		client, err := p.ln.Accept()
		if errors.Is(err, net.ErrClosed) {
			return
		}
		if err != nil {
			continue // that client gave up before it was taken
		}
		p.serving.Go(func() { p.relay(client) })
	}
}

// keep registers a connection to be cut, false when it has to end now.
func (p *Proxy) keep(c net.Conn) bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.closed || p.mode == ProxyCut || len(p.conns) >= maxProxyConns {
		return false
	}
	p.conns[c] = struct{}{}
	return true
}

func (p *Proxy) drop(c net.Conn) {
	_ = c.Close() // it may be closed already
	p.mu.Lock()
	defer p.mu.Unlock()
	delete(p.conns, c)
}

func (p *Proxy) relay(client net.Conn) {
	defer p.drop(client)
	if !p.keep(client) {
		return
	}
	server, err := net.DialTimeout("tcp", p.target, proxyDialTimeout)
	if err != nil {
		return
	}
	defer p.drop(server)
	if !p.keep(server) {
		return
	}
	var both sync.WaitGroup
	both.Go(func() { p.copy(server, client, false) })
	p.copy(client, server, true)
	both.Wait()
}

// copy passes bytes one way until either side ends. back is the way from the
// target to the client.
func (p *Proxy) copy(dst, src net.Conn, back bool) {
	buf := make([]byte, proxyChunkBytes)
	for {
		n, err := src.Read(buf)
		if n > 0 && !p.pass(dst, buf[:n], back) {
			break
		}
		if err != nil {
			// An end passes only where bytes do.
			if p.admit(back) {
				if c, ok := dst.(*net.TCPConn); ok {
					_ = c.CloseWrite() // the other way may still be in use
				}
			}
			return
		}
	}
	_ = src.Close() // dst is gone, so nothing more can come of it
}

// pass writes bytes when the mode allows it, false when the pair has to end.
func (p *Proxy) pass(dst net.Conn, data []byte, back bool) bool {
	for len(data) > 0 {
		if !p.admit(back) {
			return false
		}
		n := len(data)
		if rate := p.rate(); rate > 0 {
			n = min(n, max(rate/20, 1))
			time.Sleep(time.Duration(n) * time.Second / time.Duration(rate))
		}
		if _, err := dst.Write(data[:n]); err != nil {
			return false
		}
		data = data[n:]
	}
	return true
}

// rate returns the bytes per second of the mode, 0 for no limit.
func (p *Proxy) rate() int {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.mode != ProxySlow {
		return 0
	}
	return max(p.SlowBytesPerSecond, 1)
}

// admit waits until the mode lets bytes pass, false when the proxy closed or
// cut its connections.
func (p *Proxy) admit(back bool) bool {
	for {
		p.mu.Lock()
		mode, closed, changed := p.mode, p.closed, p.changed
		p.mu.Unlock()
		switch {
		case closed || mode == ProxyCut:
			return false
		case mode == ProxyFreeze || mode == ProxyHalfOpen && back:
			<-changed
		default:
			return true
		}
	}
}
