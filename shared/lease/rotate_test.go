package lease

import (
	"testing"
	"time"
)

// Mail that two limits count needs a seat of both at one relay. Turns of one length
// would keep step, so that whoever has the one never has the other.
func TestTurnsOfTwoLimitsDoNotKeepStep(t *testing.T) {
	for _, ids := range [][2]LimitID{{1, 2}, {3, 9}, {1<<20 + 1, 1<<20 + 2}, {7, 8}} {
		for relays := Node(2); relays <= 3; relays++ {
			c := newCluster(t, int(relays), slotLimit(ids[0], 1), slotLimit(ids[1], 1))
			c.want(1, ids[0], 1)
			c.want(2, ids[1], 1)
			c.run(5 * time.Second)
			for n := Node(1); n <= relays; n++ {
				c.want(n, ids[0], 1)
				c.want(n, ids[1], 1)
			}
			both, looks := 0, 0
			for end := c.now.Add(30 * time.Minute); c.now < end; looks++ {
				c.run(250 * time.Millisecond)
				for n := Node(1); n <= relays; n++ {
					if c.usable(n, ids[0]).Amount > 0 && c.usable(n, ids[1]).Amount > 0 {
						both++
					}
				}
			}
			if both < looks/20 {
				t.Errorf("limits %v, %d relays: one had both seats %d of %d times", ids, relays, both, looks)
			}
		}
	}
}

// A seat is kept for three quarters of Config.Hold at least.
func TestTurnsAreNotShort(t *testing.T) {
	c := newCluster(t, 3, slotLimit(1, 1))
	for n := Node(1); n <= 3; n++ {
		c.want(n, 1, 1)
	}
	c.run(5 * time.Second)
	held, turns := map[Node]time.Duration{}, 0
	for end := c.now.Add(time.Hour); c.now < end; {
		c.run(250 * time.Millisecond)
		for n := Node(1); n <= 3; n++ {
			switch has := c.usable(n, 1).Amount > 0; {
			case has:
				held[n] += 250 * time.Millisecond
			case held[n] > 0:
				if turns++; turns > 1 && (held[n] < c.cfg.Hold*3/4-time.Second || held[n] > c.cfg.Hold+time.Second) {
					t.Errorf("turn %d: %v", turns, held[n])
				}
				delete(held, n)
			}
		}
	}
	if turns < 100 {
		t.Errorf("%d turns", turns)
	}
}
