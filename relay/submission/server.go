package submission

import (
	"context"
	"crypto/tls"
	"log/slog"
	"net"
	"net/netip"
	"time"

	"github.com/emersion/go-smtp"
	"github.com/prometheus/client_golang/prometheus"

	"github.com/relais-mta/relais/relay/outbox"
	"github.com/relais-mta/relais/relay/smtpconn"
	"github.com/relais-mta/relais/relay/trace"
	"github.com/relais-mta/relais/shared/fault"
	"github.com/relais-mta/relais/shared/policy"
)

// Options wires a Server.
type Options struct {
	Hostname   string                   // said in the greeting and in trace fields
	TLS        *tls.Config              // required; use GetCertificate to reload
	Policy     func() *policy.Directory // the policy of the moment; may return nil before the first view
	Closed     func() string            // why no mail is taken now, for the client; empty: it is; nil: it always is
	Connected  func() bool              // whether control is reachable, so that an unknown credential is known to be wrong
	Spool      Spool
	Proxies    []netip.Prefix                              // balancers that tell the client's address by the PROXY protocol, and must
	BinaryMIME bool                                        // announce BINARYMIME; only when delivery keeps such messages from hosts that lack it
	MemoryOver func(percent int, now time.Time) bool       // whether more than this part of the memory is held; nil: never
	Events     func(context.Context, []outbox.Event) error // keeps events of locks, for Run; nil: there are none
	Trace      *trace.Hub                                  // who watches dialogues; nil: nobody can
	Logger     *slog.Logger
	Registerer prometheus.Registerer // nil: metrics are not exported
}

// Server takes submissions. Serve it any number of listeners.
type Server struct {
	opt     Options
	smtp    *smtpconn.Server
	metrics *metrics
	logins  lockout
	tell    *lockTeller
	rates   rates
}

// New returns a server without listeners. The error is fault.Invalid with the
// option's name.
func New(opt Options) (*Server, error) {
	const op = "submission.New"
	for field, missing := range map[string]bool{
		"Hostname": opt.Hostname == "", "TLS": opt.TLS == nil, "Policy": opt.Policy == nil,
		"Connected": opt.Connected == nil, "Spool": opt.Spool == nil, "Logger": opt.Logger == nil,
	} {
		if missing {
			return nil, fault.Field(op, field, "is needed")
		}
	}
	m, err := newMetrics(opt.Registerer)
	if err != nil {
		return nil, err
	}
	s := &Server{opt: opt, metrics: m}
	s.tell = newLockTeller(s.logins.refused, m.untold.Inc)
	s.smtp, err = smtpconn.NewServer(smtpconn.Config{
		Name:       "submission",
		Hostname:   opt.Hostname,
		TLS:        clientTLS(opt.TLS, opt.Policy),
		Mechanisms: []string{"PLAIN", "LOGIN"},
		DSN:        true,
		SMTPUTF8:   true,
		Chunking:   true,
		BinaryMIME: opt.BinaryMIME,
		MaxHold:    maxAhead,
		Proxies:    opt.Proxies,
		Limits:     s.limits,
		MemoryOver: opt.MemoryOver,
		Trace:      opt.Trace,
		Kind:       trace.Submission,
		NewSession: func(c *smtpconn.Conn) smtp.Session { return &session{server: s, conn: c} },
		Logger:     opt.Logger,
		Registerer: opt.Registerer,
	})
	if err != nil {
		return nil, err
	}
	return s, nil
}

// Run writes the events of locks until ctx ends, which ends the locks too.
func (s *Server) Run(ctx context.Context) error {
	if s.opt.Events == nil {
		<-ctx.Done()
		return nil
	}
	s.tell.run(ctx, s.opt.Events, s.opt.Logger)
	return nil
}

// ServeTLS accepts connections with implicit TLS (port 465) until Shutdown.
func (s *Server) ServeTLS(l net.Listener) error { return s.smtp.Serve(l, smtpconn.ImplicitTLS) }

// ServeSTARTTLS accepts connections that must issue STARTTLS (port 587) until
// Shutdown.
func (s *Server) ServeSTARTTLS(l net.Listener) error {
	return s.smtp.Serve(l, smtpconn.RequireSTARTTLS)
}

// ServeClear accepts connections that may log in and send without TLS, until
// Shutdown. It is for test networks.
func (s *Server) ServeClear(l net.Listener) error { return s.smtp.Serve(l, smtpconn.ClearText) }

// Shutdown lets mail transactions finish until ctx ends; see
// smtpconn.Server.Shutdown.
func (s *Server) Shutdown(ctx context.Context) error { return s.smtp.Shutdown(ctx) }

// limits are those of a session that begins now.
func (s *Server) limits() smtpconn.Limits {
	p := defaults
	if dir := s.opt.Policy(); dir != nil {
		p = dir.Document().Submission
	}
	limits := smtpconn.Limits{
		MaxConnections:            p.MaxConnections,
		MaxConnectionsPerIP:       p.MaxConnectionsPerIP,
		ConnectionsPerMinute:      p.MaxConnectionsPerMinute,
		ConnectionsPerMinutePerIP: p.MaxConnectionsPerMinutePerIP,
		MaxCommandsPerSession:     p.MaxCommandsPerSession,
		MaxErrorsPerSession:       p.MaxErrorsPerSession,
		MaxMessagesPerSession:     p.MaxMessagesPerSession,
		MaxRecipients:             p.MaxRecipients,
		MaxMessageBytes:           p.MaxMessageBytes,
		MaxLineBytes:              p.MaxLineBytes,
		CommandTimeout:            p.CommandTimeout.D(),
		MinBytesPerSecond:         p.MinBytesPerSecond,
	}
	limits.SetRates(&p.ClientRates)
	return limits
}

// defaults hold until the first policy view, while nobody can log in anyway.
var defaults = policy.Submission{
	MaxConnections:        100,
	MaxConnectionsPerIP:   10,
	MaxCommandsPerSession: 100,
	MaxErrorsPerSession:   10,
	MaxMessagesPerSession: 1,
	MaxRecipients:         1,
	MaxMessageBytes:       1 << 20,
	MaxLineBytes:          998,
	CommandTimeout:        policy.Duration(time.Minute),
	MinBytesPerSecond:     1000,
	AuthFailuresPerIP:     10,
	AuthFailureWindow:     policy.Duration(10 * time.Minute),

	AuthFailuresPerNetwork: 50,
	AuthFailuresPerAccount: 5,
	AuthLockMax:            policy.Duration(time.Hour),
}

// metrics counts what sessions do.
type metrics struct {
	auth       *prometheus.CounterVec
	locks      *prometheus.CounterVec
	untold     prometheus.Counter
	messages   prometheus.Counter
	recipients prometheus.Counter
	bytes      prometheus.Counter
	accept     prometheus.Histogram
}

func newMetrics(r prometheus.Registerer) (*metrics, error) {
	const prefix = "relais_relay_submission_"
	m := &metrics{
		auth:       prometheus.NewCounterVec(prometheus.CounterOpts{Name: prefix + "auth_total", Help: "Authentication attempts by result."}, []string{"result"}),
		locks:      prometheus.NewCounterVec(prometheus.CounterOpts{Name: prefix + "auth_locks_total", Help: "Locks after too many failed logins, by what they hold: an address, a network, an account from an address."}, []string{"scope"}),
		untold:     prometheus.NewCounter(prometheus.CounterOpts{Name: prefix + "auth_lock_events_dropped_total", Help: "Locks without events, because too many began at once."}),
		messages:   prometheus.NewCounter(prometheus.CounterOpts{Name: prefix + "accepted_messages_total", Help: "Messages answered with 250."}),
		recipients: prometheus.NewCounter(prometheus.CounterOpts{Name: prefix + "accepted_recipients_total", Help: "Recipients of the messages answered with 250."}),
		bytes:      prometheus.NewCounter(prometheus.CounterOpts{Name: prefix + "accepted_bytes_total", Help: "Octets of the messages answered with 250, as stored."}),
		accept: prometheus.NewHistogram(prometheus.HistogramOpts{Name: prefix + "accept_seconds", Help: "Time from the end of a message until it was on stable storage.",
			Buckets: []float64{.0005, .001, .002, .005, .01, .02, .05, .1, .2, .5, 1, 2, 5}}),
	}
	if r == nil {
		return m, nil
	}
	for _, c := range []prometheus.Collector{m.auth, m.locks, m.untold, m.messages, m.recipients, m.bytes, m.accept} {
		if err := r.Register(c); err != nil {
			return nil, fault.Wrap(err, fault.Internal, "submission.New", "the metrics cannot be registered")
		}
	}
	return m, nil
}
