package link

import (
	"context"
	"crypto/tls"
	"errors"
	"net"
	"net/netip"
	"sync"
	"time"

	"github.com/quic-go/quic-go"

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
)

// ServerConfig configures a Listener.
type ServerConfig struct {
	Address     netip.AddrPort // to listen on; port 0: any
	TLS         *tls.Config    // see pki.ByALPN
	ResetKey    [32]byte       // from the server's key (RFC 9000 section 10.3)
	MaxSessions int            // at once; 0: DefaultMaxSessions
}

// Listener accepts sessions on one UDP socket of its own.
type Listener struct {
	transport *quic.Transport
	socket    *net.UDPConn
	listener  *quic.Listener
	slots     chan struct{} // one token per running session
}

// Handler serves one session. When it returns the session is closed, with the
// code and text it returned.
type Handler func(ctx context.Context, session Session) (Code, string)

// Listen opens the socket and starts accepting.
func Listen(config ServerConfig) (*Listener, error) {
	const op = "link.Listen"
	socket, err := net.ListenUDP("udp", net.UDPAddrFromAddrPort(config.Address))
	if err != nil {
		return nil, fault.Wrap(err, fault.Unavailable, op, "cannot listen on UDP %s", config.Address)
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
		_ = socket.Close() // the first error is the one worth telling
		return nil, fault.Wrap(err, fault.Internal, op, "cannot start QUIC on UDP %s", config.Address)
	}
	limit := config.MaxSessions
	if limit == 0 {
		limit = DefaultMaxSessions
	}
	return &Listener{transport: transport, socket: socket, listener: listener, slots: make(chan struct{}, limit)}, nil
}

// Addr returns the address listened on.
func (l *Listener) Addr() netip.AddrPort { return addrPort(l.listener.Addr()) }

// Serve accepts sessions and runs the handler of each one's protocol in a
// goroutine of its own, until ctx ends. It then lets the handlers, whose
// context ends too, finish, closes the socket and returns nil.
func (l *Listener) Serve(ctx context.Context, handlers map[string]Handler) error {
	var running sync.WaitGroup
	defer func() {
		running.Wait()
		_ = l.transport.Close() // nothing is left to lose
		_ = l.socket.Close()
	}()
	for {
		conn, err := l.listener.Accept(ctx)
		if err != nil {
			if ctx.Err() != nil || errors.Is(err, quic.ErrServerClosed) {
				return nil
			}
			return fault.Wrap(err, fault.Unavailable, "link.Serve", "the link listener on %s failed", l.Addr())
		}
		session := quicSession{conn}
		select {
		case l.slots <- struct{}{}:
		default:
			session.Close(CodeBusy, "too many sessions: try again later or another server")
			continue
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
}

// Close stops accepting and ends every session.
func (l *Listener) Close() error {
	err := l.transport.Close()
	if closeErr := l.socket.Close(); err == nil && !errors.Is(closeErr, net.ErrClosed) {
		err = closeErr
	}
	return fault.Wrap(err, fault.Internal, "link.Listener.Close", "cannot close the UDP socket")
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
