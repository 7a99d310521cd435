package quota

import (
	"testing"
	"testing/synctest"
	"time"

	"github.com/relais-mta/relais/shared/wire"
)

// TestACopyThatGreetsFreesNothing: a copy of a relay's machine greets, with a higher
// incarnation, while the first uses what it was lent. Nothing of that is lent to
// others, and the first goes on, until the copy has the relay's session.
func TestACopyThatGreetsFreesNothing(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c := newCluster(t, 2)
		c.policy(tenSlots)
		if err := c.lead(func() {
			c.pass(2 * time.Second)
			a := c.named("a").ID
			c.want(0, a, 100)
			c.pass(8 * time.Second)
			before := c.share(0, a)
			if before < 7 {
				t.Fatalf("the one relay that wants something has %d of 10", before)
			}
			c.mu.Lock()
			first := c.relays[relayID(0)]
			copied := c.start1(first.node, 2)
			c.relays[first.node] = first
			c.barred = 2
			c.mu.Unlock()
			greet := func() {
				c.in <- Message{Node: first.node, Body: wire.EncodeLeaseHello(copied.holder.Hello(), nil), At: c.now()}
			}
			c.want(1, a, 100)
			for range 40 { // longer than a lease
				greet()
				c.pass(time.Second)
			}
			row := c.state.Read().LeaseNode(first.node)
			if row.Incarnation != 1 || first.wanted != 0 {
				t.Errorf("the relay's process is number %d, the first was asked to greet %d times", row.Incarnation, first.wanted)
			}
			if x := c.share(0, a); x < 3 {
				t.Errorf("the first has %d of 10: it was not heard any more", x)
			}
			// The first is gone, and the copy has the session: a greeting that came a
			// moment before is taken then.
			greet()
			c.mu.Lock()
			first.silent = true
			c.mu.Unlock()
			c.pass(time.Second)
			if now := c.state.Read().LeaseNode(first.node).Incarnation; now != 1 {
				t.Errorf("the relay's process is number %d already", now)
			}
			c.mu.Lock()
			delete(c.relays, first.node)
			c.barred = 0
			c.mu.Unlock()
			c.pass(time.Second)
			if now := c.state.Read().LeaseNode(first.node).Incarnation; now != 2 {
				t.Errorf("the relay's process is number %d, although the second has its session", now)
			}
		}); err != nil {
			t.Error(err)
		}
	})
}
