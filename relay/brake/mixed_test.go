package brake

import (
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/relais-mta/relais/relay"
	"github.com/relais-mta/relais/relay/engine"
	"github.com/relais-mta/relais/relay/schedule"
	"github.com/relais-mta/relais/shared/ids"
	"github.com/relais-mta/relais/shared/policy"
)

// carrier is a keeper with a real scheduler, and plays the engine between them in
// virtual time. Its mail never ends: each tenant has a queue.
type carrier struct {
	*world
	s      *schedule.Scheduler
	keys   map[schedule.Queue]schedule.Key
	open   map[schedule.Session]*engine.Place
	events []carrierEvent
	sent   map[ids.Source]map[ids.Tenant]int
	dials  int
	wakes  int
}

type carrierEvent struct {
	at time.Time
	do func()
}

func (c *carrier) SetGates(gates ...schedule.Gate) {
	for _, g := range gates {
		c.s.SetGate(g, c.now)
	}
}

func (c *carrier) KeepGates(owner string, numbers map[uint64]bool) {
	for _, n := range c.s.Gates(owner) {
		if !numbers[n] {
			c.s.DropGate(schedule.GateID{Owner: owner, Number: n}, c.now)
		}
	}
}

func (c *carrier) Recall(name string) { c.s.Recall(name, c.now) }

// newCarrier has mail of tenants, each of which may go over both sources, 10 a
// second over each.
func newCarrier(t *testing.T, tenants []ids.Tenant, brakes ...policy.Brake) *carrier {
	c := &carrier{world: newWorld(t), s: schedule.New(schedule.Limits{MaxResolvesInFlight: 1}),
		keys: make(map[schedule.Queue]schedule.Key), open: make(map[schedule.Session]*engine.Place), sent: make(map[ids.Source]map[ids.Tenant]int)}
	c.k.gates = c
	c.s.SetPool(pool, []schedule.Source{{ID: sourceA, Weight: 1}, {ID: sourceB, Weight: 1}})
	c.view(brakes...)
	for i, of := range tenants {
		c.keys[schedule.Queue(i+1)] = schedule.Key{Tenant: of, Pool: pool, Domain: "gmail.example"}
		c.head(schedule.Queue(i + 1))
	}
	return c
}

func (c *carrier) head(n schedule.Queue) { c.s.SetHead(n, c.keys[n], c.now, 1000, c.now) }

func (c *carrier) after(d time.Duration, do func()) {
	c.events = append(c.events, carrierEvent{c.now.Add(d), do})
	slices.SortStableFunc(c.events, func(a, b carrierEvent) int { return a.at.Compare(b.at) })
}

// run plays for a while and forgets what was sent before.
func (c *carrier) run(span time.Duration) {
	c.t.Helper()
	c.sent = map[ids.Source]map[ids.Tenant]int{sourceA: {}, sourceB: {}}
	c.dials, c.wakes = 0, 0
	for end := c.now.Add(span); ; c.wakes++ {
		for effects := c.s.Next(c.now); len(effects) > 0; effects = c.s.Next(c.now) {
			for _, f := range slices.Clone(effects) {
				c.act(f)
			}
		}
		at := c.s.Wake()
		var due func()
		if len(c.events) > 0 && (at.IsZero() || !c.events[0].at.After(at)) {
			at, due = c.events[0].at, c.events[0].do
		}
		if at.IsZero() || at.After(end) {
			c.now = end
			return
		}
		if c.wakes > 100_000 {
			c.t.Fatal("it polls")
		}
		if c.now = at; due != nil {
			c.events = c.events[1:]
			due()
		}
	}
}

func (c *carrier) act(f schedule.Effect) {
	switch f.Kind {
	case schedule.Resolve:
		c.s.Routed(f.Domain, schedule.Route{Provider: "google", Site: "mx", Shape: schedule.Shape{SourceMessageRate: schedule.Rate{Max: 10, Per: time.Second, Burst: 1}}, Expires: c.now.Add(24 * time.Hour)}, c.now)
	case schedule.Open:
		p := &engine.Place{Lane: f.Lane, Key: c.keys[f.Queue]}
		c.dials++
		c.head(f.Queue)
		c.s.Started(f.Session)
		if h := c.k.Connect(c.now, p); h.Reason != "" {
			c.s.Ended(f.Session)
			c.putOff(f.Queue, h)
			return
		}
		c.k.look() // the lane may be new
		c.open[f.Session] = p
		c.after(10*time.Millisecond, func() {
			c.s.Opened(f.Session)
			c.carry(f.Session, f.Queue)
		})
	case schedule.Dispatch:
		c.head(f.Queue)
		c.s.Started(f.Session)
		c.carry(f.Session, f.Queue)
	case schedule.Close:
		c.s.Ended(f.Session)
	}
}

// putOff is what the engine does with mail that was refused.
func (c *carrier) putOff(n schedule.Queue, h engine.Hold) {
	until := h.Until
	switch {
	case !h.Look.IsZero():
		until = h.Look
	case until.IsZero():
		until = c.now.Add(time.Second)
	}
	c.s.PutOff(n, h, until, c.now)
}

func (c *carrier) carry(id schedule.Session, n schedule.Queue) {
	p := c.open[id]
	p.Key = c.keys[n]
	if h := c.k.Begin(c.now, p); h.Reason != "" {
		c.s.NotStarted(id)
		c.putOff(n, h)
	} else {
		c.k.Done(c.now, p, []relay.Outcome{{Status: relay.Delivered, Reply: ok}})
		c.sent[p.Lane.Source][p.Key.Tenant]++
	}
	c.after(10*time.Millisecond, func() {
		switch n, answer := c.s.NextFor(id, c.now); answer {
		case schedule.Work:
			c.head(n)
			c.s.Started(id)
			c.carry(id, n)
		case schedule.End:
			c.s.Ended(id)
		}
	})
}

// Mail that a brake holds on one source leaves over the other one as fast as that
// may, and other mail is not concerned.
func TestABrakeOfSomeMailOfASourceCostsTheOtherSourceNothing(t *testing.T) {
	hold := policy.Brake{ID: ids.Brake{7}, Source: sourceA, Tenant: tenant, Cause: "complaints", Owner: "anna"}
	byDomain := policy.Brake{ID: ids.Brake{8}, Source: sourceA, Domain: "gmail.example", Cause: "complaints", Owner: "anna"}
	slow := policy.Brake{ID: ids.Brake{9}, Source: sourceA, Provider: "google", Tenant: tenant, Percent: 1, Cause: "complaints", Owner: "anna"} // 600 an hour
	for _, c := range []struct {
		name    string
		tenants []ids.Tenant
		brake   policy.Brake
		a, b    int // in a minute, of the tenant
		others  int // likewise over both
	}{
		{"held, alone", []ids.Tenant{tenant}, hold, 0, 600, 0},
		{"a domain held, alone", []ids.Tenant{tenant}, byDomain, 0, 600, 0},
		{"slowed down, alone", []ids.Tenant{tenant}, slow, 10, 600, 0},
		{"held, beside another one's", []ids.Tenant{tenant, other}, hold, 0, 600, 600},
	} {
		t.Run(c.name, func(t *testing.T) {
			w := newCarrier(t, c.tenants, c.brake)
			w.run(10 * time.Second)
			w.run(time.Minute)
			a, b, others := w.sent[sourceA][tenant], w.sent[sourceB][tenant], w.sent[sourceA][other]+w.sent[sourceB][other]
			if near := func(n, want int) bool { return n >= want*9/10 && n <= want*11/10 }; !near(a, c.a) || !near(b, c.b) || !near(others, c.others) {
				t.Errorf("%d over the source with the brake, want %d; %d over the other, want %d; %d of others, want %d", a, c.a, b, c.b, others, c.others)
			}
			w.view()
			w.run(10 * time.Second)
			if n := w.sent[sourceA][tenant] + w.sent[sourceA][other]; n < 90 {
				t.Errorf("%d over the source after the brake", n)
			}
		})
	}
}

// With all sources braked the mail waits for the brakes, and nothing looks at it
// meanwhile.
func TestMailThatNoSourceMayCarryWaits(t *testing.T) {
	var brakes []policy.Brake
	for i, source := range []ids.Source{sourceA, sourceB} {
		brakes = append(brakes, policy.Brake{ID: ids.Brake{byte(7 + i)}, Source: source, Tenant: tenant, Cause: "complaints", Owner: "anna", Until: start.Add(time.Hour)})
	}
	w := newCarrier(t, []ids.Tenant{tenant}, brakes...)
	w.run(10 * time.Second)
	w.run(10 * time.Minute)
	if w.dials > 0 || w.wakes > 0 || !w.s.Wake().IsZero() {
		t.Errorf("%d sessions were begun, it was looked at %d times, and will be at %v", w.dials, w.wakes, w.s.Wake())
	}
	why := w.s.Why(1, w.now)
	h, known := w.k.Explain(why.Gate)
	if why.Reason != "brake" || !known || !strings.Contains(h.Text, "a brake of anna holds it: complaints") || !h.Until.Equal(start.Add(time.Hour)) {
		t.Errorf("it waits for %+v: %+v", why, h)
	}
	w.view(brakes[0])
	w.run(time.Minute)
	if a, b := w.sent[sourceA][tenant], w.sent[sourceB][tenant]; a > 0 || b < 540 {
		t.Errorf("%d over the source with the brake, %d over the other", a, b)
	}
}
