package link

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"net"
	"net/netip"
	"sync"
	"time"

	"github.com/quic-go/quic-go"

	"github.com/relais-mta/relais/shared/fault"
)

// Between control servers silence means trouble sooner than between relay and
// control, and no middlebox is expected.
const (
	peerKeepAlive  = time.Second
	peerMaxIdle    = 5 * time.Second
	maxPeerStreams = 64 // that one peer may have open
	maxPeers       = 64 // connections accepted at once
	maxPeerBacklog = 64 // streams accepted and not yet taken
)

// PeerConfig configures Peers.
type PeerConfig struct {
	Address  netip.AddrPort // to listen on; port 0: any
	Serve    *tls.Config
	Dial     *tls.Config
	ResetKey [32]byte // from the server's key (RFC 9000 section 10.3)
	// Check looks at a peer after the handshake, whoever began it. dialed is the
	// address that was dialed, empty for a peer that dialed us.
	Check func(dialed string, leaf *x509.Certificate) error
}

// Peers carries byte streams between equals over QUIC, on a UDP socket of its
// own: one connection to each peer, one stream for each net.Conn. A stream
// looks like a TCP connection to its user.
type Peers struct {
	config    PeerConfig
	transport *quic.Transport
	socket    *net.UDPConn
	listener  *quic.Listener
	accepted  chan net.Conn
	ctx       context.Context
	cancel    context.CancelFunc
	running   sync.WaitGroup
	slots     chan struct{}

	mu    sync.Mutex
	conns map[string]*peerConn // by the address dialed
}

// peerConn is the connection to one address, or the attempt to make it.
type peerConn struct {
	ready chan struct{} // closed when conn or err is set
	conn  *quic.Conn
	err   error
}

func peerQUICConfig() *quic.Config {
	return &quic.Config{
		HandshakeIdleTimeout: DefaultDialTimeout, MaxIdleTimeout: peerMaxIdle, KeepAlivePeriod: peerKeepAlive,
		MaxIncomingStreams: maxPeerStreams, MaxIncomingUniStreams: -1, Allow0RTT: false,
	}
}

// ListenPeers opens the socket and accepts.
func ListenPeers(config PeerConfig) (*Peers, error) {
	const op = "link.ListenPeers"
	socket, err := net.ListenUDP("udp", net.UDPAddrFromAddrPort(config.Address))
	if err != nil {
		return nil, fault.Wrap(err, fault.Unavailable, op, "cannot listen on UDP %s", config.Address)
	}
	key := quic.StatelessResetKey(config.ResetKey)
	transport := &quic.Transport{Conn: socket, StatelessResetKey: &key}
	listener, err := transport.Listen(config.Serve, peerQUICConfig())
	if err != nil {
		_ = socket.Close() // the first error is the one worth telling
		return nil, fault.Wrap(err, fault.Internal, op, "cannot start QUIC on UDP %s", config.Address)
	}
	p := &Peers{config: config, transport: transport, socket: socket, listener: listener, accepted: make(chan net.Conn, maxPeerBacklog),
		slots: make(chan struct{}, maxPeers), conns: make(map[string]*peerConn)}
	p.ctx, p.cancel = context.WithCancel(context.Background())
	p.running.Go(p.accept)
	return p, nil
}

// Addr returns the address listened on.
func (p *Peers) Addr() netip.AddrPort { return addrPort(p.listener.Addr()) }

func (p *Peers) accept() {
	for {
		conn, err := p.listener.Accept(p.ctx)
		if err != nil {
			return // closed
		}
		select {
		case p.slots <- struct{}{}:
		default:
			_ = conn.CloseWithError(quic.ApplicationErrorCode(CodeBusy), "too many peers")
			continue
		}
		p.running.Go(func() {
			defer func() { <-p.slots }()
			p.serve(conn)
		})
	}
}

// serve hands on the streams of one peer until its connection ends.
func (p *Peers) serve(conn *quic.Conn) {
	if err := p.check("", conn); err != nil {
		_ = conn.CloseWithError(quic.ApplicationErrorCode(CodeDenied), clipText(fault.Public(err)))
		return
	}
	defer func() { _ = conn.CloseWithError(quic.ApplicationErrorCode(CodeStopping), "") }()
	for {
		stream, err := conn.AcceptStream(p.ctx)
		if err != nil {
			return // the connection is over, or we are closing
		}
		select {
		case p.accepted <- &peerStream{stream, conn}:
		case <-p.ctx.Done():
			return
		}
	}
}

func (p *Peers) check(dialed string, conn *quic.Conn) error {
	certs := conn.ConnectionState().TLS.PeerCertificates
	if len(certs) == 0 {
		return fault.New(fault.Unauthenticated, "link.Peers", "the peer has no certificate")
	}
	if p.config.Check == nil {
		return nil
	}
	return p.config.Check(dialed, certs[0])
}

// Accept waits for a stream of a peer's.
func (p *Peers) Accept() (net.Conn, error) {
	select {
	case conn := <-p.accepted:
		return conn, nil
	case <-p.ctx.Done():
		return nil, net.ErrClosed
	}
}

// Dial opens a stream to address, "host:port". Callers that dial one address at
// the same time share one connection.
func (p *Peers) Dial(address string, timeout time.Duration) (net.Conn, error) {
	ctx, cancel := context.WithTimeout(p.ctx, timeout)
	defer cancel()
	for try := 1; ; try++ {
		conn, fresh, err := p.connection(ctx, address)
		if err != nil {
			return nil, err
		}
		stream, err := conn.OpenStreamSync(ctx)
		if err == nil {
			return &peerStream{stream, conn}, nil
		}
		p.forget(address, conn)
		if fresh || try > 1 || ctx.Err() != nil {
			return nil, explain(err, "link.Peers", address, "")
		}
	}
}

// connection returns the connection to address; fresh says that this call made it.
func (p *Peers) connection(ctx context.Context, address string) (conn *quic.Conn, fresh bool, err error) {
	p.mu.Lock()
	if p.ctx.Err() != nil {
		p.mu.Unlock()
		return nil, false, net.ErrClosed
	}
	c := p.conns[address]
	if c != nil && c.conn != nil && c.conn.Context().Err() != nil {
		c = nil // it ended
	}
	if c == nil {
		c = &peerConn{ready: make(chan struct{})}
		p.conns[address] = c
		fresh = true
		p.running.Go(func() { p.connect(address, c) })
	}
	p.mu.Unlock()
	select {
	case <-c.ready:
		return c.conn, fresh, c.err
	case <-ctx.Done():
		return nil, fresh, fault.Wrap(ctx.Err(), fault.Timeout, "link.Peers", "%s did not answer on UDP in time", address)
	}
}

// connect makes the connection that all waiters of c share.
func (p *Peers) connect(address string, c *peerConn) {
	ctx, cancel := context.WithTimeout(p.ctx, DefaultDialTimeout)
	defer cancel()
	conn, err := p.dial(ctx, address)
	p.mu.Lock()
	defer p.mu.Unlock()
	c.conn, c.err = conn, err
	close(c.ready)
	if err != nil && p.conns[address] == c {
		delete(p.conns, address)
	}
}

func (p *Peers) dial(ctx context.Context, address string) (*quic.Conn, error) {
	targets, err := resolve(ctx, address)
	if err != nil {
		return nil, err
	}
	for _, target := range targets {
		var conn *quic.Conn
		if conn, err = p.transport.Dial(ctx, net.UDPAddrFromAddrPort(target), p.config.Dial, peerQUICConfig()); err != nil {
			err = explain(err, "link.Peers", address, DefaultDialTimeout.String())
			continue
		}
		if err = p.check(address, conn); err != nil {
			_ = conn.CloseWithError(quic.ApplicationErrorCode(CodeDenied), "")
			continue
		}
		return conn, nil
	}
	return nil, err
}

// forget gives up a connection that opens no streams any more.
func (p *Peers) forget(address string, conn *quic.Conn) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if c := p.conns[address]; c != nil && c.conn == conn {
		delete(p.conns, address)
	}
	_ = conn.CloseWithError(quic.ApplicationErrorCode(CodeDone), "")
}

// Close ends every connection.
func (p *Peers) Close() error {
	p.mu.Lock()
	p.cancel() // under the lock: no dialing begins after it
	for _, c := range p.conns {
		if c.conn != nil {
			_ = c.conn.CloseWithError(quic.ApplicationErrorCode(CodeStopping), "") // so that the peer need not find out
		}
	}
	p.mu.Unlock()
	p.running.Wait()
	err := p.transport.Close()
	if closeErr := p.socket.Close(); err == nil && !errors.Is(closeErr, net.ErrClosed) {
		err = closeErr
	}
	return fault.Wrap(err, fault.Internal, "link.Peers.Close", "cannot close the socket")
}

func clipText(text string) string { return text[:min(len(text), maxCloseTextBytes)] }

// peerStream is net.Conn over one stream.
type peerStream struct {
	*quic.Stream
	conn *quic.Conn
}

// Close ends both directions: QUIC's own Close ends only the sending one, and
// the stream would count against the peer's credit for ever.
func (s *peerStream) Close() error {
	s.CancelRead(0)
	return s.Stream.Close()
}

func (s *peerStream) LocalAddr() net.Addr  { return s.conn.LocalAddr() }
func (s *peerStream) RemoteAddr() net.Addr { return s.conn.RemoteAddr() }
