package sim

import (
	"flag"
	"maps"
	"runtime"
	"slices"
	"testing"
	"time"

	"github.com/relais-mta/relais/shared/lease"
	"github.com/relais-mta/relais/shared/warmup"
)

var (
	soak       = flag.Duration("soak", 90*time.Second, "how long Test34Soak lasts, in the world's time")
	soakRelays = flag.Int("soak-relays", 1000, "how many relays it has")
	soakPace   = flag.Int64("soak-pace", 1, "how many times more seldom than elsewhere its relays look at what there is to do, and that changes")
	soakSeed   = flag.Uint64("soak-seed", 1, "its world's seed")
)

// What every hour of the soak must keep to.
const (
	soakLack  = 0.05 // of a limit, that relays which are heard lack of their shares
	soakHeard = 0.80 // of relays, that are heard
	soakLent  = 0.90 // of a limit without its reserve, that relays may use
)

// soakWarm is how many of its relays warm up an address and a domain.
const soakWarm = 12

// soaked is what was measured in an hour of the soak, of each limit.
type soaked struct {
	samples           int
	lack, worst, lent []float64
	heard             float64
}

// Test34Soak: a thousand relays, demands that change all the time, and faults. In
// every hour who is heard has what it should have, nearly everybody is heard, and
// limits are used; and memory does not grow. make sim-soak is the whole of it: a day.
func Test34Soak(t *testing.T) {
	w := soakWorld(*soakSeed, *soakRelays, time.Duration(*soakPace))
	w.run(time.Minute)
	w.after(0, w.soakDemands)
	w.after(0, w.soakDays)
	w.after(0, w.misfortune)
	w.after(0, w.operators)
	w.after(0, w.elections)
	began, half, now := time.Now(), uint64(0), newSoaked(len(w.limits))
	for begun := w.now; w.now < begun+*soak && w.failed == ""; {
		w.run(5 * time.Second)
		w.measure(&now)
		ran := w.now - begun
		if ran%time.Hour == 0 || ran >= *soak {
			w.hour(t, &now, ran, time.Since(began))
			now = newSoaked(len(w.limits))
		}
		if half == 0 && ran >= *soak/2 {
			half = heapInUse()
		}
	}
	if w.failed != "" {
		t.Fatal(w.report())
	}
	end := heapInUse()
	t.Logf("%d relays, %v, %d events, %d commands in %v; heap %.1f MiB at half time, %.1f MiB at the end",
		*soakRelays, *soak, w.count, w.log.state.index, time.Since(began).Round(time.Second), mebi(half), mebi(end))
	if end > half*5/4+2<<20 {
		t.Errorf("the heap grew from %d to %d bytes", half, end)
	}
	var all tallies
	all.add(&w.tally)
	all.print(t)
}

// soakWorld is a cluster at work, as it is set up by default.
func soakWorld(seed uint64, relays int, pace time.Duration) *world {
	w := newWorld(seed, lease.DefaultConfig())
	w.forgetful, w.pace = true, pace
	for range 3 {
		w.addServer()
	}
	w.limits = []lease.LimitID{1, 2, 3}
	n := int64(relays)
	for _, l := range []lease.Limit{
		{ID: 1, Kind: lease.Rate, Max: 2 * n * lease.Milli, Per: time.Second, Burst: 4 * n, ReservePercent: 5},
		{ID: 2, Kind: lease.Slots, Max: 3 * n, ReservePercent: 5},
		{ID: 3, Kind: lease.Rate, Max: n * lease.Milli, Per: time.Second, Burst: 10 * n, FloorPercent: 20, ReservePercent: 5},
	} {
		w.install(l)
	}
	w.elect(w.servers[0])
	for range relays {
		w.addRelay().steady = true
	}
	// From the beginning, so that no hour is easier than others.
	for _, r := range w.relays {
		w.soakDemand(r)
	}
	for ip := range addresses {
		w.assignIP(ip, w.relays[ip], false)
	}
	for i, r := range w.relays[:soakWarm] {
		r.appetite = i%3 + 1
	}
	return w
}

// soakDays begins a day every twenty minutes, gives the address that warms up to
// another relay, and forgets the days that are over for everybody. Some relays are
// replaced by others: what they held must not be missing for good.
func (w *world) soakDays() {
	for range max(len(w.relays)/300, 1) {
		w.turnover(w.somebody())
	}
	w.roll(w.tomorrow())
	w.assign(address, w.relays[w.rng.IntN(soakWarm)])
	for ahead := range warmup.Day(2) {
		w.setQuota(address, ahead, 2000)
		w.setQuota(domain, ahead, 5000)
	}
	for _, r := range w.relays {
		over := func(id accountID) bool { return id.day < r.today-2 }
		r.order = slices.DeleteFunc(r.order, over)
		maps.DeleteFunc(r.accounts, func(id accountID, _ *account) bool { return over(id) })
		maps.DeleteFunc(r.disk.marks, func(id accountID, _ warmup.Mark) bool { return over(id) })
	}
	// Nobody is cut off, stopped or down for so many days.
	over := func(day warmup.Day) bool { return day < w.log.state.ledger.Today()-6 }
	maps.DeleteFunc(w.checker.offers, func(k quotaKey, _ uint32) bool { return over(k.day) })
	maps.DeleteFunc(w.log.state.history, func(k quotaKey, _ uint32) bool { return over(k.day) })
	maps.DeleteFunc(w.checker.claims, func(k claimID, _ uint32) bool { return over(k.id.day) })
	w.after(20*time.Minute, w.soakDays)
}

// elections replace a leader that stands still, in the time that Raft takes. Random
// worlds have none, for what a cluster without a leader must not do; here it counts
// what it does.
func (w *world) elections() {
	if l := w.log.leader; l.until > w.now {
		for _, s := range w.servers {
			if s.until <= w.now && !s.left {
				w.elect(s)
				break
			}
		}
	}
	w.after(w.between(1300*time.Millisecond, 3600*time.Millisecond), w.elections)
}

// soakDemands changes what some relays want, every half second; more seldom if relays
// look at it more seldom.
func (w *world) soakDemands() {
	for range max(len(w.relays)/500, 1) {
		w.soakDemand(w.relays[w.rng.IntN(len(w.relays))])
	}
	w.after(500*time.Millisecond*w.pace, w.soakDemands)
}

// soakDemand has a relay want nothing, a little, or much more than its part.
func (w *world) soakDemand(r *relay) {
	for _, id := range w.limits {
		l, _ := w.log.state.table.Limit(id)
		part := l.Max / int64(len(w.relays))
		switch w.rng.IntN(4) {
		case 0:
			r.demand[id] = 0
		case 1:
			r.demand[id] = part * 20
		default:
			r.demand[id] = w.rng.Int64N(part*3) + 1
		}
	}
}

func newSoaked(limits int) soaked {
	return soaked{lack: make([]float64, limits), worst: make([]float64, limits), lent: make([]float64, limits)}
}

// measure adds a moment to an hour.
func (w *world) measure(h *soaked) {
	h.samples++
	for i := range w.limits {
		lack, lent, heard := w.shares(i)
		h.lack[i], h.worst[i], h.lent[i] = h.lack[i]+lack, max(h.worst[i], lack), h.lent[i]+lent
		if i == 0 {
			h.heard += heard
		}
	}
}

// hour says what an hour of the soak, or what there was of it, was like, and holds it
// against what it must keep to.
func (w *world) hour(t *testing.T, h *soaked, ran, took time.Duration) {
	n := float64(h.samples)
	heard := h.heard / n
	t.Logf("%v: %d events in %v, %.0f times as fast as its time; %.0f %% of relays heard, %d %% of messages lost; heap %.1f MiB",
		ran, w.count, took.Round(time.Second), ran.Seconds()/took.Seconds(), 100*heard, w.net.loss, mebi(heapInUse()))
	if heard < soakHeard {
		t.Errorf("%v: only %.1f %% of relays are heard", ran, 100*heard)
	}
	for i, id := range w.limits {
		lack, lent := h.lack[i]/n, h.lent[i]/n
		t.Logf("%v: limit %d: share error %.2f %% on average, %.1f %% at worst; %.1f %% lent", ran, id, 100*lack, 100*h.worst[i], 100*lent)
		if lack > soakLack {
			t.Errorf("%v: of limit %d relays lack %.1f %% of their shares", ran, id, 100*lack)
		}
		if lent < soakLent {
			t.Errorf("%v: of limit %d only %.1f %% can be used", ran, id, 100*lent)
		}
	}
}

// shares compares what relays may use of a limit with an ideal division among those
// that are heard. It returns what they lack of it and what all may use, as parts of
// the limit without its reserve and the floors of relays that are gone, and the part
// of relays that is heard.
//
// What can be divided is what the limit leaves beside the shares of relays that are
// not heard just now: a report or its answer was lost, they are stopped, cut off or
// gone. Until their leases are over, which is when they must have been reclaimed,
// nobody else can have those.
func (w *world) shares(at int) (lack, lent, heard float64) {
	l, _ := w.log.state.table.Limit(w.limits[at])
	wait := lease.Outlast(w.cfg.TTL) + 3*time.Second // for clocks, a tick and a slow commit
	if l.Kind == lease.Slots {
		wait += w.cfg.Linger
	}
	whole := l.Max * int64(100-l.ReservePercent) / 100
	room, used, gone, members := whole, int64(0), int64(0), 0
	var wants []int64
	var present []*relay
	for _, r := range w.relays {
		if r.holder != nil {
			used += r.under(at).Usable(r.clock(w.now)).Amount
		}
		h := w.log.state.table.Holding(l.ID, r.node)
		room -= h.Floor.Amount // it is there for a day
		if w.evicted(r) {
			gone += h.Floor.Amount
		} else {
			members++
		}
		switch {
		case r.holder != nil && r.session && r.until == 0 && w.now-r.answered < w.cfg.TTL/2:
			present = append(present, r)
			wants = append(wants, max(0, r.demand[l.ID]-h.Floor.Amount))
		case w.now < max(r.spoke, w.led)+wait:
			room -= h.Ceiling.Amount
		}
	}
	level, missing := waterLevel(wants, max(room, 0)), int64(0)
	for i, r := range present {
		floor := w.log.state.table.Holding(l.ID, r.node).Floor.Amount
		missing += max(0, min(wants[i], level)+min(floor, r.demand[l.ID])-r.under(at).Usable(r.clock(w.now)).Amount)
	}
	return float64(missing) / float64(whole), float64(used) / float64(whole-gone), float64(len(present)) / float64(members)
}

// waterLevel returns the level at which what is wanted, each no more than the
// level, fits into a room.
func waterLevel(wants []int64, room int64) int64 {
	sorted := slices.Clone(wants)
	slices.Sort(sorted)
	for i, want := range sorted {
		if level := room / int64(len(sorted)-i); level < want {
			return level
		}
		room -= want
	}
	return 1 << 62
}

// heapInUse returns the bytes of the heap that are in use.
func heapInUse() uint64 {
	runtime.GC()
	var m runtime.MemStats
	runtime.ReadMemStats(&m)
	return m.HeapAlloc
}

func mebi(bytes uint64) float64 { return float64(bytes) / (1 << 20) }
