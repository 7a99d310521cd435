package state

import (
	"math/rand/v2"
	"testing"

	"github.com/relais-mta/relais/control"
	"github.com/relais-mta/relais/control/command"
	"github.com/relais-mta/relais/shared/ids"
	"github.com/relais-mta/relais/shared/ownership"
)

// replicated is the state of a control server, and beside it what the rules of
// shared/ownership say of its one address.
type replicated struct {
	*world
	row   ownership.Address
	ip    ids.Source
	given bool // it was assigned once
}

func rowID[T ~[16]byte](n int) (row T) {
	copy(row[:], id(byte(n)))
	return row
}

const (
	agreeNodes = 5
	agreePools = 3 // of everybody, and of two tenants
)

func newReplicated(t *testing.T, pinned bool) *replicated {
	r := &replicated{world: newWorld(t), ip: rowID[ids.Source](40)}
	r.ok(&command.ClusterInit{Cluster: &command.Cluster{Id: id(100), Generation: 1, FsmVersion: uint32(command.FSMVersion), CaBundle: []byte("pem"), CredentialKeySealed: make([]byte, 32)}})
	for n := 1; n <= agreeNodes; n++ {
		r.node(byte(n))
	}
	for n := range agreePools {
		pool, put := rowID[ids.Pool](n+50), &command.Pool{Name: string(rune('p' + n)), Kind: "shared"}
		put.Id = pool[:]
		if n > 0 {
			tenant, project := rowID[ids.Tenant](n+60), rowID[ids.Project](n+70)
			r.ok(&command.TenantPut{Tenant: &command.Tenant{Id: tenant[:], Name: put.Name, OwnershipToken: "own" + put.Name}, DefaultProject: project[:]})
			put.Kind, put.Tenant = "dedicated", tenant[:]
		}
		r.ok(&command.PoolPut{Pool: put})
	}
	r.ok(&command.IPPut{Source: &command.Source{Id: r.ip[:], Bind: []byte{10, 0, 0, 1}, Public: []byte{10, 0, 0, 1}, Ehlo: "a.example.net", Pinned: pinned, State: "free"}})
	r.row = ownership.Address{State: ownership.Free, Pinned: pinned}
	return r
}

// tenantOf is the tenant of one of the pools.
func tenantOf(pool int) (id ids.Tenant) {
	if pool > 0 {
		id = rowID[ids.Tenant](pool + 60)
	}
	return id
}

// step is one thing that may be done to the address, in the words of both.
type step struct {
	name string
	cmd  command.Command
	rule func(a ownership.Address, index uint64) (ownership.Address, error)
}

// draw returns a step. A node that was evicted gets nothing, which is a rule of
// nodes and not of addresses.
func (r *replicated) draw(rng *rand.Rand, active []int) step {
	n, pool, off := active[rng.IntN(len(active))], rng.IntN(agreePools), rng.IntN(3) == 0
	node, poolID := rowID[ids.Node](n), rowID[ids.Pool](pool+50)
	switch rng.IntN(10) {
	case 0, 1:
		return step{"assign", &command.IPAssign{Source: r.ip[:], Node: node[:], OldOwnerIsOff: off}, func(a ownership.Address, index uint64) (ownership.Address, error) {
			return a.Assign(node, index, off)
		}}
	case 2:
		return step{"end the quarantine", &command.IPRelease{Meta: &command.Meta{Reason: "wiped"}, Source: r.ip[:], OldOwnerIsOff: off}, func(a ownership.Address, _ uint64) (ownership.Address, error) {
			return a.Unquarantine(off)
		}}
	case 3, 4:
		return step{"release", &command.IPRetire{Source: r.ip[:]}, func(a ownership.Address, _ uint64) (ownership.Address, error) {
			return a.Release(false)
		}}
	case 5:
		return step{"quarantine", &command.IPQuarantine{Source: r.ip[:]}, func(a ownership.Address, _ uint64) (ownership.Address, error) {
			return a.Quarantine(), nil
		}}
	case 6, 7:
		return r.drawLeft(rng, node)
	case 8:
		epoch := r.row.Epoch - min(r.row.Epoch, uint64(rng.IntN(2)))
		return step{"reclaim", &command.IPReclaim{Source: r.ip[:], Epoch: epoch}, func(a ownership.Address, _ uint64) (ownership.Address, error) {
			if !r.given {
				a.Pinned = true // nobody ever had it, so it was never leased
			}
			after, err := a.Reclaim(epoch)
			after.Pinned = r.row.Pinned
			return after, err
		}}
	}
	return step{"place", &command.IPAssign{Source: r.ip[:], Pool: poolID[:]}, func(a ownership.Address, _ uint64) (ownership.Address, error) {
		return a.Place(tenantOf(pool))
	}}
}

// drawLeft returns a word that a relay has stopped: mostly of the owner, and now
// and then under a former epoch.
func (r *replicated) drawLeft(rng *rand.Rand, by ids.Node) step {
	epoch := r.row.Epoch
	if rng.IntN(4) > 0 && !r.row.Owner.IsZero() {
		by = r.row.Owner
	}
	if rng.IntN(4) == 0 {
		epoch -= min(epoch, 1)
	}
	return step{"left", &command.IPLeft{Source: r.ip[:], Node: by[:], Epoch: epoch}, func(a ownership.Address, _ uint64) (ownership.Address, error) {
		return a.Acknowledge(by, epoch), nil
	}}
}

// evict puts a node out in both.
func (r *replicated) evict(n int) {
	node := rowID[ids.Node](n)
	r.ok(&command.NodeSetState{Meta: &command.Meta{Reason: "lost"}, Node: node[:], State: string(control.NodeEvicted)})
	if r.row.Owner == node {
		r.row = r.row.Quarantine()
	}
}

// TestStateKeepsTheRulesOfOwnership drives the replicated state and the rules that
// the simulator tries with the same steps: they allow the same and come to the same.
func TestStateKeepsTheRulesOfOwnership(t *testing.T) {
	allowed, refused, moved := map[string]int{}, map[string]int{}, map[string]int{}
	for seed := range uint64(120) {
		rng := rand.New(rand.NewPCG(seed, 7))
		r := newReplicated(t, seed%2 == 0)
		active := []int{1, 2, 3, 4, 5}
		for range 60 {
			if len(active) > 1 && rng.IntN(12) == 0 {
				at := rng.IntN(len(active))
				r.evict(active[at])
				active = append(active[:at], active[at+1:]...)
				r.same("evict")
				continue
			}
			s := r.draw(rng, active)
			after, bad := s.rule(r.row, r.index+1)
			err := r.apply(s.cmd).Err
			if (err == nil) != (bad == nil) {
				t.Fatalf("seed %d: %s of %+v: the state says %v, the rules say %v", seed, s.name, r.row, err, bad)
			}
			if after.State != r.row.State {
				moved[s.name+" to "+string(after.State)]++
			}
			r.given = r.given || !after.Owner.IsZero()
			if r.row = after; bad != nil {
				refused[s.name]++
			} else {
				allowed[s.name]++
			}
			r.same(s.name)
		}
	}
	for _, name := range []string{"assign to assigned", "release to releasing", "left to free", "quarantine to quarantined", "end the quarantine to free", "reclaim to free"} {
		if moved[name] < 20 {
			t.Errorf("%s: %d times", name, moved[name])
		}
	}
	for _, name := range []string{"assign", "end the quarantine", "place", "release", "reclaim"} {
		if allowed[name] < 20 || refused[name] < 20 {
			t.Errorf("%s: allowed %d times, refused %d times", name, allowed[name], refused[name])
		}
	}
}

// same holds the state's row against the rules'.
func (r *replicated) same(after string) {
	r.t.Helper()
	src := r.store.Read().Source(r.ip)
	got := ownership.Address{State: ownership.State(src.State), Owner: src.Owner, Epoch: src.Epoch, Pinned: src.Pinned, Placed: !src.Pool.IsZero()}
	if got.Placed {
		got.Tenant = r.store.Read().Pool(src.Pool).Tenant
	}
	if got != r.row {
		r.t.Fatalf("after %s the state has %+v, the rules %+v", after, got, r.row)
	}
}
