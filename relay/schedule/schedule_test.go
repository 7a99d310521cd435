package schedule

import (
	"testing"
	"time"

	"github.com/relais-mta/relais/shared/ids"
	"github.com/relais-mta/relais/shared/policy"
)

func TestSmallTenantIsNotBehindALargeOne(t *testing.T) {
	w := newWorld(t, 1, Limits{})
	w.s.SetPool(testPool(1), sources(1))
	w.route("big.test", "big", "mx", Shape{SourceConnections: 1, SourceMessageRate: Rate{Max: 10, Per: time.Second, Burst: 1}})
	w.add(1, testKey(1, policy.Bulk, "big.test"), 100_000)
	w.add(2, testKey(2, policy.Bulk, "big.test"), 100)
	w.run(30 * time.Second)
	if left := w.queues[2].waiting; left > 0 {
		t.Errorf("after 300 turns the small tenant still has %d of 100 messages waiting", left)
	}
}

func TestWeightsShareNewSessions(t *testing.T) {
	w := newWorld(t, 1, Limits{})
	w.s.SetPool(testPool(1), []Source{{ID: ids.Source{15: 1}, Weight: 3}, {ID: ids.Source{15: 2}, Weight: 1}})
	w.route("a.test", "a", "mx", Shape{MessagesPerConnection: 1})
	w.add(1, testKey(1, policy.Bulk, "a.test"), 400)
	w.run(time.Hour)
	heavy := len(w.sent[Lane{Source: ids.Source{15: 1}, Provider: "a"}])
	if heavy < 290 || heavy > 310 {
		t.Errorf("the source of weight 3 of 4 sent %d of 400 messages", heavy)
	}
}

func TestSourceThatLeavesThePoolIsUsedNoMore(t *testing.T) {
	w := newWorld(t, 1, Limits{})
	w.s.SetPool(testPool(1), sources(2))
	w.route("a.test", "a", "mx", Shape{SourceConnections: 2})
	w.add(1, testKey(1, policy.Bulk, "a.test"), 2000)
	w.run(time.Second)
	gone := Lane{Source: ids.Source{15: 2}, Provider: "a"}
	w.s.SetPool(testPool(1), sources(1))
	before := len(w.sent[gone])
	if before == 0 {
		t.Fatal("the second source sent nothing while it was there")
	}
	w.run(time.Hour)
	if after := len(w.sent[gone]); after != before {
		t.Errorf("the source sent %d messages after it left", after-before)
	}
	if w.queues[1].waiting != 0 {
		t.Error("the rest was not sent by the other source")
	}
}

func TestPinnedWorkWaitsForItsLane(t *testing.T) {
	w := newWorld(t, 1, Limits{})
	w.s.SetPool(testPool(1), sources(2))
	w.route("a.test", "a", "mx", Shape{SourceConnections: 1})
	lane := Lane{Source: ids.Source{15: 2}, Provider: "a"}
	key := testKey(1, policy.Bulk, "a.test")
	w.add(1, key, 50)
	w.queues[9] = &worldQueue{key: key, waiting: 1, due: w.now}
	w.s.SetPinnedHead(9, key, lane, w.now, 1, w.now)
	w.run(time.Minute)
	for _, st := range w.starts {
		if st.queue == 9 && st.lane != lane {
			t.Errorf("pinned work went out on %+v, want %+v", st.lane, lane)
		}
	}
	if w.queues[9].waiting != 0 || w.queues[1].waiting != 0 {
		t.Error("work was left behind")
	}
}

func TestRefusedDomain(t *testing.T) {
	s := New(Limits{})
	now := time.Unix(1_800_000_000, 0)
	key := testKey(1, policy.Bulk, "null.test")
	s.SetHead(1, key, now, 1, now)
	f := s.Next(now)
	if len(f) != 1 || f[0].Kind != Resolve {
		t.Fatalf("effects %+v, want one look-up", f)
	}
	s.Undeliverable(key.Domain, now.Add(time.Minute))
	if f = s.Next(now); len(f) != 1 || f[0].Kind != Refuse || f[0].Queue != 1 {
		t.Fatalf("effects %+v, want a refusal", f)
	}
	s.SetHead(1, key, time.Time{}, 0, now)
	s.SetHead(1, key, now, 1, now)
	if f = s.Next(now); len(f) != 1 || f[0].Kind != Refuse {
		t.Fatalf("effects %+v: mail for a refused domain must not wait for a look-up", f)
	}
	later := now.Add(2 * time.Minute)
	s.SetHead(1, key, time.Time{}, 0, later)
	s.SetHead(1, key, later, 1, later)
	if f = s.Next(later); len(f) != 1 || f[0].Kind != Resolve {
		t.Fatalf("effects %+v: the refusal must end with its time", f)
	}
}

func TestUnroutableDomainWaitsForItsTimeAndKeepsAnOldRoute(t *testing.T) {
	s := New(Limits{})
	now := time.Unix(1_800_000_000, 0)
	key := testKey(1, policy.Bulk, "a.test")
	s.SetPool(testPool(1), sources(1))
	s.SetHead(1, key, now, 1, now)
	s.Next(now)
	s.Unroutable(key.Domain, now.Add(time.Minute))
	if f := s.Next(now.Add(time.Second)); len(f) != 0 {
		t.Fatalf("effects %+v before the time", f)
	}
	if w := s.Wake(); !w.Equal(now.Add(time.Minute)) {
		t.Fatalf("wakes at %v", w)
	}
	if got := s.Why(1, now); got.Reason != "dns" {
		t.Errorf("Why = %+v, want dns", got)
	}
	now = now.Add(time.Minute)
	if f := s.Next(now); len(f) != 1 || f[0].Kind != Resolve {
		t.Fatalf("effects %+v, want a look-up", f)
	}
	s.Routed(key.Domain, Route{Provider: "a", Site: "mx", Expires: now.Add(time.Second)}, now)
	if f := s.Next(now); len(f) != 1 || f[0].Kind != Open {
		t.Fatalf("effects %+v, want a session", f)
	}
	now = now.Add(time.Hour)
	s.SetHead(1, key, now, 1, now)
	kinds := map[EffectKind]bool{}
	for range 3 {
		for _, f := range s.Next(now) {
			kinds[f.Kind] = true
		}
	}
	if !kinds[Resolve] {
		t.Error("an expired route is not looked up again")
	}
	s.Unroutable(key.Domain, now.Add(time.Minute))
	if got := s.Why(1, now); got.Reason == "dns" || got.Reason == "resolve" {
		t.Errorf("Why = %+v: a domain that had a route must keep it while DNS fails", got)
	}
}

func TestSweepForgetsWhatIsUnused(t *testing.T) {
	w := newWorld(t, 1, Limits{})
	w.s.SetPool(testPool(1), sources(1))
	for i := range 50 {
		d := string(rune('a'+i%26)) + string(rune('a'+i/26)) + ".test"
		w.route(d, "mx:"+d, "mx."+d, Shape{SourceConnections: 1})
		w.add(Queue(i), testKey(1, policy.Bulk, d), 1)
	}
	w.run(time.Hour)
	for id := range w.sessions {
		w.end(id)
	}
	w.s.Next(w.now)
	w.now = w.now.Add(2 * time.Hour)
	w.s.Sweep(w.now)
	w.s.Next(w.now)
	w.now = w.now.Add(sweepAge)
	w.s.Sweep(w.now)
	if st := w.s.Stats(); st.Groups != 0 || st.Domains != 0 || len(w.s.relays) != 0 {
		t.Errorf("after a day of silence %+v and %d relay counters are kept", st, len(w.s.relays))
	}
}

// TestSweepForgetsTenants: what is known of tenants that have nothing to send
// does not grow with their number.
func TestSweepForgetsTenants(t *testing.T) {
	w := newWorld(t, 1, Limits{TransactionalReserve: 50})
	w.s.SetPool(testPool(1), sources(2))
	for i := range 200 {
		domain := "d" + string(rune('a'+i%20)) + ".test"
		w.route(domain, "p", domain, Shape{SourceConnections: 3, SourceMessageRate: Rate{Max: 50, Per: time.Second, Burst: 1}})
		w.add(Queue(i), testKey(byte(i), policy.Transactional, domain), 3)
	}
	w.run(time.Minute)
	for id := range w.sessions {
		w.end(id)
	}
	w.s.Next(w.now)
	w.now = w.now.Add(2 * provenFor)
	w.s.Sweep(w.now)
	for _, g := range w.s.groups {
		kept := len(g.members) + len(g.order) + len(g.open[general].entrants) + len(g.open[reserved].entrants)
		for _, l := range g.lanes {
			kept += len(l.idle[general].entrants) + len(l.idle[reserved].entrants)
		}
		if kept > 0 || len(w.s.queues) > 0 {
			t.Errorf("%d tenants, sites and their places are kept, and %d queues", kept, len(w.s.queues))
		}
	}
	w.add(1000, testKey(7, policy.Transactional, "da.test"), 10)
	w.run(time.Minute)
	if left := w.queues[1000].waiting; left > 0 {
		t.Errorf("%d of 10 mails were left behind after the sweep", left)
	}
}
