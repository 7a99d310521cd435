package reflex

import (
	"fmt"
	"math/rand/v2"
	"testing"
	"time"

	"github.com/relais-mta/relais/shared/throttle"
)

// start is when simulations begin.
var start = time.Date(2026, 5, 4, 8, 0, 0, 0, time.UTC)

func settings() Settings {
	return Settings{MinRate: 60, Keep: 75, After: 3, Share: 10, Spacing: 5 * time.Second, Step: 10 * time.Second, Hold: time.Minute, MaxHold: time.Hour, Probe: 10}
}

// provider is a model of one: what it says to a message that begins at a time.
type provider interface {
	answer(now time.Time, rng *rand.Rand) Signal
	reachable(now time.Time) bool
}

// limited defers what comes above a rate, and now and then without a reason.
type limited struct {
	bucket throttle.Bucket
	noise  float64
}

func (p *limited) answer(now time.Time, rng *rand.Rand) Signal {
	if ok, _ := p.bucket.Take(now, 1); !ok || rng.Float64() < p.noise {
		return TooFast
	}
	return Clean
}

func (p *limited) reachable(time.Time) bool { return true }

// blocking takes nothing for a while.
type blocking struct{ from, to time.Time }

func (p *blocking) answer(now time.Time, _ *rand.Rand) Signal {
	if !now.Before(p.from) && now.Before(p.to) {
		return Blocked
	}
	return Clean
}

func (p *blocking) reachable(time.Time) bool { return true }

// down cannot be reached for a while.
type down struct{ blocking }

func (p *down) answer(time.Time, *rand.Rand) Signal { return Clean }
func (p *down) reachable(now time.Time) bool        { return now.Before(p.from) || !now.Before(p.to) }

// greylisting defers half of all at first.
type greylisting struct{}

func (greylisting) answer(_ time.Time, rng *rand.Rand) Signal {
	if rng.IntN(2) == 0 {
		return Silent
	}
	return Clean
}
func (greylisting) reachable(time.Time) bool { return true }

// world drives one lane with mail without end.
type world struct {
	t        *testing.T
	lane     Lane
	set      Settings
	p        provider
	rng      *rand.Rand
	now      time.Time
	bucket   throttle.Bucket // as the scheduler keeps it
	policy   throttle.Bucket // of the profile
	sessions int
	latency  time.Duration
	ends     []ending // in the order of their times, for latency is the same for all
	begun    []time.Time
	taken    []time.Time
	signals  int
}

type ending struct {
	at, began time.Time
	signal    Signal
}

func newWorld(t *testing.T, seed uint64, p provider, set Settings, maxPerHour int64) *world {
	w := &world{t: t, set: set, p: p, rng: rand.New(rand.NewPCG(seed, 7)), now: start, latency: 200 * time.Millisecond, sessions: 10}
	w.set.MaxRate = maxPerHour
	w.lane.Seed = seed
	if maxPerHour > 0 {
		w.policy = throttle.NewBucket(rateOf(t, maxPerHour))
	}
	for range w.sessions {
		w.lane.Opening()
		w.lane.Opened(w.now)
	}
	return w
}

func rateOf(t *testing.T, perHour int64) throttle.Rate {
	n, per := Spaced(perHour, throttle.MaxLimit)
	r, err := throttle.NewRate(n, per, 1)
	if err != nil {
		t.Fatal(err)
	}
	return r
}

// apply takes over the allowance, as the scheduler does, and checks its bounds.
func (w *world) apply() {
	a := w.lane.Allowance()
	if w.set.MaxRate > 0 && a.Rate > w.set.MaxRate {
		w.t.Fatalf("%v: allowed %d an hour, policy %d", w.now.Sub(start), a.Rate, w.set.MaxRate)
	}
	if a.Rate != 0 && a.Rate < w.set.MinRate {
		w.t.Fatalf("%v: allowed %d an hour, the least is %d", w.now.Sub(start), a.Rate, w.set.MinRate)
	}
	if a.Rate == 0 {
		w.bucket.Set(throttle.Rate{}, w.now)
	} else {
		w.bucket.Set(rateOf(w.t, a.Rate), w.now)
	}
}

// run goes on for a while, in steps of 20 ms.
func (w *world) run(span time.Duration) {
	const step = 20 * time.Millisecond
	for end := w.now.Add(span); w.now.Before(end); w.now = w.now.Add(step) {
		for len(w.ends) > 0 && !w.ends[0].at.After(w.now) {
			e := w.ends[0]
			w.ends = w.ends[1:]
			if e.signal == Clean {
				w.taken = append(w.taken, w.now)
			} else if e.signal != Silent {
				w.signals++
			}
			if w.lane.Ended(w.now, e.began, Cause{Signal: e.signal, Class: "x"}, &w.set) {
				w.apply()
			}
		}
		if next := w.lane.Next(); !next.IsZero() && !next.After(w.now) && w.lane.Tick(w.now, &w.set) {
			w.apply()
		}
		w.begin()
	}
}

// begin starts what may start now.
func (w *world) begin() {
	for range 20 {
		a := w.lane.Allowance()
		room := w.sessions
		if a.Connections > 0 {
			room = min(room, a.Connections)
		}
		if a.Phase == Held || len(w.ends) >= room {
			return
		}
		if ok, _ := w.policy.Peek(w.now, 1); !ok {
			return
		}
		if ok, _ := w.bucket.Peek(w.now, 1); !ok {
			return
		}
		w.policy.Take(w.now, 1)
		w.bucket.Take(w.now, 1)
		w.begun = append(w.begun, w.now)
		signal := Broken
		if w.p.reachable(w.now) {
			w.lane.Began(w.now)
			signal = w.p.answer(w.now, w.rng)
		}
		w.ends = append(w.ends, ending{at: w.now.Add(w.latency), began: w.now, signal: signal})
	}
}

// between counts the times in a span.
func between(times []time.Time, from, to time.Time) (n int) {
	for _, at := range times {
		if !at.Before(from) && at.Before(to) {
			n++
		}
	}
	return n
}

const seeds = 8

// A lane settles near the rate that its provider bears: over any five minutes at
// least seven tenths of it, and a tenth more than it at most, whatever it
// began with and though one in fifty is deferred without a reason.
func TestSimConvergesNearTheProvidersLimit(t *testing.T) {
	for _, perMinute := range []int64{30, 300, 1500} {
		for _, policy := range []int64{0, 20 * perMinute * 60, perMinute * 60 * 3 / 2} {
			t.Run(fmt.Sprintf("%d a minute, policy %d an hour", perMinute, policy), func(t *testing.T) {
				for seed := range uint64(seeds / 4) {
					p := &limited{bucket: throttle.NewBucket(burst(t, int(perMinute))), noise: 0.02}
					w := newWorld(t, seed, p, settings(), policy)
					w.run(5 * time.Minute)
					for range 5 {
						from := w.now
						w.run(5 * time.Minute)
						taken, begun := between(w.taken, from, w.now), between(w.begun, from, w.now)
						if want := int(perMinute) * 5; taken*100 < want*70 || begun*100 > want*110 {
							t.Errorf("seed %d, after %v: %d begun and %d taken in 5 minutes, the provider bears %d", seed, from.Sub(start), begun, taken, want)
						}
					}
				}
			})
		}
	}
}

// burst is a provider's rate with a burst of a twentieth of a minute's.
func burst(t *testing.T, perMinute int) throttle.Rate {
	r, err := throttle.NewRate(perMinute, time.Minute, max(2, perMinute/20))
	if err != nil {
		t.Fatal(err)
	}
	return r
}

// Once settled the rate stays between half of the provider's limit and a third more.
func TestSimKeepsWithinItsBand(t *testing.T) {
	for seed := range uint64(seeds) {
		const perMinute = 300
		p := &limited{bucket: throttle.NewBucket(burst(t, perMinute)), noise: 0.02}
		w := newWorld(t, seed, p, settings(), 0)
		w.run(5 * time.Minute)
		least, most := int64(1)<<40, int64(0)
		for range 20 * 60 {
			w.run(time.Second)
			a := w.lane.Allowance()
			if a.Phase != Slowed || a.Rate == 0 {
				t.Fatalf("seed %d: the lane is %v", seed, a)
			}
			least, most = min(least, a.Rate), max(most, a.Rate)
		}
		if least < perMinute*60/2 || most > perMinute*60*135/100 {
			t.Errorf("seed %d: between %d and %d an hour, the provider bears %d", seed, least, most, perMinute*60)
		}
	}
}

// Deferrals without a reason, too few to mean the speed, slow nothing down.
func TestSimBearsNoise(t *testing.T) {
	for seed := range uint64(seeds) {
		w := newWorld(t, seed, &limited{noise: 0.04}, settings(), 6000*60)
		w.run(10 * time.Minute)
		if got := between(w.taken, start, w.now); got < 10*600*9/10 {
			t.Errorf("seed %d: %d taken of the 25,000 and more that were to be had", seed, got)
		}
	}
}

// Greylisting concerns the recipient and slows nothing down.
func TestSimLeavesGreylistingAlone(t *testing.T) {
	for seed := range uint64(seeds) {
		w := newWorld(t, seed, greylisting{}, settings(), 600*60)
		for range 300 {
			w.run(time.Second)
			if a := w.lane.Allowance(); a != (Allowance{}) {
				t.Fatalf("seed %d: %v", seed, a)
			}
		}
	}
}

// A provider that blocks for long is asked only by probes, a few messages each
// time and ever less often, and the lane is back at policy's rate soon after the
// block has ended.
func TestSimComesBackAfterABlock(t *testing.T) {
	for seed := range uint64(seeds) {
		set := settings()
		set.MaxHold = 16 * time.Minute
		p := &blocking{from: start.Add(time.Minute), to: start.Add(3 * time.Hour)}
		w := newWorld(t, seed, p, set, 600*60)
		w.run(time.Minute + 5*time.Second)
		if a := w.lane.Allowance(); a.Phase != Held {
			t.Fatalf("seed %d: %v after 5 s of blocking", seed, a)
		}
		w.run(3*time.Hour - time.Minute - 5*time.Second)
		if n := w.signals; n > 60 {
			t.Errorf("seed %d: %d messages were tried during the block", seed, n)
		}
		// The hold in force when the block ends, its spread, ten probes, doubling.
		w.run(set.MaxHold + set.MaxHold/10 + 3*time.Minute)
		from := w.now
		w.run(5 * time.Minute)
		if got := between(w.taken, from, w.now); got < 5*600*95/100 {
			t.Errorf("seed %d: %d taken in the 5 minutes after, of 3,000; %v", seed, got, w.lane.Allowance())
		}
		if a := w.lane.Allowance(); a.Phase != Free {
			t.Errorf("seed %d: the lane is still %v", seed, a)
		}
	}
}

// A host that cannot be reached is asked by one connection at a time, and all
// connections are back soon after it can.
func TestSimComesBackAfterAHostWasDown(t *testing.T) {
	for seed := range uint64(seeds) {
		set := settings()
		set.MaxHold = 8 * time.Minute
		p := &down{blocking{from: start.Add(time.Minute), to: start.Add(time.Hour)}}
		w := newWorld(t, seed, p, set, 600*60)
		w.run(time.Hour)
		if n := w.signals; n > 80 {
			t.Errorf("seed %d: %d connections were tried meanwhile", seed, n)
		}
		w.run(set.MaxHold + set.MaxHold/10 + 3*time.Minute)
		from := w.now
		w.run(5 * time.Minute)
		if got := between(w.taken, from, w.now); got < 5*600*95/100 || w.lane.Allowance().Phase != Free {
			t.Errorf("seed %d: %d taken in the 5 minutes after, of 3,000; %v", seed, got, w.lane.Allowance())
		}
	}
}

// A limit that the provider raises tenfold is used within ten minutes.
func TestSimFollowsALimitThatRises(t *testing.T) {
	for seed := range uint64(seeds) {
		p := &limited{bucket: throttle.NewBucket(burst(t, 60)), noise: 0.01}
		w := newWorld(t, seed, p, settings(), 0)
		w.run(10 * time.Minute)
		p.bucket.Set(burst(t, 600), w.now)
		w.run(10 * time.Minute)
		from := w.now
		w.run(5 * time.Minute)
		if got := between(w.taken, from, w.now); got < 5*600*70/100 {
			t.Errorf("seed %d: %d taken in 5 minutes, the provider bears 3,000", seed, got)
		}
	}
}
