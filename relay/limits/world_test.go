package limits

import (
	"log/slog"
	"slices"
	"sync"
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"google.golang.org/protobuf/proto"

	"github.com/relais-mta/relais/relay/engine"
	"github.com/relais-mta/relais/relay/schedule"
	"github.com/relais-mta/relais/shared/ids"
	"github.com/relais-mta/relais/shared/lease"
	"github.com/relais-mta/relais/shared/policy"
	"github.com/relais-mta/relais/shared/wire"
)

// world is a relay's limits beside the real grantor, in time that the test moves.
type world struct {
	t       *testing.T
	dir     string
	boot    string
	clock   lease.Instant
	limits  *Limits
	view    policy.View
	policy  *policy.Directory
	table   *lease.Table
	grantor *lease.Grantor
	cut     bool // nothing arrives, either way
	said    []proto.Message
	life    uint64

	mu        sync.Mutex
	gates     map[uint64]schedule.Gate
	states    []schedule.GateState
	meanwhile func() // called once, while the scheduler is asked what is due
}

var (
	acme = ids.Tenant{15: 2}
	pool = ids.Pool{15: 3}
)

func rateLimit(id lease.LimitID, change func(*policy.SharedLimit)) policy.SharedLimit {
	l := policy.SharedLimit{Name: "mail", Provider: "google", Limit: lease.Limit{ID: id, Kind: lease.Rate, Max: 600 * lease.Milli, Per: time.Minute, Burst: 10, FloorPercent: 20, ReservePercent: 5}}
	if change != nil {
		change(&l)
	}
	return l
}

func slotLimit(id lease.LimitID, n int64) policy.SharedLimit {
	return policy.SharedLimit{Name: "open", Provider: "google", Limit: lease.Limit{ID: id, Kind: lease.Slots, Max: n, FloorPercent: 0, ReservePercent: 0}}
}

func newWorld(t *testing.T, limits ...policy.SharedLimit) *world {
	t.Helper()
	w := &world{t: t, dir: t.TempDir(), boot: "first", clock: lease.Instant(time.Hour), table: lease.NewTable(), gates: make(map[uint64]schedule.Gate)}
	cfg := lease.DefaultConfig()
	cfg.TTL, cfg.Linger, cfg.FloorGap = 10*time.Second, 5*time.Second, time.Second
	w.view = policy.View{
		Node: ids.Node{15: 1}, Revision: 1, Lease: cfg,
		Tenants: []policy.Tenant{{ID: acme, Name: "acme"}}, Pools: []policy.Pool{{ID: pool, Name: "default", Kind: policy.PoolShared}},
	}
	w.see(limits...)
	w.grantor = lease.NewGrantor(cfg, w.table, 1, 1, w.clock)
	w.start()
	return w
}

// see makes limits those of the cluster and of the view.
func (w *world) see(limits ...policy.SharedLimit) {
	w.t.Helper()
	w.view.SharedLimits = limits
	for _, l := range limits {
		if err := w.table.PutLimit(l.Limit); err != nil {
			w.t.Fatal(err)
		}
		if w.grantor != nil {
			w.grantor.PutLimit(l.Limit)
		}
	}
	doc, err := policy.Parse(nil)
	if err != nil {
		w.t.Fatal(err)
	}
	v := w.view
	v.Document = doc
	if w.policy, err = policy.Compile(&v); err != nil {
		w.t.Fatal(err)
	}
	if w.limits != nil {
		w.limits.Changed()
	}
}

// start begins a process of the relay from its disk.
func (w *world) start() {
	w.t.Helper()
	w.life++
	w.gates = make(map[uint64]schedule.Gate)
	var err error
	w.limits, err = New(Config{
		Dir: w.dir, Incarnation: w.life, Directory: func() *policy.Directory { return w.policy }, Send: w.send,
		Clock: func() lease.Instant { return w.clock }, Boot: func() string { return w.boot },
		Logger: slog.New(slog.DiscardHandler), Registerer: prometheus.NewRegistry(),
	})
	if err != nil {
		w.t.Fatal(err)
	}
	w.limits.Attach(w)
	w.limits.Linked(!w.cut)
}

func (w *world) SetGates(gates ...schedule.Gate) {
	w.mu.Lock()
	defer w.mu.Unlock()
	for _, g := range gates {
		w.gates[g.ID.Number] = g
	}
}

func (w *world) KeepGates(_ string, numbers map[uint64]bool) {
	w.mu.Lock()
	defer w.mu.Unlock()
	for n := range w.gates {
		if !numbers[n] {
			delete(w.gates, n)
		}
	}
}

func (w *world) GateStates(_ string, dst []schedule.GateState) []schedule.GateState {
	if meanwhile := w.meanwhile; meanwhile != nil {
		w.meanwhile = nil
		meanwhile()
	}
	return append(dst, w.states...)
}

// send takes what the relay says to the leader.
func (w *world) send(m proto.Message) error {
	w.said = append(w.said, m)
	if w.cut {
		return nil
	}
	switch m := m.(type) {
	case *wire.LeaseHello:
		h, _, err := wire.DecodeLeaseHello(self, m)
		if err != nil {
			w.t.Fatal(err)
		}
		w.grantor.Hello(w.clock, h)
	case *wire.LeaseReport:
		r, err := wire.DecodeLeaseReport(self, m)
		if err != nil {
			w.t.Fatal(err)
		}
		w.grantor.Report(w.clock, r)
	case *wire.LeaseRelease:
		w.grantor.Release(w.clock, wire.DecodeLeaseRelease(self, m))
	}
	return nil
}

// pass lets time go by, with a round of the relay and a tick of the leader four
// times a second.
func (w *world) pass(d time.Duration) {
	for end := w.clock.Add(d); w.clock < end; {
		w.clock = w.clock.Add(min(250*time.Millisecond, end.Sub(w.clock)))
		w.limits.round()
		w.disk()
		w.lead()
	}
	w.limits.round()
}

// disk is the writer, without its goroutine.
func (w *world) disk() {
	select {
	case s := <-w.limits.saves:
		w.limits.store(s)
	default:
	}
}

// lead is the leader's loop.
func (w *world) lead() {
	tick, grants := w.grantor.Tick(w.clock)
	w.give(grants)
	if tick != nil {
		refused := w.table.Apply(tick)
		welcomes, grants := w.grantor.Committed(w.clock, refused)
		if !w.cut {
			for _, m := range welcomes {
				w.limits.Welcome(wire.EncodeLeaseWelcome(m))
			}
		}
		w.give(grants)
	}
}

func (w *world) give(grants []lease.Grant) {
	if w.cut {
		return
	}
	for i := range grants {
		w.limits.Grant(wire.EncodeLeaseGrant(&grants[i]))
	}
}

// last returns the last message of a type that the relay said.
func last[M proto.Message](w *world) (m M) {
	for _, said := range slices.Backward(w.said) {
		if found, ok := said.(M); ok {
			return found
		}
	}
	return m
}

func (w *world) gate(id uint64) schedule.Gate {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.gates[id]
}

func (w *world) wants(recipients, sessions int) {
	w.states = nil
	for _, l := range w.view.SharedLimits {
		w.states = append(w.states, schedule.GateState{Number: uint64(l.ID), Waiting: recipients, Sessions: sessions, Held: recipients > 0})
	}
}

func place(abort func()) *engine.Place {
	return &engine.Place{Lane: schedule.Lane{Provider: "google"}, Key: schedule.Key{Tenant: acme, Pool: pool, Domain: "gmail.test"}, Abort: abort}
}

func (w *world) begin() engine.Hold { return w.limits.Begin(time.Now(), place(nil)) }

// words is what is said of a refusal to who asks.
func (w *world) words(h engine.Hold) string {
	x, _ := w.limits.Explain(h.Gate)
	return x.Text
}
