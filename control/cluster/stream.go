package cluster

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"log/slog"
	"net"
	"net/netip"
	"sync"
	"time"

	"github.com/hashicorp/raft"

	"github.com/relais-mta/relais/shared/fault"
	"github.com/relais-mta/relais/shared/ids"
	"github.com/relais-mta/relais/shared/link"
	"github.com/relais-mta/relais/shared/pki"
	"github.com/relais-mta/relais/shared/wire"
)

// The transports of raft. A server listens on both, so that a cluster can be
// switched one server after the other.
const (
	TransportTCP  = "tcp"
	TransportQUIC = "quic"
)

const (
	streamHandshakeTimeout = 5 * time.Second
	maxStreamHandshakes    = 64 // on TCP, at once
	maxStreamBacklog       = 64 // connections that raft has not taken yet
)

// StreamOptions configure a Stream.
type StreamOptions struct {
	Bind      string // host:port of both sockets
	Advertise string // host:port that peers dial
	Transport string // for connections that this server opens: "tcp" or "quic"
	Holder    *pki.Holder
	Cluster   ids.Cluster
	ResetKey  [32]byte // for QUIC
	// Check refuses peers that the certificate alone does not: servers that were
	// removed. dialed is the address dialed, empty for a peer that dialed us.
	Check func(dialed string, server ids.Node) error
	// Known accepts servers whose certificate is of an issuing CA that was
	// dropped, as that of one is which was off meanwhile: it must hear from the
	// others before it can make a new one.
	Known  func(pki.Identity, *x509.Certificate) bool
	Logger *slog.Logger
}

// Stream connects the servers of a cluster with each other by mutual TLS: raft
// over TCP or QUIC, and requests of one server to another over TCP. Certificates
// of another cluster, or of a relay, open nothing.
type Stream struct {
	options   StreamOptions
	advertise address
	tcp       net.Listener
	serve     *tls.Config
	dialRaft  *tls.Config
	dialPeer  *tls.Config
	peers     *link.Peers
	raft      chan net.Conn
	requests  chan net.Conn
	ctx       context.Context
	cancel    context.CancelFunc
	running   sync.WaitGroup
}

var _ raft.StreamLayer = (*Stream)(nil)

// address is the name peers know this server by, which need not be the address
// the listener is bound to.
type address string

// Network implements net.Addr.
func (address) Network() string { return "tcp" }

// String implements net.Addr.
func (a address) String() string { return string(a) }

// Listen binds the raft port on TCP and UDP.
func Listen(o StreamOptions) (*Stream, error) {
	const op = "cluster.Listen"
	bound := func(err error) error {
		e := fault.New(fault.Unavailable, op, "%s cannot be bound: is another server using it?", o.Bind)
		e.Field, e.Cause = "listen.raft", err
		return e
	}
	tcp, err := net.Listen("tcp", o.Bind)
	if err != nil {
		return nil, bound(err)
	}
	s := &Stream{options: o, advertise: address(o.Advertise), tcp: tcp, raft: make(chan net.Conn, maxStreamBacklog), requests: make(chan net.Conn, maxStreamBacklog)}
	if o.Advertise == "" {
		s.advertise = address(tcp.Addr().String())
	}
	// A server that was off for longer than its certificate lives must hear from
	// the others before it can renew it; its row says whether it still belongs.
	peer := pki.Peer{Cluster: o.Cluster, Role: pki.RoleControl, Grace: pki.RenewGrace, Known: o.Known}
	s.serve = pki.ByALPN(map[string]*tls.Config{
		wire.ALPNRaft: pki.ServerConfig(o.Holder, peer, wire.ALPNRaft),
		wire.ALPNPeer: pki.ServerConfig(o.Holder, peer, wire.ALPNPeer),
	})
	s.dialRaft, s.dialPeer = pki.ClientConfig(o.Holder, peer, wire.ALPNRaft), pki.ClientConfig(o.Holder, peer, wire.ALPNPeer)
	udp, err := netip.ParseAddrPort(tcp.Addr().String())
	if err == nil {
		s.peers, err = link.ListenPeers(link.PeerConfig{Address: udp, Serve: pki.ServerConfig(o.Holder, peer, wire.ALPNRaft), Dial: s.dialRaft, ResetKey: o.ResetKey, Check: s.check})
	}
	if err != nil {
		_ = tcp.Close() // the first error is the one worth telling
		return nil, bound(err)
	}
	s.ctx, s.cancel = context.WithCancel(context.Background())
	s.running.Go(s.acceptTCP)
	s.running.Go(s.acceptQUIC)
	return s, nil
}

// check looks at a peer whose chain, role and cluster are good.
func (s *Stream) check(dialed string, leaf *x509.Certificate) error {
	identity, err := pki.CertIdentity(leaf)
	if err != nil || s.options.Check == nil {
		return err
	}
	return s.options.Check(dialed, identity.Node)
}

func (s *Stream) acceptTCP() {
	slots := make(chan struct{}, maxStreamHandshakes)
	for {
		conn, err := s.tcp.Accept()
		if err != nil {
			if errors.Is(err, net.ErrClosed) || s.ctx.Err() != nil {
				return
			}
			s.options.Logger.Warn("the raft port accepts nothing for a moment", "error", err)
			select { // out of descriptors, most likely
			case <-time.After(time.Second):
			case <-s.ctx.Done():
			}
			continue
		}
		select {
		case slots <- struct{}{}:
		default:
			_ = conn.Close()
			continue
		}
		s.running.Go(func() {
			defer func() { <-slots }()
			s.admit(conn)
		})
	}
}

// admit runs the handshake of an incoming connection and hands it to whom it is for.
func (s *Stream) admit(socket net.Conn) {
	ctx, cancel := context.WithTimeout(s.ctx, streamHandshakeTimeout)
	defer cancel()
	conn := tls.Server(socket, s.serve)
	err := conn.HandshakeContext(ctx)
	// Who asks is checked at each request, and told what is wrong.
	if err == nil && conn.ConnectionState().NegotiatedProtocol != wire.ALPNPeer {
		err = s.check("", conn.ConnectionState().PeerCertificates[0])
	}
	if err != nil {
		s.options.Logger.Warn("a peer was refused", "remote", socket.RemoteAddr().String(), "error", err)
		_ = socket.Close()
		return
	}
	to, handed := s.raft, net.Conn(conn)
	if conn.ConnectionState().NegotiatedProtocol == wire.ALPNPeer {
		to, handed = s.requests, requestConn{conn, conn.ConnectionState().PeerCertificates[0]}
	}
	select {
	case to <- handed:
	case <-s.ctx.Done():
		_ = conn.Close()
	}
}

func (s *Stream) acceptQUIC() {
	for {
		conn, err := s.peers.Accept()
		if err != nil {
			return
		}
		select {
		case s.raft <- conn:
		case <-s.ctx.Done():
			_ = conn.Close()
			return
		}
	}
}

// Accept implements net.Listener for raft.
func (s *Stream) Accept() (net.Conn, error) {
	select {
	case conn := <-s.raft:
		return conn, nil
	case <-s.ctx.Done():
		return nil, net.ErrClosed
	}
}

// Addr implements net.Listener with the advertised address.
func (s *Stream) Addr() net.Addr { return s.advertise }

// Dial implements raft.StreamLayer.
func (s *Stream) Dial(to raft.ServerAddress, timeout time.Duration) (net.Conn, error) {
	if s.options.Transport == TransportQUIC {
		return s.peers.Dial(string(to), timeout)
	}
	ctx, cancel := context.WithTimeout(s.ctx, timeout)
	defer cancel()
	return s.dialTCP(ctx, string(to), s.dialRaft)
}

func (s *Stream) dialTCP(ctx context.Context, to string, config *tls.Config) (net.Conn, error) {
	dialer := tls.Dialer{Config: config}
	conn, err := dialer.DialContext(ctx, "tcp", to)
	if err != nil {
		return nil, err
	}
	if err := s.check(to, conn.(*tls.Conn).ConnectionState().PeerCertificates[0]); err != nil {
		_ = conn.Close()
		return nil, err
	}
	return conn, nil
}

// Close closes both sockets.
func (s *Stream) Close() error {
	s.cancel()
	err := s.tcp.Close()
	if peersErr := s.peers.Close(); err == nil {
		err = peersErr
	}
	s.running.Wait()
	return err
}

// requestConn hides from the HTTP server that there is TLS below it: a server
// closes connections whose protocol (ALPN) it has no handler for.
type requestConn struct {
	net.Conn
	leaf *x509.Certificate
}

// requestListener is the Stream as the listener of requests between servers.
type requestListener struct {
	*Stream
	once   sync.Once
	closed chan struct{}
}

func newRequestListener(s *Stream) *requestListener {
	return &requestListener{Stream: s, closed: make(chan struct{})}
}

// Accept implements net.Listener.
func (l *requestListener) Accept() (net.Conn, error) {
	select {
	case conn := <-l.requests:
		return conn, nil
	case <-l.closed:
	case <-l.ctx.Done():
	}
	return nil, net.ErrClosed
}

// Close implements net.Listener; raft's transport closes the Stream.
func (l *requestListener) Close() error {
	l.once.Do(func() { close(l.closed) })
	return nil
}
