package link

import (
	"context"
	"crypto/tls"
	"errors"
	"io"
	"net"
	"net/netip"
	"sync"
	"time"

	"github.com/quic-go/quic-go"
	"golang.org/x/sys/unix"

	"github.com/relais-mta/relais/shared/fault"
)

const (
	// DefaultMaxSessions bounds the sessions of one listener: five times the
	// relays a cluster is built for.
	DefaultMaxSessions = 5000
	// handshakesPerSecond that are begun without proof that the client's
	// address is its own (RFC 9000 section 8.1.2); a client over it pays one
	// round trip more.
	handshakesPerSecond = 200
	maxTCPHandshakes    = 256 // at once
	maxPortTries        = 16
	acceptPause         = 100 * time.Millisecond
)

// ServerConfig configures a Listener.
type ServerConfig struct {
	Address     netip.AddrPort // to listen on; port 0: any
	TLS         *tls.Config    // see pki.ByALPN
	ResetKey    [32]byte       // from the server's key (RFC 9000 section 10.3)
	MaxSessions int            // at once; 0: DefaultMaxSessions
}

// Listener accepts sessions on one UDP socket of its own, and on TCP at the same
// port.
type Listener struct {
	transport  *quic.Transport
	socket     *net.UDPConn
	listener   *quic.Listener
	tcp        *net.TCPListener
	tls        *tls.Config
	slots      chan struct{} // one token per running session
	handshakes chan struct{} // one token per TLS handshake on TCP
}

// Handler serves one session. When it returns the session is closed, with the
// code and text it returned.
type Handler func(ctx context.Context, session Session) (Code, string)

// Listen opens the sockets and starts accepting.
func Listen(config ServerConfig) (*Listener, error) {
	const op = "link.Listen"
	socket, tcp, err := bind(config.Address)
	if err != nil {
		return nil, err
	}
	key := quic.StatelessResetKey(config.ResetKey)
	gate := handshakeGate{}
	transport := &quic.Transport{
		Conn:                socket,
		StatelessResetKey:   &key,
		VerifySourceAddress: func(net.Addr) bool { return gate.over(time.Now()) },
	}
	listener, err := transport.Listen(config.TLS, quicConfig(DefaultDialTimeout))
	if err != nil {
		_, _ = socket.Close(), tcp.Close() // the first error is the one worth telling
		return nil, fault.Wrap(err, fault.Internal, op, "cannot start QUIC on UDP %s", config.Address)
	}
	limit := config.MaxSessions
	if limit == 0 {
		limit = DefaultMaxSessions
	}
	return &Listener{
		transport: transport, socket: socket, listener: listener, tcp: tcp, tls: config.TLS,
		slots: make(chan struct{}, limit), handshakes: make(chan struct{}, maxTCPHandshakes),
	}, nil
}

// bind opens both sockets on one port. With port 0 the kernel chooses the UDP
// port, which may be taken on TCP: then it chooses again.
func bind(address netip.AddrPort) (*net.UDPConn, *net.TCPListener, error) {
	const op = "link.Listen"
	for try := 1; ; try++ {
		socket, err := net.ListenUDP("udp", net.UDPAddrFromAddrPort(address))
		if err != nil {
			return nil, nil, fault.Wrap(err, fault.Unavailable, op, "cannot listen on UDP %s", address)
		}
		port := addrPort(socket.LocalAddr()).Port()
		tcp, err := net.ListenTCP("tcp", net.TCPAddrFromAddrPort(netip.AddrPortFrom(address.Addr(), port)))
		if err == nil {
			return socket, tcp, nil
		}
		_ = socket.Close() // the error of TCP is the one worth telling
		if address.Port() != 0 || try == maxPortTries {
			return nil, nil, fault.Wrap(err, fault.Unavailable, op, "cannot listen on TCP %s", netip.AddrPortFrom(address.Addr(), port))
		}
	}
}

// Addr returns the address listened on.
func (l *Listener) Addr() netip.AddrPort { return addrPort(l.listener.Addr()) }

// Serve accepts sessions and runs the handler of each one's protocol in a
// goroutine of its own, until ctx ends. It then lets the handlers, whose
// context ends too, finish, closes the sockets and returns nil.
func (l *Listener) Serve(ctx context.Context, handlers map[string]Handler) error {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	stop := context.AfterFunc(ctx, func() { _ = l.tcp.Close() }) // ends its Accept
	defer stop()
	var running sync.WaitGroup
	failed := make(chan error, 2)
	for _, accept := range []func(context.Context, *sync.WaitGroup, map[string]Handler) error{l.serveQUIC, l.serveTCP} {
		running.Go(func() {
			defer cancel() // one without the other is no listener
			failed <- accept(ctx, &running, handlers)
		})
	}
	running.Wait()
	_ = l.Close() // nothing is left to lose
	return errors.Join(<-failed, <-failed)
}

// serveQUIC accepts on UDP until ctx ends.
func (l *Listener) serveQUIC(ctx context.Context, running *sync.WaitGroup, handlers map[string]Handler) error {
	for {
		conn, err := l.listener.Accept(ctx)
		if err != nil {
			if ctx.Err() != nil || errors.Is(err, quic.ErrServerClosed) {
				return nil
			}
			return fault.Wrap(err, fault.Unavailable, "link.Serve", "the link listener on UDP %s failed", l.Addr())
		}
		l.start(ctx, running, quicSession{conn}, handlers)
	}
}

// start runs the handler of a session, if there is room.
func (l *Listener) start(ctx context.Context, running *sync.WaitGroup, session Session, handlers map[string]Handler) {
	select {
	case l.slots <- struct{}{}:
	default:
		session.Close(CodeBusy, "too many sessions: try again later or another server")
		return
	}
	running.Go(func() {
		defer func() { <-l.slots }()
		handler, ok := handlers[session.Protocol()]
		if !ok {
			session.Close(CodeProtocol, "this server does not speak "+session.Protocol())
			return
		}
		session.Close(handler(ctx, session))
	})
}

// serveTCP accepts on TCP until ctx ends.
func (l *Listener) serveTCP(ctx context.Context, running *sync.WaitGroup, handlers map[string]Handler) error {
	for {
		socket, err := l.tcp.Accept()
		if err != nil {
			if ctx.Err() != nil || errors.Is(err, net.ErrClosed) {
				return nil
			}
			if errors.Is(err, unix.EMFILE) || errors.Is(err, unix.ENFILE) || errors.Is(err, unix.ECONNABORTED) {
				continueAfter(ctx, acceptPause) // out of descriptors, or the client went away
				continue
			}
			return fault.Wrap(err, fault.Unavailable, "link.Serve", "the link listener on TCP %s failed", l.tcp.Addr())
		}
		select {
		case l.handshakes <- struct{}{}:
		default:
			_ = socket.Close() // a flood; QUIC asks such clients for proof of their address
			continue
		}
		running.Go(func() {
			defer func() { <-l.handshakes }()
			conn, err := l.handshake(ctx, socket)
			if err != nil {
				hangUp(socket) // not a node
				return
			}
			l.start(ctx, running, newMuxSession(conn, false), handlers)
		})
	}
}

func (l *Listener) handshake(ctx context.Context, socket net.Conn) (*tls.Conn, error) {
	ctx, cancel := context.WithTimeout(ctx, DefaultDialTimeout)
	defer cancel()
	conn := tls.Server(socket, l.tls)
	return conn, conn.HandshakeContext(ctx)
}

// hangUp closes a socket after a refusal. What the client has sent meanwhile is
// read first: unread bytes would make the kernel reset the connection, and the
// client would not learn why.
func hangUp(socket net.Conn) {
	if tcp, ok := socket.(*net.TCPConn); ok && tcp.CloseWrite() == nil && tcp.SetReadDeadline(time.Now().Add(muxCloseTimeout)) == nil {
		_, _ = io.CopyN(io.Discard, tcp, muxWindow) // until the client closes, too
	}
	_ = socket.Close()
}

// continueAfter waits for d or the end of ctx.
func continueAfter(ctx context.Context, d time.Duration) {
	timer := time.NewTimer(d)
	defer timer.Stop()
	select {
	case <-timer.C:
	case <-ctx.Done():
	}
}

// Close stops accepting, and ends what runs over QUIC.
func (l *Listener) Close() error {
	err := l.transport.Close()
	for _, closeErr := range []error{l.socket.Close(), l.tcp.Close()} {
		if err == nil && !errors.Is(closeErr, net.ErrClosed) {
			err = closeErr
		}
	}
	return fault.Wrap(err, fault.Internal, "link.Listener.Close", "cannot close the sockets")
}

// handshakeGate counts handshakes by second.
type handshakeGate struct {
	mu     sync.Mutex
	second int64
	count  int
}

// over counts one handshake at now and reports whether its second is full.
func (g *handshakeGate) over(now time.Time) bool {
	g.mu.Lock()
	defer g.mu.Unlock()
	if second := now.Unix(); second != g.second {
		g.second, g.count = second, 0
	}
	g.count++
	return g.count > handshakesPerSecond
}
