package inbound

import (
	"context"
	"crypto/tls"
	"log/slog"
	"net"
	"time"

	"github.com/emersion/go-smtp"
	"github.com/prometheus/client_golang/prometheus"

	"github.com/relais-mta/relais/relay/smtpconn"
	"github.com/relais-mta/relais/relay/trace"
	"github.com/relais-mta/relais/shared/fault"
	"github.com/relais-mta/relais/shared/policy"
)

// What one session may do beyond the limits that policy sets. The senders are
// other people's servers, so these are generous to all but abuse.
const (
	maxCommandsPerSession = 1000
	maxErrorsPerSession   = 20
	maxMessagesPerSession = 100
	maxLineBytes          = 16 << 10 // bounces quote what broke the rules elsewhere
	minBytesPerSecond     = 100
)

// Options wires a Server.
type Options struct {
	Hostname   string                   // said in the greeting and in trace fields
	TLS        *tls.Config              // nil: STARTTLS is not offered
	Policy     func() *policy.Directory // the policy of the moment; may return nil before the first view
	Closed     func() string            // why no mail is taken now, for the client; empty: it is; nil: it always is
	Spool      Spool
	MemoryOver func(percent int, now time.Time) bool // whether more than this part of the memory is held; nil: never
	Trace      *trace.Hub                            // who watches dialogues; nil: nobody can
	Logger     *slog.Logger
	Registerer prometheus.Registerer // nil: metrics are not exported
}

// Server takes mail to signed return paths.
type Server struct {
	opt      Options
	smtp     *smtpconn.Server
	messages prometheus.Counter
	bytes    prometheus.Counter
}

// New returns a server without listeners. The error is fault.Invalid with the
// option's name.
func New(opt Options) (*Server, error) {
	const op, prefix = "inbound.New", "relais_relay_inbound_"
	for field, missing := range map[string]bool{
		"Hostname": opt.Hostname == "", "Policy": opt.Policy == nil, "Spool": opt.Spool == nil, "Logger": opt.Logger == nil,
	} {
		if missing {
			return nil, fault.Field(op, field, "is needed")
		}
	}
	s := &Server{
		opt:      opt,
		messages: prometheus.NewCounter(prometheus.CounterOpts{Name: prefix + "accepted_messages_total", Help: "Mails to signed return paths answered with 250, counted once a return path."}),
		bytes:    prometheus.NewCounter(prometheus.CounterOpts{Name: prefix + "accepted_bytes_total", Help: "Octets of the mails to signed return paths answered with 250, as stored."}),
	}
	if opt.Registerer != nil {
		for _, c := range []prometheus.Collector{s.messages, s.bytes} {
			if err := opt.Registerer.Register(c); err != nil {
				return nil, fault.Wrap(err, fault.Internal, op, "the metrics cannot be registered")
			}
		}
	}
	var err error
	s.smtp, err = smtpconn.NewServer(smtpconn.Config{
		Name:       "inbound",
		Hostname:   opt.Hostname,
		TLS:        opt.TLS,
		Limits:     s.limits,
		MemoryOver: opt.MemoryOver,
		Trace:      opt.Trace,
		Kind:       trace.Inbound,
		NewSession: func(c *smtpconn.Conn) smtp.Session { return &session{server: s, conn: c} },
		Logger:     opt.Logger,
		Registerer: opt.Registerer,
	})
	if err != nil {
		return nil, err
	}
	return s, nil
}

// Serve accepts connections (port 25) until Shutdown.
func (s *Server) Serve(l net.Listener) error { return s.smtp.Serve(l, smtpconn.OfferSTARTTLS) }

// Shutdown lets mail transactions finish until ctx ends; see
// smtpconn.Server.Shutdown.
func (s *Server) Shutdown(ctx context.Context) error { return s.smtp.Shutdown(ctx) }

// limits are those of a session that begins now.
func (s *Server) limits() smtpconn.Limits {
	p := defaults
	if dir := s.opt.Policy(); dir != nil {
		p = dir.Document().Inbound
	}
	limits := smtpconn.Limits{
		MaxConnections:        p.MaxConnections,
		MaxConnectionsPerIP:   p.MaxConnectionsPerIP,
		MaxCommandsPerSession: maxCommandsPerSession,
		MaxErrorsPerSession:   maxErrorsPerSession,
		MaxMessagesPerSession: maxMessagesPerSession,
		MaxRecipients:         p.MaxRecipients,
		MaxMessageBytes:       p.MaxMessageBytes,
		MaxLineBytes:          maxLineBytes,
		CommandTimeout:        p.CommandTimeout.D(),
		MinBytesPerSecond:     minBytesPerSecond,

		ConnectionsPerMinute:      p.MaxConnectionsPerMinute,
		ConnectionsPerMinutePerIP: p.MaxConnectionsPerMinutePerIP,
	}
	limits.SetRates(&p.ClientRates)
	return limits
}
