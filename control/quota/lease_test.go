package quota

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/testutil"
	"google.golang.org/protobuf/proto"

	"github.com/relais-mta/relais/control"
	"github.com/relais-mta/relais/control/command"
	"github.com/relais-mta/relais/control/state"
	"github.com/relais-mta/relais/shared/ids"
	"github.com/relais-mta/relais/shared/lease"
	"github.com/relais-mta/relais/shared/wire"
)

// cluster is a log of one server, relays that hold what they are lent, and the
// lease part between them, in virtual time.
type cluster struct {
	t     *testing.T
	state *state.Store
	part  *Lease
	start time.Time
	in    chan Message

	mu     sync.Mutex
	index  uint64
	barred uint64        // incarnations from this on have no session; 0: all have
	lose   bool          // the next tick's outcome is unknown, although it is applied
	link   time.Duration // one way between a relay and the leader
	commit time.Duration // of an entry
	ticks  int
	sizes  int // changes in the largest tick
	relays map[ids.Node]*relay
}

// relay is a relay's half.
type relay struct {
	node    ids.Node
	holder  *lease.Holder
	rights  map[lease.LimitID]*lease.Rights
	demand  map[lease.LimitID]int64
	welcome int
	wanted  int
	silent  bool
}

func newCluster(t *testing.T, relays int) *cluster {
	c := &cluster{t: t, state: state.New(), start: time.Now(), in: make(chan Message, maxInbox), relays: make(map[ids.Node]*relay)}
	c.must(&command.ClusterInit{Cluster: &command.Cluster{Id: bytesOf(0xc), Generation: 1, FsmVersion: uint32(command.FSMVersion), CaBundle: []byte("pem"), CaSealed: []byte("s"), KekId: "kek", RecoverySealed: []byte("r"), CredentialKeySealed: []byte("c")}})
	for i := range relays {
		node := relayID(i)
		c.must(&command.TokenCreate{Token: &command.JoinToken{Id: node[:], Role: "relay", SecretHash: append(bytesOf(1), bytesOf(1)...), UsesMax: 1, UsesLeft: 1, NotAfterMs: time.Now().Add(time.Hour).UnixMilli()}})
		c.must(&command.TokenRedeem{Token: node[:], CsrHash: append(bytesOf(byte(i)), bytesOf(byte(i))...), Role: "relay", Node: node[:], Name: fmt.Sprint("edge-", i), Remote: []byte{198, 51, 100, 7}})
		c.start1(node, 1)
	}
	var err error
	if c.part, err = NewLease(LeaseOptions{State: c.state, Log: c, Send: c.deliver, Succeeds: c.succeeds, Logger: slog.New(slog.NewTextHandler(io.Discard, nil)), Registerer: prometheus.NewRegistry(), Clock: c.now}); err != nil {
		t.Fatal(err)
	}
	return c
}

func bytesOf(b byte) []byte { return []byte(strings.Repeat(string([]byte{b}), 16)) }

func (c *cluster) start1(node ids.Node, incarnation uint64) *relay {
	r := &relay{node: node, holder: lease.NewHolder(lease.DefaultConfig(), 1, incarnation, 1, nil, c.now()), rights: map[lease.LimitID]*lease.Rights{}, demand: map[lease.LimitID]int64{}}
	c.relays[node] = r
	return r
}

// succeeds stands for who has which session.
func (c *cluster) succeeds(_, _ ids.Node, incarnation uint64) bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.barred == 0 || incarnation < c.barred
}

func (c *cluster) now() lease.Instant { return lease.Instant(time.Since(c.start)) + 1 }

// Propose implements Log.
func (c *cluster) Propose(_ context.Context, cmd command.Command) (state.Result, error) {
	if err := cmd.Validate(); err != nil {
		return state.Result{}, err
	}
	b, err := command.Encode(cmd, time.Now(), 1)
	if err != nil {
		return state.Result{}, err
	}
	e, err := command.Decode(b)
	if err != nil {
		return state.Result{}, err
	}
	if c.commit > 0 {
		if err := pause(context.Background(), c.commit); err != nil {
			return state.Result{}, err
		}
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	c.index++
	out := c.state.Apply(c.index, e)
	if tick, ok := cmd.(*command.LeaseTick); ok {
		c.ticks++
		c.sizes = max(c.sizes, len(tick.GetLimits()))
		if c.lose {
			c.lose = false
			return state.Result{}, control.ErrOutcomeUnknown
		}
	}
	return out, out.Err
}

func (c *cluster) must(cmd command.Command) any {
	c.t.Helper()
	out, err := c.Propose(c.t.Context(), cmd)
	if err != nil {
		c.t.Fatalf("%T: %v", cmd, err)
	}
	return out.Row
}

func (c *cluster) policy(text string) {
	c.t.Helper()
	c.must(&command.PolicyPut{Expect: c.state.Read().Policy().Revision, Sections: []*command.PolicySection{{Name: "limits", Text: text}}})
}

// deliver hands a message to a relay.
func (c *cluster) deliver(node ids.Node, m proto.Message) {
	if c.link > 0 {
		time.AfterFunc(c.link, func() { c.give(node, m) })
		return
	}
	c.give(node, m)
}

func (c *cluster) give(node ids.Node, m proto.Message) {
	c.mu.Lock()
	defer c.mu.Unlock()
	r := c.relays[node]
	if r == nil || r.silent {
		return
	}
	switch m := m.(type) {
	case *wire.LeaseWelcome:
		r.welcome++
	case *wire.LeaseHelloWanted:
		r.wanted++
	case *wire.LeaseGrant:
		g, err := wire.DecodeLeaseGrant(1, m)
		if err != nil {
			c.t.Error(err)
			return
		}
		r.holder.Grant(c.now(), g)
		if _, version := r.holder.SaveFloors(); r.holder.FloorsUnsaved() || version > 0 {
			r.holder.FloorsSaved(version)
		}
	}
}

// say has a relay greet and report.
func (c *cluster) say(r *relay) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if r.silent {
		return
	}
	if r.welcome == 0 || r.wanted > 0 {
		r.wanted = 0
		c.in <- Message{Node: r.node, Body: wire.EncodeLeaseHello(r.holder.Hello(), r.holder.Floors()), At: c.now()}
		return
	}
	for id, n := range r.demand {
		if r.rights[id] == nil {
			l := c.limit(id)
			r.rights[id] = r.holder.Rights(id, l.Kind, l.Per)
		}
		r.holder.SetDemand(r.rights[id], n)
	}
	report := r.holder.Report(c.now())
	c.in <- Message{Node: r.node, Body: wire.EncodeLeaseReport(&report), At: c.now()}
}

func (c *cluster) limit(id lease.LimitID) lease.Limit {
	for _, l := range c.state.Read().SharedLimits() {
		if l.ID == id {
			return l.Limit
		}
	}
	return lease.Limit{ID: id, Kind: lease.Slots}
}

func (c *cluster) named(name string) *control.SharedLimit {
	for _, l := range c.state.Read().SharedLimits() {
		if l.Name == name {
			return l
		}
	}
	return nil
}

// lead runs the part while f runs.
func (c *cluster) lead(f func()) error {
	c.t.Helper()
	ctx, cancel := context.WithCancel(c.t.Context())
	defer cancel()
	ended := make(chan error, 1)
	go func() { ended <- c.part.Lead(ctx, c.in) }()
	f()
	cancel()
	return <-ended
}

// pass lets time go by; relays speak once a second. At every step what relays may
// use is within the limit.
func (c *cluster) pass(d time.Duration) {
	c.t.Helper()
	for end := time.Now().Add(d); time.Now().Before(end); {
		for i := range len(c.relays) {
			if r := c.relays[relayID(i)]; r != nil {
				c.say(r)
			}
		}
		if err := pause(c.t.Context(), time.Second); err != nil {
			c.t.Fatal(err)
		}
		synctest.Wait()
		c.check()
	}
}

func (c *cluster) check() {
	c.t.Helper()
	c.mu.Lock()
	defer c.mu.Unlock()
	for _, l := range c.state.Read().SharedLimits() {
		used, held := int64(0), lease.Share{}
		for _, r := range c.relays {
			if rights := r.rights[l.ID]; rights != nil {
				share, until, floor := rights.Lease()
				if until > c.now() {
					used += share.Amount
				}
				used += floor.Amount
			}
		}
		for _, h := range c.state.Read().Holdings(l.ID) {
			held.Amount += h.Ceiling.Amount + h.Floor.Amount
		}
		if used > l.Max && held.Amount <= l.Max {
			c.t.Fatalf("limit %s of %d: relays may use %d", l.Name, l.Max, used)
		}
	}
}

// share is what a relay may use of a limit now.
func (c *cluster) share(i int, id lease.LimitID) int64 {
	c.mu.Lock()
	defer c.mu.Unlock()
	r := c.relays[relayID(i)].rights[id]
	if r == nil {
		return 0
	}
	share, until, floor := r.Lease()
	if until <= c.now() {
		share = lease.Share{}
	}
	return share.Amount + floor.Amount
}

func (c *cluster) want(i int, id lease.LimitID, n int64) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.relays[relayID(i)].demand[id] = n
}

const tenSlots = "[[limit]]\nname = \"a\"\nconnections = 10\nfloor_percent = 20\n"

func TestLimitsAreLentOut(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c := newCluster(t, 3)
		err := c.lead(func() {
			c.pass(2 * time.Second)
			if c.ticks != 0 || c.state.Read().Lease().Epoch != 0 {
				t.Error("a cluster without shared limits writes of them")
			}
			c.policy(tenSlots)
			c.pass(2 * time.Second)
			a := c.named("a")
			if a == nil || a.Max != 10 {
				t.Fatalf("the limit of the policy is %+v", a)
			}
			c.want(0, a.ID, 100)
			c.want(1, a.ID, 100)
			c.pass(8 * time.Second)
			if x, y := c.share(0, a.ID), c.share(1, a.ID); x+y < 8 || x < 3 || y < 3 {
				t.Errorf("two relays that want all have %d and %d of 10", x, y)
			}
			status, err := c.part.statusHere(t.Context(), []lease.LimitID{a.ID})
			if err != nil || len(status) < 2 || status[0].Node != relayID(0) || status[0].Demand != 100 || !status[0].Heard {
				t.Errorf("status %+v, %v", status, err)
			}
			// The third relay gets its part, a share moves.
			c.want(2, a.ID, 100)
			c.want(0, a.ID, 0)
			c.pass(10 * time.Second)
			if x, z := c.share(0, a.ID), c.share(2, a.ID); x > 2 || z < 3 {
				t.Errorf("a relay that wants nothing has %d, a new one %d", x, z)
			}
			// Lowered, then of another kind: dropped.
			c.policy(strings.Replace(tenSlots, "= 10", "= 4", 1))
			c.pass(10 * time.Second)
			if sum := c.share(0, a.ID) + c.share(1, a.ID) + c.share(2, a.ID); sum > 4 || sum < 2 {
				t.Errorf("of 4 relays have %d", sum)
			}
			c.policy("[[limit]]\nname = \"a\"\nmessages = \"60/1m\"\n")
			c.pass(2 * time.Second)
			if now := c.named("a"); now.ID <= a.ID || now.Kind != lease.Rate {
				t.Errorf("of another kind: %+v", now)
			}
		})
		if err != nil || c.part.Alarm() != "" || testutil.ToFloat64(c.part.metrics.refused.WithLabelValues("limit")) != 0 {
			t.Errorf("%v, alarm %q", err, c.part.Alarm())
		}
	})
}

func TestALeaderThatComesWaits(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c := newCluster(t, 2)
		c.policy(tenSlots)
		var a lease.LimitID
		if err := c.lead(func() {
			c.pass(2 * time.Second)
			a = c.named("a").ID
			c.want(0, a, 100)
			c.pass(8 * time.Second)
		}); err != nil {
			t.Error(err)
		}
		before := c.share(0, a)
		if before < 7 {
			t.Fatalf("one relay has %d of 10", before)
		}
		first := c.state.Read().Lease().Epoch
		// Another leader: what the first one lent stays lent while its relay is
		// silent, for a lease at least.
		c.relays[relayID(0)].silent = true
		c.want(1, a, 100)
		if err := c.lead(func() {
			c.pass(25 * time.Second)
			if got := c.share(1, a); got > 10-before {
				t.Errorf("the other relay has %d while the first may still use %d", got, before)
			}
			// 30 s and a hundredth, and a minute more for connections in use.
			c.pass(70 * time.Second)
			if got := c.share(1, a); got < 6 {
				t.Errorf("of what a silent relay had the other has %d", got)
			}
			// An evicted relay gets nothing when it comes back.
			node := relayID(0)
			c.must(&command.NodeSetState{Node: node[:], State: "evicted"})
			c.relays[node].silent = false
			c.pass(5 * time.Second)
			for _, h := range c.state.Read().Holdings(a) {
				if h.Node == c.state.Read().LeaseNode(node).Number && h.Ceiling.Amount > 0 {
					t.Errorf("an evicted relay holds %+v", h)
				}
			}
		}); err != nil {
			t.Error(err)
		}
		if second := c.state.Read().Lease().Epoch; second <= first {
			t.Errorf("the second leader's epoch is %d, the first's was %d", second, first)
		}
	})
}

func TestAnUnknownOutcomeEndsTheTerm(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c := newCluster(t, 1)
		c.policy(tenSlots)
		err := c.lead(func() {
			c.pass(3 * time.Second)
			c.want(0, c.named("a").ID, 100)
			c.mu.Lock()
			c.lose = true
			c.mu.Unlock()
			c.pass(3 * time.Second)
		})
		if !errors.Is(err, control.ErrOutcomeUnknown) {
			t.Errorf("lending went on: %v", err)
		}
		// The next begins anew, and the relay has its share.
		if err := c.lead(func() { c.pass(5 * time.Second) }); err != nil {
			t.Error(err)
		}
		if got := c.share(0, c.named("a").ID); got < 7 {
			t.Errorf("the relay has %d of 10", got)
		}
		// A second leader takes over: the first finds out.
		if err := c.lead(func() {
			c.pass(2 * time.Second)
			c.must(&command.LeaseBegin{})
			c.pass(time.Second)
		}); err == nil || !strings.Contains(err.Error(), "another leader") {
			t.Errorf("the first leader goes on: %v", err)
		}
	})
}

func TestARecoveryWaitsForWhatRelaysHold(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c := newCluster(t, 2)
		c.policy(tenSlots)
		if err := c.lead(func() {
			c.pass(2 * time.Second)
			c.want(0, c.named("a").ID, 100)
			c.pass(8 * time.Second)
		}); err != nil {
			t.Error(err)
		}
		a := c.named("a").ID
		floor := c.state.Read().Holdings(a)[0].Floor.Amount
		if floor == 0 {
			t.Fatal("the relay has no floor")
		}
		const generation = 1_900_000_000
		c.must(&command.ClusterRecover{Generation: generation, Cause: "restore", Server: &command.Server{Id: bytesOf(9), Name: "c1", RaftAddress: "10.0.0.1:7444", LinkAddress: "10.0.0.1:7443", HttpAddress: "10.0.0.1:8443", Version: "1", MaxFsmVersion: uint32(command.FSMVersion), State: "active"}})
		if err := c.lead(func() {
			c.pass(5 * time.Second)
			for i := range 2 {
				if n := c.state.Read().LeaseNode(relayID(i)); n == nil || n.Declared != generation {
					t.Errorf("relay %d said what it holds: %+v", i, n)
				}
			}
			if _, err := c.part.statusHere(t.Context(), nil); err == nil {
				t.Error("limits are lent out in recovery mode")
			}
			c.must(&command.RecoveryEnd{Generation: generation})
			c.want(1, a, 100)
			c.pass(90 * time.Second) // 2 × 30 s, and a minute for connections
			if c.state.Read().Lease().Epoch != 0 || c.share(1, a) != 0 {
				t.Error("limits are lent out before the leases of before have run out")
			}
			c.pass(45 * time.Second)
			if got := c.share(0, a) + c.share(1, a); got < 7 || got > 10 {
				t.Errorf("after the recovery relays have %d of 10", got)
			}
		}); err != nil {
			t.Error(err)
		}
	})
}

func TestLargeTicksAreDivided(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c := newCluster(t, 3)
		var text strings.Builder
		const limits = 2_000
		for i := range limits {
			fmt.Fprintf(&text, "[[limit]]\nname = \"l%d\"\nconnections = 30\n", i)
		}
		c.policy(text.String())
		if err := c.lead(func() {
			c.pass(2 * time.Second)
			all := c.state.Read().SharedLimits()
			if len(all) != limits {
				t.Fatalf("%d limits", len(all))
			}
			for i := range 3 {
				for _, l := range all {
					c.want(i, l.ID, 5)
				}
			}
			c.pass(5 * time.Second)
			for i := range 3 {
				if got := c.share(i, all[limits-1].ID); got < 5 {
					t.Errorf("relay %d has %d", i, got)
				}
			}
		}); err != nil {
			t.Error(err)
		}
		if c.sizes > command.MaxLeaseChanges || c.sizes < command.MaxLeaseChanges {
			t.Errorf("the largest command has %d changes", c.sizes)
		}
	})
}
