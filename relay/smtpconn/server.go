package smtpconn

import (
	"context"
	"crypto/tls"
	"fmt"
	"log/slog"
	"net"
	"net/netip"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/emersion/go-smtp"
	"github.com/prometheus/client_golang/prometheus"

	"github.com/relais-mta/relais/relay/trace"
	"github.com/relais-mta/relais/shared/fault"
	"github.com/relais-mta/relais/shared/policy"
)

// Security says how the connections of a listener come to TLS.
type Security uint8

// The kinds of listeners.
const (
	ImplicitTLS     Security = iota // TLS from the first octet (RFC 8314 section 3.3): port 465
	RequireSTARTTLS                 // no mail and no AUTH before STARTTLS: port 587
	OfferSTARTTLS                   // STARTTLS if the client likes: port 25
	ClearText                       // AUTH and mail without TLS too: in test networks only
)

// Limits bounds one session. A session keeps the limits it began with.
type Limits struct {
	MaxConnections            int           // at once, all clients
	MaxConnectionsPerIP       int           // at once, one IPv4 address or one IPv6 /64
	ConnectionsPerMinute      int           // new ones, all clients; 0: any
	ConnectionsPerMinutePerIP int           // new ones, one IPv4 address or one IPv6 /64; 0: any
	MaxMemoryPercent          int           // of the memory of Config.MemoryOver, then 421 to new ones; 0: any
	MaxCommandsPerSession     int           // then 421
	MaxErrorsPerSession       int           // commands refused with 5xx, then 421
	MaxMessagesPerSession     int           // then 421
	MaxRecipients             int           // told in EHLO; the session enforces it
	MaxMessageBytes           int64         // after dot-stuffing is removed
	MaxLineBytes              int           // of a line of the message, CRLF not counted
	CommandTimeout            time.Duration // a client may take this long for a command or be silent within a message
	MinBytesPerSecond         int64         // of message data, averaged over 30 s of waiting for it; 0: any

	// Rates, 0: any. Those of networks and of all are the newest session's.
	CommandsPerSecond           int // all clients
	CommandsPerSecondPerNetwork int
	CommandsPerSecondPerSession int
	ErrorsPerMinute             int // commands refused with 5xx, all clients
	ErrorsPerMinutePerNetwork   int
	NetworkBitsIPv4             int // of a client's address that name its network; 0: all
	NetworkBitsIPv6             int
}

// SetRates takes a section's rates.
func (l *Limits) SetRates(r *policy.ClientRates) {
	l.MaxMemoryPercent = r.MaxMemoryPercent
	l.CommandsPerSecond, l.CommandsPerSecondPerNetwork, l.CommandsPerSecondPerSession = r.MaxCommandsPerSecond, r.MaxCommandsPerSecondPerNetwork, r.MaxCommandsPerSecondPerSession
	l.ErrorsPerMinute, l.ErrorsPerMinutePerNetwork = r.MaxErrorsPerMinute, r.MaxErrorsPerMinutePerNetwork
	l.NetworkBitsIPv4, l.NetworkBitsIPv6 = r.NetworkBitsIPv4, r.NetworkBitsIPv6
}

// Config says what a Server is for.
type Config struct {
	Name       string         // in metric names and logs: "submission" or "inbound"
	Hostname   string         // said in the greeting
	TLS        *tls.Config    // nil: no TLS, which OfferSTARTTLS listeners alone can do without
	Mechanisms []string       // SASL mechanisms told in EHLO once TLS is up; none: no AUTH at all
	DSN        bool           // announce and parse the parameters of RFC 3461
	SMTPUTF8   bool           // announce SMTPUTF8 (RFC 6531)
	Chunking   bool           // announce CHUNKING and take BDAT (RFC 3030)
	BinaryMIME bool           // announce BINARYMIME (RFC 3030); needs Chunking
	MaxHold    time.Duration  // announce FUTURERELEASE up to so far ahead (RFC 4865); 0: do not
	Proxies    []netip.Prefix // balancers that tell the client's address by the PROXY protocol, and must
	Limits     func() Limits
	MemoryOver func(percent int, now time.Time) bool // whether more than this part of the memory is held; nil: never
	Trace      *trace.Hub                            // who watches dialogues; nil: nobody can
	Kind       trace.Kind                            // of the dialogues
	NewSession func(*Conn) smtp.Session              // called at the first EHLO or HELO of a connection
	Logger     *slog.Logger
	Registerer prometheus.Registerer // nil: metrics are not exported
}

// Server runs listeners that share limits and sessions.
type Server struct {
	cfg     Config
	smtp    *smtp.Server
	metrics *metrics

	draining atomic.Bool
	mu       sync.Mutex
	conns    map[*Conn]struct{}
	clients  map[netip.Addr]int // connections at once
	refusing map[*Conn]struct{} // connections that only get their 421
	minute   minute
	networks networks
	total    counter       // of all clients
	empty    chan struct{} // closed when draining and the last connection ended
	once     sync.Once     // closes empty
}

// NewServer returns a server without listeners.
func NewServer(cfg Config) (*Server, error) {
	m, err := newMetrics(cfg.Name, cfg.Registerer)
	if err != nil {
		return nil, err
	}
	if cfg.TLS != nil {
		cfg.TLS = cfg.TLS.Clone()
		// RFC 8996, RFC 8997: TLS 1.0 and 1.1 are not to be used.
		cfg.TLS.MinVersion = max(cfg.TLS.MinVersion, tls.VersionTLS12)
	}
	s := &Server{
		cfg:      cfg,
		metrics:  m,
		conns:    make(map[*Conn]struct{}),
		refusing: make(map[*Conn]struct{}),
		clients:  make(map[netip.Addr]int),
		empty:    make(chan struct{}),
	}
	s.smtp = smtp.NewServer(smtp.BackendFunc(func(c *smtp.Conn) (smtp.Session, error) {
		return cfg.NewSession(c.Conn().(*Conn)), nil
	}))
	s.smtp.Domain = cfg.Hostname
	s.smtp.AllowInsecureAuth = true // a Conn refuses AUTH before TLS; go-smtp cannot see that TLS is there
	s.smtp.MaxLineLength = 0        // lines are checked below
	s.smtp.ErrorLog = errorLog{cfg.Logger, cfg.Name}
	return s, nil
}

// Serve accepts connections until Shutdown; then it returns nil. A listener
// that needs TLS is refused without it.
func (s *Server) Serve(l net.Listener, security Security) error {
	if s.cfg.TLS == nil && security != OfferSTARTTLS {
		return fault.Field("smtpconn.Serve", "tls", "%s on %s needs a certificate", s.cfg.Name, l.Addr())
	}
	err := s.smtp.Serve(&listener{Listener: l, server: s, security: security})
	if s.draining.Load() {
		return nil
	}
	return fault.Wrap(err, fault.Unavailable, "smtpconn.Serve", "the listener on %s stopped", l.Addr())
}

// forcedCloseTimeout bounds the wait for sessions whose connection was closed
// under them.
const forcedCloseTimeout = 5 * time.Second

// Shutdown answers new connections with 421, ends idle sessions with 421, lets
// those within a mail transaction finish it, and closes the listeners. When ctx
// ends first, the remaining connections are closed and ctx's error is returned.
func (s *Server) Shutdown(ctx context.Context) error {
	if s.draining.Swap(true) {
		return fault.New(fault.Conflict, "smtpconn.Shutdown", "%s is already shutting down", s.cfg.Name)
	}
	s.mu.Lock()
	open := make([]*Conn, 0, len(s.conns))
	for c := range s.conns {
		open = append(open, c)
	}
	s.tellIfEmpty()
	s.mu.Unlock()
	for _, c := range open {
		c.wake()
	}
	var err error
	select {
	case <-s.empty:
	case <-ctx.Done():
		err = ctx.Err()
	}
	s.mu.Lock()
	for _, rest := range []map[*Conn]struct{}{s.conns, s.refusing} {
		for c := range rest {
			c.abort()
		}
	}
	s.mu.Unlock()
	closing, cancel := context.WithTimeout(context.WithoutCancel(ctx), forcedCloseTimeout)
	defer cancel()
	if closeErr := s.smtp.Shutdown(closing); err == nil {
		err = closeErr
	}
	return err
}

// tellIfEmpty tells Shutdown that no session is left. s.mu is held.
func (s *Server) tellIfEmpty() {
	if len(s.conns) == 0 && s.draining.Load() {
		s.once.Do(func() { close(s.empty) })
	}
}

// listener turns accepted sockets into Conns. It never handshakes: that is
// done by each connection's own goroutine.
type listener struct {
	net.Listener
	server   *Server
	security Security
}

// Accept implements net.Listener.
func (l *listener) Accept() (net.Conn, error) {
	for {
		raw, err := l.Listener.Accept()
		if err != nil {
			return nil, err
		}
		if c := l.server.admit(raw, l.security); c != nil {
			return c, nil
		}
	}
}

// errorLog passes go-smtp's own log lines on.
type errorLog struct {
	logger *slog.Logger
	name   string
}

func (e errorLog) Printf(format string, args ...any) {
	e.logger.Warn("smtp server: "+fmt.Sprintf(format, args...), "listener", e.name)
}

func (e errorLog) Println(args ...any) {
	e.logger.Warn("smtp server: "+strings.TrimSpace(fmt.Sprintln(args...)), "listener", e.name)
}
