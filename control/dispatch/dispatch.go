// Package dispatch is control's end of the relay link: one session per relay,
// views out, acknowledgements and reports in. It decides nothing. Who may
// connect is the node's row, looked at on every connect and four times a second
// after that; what a relay is to know is built by the service. That a node is
// linked once in the whole cluster is seen to by the leader, whom every server
// tells its sessions.
package dispatch

import (
	"context"
	"crypto/x509"
	"log/slog"
	"net/netip"
	"sync"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/relais-mta/relais/control"
	"github.com/relais-mta/relais/shared/fault"
	"github.com/relais-mta/relais/shared/ids"
	"github.com/relais-mta/relais/shared/policy"
	"github.com/relais-mta/relais/shared/wire"
)

// DefaultReportInterval is how often a relay reports. Whether a silent server
// lives it asks sooner.
const DefaultReportInterval = 5 * time.Second

const (
	helloTimeout      = 10 * time.Second // for the exchange that opens a session
	writeTimeout      = 30 * time.Second // for one short message
	redirectLinger    = time.Second      // for a relay to leave when the server stops
	checkInterval     = 250 * time.Millisecond
	maxSessionLife    = 24 * time.Hour  // then the certificates are checked anew
	ackTimeout        = 2 * time.Minute // for a relay to take a view and answer
	viewRetry         = time.Second     // after a view could not be built
	maxViewPause      = 5 * time.Second // between two views for one relay
	maxBuilds         = 2               // views encoded at once, all relays
	maxLocalAddresses = 4096
	maxReportSources  = 16384
	maxProblems       = 64
	maxProblemBytes   = 512
	maxVersionBytes   = 64
	maxHandoverBytes  = 260 // of a host name with its port
)

// Nodes is what dispatch needs of the service.
type Nodes interface {
	// NodeByID returns a relay's row, fault.NotFound for an unknown one.
	NodeByID(ctx context.Context, id ids.Node) (*control.Node, error)
	// ViewFor builds what one relay is to know, of the newest revision. The
	// result is not changed by anybody. Views of one revision differ in the node
	// alone.
	ViewFor(ctx context.Context, id ids.Node) (*policy.View, error)
	// WatchRevision returns a channel that is closed at the next change of any
	// view. It is taken before ViewFor, so that no change is missed.
	WatchRevision() <-chan struct{}
	// LinkServers returns the link addresses of all servers, host:port.
	LinkServers(ctx context.Context) ([]string, error)
	// Generation is the cluster's.
	Generation() uint64

	// NodeConnected, NodeReported and NodeGone tell what is heard of a relay.
	// They do not block and do not call back.
	NodeConnected(id ids.Node, hello Hello)
	NodeReported(id ids.Node, report Report)
	NodeGone(id ids.Node)
	// NodeCloned tells that a second machine came with the node's key while the
	// first is linked or was heard a moment ago, and that it was refused.
	NodeCloned(id ids.Node, clone Clone)
	// ClonesElsewhere tells which copied machines any server refused lately. It
	// comes at each period and stands for all that was told before.
	ClonesElsewhere(clones map[ids.Node]Clone)
	// AckView and NackView tell what a relay did with a revision.
	AckView(id ids.Node, revision uint64)
	NackView(id ids.Node, revision uint64, why string)
}

// Hello is what a relay says when it connects.
type Hello struct {
	Version     string
	Incarnation uint64 // counts the starts of the relay
	Remote      netip.AddrPort
	Transport   string       // "quic", or "tcp" where UDP does not get through
	Addresses   []netip.Addr // present on its host
	Generation  uint64       // of the view it holds
	Revision    uint64       // of the view it holds; 0: none
	Handover    string       // where it takes mail of other relays; empty: it takes none
	Quota       bool         // it keeps the limits that relays share
}

// Clone is a node that two machines claim to be.
type Clone struct {
	At      time.Time
	Holder  netip.AddrPort // of the machine that has the session
	Refused netip.AddrPort // of the one that came later
}

// Report is what a relay tells at each report interval.
type Report struct {
	At                 time.Time // received
	Generation         uint64    // of the view in use
	Revision           uint64    // of the view in use; 0: none
	ClockOffset        time.Duration
	WaitingRecipients  uint64
	InFlightRecipients uint64
	HeldRecipients     uint64
	Handover           *wire.HandoverReport // nil: it hands over nothing
	QueueBytes         uint64
	FreeBytes          uint64
	Sources            []SourceReport // those assigned to it
	Left               []LeftSource   // that it was to stop using, and has
	Problems           []string
	BundleSum          []byte // of the CAs it believes; empty: a release that does not tell
	LeafIssuer         string // key id of the CA that its certificate is of
	Reflexes           []Reflex
}

// LeftSource is an address from which a relay has nothing open and never will
// under that epoch.
type LeftSource struct {
	Source ids.Source
	Epoch  uint64
}

// SourceReport says whether an assigned address is on the relay's host.
type SourceReport struct {
	Source  ids.Source
	Epoch   uint64
	Present bool
}

// Config configures a Server. Cluster, Nodes, Logger and Registerer are required.
type Config struct {
	Cluster        ids.Cluster
	Nodes          Nodes
	Address        string        // our own link address, left out when relays are sent elsewhere
	ReportInterval time.Duration // 0: DefaultReportInterval
	Version        string        // of the software
	Self           ids.Node      // this server
	Peers          Peers         // nil: there are no other servers
	// Dropped reports whether a certificate is of an issuing CA that was dropped
	// since it was shown; nil: none ever is.
	Dropped func(*x509.Certificate) bool
	// LeaseTTL is the longest life of a share of a limit that a relay may work by now;
	// nil: the default. A machine that was silent for longer holds nothing.
	LeaseTTL func() time.Duration
	// Quota takes what relays say about what they share; it must not block. nil:
	// this server does not pass it on.
	Quota      func(ids.Node, *wire.QuotaUp)
	Logger     *slog.Logger
	Registerer prometheus.Registerer
}

// Server serves the link. It is safe for concurrent use.
type Server struct {
	config Config
	builds chan struct{} // one token per view being built and encoded

	encodings encodings
	presence  *presence

	mu       sync.Mutex
	sessions map[ids.Node]*session
	contests map[ids.Node]*contest // nodes that two machines claim to be

	connected  prometheus.GaugeFunc
	viewBytes  prometheus.Counter
	viewCount  *prometheus.CounterVec
	resyncs    prometheus.Counter
	ackSeconds prometheus.Histogram
}

// New returns a server. Its Link method is the link.Handler of wire.ALPNLink.
func New(config Config) (*Server, error) {
	if config.ReportInterval == 0 {
		config.ReportInterval = DefaultReportInterval
	}
	s := &Server{
		config:   config,
		builds:   make(chan struct{}, maxBuilds),
		sessions: make(map[ids.Node]*session),
		contests: make(map[ids.Node]*contest),
		presence: newPresence(config.LeaseTTL),
		viewBytes: prometheus.NewCounter(prometheus.CounterOpts{
			Name: "relais_control_view_bytes_total", Help: "Bytes of views sent to relays.",
		}),
		viewCount: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "relais_control_views_total", Help: "Views sent to relays, by answer (ack, nack, none).",
		}, []string{"answer"}),
		resyncs: prometheus.NewCounter(prometheus.CounterOpts{
			Name: "relais_control_view_resyncs_total", Help: "Changes of a view that did not fit what a relay held, so that it got the whole view.",
		}),
		ackSeconds: prometheus.NewHistogram(prometheus.HistogramOpts{
			Name: "relais_control_view_ack_seconds", Help: "Time from noticing a change to a relay's acknowledgement.",
			Buckets: []float64{.005, .01, .025, .05, .1, .25, .5, 1, 2.5, 5, 10, 30, 120},
		}),
	}
	s.connected = prometheus.NewGaugeFunc(prometheus.GaugeOpts{
		Name: "relais_control_link_sessions", Help: "Relays linked to this server.",
	}, func() float64 { return float64(s.Sessions()) })
	for _, collector := range []prometheus.Collector{s.connected, s.viewBytes, s.viewCount, s.resyncs, s.ackSeconds} {
		if err := config.Registerer.Register(collector); err != nil {
			return nil, fault.Wrap(err, fault.Internal, "dispatch.New", "cannot register metrics")
		}
	}
	return s, nil
}

// Sessions returns how many relays are linked to this server.
func (s *Server) Sessions() int {
	s.mu.Lock()
	defer s.mu.Unlock()
	return len(s.sessions)
}

// leave ends n's claim, unless another session has taken it over.
func (s *Server) leave(n *session) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.sessions[n.node] != n {
		return
	}
	delete(s.sessions, n.node)
	if c := s.contests[n.node]; c != nil {
		c.heard = n.lastHeard()
	}
	s.config.Nodes.NodeGone(n.node)
	s.presence.move()
}
