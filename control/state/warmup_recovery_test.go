package state

import (
	"testing"

	"github.com/relais-mta/relais/control"
	"github.com/relais-mta/relais/control/command"
	"github.com/relais-mta/relais/shared/fault"
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
