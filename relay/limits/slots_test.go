package limits

import (
	"testing"
	"time"

	"github.com/relais-mta/relais/relay/engine"
	"github.com/relais-mta/relais/shared/lease"
	"github.com/relais-mta/relais/shared/throttle"
)

func (w *world) connect(p *engine.Place) bool { return w.limits.Connect(time.Now(), p).Reason == "" }

func TestConnectionsEndToTheInstant(t *testing.T) {
	w := newWorld(t, slotLimit(1, 3))
	w.wants(100, 0)
	w.pass(2 * time.Second)
	if g := w.gate(1); g.Sessions != 3 || g.NoSessions || !g.Slots {
		t.Fatalf("%+v", g)
	}
	aborted := map[int]lease.Instant{}
	var places []*engine.Place
	for i := range 3 {
		p := place(func() { aborted[i] = w.clock })
		if !w.connect(p) {
			t.Fatalf("connection %d", i)
		}
		places = append(places, p)
	}
	if w.connect(place(nil)) {
		t.Fatal("a fourth one")
	}
	w.cut = true
	w.limits.Linked(false)
	report := w.clock // the last one is at most that old
	w.pass(9 * time.Second)
	w.limits.Closed(time.Now(), places[1])
	if len(aborted) > 0 {
		t.Fatalf("within the lease: %v", aborted)
	}
	w.pass(3 * time.Second)
	if g := w.gate(1); !g.NoSessions {
		t.Fatalf("the lease is over, and idle sessions must end: %+v", g)
	}
	if w.connect(place(nil)) {
		t.Error("a connection after the lease")
	}
	w.clock = w.clock.Add(10 * time.Second) // the linger is over at some time in between
	w.limits.round()
	if len(aborted) != 2 || aborted[0] > report.Add(25*time.Second) {
		t.Fatalf("the linger is over: %v", aborted)
	}
	clear(aborted)
	w.limits.round()
	if len(aborted) > 0 {
		t.Error("they are ending already")
	}
	for _, p := range []*engine.Place{places[0], places[2], places[2]} {
		w.limits.Closed(time.Now(), p)
	}
	w.cut = false
	w.limits.Linked(true)
	w.pass(4 * time.Second)
	if !w.connect(place(nil)) {
		t.Error("heard again, and nothing can be opened")
	}
}

// The loop rests until the instant at which sessions must end, not longer.
func TestTheLoopIsThereInTime(t *testing.T) {
	w := newWorld(t, slotLimit(1, 2))
	w.wants(100, 0)
	w.pass(2 * time.Second)
	aborted := 0
	for range 2 {
		if !w.connect(place(func() { aborted++ })) {
			t.Fatal("no connection")
		}
	}
	w.cut = true
	w.limits.Linked(false)
	w.limits.mu.Lock()
	end := w.limits.table.Load().limits[0].rights.CloseBy(w.clock)
	w.limits.mu.Unlock()
	for w.clock < end {
		if aborted > 0 {
			t.Fatalf("%v too early", end.Sub(w.clock))
		}
		w.clock = w.clock.Add(w.limits.round())
	}
	if late := w.clock.Sub(end); late > time.Millisecond {
		t.Errorf("the loop comes %v late", late)
	}
	w.limits.round()
	if aborted != 2 {
		t.Errorf("%d ended", aborted)
	}
}

func TestNoLimitNoCost(t *testing.T) {
	w := newWorld(t, rateLimit(1, nil), slotLimit(2, 5))
	w.wants(100, 0)
	w.pass(2 * time.Second)
	p, now := place(nil), time.Now()
	p.Lane.Provider = "yahoo"
	if n := testing.AllocsPerRun(100, func() {
		w.limits.Begin(now, p)
		w.limits.Connect(now, p)
		w.limits.Done(now, p, nil)
		w.limits.Closed(now, p)
	}); n > 0 {
		t.Errorf("%v allocations where no limit matches", n)
	}
	p.Lane.Provider = "google"
	if n := testing.AllocsPerRun(5, func() {
		if w.limits.Begin(now, p).Reason != "" {
			t.Error("refused")
		}
	}); n > 0 {
		t.Errorf("%v allocations under a limit", n)
	}
	for w.limits.Begin(now, p).Reason == "" { // until the burst is gone
	}
	if n := testing.AllocsPerRun(100, func() {
		if w.limits.Begin(now, p).Reason == "" {
			t.Error("allowed")
		}
	}); n > 0 {
		t.Errorf("%v allocations to refuse", n)
	}
}

// BenchmarkBegin is what a message costs: where no limit matches, under one that
// lets it pass, under four, and under one that does not.
func BenchmarkBegin(b *testing.B) {
	for _, bench := range []struct {
		name, provider string
		limits         int
		amount         int64 // that may be used of each, thousandths a second
	}{{"none", "yahoo", 1, 1e12}, {"one", "google", 1, 1e12}, {"four", "google", 4, 1e12}, {"refused", "google", 1, 1}} {
		b.Run(bench.name, func(b *testing.B) {
			t := &table{provider: make(map[string][]*limit), kinds: [3]bool{lease.Rate: true}}
			l := &Limits{cfg: Config{Clock: Now}, kick: make(chan struct{}, 1)}
			var floors []lease.Floor
			for id := range lease.LimitID(bench.limits) {
				floors = append(floors, lease.Floor{Limit: id + 1, Kind: lease.Rate, Per: time.Second, Share: lease.Share{Amount: bench.amount, Burst: 1000}, Soft: true})
			}
			l.holder = lease.NewHolder(lease.DefaultConfig(), self, 1, 1, floors, Now())
			for id := range lease.LimitID(bench.limits) {
				lim := &limit{SharedLimit: rateLimit(id+1, nil), rights: l.holder.Rights(id+1, lease.Rate, time.Second)}
				whole, err := throttle.NewRate(1, time.Nanosecond, throttle.MaxBurst)
				if err != nil {
					b.Fatal(err)
				}
				lim.whole.Set(whole, wall(Now()))
				t.provider["google"] = append(t.provider["google"], lim)
			}
			l.table.Store(t)
			p, now := place(nil), time.Now()
			p.Lane.Provider = bench.provider
			b.ReportAllocs()
			refused := 0
			for b.Loop() {
				if l.Begin(now, p).Reason != "" {
					refused++
				}
			}
			if bench.amount > 1 && refused > 0 {
				b.Errorf("%d were refused", refused)
			}
		})
	}
}
