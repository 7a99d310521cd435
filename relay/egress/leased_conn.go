package egress

import (
	"context"
	"net"
	"net/netip"
	"os"
	"sync"
	"syscall"
	"time"

	"github.com/relais-mta/relais/shared/lease"
	"github.com/relais-mta/relais/shared/ownership"
)

// leasedConn is a connection from a floating address, from before it is opened. It
// ends with the lease, to the instant, whoever uses it: a process that was stopped
// and goes on writes nothing any more, although its loop has not had its turn yet.
type leasedConn struct {
	net.Conn // nil while it is being opened
	leases   *Leases
	held     *held
	cancel   context.CancelFunc // of the opening

	mu   sync.Mutex
	over bool // it was closed, or must be as soon as it is open
}

// admit books a connection from a floating address, if one may be opened now.
func (l *Leases) admit(status *Status, cancel context.CancelFunc) *leasedConn {
	if l == nil {
		return nil
	}
	l.mu.Lock()
	h := l.held[status.Source.ID]
	if h == nil || h.use.Standing(l.cfg.Clock()) != ownership.Usable {
		l.mu.Unlock()
		return nil
	}
	c := &leasedConn{leases: l, held: h, cancel: cancel}
	h.conns[c] = struct{}{}
	h.use.Opened()
	l.mu.Unlock()
	l.wake()
	return c
}

// leave takes a connection that is gone from the books.
func (l *Leases) leave(c *leasedConn) {
	l.mu.Lock()
	if _, booked := c.held.conns[c]; booked {
		delete(c.held.conns, c)
		c.held.use.Closed()
	}
	l.mu.Unlock()
}

// until returns when a connection from the address ends; 0: it has.
func (l *Leases) until(h *held) lease.Instant {
	l.mu.Lock()
	defer l.mu.Unlock()
	return h.use.Until()
}

// opened gives the connection its socket. False: its lease ended meanwhile.
func (c *leasedConn) opened(conn net.Conn) bool {
	c.mu.Lock()
	c.Conn = conn
	over := c.over
	c.mu.Unlock()
	if over || c.leases.cfg.Clock() >= c.leases.until(c.held) {
		c.cut()
		return false
	}
	return true
}

// cut ends the connection at once: what the kernel has not sent yet it drops.
func (c *leasedConn) cut() {
	c.cancel()
	c.mu.Lock()
	first, conn := !c.over, c.Conn
	c.over = true
	c.mu.Unlock()
	if first {
		c.leases.closed.Inc()
	}
	if conn != nil {
		if tcp, ok := conn.(*net.TCPConn); ok {
			_ = tcp.SetLinger(0) // it may be closed already
		}
		_ = conn.Close()
	}
	c.leases.leave(c)
}

// Write implements net.Conn.
func (c *leasedConn) Write(b []byte) (int, error) {
	if c.leases.cfg.Clock() >= c.leases.until(c.held) {
		c.cut()
		return 0, &net.OpError{Op: "write", Net: "tcp", Source: c.LocalAddr(), Addr: c.RemoteAddr(), Err: net.ErrClosed}
	}
	return c.Conn.Write(b)
}

// Close implements net.Conn.
func (c *leasedConn) Close() error {
	c.mu.Lock()
	c.over = true
	c.mu.Unlock()
	err := c.Conn.Close()
	c.leases.leave(c)
	return err
}

// SyscallConn implements syscall.Conn, by which who holds the connection sees whether
// it lives.
func (c *leasedConn) SyscallConn() (syscall.RawConn, error) {
	if s, ok := c.Conn.(syscall.Conn); ok {
		return s.SyscallConn()
	}
	return nil, os.ErrInvalid
}

// dialLeased is dial for a floating address.
func (m *Manager) dialLeased(ctx context.Context, status *Status, remote netip.AddrPort, timeout time.Duration) (net.Conn, error) {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	c := m.leases.admit(status, cancel)
	if c == nil {
		return nil, m.failed(status, remote, Unusable, nil)
	}
	conn, err := m.connect(ctx, status, remote, timeout)
	if err != nil {
		c.mu.Lock()
		over := c.over
		c.mu.Unlock()
		m.leases.leave(c)
		if over {
			return nil, m.failed(status, remote, Unusable, err)
		}
		return nil, m.failed(status, remote, m.cause(err, status.Source.Bind), err)
	}
	if !c.opened(conn) {
		return nil, m.failed(status, remote, Unusable, nil)
	}
	return c, nil
}
