package delivery

import (
	"context"
	"crypto/tls"
	"log/slog"
	"net"
	"net/netip"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/relais-mta/relais/relay"
	"github.com/relais-mta/relais/relay/resolve"
	"github.com/relais-mta/relais/relay/tlspolicy"
	"github.com/relais-mta/relais/relay/trace"
	"github.com/relais-mta/relais/shared/fault"
	"github.com/relais-mta/relais/shared/ids"
	"github.com/relais-mta/relais/shared/policy"
)

// DefaultPort is where mail hosts listen.
const DefaultPort = 25

// Egress opens a TCP connection from exactly the named source;
// egress.Manager implements it.
type Egress interface {
	Dial(ctx context.Context, source ids.Source, remote netip.AddrPort, timeout time.Duration) (net.Conn, error)
}

// Config says what a Dialer works with.
type Config struct {
	Egress Egress
	Broken *tlspolicy.Memory // hosts with broken STARTTLS, shared by all
	Port   uint16            // of the mail hosts; 0: 25. Others are for laboratories
	// Policy returns the delivery section in force; timeouts are read at every
	// use, so that a change reaches open sessions.
	Policy     func() *policy.Delivery
	TLS        *tls.Config // nil: tlspolicy.Config()
	Trace      *trace.Hub  // who watches dialogues; nil: nobody can
	Log        *slog.Logger
	Registerer prometheus.Registerer
}

// Dialer opens sessions. It is safe for concurrent use.
type Dialer struct {
	egress  Egress
	broken  *tlspolicy.Memory
	port    uint16
	policy  func() *policy.Delivery
	tls     *tls.Config
	trace   *trace.Hub
	log     *slog.Logger
	backoff *backoff
	opened  *prometheus.CounterVec
	refused *prometheus.CounterVec
}

// New returns a dialer.
func New(cfg Config) (*Dialer, error) {
	const op = "delivery.New"
	if cfg.Egress == nil || cfg.Broken == nil || cfg.Policy == nil || cfg.Log == nil || cfg.Registerer == nil {
		return nil, fault.New(fault.Internal, op, "egress, TLS memory, policy, logger and metrics registry are needed")
	}
	d := &Dialer{egress: cfg.Egress, broken: cfg.Broken, port: cfg.Port, policy: cfg.Policy, tls: cfg.TLS, trace: cfg.Trace, log: cfg.Log,
		backoff: newBackoff(),
		opened: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "relais_relay_smtp_sessions_total", Help: "Outgoing SMTP sessions opened, by TLS version (\"none\" for clear text).",
		}, []string{"tls"}),
		refused: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "relais_relay_smtp_session_failures_total", Help: "Mail hosts with which no session could be opened, by phase.",
		}, []string{"phase"}),
	}
	if d.port == 0 {
		d.port = DefaultPort
	}
	if d.tls == nil {
		d.tls = tlspolicy.Config()
	}
	for _, c := range []prometheus.Collector{d.opened, d.refused} {
		if err := cfg.Registerer.Register(c); err != nil {
			return nil, fault.Wrap(err, fault.Internal, op, "metrics could not be registered")
		}
	}
	return d, nil
}

// Target says where a session shall lead and from where.
type Target struct {
	Hosts  []resolve.Host // in the order to try: resolve.Route.Order
	Source policy.Source  // bound locally; its EHLO name is said
	TLS    policy.TLSMode
	// Provider and Subject are for those who watch the dialogue.
	Provider string
	Subject  trace.Subject
}

// Failure says why no session could be opened to any host. Its status is
// Deferred even for a 5xx: at connect, EHLO and STARTTLS a refusal is about us
// or about that host, never about a recipient.
type Failure struct {
	Status   relay.Status // Deferred, or NotTried when every host is still backing off or the source could not be used
	Phase    relay.Phase
	Reply    relay.Reply
	MX       string
	RemoteIP netip.Addr
	RetryAt  time.Time // with NotTried because of back-off: when the first host may be tried again
	Cause    error     // for logs; nil when a reply says it all
}

// Outcome returns the failure as the outcome of one recipient.
func (f *Failure) Outcome(index uint16) relay.Outcome {
	return relay.Outcome{Index: index, Status: f.Status, Phase: f.Phase, Reply: f.Reply}
}

// Dial opens a session to the first host that will have us: hosts are tried in
// order, each with its addresses of the source's family, until one greets and
// answers EHLO and STARTTLS well, or MaxHostsPerAttempt addresses failed.
func (d *Dialer) Dial(ctx context.Context, t *Target) (*Session, *Failure) {
	p := d.policy()
	tries := 0
	var told, last *Failure
	var wait time.Time
	for i := range t.Hosts {
		h := &t.Hosts[i]
		for _, addr := range h.Addrs {
			if addr.Is4() != t.Source.Bind.Is4() {
				continue
			}
			if until, off := d.backoff.until(t.Source.Bind, addr, time.Now()); off {
				if wait.IsZero() || until.Before(wait) {
					wait = until
				}
				continue
			}
			if tries >= max(1, p.MaxHostsPerAttempt) {
				break
			}
			tries++
			s, failure := d.open(ctx, t, h.Name, addr, p)
			if failure == nil {
				return s, nil
			}
			d.refused.WithLabelValues(failure.Phase.String()).Inc()
			if failure.Reply.Code != 0 && told == nil {
				told = failure // the best host's own words say more than a timeout elsewhere
			}
			last = failure
			if failure.Status == relay.NotTried || ctx.Err() != nil {
				return nil, failure
			}
		}
	}
	switch {
	case told != nil:
		return nil, told
	case last != nil:
		return nil, last
	case !wait.IsZero():
		return nil, &Failure{Status: relay.NotTried, Phase: relay.PhaseConnect, RetryAt: wait,
			Reply: relay.Reply{Enhanced: "4.4.1", Text: "every mail host refused connections lately and is left alone for a while"}}
	}
	return nil, &Failure{Status: relay.Deferred, Phase: relay.PhaseConnect,
		Reply: relay.Reply{Enhanced: "4.4.4", Text: "no mail host has an address of the family of the source " + t.Source.Bind.String()}}
}

// open makes a session with one address of one host. A host whose STARTTLS
// breaks is called a second time, in clear text, if the mode allows it.
func (d *Dialer) open(ctx context.Context, t *Target, host string, addr netip.Addr, p *policy.Delivery) (*Session, *Failure) {
	decision := d.broken.Decide(t.TLS, host, time.Now())
	s, failure := d.connect(ctx, t, host, addr, decision, p)
	if failure != nil && failure.Phase == relay.PhaseSTARTTLS && failure.Reply.Code == 0 && decision == tlspolicy.Try && ctx.Err() == nil {
		d.broken.Remember(host, time.Now(), p.BrokenTLSMemory.D())
		d.log.Info("STARTTLS is broken, the host is used in clear text", "mx", host, "remote", addr.String(), "error", failure.Cause)
		s, failure = d.connect(ctx, t, host, addr, tlspolicy.Clear, p)
	}
	if failure != nil {
		failure.MX, failure.RemoteIP = host, addr
		return nil, failure
	}
	return s, nil
}

func (d *Dialer) connect(ctx context.Context, t *Target, host string, addr netip.Addr, decision tlspolicy.Decision, p *policy.Delivery) (*Session, *Failure) {
	watched := d.trace.Session(trace.Party{Kind: trace.Out, Provider: t.Provider, MX: host, Remote: addr, Local: t.Source.Bind})
	watched.About(t.Subject)
	if watched.On() {
		watched.Note("connects to %s [%s] port %d from %s", host, addr, d.port, t.Source.Bind)
	}
	conn, err := d.egress.Dial(ctx, t.Source.ID, netip.AddrPortFrom(addr, d.port), p.ConnectTimeout.D())
	if err != nil {
		failure := d.connectFailure(t, addr, err, p)
		if watched.On() {
			watched.Note("no connection: %s", failure.Reply.Text)
		}
		return nil, failure
	}
	s := newSession(conn, d.policy, Peer{MX: host, RemoteIP: addr, Source: t.Source.ID, SourceIP: t.Source.Bind, Epoch: t.Source.Epoch})
	s.trace = watched
	// The dialogue below blocks on the connection only, so an ending context
	// ends it there.
	stop := context.AfterFunc(ctx, s.Abort)
	failure := s.begin(t.Source.EHLO, decision, d.tls)
	if !stop() && failure == nil {
		failure = s.lost(relay.PhaseConnect, ctx.Err())
	}
	if failure != nil {
		if failure.Phase != relay.PhaseSTARTTLS && failure.Cause != nil && ctx.Err() == nil {
			// It took the connection and then said nothing, or nothing that is
			// SMTP. To find that out again may take minutes.
			d.leaveAlone(t, addr, p)
		}
		if failure.Phase == relay.PhaseSTARTTLS || failure.Reply.Code == 0 {
			s.Abort()
		}
		s.Quit()
		return nil, failure
	}
	if s.startTLSRefused {
		d.broken.Remember(host, time.Now(), p.BrokenTLSMemory.D())
	}
	d.opened.WithLabelValues(max(s.peer.TLS, "none")).Inc()
	return s, nil
}
