package state

import (
	"fmt"
	"math/rand/v2"
	"reflect"
	"testing"
	"time"

	"github.com/relais-mta/relais/control"
	"github.com/relais-mta/relais/control/command"
	"github.com/relais-mta/relais/shared/fault"
	"github.com/relais-mta/relais/shared/ids"
	"github.com/relais-mta/relais/shared/lease"
)

func rateLimit(name string, messages, burst int64) *command.SharedLimit {
	return &command.SharedLimit{Name: name, Kind: uint32(lease.Rate), Max: messages * lease.Milli, PerMs: 60_000, Burst: burst, FloorPercent: 20, ReservePercent: 5}
}

func slotLimit(name string, slots int64) *command.SharedLimit {
	return &command.SharedLimit{Name: name, Kind: uint32(lease.Slots), Max: slots, FloorPercent: 20}
}

// leaseWorld is a cluster with three relays that have their numbers, 1 to 3.
func leaseWorld(t fataler) *world {
	w := newWorld(t)
	w.ok(&command.ClusterInit{Cluster: &command.Cluster{Id: id(1), Generation: 1, FsmVersion: uint32(command.FSMVersion)}})
	for n := byte(1); n <= 3; n++ {
		w.node(n)
	}
	w.ok(&command.LeaseNumber{Nodes: [][]byte{id(1), id(2), id(3)}})
	return w
}

func (w *world) begin() uint64 {
	w.t.Helper()
	return w.ok(&command.LeaseBegin{}).(*control.Lease).Epoch
}

func (w *world) limit(name string, kind lease.Kind) *control.SharedLimit {
	w.t.Helper()
	for _, l := range w.store.Read().SharedLimits() {
		if l.Name == name && l.Kind == kind {
			return l
		}
	}
	w.t.Fatalf("there is no limit %s", name)
	return nil
}

func TestLimitsFollowThePolicy(t *testing.T) {
	w := leaseWorld(t)
	before := w.store.Read().ViewRevision()
	w.ok(&command.LimitsSet{Put: []*command.SharedLimit{rateLimit("a", 600, 20), slotLimit("a", 2)}})
	rate, slots := w.limit("a", lease.Rate), w.limit("a", lease.Slots)
	if rate.ID == slots.ID || rate.ID <= limitNumbersPerGeneration || rate.Max != 600_000 || rate.Burst != 20 || rate.Per != time.Minute {
		t.Errorf("limits %+v and %+v", rate, slots)
	}
	if w.store.Read().ViewRevision() == before {
		t.Error("relays are not told")
	}
	hash := w.store.Read().Hash()
	w.ok(&command.LimitsSet{Put: []*command.SharedLimit{rateLimit("a", 600, 20)}})
	if w.store.Read().Hash() != hash {
		t.Error("putting what is there changed it")
	}
	w.ok(&command.LimitsSet{Put: []*command.SharedLimit{rateLimit("a", 300, 20)}})
	if got := w.limit("a", lease.Rate); got.ID != rate.ID || got.Max != 300_000 {
		t.Errorf("lowered: %+v", got)
	}
	hourly := rateLimit("a", 300, 20)
	hourly.PerMs = time.Hour.Milliseconds()
	w.refused(&command.LimitsSet{Put: []*command.SharedLimit{hourly}}, fault.Conflict, "")
	w.ok(&command.LimitsSet{Drop: []uint64{uint64(rate.ID)}, Put: []*command.SharedLimit{hourly}})
	if got := w.limit("a", lease.Rate); got.ID <= slots.ID || got.Per != time.Hour {
		t.Errorf("of another span: %+v, the last number was %d", got, slots.ID)
	}
	w.refused(&command.LimitsSet{Put: []*command.SharedLimit{slotLimit("b", 0)}}, fault.Invalid, "max")
	w.refused(&command.LimitsSet{Put: []*command.SharedLimit{{Id: 7, Name: "b", Kind: 2, Max: 1}}}, fault.Invalid, "put")
	if a := w.store.Read().Audit(1); len(a) != 1 || a[0].Object != "limits" {
		t.Errorf("the audit tail has %+v", a)
	}
}

func TestALeaderLendsUntilAnotherBegins(t *testing.T) {
	w := leaseWorld(t)
	w.ok(&command.LimitsSet{Put: []*command.SharedLimit{slotLimit("a", 10)}})
	limit := w.limit("a", lease.Slots).ID
	first := w.begin()
	tick := func(epoch uint64, changes ...lease.Change) []lease.Refusal {
		t.Helper()
		return w.ok(command.NewLeaseTick(epoch, []lease.Session{{Node: 1, Incarnation: 1}, {Node: 2, Incarnation: 1}}, changes)).(*control.LeaseResult).Refused
	}
	give := func(node lease.Node, slots int64) lease.Change {
		return lease.Change{Limit: limit, Node: node, Incarnation: 1, Ceiling: lease.Share{Amount: slots}, Why: lease.Raised}
	}
	views := w.store.Read().ViewRevision()
	if refused := tick(first, give(1, 6), give(2, 4)); len(refused) != 0 {
		t.Errorf("refused %+v", refused)
	}
	if w.store.Read().ViewRevision() != views {
		t.Error("a tick makes new views")
	}
	if refused := tick(first, give(2, 5)); len(refused) != 1 || !refused[0].Passes() || refused[0].Item != 2 {
		t.Errorf("more than there is: %+v", refused)
	}
	second := w.begin()
	w.refused(command.NewLeaseTick(first, nil, []lease.Change{give(1, 0)}), fault.Conflict, "")
	if second <= first {
		t.Errorf("the second leader's number %d follows %d", second, first)
	}
	// A relay that is put out gets nothing more; what it has stays counted.
	w.ok(&command.NodeSetState{Node: id(1), State: "evicted"})
	if n := w.store.Read().LeaseNode(ids.Node(id(1))); !n.Gone {
		t.Errorf("evicted: %+v", n)
	}
	if refused := tick(second, give(1, 7)); len(refused) != 2 || refused[0].Item != 0 || refused[1].Item != 2 {
		t.Errorf("a relay that was put out: %+v", refused)
	}
	if got := w.store.Read().Holdings(limit); len(got) != 2 || got[0].Ceiling.Amount != 6 {
		t.Errorf("holdings %+v", got)
	}
	// A new process has nothing, and a number is given once.
	w.ok(command.NewLeaseTick(second, []lease.Session{{Node: 2, Incarnation: 2}}, nil))
	if got := w.store.Read().Holdings(limit); len(got) != 1 || w.store.Read().Lease().Holders != 1 {
		t.Errorf("after a restart: %+v", got)
	}
	w.ok(&command.LeaseNumber{Nodes: [][]byte{id(2), id(9), id(1)}})
	if w.store.Read().Lease().LastNode != 3 {
		t.Errorf("numbers were given to relays that have one, or are none: %+v", w.store.Read().Lease())
	}
}

func TestShorterLeasesCountWhenNothingIsHeld(t *testing.T) {
	w := leaseWorld(t)
	config := lease.DefaultConfig()
	w.ok(&command.LimitsSet{Put: []*command.SharedLimit{slotLimit("a", 10)}, Config: command.LeaseConfigRecord(config)})
	epoch := w.begin()
	w.ok(command.NewLeaseTick(epoch, []lease.Session{{Node: 1, Incarnation: 1}}, []lease.Change{{Limit: w.limit("a", lease.Slots).ID, Node: 1, Incarnation: 1, Ceiling: lease.Share{Amount: 1}, Why: lease.Raised}}))
	short := config
	short.TTL = 10 * time.Second
	views := w.store.Read().ViewRevision()
	w.ok(&command.LimitsSet{Config: command.LeaseConfigRecord(short)})
	if l := w.store.Read().Lease(); l.Config.TTL != short.TTL || l.Reclaim.TTL != config.TTL {
		t.Errorf("while something is held: %+v", l)
	}
	if w.store.Read().ViewRevision() == views {
		t.Error("relays are not told")
	}
	w.ok(command.NewLeaseTick(epoch, []lease.Session{{Node: 1, Incarnation: 2}}, nil))
	w.begin()
	if l := w.store.Read().Lease(); l.Reclaim.TTL != short.TTL || l.Holders != 0 {
		t.Errorf("when nothing is held: %+v", l)
	}
}

func TestARecoveryLearnsWhatRelaysHold(t *testing.T) {
	w := leaseWorld(t)
	w.ok(&command.LimitsSet{Put: []*command.SharedLimit{slotLimit("a", 10)}})
	limit := w.limit("a", lease.Slots).ID
	epoch := w.begin()
	w.ok(command.NewLeaseTick(epoch, []lease.Session{{Node: 1, Incarnation: 1}}, []lease.Change{{Limit: limit, Node: 1, Incarnation: 1, Floor: lease.Share{Amount: 2}, Why: lease.Raised}}))
	declare := &command.LeaseDeclare{Node: id(2), Limits: []uint64{uint64(limit), 99}, Floors: []int64{9, 1}, FloorBursts: []int64{0, 0}}
	w.refused(declare, fault.Conflict, "")
	w.ok(&command.ClusterRecover{Generation: 1_800_000_000, Cause: "restore", Server: &command.Server{Id: id(7), Name: "c1", RaftAddress: "10.0.0.1:7444", LinkAddress: "10.0.0.1:7443", HttpAddress: "10.0.0.1:8443", Version: "1", MaxFsmVersion: uint32(command.FSMVersion), State: "active"}})
	w.refused(&command.LeaseBegin{Settled: true}, fault.Unavailable, "node")
	w.refused(command.NewLeaseTick(epoch, nil, nil), fault.Unavailable, "node")
	w.ok(declare)
	w.ok(declare)                                         // repeated
	w.ok(&command.LeaseDeclare{Node: id(1), Limits: nil}) // less than is known: the larger counts
	if got := w.store.Read().Holdings(limit); len(got) != 2 || got[0].Floor.Amount != 2 || got[1].Floor.Amount != 9 {
		t.Errorf("floors %+v", got)
	}
	if n := w.store.Read().LeaseNode(ids.Node(id(2))); n.Declared != 1_800_000_000 {
		t.Errorf("declared %+v", n)
	}
	w.ok(&command.RecoveryEnd{Generation: 1_800_000_000})
	w.refused(&command.LeaseBegin{}, fault.Conflict, "")
	next := w.ok(&command.LeaseBegin{Settled: true}).(*control.Lease)
	if next.Settling {
		t.Error("it settles for ever")
	}
	// More is held than there is: nothing is given out until it fits.
	table := w.store.Read().LeaseTable()
	if table.Sum(limit).Amount != 11 {
		t.Errorf("the leader's table has %+v", table.Holdings(limit))
	}
	refused := w.ok(command.NewLeaseTick(next.Epoch, []lease.Session{{Node: 3, Incarnation: 1}}, []lease.Change{{Limit: limit, Node: 3, Incarnation: 1, Ceiling: lease.Share{Amount: 1}, Why: lease.Raised}})).(*control.LeaseResult).Refused
	if len(refused) != 1 || !refused[0].Passes() {
		t.Errorf("refused %+v", refused)
	}
	w.ok(&command.LimitsSet{Put: []*command.SharedLimit{slotLimit("b", 1)}})
	if got := w.limit("b", lease.Slots).ID; got <= 1_800_000_000*limitNumbersPerGeneration {
		t.Errorf("a limit of the new generation has number %d", got)
	}
}

// TestStateIsALeaseTable: whatever is applied, in whatever order, the state holds
// what a lease.Table holds, refuses the same, and its holdings and their sums
// agree; and a leader that begins from it begins with that table.
func TestStateIsALeaseTable(t *testing.T) {
	for seed := range uint64(60) {
		r := rand.New(rand.NewPCG(seed, 1))
		w := leaseWorld(t)
		table := lease.NewTable()
		table.Apply(&lease.Tick{Sessions: []lease.Session{{Node: 1}, {Node: 2}, {Node: 3}}})
		epoch := w.begin()
		evicted := map[lease.Node]bool{}
		for range 80 {
			switch n := r.IntN(20); {
			case n == 0: // put
				l := slotLimit(string(rune('a'+r.IntN(3))), int64(1+r.IntN(12)))
				if r.IntN(2) == 0 {
					l = rateLimit(l.Name, int64(1+r.IntN(12)), int64(1+r.IntN(6)))
				}
				w.ok(&command.LimitsSet{Put: []*command.SharedLimit{l}})
				if err := table.PutLimit(w.limit(l.Name, lease.Kind(l.Kind)).Limit); err != nil {
					t.Fatal(err)
				}
			case n == 1 && len(table.Limits()) > 0 && r.IntN(4) == 0: // drop
				drop := table.Limits()[r.IntN(len(table.Limits()))].ID
				w.ok(&command.LimitsSet{Drop: []uint64{uint64(drop)}})
				table.DropLimit(drop)
			case n == 2 && r.IntN(8) == 0:
				node := byte(1 + r.IntN(3))
				w.ok(&command.NodeSetState{Node: id(node), State: "evicted"})
				table.Evict(lease.Node(node))
				evicted[lease.Node(node)] = true
			default:
				tick := randomTick(r, table)
				want := table.Apply(tick)
				got := w.ok(command.NewLeaseTick(epoch, tick.Sessions, tick.Changes)).(*control.LeaseResult).Refused
				if len(got) != len(want) {
					t.Fatalf("seed %d: refused %+v, want %+v", seed, got, want)
				}
				for i := range got {
					if got[i].Item != want[i].Item || got[i].Why != want[i].Why {
						t.Fatalf("seed %d: refused %+v, want %+v", seed, got[i], want[i])
					}
				}
			}
			compareLeases(t, seed, w.store.Read(), table)
		}
	}
}

func randomTick(r *rand.Rand, table *lease.Table) *lease.Tick {
	tick := &lease.Tick{}
	if r.IntN(3) == 0 {
		tick.Sessions = append(tick.Sessions, lease.Session{Node: lease.Node(1 + r.IntN(3)), Incarnation: uint64(r.IntN(6))})
	}
	limits := table.Limits()
	for range r.IntN(5) {
		c := lease.Change{Limit: 7, Node: lease.Node(1 + r.IntN(3)), Why: lease.Reason(1 + r.IntN(4))}
		if len(limits) > 0 && r.IntN(10) > 0 {
			c.Limit = limits[r.IntN(len(limits))].ID
		}
		c.Incarnation, _ = table.Session(c.Node)
		if r.IntN(10) == 0 {
			c.Incarnation++
		}
		old := table.Holding(c.Limit, c.Node)
		part := func(n int64) int64 {
			if c.Why == lease.Raised {
				return n + int64(r.IntN(4))*int64(1+r.IntN(2)*999)
			}
			return n * int64(r.IntN(3)) / 2
		}
		c.Ceiling = lease.Share{Amount: part(old.Ceiling.Amount), Burst: part(old.Ceiling.Burst) % 8}
		c.Floor = lease.Share{Amount: part(old.Floor.Amount), Burst: part(old.Floor.Burst) % 8}
		if r.IntN(30) == 0 {
			c.Floor.Amount = -1
		}
		tick.Changes = append(tick.Changes, c)
	}
	return tick
}

func compareLeases(t *testing.T, seed uint64, r *Reader, table *lease.Table) {
	t.Helper()
	holders := 0
	again := r.LeaseTable()
	if !reflect.DeepEqual(again.Limits(), table.Limits()) {
		t.Fatalf("seed %d: limits %+v, want %+v", seed, again.Limits(), table.Limits())
	}
	for _, l := range table.Limits() {
		want := fmt.Sprint(table.Holdings(l.ID))
		if got := fmt.Sprint(r.Holdings(l.ID)); got != want {
			t.Fatalf("seed %d: limit %d: %s, want %s", seed, l.ID, got, want)
		}
		if got := fmt.Sprint(again.Holdings(l.ID)); got != want {
			t.Fatalf("seed %d: limit %d: a leader begins with %s, want %s", seed, l.ID, got, want)
		}
		holders += len(table.Holdings(l.ID))
	}
	if r.Lease().Holders != holders {
		t.Fatalf("seed %d: %d holders are counted, there are %d", seed, r.Lease().Holders, holders)
	}
	for _, n := range table.Nodes() {
		wantI, wantGone := table.Session(n)
		if i, gone := again.Session(n); i != wantI || gone != wantGone {
			t.Fatalf("seed %d: relay %d: %d %v, want %d %v", seed, n, i, gone, wantI, wantGone)
		}
	}
}

// TestHashAndSnapshotOfLeases: the state that went through a snapshot has the same
// hash and goes on alike.
func TestHashAndSnapshotOfLeases(t *testing.T) {
	w := goldenLeases(t)
	restored := throughSnapshot(t, w.store)
	if restored.Read().Hash() != w.store.Read().Hash() {
		t.Error("the hash changed")
	}
	if got, want := restored.Read().LeaseTable(), w.store.Read().LeaseTable(); !reflect.DeepEqual(got, want) {
		t.Errorf("the table is %+v, want %+v", got, want)
	}
}

// goldenLeases goes through every command about shared limits.
func goldenLeases(t *testing.T) *world {
	w := leaseWorld(t)
	w.ok(&command.LimitsSet{Meta: &command.Meta{Actor: "system", Reason: "policy"}, Put: []*command.SharedLimit{rateLimit("a", 600, 20), slotLimit("a", 10), rateLimit("b", 5, 5)}, Config: command.LeaseConfigRecord(lease.DefaultConfig())})
	rate, slots := w.limit("a", lease.Rate).ID, w.limit("a", lease.Slots).ID
	epoch := w.begin()
	w.ok(command.NewLeaseTick(epoch, []lease.Session{{Node: 1, Incarnation: 3}, {Node: 2, Incarnation: 1}}, []lease.Change{
		{Limit: rate, Node: 1, Incarnation: 3, Ceiling: lease.Share{Amount: 300_000, Burst: 10}, Floor: lease.Share{Amount: 60_000, Burst: 2}, Why: lease.Raised},
		{Limit: slots, Node: 2, Incarnation: 1, Ceiling: lease.Share{Amount: 8}, Why: lease.Raised},
		{Limit: slots, Node: 1, Incarnation: 3, Ceiling: lease.Share{Amount: 3}, Why: lease.Raised}, // refused
	}))
	w.ok(command.NewLeaseTick(epoch, nil, []lease.Change{{Limit: slots, Node: 2, Incarnation: 1, Ceiling: lease.Share{Amount: 5}, Why: lease.Acked}}))
	w.ok(&command.LimitsSet{Drop: []uint64{uint64(w.limit("b", lease.Rate).ID)}, Put: []*command.SharedLimit{slotLimit("a", 4)}})
	w.ok(&command.NodeSetState{Node: id(2), State: "evicted"})
	w.ok(&command.ClusterRecover{Generation: 1_800_000_000, Cause: "restore", Server: &command.Server{Id: id(7), Name: "c1", RaftAddress: "10.0.0.1:7444", LinkAddress: "10.0.0.1:7443", HttpAddress: "10.0.0.1:8443", Version: "1", MaxFsmVersion: 4, State: "active"}})
	w.ok(&command.LeaseDeclare{Node: id(3), Limits: []uint64{uint64(rate)}, Floors: []int64{30_000}, FloorBursts: []int64{1}})
	w.ok(&command.RecoveryEnd{Generation: 1_800_000_000})
	w.ok(&command.LeaseBegin{Settled: true})
	w.ok(&command.LimitsSet{Put: []*command.SharedLimit{rateLimit("c", 5, 5)}})
	return w
}

func TestGoldenLeases(t *testing.T) { checkGolden(t, "leases4", goldenLeases) }

// BenchmarkApplyLeaseTick applies what a leader proposes each quarter of a second
// for 1,000 relays and 10,000 limits of five relays each: 25 relays reported, with
// 50 limits each, and each of their shares changes.
func BenchmarkApplyLeaseTick(b *testing.B) {
	w := leaseBench(b, 1_000, 10_000, 5)
	r := rand.New(rand.NewPCG(1, 2))
	epoch := w.store.Read().Lease().Epoch
	ticks := make([][]byte, 16)
	for i := range ticks {
		var changes []lease.Change
		for range 25 {
			node := r.IntN(1_000)
			for j := range 50 {
				changes = append(changes, lease.Change{Limit: benchLimit(w, (node/5+200*j)%10_000), Node: lease.Node(node + 1), Incarnation: 1, Ceiling: lease.Share{Amount: int64(1000 + r.IntN(1000)), Burst: 1}, Why: lease.Raised})
			}
		}
		e, err := command.Encode(command.NewLeaseTick(epoch, nil, changes), w.now, 1)
		if err != nil {
			b.Fatal(err)
		}
		ticks[i] = e
	}
	b.ReportMetric(float64(len(ticks[0])), "bytes/entry")
	b.ReportAllocs()
	for i := 0; b.Loop(); i++ {
		e, err := command.Decode(ticks[i%len(ticks)])
		if err != nil {
			b.Fatal(err)
		}
		w.index++
		if res := w.store.Apply(w.index, e); res.Err != nil {
			b.Fatal(res.Err)
		}
	}
}

// BenchmarkLeaseSnapshot writes the same state as a snapshot.
func BenchmarkLeaseSnapshot(b *testing.B) {
	w := leaseBench(b, 1_000, 10_000, 5)
	size := int64(0)
	for b.Loop() {
		n, err := w.store.Read().WriteTo(discard{})
		if err != nil {
			b.Fatal(err)
		}
		size = n
	}
	b.ReportMetric(float64(size), "bytes")
}

// BenchmarkLeaseTable makes the table that a leader begins with.
func BenchmarkLeaseTable(b *testing.B) {
	w := leaseBench(b, 1_000, 10_000, 5)
	for b.Loop() {
		if n := len(w.store.Read().LeaseTable().Limits()); n != 10_000 {
			b.Fatal(n)
		}
	}
}

type discard struct{}

func (discard) Write(p []byte) (int, error) { return len(p), nil }

func benchLimit(w *world, i int) lease.LimitID {
	return lease.LimitID(limitNumbersPerGeneration + 1 + i)
}

// leaseBench makes a cluster of relays and limits, each held by some relays.
func leaseBench(b *testing.B, relays, limits, each int) *world {
	w := newWorld(b)
	w.ok(&command.ClusterInit{Cluster: &command.Cluster{Id: id(1), Generation: 1, FsmVersion: uint32(command.FSMVersion)}})
	var numbers [][]byte
	var sessions []lease.Session
	for i := range relays {
		node := ids.Node{15: byte(i), 14: byte(i >> 8), 13: 1}
		w.ok(tokenCreate(1, func(t *command.JoinToken) { t.Id = node[:] }))
		w.ok(&command.TokenRedeem{Token: node[:], CsrHash: append(node[:], node[:]...), Role: "relay", Node: node[:], Name: fmt.Sprint("edge-", i), Remote: []byte{198, 51, 100, 7}})
		numbers = append(numbers, node[:])
		sessions = append(sessions, lease.Session{Node: lease.Node(i + 1), Incarnation: 1})
	}
	w.ok(&command.LeaseNumber{Nodes: numbers})
	for at := 0; at < limits; at += command.MaxLimitsInSet {
		c := &command.LimitsSet{}
		for i := range command.MaxLimitsInSet {
			c.Put = append(c.Put, rateLimit(fmt.Sprint("limit-", at+i), 600, 100))
		}
		w.ok(c)
	}
	epoch := w.begin()
	w.ok(command.NewLeaseTick(epoch, sessions, nil))
	for at := 0; at < limits; at += 500 {
		var changes []lease.Change
		for i := at; i < at+500; i++ {
			for j := range each {
				changes = append(changes, lease.Change{Limit: benchLimit(w, i), Node: lease.Node((i%200)*5 + j + 1), Incarnation: 1, Ceiling: lease.Share{Amount: 1000, Burst: 1}, Why: lease.Raised})
			}
		}
		if refused := w.ok(command.NewLeaseTick(epoch, nil, changes)).(*control.LeaseResult).Refused; len(refused) > 0 {
			b.Fatal(refused[0])
		}
	}
	return w
}
