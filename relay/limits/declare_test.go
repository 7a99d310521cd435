package limits

import (
	"testing"
	"time"

	"github.com/relais-mta/relais/shared/lease"
	"github.com/relais-mta/relais/shared/wire"
)

// TestAGreetingDeclaresTheLargerFloor: after a restore of the cluster the leader goes
// by what relays say of floors: what is in use and not yet on the disk, and what is on
// the disk and not in use any more, for a restart would use it.
func TestAGreetingDeclaresTheLargerFloor(t *testing.T) {
	w := newWorld(t, rateLimit(1, nil))
	w.wants(1000, 0)
	w.pass(10 * time.Second)
	w.cut = true // the other end is the test
	grant := func(seq uint64, floor int64) {
		w.limits.Grant(&wire.LeaseGrant{Incarnation: 1, Generation: 1, Term: 2, Lines: []*wire.LeaseGrantLine{
			{Limit: 1, Kind: uint32(lease.Rate), PerMs: 60_000, Seq: seq, Amount: 1000, Burst: 1, FloorAmount: floor, FloorBurst: 1},
		}})
	}
	declared := func() int64 {
		w.limits.HelloWanted()
		w.limits.round()
		floors := last[*wire.LeaseHello](w).GetFloors()
		if len(floors) != 1 {
			t.Fatalf("%d floors are declared", len(floors))
		}
		w.limits.Welcome(&wire.LeaseWelcome{Incarnation: 1})
		return floors[0].GetAmount()
	}
	grant(50, 600_000)
	if got := declared(); got != 600_000 {
		t.Errorf("a floor of 600000 is in use and not saved, declared is %d", got)
	}
	w.disk()
	grant(51, 300_000)
	if got := declared(); got != 600_000 {
		t.Errorf("a floor of 600000 is on the disk still, declared is %d", got)
	}
	w.limits.round()
	w.disk()
	if got := declared(); got != 300_000 {
		t.Errorf("a floor of 300000 is in use and on the disk, declared is %d", got)
	}
}
