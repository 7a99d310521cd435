package schedule

import (
	"fmt"
	"math/rand/v2"
	"slices"
	"testing"
	"time"

	"github.com/relais-mta/relais/shared/ids"
	"github.com/relais-mta/relais/shared/policy"
)

// of returns a key of mail with a priority.
func (k Key) of(priority int) Key {
	k.Priority = policy.PriorityOf(priority)
	return k
}

// TestUrgentMailOfAStreamGoesFirst: mail of a higher priority does not wait for
// the backlog of its stream, whatever hosts either has.
func TestUrgentMailOfAStreamGoesFirst(t *testing.T) {
	for _, apart := range []bool{false, true} {
		t.Run(fmt.Sprintf("a site for each domain=%v", apart), func(t *testing.T) {
			w := newWorld(t, 1, Limits{})
			w.s.SetPool(testPool(1), sources(1))
			site := func(d int) string {
				if apart {
					return fmt.Sprint("mx", d)
				}
				return "mx"
			}
			for d := range 500 {
				domain := fmt.Sprintf("d%d.test", d)
				w.route(domain, "p", site(d), perSecond(20))
				w.add(Queue(d), testKey(1, policy.Bulk, domain), 1_000)
			}
			w.run(30 * time.Second)
			var waits []time.Duration
			w.onStart = func(q Queue) {
				if q >= 1_000 {
					waits = append(waits, w.now.Sub(w.began))
				}
			}
			w.began = w.now
			for d := range 20 {
				domain := fmt.Sprintf("d%d.test", d)
				w.add(Queue(1_000+d), testKey(1, policy.Bulk, domain).of(90), 1)
			}
			w.run(3 * time.Second)
			// 20 messages take one second of the rate; one in 41 turns belongs to
			// the backlog, and sessions to other hosts are opened first.
			if len(waits) != 20 || slices.Max(waits) > 1500*time.Millisecond {
				t.Errorf("%d of 20 urgent mails went, the last after %v", len(waits), slices.Max(append(waits, 0)))
			}
		})
	}
}

// TestMailOfLowPriorityAges has mail of one stream in several priorities, always
// more than can go: a lower one has a turn in as many as it is below the
// highest, and never waits for longer than that and one turn for each other.
func TestMailOfLowPriorityAges(t *testing.T) {
	for seed := range uint64(8) {
		rng := rand.New(rand.NewPCG(seed, 5))
		priorities := map[int]bool{}
		for len(priorities) < 2+int(seed)%4 {
			priorities[rng.IntN(policy.MaxPriority+1)] = true
		}
		if seed == 0 {
			priorities = map[int]bool{0: true, 100: true}
		}
		w := newWorld(t, seed, Limits{})
		w.s.SetPool(testPool(1), sources(1))
		turn := 0
		last, worst, counts := map[int]int{}, map[int]int{}, map[int]int{}
		w.onStart = func(q Queue) {
			p := w.queues[q].key.Priority.Number()
			turn++
			counts[p]++
			worst[p] = max(worst[p], turn-last[p])
			last[p] = turn
		}
		top := 0
		for p := range priorities {
			top = max(top, p)
			for d := range 3 {
				domain := fmt.Sprintf("d%d.test", d)
				w.route(domain, "p", domain, perSecond(50))
				w.add(Queue(10*p+d), testKey(1, policy.Bulk, domain).of(p), 100_000)
			}
		}
		w.run(20 * time.Second)
		clear(worst)
		clear(counts)
		for p := range priorities {
			last[p] = turn
		}
		total := turn
		w.run(time.Minute)
		total = turn - total
		for p := range priorities {
			if bound := top - p + len(priorities); worst[p] > bound || counts[p] == 0 {
				t.Errorf("seed %d: of priorities %v mail of %d waited %d turns (had %d), the bound is %d", seed, priorities, p, worst[p], counts[p], bound)
			}
			if p < top && counts[p] > total/(top-p)+2 {
				t.Errorf("seed %d: of priorities %v mail of %d had %d of %d turns: the higher does not go first", seed, priorities, p, counts[p], total)
			}
		}
	}
}

// TestPriorityOfMailTakesNothingFromOthers: neither another tenant nor another
// stream of the same one has less because mail says that it is urgent.
func TestPriorityOfMailTakesNothingFromOthers(t *testing.T) {
	w := newWorld(t, 1, Limits{})
	w.s.SetPool(testPool(1), sources(1))
	w.s.SetShares(func(ids.Tenant, string, policy.StreamKind) Share { return Share{Priority: DefaultPriority} })
	counts := map[string]int{}
	w.onStart = func(q Queue) {
		key := w.queues[q].key
		counts[fmt.Sprint(key.Tenant[15], key.Stream)]++
	}
	n := Queue(0)
	for d := range 4 { // of all, at hosts of their own
		domain := fmt.Sprintf("d%d.test", d)
		w.route(domain, "p", domain, perSecond(80))
		for _, mail := range []struct {
			tenant     byte
			stream     string
			priorities []int
		}{{1, "loud", []int{100, 99, 98, 50}}, {1, "plain", []int{50}}, {2, "plain", []int{0}}} {
			for _, p := range mail.priorities {
				key := testKey(mail.tenant, policy.Bulk, domain).of(p)
				key.Stream = mail.stream
				w.add(n, key, 100_000)
				n++
			}
		}
	}
	w.run(10 * time.Second)
	clear(counts)
	w.run(100 * time.Second) // 8000 turns
	for who, want := range map[string]int{"1loud": 2000, "1plain": 2000, "2plain": 4000} {
		if got := counts[who]; got < want*98/100 || got > want*102/100 {
			t.Errorf("%s had %d turns, want %d: %v", who, got, want, counts)
		}
	}
}

// TestPrioritiesAtAGateTakeTurns: where the rate of a gate holds a tenant's mail,
// mail of a higher priority does not wait behind the backlog of its stream.
func TestPrioritiesAtAGateTakeTurns(t *testing.T) {
	w := newWorld(t, 1, Limits{})
	w.s.SetPool(testPool(1), sources(1))
	w.route("a.test", "p", "mx", Shape{})
	w.route("b.test", "p", "mx", Shape{})
	w.s.SetGate(Gate{ID: GateID{"test", 1}, Match: Match{Tenant: ids.Tenant{15: 1}}, Reason: "limit", Messages: Rate{Max: 10, Per: time.Second, Burst: 1}}, w.now)
	w.add(1, testKey(1, policy.Bulk, "a.test"), 10_000)
	w.run(10 * time.Second)
	var waits []time.Duration
	w.onStart = func(q Queue) {
		if q == 2 {
			waits = append(waits, w.now.Sub(w.began))
		}
	}
	w.began = w.now
	w.add(2, testKey(1, policy.Bulk, "b.test").of(100), 10)
	w.run(3 * time.Second)
	if len(waits) != 10 || waits[9] > 2200*time.Millisecond {
		t.Errorf("%d of 10 urgent mails went by every second turn of a gate: %v", len(waits), waits)
	}
}
