package brake

import (
	"context"
	"log/slog"
	"net/netip"
	"sync"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/relais-mta/relais/relay"
	"github.com/relais-mta/relais/relay/engine"
	"github.com/relais-mta/relais/relay/outbox"
	"github.com/relais-mta/relais/relay/reflex"
	"github.com/relais-mta/relais/relay/schedule"
	"github.com/relais-mta/relais/relay/verdict"
	"github.com/relais-mta/relais/shared/fault"
	"github.com/relais-mta/relais/shared/ids"
	"github.com/relais-mta/relais/shared/policy"
)

// The owners of gates, which are the words of Waiting.Reason as well.
const (
	ownerReflex = "reflex"
	ownerBrake  = "brake"
)

// Bounds.
const (
	maxLanes   = 1 << 14          // with a reflex; mail of others is not slowed down by it
	maxGates   = 1 << 14          // of brakes
	sweepWait  = 10 * time.Second // between two looks for lanes to forget, while there are too many
	maxIdle    = time.Minute      // Run looks around at least this often
	longReflex = 10 * time.Minute // a lane that was slowed down so long ago is told to control
)

// Config is what a Keeper works with.
type Config struct {
	Directory    func() *policy.Directory // the view in force; nil before the first
	Now          func() time.Time
	ClockTrusted func() bool // while it returns false no brake ends by its time
	Logger       *slog.Logger
	Registerer   prometheus.Registerer
	Events       func(context.Context, []outbox.Event) error // keeps what was slowed down and why; nil: nobody does
}

// Gates is where gates are set; the engine.
type Gates interface {
	SetGates(gates ...schedule.Gate)
	KeepGates(owner string, numbers map[uint64]bool)
	Recall(name string)
}

// Keeper keeps reflexes and brakes. It is an engine.Admitter, an
// engine.Explainer and an engine.Observer.
type Keeper struct {
	cfg     Config
	kick    chan struct{}
	metrics *metrics
	gates   Gates

	mu       sync.Mutex // guards all below; no method of the engine is called under it
	lanes    map[schedule.Lane]*lane
	visits   map[*engine.Place]*visit
	changed  []*lane          // since the gates were set last
	slowed   map[uint64]*lane // those with a gate, by its number
	swept    time.Time
	brakes   []policy.Brake // in force, as the view says
	mixed    []policy.Brake // of those, the ones that hold some mail of one source
	view     *policy.Directory
	stale    bool // the gates of brakes are to be made anew
	numbers  map[brakeGate]uint64
	byNumber map[uint64]brakeGate
	last     uint64
	attached bool // the brakes of the view on disk are in force
	tells    chan struct{}
	events   []outbox.Event // to be kept
	untold   int            // for which there was no room
}

// lane is one source towards one provider.
type lane struct {
	key      schedule.Lane
	pool     ids.Pool
	number   uint64
	state    reflex.Lane
	settings reflex.Settings
	queued   bool // stands in changed
	bind     netip.Addr
	epoch    uint64
	told     reflex.Allowance // in the last event
}

// visit is a session.
type visit struct {
	lane *lane
	open bool
}

// New returns a keeper; Attach gives it its gates.
func New(cfg Config) (*Keeper, error) {
	if cfg.Directory == nil || cfg.Now == nil || cfg.ClockTrusted == nil || cfg.Logger == nil {
		return nil, fault.New(fault.Internal, "brake.New", "directory, clock and logger are needed")
	}
	k := &Keeper{
		cfg: cfg, kick: make(chan struct{}, 1), tells: make(chan struct{}, 1), stale: true,
		lanes: make(map[schedule.Lane]*lane), visits: make(map[*engine.Place]*visit), slowed: make(map[uint64]*lane),
		numbers: make(map[brakeGate]uint64), byNumber: make(map[uint64]brakeGate),
	}
	var err error
	k.metrics, err = newMetrics(cfg.Registerer, k)
	return k, err
}

// Changed tells that the view changed.
func (k *Keeper) Changed() {
	k.mu.Lock()
	k.stale = true
	k.mu.Unlock()
	k.wake()
}

func (k *Keeper) wake() {
	select {
	case k.kick <- struct{}{}:
	default:
	}
}

// Attach gives the keeper its gates and sets those that the view asks for. It
// must be called before Run.
func (k *Keeper) Attach(gates Gates) {
	k.gates = gates
	k.look()
	k.mu.Lock()
	k.attached = true
	k.mu.Unlock()
}

// Run keeps the gates right until ctx ends.
func (k *Keeper) Run(ctx context.Context) {
	told := make(chan struct{})
	go func() {
		defer close(told)
		k.keepEvents(ctx)
	}()
	defer func() { <-told }()
	timer := time.NewTimer(0)
	defer timer.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case <-k.kick:
		case <-timer.C:
		}
		timer.Reset(k.look())
	}
}

// look does what is due and returns when to look again.
func (k *Keeper) look() time.Duration {
	now, gates := k.cfg.Now(), k.gates
	k.lookAtView(gates, now)
	set, keep, dropped := k.reflexGates(now)
	if len(set) > 0 {
		gates.SetGates(set...)
	}
	if dropped {
		gates.KeepGates(ownerReflex, keep)
	}
	return min(maxIdle, max(time.Millisecond, k.next(now)))
}

// next is how long nothing is due.
func (k *Keeper) next(now time.Time) time.Duration {
	k.mu.Lock()
	defer k.mu.Unlock()
	wait := maxIdle
	for _, l := range k.slowed {
		if at := l.state.Next(); !at.IsZero() {
			wait = min(wait, at.Sub(now))
		}
	}
	for i := range k.brakes {
		if b := &k.brakes[i]; !b.Until.IsZero() {
			wait = min(wait, max(b.Until.Add(policy.BrakeGrace).Sub(now), time.Second))
		}
	}
	return wait
}

// Connect implements engine.Admitter.
func (k *Keeper) Connect(now time.Time, p *engine.Place) engine.Hold {
	k.mu.Lock()
	defer k.mu.Unlock()
	l := k.laneOf(p, now)
	if h := k.refuses(p, now); h.Reason != "" {
		return h
	}
	if l != nil {
		l.state.Opening()
		k.visits[p] = &visit{lane: l}
	}
	return engine.Hold{}
}

// Closed implements engine.Admitter.
func (k *Keeper) Closed(_ time.Time, p *engine.Place) {
	k.mu.Lock()
	defer k.mu.Unlock()
	if v := k.visits[p]; v != nil {
		v.lane.state.Closed()
		delete(k.visits, p)
	}
}

// Begin implements engine.Admitter.
func (k *Keeper) Begin(now time.Time, p *engine.Place) engine.Hold {
	k.mu.Lock()
	defer k.mu.Unlock()
	v := k.visits[p]
	if v == nil {
		return k.refuses(p, now)
	}
	if !v.open {
		v.open = true
		v.lane.state.Opened(now)
	}
	return k.refuses(p, now)
}

// Done implements engine.Admitter.
func (k *Keeper) Done(now time.Time, p *engine.Place, outcomes []relay.Outcome) {
	if outcomes == nil {
		return
	}
	k.mu.Lock()
	defer k.mu.Unlock()
	if v := k.visits[p]; v != nil {
		v.lane.state.Began(now)
	}
}

// Observe implements engine.Observer: it is told the end of every attempt, those
// that did not get as far as a session included.
func (k *Keeper) Observe(a *relay.Attempt) {
	c := causeOf(a)
	if c.Signal == reflex.Silent {
		return
	}
	now := k.cfg.Now()
	k.mu.Lock()
	defer k.mu.Unlock()
	l := k.lanes[schedule.Lane{Source: a.Source, Provider: a.Provider}]
	if l == nil {
		return
	}
	before := l.state.Allowance().Phase
	if l.state.Ended(now, a.StartedAt, c, &l.settings) {
		k.note(l)
		k.tell(l, before, c.Signal)
	}
}

// causeOf finds the strongest signal of an attempt.
func causeOf(a *relay.Attempt) (c reflex.Cause) {
	for i := range a.Outcomes {
		o := &a.Outcomes[i]
		if o.Status == relay.NotTried || o.Phase == relay.PhaseLocal || o.Phase == relay.PhaseResolve {
			continue
		}
		v := verdict.Of(a.Provider, o)
		if s := reflex.Of(v.Class, v.Action == verdict.Retry); s > c.Signal {
			c = reflex.Cause{Signal: s, Class: string(v.Class), Reply: engine.ReplyText(&o.Reply)}
		}
	}
	return c
}

// laneOf finds or makes the lane of a session; nil: there are too many. k.mu is
// held.
func (k *Keeper) laneOf(p *engine.Place, now time.Time) *lane {
	if l := k.lanes[p.Lane]; l != nil {
		l.bind, l.epoch = p.Source.Bind, p.Source.Epoch
		if l.pool != p.Key.Pool { // the source was moved: other brakes may be for it
			l.pool, k.stale = p.Key.Pool, true
			k.wake()
		}
		return l
	}
	if len(k.lanes) >= maxLanes && !k.sweep(now) {
		return nil
	}
	k.last++
	l := &lane{key: p.Lane, pool: p.Key.Pool, number: k.last, bind: p.Source.Bind, epoch: p.Source.Epoch}
	l.state.Seed = k.last
	l.settings = settingsOf(k.cfg.Directory(), p.Lane.Provider)
	k.lanes[p.Lane] = l
	if k.slows(l) {
		k.stale = true
		k.wake()
	}
	return l
}

// sweep forgets lanes that are quiet; it looks at all, and so only now and then.
func (k *Keeper) sweep(now time.Time) bool {
	if since := now.Sub(k.swept); since >= 0 && since < sweepWait {
		return false
	}
	k.swept = now
	for key, l := range k.lanes {
		if l.state.Quiet(now) && !l.queued {
			delete(k.lanes, key)
		}
	}
	return len(k.lanes) < maxLanes
}

// note has the gate of a lane set. k.mu is held.
func (k *Keeper) note(l *lane) {
	if !l.queued {
		l.queued = true
		k.changed = append(k.changed, l)
	}
	k.wake()
}

func settingsOf(dir *policy.Directory, provider string) reflex.Settings {
	if dir == nil {
		return reflex.Settings{Off: true}
	}
	profile, ok := dir.Providers().Named(provider)
	if !ok {
		profile = dir.Providers().Default()
	}
	r := profile.Reflex()
	s := reflex.Settings{
		Off: r.Off, MaxRate: profile.MessageRate(policy.ScopeSource).PerHour(), MaxConnections: profile.Connections(policy.ScopeSource), MinRate: int64(r.MinPerHour),
		Keep: r.KeepPercent, After: r.After, Share: r.SharePercent, Spacing: r.Spacing.D(), Step: r.Step.D(), Hold: r.Hold.D(), MaxHold: r.MaxHold.D(), Probe: r.Probe,
	}
	if s.MaxRate > 0 {
		s.MinRate = min(s.MinRate, s.MaxRate)
	}
	return s
}
