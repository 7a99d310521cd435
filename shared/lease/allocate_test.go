package lease

import (
	"runtime"
	"syscall"
	"testing"
	"time"

	"pgregory.net/rapid"
)

// naive divides one unit at a time to who has the least for its weight and still
// wants more: max-min by its definition.
func naive(wants []want, amount int64) []int64 {
	gets := make([]int64, len(wants))
	for ; amount > 0; amount-- {
		best := -1
		for i, w := range wants {
			if gets[i] < w.want && (best < 0 || (gets[i]+1)*wants[best].weight < (gets[best]+1)*w.weight) {
				best = i
			}
		}
		if best < 0 {
			break
		}
		gets[best]++
	}
	return gets
}

func TestFillIsMaxMin(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		n := rapid.IntRange(1, 8).Draw(t, "n")
		wants := make([]want, n)
		total, amount := int64(0), rapid.Int64Range(0, 200).Draw(t, "amount")
		for i := range wants {
			wants[i] = want{
				e:      &entry{n: &nodeState{id: Node(i)}},
				want:   rapid.Int64Range(1, 60).Draw(t, "want"),
				weight: rapid.Int64Range(1, 3).Draw(t, "weight"),
			}
			total += wants[i].want
		}
		want := naive(wants, amount)
		asked := make([]int64, n)
		for i := range wants {
			asked[i] = wants[i].want
		}
		fill(wants, amount, false)
		sum := int64(0)
		for _, w := range wants {
			i := int(w.e.n.id)
			sum += w.gets
			// Rounding moves a unit or so from one to another.
			if got := min(w.gets, asked[i]); got < want[i]-int64(n) || total > amount && got > want[i]+int64(n) {
				t.Errorf("relay %d gets %d of %d, max-min gives %d", i, got, asked[i], want[i])
			}
		}
		if sum != amount {
			t.Errorf("divided %d of %d", sum, amount)
		}
	})
}

func TestWeightsCount(t *testing.T) {
	c := newCluster(t, 2, rateLimit(1, 100, 50))
	c.relays[1].weight = 3
	c.want(1, 1, 200_000)
	c.want(2, 1, 200_000)
	c.run(15 * time.Second)
	if a, b := c.usable(1, 1).Amount, c.usable(2, 1).Amount; b < a*5/2 || b > a*7/2 {
		t.Errorf("weights of 1 and 3 give %d and %d", a, b)
	}
}

// TestRotation (I8): two slots for ten relays are never three, and everybody has
// one within the time that the others hold theirs.
func TestRotation(t *testing.T) {
	const relays, slots = 10, 2
	c := newCluster(t, relays, slotLimit(1, slots))
	last := make([]Instant, relays+1)
	for n := Node(1); n <= relays; n++ {
		c.want(n, 1, 5)
		last[n] = c.now
	}
	bound := time.Duration(relays/slots+1) * (c.cfg.Hold + 2*time.Second)
	for end := c.now.Add(20 * time.Minute); c.now < end; {
		c.run(250 * time.Millisecond)
		open := int64(0)
		for n := Node(1); n <= relays; n++ {
			r := c.rights(n, 1)
			for soon, _ := r.Excess(c.now); soon > 0; soon-- {
				r.Close()
			}
			if r.Opened() > 0 || r.Open(c.now) {
				last[n] = c.now
			}
			open += r.Opened()
			if c.now.Sub(last[n]) > bound {
				t.Fatalf("relay %d had no slot for %v", n, c.now.Sub(last[n]))
			}
		}
		if open > slots {
			t.Fatalf("%d slots are open", open)
		}
	}
	if c.entries > 4*20*60/2 {
		t.Errorf("%d commands in 20 minutes", c.entries)
	}
}

// TestRotationOfABurst: a rate whose burst is smaller than the number of relays
// has as many seats as the burst.
func TestRotationOfABurst(t *testing.T) {
	c := newCluster(t, 4, Limit{ID: 1, Kind: Rate, Max: 60 * Milli, Per: time.Minute, Burst: 2})
	for n := Node(1); n <= 4; n++ {
		c.want(n, 1, 60_000)
	}
	served := make(map[Node]bool)
	for range 100 {
		c.run(2 * time.Second)
		busy := 0
		for n := Node(1); n <= 4; n++ {
			if c.usable(n, 1).usable(Rate) {
				served[n] = true
				busy++
			}
		}
		if busy > 2 {
			t.Fatalf("%d relays share a burst of 2", busy)
		}
	}
	if len(served) != 4 {
		t.Errorf("only %d of 4 relays ever had a share", len(served))
	}
}

// TestSmallDemandIsMetAtOnce: the reserve serves a newcomer in the next tick.
func TestSmallDemandIsMetAtOnce(t *testing.T) {
	c := newCluster(t, 3, rateLimit(1, 1000, 100))
	c.want(1, 1, 5_000_000)
	c.want(2, 1, 5_000_000)
	c.run(15 * time.Second)
	c.want(3, 1, 10_000)
	report := c.relays[2].Report(c.now)
	c.grantor.Report(c.now, &report)
	c.tick()
	if got := c.usable(3, 1); got.Amount < 10_000 || got.Burst < 1 {
		t.Errorf("the newcomer has %v after one tick, wants 10000", got)
	}
}

// world1000 is the size that the design is for: 1,000 relays, 10,000 limits, each
// wanted by five relays.
func world1000(b testing.TB) *cluster {
	limits := make([]Limit, 10_000)
	for i := range limits {
		limits[i] = rateLimit(LimitID(i+1), 100, 50)
		limits[i].FloorPercent = 20
	}
	c := newCluster(b, 0, limits...)
	for i := range 1000 {
		c.relays = append(c.relays, &relay{Holder: NewHolder(c.cfg, Node(i+1), 1, 1, nil, c.now)})
		c.grantor.Hello(c.now, c.relays[i].Hello())
	}
	c.settle(b)
	for i := range limits {
		for k := range 5 {
			c.want(Node((i*5+k)%1000+1), LimitID(i+1), int64(10_000+(i*7+k*13)%40_000))
		}
	}
	for _, r := range c.relays {
		report := r.Report(c.now)
		c.grantor.Report(c.now, &report)
	}
	c.settle(b)
	return c
}

func (c *cluster) settle(b testing.TB) {
	for range 10 {
		t, _ := c.grantor.Tick(c.now)
		if t == nil {
			return
		}
		if refused := c.table.Apply(t); len(refused) > 0 {
			b.Fatalf("refused %+v: %s", refused[0].Change, refused[0].Why)
		}
		c.grantor.Committed(c.now, nil)
	}
}

// cpu is the processor time that the calling thread has used: on a busy machine
// the time by the clock says little.
func cpu() time.Duration {
	var u syscall.Rusage
	const thisThread = 1
	if err := syscall.Getrusage(thisThread, &u); err != nil {
		panic(err)
	}
	return time.Duration(u.Utime.Nano() + u.Stime.Nano())
}

// benchmarkTick measures one tick after the reports of 25 relays of 50 limits
// each, whose demands all moved: what comes in a quarter of a second. With all,
// every one of the 10,000 limits is divided anew.
func benchmarkTick(b *testing.B, all bool) {
	c := world1000(b)
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	i, changes, used := 0, 0, time.Duration(0)
	for b.Loop() {
		c.now = c.now.Add(250 * time.Millisecond)
		for range 25 {
			h := c.relays[i%len(c.relays)].Holder
			for k, r := range h.rights {
				h.SetDemand(r, int64(10_000+(i*7919+k*31)%40_000))
			}
			report := h.Report(c.now)
			c.grantor.Report(c.now, &report)
			i++
		}
		for _, l := range c.grantor.limits {
			if all {
				c.grantor.touch(l)
			}
		}
		before := cpu()
		t, grants := c.grantor.Tick(c.now)
		used += cpu() - before
		c.deliver(grants)
		if t != nil {
			changes += len(t.Changes)
			if refused := c.table.Apply(t); len(refused) > 0 {
				b.Fatalf("refused %+v: %s", refused[0].Change, refused[0].Why)
			}
			before = cpu()
			_, grants = c.grantor.Committed(c.now, nil)
			used += cpu() - before
			c.deliver(grants)
		}
	}
	b.ReportMetric(float64(changes)/float64(b.N), "changes/tick")
	b.ReportMetric(float64(used.Microseconds())/float64(b.N), "cpu-µs/tick")
}

func BenchmarkTick(b *testing.B)    { benchmarkTick(b, false) }
func BenchmarkTickAll(b *testing.B) { benchmarkTick(b, true) }
