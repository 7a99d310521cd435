package service

import (
	"strings"
	"testing"
	"time"

	"github.com/relais-mta/relais/control"
	"github.com/relais-mta/relais/control/command"
	"github.com/relais-mta/relais/shared/fault"
)

// TestFinishUpgrade: an operator need not wait for the time in which the old
// release can be put back, but cannot leave a server behind.
func TestFinishUpgrade(t *testing.T) {
	f := newFixture(t)
	const before = command.FSMVersion - 1
	old := command.ClusterRecord(f.state.Read().Cluster())
	old.FsmVersion = uint32(before)
	f.reset(t, old)
	put := func(row control.Server) *control.Server {
		t.Helper()
		expect := row.Revision
		if row.ID.IsZero() {
			stamp(&row.ID, time.Now())
		}
		return must[*control.Server](t)(propose[control.Server](ctx, f.Service, &command.ServerUpsert{Expect: expect, Server: command.ServerRecord(&row)}))
	}
	server := func(name string, known uint16, state control.NodeState) control.Server {
		at := "10.0.0." + name[1:]
		return control.Server{Name: name, RaftAddress: at + ":7444", LinkAddress: at + ":7443", HTTPAddress: at + ":8443", Version: "r" + name[1:], MaxFSMVersion: known, State: state}
	}
	first := put(server("c1", before, control.NodeActive))
	last := put(server("c2", before, control.NodeActive))
	put(server("c3", 1, control.NodeEvicted))
	if v, err := f.FinishUpgrade(ctx, admin, Change{}); err != nil || v.Version != before {
		t.Errorf("with nothing to finish: %+v, %v", v, err)
	}
	first.MaxFSMVersion = command.FSMVersion
	put(*first)
	v, err := f.Upgrade(viewer)
	if err != nil || v.Version != before || v.Next != before || v.Newest != command.FSMVersion || len(v.Servers) != 2 {
		t.Errorf("halfway: %+v, %v", v, err)
	}
	if _, err := f.FinishUpgrade(ctx, admin, Change{}); !fault.Is(err, fault.Conflict) || !strings.Contains(fault.Public(err), "c2 at 10.0.0.2:7444 runs release r2") {
		t.Errorf("with a server of the older release: %v", err)
	}
	last.MaxFSMVersion = command.FSMVersion
	put(*last)
	if _, err := f.FinishUpgrade(ctx, operator, Change{}); !fault.Is(err, fault.Denied) {
		t.Errorf("by an operator: %v", err)
	}
	if v, err = f.FinishUpgrade(ctx, admin, Change{Reason: "watched"}); err != nil || v.Version != command.FSMVersion || v.Next != command.FSMVersion {
		t.Errorf("at the end: %+v, %v", v, err)
	}
	if got := f.Info().Commands; got != command.FSMVersion {
		t.Errorf("the server says it works at %d", got)
	}
	index := f.state.Read().Index()
	if _, err = f.FinishUpgrade(ctx, admin, Change{}); err != nil || f.state.Read().Index() != index {
		t.Errorf("a second time: %v, %d entries", err, f.state.Read().Index()-index)
	}
}
