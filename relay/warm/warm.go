package warm

import (
	"fmt"
	"log/slog"
	"sync"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"google.golang.org/protobuf/proto"

	"github.com/relais-mta/relais/relay"
	"github.com/relais-mta/relais/relay/engine"
	"github.com/relais-mta/relais/relay/schedule"
	"github.com/relais-mta/relais/shared/fault"
	"github.com/relais-mta/relais/shared/ids"
	"github.com/relais-mta/relais/shared/policy"
	"github.com/relais-mta/relais/shared/warmup"
	"github.com/relais-mta/relais/shared/wire"
)

// Reason is the word of holds by warm-up, and the owner of its gates.
const Reason = "warmup"

const (
	lookWait    = time.Second      // Run looks around at least this often
	askAgain    = 2 * time.Second  // a request without an answer is made again
	settleEvery = 10 * time.Second // what is spent is told so often
	leaderPause = time.Second      // mail that waits for a reservation asks again
	diskPause   = 5 * time.Millisecond
	aheadOf     = 2 * time.Hour // before a day begins, half of it may be reserved
	maxSlots    = 100_000       // reservations, all days
	maxGates    = 1 << 14
	maxDowns    = 256 // answers of the leader that wait to be read
)

// Config is what a Keeper works with. All but Registerer are required.
type Config struct {
	Dir          string                   // where the marks are kept
	Directory    func() *policy.Directory // the view in force; nil before the first
	Send         func(proto.Message) error
	Now          func() time.Time
	ClockTrusted func() bool
	Logger       *slog.Logger
	Registerer   prometheus.Registerer
}

// Gates is what the keeper needs of the engine.
type Gates interface {
	SetGates(gates ...schedule.Gate)
	KeepGates(owner string, numbers map[uint64]bool)
	Recall(name string)
}

// Keeper is an engine.Admitter, an engine.Explainer and an engine.Observer.
type Keeper struct {
	cfg   Config
	kick  chan struct{}
	downs chan *wire.WarmDown
	gates Gates

	// Of Run's goroutine.
	disk       map[key]row
	talliedAt  time.Time // when tallies were last written for their own sake
	life       uint32
	generation uint64
	declared   uint64    // generation in which the leader knows that it was told all
	declaredAt time.Time // when that was said last

	mu      sync.Mutex // guards all below; no method of the engine is called under it
	slots   map[key]*slot
	taken   map[*engine.Place]grant
	held    map[gateOf]*heldGate
	byGate  map[uint64]*heldGate
	gateSeq uint64
	seq     uint32
	linked  bool
	today   warmup.Day
	stale   bool               // gates were added
	freed   map[string]bool    // plans of what may have room again
	spills  map[spill]spilling // of addresses that are held now
	spilled map[overflow]uint64
}

// grant is what one transaction took.
type grant struct {
	slots [3]*slot
	n     uint32
	cold  bool // it leaves from an address that warms up
}

// gateOf is what is held: a source or a pool, towards a provider.
type gateOf struct {
	source   ids.Source
	pool     ids.Pool
	provider string
}

type heldGate struct {
	gateOf
	number uint64
	slot   *slot
	hold   engine.Hold
	words  func() string // of the hold, as things are; k.mu is held
	spills spill         // whose other addresses get the mail; zero: it waits
}

// New reads the marks and begins a new life of this relay.
func New(cfg Config) (*Keeper, error) {
	if cfg.Dir == "" || cfg.Directory == nil || cfg.Send == nil || cfg.Now == nil || cfg.ClockTrusted == nil || cfg.Logger == nil {
		return nil, fault.New(fault.Internal, "warm.New", "all of Config is needed")
	}
	k := &Keeper{
		cfg: cfg, kick: make(chan struct{}, 1), downs: make(chan *wire.WarmDown, maxDowns), disk: make(map[key]row), slots: make(map[key]*slot),
		taken: make(map[*engine.Place]grant), held: make(map[gateOf]*heldGate), byGate: make(map[uint64]*heldGate),
		freed: make(map[string]bool), spills: make(map[spill]spilling), spilled: make(map[overflow]uint64),
	}
	if cfg.Registerer != nil {
		if err := cfg.Registerer.Register(&collector{k}); err != nil {
			return nil, fault.Wrap(err, fault.Internal, "warm.New", "metrics are registered twice")
		}
	}
	return k, k.load()
}

// Attach gives the keeper its gates, before Run.
func (k *Keeper) Attach(gates Gates) { k.gates = gates }

// Linked says whether there is a way to the leader.
func (k *Keeper) Linked(linked bool) {
	k.mu.Lock()
	k.linked = linked
	k.mu.Unlock()
	k.wake()
}

// Changed says that the view changed.
func (k *Keeper) Changed() { k.wake() }

// Down takes an answer of the leader. It does not block: the oldest makes room.
func (k *Keeper) Down(m proto.Message) {
	down, ok := m.(*wire.WarmDown)
	for ok {
		select {
		case k.downs <- down:
			k.wake()
			return
		default:
		}
		select {
		case <-k.downs:
		default:
		}
	}
}

func (k *Keeper) wake() {
	select {
	case k.kick <- struct{}{}:
	default:
	}
}

// Connect implements engine.Admitter.
func (k *Keeper) Connect(now time.Time, p *engine.Place) engine.Hold {
	dir := k.cfg.Directory()
	if dir == nil || !dir.Warming() {
		return engine.Hold{}
	}
	k.mu.Lock()
	defer k.mu.Unlock()
	_, hold := k.ask(now, p, dir, 1)
	if hold.Reason != "" && hold.Look.IsZero() && hold.Until.Sub(now) <= diskPause {
		return engine.Hold{} // the disk is faster than a connection
	}
	return hold
}

// Closed implements engine.Admitter.
func (k *Keeper) Closed(time.Time, *engine.Place) {}

// Begin implements engine.Admitter: it spends what the transaction offers, of every
// subject that counts it, or nothing.
func (k *Keeper) Begin(now time.Time, p *engine.Place) engine.Hold {
	dir := k.cfg.Directory()
	if dir == nil || !dir.Warming() {
		return engine.Hold{}
	}
	n := uint32(p.Recipients)
	k.mu.Lock()
	defer k.mu.Unlock()
	g, hold := k.ask(now, p, dir, n)
	if hold.Reason != "" {
		return hold
	}
	for i, s := range g.slots {
		if s == nil || s.take(n, now) {
			continue
		}
		for _, before := range g.slots[:i] {
			before.refund(n)
		}
		k.wake()
		return engine.Hold{Reason: Reason, Text: "warm-up: its mark is being saved", Until: now.Add(diskPause)}
	}
	for _, s := range g.slots {
		if s != nil {
			s.want = 0
			if s.spender.Room() <= s.step()/2 {
				s.mark = true
				k.wake()
			}
		}
	}
	if g.slots[0] != nil {
		k.taken[p] = g
	}
	if !g.cold && len(k.spills) > 0 {
		k.countOverflow(p, n)
	}
	return engine.Hold{}
}

// Done implements engine.Admitter. Only what provably reached no host is refunded.
func (k *Keeper) Done(_ time.Time, p *engine.Place, outcomes []relay.Outcome) {
	k.mu.Lock()
	defer k.mu.Unlock()
	g, ok := k.taken[p]
	if !ok {
		return
	}
	delete(k.taken, p)
	if offered(outcomes) {
		t := tallyOf(p.Lane.Provider, outcomes)
		for _, s := range g.slots {
			if s != nil {
				s.count(t)
			}
		}
		return
	}
	for _, s := range g.slots {
		if s != nil {
			s.refund(g.n)
		}
	}
}

// ask finds the reservations that a transaction needs, and what one of them lacks.
// k.mu is held.
func (k *Keeper) ask(now time.Time, p *engine.Place, dir *policy.Directory, n uint32) (g grant, hold engine.Hold) {
	var buf [3]*policy.WarmSubject
	today := k.day(now, dir)
	g.n = n
	for i, subject := range dir.WarmSubjects(buf[:0], p.Lane.Source, p.Key.Pool, p.From) {
		class, name, ok := dir.WarmClass(subject, p.Lane.Provider)
		what := k.named(dir, subject, p)
		scope := what + ", " + name
		if !ok {
			return g, engine.Hold{Reason: Reason, Name: subject.Plan, Scope: what, Text: "warm-up of " + what + ": plan " + subject.Plan + " has no quota for " + p.Lane.Provider + " now; see warmup show", Look: now.Add(leaderPause)}
		}
		of := key{Subject: warmup.Subject(subject.Number), Class: warmup.Class(class), Day: today}
		if !subject.Source.IsZero() {
			of.Epoch, g.cold = p.Source.Epoch, true
		}
		s := k.slot(of)
		if s == nil {
			return g, engine.Hold{Reason: Reason, Name: subject.Plan, Scope: scope, Text: "warm-up: this relay keeps too many reservations", Until: now.Add(time.Minute)}
		}
		plan, _ := dir.Document().Warmup.PlanNamed(subject.Plan) // WarmClass knew it
		s.percent, s.plan = plan.Hour(), subject.Plan
		g.slots[i] = s
		lack := s.lacks(n, now)
		if lack == nothing {
			continue
		}
		hold = engine.Hold{Reason: Reason, Name: subject.Plan, Scope: scope}
		words := func() string {
			if lack == anHour {
				return s.text(subject, what, name) + fmt.Sprintf("; of its %d an hour %d are spent", s.hourly(), s.inHour)
			}
			return s.text(subject, what, name)
		}
		switch lack {
		case aMark:
			s.want, s.mark, hold.Until = max(s.want, n), true, now.Add(diskPause)
		case reservation:
			s.want, hold.Look = max(s.want, n), now.Add(leaderPause)
		case quota:
			s.want, hold.Until = max(s.want, n), (today + 1).Start(time.UTC)
			s.refusals.day++
			k.hold(s, subject, p, plan, name, &hold, words)
		case anHour:
			hold.Until = now.Truncate(time.Hour).Add(time.Hour)
			s.refusals.hour++
			k.hold(s, subject, p, plan, name, &hold, words)
		}
		hold.Text = words()
		k.wake()
		return g, hold
	}
	return g, engine.Hold{}
}

// hold has the scheduler leave the source or pool alone, so that mail goes to warm
// sources of the pool; a plan that lets it wait holds the pool. k.mu is held.
func (k *Keeper) hold(s *slot, subject *policy.WarmSubject, p *engine.Place, plan *policy.WarmupPlan, class string, hold *engine.Hold, words func() string) {
	of := gateOf{provider: p.Lane.Provider, pool: p.Key.Pool}
	var to spill
	switch {
	case subject.Domain != "":
		return // other domains may go the same way
	case !subject.Source.IsZero() && plan.Overflow != string(warmup.OverflowWait):
		of.source, of.pool, to = p.Lane.Source, ids.Pool{}, spill{p.Key.Pool, p.Lane.Provider}
	}
	if k.held[of] != nil || len(k.held) >= maxGates {
		return
	}
	k.gateSeq++
	h := &heldGate{gateOf: of, number: k.gateSeq, slot: s, hold: *hold, words: words, spills: to}
	k.held[of], k.byGate[h.number], k.stale = h, h, true
	if to != (spill{}) {
		k.spills[to] = spilling{k.spills[to].held + 1, class}
	}
}

// Explain implements engine.Explainer.
func (k *Keeper) Explain(gate schedule.GateID) (engine.Hold, bool) {
	k.mu.Lock()
	defer k.mu.Unlock()
	h := k.byGate[gate.Number]
	if gate.Owner != Reason || h == nil {
		return engine.Hold{}, false
	}
	hold := h.hold
	hold.Text = h.words()
	return hold, true
}

// slot returns a reservation, a new one if need be; nil: there are too many. k.mu
// is held.
func (k *Keeper) slot(of key) *slot {
	s := k.slots[of]
	if s == nil {
		if len(k.slots) >= maxSlots {
			return nil
		}
		s = &slot{key: of}
		k.slots[of] = s
	}
	return s
}

// day is the day that mail is counted on: what control said last or, cut off, what
// the clock says if it may be trusted. It never goes back. k.mu is held.
func (k *Keeper) day(now time.Time, dir *policy.Directory) warmup.Day {
	k.today = max(k.today, warmup.Day(dir.WarmToday()))
	if day := warmup.DayOf(now, time.UTC); day > k.today && !k.linked && k.cfg.ClockTrusted() {
		k.today = day
	}
	return k.today
}

func (k *Keeper) named(dir *policy.Directory, s *policy.WarmSubject, p *engine.Place) string {
	switch {
	case !s.Source.IsZero():
		return "address " + p.Source.Bind.String()
	case s.Domain != "":
		return "domain " + string(s.Domain)
	}
	if pool, ok := dir.Pool(s.Pool); ok {
		return "pool " + pool.Name
	}
	return "pool " + s.Pool.String()
}
