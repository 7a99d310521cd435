package schedule

import (
	"fmt"
	"math/rand/v2"
	"slices"
	"testing"
	"time"

	"github.com/relais-mta/relais/shared/ids"
	"github.com/relais-mta/relais/shared/mailaddr"
	"github.com/relais-mta/relais/shared/policy"
)

// gatedWorld has two tenants with mail to four domains of two providers, each
// domain with hosts of its own.
func gatedWorld(t *testing.T, each int) *world {
	w := newWorld(t, 1, Limits{MaxSessions: 100, MaxResolvesInFlight: 10})
	for p := range 2 {
		w.s.SetPool(testPool(byte(p+1)), []Source{{ID: ids.Source{14: byte(p), 15: 1}, Weight: 1}, {ID: ids.Source{14: byte(p), 15: 2}, Weight: 1}})
	}
	n := Queue(0)
	for d := range 4 {
		domain := fmt.Sprintf("d%d.test", d)
		w.route(domain, fmt.Sprint("p", d%2), fmt.Sprint("mx", d), Shape{})
		for tenant := range byte(2) {
			for p := range byte(2) {
				key := testKey(tenant+1, policy.Bulk, domain)
				key.Pool = testPool(p + 1)
				n++
				w.add(n, key, each)
			}
		}
	}
	return w
}

// startsOf returns when messages were started that something matches.
func (w *world) startsOf(m Match) (at []time.Time) {
	for _, s := range w.starts {
		key := w.queues[s.queue].key
		if m.queue(&key, s.lane.Provider) && (m.Source.IsZero() || m.Source == s.lane.Source) {
			at = append(at, s.at)
		}
	}
	return at
}

func TestAGateHoldsWhatItMatchesAndNothingElse(t *testing.T) {
	rate := Rate{Max: 10, Per: time.Second, Burst: 3}
	for name, m := range map[string]Match{
		"provider":              {Provider: "p1"},
		"pool":                  {Pool: testPool(1)},
		"everything":            {},
		"tenant":                {Tenant: ids.Tenant{15: 1}},
		"tenant and provider":   {Tenant: ids.Tenant{15: 1}, Provider: "p0"},
		"domain":                {Domain: "d2.test"},
		"tenant and domain":     {Tenant: ids.Tenant{15: 2}, Domain: "d2.test"},
		"domain and pool":       {Domain: "d2.test", Pool: testPool(2)},
		"source":                {Source: ids.Source{14: 1, 15: 1}},
		"source and provider":   {Source: ids.Source{14: 1, 15: 1}, Provider: "p1"},
		"source and tenant":     {Source: ids.Source{14: 1, 15: 1}, Tenant: ids.Tenant{15: 1}},
		"source and domain":     {Source: ids.Source{14: 0, 15: 2}, Domain: "d2.test"},
		"source and all else":   {Source: ids.Source{14: 1, 15: 1}, Tenant: ids.Tenant{15: 1}, Domain: "d3.test", Provider: "p1", Pool: testPool(2)},
		"what there is none of": {Tenant: ids.Tenant{15: 9}},
	} {
		t.Run(name, func(t *testing.T) {
			w := gatedWorld(t, 50)
			began := w.now
			w.s.SetGate(Gate{ID: GateID{"test", 1}, Match: m, Reason: "limit", Messages: rate}, w.now)
			w.run(10 * time.Second)
			held := w.startsOf(m)
			checkWindow(t, "messages through the gate", held, rate)
			matched := 0
			for _, q := range w.queues {
				if m.queue(&q.key, w.routes[q.key.Domain].Provider) {
					matched += 50
				}
			}
			if !m.Source.IsZero() {
				matched = len(held) // what one lane does not take the others do
			}
			if want := min(matched, 99); len(held) < want || len(held) > 103 {
				t.Errorf("%d messages passed the gate in 10 s, want %d", len(held), want)
			}
			// All else is done in the time it takes without a gate.
			if others := len(w.starts) - len(held); others != 16*50-matched {
				t.Errorf("%d others of %d were sent", others, 16*50-matched)
			}
			for _, s := range w.starts {
				if key := w.queues[s.queue].key; !m.queue(&key, s.lane.Provider) && s.at.Sub(began) > 5*time.Second {
					t.Fatalf("mail that the gate does not match was sent after %v", s.at.Sub(began))
				}
			}
			w.s.DropGate(GateID{"test", 1}, w.now)
			w.run(time.Minute)
			if w.done != 16*50 {
				t.Fatalf("%d of %d; stuck: %s", w.done, 16*50, w.stuck())
			}
		})
	}
}

// Tenants have equal parts of what passes, whoever has more queues.
func TestTenantsShareAGate(t *testing.T) {
	w := newWorld(t, 1, Limits{MaxSessions: 100, MaxResolvesInFlight: 10})
	w.s.SetPool(testPool(1), sources(2))
	w.s.SetGate(Gate{ID: GateID{"test", 1}, Match: Match{Provider: "p"}, Messages: Rate{Max: 20, Per: time.Second, Burst: 1}, Reason: "limit"}, w.now)
	for d := range 52 {
		domain, tenant := fmt.Sprintf("d%d.test", d), byte(1)
		if d >= 50 {
			tenant = 2
		}
		w.route(domain, "p", fmt.Sprint("mx", d), Shape{})
		w.add(Queue(1+d), testKey(tenant, policy.Bulk, domain), 200)
	}
	w.run(20 * time.Second)
	one, two := len(w.startsOf(Match{Tenant: ids.Tenant{15: 1}})), len(w.startsOf(Match{Tenant: ids.Tenant{15: 2}}))
	if two < 190 || one < 190 {
		t.Errorf("a tenant of 50 queues had %d messages, one of 2 had %d", one, two)
	}
}

// Behind a tenant's gate its transactional mail goes first, and its streams take
// turns whatever they have queued.
func TestStreamsTakeTurnsAtATenantsGate(t *testing.T) {
	w := newWorld(t, 1, Limits{MaxSessions: 100, MaxResolvesInFlight: 10})
	w.s.SetPool(testPool(1), sources(2))
	n := Queue(0)
	add := func(stream string, kind policy.StreamKind, queues int) {
		for d := range queues {
			domain := fmt.Sprintf("d%d.test", d)
			w.route(domain, "p", fmt.Sprint("mx", d%20), Shape{})
			key := testKey(1, kind, domain)
			key.Stream = stream
			n++
			w.add(n, key, 100)
		}
	}
	add("news", policy.Bulk, 200)
	add("receipts", policy.Bulk, 2)
	add("login", policy.Transactional, 1)
	w.s.SetGate(Gate{ID: GateID{"test", 1}, Match: Match{Tenant: ids.Tenant{15: 1}}, Messages: Rate{Max: 10, Per: time.Second, Burst: 1}, Reason: "limit"}, w.now)
	w.run(20 * time.Second)
	by := map[string]int{}
	for _, s := range w.starts {
		by[w.queues[s.queue].key.Stream]++
	}
	if by["login"] != 100 && by["login"] < 140 || by["receipts"] < 15 || by["news"] < 15 {
		t.Errorf("%v", by)
	}
}

func TestSessionsThroughAGate(t *testing.T) {
	for name, m := range map[string]Match{
		"provider": {Provider: "p1"}, "pool": {Pool: testPool(2)}, "tenant": {Tenant: ids.Tenant{15: 1}},
		"domain": {Domain: "d2.test"}, "source": {Source: ids.Source{14: 1, 15: 1}},
	} {
		t.Run(name, func(t *testing.T) {
			w := gatedWorld(t, 100)
			gate := Gate{ID: GateID{"test", 1}, Match: m, Slots: true, Reason: "limit", Sessions: 2}
			w.s.SetGate(gate, w.now)
			most := 0
			w.onCheck = func() {
				open := w.carrying(m)
				most = max(most, open)
				if gt := w.s.gates.all[gate.ID]; gt != nil && gate.Sessions > 0 && open > max(gate.Sessions, w.allowed) {
					t.Fatalf("%d sessions, allowed %d", open, gate.Sessions)
				}
				w.allowed = min(w.allowed, open)
			}
			w.run(time.Second)
			// Fewer: what is open ends after its message, and idle ones at once.
			gate.Sessions, w.allowed = 1, 2
			w.s.SetGate(gate, w.now)
			w.run(500 * time.Millisecond)
			if open := w.carrying(m); open > 1 {
				t.Errorf("%d sessions half a second after one was allowed", open)
			}
			gate.Sessions, gate.NoSessions, w.allowed = 0, true, 1
			w.s.SetGate(gate, w.now)
			w.run(500 * time.Millisecond)
			if open := w.carrying(m); open > 0 {
				t.Errorf("%d sessions half a second after none was allowed", open)
			}
			gate.Sessions, gate.NoSessions = 2, false
			w.s.SetGate(gate, w.now)
			w.run(10 * time.Minute)
			if w.done != 16*100 {
				t.Fatalf("%d of %d; stuck: %s", w.done, 16*100, w.stuck())
			}
			if most != 2 {
				t.Errorf("at most %d sessions at once, 2 are allowed", most)
			}
		})
	}
}

// carrying counts the sessions that a gate of sessions counts.
func (w *world) carrying(m Match) (n int) {
	for _, ss := range w.sessions {
		key := w.queues[ss.queue].key
		if m.queue(&key, ss.lane.Provider) && (m.Source.IsZero() || m.Source == ss.lane.Source) {
			n++
		}
	}
	return n
}

// Of two gates in front of the same mail the one that holds it says so.
func TestTheGateThatHoldsMailSaysSo(t *testing.T) {
	for name, m := range map[string]Match{"provider": {Provider: "p1"}, "tenant": {Tenant: ids.Tenant{15: 1}}} {
		t.Run(name, func(t *testing.T) {
			w := gatedWorld(t, 10)
			rate, slots := GateID{"test", 1}, GateID{"test", 2}
			w.s.SetGate(Gate{ID: slots, Match: m, Slots: true, Reason: "limit", NoSessions: true}, w.now)
			w.s.SetGate(Gate{ID: rate, Match: m, Reason: "limit", Messages: Rate{Max: 100, Per: time.Second, Burst: 10}}, w.now)
			held := func() (rate, slots bool) {
				for _, g := range w.s.GateStates("test", nil) {
					if g.Waiting == 0 {
						t.Errorf("nothing waits behind %+v", g)
					}
					rate, slots = rate || g.Number == 1 && g.Held, slots || g.Number == 2 && g.Held
				}
				return rate, slots
			}
			w.run(10 * time.Second)
			if rate, slots := held(); rate || !slots {
				t.Errorf("without a session: held by the rate %v, by the sessions %v", rate, slots)
			}
			w.s.SetGate(Gate{ID: slots, Match: m, Slots: true, Reason: "limit"}, w.now)
			w.s.SetGate(Gate{ID: rate, Match: m, Reason: "limit", NoMessages: true}, w.now)
			w.run(time.Second)
			if rate, slots := held(); !rate || slots {
				t.Errorf("with a rate of nothing: held by the rate %v, by the sessions %v", rate, slots)
			}
		})
	}
}

func TestAShutGateOpens(t *testing.T) {
	for name, m := range map[string]Match{"provider": {Provider: "p1"}, "tenant": {Tenant: ids.Tenant{15: 1}}, "source": {Source: ids.Source{14: 1, 15: 1}},
		"source and tenant": {Source: ids.Source{14: 1, 15: 1}, Tenant: ids.Tenant{15: 1}}} {
		t.Run(name, func(t *testing.T) {
			w := gatedWorld(t, 10)
			gate := Gate{ID: GateID{"test", 1}, Match: m, Reason: "brake", NoMessages: true, Until: w.now.Add(time.Minute)}
			w.s.SetGate(gate, w.now)
			w.run(10 * time.Second)
			if n := len(w.startsOf(m)); n > 0 {
				t.Fatalf("%d messages passed", n)
			}
			if m.Source.IsZero() {
				if got := w.s.GateStates("test", nil); len(got) != 1 || got[0].Number != 1 || got[0].Waiting != 80 || !got[0].Held {
					t.Errorf("half of all mail waits for it: %+v", got)
				}
			}
			if m.Source.IsZero() {
				for n, q := range w.queues {
					why := w.s.Why(n, w.now)
					if m.queue(&q.key, w.routes[q.key.Domain].Provider) != (why.Reason == "brake") || why.Reason == "brake" && (why.Gate != gate.ID || !why.Until.Equal(gate.Until)) {
						t.Errorf("queue %+v waits for %+v", q.key, why)
					}
				}
			}
			held := 0
			for _, l := range w.s.LaneStates(w.now) {
				if l.Hold == "brake" && l.Gate == gate.ID {
					held++
				}
			}
			if held == 0 && m.Source.IsZero() {
				t.Error("no lane is shown as held")
			}
			w.run(2 * time.Minute) // its owner did not open it at the time it named: nothing spins
			gate.NoMessages = false
			w.s.SetGate(gate, w.now)
			w.run(time.Minute)
			if w.done != 16*10 {
				t.Fatalf("%d of %d; stuck: %s", w.done, 16*10, w.stuck())
			}
		})
	}
}

// Random gates come, change and go in random worlds; when the last is gone all
// mail has been sent.
func TestRandomGatesLoseNothing(t *testing.T) {
	for seed := range uint64(150) {
		t.Run(fmt.Sprint(seed), func(t *testing.T) {
			w, total := randomWorld(t, seed)
			rng := rand.New(rand.NewPCG(seed, 9))
			for range 60 {
				w.after(time.Duration(rng.IntN(6000))*time.Millisecond, func() { w.s.SetGate(randomGate(rng), w.now) })
			}
			for i := range uint64(12) {
				w.after(time.Duration(3000+rng.IntN(5000))*time.Millisecond, func() { w.s.DropGate(GateID{"test", i}, w.now) })
				w.after(9*time.Second, func() { w.s.DropGate(GateID{"test", i}, w.now) })
			}
			w.onCheck = w.checkGates
			w.onStart = w.checkBars
			w.run(time.Hour)
			if w.done != total {
				t.Fatalf("%d of %d messages were sent; stuck: %s", w.done, total, w.stuck())
			}
			w.checkRates()
			if len(w.s.gates.all) > 0 || len(w.s.gates.timers.items) > 0 {
				t.Errorf("left: %d gates, %d timers", len(w.s.gates.all), len(w.s.gates.timers.items))
			}
		})
	}
}

func randomGate(rng *rand.Rand) Gate {
	g := Gate{ID: GateID{"test", rng.Uint64N(12)}, Reason: "limit", Slots: rng.IntN(3) == 0}
	switch rng.IntN(8) {
	case 0:
		g.Match.Provider = fmt.Sprint("p", rng.IntN(3))
	case 1:
		g.Match.Tenant = ids.Tenant{15: byte(rng.IntN(3))}
	case 2:
		g.Match.Domain = mailaddr.Domain(fmt.Sprintf("d%d.p%d.test", rng.IntN(3), rng.IntN(3)))
	case 3:
		g.Match.Pool = testPool(byte(1 + rng.IntN(2)))
	case 4:
		g.Match.Source = ids.Source{14: byte(rng.IntN(2)), 15: byte(1 + rng.IntN(3))}
	case 5:
		g.Match.Tenant, g.Match.Provider = ids.Tenant{15: byte(rng.IntN(3))}, fmt.Sprint("p", rng.IntN(3))
	case 6:
		g.Match.Source, g.Match.Tenant, g.Slots = ids.Source{14: byte(rng.IntN(2)), 15: byte(1 + rng.IntN(3))}, ids.Tenant{15: byte(rng.IntN(3))}, false
	case 7:
		g.Match.Source, g.Match.Domain, g.Slots = ids.Source{14: byte(rng.IntN(2)), 15: byte(1 + rng.IntN(3))}, mailaddr.Domain(fmt.Sprintf("d%d.p%d.test", rng.IntN(3), rng.IntN(3))), false
	}
	switch {
	case g.Slots && rng.IntN(3) == 0:
		g.NoSessions = true
	case g.Slots:
		g.Sessions = 1 + rng.IntN(3)
	case rng.IntN(3) == 0:
		g.NoMessages = true
	default:
		g.Messages = Rate{Max: 5 + rng.IntN(50), Per: time.Second, Burst: 1 + rng.IntN(5)}
	}
	return g
}

// checkGates asserts that the counts of gates are those of what they count.
func (w *world) checkGates() {
	for id, gt := range w.s.gates.all {
		open, parked, waiting := 0, 0, 0
		for _, ss := range w.s.sessions {
			if slices.Contains(ss.gates, gt) {
				open++
			}
		}
		for _, q := range w.s.queues {
			if q.gated == gt {
				parked++
			}
			if slices.Contains(q.gates, gt) && q.ready {
				waiting += q.waiting
			}
		}
		for i := gt.barred.head; i < len(gt.barred.items); i++ {
			if !slices.Contains(gt.barred.items[i].barredAt, gt) {
				w.t.Fatalf("a site waits for gate %v and does not know it", id)
			}
		}
		if open != gt.sessions || waiting != gt.waiting || parked != gt.parked || gt.closing < 0 {
			w.t.Fatalf("gate %v counts %d sessions of %d, %d queues of %d, %d recipients of %d", id, gt.sessions, open, gt.parked, parked, gt.waiting, waiting)
		}
	}
	for _, g := range w.s.groups {
		waiting := 0
		for _, st := range g.order {
			waiting += st.backlog + st.gated
			for _, gt := range st.barredAt {
				if gt.gone || !slices.Contains(gt.barred.items[gt.barred.head:], st) {
					w.t.Fatalf("a site thinks that it waits for gate %v", gt.ID)
				}
			}
		}
		if waiting != g.waiting {
			w.t.Fatalf("the group of %s counts %d recipients of %d", g.key.provider, g.waiting, waiting)
		}
	}
}

func TestARightThatWasNotUsedIsGivenBack(t *testing.T) {
	now := time.Unix(1_800_000_000, 0)
	s := New(Limits{})
	s.SetPool(testPool(1), sources(1))
	key := testKey(1, policy.Bulk, "d.test")
	s.SetGate(Gate{ID: GateID{"test", 1}, Match: Match{Provider: "p"}, Messages: Rate{Max: 1, Per: time.Hour, Burst: 1}, Reason: "limit"}, now)
	s.SetHead(1, key, now, 2, now)
	s.Next(now)
	shape := Shape{SourceMessageRate: Rate{Max: 1, Per: time.Hour, Burst: 1}, RelayMessageRate: Rate{Max: 1, Per: time.Hour, Burst: 1}}
	s.Routed("d.test", Route{Provider: "p", Site: "mx", Shape: shape, Expires: now.Add(24 * time.Hour)}, now)
	now = now.Add(time.Hour) // the gate begins empty
	opened := s.Next(now)
	if len(opened) != 1 || opened[0].Kind != Open {
		t.Fatalf("%+v", opened)
	}
	id := opened[0].Session
	s.Opened(id)
	// The mail turned out to be held: the session asks on, and has the right still.
	s.SetHead(1, key, now, 1, now)
	if n, answer := s.NextFor(id, now); answer != Work || n != 1 {
		t.Fatalf("%v %v", n, answer)
	}
	s.Started(id)
	s.SetHead(1, key, now, 1, now)
	if _, answer := s.NextFor(id, now); answer != Park {
		t.Fatalf("it was begun, so the right is spent: %v", answer)
	}
	if why := s.Why(1, now); why.Reason != holdRate {
		t.Errorf("%+v", why)
	}
}
