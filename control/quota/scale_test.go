package quota

import (
	"fmt"
	"math/rand/v2"
	"strconv"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/relais-mta/relais/control"
	"github.com/relais-mta/relais/control/command"
	"github.com/relais-mta/relais/shared/lease"
	"github.com/relais-mta/relais/shared/wire"
)

// The size that the design names: each limit is wanted by five relays, so each relay
// speaks of 50.
const (
	scaleRelays  = 1_000
	scaleEntries = 5_000 // of the policy: each gives a limit of messages and one of connections
	scaleSharers = 5
)

// large is a cluster of that size, in virtual time.
type large struct {
	*cluster
	r      *rand.Rand
	limits []lease.Limit
	wants  [][]lease.Limit // by relay
	spread []int           // of its next report
	wild   bool            // a relay wants something else each second
}

func newLarge(t *testing.T) *large {
	c := &large{cluster: newCluster(t, scaleRelays), r: rand.New(rand.NewPCG(6, 6)), spread: make([]int, scaleRelays), wants: make([][]lease.Limit, scaleRelays)}
	var text strings.Builder
	for i := range scaleEntries {
		fmt.Fprintf(&text, "[[limit]]\nname=\"%s\"\nmessages=\"9/1s\"\nconnections=50\n", strconv.FormatInt(int64(i), 36)) // short, for a section has its bound
	}
	c.policy(text.String())
	return c
}

// share has every limit wanted by some relays.
func (c *large) share() {
	for i, l := range c.state.Read().SharedLimits() {
		c.limits = append(c.limits, l.Limit)
		for k := range scaleSharers {
			n := (i/2 + k*scaleRelays/scaleSharers) % scaleRelays
			c.wants[n] = append(c.wants[n], l.Limit)
			r := c.relays[relayID(n)]
			r.rights[l.ID] = r.holder.Rights(l.ID, l.Kind, l.Per)
		}
	}
}

// demand moves what a relay wants: by a tenth as a rule, and now and then to
// something else; by anything if the demands are wild.
func (c *large) demand(n int) {
	r := c.relays[relayID(n)]
	for _, l := range c.wants[n] {
		now := r.demand[l.ID]
		switch {
		case c.wild || now == 0 || c.r.IntN(10_000) == 0:
			now = 1 + c.r.Int64N(l.Max)
		default:
			now += c.r.Int64N(now/5+1) - now/10
		}
		r.demand[l.ID] = max(1, min(now, l.Max))
		r.holder.SetDemand(r.rights[l.ID], r.demand[l.ID])
	}
}

// run lets a time go by and returns how many entries the log got. Relays look at
// what they want once a second, and report when that is due.
func (c *large) run(d time.Duration) (entries uint64) {
	c.t.Helper()
	const step = 50 * time.Millisecond
	before := c.index
	for at := time.Duration(0); at < d; at += step {
		for n := range scaleRelays {
			c.mu.Lock()
			if (int(at/step)+n)%int(time.Second/step) == 0 {
				c.demand(n)
			}
			r := c.relays[relayID(n)]
			if r.welcome > 0 && r.wanted == 0 && c.now() >= r.holder.ReportAt(c.spread[n]) {
				c.spread[n] = c.r.IntN(1000)
				report := r.holder.Report(c.now())
				c.in <- Message{Node: r.node, Body: wire.EncodeLeaseReport(&report), At: c.now()}
			}
			c.mu.Unlock()
		}
		if err := pause(c.t.Context(), step); err != nil {
			c.t.Fatal(err)
		}
		synctest.Wait()
	}
	return c.index - before
}

// used asserts that of limits that are wanted nearly all is lent.
func (c *large) used(t *testing.T) {
	t.Helper()
	sums := make(map[lease.LimitID]int64, len(c.limits))
	for _, r := range c.relays {
		for id, rights := range r.rights {
			sums[id] += rights.Usable(c.now()).Amount
		}
	}
	lent, most := int64(0), int64(0)
	for _, l := range c.limits {
		sum := sums[l.ID]
		if sum > l.Max {
			t.Fatalf("of %d of limit %d relays use %d", l.Max, l.ID, sum)
		}
		if l.Kind == lease.Rate {
			lent, most = lent+sum, most+l.Max
		}
	}
	if 100*lent < 85*most {
		t.Errorf("%d %% of the rates are lent", 100*lent/most)
	}
}

// TestEntriesOfALargeCluster: of 1,000 relays and 10,000 limits the log gets 15
// entries a second at most, when demands move as they do and when all of them jump;
// and the limits are used.
func TestEntriesOfALargeCluster(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c := newLarge(t)
		if err := c.lead(func() {
			for n := range scaleRelays { // all of them greet at once, as after a leader's loss
				c.say(c.relays[relayID(n)])
			}
			c.run(3 * time.Second)
			c.share()
			var each [3]float64
			for i, d := range []time.Duration{5 * time.Second, 5 * time.Second, 2 * time.Second} {
				c.wild = i == 2
				// One tick may come at the very beginning and end of the time.
				n, most := c.run(d), maxEntries*int(d/time.Second)+scaleRelays*50/command.MaxLeaseChanges+1
				if int(n) > most {
					t.Errorf("%d entries in %v, %d are right", n, d, most)
				}
				each[i] = float64(n) / d.Seconds()
			}
			t.Logf("entries a second: %.1f while all is lent first, %.1f while demands move, %.1f while all of them jump each second; the largest has %d changes", each[0], each[1], each[2], c.sizes)
			c.used(t)
		}); err != nil || c.part.Alarm() != "" {
			t.Errorf("%v, alarm %q", err, c.part.Alarm())
		}
	})
}

// TestAStormIsFollowedByAPause: a tick of ten entries has the next one wait until ten
// would have come at fifteen a second.
func TestAStormIsFollowedByAPause(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c := newCluster(t, 1)
		c.policy(tenSlots)
		row, ok := c.must(&command.LeaseBegin{}).(*control.Lease)
		if !ok {
			t.Fatal("beginning gives no row")
		}
		leads := &term{l: c.part, epoch: row.Epoch}
		for entries, wait := range map[int]time.Duration{1: time.Second / 15, 10: 10 * time.Second / 15} {
			tick := &lease.Tick{Changes: make([]lease.Change, entries*command.MaxLeaseChanges)}
			if refused, err := leads.commit(t.Context(), tick); err != nil || len(refused) != len(tick.Changes) {
				t.Fatalf("%d refused, %v", len(refused), err)
			}
			if now := time.Now(); leads.due(now.Add(wait-time.Millisecond)) || !leads.due(now.Add(wait+time.Millisecond)) {
				t.Errorf("after %d entries the next tick comes after %v, want %v", entries, leads.rest.Sub(now), wait)
			}
		}
	})
}
