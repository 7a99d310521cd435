package schedule

import (
	"fmt"
	"testing"
	"time"

	"github.com/relais-mta/relais/shared/ids"
	"github.com/relais-mta/relais/shared/policy"
)

// crowd is tenants with mail for the same hosts, and others with mail for more
// hosts than these.
type crowd struct {
	name    string
	sites   [][]int // of each tenant; its streams have them in turn
	streams []int   // of each tenant; nil: one
	weights []int   // of each tenant; nil: equal
}

var crowds = []crowd{
	{name: "one of one site among five", sites: [][]int{{0, 1, 2, 3, 4}, {0}}},
	{name: "the same sites", sites: [][]int{{0, 1, 2}, {0, 1, 2}}},
	{name: "by weight", sites: [][]int{{0, 1, 2, 3, 4, 5, 6, 7}, {0}, {7}}, weights: []int{10, 30, 20}},
	{name: "a small one in sites of others", sites: [][]int{{0, 1, 2, 3}, {3, 4, 5, 6}, {0, 6}, {3}}},
	{name: "hidden behind two", sites: [][]int{{0, 1, 2, 3, 4, 5}, {0, 6, 7, 8, 9, 10}, {0}}},
	{name: "a chain", sites: [][]int{{0, 1}, {1, 2}, {2, 3}, {3, 4}, {4, 5}, {5, 6}}, weights: []int{10, 20, 10, 20, 10, 20}},
	{name: "streams", sites: [][]int{{0, 1, 2, 3, 4, 5}, {0, 1}, {2}}, streams: []int{1, 2, 1}},
	{name: "many sites", sites: [][]int{seq(0, 100), seq(0, 3), {50}}},
}

func seq(from, to int) (out []int) {
	for i := from; i < to; i++ {
		out = append(out, i)
	}
	return out
}

// fill gives every tenant of a crowd more mail than it can send.
func (c *crowd) fill(w *world, shape Shape) (tenant map[Queue]int) {
	w.s.SetShares(func(id ids.Tenant, _ string, _ policy.StreamKind) Share {
		return Share{TenantWeight: c.weight(int(id[15])), Priority: DefaultPriority}
	})
	tenant = map[Queue]int{}
	for i, sites := range c.sites {
		for j, site := range sites {
			c.add(w, tenant, i, site, j, shape)
		}
	}
	return tenant
}

func (c *crowd) weight(tenant int) int {
	if c.weights == nil || tenant >= len(c.weights) {
		return DefaultWeight
	}
	return c.weights[tenant]
}

func (c *crowd) add(w *world, tenant map[Queue]int, i, site, j int, shape Shape) {
	domain := fmt.Sprintf("d%d.test", site)
	w.route(domain, "p", fmt.Sprint("mx", site), shape)
	w.takes[fmt.Sprint("mx", site)], w.dials[fmt.Sprint("mx", site)] = 10*time.Millisecond, 10*time.Millisecond
	key := testKey(byte(i), policy.Bulk, domain)
	if c.streams != nil && i < len(c.streams) {
		key.Stream = fmt.Sprint("s", j%c.streams[i])
	}
	n := Queue(len(tenant))
	tenant[n] = i
	w.add(n, key, 1_000_000)
}

// scarce is what a provider may be short of.
var scarce = []struct {
	name  string
	shape Shape
	gate  Rate // of all the provider's mail
	lanes []int
	loses int // of a share, in percent, at most
}{
	{name: "rate of a source", shape: perSecond(40), lanes: []int{1, 3}, loses: 10},
	{name: "rate of the relay", shape: Shape{RelayMessageRate: perSecond(40).SourceMessageRate}, lanes: []int{1, 3}, loses: 10},
	{name: "rate of a gate", gate: perSecond(40).SourceMessageRate, lanes: []int{1, 3}, loses: 10},
	{name: "rate, few a connection", shape: Shape{RelayMessageRate: Rate{Max: 40, Per: time.Second, Burst: 5}, MessagesPerConnection: 3}, lanes: []int{1, 3}, loses: 10},
	// With more lanes it is not short of them: each site has one at a time.
	{name: "connections", shape: Shape{SourceConnections: 1, MessagesPerConnection: 1}, lanes: []int{1}, loses: 10},
	{name: "rate and connections", shape: Shape{SourceMessageRate: perSecond(40).SourceMessageRate, SourceConnections: 3}, lanes: []int{1, 3}, loses: 10},
}

// eachScarce runs a test with all that may be short and all crowds.
func eachScarce(t *testing.T, run func(t *testing.T, w *world, c *crowd, shape Shape, loses int)) {
	for _, what := range scarce {
		for i := range crowds {
			for _, lanes := range what.lanes {
				c := &crowds[i]
				t.Run(fmt.Sprintf("%s/%s/%d lanes", what.name, c.name, lanes), func(t *testing.T) {
					w := newWorld(t, 1, Limits{TransactionalReserve: 50})
					w.s.SetPool(testPool(1), sources(lanes))
					if what.gate.Max > 0 {
						w.s.SetGate(Gate{ID: GateID{"test", 1}, Match: Match{Provider: "p"}, Reason: "test", Messages: what.gate}, w.now)
					}
					run(t, w, c, what.shape, what.loses)
				})
			}
		}
	}
}

// TestTenantsOfSharedSitesGetTheirWeight: whoever shares hosts with a tenant of
// more hosts is served by its weight, whatever is short.
func TestTenantsOfSharedSitesGetTheirWeight(t *testing.T) {
	eachScarce(t, func(t *testing.T, w *world, c *crowd, shape Shape, loses int) {
		tenant := c.fill(w, shape)
		counts := make([]int, len(c.sites))
		w.onStart = func(q Queue) { counts[tenant[q]]++ }
		w.run(10 * time.Second) // until all sites have a session
		clear(counts)
		w.run(20 * time.Second)
		c.judge(t, counts, loses)
	})
}

func (c *crowd) judge(t *testing.T, counts []int, loses int) {
	t.Helper()
	total, weights := 0, 0
	for i, n := range counts {
		total += n
		weights += c.weight(i)
	}
	for i, n := range counts {
		want := total * c.weight(i) / weights
		if n < want*(100-loses)/100 || n > want*(100+loses)/100+1 {
			t.Errorf("tenant %d had %d messages, its weight is worth %d: %v", i, n, want, counts)
		}
	}
}

// TestNewcomerAtASharedSiteWaitsForItsShareOnly: who comes with a few mails for
// hosts that others have been sending to is done when its share allows it.
func TestNewcomerAtASharedSiteWaitsForItsShareOnly(t *testing.T) {
	eachScarce(t, func(t *testing.T, w *world, c *crowd, shape Shape, loses int) {
		tenant := c.fill(w, shape)
		w.run(10 * time.Second)
		const mails = 20
		newcomer, began, went, others := len(c.sites), w.now, 0, 0
		var last time.Time
		w.onStart = func(q Queue) {
			switch {
			case tenant[q] != newcomer:
				if went < mails {
					others++
				}
			default:
				went, last = went+1, w.now
			}
		}
		weights := DefaultWeight
		for i := range c.sites {
			weights += c.weight(i)
		}
		c.add(w, tenant, newcomer, 0, 0, shape)
		n := Queue(len(tenant) - 1)
		w.queues[n].waiting = mails
		w.head(n)
		w.run(time.Minute)
		// Its mails, and what the others have of the same rounds; one more round,
		// and what goes until it has its first turn at a session.
		turns := mails*weights/DefaultWeight*100/(100-loses) + 2*weights/messageCost + minRun
		if went != mails || others+mails > turns {
			t.Errorf("%d of %d mails of the newcomer went in %v, and %d of others: its share is %d in all", went, mails, last.Sub(began), others, turns)
		}
	})
}

// TestStreamsOfSharedSitesGetTheirWeight: a stream is not hidden by another one
// of its tenant that has more hosts.
func TestStreamsOfSharedSitesGetTheirWeight(t *testing.T) {
	for _, what := range scarce {
		for _, lanes := range what.lanes {
			t.Run(fmt.Sprintf("%s/%d lanes", what.name, lanes), func(t *testing.T) {
				w := newWorld(t, 1, Limits{})
				w.s.SetPool(testPool(1), sources(lanes))
				w.s.SetShares(func(_ ids.Tenant, stream string, _ policy.StreamKind) Share {
					return Share{StreamWeight: 10 * len(stream), Priority: DefaultPriority}
				})
				if what.gate.Max > 0 {
					w.s.SetGate(Gate{ID: GateID{"test", 1}, Match: Match{Provider: "p"}, Reason: "test", Messages: what.gate}, w.now)
				}
				counts := map[string]int{}
				n := Queue(0)
				for i, stream := range []string{"a", "bb"} {
					for site := range []int{6, 1}[i] {
						domain := fmt.Sprintf("d%d.test", site)
						w.route(domain, "p", domain, what.shape)
						w.takes[domain], w.dials[domain] = 10*time.Millisecond, 10*time.Millisecond
						key := testKey(1, policy.Bulk, domain)
						key.Stream = stream
						w.add(n, key, 1_000_000)
						n++
					}
				}
				w.run(10 * time.Second)
				w.onStart = func(q Queue) { counts[w.queues[q].key.Stream]++ }
				w.run(20 * time.Second)
				total, loses := counts["a"]+counts["bb"], what.loses
				if want := total * 2 / 3; counts["bb"] < want*(100-loses)/100 || counts["bb"] > want*(100+loses)/100+1 {
					t.Errorf("the stream of one site and weight 20 of 30 had %d of %d turns", counts["bb"], total)
				}
			})
		}
	}
}

// TestNobodyIsMissingInAContest: in random worlds whoever could use what a
// contest is about stands there, and who is first has the lowest account.
func TestNobodyIsMissingInAContest(t *testing.T) {
	for seed := range uint64(40) {
		w, _ := randomWorld(t, seed)
		seen := 0
		w.onCheck = func() {
			for _, g := range w.s.groups {
				for _, st := range g.order {
					for _, strd := range strands(st) {
						seen += strd.missed(t)
					}
				}
			}
		}
		w.run(time.Hour)
		if seen == 0 {
			t.Errorf("seed %d: nobody stood in a contest", seed)
		}
	}
}

func strands(st *site) (out []*strand) {
	for _, t := range st.turns {
		out = append(out, t.strands...)
	}
	return out
}

// missed asserts that a strand stands wherever it has a part, before who has its
// turn later, and returns in how many contests.
func (f *strand) missed(t *testing.T) (stood int) {
	t.Helper()
	st := f.turn.site
	if f.head == nil {
		return 0
	}
	stands := []*stand{&f.open}
	for sd := f.posted; sd != nil; sd = sd.next {
		stands = append(stands, sd)
	}
	if want := 1 + len(st.posts); !f.pinned && len(stands) != want {
		t.Fatalf("a stream has %d places at a site of %d", len(stands), want)
	}
	for _, sd := range stands {
		for way := range sd.stakes {
			k := &sd.stakes[way]
			switch {
			case way == reserved && !f.flow.urgent():
			case k.line != nil:
				first := k.seat.in[way].first()
				if k.live() && f.flow.member.accounts[way].before(&first.strand.flow.member.accounts[way]) {
					t.Fatalf("a tenant goes first in a contest before its turn")
				}
				stood++
			case !k.waits:
				t.Fatalf("a stream with work stands nowhere")
			case k.seat.live() && !st.touched:
				t.Fatalf("a stream with work waits for a seat that can be used")
			}
		}
	}
	return stood
}
