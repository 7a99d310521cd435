//go:build !noraft

package sim

import (
	"context"
	"crypto/tls"
	"net"
	"slices"
	"sync"
	"time"

	"google.golang.org/protobuf/proto"

	"github.com/relais-mta/relais/shared/lease"
	"github.com/relais-mta/relais/shared/link"
	"github.com/relais-mta/relais/shared/pki"
	"github.com/relais-mta/relais/shared/pki/pkitest"
	"github.com/relais-mta/relais/shared/wire"
)

const simProtocol = "relais-link/1"

// simWire is one direction of a connection: what is written arrives later, in its
// order, and not before the way is open.
type simWire struct {
	delay func() time.Duration
	cut   func() bool
	to    net.Conn
	stop  chan struct{}
	once  sync.Once

	mu    sync.Mutex
	queue [][]byte
	more  chan struct{}
}

func (s *simWire) Write(p []byte) (int, error) {
	select {
	case <-s.stop:
		return 0, net.ErrClosed
	default:
	}
	s.mu.Lock()
	s.queue = append(s.queue, slices.Clone(p))
	s.mu.Unlock()
	select {
	case s.more <- struct{}{}:
	default:
	}
	return len(p), nil
}

func (s *simWire) carry() {
	defer s.to.Close()
	for {
		select {
		case <-s.more:
		case <-s.stop:
			return
		}
		s.mu.Lock()
		queue := s.queue
		s.queue = nil
		s.mu.Unlock()
		for wait := s.delay(); ; wait = 100 * time.Millisecond {
			select {
			case <-time.After(wait):
			case <-s.stop:
				return
			}
			if !s.cut() {
				break
			}
		}
		for _, p := range queue {
			if _, err := s.to.Write(p); err != nil {
				return
			}
		}
	}
}

// simConn is one end of a connection.
type simConn struct {
	net.Conn // reads, and their deadlines
	out      *simWire
}

func (c *simConn) Write(p []byte) (int, error)      { return c.out.Write(p) }
func (c *simConn) SetWriteDeadline(time.Time) error { return nil }
func (c *simConn) SetDeadline(t time.Time) error    { return c.SetReadDeadline(t) }
func (c *simConn) Close() error {
	c.out.once.Do(func() { close(c.out.stop) })
	return c.Conn.Close()
}

// newConn returns the ends of a connection between a relay and a server.
func (w *raftWorld) newConn(r *raftRelay, s *raftServer) (relay, server *simConn) {
	ends := [2]*simConn{{}, {}}
	for i := range ends {
		far, near := net.Pipe()
		way := &simWire{delay: w.delay, cut: func() bool { return w.isCut(r, s) }, to: far, stop: make(chan struct{}), more: make(chan struct{}, 1)}
		w.links.Go(way.carry)
		ends[1-i].Conn, ends[i].out = near, way
	}
	return ends[0], ends[1]
}

// isCut reports whether nothing goes between a relay and a server now.
func (w *raftWorld) isCut(r *raftRelay, s *raftServer) bool {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.cuts[raftPair{r, s}].After(time.Now())
}

// cut cuts a relay off from a server, both ways.
func (w *raftWorld) cut(r *raftRelay, s *raftServer, d time.Duration) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.cuts[raftPair{r, s}] = time.Now().Add(d)
}

type raftPair struct {
	r *raftRelay
	s *raftServer
}

// configs returns what both ends need for TLS.
func (w *raftWorld) configs() {
	ca := pkitest.New(w.t)
	w.tlsServer = pki.OpenServerConfig(ca.Node(pki.RoleControl, pkitest.NewNode()), simProtocol)
	w.tlsClient = pki.PinnedClientConfig([]pki.Pin{ca.Pin()}, simProtocol)
}

// raftLink is a relay's link to a server.
type raftLink struct {
	to   *raftServer
	out  chan proto.Message
	stop chan struct{}
	once sync.Once
}

func (l *raftLink) close() {
	if l != nil {
		l.once.Do(func() { close(l.stop) })
	}
}

func (l *raftLink) ended() bool {
	select {
	case <-l.stop:
		return true
	default:
		return false
	}
}

// dial opens a link to the server that the relay takes for the leader. r.mu is held.
func (r *raftRelay) dial(s *raftServer) {
	r.link.close()
	near, far := r.w.newConn(r, s)
	l := &raftLink{to: s, out: make(chan proto.Message, 1024), stop: make(chan struct{})}
	r.link = l
	r.w.links.Go(func() { s.serve(r, far) })
	r.w.links.Go(func() {
		r.talk(l, near)
		l.close()
	})
}

// talk says what there is to say over a link, until it ends.
func (r *raftRelay) talk(l *raftLink, near *simConn) {
	defer near.Close()
	ctx, cancel := context.WithTimeout(context.Background(), link.DefaultDialTimeout)
	defer cancel()
	conn := tls.Client(near, r.w.tlsClient)
	if conn.HandshakeContext(ctx) != nil {
		return
	}
	session := link.Over(conn, true)
	defer session.Close(link.CodeDone, "")
	stream, err := session.OpenStream(ctx)
	if err != nil {
		return
	}
	frames := wire.NewConn(stream, wire.MaxFrameBytes)
	r.w.links.Go(func() {
		for {
			m, err := frames.Receive()
			if err != nil {
				l.close()
				return
			}
			if down, ok := m.(*wire.QuotaDown); ok {
				r.hear(l, down)
			}
		}
	})
	for {
		select {
		case m := <-l.out:
			up, err := wire.NewQuotaUp(m)
			if err != nil || frames.Send(up) != nil {
				return
			}
		case <-l.stop:
			return
		case <-session.Done():
			return
		}
	}
}

// hear takes what a server says.
func (r *raftRelay) hear(l *raftLink, down *wire.QuotaDown) {
	m, err := down.Message()
	if err != nil {
		r.w.fail("a message cannot be read: %v", err)
		return
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.link != l {
		return // the process that had the link is over
	}
	switch m := m.(type) {
	case *wire.LeaseWelcome:
		if wire.DecodeLeaseWelcome(r.node, m).Incarnation == r.incarnation {
			r.session, r.answered = true, time.Now()
		}
	case *wire.LeaseGrant:
		g, err := wire.DecodeLeaseGrant(r.node, m)
		if err != nil {
			r.w.fail("a grant cannot be read: %v", err)
			return
		}
		r.holder.Grant(r.clock(), g)
		r.answered = time.Now()
		r.check(r.clock())
	}
}

// serve is a server's end of a link.
func (s *raftServer) serve(r *raftRelay, far *simConn) {
	defer far.Close()
	ctx, cancel := context.WithTimeout(context.Background(), link.DefaultDialTimeout)
	defer cancel()
	conn := tls.Server(far, s.w.tlsServer)
	if conn.HandshakeContext(ctx) != nil {
		return
	}
	session := link.Over(conn, false)
	defer session.Close(link.CodeDone, "")
	stream, err := session.AcceptStream(ctx)
	if err != nil {
		return
	}
	frames, out := wire.NewConn(stream, wire.MaxFrameBytes), make(chan proto.Message, 1024)
	s.mu.Lock()
	s.out[r.node] = out
	s.mu.Unlock()
	s.w.links.Go(func() {
		for {
			select {
			case m := <-out:
				down, err := wire.NewQuotaDown(m)
				if err != nil || frames.Send(down) != nil {
					return
				}
			case <-session.Done():
				return
			}
		}
	})
	for {
		m, err := frames.Receive()
		if err != nil {
			return
		}
		s.pause()
		if up, ok := m.(*wire.QuotaUp); ok {
			s.take(r.node, up)
		}
	}
}

// take hands the grantor what a relay says, if this server leads.
func (s *raftServer) take(n lease.Node, up *wire.QuotaUp) {
	m, err := up.Message()
	if err != nil {
		s.w.fail("a message cannot be read: %v", err)
		return
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.grantor == nil {
		return
	}
	switch m := m.(type) {
	case *wire.LeaseHello:
		if h, _, err := wire.DecodeLeaseHello(n, m); err == nil {
			s.grantor.Hello(s.clock(), h)
		}
	case *wire.LeaseReport:
		if report, err := wire.DecodeLeaseReport(n, m); err == nil {
			s.grantor.Report(s.clock(), report)
		}
	}
}

// tell sends what the leader says.
func (s *raftServer) tell(welcomes []lease.Welcome, grants []lease.Grant) {
	for _, m := range welcomes {
		s.send(m.Node, wire.EncodeLeaseWelcome(m))
	}
	for i := range grants {
		s.send(grants[i].Node, wire.EncodeLeaseGrant(&grants[i]))
	}
}

func (s *raftServer) send(n lease.Node, m proto.Message) {
	s.mu.Lock()
	out := s.out[n]
	s.mu.Unlock()
	select {
	case out <- m:
	default: // there is no link, or nothing goes through it
	}
}
