package quota

import (
	"bytes"
	"context"
	"log/slog"
	"slices"
	"time"

	"google.golang.org/protobuf/proto"

	"github.com/relais-mta/relais/control"
	"github.com/relais-mta/relais/control/command"
	"github.com/relais-mta/relais/control/state"
	"github.com/relais-mta/relais/shared/fault"
	"github.com/relais-mta/relais/shared/ids"
	"github.com/relais-mta/relais/shared/lease"
	"github.com/relais-mta/relais/shared/ownership"
	"github.com/relais-mta/relais/shared/wire"
)

const (
	floatingTick = 500 * time.Millisecond // between two commands that answer reports
	// maxReclaims is how many addresses are taken back in one tick: a relay with many
	// that is gone must not keep the answers of others waiting.
	maxReclaims = 4
	// stalled is the time between two ticks after which this server was stopped, or its
	// log stood still: it heard nobody meanwhile, and that is not the relays' silence.
	stalled = 5 * time.Second
	// maxFloatingRelays bounds the relays that are remembered; a cluster has fewer.
	maxFloatingRelays = 1 << 14
)

// FloatingOptions configure Floating. All but Clock are required.
type FloatingOptions struct {
	State   *state.Store
	Propose func(context.Context, command.Command) (state.Result, error)
	Send    func(ids.Node, proto.Message)
	// Succeeds is as in LeaseOptions.
	Succeeds func(node, through ids.Node, incarnation uint64) bool
	Logger   *slog.Logger
	Clock    func() lease.Instant // nil: Now
}

// Floating is the leader's part that leases floating addresses to their relays, and
// takes them back from those that are silent. What it rests on is in
// shared/ownership. A cluster without such addresses has no entries about them.
type Floating struct {
	o    FloatingOptions
	asks chan chan []FloatingStatus
}

// FloatingStatus is what the leader knows of a relay that has floating addresses.
type FloatingStatus struct {
	Node      ids.Node `json:"node"`
	Heard     bool     `json:"heard"`      // since this server leads
	EndsMS    int64    `json:"ends_ms"`    // until its leases are over, if nothing is heard of it; below 0: since they are
	ReclaimMS int64    `json:"reclaim_ms"` // until its addresses are taken back then
}

// NewFloating returns the part. It is given to Quota.Add.
func NewFloating(o FloatingOptions) *Floating {
	if o.Clock == nil {
		o.Clock = Now
	}
	return &Floating{o: o, asks: make(chan chan []FloatingStatus)}
}

// Takes implements Part.
func (*Floating) Takes(m proto.Message) bool {
	_, ok := m.(*wire.AddressReport)
	return ok
}

// Lead implements Part.
func (f *Floating) Lead(ctx context.Context, in <-chan Message) error {
	t := &floatingTerm{f: f, cfg: ownership.DefaultConfig(), heard: make(map[ids.Node]lease.Instant), reported: make(map[ids.Node]bool), epochs: make(map[ids.Source]uint64), waiting: make(map[ids.Node]Message)}
	tick := time.NewTicker(floatingTick)
	defer tick.Stop()
	for {
		select {
		case <-ctx.Done():
			return nil
		case m := <-in:
			t.take(m)
		case answer := <-f.asks:
			answer <- t.status()
		case <-tick.C:
			if err := t.tick(ctx); err != nil && ctx.Err() == nil {
				return err // the outcome may be unknown: what was heard goes with it
			}
		}
	}
}

// floatingTerm is one leader's leasing. It is thrown away with the leadership, and
// with an outcome that is not known.
type floatingTerm struct {
	f        *Floating
	cfg      ownership.Config
	keeper   *ownership.Keeper // nil: before the barrier
	barrier  lease.Instant
	ticked   lease.Instant              // last; 0: never
	heard    map[ids.Node]lease.Instant // or got an address: what has just been assigned is not taken back
	reported map[ids.Node]bool
	revision uint64            // of views, of which sources are
	sources  []*control.Source // leased
	epochs   map[ids.Source]uint64
	waiting  map[ids.Node]Message
}

// ready reports whether addresses are leased at all now.
func ready(r *state.Reader) bool {
	cluster := r.Cluster()
	return cluster != nil && cluster.FSMVersion >= control.FloatingVersion && r.Recovery() == nil
}

// take notes a report until the next tick. Of one relay the newest counts.
func (t *floatingTerm) take(m Message) {
	n := t.f.o.State.Read().Node(m.Node)
	_, known := t.heard[m.Node]
	if n == nil || !n.State.Connects() || !known && len(t.heard) >= maxFloatingRelays {
		return
	}
	t.hear(m.At, m.Node)
	t.reported[m.Node] = true
	t.waiting[m.Node] = m
}

// hear counts the silence of a relay from an instant. A later one than need be only
// keeps its addresses longer.
func (t *floatingTerm) hear(at lease.Instant, node ids.Node) {
	t.heard[node] = max(t.heard[node], at)
	if t.keeper != nil {
		t.keeper.Heard(at, node)
	}
}

// follow looks at which addresses are leased by now.
func (t *floatingTerm) follow() {
	r := t.f.o.State.Read()
	revision := r.ViewRevision()
	if revision == t.revision {
		return
	}
	t.revision, t.sources = revision, r.LeasedSources()
	before := t.epochs
	t.epochs = make(map[ids.Source]uint64, len(t.sources))
	for _, s := range t.sources {
		if t.epochs[s.ID] = s.Epoch; before[s.ID] != s.Epoch {
			t.hear(t.f.o.Clock(), s.Owner)
		}
	}
}

// tick answers reports and takes back what silent relays have.
func (t *floatingTerm) tick(ctx context.Context) error {
	r := t.f.o.State.Read()
	if !ready(r) {
		clear(t.waiting)
		if t.keeper != nil && r.Recovery() != nil {
			return fault.New(fault.Unavailable, "quota.Floating", "the cluster is in recovery mode")
		}
		return nil
	}
	now := t.f.o.Clock()
	if t.ticked != 0 && now.Sub(t.ticked) > stalled {
		for node := range t.heard {
			t.hear(now, node)
		}
	}
	t.ticked = now
	if t.follow(); len(t.sources) == 0 {
		clear(t.waiting) // who reports of an address that it has no more learns so from its view
		return nil
	}
	if t.keeper == nil {
		if err := t.begin(ctx); err != nil {
			return err
		}
	}
	if err := t.answer(ctx); err != nil {
		return err
	}
	return t.reclaim(ctx)
}

// begin takes the leasing over. The entry is this leader's barrier: no former leader
// prolongs anything after it.
func (t *floatingTerm) begin(ctx context.Context) error {
	if err := t.propose(ctx, &command.IPHeard{Meta: &command.Meta{Actor: "system"}}); err != nil {
		return err
	}
	t.barrier = t.f.o.Clock() // R4 of shared/lease: not before the entry was applied
	t.keeper = ownership.NewKeeper(t.cfg, t.barrier)
	for node, at := range t.heard {
		t.keeper.Heard(at, node)
	}
	return nil
}

func (t *floatingTerm) propose(ctx context.Context, c command.Command) error {
	ctx, cancel := context.WithTimeout(ctx, proposeTimeout)
	defer cancel()
	_, err := t.f.o.Propose(ctx, c)
	return err
}

// answer commits a command and answers the reports that came before, by the state
// that has it applied.
func (t *floatingTerm) answer(ctx context.Context) error {
	var due []Message
	heard := &command.IPHeard{Meta: &command.Meta{Actor: "system"}}
	for node, m := range t.waiting {
		if known, succeeds := t.succeeds(m); known || succeeds && len(heard.Processes) < command.MaxLeaseProcesses {
			due = append(due, m)
			delete(t.waiting, node)
			if !known {
				heard.Processes = append(heard.Processes, &command.LeaseProcess{Node: wire.EncodeID(node), Incarnation: m.Body.(*wire.AddressReport).GetIncarnation()})
			}
		} else if t.f.o.Clock().Sub(m.At) > greetWait {
			delete(t.waiting, node) // it has reported again
		}
	}
	if len(due) == 0 {
		return nil
	}
	slices.SortFunc(heard.Processes, func(a, b *command.LeaseProcess) int { return bytes.Compare(a.Node, b.Node) })
	if err := t.propose(ctx, heard); err != nil {
		return err
	}
	t.follow()
	leased := make(map[ids.Node][]*wire.LeasedSource)
	for _, s := range t.sources {
		leased[s.Owner] = append(leased[s.Owner], &wire.LeasedSource{SourceId: wire.EncodeID(s.ID), Epoch: s.Epoch})
	}
	for _, m := range due {
		report := m.Body.(*wire.AddressReport)
		t.f.o.Send(m.Node, &wire.AddressAnswer{Incarnation: report.GetIncarnation(), Nonce: report.GetNonce(), Leased: leased[m.Node]})
	}
	return nil
}

// succeeds reports whether a report is of the process that has its relay's session
// (A4): a copy of the machine gets no answer while the first is heard. A process that
// is known was the one before; that is replicated, for a new leader does not hear of
// all sessions at once, and leases must go on.
func (t *floatingTerm) succeeds(m Message) (known, succeeds bool) {
	incarnation := m.Body.(*wire.AddressReport).GetIncarnation()
	if n := t.f.o.State.Read().Node(m.Node); n != nil && n.LeaseProcess == incarnation {
		return true, true
	}
	return false, t.f.o.Succeeds(m.Node, m.Through, incarnation)
}

// reclaim takes back addresses of relays whose leases are over.
func (t *floatingTerm) reclaim(ctx context.Context) error {
	n := 0
	for _, s := range t.sources {
		if !t.keeper.Over(t.f.o.Clock(), s.Owner) {
			continue
		}
		if n++; n > maxReclaims {
			return nil // the next tick goes on
		}
		why := "its relay " + t.name(s.Owner) + " was silent until its lease was over"
		err := t.propose(ctx, &command.IPReclaim{Meta: &command.Meta{Actor: "system", Reason: why}, Source: s.ID[:], Epoch: s.Epoch})
		switch {
		case fault.Is(err, fault.Conflict) || fault.Is(err, fault.NotFound):
		case err != nil:
			return err
		default:
			t.f.o.Logger.Warn("a floating address is free: "+why, "address", s.Bind.String(), "node", s.Owner.String(), "epoch", s.Epoch)
		}
	}
	return nil
}

func (t *floatingTerm) name(node ids.Node) string {
	if n := t.f.o.State.Read().Node(node); n != nil {
		return n.Name
	}
	return node.String()
}

// status says of every relay with leased addresses when its leases end.
func (t *floatingTerm) status() []FloatingStatus {
	out := []FloatingStatus{}
	if t.keeper == nil {
		return out
	}
	now, seen := t.f.o.Clock(), map[ids.Node]bool{}
	for _, s := range t.sources {
		if seen[s.Owner] {
			continue
		}
		seen[s.Owner] = true
		basis := max(t.heard[s.Owner], t.barrier)
		out = append(out, FloatingStatus{Node: s.Owner, Heard: t.reported[s.Owner], EndsMS: basis.Add(t.cfg.TTL).Sub(now).Milliseconds(),
			ReclaimMS: basis.Add(lease.Outlast(t.cfg.TTL) + t.cfg.Takeover).Sub(now).Milliseconds()})
	}
	return out
}

// statusHere answers if this server leads.
func (f *Floating) statusHere(ctx context.Context) ([]FloatingStatus, error) {
	ctx, cancel := context.WithTimeout(ctx, statusTimeout)
	defer cancel()
	answer := make(chan []FloatingStatus, 1)
	select {
	case f.asks <- answer:
	case <-ctx.Done():
		return nil, fault.New(fault.Unavailable, "quota.FloatingStatus", "nobody leases floating addresses now: a leader begins to")
	}
	return <-answer, nil // it is put there at once
}

// FloatingStatus returns what the leader knows of relays with floating addresses. The
// error is Unavailable while nobody leases.
func (q *Quota) FloatingStatus(ctx context.Context) ([]FloatingStatus, error) {
	if _, leads := q.o.Cluster.Term(); leads {
		return q.floatingStatus(ctx)
	}
	ctx, cancel := context.WithTimeout(ctx, statusTimeout)
	defer cancel()
	var out []FloatingStatus
	return out, q.o.Cluster.AskLeader(ctx, requestFloating, struct{}{}, &out)
}

func (q *Quota) floatingStatus(ctx context.Context) ([]FloatingStatus, error) {
	for _, p := range q.parts {
		if f, ok := p.Part.(*Floating); ok {
			return f.statusHere(ctx)
		}
	}
	return nil, fault.New(fault.Unavailable, "quota.FloatingStatus", "this server leases no addresses")
}

func (q *Quota) onFloating(ctx context.Context, _ ids.Node, _ []byte) (any, error) {
	return q.floatingStatus(ctx)
}
