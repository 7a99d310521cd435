package schedule

import (
	"fmt"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/relais-mta/relais/shared/policy"
)

// relayLimits are the shipped ones, a tenth of them, so that tests that fill
// them stay small.
var relayLimits = Limits{MaxSessions: 200, MaxConnectsInFlight: 20, MaxResolvesInFlight: 20, ProviderShare: 50, UnprovenShare: 50, TransactionalReserve: 50}

// traffic adds mail to healthy providers, in bursts so that some of it waits for
// a session, and returns where the waits are kept.
func (w *world) traffic(span time.Duration) *[]time.Duration {
	waits := new([]time.Duration)
	arrived := map[Queue][]time.Time{}
	w.onStart = func(q Queue) {
		if times := arrived[q]; len(times) > 0 {
			*waits = append(*waits, w.now.Sub(times[0]))
			arrived[q] = times[1:]
		}
	}
	for p := range 5 {
		domain := fmt.Sprintf("live%d.test", p)
		w.route(domain, "live:"+domain, domain, Shape{SourceConnections: 1, SourceMessageRate: Rate{Max: 50, Per: time.Second, Burst: 5}})
		w.dials[domain], w.takes[domain] = 30*time.Millisecond, 40*time.Millisecond
		q, key := Queue(p), testKey(byte(p%3), policy.Transactional, domain)
		for at := time.Duration(p) * 7 * time.Millisecond; at < span; at += time.Duration(100+w.rng.IntN(400)) * time.Millisecond {
			burst := 1 + w.rng.IntN(12)
			w.after(at, func() {
				for range burst {
					arrived[q] = append(arrived[q], w.now)
				}
				w.add(q, key, burst)
			})
		}
	}
	return waits
}

// TestTarpitsCostOthersNothing has hosts that answer each command after a
// minute, take no connection, or take many and then stop, next to others with
// steady mail, whose 95th percentile must stay what it is without them.
func TestTarpitsCostOthersNothing(t *testing.T) {
	const warm, span = 20 * time.Second, 3 * time.Minute
	run := func(spoil func(w *world)) (p95 time.Duration, sent, spoiled int) {
		w := newWorld(t, 5, relayLimits)
		w.s.SetPool(testPool(1), sources(4))
		waits := w.traffic(warm + span)
		w.run(warm)
		*waits = nil
		if spoil != nil {
			spoil(w)
		}
		w.run(span)
		slices.Sort(*waits)
		for lane, times := range w.opened {
			if !strings.HasPrefix(lane.Provider, "live:") {
				spoiled += len(times)
			}
		}
		return (*waits)[len(*waits)*95/100], len(*waits), spoiled
	}
	base, sent, _ := run(nil)
	if base == 0 || sent < 1_000 {
		t.Fatalf("%d mails with a 95th percentile of %v are nothing to compare with", sent, base)
	}
	bulk := func(w *world, i int, provider, site string, shape Shape) {
		domain := fmt.Sprintf("dead%d.test", i)
		w.route(domain, provider, site, shape)
		w.add(Queue(1000+i), testKey(9, policy.Bulk, domain), 1_000)
	}
	for name, spoil := range map[string]func(w *world){
		"one host, a minute a command": func(w *world) {
			w.takes["tar"], w.dials["tar"] = 5*time.Minute, 2*time.Minute
			for i := range 50 {
				bulk(w, i, "tar", "tar", Shape{})
			}
		},
		"a provider of many such hosts": func(w *world) {
			for i := range 500 {
				site := fmt.Sprint("tar", i)
				w.takes[site], w.dials[site] = 5*time.Minute, 2*time.Minute
				bulk(w, i, "tar", site, Shape{})
			}
		},
		"many dead providers": func(w *world) {
			for i := range 500 {
				site := fmt.Sprint("tar", i)
				w.dials[site] = 30 * time.Second
				w.takes[site] = time.Minute
				bulk(w, i, "mx:"+site, site, Shape{})
			}
		},
		"a fast host that stops": func(w *world) {
			w.takes["tar"], w.dials["tar"] = 10*time.Millisecond, 10*time.Millisecond
			for i := range 50 {
				bulk(w, i, "tar", "tar", Shape{})
			}
			w.after(2*time.Second, func() { w.takes["tar"], w.dials["tar"] = 5*time.Minute, 2*time.Minute })
		},
	} {
		t.Run(name, func(t *testing.T) {
			got, n, spoiled := run(spoil)
			if spoiled == 0 {
				t.Error("no session was opened to a host that is slow")
			}
			if n < sent*99/100 {
				t.Errorf("%d of %d mails were sent to the others", n, sent)
			}
			if got > base+base/20 {
				t.Errorf("the others' 95th percentile rose from %v to %v", base, got)
			}
		})
	}
}

// TestNoSiteIsForgottenWhenConnectionsAreFew has always more mail than
// connections, so that each must make way in time.
func TestNoSiteIsForgottenWhenConnectionsAreFew(t *testing.T) {
	for name, c := range map[string]struct {
		limits Limits
		shape  Shape
	}{
		"of a source":   {Limits{}, Shape{SourceConnections: 2}},
		"to a provider": {Limits{}, Shape{RelayConnections: 3}},
		"of the relay":  {Limits{MaxSessions: 3}, Shape{}},
		"to new hosts":  {Limits{MaxSessions: 4, UnprovenShare: 25}, Shape{}},
		"under a rate":  {Limits{}, Shape{SourceConnections: 2, SourceMessageRate: Rate{Max: 100, Per: time.Second, Burst: 1}}},
		"in flight":     {Limits{MaxConnectsInFlight: 1, MaxSessions: 4}, Shape{}},
	} {
		t.Run(name, func(t *testing.T) {
			w := newWorld(t, 1, c.limits)
			w.s.SetPool(testPool(1), sources(1))
			counts := map[Queue]int{}
			w.onStart = func(q Queue) { counts[q]++ }
			for i := range 12 {
				domain := fmt.Sprintf("d%d.test", i)
				provider := "p"
				if c.shape == (Shape{}) {
					provider = domain
				}
				w.route(domain, provider, domain, c.shape)
				w.add(Queue(i), testKey(byte(i/6), policy.Bulk, domain), 1_000_000)
			}
			w.run(2 * time.Minute)
			lo, hi := 1<<30, 0
			for i := range 12 {
				lo, hi = min(lo, counts[Queue(i)]), max(hi, counts[Queue(i)])
			}
			if lo < hi/3 || lo == 0 {
				t.Errorf("sites with always more to send had %v messages", counts)
			}
		})
	}
}

// TestPoolsShareARelaysRate: a rate that holds for all sources of the relay is
// shared by its pools.
func TestPoolsShareARelaysRate(t *testing.T) {
	w := newWorld(t, 1, Limits{})
	counts := map[Queue]int{}
	w.onStart = func(q Queue) { counts[q]++ }
	for i := range 3 {
		w.s.SetPool(testPool(byte(i+1)), []Source{{ID: [16]byte{15: byte(i + 1)}, Weight: 1}})
		domain := fmt.Sprintf("d%d.test", i)
		w.route(domain, "p", "mx", Shape{RelayMessageRate: Rate{Max: 30, Per: time.Second, Burst: 1}})
		key := testKey(1, policy.Bulk, domain)
		key.Pool = testPool(byte(i + 1))
		w.add(Queue(i), key, 100_000)
	}
	w.run(time.Minute)
	for q, n := range counts {
		if n < 590 || n > 610 {
			t.Errorf("pool %d had %d of 1800 turns: %v", q, n, counts)
		}
	}
}

// TestTransactionalMailGetsASessionWhenAllAreBusy: bulk mail makes way at the
// end of a message, not after its run.
func TestTransactionalMailGetsASessionWhenAllAreBusy(t *testing.T) {
	for name, c := range map[string]struct {
		limits   Limits
		shape    Shape
		provider string
	}{
		"of the source":   {Limits{TransactionalReserve: 50}, Shape{SourceConnections: 2}, "p"},
		"of the relay":    {Limits{TransactionalReserve: 50, MaxSessions: 2}, Shape{}, "q"},
		"to the provider": {Limits{TransactionalReserve: 50}, Shape{RelayConnections: 2}, "p"},
	} {
		t.Run(name, func(t *testing.T) {
			w := newWorld(t, 1, c.limits)
			w.s.SetPool(testPool(1), sources(1))
			for i := range 4 {
				domain := fmt.Sprintf("bulk%d.test", i)
				w.route(domain, "p", domain, c.shape)
				w.add(Queue(i), testKey(1, policy.Bulk, domain), 1_000_000)
				w.takes[domain], w.dials[domain] = time.Second, 100*time.Millisecond
			}
			w.route("urgent.test", c.provider, "urgent", c.shape)
			w.dials["urgent"] = 100 * time.Millisecond
			w.run(time.Minute)
			began, wait := w.now, time.Duration(-1)
			w.onStart = func(q Queue) {
				if q == 100 {
					wait = w.now.Sub(began)
				}
			}
			w.add(100, testKey(2, policy.Transactional, "urgent.test"), 1)
			w.run(30 * time.Second)
			if wait < 0 || wait > 1500*time.Millisecond {
				t.Errorf("the transactional mail waited %v, a message of the others takes 1 s", wait)
			}
		})
	}
}

// TestWhyNamesTheLimit has every limit full in turn.
func TestWhyNamesTheLimit(t *testing.T) {
	for want, c := range map[string]struct {
		limits Limits
		shape  Shape
		other  string // provider of the site that takes the room
	}{
		holdSourceConnections: {Limits{}, Shape{SourceConnections: 1}, "p"},
		holdRelayConnections:  {Limits{}, Shape{RelayConnections: 1}, "p"},
		holdSessions:          {Limits{MaxSessions: 1}, Shape{}, "q"},
		holdConnects:          {Limits{MaxConnectsInFlight: 1}, Shape{}, "q"},
		holdProviderShare:     {Limits{MaxSessions: 4, ProviderShare: 25}, Shape{}, "p"},
		holdTrial:             {Limits{MaxSessions: 4, UnprovenShare: 25}, Shape{}, "q"},
		holdRate:              {Limits{}, Shape{SourceConnectionRate: Rate{Max: 1, Per: time.Hour, Burst: 1}}, "p"},
	} {
		t.Run(want, func(t *testing.T) {
			w := newWorld(t, 1, c.limits)
			w.s.SetPool(testPool(1), sources(1))
			w.route("a.test", c.other, "a", c.shape)
			w.route("b.test", "p", "b", c.shape)
			w.dials["a"] = time.Hour
			w.add(1, testKey(1, policy.Bulk, "a.test"), 1)
			w.run(time.Second)
			w.add(2, testKey(1, policy.Bulk, "b.test"), 1)
			w.run(time.Second)
			if got := w.s.Why(2, w.now); got.Reason != want {
				t.Errorf("it waits for %+v, want %q", got, want)
			}
			w.dials["a"] = 0
			w.run(3 * time.Hour)
			if left := w.queues[2].waiting; left > 0 {
				t.Errorf("it never went when there was room: %+v", w.s.Why(2, w.now))
			}
		})
	}
}

// TestSecondHostIsTried: when a session hangs at one host of a site, another
// one is opened before the first has timed out, but no flood of them.
func TestSecondHostIsTried(t *testing.T) {
	for name, hang := range map[string]func(w *world, d time.Duration){
		"in a dial":    func(w *world, d time.Duration) { w.dials["mx"] = d },
		"in a message": func(w *world, d time.Duration) { w.takes["mx"] = d },
	} {
		t.Run(name, func(t *testing.T) {
			w := newWorld(t, 1, Limits{})
			w.s.SetPool(testPool(1), sources(1))
			w.route("a.test", "p", "mx", Shape{})
			hang(w, time.Hour)
			w.add(1, testKey(1, policy.Bulk, "a.test"), 1000)
			w.run(10 * time.Second)
			if n := len(w.sessions); n != 1 {
				t.Errorf("%d sessions after 10 s without an answer", n)
			}
			w.run(10 * time.Second)
			if n := len(w.sessions); n != 2 {
				t.Errorf("%d sessions after 20 s without an answer, the second host was not tried", n)
			}
			w.run(5 * time.Minute)
			if n := len(w.sessions); n > 22 {
				t.Errorf("%d sessions after 5 minutes without an answer", n)
			}
		})
	}
}
