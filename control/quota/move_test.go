package quota

import (
	"testing"
	"testing/synctest"
	"time"

	"github.com/relais-mta/relais/shared/lease"
	"github.com/relais-mta/relais/shared/wire"
)

// until lets time go by until something is so, and returns how long that took.
// Relays report when it is due; a message takes its way to the leader.
func (c *cluster) until(most time.Duration, so func() bool) time.Duration {
	c.t.Helper()
	const step = 10 * time.Millisecond
	start := time.Now()
	for !so() {
		if time.Since(start) > most {
			c.t.Fatalf("it is not so after %v", most)
		}
		for _, r := range c.relays {
			c.mu.Lock()
			if !r.silent && c.now() >= r.holder.ReportAt(500) {
				report := r.holder.Report(c.now())
				time.AfterFunc(c.link, func() { c.in <- Message{Node: r.node, Body: wire.EncodeLeaseReport(&report), At: c.now()} })
			}
			c.mu.Unlock()
		}
		if err := pause(c.t.Context(), step); err != nil {
			c.t.Fatal(err)
		}
		synctest.Wait()
		c.check()
	}
	return time.Since(start)
}

// TestAShareMovesInTime: with 20 ms to the leader and 5 ms to a commit a share is at
// a busy relay within a second of its demand if who has it is idle, and within 31 s
// if who has it is dead, whenever in the time between two reports that is.
func TestAShareMovesInTime(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c := newCluster(t, 2)
		c.policy("[[limit]]\nname = \"a\"\nmessages = \"600/1m\"\n")
		if err := c.lead(func() {
			c.pass(2 * time.Second)
			a := c.named("a")
			c.link, c.commit = 20*time.Millisecond, 5*time.Millisecond
			most := a.Max * 7 / 10 // floors of a fifth and the reserve stay where they are
			wants := func(i int, demand int64) {
				c.mu.Lock()
				defer c.mu.Unlock()
				r := c.relays[relayID(i)]
				if r.rights[a.ID] == nil {
					r.rights[a.ID] = r.holder.Rights(a.ID, a.Kind, a.Per)
				}
				r.holder.SetDemand(r.rights[a.ID], demand)
			}
			passed := func(d time.Duration) func() bool {
				end := time.Now().Add(d)
				return func() bool { return time.Now().After(end) }
			}
			wants(0, a.Max)
			wants(1, a.Max)
			c.until(time.Minute, passed(45*time.Second)) // both have floors
			var live time.Duration
			for i := range 24 {
				busy, idle := i%2, 1-i%2
				wants(busy, a.Max)
				wants(idle, a.Max)
				c.until(30*time.Second, passed(5*time.Second+time.Duration(i)*617*time.Millisecond))
				wants(busy, 0)
				c.until(10*time.Second, func() bool { return c.share(idle, a.ID) >= most })
				c.until(30*time.Second, passed(time.Duration(i)*290*time.Millisecond))
				wants(idle, 0)
				wants(busy, a.Max)
				live = max(live, c.until(10*time.Second, func() bool { return c.share(busy, a.ID) >= most }))
			}
			if live >= time.Second {
				t.Errorf("an idle relay's share is elsewhere after %v", live)
			}
			var dead time.Duration
			for i := range 6 {
				wants(0, a.Max)
				wants(1, 0)
				c.until(30*time.Second, passed(10*time.Second+time.Duration(i)*1700*time.Millisecond))
				c.relays[relayID(0)].silent = true
				wants(1, a.Max)
				took := c.until(time.Minute, func() bool { return c.share(1, a.ID) >= most })
				dead = max(dead, took)
				if lease := lease.DefaultConfig(); took < lease.TTL-lease.Refresh()*3/2 {
					t.Errorf("a dead relay's share is elsewhere after %v, before its lease can have ended", took)
				}
				c.relays[relayID(0)].silent = false
			}
			if dead > 31*time.Second {
				t.Errorf("a dead relay's share is elsewhere after %v", dead)
			}
			t.Logf("a share moves from an idle relay in %v, from a dead one in %v, at the slowest", live, dead)
		}); err != nil {
			t.Error(err)
		}
	})
}
