package schedule

import (
	"fmt"
	"testing"
	"time"

	"github.com/relais-mta/relais/shared/ids"
	"github.com/relais-mta/relais/shared/policy"
)

// checkBars asserts that the message that was started last has no bar on its lane.
func (w *world) checkBars(n Queue) {
	lane, key := w.starts[len(w.starts)-1].lane, w.queues[n].key
	for id, gt := range w.s.gates.all {
		if gt.Match.ofMailOfASource() && gt.NoMessages && gt.Match.Source == lane.Source && gt.Match.queue(&key, lane.Provider) {
			w.t.Fatalf("a message of queue %d was begun on %+v, which gate %v keeps it from", n, lane, id)
		}
	}
}

// hold is a gate that keeps a tenant's mail from a source of sources.
func hold(number uint64, source byte) Gate {
	return Gate{ID: GateID{"test", number}, Match: Match{Source: ids.Source{15: source}, Tenant: ids.Tenant{15: 1}}, Reason: "brake", NoMessages: true}
}

// Mail that may not go over one lane has the others as fast as these may, whatever
// limits them, and each wait is named by what it is for.
func TestMailWithABarHasTheOtherLanes(t *testing.T) {
	rate := Rate{Max: 10, Per: time.Second, Burst: 1}
	for _, c := range []struct {
		name  string
		shape Shape
		sent  int // in a minute over the other lane
		why   string
	}{
		{"a rate of each source", Shape{SourceMessageRate: rate}, 600, holdRate},
		{"a rate of the relay", Shape{RelayMessageRate: rate}, 600, holdRate},
		{"one connection of each source", Shape{SourceConnections: 1}, 1200, holdSourceConnections},
		{"short connections", Shape{SourceConnections: 1, MessagesPerConnection: 3}, 900, holdSourceConnections},
	} {
		t.Run(c.name, func(t *testing.T) {
			w := newWorld(t, 1, Limits{MaxSessions: 100, MaxResolvesInFlight: 1})
			w.s.SetPool(testPool(1), sources(2))
			w.route("d.test", "p", "mx", c.shape)
			w.dials["mx"], w.takes["mx"] = 50*time.Millisecond, 50*time.Millisecond
			w.s.SetGate(hold(1, 1), w.now)
			w.onStart = w.checkBars
			w.add(1, testKey(1, policy.Bulk, "d.test"), 1_000_000)
			w.run(10 * time.Second)
			before := len(w.starts)
			w.run(time.Minute)
			if n := len(w.starts) - before; n < c.sent*95/100 || n > c.sent*105/100 {
				t.Errorf("%d messages in a minute, want %d", n, c.sent)
			}
			if why := w.s.Why(1, w.now); why.Reason != c.why && why.Reason != "session" || why.Lane.Source == (ids.Source{15: 1}) {
				t.Errorf("it waits for %+v", why)
			}
			// With the bar all lanes are its again, and those it has are used.
			w.s.DropGate(GateID{"test", 1}, w.now)
			w.run(10 * time.Second)
			if len(w.sent[Lane{Source: ids.Source{15: 1}, Provider: "p"}]) == 0 {
				t.Error("the lane is not used after the bar")
			}
		})
	}
}

// With a bar on every lane mail waits for its owner, and nothing looks at it.
func TestMailWithABarOnEveryLane(t *testing.T) {
	w := newWorld(t, 1, Limits{MaxSessions: 100, MaxResolvesInFlight: 1})
	w.s.SetPool(testPool(1), sources(3))
	w.route("d.test", "p", "mx", Shape{})
	w.onStart = w.checkBars
	for i := range byte(3) {
		w.s.SetGate(hold(uint64(i), i+1), w.now)
	}
	w.add(1, testKey(1, policy.Bulk, "d.test"), 100)
	w.add(2, testKey(2, policy.Bulk, "d.test"), 100)
	w.run(time.Minute)
	if w.done != 100 || w.queues[2].waiting > 0 {
		t.Errorf("%d messages were sent, want the 100 of the other tenant", w.done)
	}
	if wake := w.s.Wake(); !wake.IsZero() {
		t.Errorf("it is looked at in %v", wake.Sub(w.now))
	}
	if why := w.s.Why(1, w.now); why.Reason != "brake" || why.Gate.Owner != "test" || why.Lane.Source.IsZero() {
		t.Errorf("it waits for %+v", why)
	}
	for _, l := range w.s.LaneStates(w.now) {
		if l.Hold != "brake" || l.Gate != (GateID{"test", uint64(l.Lane.Source[15] - 1)}) {
			t.Errorf("a lane waits for %+v", l)
		}
	}
	// What is opened of one is a rate: it is the one time at which it goes on.
	g := hold(2, 3)
	g.NoMessages, g.Messages = false, Rate{Max: 1, Per: time.Hour, Burst: 1}
	w.s.SetGate(g, w.now)
	w.run(time.Minute)
	if wake := w.s.Wake(); w.done != 100 || !wake.Equal(w.now.Add(59*time.Minute).Add(-10*time.Second)) && wake.Sub(w.now) != 59*time.Minute {
		t.Errorf("%d were sent, it is looked at in %v, want 59m", w.done, wake.Sub(w.now))
	}
	if why := w.s.Why(1, w.now); why.Reason != "brake" || why.Gate != (GateID{"test", 2}) || why.Until.Sub(w.now) != 59*time.Minute {
		t.Errorf("it waits for %+v", why)
	}
	w.run(59 * time.Minute)
	if w.done != 101 {
		t.Errorf("%d were sent after an hour, want 101", w.done)
	}
	w.s.DropGate(GateID{"test", 0}, w.now)
	w.run(time.Minute)
	if w.done != 200 {
		t.Errorf("%d were sent after a bar ended; stuck: %s", w.done, w.stuck())
	}
}

// Many hosts that wait for one rate go in turn, one for each message that it lets
// pass: nobody is looked at in vain.
func TestSitesWaitForTheRateOfABarInTurn(t *testing.T) {
	const hosts = 300
	w := newWorld(t, 1, Limits{MaxResolvesInFlight: hosts})
	w.s.SetPool(testPool(1), sources(1))
	g := hold(1, 1)
	g.NoMessages, g.Messages = false, Rate{Max: 1, Per: time.Second, Burst: 1}
	w.s.SetGate(g, w.now)
	for i := range hosts {
		domain := fmt.Sprintf("d%d.test", i)
		w.route(domain, "p", domain, Shape{})
		w.add(Queue(i), testKey(1, policy.Bulk, domain), 2)
	}
	w.run(time.Second)
	w.run(hosts * time.Second)
	by := map[Queue]int{}
	for _, s := range w.starts {
		by[s.queue]++
	}
	if w.done < hosts-5 || len(by) < hosts-5 {
		t.Errorf("%d messages of %d hosts in %d s at one a second", w.done, len(by), hosts)
	}
	at := w.s.gates.all[g.ID].barred.len()
	w.now = w.s.Wake()
	w.s.Next(w.now)
	if left := w.s.gates.all[g.ID].barred.len(); at < 10 || left != at-1 && left != at {
		t.Errorf("of %d that waited %d wait after one message", at, left)
	}
}

// What is known of mail with a bar is forgotten with the mail, however long the bar
// lasts.
func TestSitesWithABarAreForgotten(t *testing.T) {
	for name, messages := range map[string]Rate{"held": {}, "slowed down": {Max: 1, Per: time.Second, Burst: 1}} {
		t.Run(name, func(t *testing.T) {
			w := newWorld(t, 1, Limits{MaxSessions: 50, MaxResolvesInFlight: 50})
			w.s.SetPool(testPool(1), sources(2))
			g := hold(1, 1)
			g.NoMessages, g.Messages = messages.Max == 0, messages
			w.s.SetGate(g, w.now)
			for i := range 100 {
				domain := fmt.Sprintf("d%d.test", i)
				w.route(domain, "p", domain, Shape{})
				w.add(Queue(i), testKey(1, policy.Bulk, domain), 3)
			}
			w.run(10 * time.Minute)
			if w.done != 300 {
				t.Fatalf("%d of 300 were sent; stuck: %s", w.done, w.stuck())
			}
			for id := range w.sessions {
				w.end(id) // they were idle for long
			}
			w.run(provenFor)
			w.s.Sweep(w.now)
			for _, grp := range w.s.groups {
				if len(grp.order)+len(grp.sites) > 0 {
					t.Errorf("%d sites are left", len(grp.order))
				}
			}
			if n := w.s.gates.all[g.ID].barred.len(); n > 0 {
				t.Errorf("%d sites wait still", n)
			}
		})
	}
}

// Mail that waits for one lane and has a bar there does not have sessions opened
// elsewhere.
func TestPinnedMailWithABar(t *testing.T) {
	opened := func(pinned bool) (n int) {
		w := newWorld(t, 1, Limits{MaxSessions: 1000, MaxResolvesInFlight: 1})
		w.s.SetPool(testPool(1), sources(2))
		w.route("d.test", "p", "mx", Shape{})
		w.dials["mx"], w.takes["mx"] = time.Second, time.Second
		w.s.SetGate(hold(1, 1), w.now)
		w.onStart = w.checkBars
		if pinned {
			w.queues[2] = &worldQueue{key: testKey(1, policy.Bulk, "d.test"), only: &Lane{Source: ids.Source{15: 1}, Provider: "p"}}
			w.add(2, w.queues[2].key, 1)
		}
		w.add(1, testKey(1, policy.Bulk, "d.test"), 500)
		w.run(3 * time.Second)
		n = len(w.opened[Lane{Source: ids.Source{15: 2}, Provider: "p"}])
		if pinned {
			if why := w.s.Why(2, w.now); why.Reason != "brake" || why.Gate != (GateID{"test", 1}) {
				t.Errorf("it waits for %+v", why)
			}
			w.s.DropGate(GateID{"test", 1}, w.now)
			w.run(5 * time.Minute)
			if w.done != 501 {
				t.Errorf("%d of 501 were sent; stuck: %s", w.done, w.stuck())
			}
		}
		return n
	}
	if without, with := opened(false), opened(true); without == 0 || with > without {
		t.Errorf("%d sessions in three seconds, %d without the mail that waits", with, without)
	}
}
