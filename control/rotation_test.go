package control

import (
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/relais-mta/relais/shared/ids"
)

// TestRotationPhases pins where each phase leads, who signs in it, and who is
// believed.
func TestRotationPhases(t *testing.T) {
	for _, c := range []struct {
		phase   RotationPhase
		running bool
		next    RotationPhase
		back    RotationPhase
		canBack bool
		signer  string
		bundle  string
	}{
		{PhaseDistribute, true, PhaseSign, PhaseRolledBack, true, "old", "old new root"},
		{PhaseSign, true, PhaseDone, PhaseReturn, true, "new", "new old root"},
		{PhaseReturn, true, PhaseRolledBack, PhaseReturn, false, "old", "old new root"},
		{PhaseDone, false, PhaseDone, PhaseDone, false, "new", "new root"},
		{PhaseRolledBack, false, PhaseRolledBack, PhaseRolledBack, false, "old", "old root"},
	} {
		r := Rotation{Phase: c.phase, Old: IssuingCA{KeyID: "old", Certificate: []byte("old "), Sealed: []byte("a")}, New: IssuingCA{KeyID: "new", Certificate: []byte("new "), Sealed: []byte("b")}, Root: []byte("root")}
		back, canBack := c.phase.Back()
		if c.phase.Running() != c.running || c.phase.Next() != c.next || back != c.back || canBack != c.canBack {
			t.Errorf("%s: running %t, next %s, back %s %t", c.phase, c.phase.Running(), c.phase.Next(), back, canBack)
		}
		if got := r.Signer().KeyID; got != c.signer || string(r.Bundle()) != c.bundle {
			t.Errorf("%s: %s signs, believed are %s", c.phase, got, r.Bundle())
		}
		if !strings.HasPrefix(string(r.Bundle()), r.Signer().KeyID) {
			t.Errorf("%s: the first of the bundle does not sign", c.phase)
		}
		entered := r.Ack(ids.Node{1}).Enter(c.phase, time.Now())
		if len(entered.Acked) != 0 || (len(entered.Old.Sealed) > 0 || len(entered.New.Sealed) > 0) != c.running {
			t.Errorf("%s: %d acks and keys %q and %q are left", c.phase, len(entered.Acked), entered.Old.Sealed, entered.New.Sealed)
		}
	}
}

// TestWhoGates: a rotation waits for whoever can still use a certificate.
func TestWhoGates(t *testing.T) {
	now := time.Date(2026, 3, 1, 0, 0, 0, 0, time.UTC)
	const day = 24 * time.Hour
	for name, c := range map[string]struct {
		m     RotationMember
		gates bool
	}{
		"active server":                  {RotationMember{Server: true, State: NodeActive}, true},
		"server that never started":      {RotationMember{Server: true, State: NodePending}, true},
		"removed server":                 {RotationMember{Server: true, State: NodeEvicted}, false},
		"active relay":                   {RotationMember{State: NodeActive, Ended: now.Add(day)}, true},
		"draining relay":                 {RotationMember{State: NodeDraining, Ended: now.Add(day)}, true},
		"drained relay":                  {RotationMember{State: NodeDrained, Ended: now.Add(day)}, true},
		"relay that was never approved":  {RotationMember{State: NodePending, Ended: now.Add(day)}, false},
		"evicted relay":                  {RotationMember{State: NodeEvicted, Ended: now.Add(day)}, false},
		"relay without a certificate":    {RotationMember{State: NodeActive}, true},
		"relay that was away for 20 d":   {RotationMember{State: NodeActive, Ended: now.Add(-20 * day)}, true},
		"relay at the end of the grace":  {RotationMember{State: NodeActive, Ended: now.Add(-RenewGrace)}, true},
		"relay that must join once more": {RotationMember{State: NodeActive, Ended: now.Add(-RenewGrace - time.Second)}, false},
	} {
		if got := c.m.Gates(now); got != c.gates {
			t.Errorf("%s: gates %t", name, got)
		}
	}
	members := []RotationMember{{ID: ids.Node{1}, State: NodeActive}, {ID: ids.Node{2}, State: NodeActive}, {ID: ids.Node{3}, Server: true, State: NodeActive}}
	r := Rotation{Phase: PhaseSign}.Ack(ids.Node{2}).Ack(ids.Node{2}).WithSkip(RotationSkip{Member: ids.Node{3}, Reason: "burnt"}).WithSkip(RotationSkip{Member: ids.Node{3}, Reason: "again"})
	if waits := r.Waits(members, now); len(waits) != 1 || waits[0].ID != members[0].ID || len(r.Acked) != 1 || len(r.Skips) != 1 || r.Skips[0].Reason != "burnt" {
		t.Errorf("waits for %+v, acked %v, skips %+v", waits, r.Acked, r.Skips)
	}
	done := r.Enter(PhaseDone, now)
	if waits := done.Waits(members, now); waits != nil {
		t.Errorf("an end waits for %+v", waits)
	}
}

// TestAcksAreSorted: equal rotations have equal bytes, whatever the order in
// which members acknowledged.
func TestAcksAreSorted(t *testing.T) {
	a, b := Rotation{}, Rotation{}
	for n := range byte(50) {
		a, b = a.Ack(ids.Node{n * 37}), b.Ack(ids.Node{(49 - n) * 37})
	}
	if !slices.Equal(a.Acked, b.Acked) || !slices.IsSortedFunc(a.Acked, byID) {
		t.Error("the order of acknowledgements shows")
	}
}
