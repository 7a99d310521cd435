package state

import (
	"testing"

	"github.com/relais-mta/relais/control"
	"github.com/relais-mta/relais/control/command"
	"github.com/relais-mta/relais/shared/fault"
	"github.com/relais-mta/relais/shared/ids"
)

// TestNothingIsReservedInRecoveryMode (W2): a restored ledger does not know what was
// reserved since the backup. Until the relays were heard they may say what they
// spent, and get nothing.
func TestNothingIsReservedInRecoveryMode(t *testing.T) {
	w := warmWorld(t)
	w.ok(warmPut("pool", id(1), 500))
	if r := w.batch(item(command.WarmReserve, 1, 1, 1, 100)); r.Err != nil || r.Amount != 100 {
		t.Fatalf("%+v", r)
	}
	generation := w.ok(&command.ClusterRecover{Generation: 2, Cause: "restore", Server: &command.Server{Id: id(101), Name: "c1", RaftAddress: "10.0.0.1:7444", State: "active", MaxFsmVersion: 4}}).(*control.Cluster).Generation
	if r := w.batch(item(command.WarmReserve, 1, 2, 1, 400)); !fault.Is(r.Err, fault.Unavailable) || r.Amount != 0 {
		t.Errorf("a relay reserves in recovery mode: %+v", r)
	}
	cut := item(command.WarmCut, 1, 1, 2, 350)
	cut.Used = 350 // reserved and spent since the backup
	if r := w.batch(cut); r.Err != nil || r.Used != 350 || r.Committed != 350 {
		t.Errorf("what was spent is not taken in recovery mode: %+v", r)
	}
	w.ok(&command.RecoveryEnd{Generation: generation})
	if r := w.batch(item(command.WarmReserve, 1, 2, 2, 400)); r.Err != nil || r.Amount != 150 {
		t.Errorf("after it: %+v", r)
	}
}

// TestRelaysSayWhenAllIsSettled: what a relay says of that is known in recovery mode,
// of its generation alone.
func TestRelaysSayWhenAllIsSettled(t *testing.T) {
	w := warmWorld(t)
	said := func(node byte, generation uint64) error {
		i := &command.WarmItem{Kind: command.WarmDeclare, Node: id(node), Epoch: generation}
		return w.batch(i).Err
	}
	if err := said(1, 1); !fault.Is(err, fault.Conflict) {
		t.Errorf("outside of recovery mode: %v", err)
	}
	w.ok(&command.ClusterRecover{Generation: 2, Cause: "restore", Server: &command.Server{Id: id(101), Name: "c1", RaftAddress: "10.0.0.1:7444", State: "active", MaxFsmVersion: 4}})
	if err := said(1, 1); !fault.Is(err, fault.Conflict) {
		t.Errorf("of the generation before: %v", err)
	}
	if err := said(99, 2); !fault.Is(err, fault.NotFound) {
		t.Errorf("of no relay: %v", err)
	}
	for range 2 {
		if err := said(1, 2); err != nil {
			t.Fatal(err)
		}
	}
	relay := func(n byte) *control.LeaseNode { return w.store.Read().LeaseNode(ids.Node(id(n))) }
	if one, two := relay(1), relay(2); one == nil || one.WarmDeclared != 2 || one.Declared != 0 || two != nil {
		t.Errorf("relay 1 is %+v, relay 2 %+v", one, two)
	}
	restored := throughSnapshot(t, w.store)
	if got := restored.Read().LeaseNode(ids.Node(id(1))); got.WarmDeclared != 2 || restored.Read().Hash() != w.store.Read().Hash() {
		t.Errorf("through a snapshot: %+v", got)
	}
}
