package schedule

import (
	"fmt"
	"math/rand/v2"
	"slices"
	"testing"
	"time"

	"github.com/relais-mta/relais/shared/ids"
	"github.com/relais-mta/relais/shared/mailaddr"
	"github.com/relais-mta/relais/shared/policy"
)

// perSecond is a message rate of every source.
func perSecond(n int) Shape {
	return Shape{SourceMessageRate: Rate{Max: n, Per: time.Second, Burst: 1}}
}

// p99 is the wait that 1 in 100 exceeds.
func p99(waits []time.Duration) time.Duration {
	slices.Sort(waits)
	return waits[len(waits)*99/100]
}

// TestSmallTenantWaitsForItsShareOnly is the fairness promise at its full size:
// a tenant with 1,000,000 mails in 10,000 queues and one with 100 in one queue,
// to the same provider under a tight rate.
func TestSmallTenantWaitsForItsShareOnly(t *testing.T) {
	for _, apart := range []bool{false, true} {
		t.Run(fmt.Sprintf("a site for each domain=%v", apart), func(t *testing.T) {
			const rate = 20
			w := newWorld(t, 1, Limits{MaxSessions: 2_000, MaxConnectsInFlight: 200, MaxResolvesInFlight: 200, ProviderShare: 50, UnprovenShare: 50, TransactionalReserve: 50})
			w.s.SetPool(testPool(1), sources(1))
			shape := perSecond(rate)
			shape.SourceConnections = 10
			site := func(d int) string {
				if apart {
					return fmt.Sprint("mx", d)
				}
				return "mx"
			}
			for d := range 10_000 {
				domain := fmt.Sprintf("d%d.test", d)
				w.route(domain, "p", site(d), shape)
				w.add(Queue(d), testKey(1, policy.Bulk, domain), 100)
			}
			w.run(5 * time.Minute)
			if len(w.starts) < 5*60*rate*95/100 {
				t.Fatalf("%d messages in 5 minutes at %d a second", len(w.starts), rate)
			}
			if left := w.left(); left < 900_000 {
				t.Fatalf("only %d mails of the large tenant still wait", left)
			}
			var waits []time.Duration
			others := 0 // of the large tenant, until the small one's last
			w.onStart = func(q Queue) {
				switch {
				case q == 20_000:
					waits = append(waits, w.now.Sub(w.began))
				case len(waits) < 100:
					others++
				}
			}
			w.began = w.now
			w.route("small.test", "p", site(20_000), shape)
			w.add(20_000, testKey(2, policy.Bulk, "small.test"), 100)
			w.run(time.Minute)
			if len(waits) != 100 {
				t.Fatalf("%d of 100 mails of the small tenant went in a minute", len(waits))
			}
			// Its share is half of the rate, so its 100 mails need 10 seconds; a
			// connection and the session of another may come before.
			share := 100 * time.Second / (rate / 2)
			if got := p99(waits); got > share*5/4 {
				t.Errorf("99 %% of the small tenant's mail waited up to %v, its share allows %v", got, share)
			}
			// And the large one has its share meanwhile.
			if others < 75 || others > 125 {
				t.Errorf("%d mails of the large tenant went beside 100 of the small one", others)
			}
		})
	}
}

// left counts the mails that wait.
func (w *world) left() (n int) {
	for _, q := range w.queues {
		n += q.waiting
	}
	return n
}

// TestDeficitRoundRobin has tenants of random weights and numbers of domains
// who all have always more to send. At every moment what two of them were served,
// by weight, differs by at most one round and the messages in flight.
func TestDeficitRoundRobin(t *testing.T) {
	for seed := range uint64(40) {
		rng := rand.New(rand.NewPCG(seed, 3))
		w := newWorld(t, seed, Limits{})
		w.s.SetPool(testPool(1), sources(1+rng.IntN(3)))
		tenants := 2 + rng.IntN(5)
		weights := make([]int, tenants)
		for i := range weights {
			weights[i] = 1 + rng.IntN(40)
		}
		w.s.SetShares(func(id ids.Tenant, _ string, _ policy.StreamKind) Share {
			return Share{TenantWeight: weights[id[15]], Priority: DefaultPriority}
		})
		served := make([]float64, tenants)
		var tenant []int
		w.onStart = func(q Queue) { served[tenant[q]]++ }
		n := Queue(0)
		for i := range tenants {
			for d := range 1 + rng.IntN(20) {
				domain := fmt.Sprintf("d%d.test", d)
				w.route(domain, "p", "mx", perSecond(10+rng.IntN(5)))
				w.shapes["p"] = perSecond(20)
				r := w.routes[mailaddr.Domain(domain)]
				r.Shape = perSecond(20)
				w.routes[mailaddr.Domain(domain)] = r
				tenant = append(tenant, i)
				w.add(n, testKey(byte(i), policy.Bulk, domain), 100_000)
				n++
			}
		}
		w.run(10 * time.Second) // until all have been found
		clear(served)
		for range 60 {
			w.run(time.Second)
			lo, hi := 1e9, 0.0
			for i := range tenants {
				rounds := served[i] * messageCost / float64(weights[i])
				lo, hi = min(lo, rounds-messageCost/float64(weights[i])), max(hi, rounds)
			}
			if hi-lo > 2+2*float64(messageCost)/float64(slices.Min(weights)) {
				t.Fatalf("seed %d: tenants of weights %v were served %v: rounds %v to %v", seed, weights, served, lo, hi)
			}
		}
	}
}

// TestReserve has bulk and transactional mail under a rate: the transactional
// mail has at least its reserve while it waits, the bulk mail all when none
// does, and the reserve is there at once when some comes.
func TestReserve(t *testing.T) {
	for _, reserve := range []int{10, 25, 50, 80, 90} {
		t.Run(fmt.Sprint(reserve), func(t *testing.T) {
			w := newWorld(t, 1, Limits{TransactionalReserve: reserve})
			w.s.SetPool(testPool(1), sources(1))
			for i, d := range []string{"a.test", "b.test", "c.test"} {
				w.route(d, "p", d, perSecond(100))
				for tenant := range byte(4) { // bulk of four tenants
					w.add(Queue(10*i)+Queue(tenant), testKey(tenant, policy.Bulk, d), 100_000)
				}
			}
			counts := map[bool]int{}
			w.onStart = func(q Queue) { counts[q >= 100]++ }
			w.run(20 * time.Second)
			clear(counts)
			w.run(20 * time.Second)
			if counts[false] < 1990 {
				t.Errorf("bulk mail alone got %d of 2000 turns", counts[false])
			}
			// One of them has transactional mail, more than its share.
			w.add(100, testKey(1, policy.Transactional, "a.test"), 100_000)
			w.run(time.Second)
			clear(counts)
			w.run(20 * time.Second)
			least := 2000 * reserve / 100
			if counts[true] < least-5 || counts[true] > least+(2000-least)/4 {
				t.Errorf("transactional mail with %d %% reserved got %d of 2000 turns", reserve, counts[true])
			}
			if counts[false]+counts[true] < 1990 {
				t.Errorf("%d of 2000 turns were used", counts[false]+counts[true])
			}
			// Now and then one, which finds a session.
			w.queues[100].waiting = 0
			w.head(100)
			w.run(time.Second)
			for range 50 {
				w.run(time.Duration(300+w.rng.IntN(100)) * time.Millisecond)
				began := w.now
				var wait time.Duration
				w.onStart = func(q Queue) {
					if q == 100 {
						wait = w.now.Sub(began)
					}
				}
				w.add(100, testKey(1, policy.Transactional, "a.test"), 1)
				w.run(200 * time.Millisecond)
				if w.queues[100].waiting > 0 || wait > 60*time.Millisecond {
					t.Fatalf("a transactional mail waited %v (left: %d) while bulk mail went", wait, w.queues[100].waiting)
				}
			}
		})
	}
}

// TestPriorities has streams of one tenant with always more to send: a lower
// one has one turn in as many as it is below the highest, and never waits for
// longer than that and one turn for each other priority.
func TestPriorities(t *testing.T) {
	for seed := range uint64(8) {
		rng := rand.New(rand.NewPCG(seed, 4))
		w := newWorld(t, seed, Limits{})
		w.s.SetPool(testPool(1), sources(1))
		n := 2 + rng.IntN(5)
		priorities := make([]int, n)
		for i := range priorities {
			priorities[i] = rng.IntN(101)
		}
		index := func(stream string) int { return int(stream[0] - 'a') }
		w.s.SetShares(func(_ ids.Tenant, stream string, _ policy.StreamKind) Share {
			return Share{Priority: priorities[index(stream)]}
		})
		turn, last, worst := 0, make([]int, n), make([]int, n)
		counts := make([]int, n)
		w.onStart = func(q Queue) {
			i := index(w.queues[q].key.Stream)
			turn++
			counts[i]++
			worst[i] = max(worst[i], turn-last[i])
			last[i] = turn
		}
		for i := range n {
			for d := range 3 { // of hosts of their own
				key := testKey(1, policy.Bulk, fmt.Sprintf("d%d.test", d))
				key.Stream = string(rune('a' + i))
				w.route(string(key.Domain), "p", string(key.Domain), perSecond(50))
				w.add(Queue(10*i+d), key, 100_000)
			}
		}
		w.run(20 * time.Second)
		for i := range n {
			last[i], worst[i] = turn, 0
		}
		clear(counts)
		w.run(time.Minute)
		top := slices.Max(priorities)
		levels := map[int]int{}
		for _, p := range priorities {
			levels[p]++
		}
		for i, p := range priorities {
			bound := (top - p + len(levels)) * levels[p]
			if worst[i] > bound || counts[i] == 0 {
				t.Errorf("seed %d: of priorities %v the stream of %d waited %d turns (had %d), the bound is %d", seed, priorities, p, worst[i], counts[i], bound)
			}
		}
		total, ofLevel := 0, map[int]int{}
		for i, p := range priorities {
			ofLevel[p] += counts[i]
			total += counts[i]
		}
		for p, n := range ofLevel {
			if p < top && n > total/(top-p)+2 {
				t.Errorf("seed %d: of priorities %v that of %d had %d of %d turns: the higher do not go first", seed, priorities, p, n, total)
			}
		}
	}
}

// TestEqualStreamsShareByWeight is the deficit round robin between streams.
func TestEqualStreamsShareByWeight(t *testing.T) {
	w := newWorld(t, 1, Limits{})
	w.s.SetPool(testPool(1), sources(1))
	weights := map[string]int{"a": 10, "b": 30, "c": 5}
	w.s.SetShares(func(_ ids.Tenant, stream string, _ policy.StreamKind) Share {
		return Share{StreamWeight: weights[stream], Priority: 50}
	})
	counts := map[string]int{}
	w.onStart = func(q Queue) { counts[w.queues[q].key.Stream]++ }
	for i, stream := range []string{"a", "b", "c"} {
		key := testKey(1, policy.Bulk, stream+".test")
		key.Stream = stream
		w.route(stream+".test", "p", stream, perSecond(90))
		w.add(Queue(i), key, 100_000)
	}
	w.run(10 * time.Second)
	clear(counts)
	w.run(100 * time.Second) // 9000 turns
	for stream, weight := range weights {
		if want := 200 * weight; counts[stream] < want-want/20 || counts[stream] > want+want/20 {
			t.Errorf("streams of weights %v had %v turns", weights, counts)
		}
	}
}

// TestNobodyStealsByComingAgain: a tenant whose queue is emptied and filled
// again and again has no more than its share.
func TestNobodyStealsByComingAgain(t *testing.T) {
	w := newWorld(t, 1, Limits{})
	w.s.SetPool(testPool(1), sources(1))
	w.route("a.test", "p", "mx", perSecond(100))
	counts := map[Queue]int{}
	w.onStart = func(q Queue) {
		counts[q]++
		if q == 2 { // the next one comes as soon as one has gone
			w.after(0, func() { w.add(2, testKey(2, policy.Bulk, "a.test"), 1) })
		}
	}
	w.add(1, testKey(1, policy.Bulk, "a.test"), 100_000)
	w.add(2, testKey(2, policy.Bulk, "a.test"), 1)
	w.run(time.Minute)
	if counts[2] > counts[1]+10 || counts[2] < counts[1]/3 {
		t.Errorf("turns %v", counts)
	}
}

// TestSlowHostsSaveNoCredit: a tenant whose hosts were too slow to take its
// share does not get it later at the cost of others.
func TestSlowHostsSaveNoCredit(t *testing.T) {
	w := newWorld(t, 1, Limits{})
	w.s.SetPool(testPool(1), sources(1))
	w.route("slow.test", "p", "slow", perSecond(100))
	w.route("fast.test", "p", "fast", perSecond(100))
	w.takes["slow"] = 4 * time.Minute
	counts := map[Queue]int{}
	w.onStart = func(q Queue) { counts[q]++ }
	w.add(1, testKey(1, policy.Bulk, "slow.test"), 1_000_000)
	w.add(2, testKey(2, policy.Bulk, "fast.test"), 1_000_000)
	w.run(5 * time.Minute)
	w.takes["slow"] = time.Millisecond
	w.run(4 * time.Minute) // the slow messages are about to end
	clear(counts)
	w.run(10 * time.Second)
	if counts[2] < 450 || counts[1] < 450 {
		t.Errorf("turns %v of 1000 after one host was slow for long", counts)
	}
}

// TestAccounts has the rules of an account one by one.
func TestAccounts(t *testing.T) {
	p := pass{round: 100}
	a := account{weight: 30}
	p.enter(&a)
	if a.round != 100 || a.deficit != 30 {
		t.Errorf("a newcomer is at round %d with %d, want 100 with 30", a.round, a.deficit)
	}
	for range 3 { // a weight of 30 pays three messages a round
		if a.round != 100 {
			t.Errorf("it is at round %d with mail of this one to pay for", a.round)
		}
		p.charge(&a, messageCost)
	}
	if a.round != 101 {
		t.Errorf("it is at round %d after its three messages", a.round)
	}
	p.round = 200
	p.enter(&a) // with nothing to offer meanwhile
	if a.round != 200 {
		t.Errorf("it comes again at round %d of 200: it was given credit", a.round)
	}
	a.round = 250
	p.enter(&a)
	if a.round != 250 {
		t.Errorf("what it spent ahead is forgotten: round %d", a.round)
	}
	slow := account{weight: 1, seq: 1, round: 10, deficit: messageCost}
	p.charge(&slow, messageCost)
	if want := uint64(200 - maxLagRounds + messageCost); slow.round != want {
		t.Errorf("a weight of 1 that fell behind is at round %d after a message, want %d", slow.round, want)
	}
}
