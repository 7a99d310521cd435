// Package limits keeps a relay within the limits that it shares with others. It
// owns the relay's half of shared/lease: it tells the leader what the relay could
// use, holds what the leader lends it, and is asked before a session is opened and
// before a message is begun. What it may use is also set as gates in the scheduler,
// which paces the work; what counts is taken where the host sees it.
//
// Cut off from the leader the relay has its floors, which are on its disk, and
// nothing else.
package limits

import (
	"log/slog"
	"path/filepath"
	"sync"
	"sync/atomic"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"google.golang.org/protobuf/proto"

	"github.com/relais-mta/relais/relay/engine"
	"github.com/relais-mta/relais/relay/schedule"
	"github.com/relais-mta/relais/shared/fault"
	"github.com/relais-mta/relais/shared/ids"
	"github.com/relais-mta/relais/shared/lease"
	"github.com/relais-mta/relais/shared/mailaddr"
	"github.com/relais-mta/relais/shared/policy"
	"github.com/relais-mta/relais/shared/throttle"
	"github.com/relais-mta/relais/shared/wire"
)

// Owner is whose the gates in the scheduler are, Reason the word for their holds.
const (
	Owner  = "limits"
	Reason = "limit"
)

// self is the relay's number here: the cluster knows it by its certificate, and
// gives it a number of its own.
const self = lease.Node(1)

// Gates is what limits needs of the engine.
type Gates interface {
	SetGates(gates ...schedule.Gate)
	KeepGates(owner string, numbers map[uint64]bool)
	GateStates(owner string, dst []schedule.GateState) []schedule.GateState
}

// Config is what Limits works with. Clock and Boot may be nil.
type Config struct {
	Dir         string                    // the relay's data directory
	Incarnation uint64                    // of this process: on stable storage, and higher than any before
	Directory   func() *policy.Directory  // the view in force; nil before the first
	Send        func(proto.Message) error // to the leader
	Clock       func() lease.Instant      // must go on in suspend; nil: CLOCK_BOOTTIME
	Boot        func() string             // names the run of the machine that Clock counts in; nil: as the kernel says
	Logger      *slog.Logger
	Registerer  prometheus.Registerer
}

// Limits holds the relay's rights. Its methods are safe for concurrent use.
type Limits struct {
	cfg     Config
	log     *slog.Logger
	gates   Gates
	table   atomic.Pointer[table] // never nil
	kick    chan struct{}
	saves   chan save
	overuse prometheus.Counter
	setting sync.Mutex // of the gates; before mu

	mu         sync.Mutex
	holder     *lease.Holder
	sessions   map[*engine.Place]*session // that hold slots
	opened     uint64
	linked     bool // to a server that passes messages on
	welcomed   bool // the leader knows this process, as far as we know
	helloAt    lease.Instant
	spread     int
	sampled    lease.Instant
	saving     bool
	saveFailed bool
	saved      []lease.Floor // what is on disk
}

// limit is one shared limit.
type limit struct {
	policy.SharedLimit
	scope  string
	picky  bool          // it counts not all that the table finds it by
	rights *lease.Rights // nil: never wanted anything, so there is none
	gate   schedule.Gate // as the scheduler knows it
	set    bool          // it knows it

	// The whole limit, which this relay can in no case exceed alone: an independent
	// check of the books. While the last grant and the view speak of different
	// revisions of the limit the view's holds, and that the books allow more is no
	// error of theirs; the check begins anew when they agree.
	whole throttle.Bucket
	apart bool

	behind     []*limit // of a rate: limits of connections that count all that it counts
	blocked    bool     // one of those leaves the relay none
	begun      int      // since the last sample
	waiting    int      // as of that
	arrivals   float64
	roomy      time.Duration // mail has waited so long for something else
	roomyBegun int           // and so much was begun meanwhile
	used       uint64        // since the start
	denied     uint64
}

// table is the limits of a view, by what finds them. It is never changed.
type table struct {
	limits   []*limit // by number
	byNumber map[lease.LimitID]*limit
	tenants  map[ids.Tenant][]*limit
	domains  map[mailaddr.Domain][]*limit // of those without a tenant
	provider map[string][]*limit          // of those without tenant and domain
	wide     []*limit                     // of those without tenant, domain and provider
	kinds    [3]bool                      // by lease.Kind: there are some
}

// session is an open session, or one being opened.
type session struct {
	place   *engine.Place
	slots   []*lease.Rights
	seq     uint64
	aborted bool
}

// New returns the limits of the view in force, with the floors that the disk
// holds. What was leased before the start is gone: the leader lends it anew.
func New(cfg Config) (*Limits, error) {
	const op = "limits.New"
	if cfg.Directory == nil || cfg.Send == nil || cfg.Logger == nil || cfg.Registerer == nil || cfg.Incarnation == 0 {
		return nil, fault.New(fault.Internal, op, "incarnation, directory, sender, logger and metrics registry are needed")
	}
	if cfg.Clock == nil {
		cfg.Clock = Now
	}
	if cfg.Boot == nil {
		cfg.Boot = bootID
	}
	l := &Limits{cfg: cfg, log: cfg.Logger, kick: make(chan struct{}, 1), saves: make(chan save, 1), sessions: make(map[*engine.Place]*session)}
	l.table.Store(&table{})
	now := cfg.Clock()
	floors := l.load(now)
	times := lease.DefaultConfig()
	if d := cfg.Directory(); d != nil {
		times = d.Lease()
	}
	l.holder, l.saved = lease.NewHolder(times, self, cfg.Incarnation, 1, floors, now), floors
	l.overuse = prometheus.NewCounter(prometheus.CounterOpts{
		Name: "relais_relay_limit_overuse_total", Help: "Times that the books allowed more than a shared limit, which was then refused. Not zero: a defect.",
	})
	for _, c := range []prometheus.Collector{l.overuse, &collector{l}} {
		if err := cfg.Registerer.Register(c); err != nil {
			return nil, fault.Wrap(err, fault.Internal, op, "metrics could not be registered")
		}
	}
	return l, nil
}

func (l *Limits) path() string { return filepath.Join(l.cfg.Dir, floorsFile) }

// Attach gives the limits the engine whose gates they set. It is called once,
// before Run.
func (l *Limits) Attach(g Gates) {
	l.gates = g
	l.Changed()
}

// Changed takes over the limits of the view in force.
func (l *Limits) Changed() {
	d := l.cfg.Directory()
	if d == nil {
		return
	}
	l.mu.Lock()
	now := l.cfg.Clock()
	l.holder.Configure(now, d.Lease())
	old := l.table.Load()
	t := newTable(d, old, now)
	for _, lim := range t.limits {
		if lim.rights == nil && l.holder.Known(lim.ID) {
			lim.rights = l.holder.Rights(lim.ID, lim.Kind, lim.Per)
		}
		lim.apart = lim.apart || !lim.fits(now)
	}
	for _, lim := range old.limits {
		if t.byNumber[lim.ID] == nil { // its number is never used again
			l.holder.Forget(lim.ID)
		}
	}
	l.table.Store(t)
	keep := make(map[uint64]bool, len(t.limits))
	for _, lim := range t.limits {
		keep[uint64(lim.ID)] = true
	}
	gates := l.gates
	l.mu.Unlock()
	if gates != nil {
		gates.KeepGates(Owner, keep)
		l.refresh()
	}
	l.wake()
}

// newTable makes the table of a view. What is the same limit keeps its rights and
// its books.
func newTable(d *policy.Directory, old *table, now lease.Instant) *table {
	shared := d.SharedLimits()
	t := &table{
		limits: make([]*limit, 0, len(shared)), byNumber: make(map[lease.LimitID]*limit, len(shared)),
		tenants: make(map[ids.Tenant][]*limit), domains: make(map[mailaddr.Domain][]*limit), provider: make(map[string][]*limit),
	}
	for i := range shared {
		lim := &limit{SharedLimit: shared[i], scope: scope(d, &shared[i])}
		if had := old.byNumber[lim.ID]; had != nil {
			*lim = limit{SharedLimit: shared[i], scope: lim.scope, rights: had.rights, gate: had.gate, set: had.set, whole: had.whole,
				apart: had.apart || had.Max != shared[i].Max || had.Burst != shared[i].Burst,
				begun: had.begun, waiting: had.waiting, arrivals: had.arrivals, roomy: had.roomy, roomyBegun: had.roomyBegun, used: had.used, denied: had.denied}
		}
		if lim.Kind == lease.Rate {
			lim.whole.Set(lim.rate(), wall(now))
		}
		t.limits = append(t.limits, lim)
		t.byNumber[lim.ID] = lim
		t.kinds[lim.Kind] = true
		lim.picky = !lim.Pool.IsZero() || lim.Provider != "" && lim.Domain != "" || !lim.Tenant.IsZero() && (lim.Provider != "" || lim.Domain != "")
		switch {
		case !lim.Tenant.IsZero():
			t.tenants[lim.Tenant] = append(t.tenants[lim.Tenant], lim)
		case lim.Domain != "":
			t.domains[lim.Domain] = append(t.domains[lim.Domain], lim)
		case lim.Provider != "":
			t.provider[lim.Provider] = append(t.provider[lim.Provider], lim)
		default:
			t.wide = append(t.wide, lim)
		}
	}
	for _, lim := range t.limits {
		if lim.Kind == lease.Rate {
			lim.behind = t.behind(lim)
		}
	}
	return t
}

// match appends the limits of a kind that count what happens at a place, the
// smallest scope first.
func (t *table) match(k lease.Kind, p *engine.Place, dst []*limit) []*limit {
	key := &p.Key
	for _, list := range [...][]*limit{t.domains[key.Domain], t.tenants[key.Tenant], t.provider[p.Lane.Provider], t.wide} {
		for _, lim := range list {
			if lim.Kind == k && (!lim.picky || lim.Matches(p.Lane.Provider, key.Tenant, key.Domain, key.Pool)) {
				dst = append(dst, lim)
			}
		}
	}
	return dst
}

// wake has the loop look around.
func (l *Limits) wake() {
	select {
	case l.kick <- struct{}{}:
	default:
	}
}

// Linked tells whether there is a link to a server that passes messages on.
func (l *Limits) Linked(linked bool) {
	l.mu.Lock()
	l.linked, l.welcomed, l.helloAt = linked, false, 0
	l.mu.Unlock()
	l.wake()
}

// Welcome takes the leader's answer to a greeting.
func (l *Limits) Welcome(m *wire.LeaseWelcome) {
	l.mu.Lock()
	if w := wire.DecodeLeaseWelcome(self, m); w.Incarnation == l.cfg.Incarnation && !l.welcomed {
		l.welcomed = true
		l.holder.Soon()
	}
	l.mu.Unlock()
	l.wake()
}

// HelloWanted is told when a leader does not know this process.
func (l *Limits) HelloWanted() {
	l.mu.Lock()
	if l.welcomed {
		l.welcomed, l.helloAt = false, 0
	}
	l.mu.Unlock()
	l.wake()
}

// Grant takes what the leader grants.
func (l *Limits) Grant(m *wire.LeaseGrant) {
	g, err := wire.DecodeLeaseGrant(self, m)
	if err != nil {
		l.log.Warn("a grant cannot be read", "error", err)
		return
	}
	l.mu.Lock()
	now := l.cfg.Clock()
	l.holder.Grant(now, g)
	for i := range g.Lines {
		lim := l.table.Load().byNumber[g.Lines[i].Limit]
		if lim == nil {
			continue
		}
		if lim.rights == nil {
			lim.rights = l.holder.Rights(lim.ID, lim.Kind, lim.Per)
		}
		lim.apart = lim.apart || !lim.fits(now)
	}
	l.mu.Unlock()
	l.wake()
}
