package sim

import (
	"flag"
	"runtime"
	"slices"
	"testing"
	"time"

	"github.com/relais-mta/relais/shared/lease"
)

var (
	soak       = flag.Duration("soak", 90*time.Second, "how long Test34Soak lasts, in the world's time")
	soakRelays = flag.Int("soak-relays", 1000, "how many relays it has")
	soakPace   = flag.Int64("soak-pace", 1, "how many times more seldom than elsewhere its relays look at what there is to do, and that changes")
)

// Test34Soak: a thousand relays, demands that change all the time, and faults. Who
// is heard has what it should have, within five percent on average, and memory does
// not grow. make sim-soak is the whole of it: a day.
func Test34Soak(t *testing.T) {
	w := newWorld(1, lease.DefaultConfig())
	w.forgetful, w.pace = true, time.Duration(*soakPace)
	for range 3 {
		w.addServer()
	}
	w.limits = []lease.LimitID{1, 2, 3}
	n := int64(*soakRelays)
	for _, l := range []lease.Limit{
		{ID: 1, Kind: lease.Rate, Max: 2 * n * lease.Milli, Per: time.Second, Burst: 4 * n, ReservePercent: 5},
		{ID: 2, Kind: lease.Slots, Max: 3 * n, ReservePercent: 5},
		{ID: 3, Kind: lease.Rate, Max: n * lease.Milli, Per: time.Second, Burst: 10 * n, FloorPercent: 20, ReservePercent: 5},
	} {
		w.install(l)
	}
	w.elect(w.servers[0])
	for range n {
		w.addRelay().steady = true
	}
	for ip := range addresses {
		w.assignIP(ip, w.relays[ip], false)
	}
	w.run(time.Minute)
	w.after(0, w.soakDemands)
	w.after(0, w.misfortune)
	w.after(0, w.operators)
	w.after(0, w.elections)
	var half, end runtime.MemStats
	sum, samples, worst := 0.0, 0, 0.0
	began, hour := time.Now(), time.Hour
	for begun := w.now; w.now < begun+*soak && w.failed == ""; {
		w.run(5 * time.Second)
		for i := range 2 {
			e := w.shareError(i)
			sum, samples, worst = sum+e, samples+1, max(worst, e)
		}
		if w.now-begun >= hour {
			t.Logf("%v: %d events in %v, share error %.2f %% on average", hour, w.count, time.Since(began).Round(time.Second), 100*sum/float64(samples))
			hour += time.Hour
		}
		if half.HeapAlloc == 0 && w.now >= begun+*soak/2 {
			runtime.GC()
			runtime.ReadMemStats(&half)
		}
	}
	if w.failed != "" {
		t.Fatal(w.report())
	}
	runtime.GC()
	runtime.ReadMemStats(&end)
	average := 100 * sum / float64(samples)
	t.Logf("%d relays, %v, %d events, %d commands: share error %.2f %% on average, %.1f %% at worst; heap %d MiB at half time, %d MiB at the end",
		n, *soak, w.count, w.log.state.index, average, 100*worst, half.HeapAlloc>>20, end.HeapAlloc>>20)
	if average > 5 {
		t.Errorf("relays lack %.1f %% of their shares on average", average)
	}
	if end.HeapAlloc > half.HeapAlloc*3/2+8<<20 {
		t.Errorf("the heap grew from %d to %d bytes", half.HeapAlloc, end.HeapAlloc)
	}
	runtime.KeepAlive(w)
}

// elections replace a leader that stands still, in the time that Raft takes. Random
// worlds have none, for what a cluster without a leader must not do; here it counts
// what it does.
func (w *world) elections() {
	if l := w.log.leader; l.until > w.now {
		for _, s := range w.servers {
			if s.until <= w.now {
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
		r := w.relays[w.rng.IntN(len(w.relays))]
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
	w.after(500*time.Millisecond*w.pace, w.soakDemands)
}

// shareError returns what relays that are heard lack of an ideal division among
// them, as a part of the limit.
func (w *world) shareError(at int) float64 {
	l, _ := w.log.state.table.Limit(w.limits[at])
	room := l.Max * int64(100-l.ReservePercent) / 100
	var wants []int64
	var heard []*relay
	for _, r := range w.relays {
		if r.holder != nil && r.session && r.until == 0 && w.now-r.answered < 15*time.Second {
			heard = append(heard, r)
			wants = append(wants, r.demand[l.ID])
		}
	}
	level := waterLevel(wants, room)
	lack := int64(0)
	for _, r := range heard {
		lack += max(0, min(r.demand[l.ID], level)-r.under(at).Usable(r.clock(w.now)).Amount)
	}
	return float64(lack) / float64(room)
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
