package quota

import (
	"context"
	"log/slog"
	"sync"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"google.golang.org/protobuf/proto"

	"github.com/relais-mta/relais/control"
	"github.com/relais-mta/relais/control/command"
	"github.com/relais-mta/relais/control/state"
	"github.com/relais-mta/relais/shared/fault"
	"github.com/relais-mta/relais/shared/ids"
	"github.com/relais-mta/relais/shared/lease"
	"github.com/relais-mta/relais/shared/wire"
)

const (
	tickPeriod     = 250 * time.Millisecond
	proposeTimeout = 10 * time.Second
	// maxEntries is how many entries a second the lending puts into the log in the
	// long run, however much moves: a tick of many is followed by a longer pause.
	maxEntries = 15
	// LeaseVersion is the version of the commands since which limits are shared.
	LeaseVersion = 4
)

// Log is what the lending needs of the replicated log.
type Log interface {
	// Propose commits a command and returns what applying it gave.
	Propose(ctx context.Context, cmd command.Command) (state.Result, error)
}

// LeaseOptions configure Lease. All but Clock are required.
type LeaseOptions struct {
	State *state.Store
	Log   Log
	Send  func(ids.Node, proto.Message)
	// Succeeds reports whether the process of an incarnation that speaks through a
	// server is the one that has its relay's session. Asked of those that are new.
	Succeeds   func(node, through ids.Node, incarnation uint64) bool
	Logger     *slog.Logger
	Registerer prometheus.Registerer
	Clock      func() lease.Instant // nil: Now
}

// Lease is the leader's part that lends shared limits out. It makes the limits
// what the policy says, and runs a lease.Grantor over what is replicated.
type Lease struct {
	o       LeaseOptions
	metrics *leaseMetrics
	asks    chan ask

	mu    sync.Mutex
	alarm string // what the state refused and never should have had to
}

type leaseMetrics struct {
	commit   prometheus.Histogram
	refused  *prometheus.CounterVec
	lending  prometheus.Gauge
	tickWork prometheus.Histogram
}

// NewLease returns the part. It is given to Quota.Add.
func NewLease(o LeaseOptions) (*Lease, error) {
	if o.Clock == nil {
		o.Clock = Now
	}
	l := &Lease{o: o, asks: make(chan ask), metrics: &leaseMetrics{
		commit: prometheus.NewHistogram(prometheus.HistogramOpts{Name: "relais_control_lease_commit_seconds", Help: "Time from proposing what relays may hold to having it applied.",
			Buckets: []float64{.001, .0025, .005, .01, .025, .05, .1, .25, .5, 1, 3, 10}}),
		refused:  prometheus.NewCounterVec(prometheus.CounterOpts{Name: "relais_control_lease_refused_total", Help: "Changes of what relays may hold that the state refused, by reason: limit (it would have been passed, which points to an error in this program), other (it crossed another change)."}, []string{"reason"}),
		lending:  prometheus.NewGauge(prometheus.GaugeOpts{Name: "relais_control_lease_lending", Help: "1 while this server lends shared limits out."}),
		tickWork: prometheus.NewHistogram(prometheus.HistogramOpts{Name: "relais_control_lease_tick_seconds", Help: "Time to decide who is to hold how much.", Buckets: []float64{.0001, .00025, .0005, .001, .0025, .005, .01, .025, .1}}),
	}}
	for _, c := range []prometheus.Collector{l.metrics.commit, l.metrics.refused, l.metrics.lending, l.metrics.tickWork} {
		if err := o.Registerer.Register(c); err != nil {
			return nil, fault.Wrap(err, fault.Internal, "quota.NewLease", "cannot register metrics")
		}
	}
	return l, nil
}

// Alarm returns what points to an error in this program, or "".
func (l *Lease) Alarm() string {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.alarm
}

// Takes implements Part.
func (l *Lease) Takes(m proto.Message) bool {
	switch m.(type) {
	case *wire.LeaseHello, *wire.LeaseReport, *wire.LeaseRelease:
		return true
	}
	return false
}

// Lead implements Part.
func (l *Lease) Lead(ctx context.Context, in <-chan Message) error {
	t := &term{l: l, in: in, hellos: make(map[ids.Node]Message), early: make(map[ids.Node]Message)}
	for _, step := range []func(context.Context) error{t.awaitVersion, t.recover, t.reconcile, t.awaitLimits, t.settle, t.begin} {
		if err := step(ctx); err != nil {
			return err
		}
	}
	l.metrics.lending.Set(1)
	defer l.metrics.lending.Set(0)
	return t.lend(ctx)
}

// term is one leader's lending: it is thrown away with the leadership, with an
// outcome that is not known, and with anything else that it cannot go on from.
type term struct {
	l  *Lease
	in <-chan Message

	hellos map[ids.Node]Message // of relays that have no number yet, or came before the lending began
	early  map[ids.Node]Message // greetings of processes that are not known to have their relay's session
	policy uint64               // revision of the policy that the limits were made from
	looked bool                 // at the policy

	epoch   uint64
	config  lease.Config
	changed uint64 // of the replicated row: what the grantor was told of
	limits  map[lease.LimitID]lease.Limit
	grantor *lease.Grantor
	numbers map[ids.Node]lease.Node
	nodes   map[lease.Node]ids.Node
	gone    map[lease.Node]bool
	rest    time.Time // before this there is no tick, for the last had many entries
}

// propose commits a command.
func (t *term) propose(ctx context.Context, c command.Command) (state.Result, error) {
	ctx, cancel := context.WithTimeout(ctx, proposeTimeout)
	defer cancel()
	return t.l.o.Log.Propose(ctx, c)
}

// idle waits for one tick, and takes greetings meanwhile. What else relays say
// cannot be answered yet; they say it again.
func (t *term) idle(ctx context.Context) error {
	timer := time.NewTimer(tickPeriod)
	defer timer.Stop()
	for {
		select {
		case m := <-t.in:
			switch m.Body.(type) {
			case *wire.LeaseHello:
				if len(t.hellos) < lease.MaxNodes {
					t.hellos[m.Node] = m
				}
			case *wire.LeaseReport:
				if t.l.o.State.Read().Recovery() != nil {
					t.l.o.Send(m.Node, &wire.LeaseHelloWanted{}) // it says what its disk holds
				}
			}
		case a := <-t.l.asks:
			a.answer <- nil
		case <-timer.C:
			return nil
		case <-ctx.Done():
			return ctx.Err()
		}
	}
}

// awaitVersion waits until every server knows the commands.
func (t *term) awaitVersion(ctx context.Context) error {
	for {
		if c := t.l.o.State.Read().Cluster(); c != nil && c.FSMVersion >= LeaseVersion {
			return nil
		}
		if err := t.idle(ctx); err != nil {
			return err
		}
	}
}

// recover takes in, while the cluster is in recovery mode, what relays' disks hold
// of floors. Until that is over nothing is lent.
func (t *term) recover(ctx context.Context) error {
	for {
		r := t.l.o.State.Read()
		recovery := r.Recovery()
		if recovery == nil {
			return nil
		}
		for node, m := range t.hellos {
			delete(t.hellos, node)
			if n := r.LeaseNode(node); n != nil && n.Declared == recovery.Generation {
				continue
			}
			if err := t.declare(ctx, node, m.Body.(*wire.LeaseHello)); err != nil {
				return err
			}
		}
		if err := t.idle(ctx); err != nil {
			return err
		}
	}
}

func (t *term) declare(ctx context.Context, node ids.Node, hello *wire.LeaseHello) error {
	_, floors, err := wire.DecodeLeaseHello(0, hello)
	if err != nil {
		t.l.o.Logger.Warn("what a relay says that it holds cannot be read", "node", node.String(), "error", err)
		return nil
	}
	c := &command.LeaseDeclare{Node: node[:]}
	for _, f := range floors {
		c.Limits, c.Floors, c.FloorBursts = append(c.Limits, uint64(f.Limit)), append(c.Floors, f.Share.Amount), append(c.FloorBursts, f.Share.Burst)
	}
	if err := c.Validate(); err != nil {
		t.l.o.Logger.Warn("what a relay says that it holds cannot be", "node", node.String(), "error", err)
		return nil
	}
	_, err = t.propose(ctx, c)
	if fault.Is(err, fault.NotFound) || fault.Is(err, fault.Conflict) {
		return nil // it was put out, or recovery mode ended just now
	}
	return err
}

// awaitLimits waits until there is something to lend: a cluster without shared
// limits has no entries about them in its log.
func (t *term) awaitLimits(ctx context.Context) error {
	for {
		r := t.l.o.State.Read()
		if r.Recovery() != nil {
			return errRecovery
		}
		if len(r.SharedLimits()) > 0 {
			return nil
		}
		if err := t.idle(ctx); err != nil {
			return err
		}
		if err := t.reconcile(ctx); err != nil {
			return err
		}
	}
}

var errRecovery = fault.New(fault.Unavailable, "quota.Lease", "the cluster is in recovery mode")

// settle waits, after a recovery, until what relays held before it has run out.
func (t *term) settle(ctx context.Context) error {
	row := t.l.o.State.Read().Lease()
	if !row.Settling {
		return nil
	}
	longest := 2*max(row.Config.TTL, row.Reclaim.TTL) + max(row.Config.Linger, row.Reclaim.Linger)
	until := t.l.o.Clock().Add(longest + longest/100 + time.Second)
	t.l.o.Logger.Info("shared limits are lent out when the leases of before the recovery have run out", "wait", longest.String())
	for t.l.o.Clock() < until {
		if err := t.idle(ctx); err != nil {
			return err
		}
	}
	return nil
}

// begin takes the lending over. The entry that says so is this leader's barrier:
// what a former leader proposed comes before it, or is refused.
func (t *term) begin(ctx context.Context) error {
	out, err := t.propose(ctx, &command.LeaseBegin{Settled: t.l.o.State.Read().Lease().Settling})
	if err != nil {
		return err
	}
	row, ok := out.Row.(*control.Lease)
	if !ok {
		return fault.New(fault.Internal, "quota.begin", "beginning gave a %T", out.Row)
	}
	barrier := t.l.o.Clock() // R4: not before the entry was applied
	r := t.l.o.State.Read()
	t.epoch, t.config, t.changed = row.Epoch, row.Reclaim, r.Lease().Changed
	t.limits, t.gone = make(map[lease.LimitID]lease.Limit), make(map[lease.Node]bool)
	table := r.LeaseTable()
	for _, l := range table.Limits() {
		t.limits[l.ID] = l
	}
	t.number(r)
	t.grantor = lease.NewGrantor(t.config, table, r.Cluster().Generation, t.epoch, barrier)
	t.l.o.Logger.Info("this server lends shared limits out", "epoch", t.epoch, "limits", len(t.limits), "holders", row.Holders)
	return nil
}

// number learns the numbers of relays, and which of them were put out.
func (t *term) number(r *state.Reader) {
	rows := r.LeaseNodes()
	t.numbers, t.nodes = make(map[ids.Node]lease.Node, len(rows)), make(map[lease.Node]ids.Node, len(rows))
	for _, n := range rows {
		t.numbers[n.ID], t.nodes[n.Number] = n.Number, n.ID
		if n.Gone {
			t.gone[n.Number] = true
		}
	}
}

// lend takes messages as they come, and decides at each tick.
func (t *term) lend(ctx context.Context) error {
	tick := time.NewTicker(tickPeriod)
	defer tick.Stop()
	for node, m := range t.hellos {
		delete(t.hellos, node)
		t.take(m)
	}
	for {
		select {
		case m := <-t.in:
			t.take(m)
		case a := <-t.l.asks:
			a.answer <- t.status(a.limits)
		case now := <-tick.C:
			if !t.due(now) {
				continue
			}
			if err := t.tick(ctx); err != nil {
				return err
			}
		case <-ctx.Done():
			t.grantor.Stop()
			return nil
		}
	}
}

// due reports whether the log may get another tick.
func (t *term) due(now time.Time) bool { return !now.Before(t.rest) }

// take hands the grantor what a relay said.
func (t *term) take(m Message) {
	n, known := t.numbers[m.Node]
	switch body := m.Body.(type) {
	case *wire.LeaseHello:
		if !known {
			if len(t.hellos) < lease.MaxNodes {
				t.hellos[m.Node] = m // until it has a number
			}
			return
		}
		if h, _, err := wire.DecodeLeaseHello(n, body); err == nil {
			t.greet(m, h)
		}
	case *wire.LeaseReport:
		report, err := wire.DecodeLeaseReport(n, body)
		switch {
		case err != nil:
			t.l.o.Logger.Warn("a relay's report cannot be read", "node", m.Node.String(), "error", err)
		case !known || t.unknown(m.Node, report.Incarnation):
			t.l.o.Send(m.Node, &wire.LeaseHelloWanted{})
		default:
			t.grantor.Report(m.At, report)
		}
	case *wire.LeaseRelease:
		if known {
			t.grantor.Release(m.At, wire.DecodeLeaseRelease(n, body))
		}
	}
}

// unknown reports whether a relay's process has not greeted this cluster.
func (t *term) unknown(node ids.Node, incarnation uint64) bool {
	row := t.l.o.State.Read().LeaseNode(node)
	return row == nil || row.Incarnation < incarnation
}

// tick decides, commits, and tells relays.
func (t *term) tick(ctx context.Context) error {
	if err := t.follow(ctx); err != nil {
		return err
	}
	t.again()
	start := time.Now()
	tick, grants := t.grantor.Tick(t.l.o.Clock())
	t.l.metrics.tickWork.Observe(time.Since(start).Seconds())
	t.send(nil, grants)
	if tick == nil {
		return nil
	}
	refused, err := t.commit(ctx, tick)
	if err != nil {
		return err // its fate may be unknown: the grantor goes with it
	}
	t.send(t.grantor.Committed(t.l.o.Clock(), refused))
	return nil
}

// commit proposes a tick, as several commands if it is large, and returns what the
// state refused of it.
func (t *term) commit(ctx context.Context, tick *lease.Tick) ([]lease.Refusal, error) {
	start := time.Now()
	var refused []lease.Refusal
	sessions, changes, entries := tick.Sessions, tick.Changes, 0
	for ; entries == 0 || len(sessions) > 0 || len(changes) > 0; entries++ {
		s := sessions[:min(len(sessions), command.MaxLeaseChanges)]
		sessions = sessions[len(s):]
		c := changes[:0]
		if len(sessions) == 0 { // all sessions come before the first change
			c = changes[:min(len(changes), command.MaxLeaseChanges)]
		}
		out, err := t.propose(ctx, command.NewLeaseTick(t.epoch, s, c))
		if err != nil {
			return nil, err
		}
		result, ok := out.Row.(*control.LeaseResult)
		if !ok {
			return nil, fault.New(fault.Internal, "quota.commit", "a tick gave a %T", out.Row)
		}
		for _, r := range result.Refused {
			t.note(&r)
			if r.Item < len(s) {
				r.Item += len(tick.Sessions) - len(sessions) - len(s)
			} else {
				r.Item += len(tick.Sessions) - len(s) + len(tick.Changes) - len(changes)
			}
			refused = append(refused, r)
		}
		changes = changes[len(c):]
	}
	t.l.metrics.commit.Observe(time.Since(start).Seconds())
	t.rest = start.Add(time.Duration(entries) * time.Second / maxEntries)
	return refused, nil
}

// note counts a refusal. A limit that would have been passed although nothing
// crossed the tick is an error of the grantor, which the state has made good.
func (t *term) note(r *lease.Refusal) {
	if !r.Passes() || t.l.o.State.Read().Lease().Changed != t.changed {
		t.l.metrics.refused.WithLabelValues("other").Inc()
		t.l.o.Logger.Debug("a change of what a relay may hold crossed another", "why", r.Why)
		return
	}
	t.l.metrics.refused.WithLabelValues("limit").Inc()
	t.l.o.Logger.Error("the state refused to have a shared limit passed: report this error of the program", "limit", uint64(r.Change.Limit), "node", t.nodes[r.Change.Node].String(), "why", r.Why)
	t.l.mu.Lock()
	defer t.l.mu.Unlock()
	t.l.alarm = "the state refused to have shared limit " + t.nameOf(r.Change.Limit) + " passed at " + time.Now().UTC().Format(time.RFC3339) + ": the limit was kept, but this points to an error in the program; report it with the log of that time"
}

func (t *term) nameOf(id lease.LimitID) string {
	for _, l := range t.l.o.State.Read().SharedLimits() {
		if l.ID == id {
			return l.Name
		}
	}
	return "of a former policy"
}

// send tells relays what may be told now.
func (t *term) send(welcomes []lease.Welcome, grants []lease.Grant) {
	for _, w := range welcomes {
		t.l.o.Send(t.nodes[w.Node], wire.EncodeLeaseWelcome(w))
	}
	for i := range grants {
		t.l.o.Send(t.nodes[grants[i].Node], wire.EncodeLeaseGrant(&grants[i]))
	}
}
