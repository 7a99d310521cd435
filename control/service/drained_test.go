package service

import (
	"net/netip"
	"testing"

	"github.com/relais-mta/relais/control"
	"github.com/relais-mta/relais/control/command"
)

// TestDrainedWhenNothingIsLeft drains a relay: it has drained when its queue is
// empty, by a report that is newer than the drain, and its address is gone.
func TestDrainedWhenNothingIsLeft(t *testing.T) {
	f := newFixture(t)
	node := f.join(t, "edge1")
	f.join(t, "edge2")
	must[*control.Source](t)(f.AddIP(ctx, operator, IPRequest{Bind: netip.MustParseAddr("192.0.2.1"), EHLO: "mta1.example.net", Node: "edge1"}, Change{}))
	f.NodeSeen(ctx, node, HelloInfo{})
	f.NodeReported(node, ReportInfo{Generation: f.Generation(), Revision: f.state.Read().ViewRevision()})
	row := must[*control.Node](t)(f.SetNodeState(ctx, operator, "edge1", control.NodeDraining, Change{}))
	is := func(what string, want control.NodeState) {
		t.Helper()
		if err := f.SettleDrains(ctx); err != nil {
			t.Fatal(err)
		}
		if got := f.state.Read().Node(node).State; got != want {
			t.Errorf("%s: it is %s, want %s", what, got, want)
		}
	}
	must[*control.Source](t)(f.AssignIP(ctx, operator, "192.0.2.1", AssignRequest{Node: "edge2", OldOwnerIsOff: true}, Change{}))
	is("the report is older than the drain", control.NodeDraining)
	for _, left := range []ReportInfo{{WaitingRecipients: 1}, {InFlightRecipients: 1}, {HeldRecipients: 1}} {
		left.Generation, left.Revision = f.Generation(), row.Revision
		f.NodeReported(node, left)
		is("mail is left", control.NodeDraining)
	}
	f.NodeReported(node, ReportInfo{Generation: f.Generation(), Revision: row.Revision})
	f.NodeGone(node)
	is("it is not connected", control.NodeDraining)
	f.NodeSeen(ctx, node, HelloInfo{Generation: f.Generation(), Revision: row.Revision})
	is("nothing is left", control.NodeDrained)
	if !f.state.Read().Draining(node) {
		t.Error("a drained relay would take mail")
	}
	must[*control.Node](t)(f.SetNodeState(ctx, operator, "edge1", control.NodeActive, Change{}))
	is("it was taken back", control.NodeActive)

	// Its address is released by itself, and it has drained when it has let go of it.
	src := must[*control.Source](t)(f.AssignIP(ctx, operator, "192.0.2.1", AssignRequest{Node: "edge1", OldOwnerIsOff: true}, Change{}))
	row = must[*control.Node](t)(f.SetNodeState(ctx, operator, "edge1", control.NodeDraining, Change{}))
	f.NodeReported(node, ReportInfo{Generation: f.Generation(), Revision: row.Revision})
	is("it has an address", control.NodeDraining)
	if got := f.state.Read().Source(src.ID); got.State != control.SourceReleasing || got.Owner != node {
		t.Errorf("the address is %+v", got)
	}
	is("it lets go of its address", control.NodeDraining)
	f.NodeReported(node, ReportInfo{Generation: f.Generation(), Revision: row.Revision, Left: []LeftSource{{Source: src.ID, Epoch: src.Epoch}}})
	if err := f.SettleReleases(ctx); err != nil {
		t.Fatal(err)
	}
	is("it has let go of it", control.NodeDrained)
	if got := f.state.Read().Source(src.ID); got.State != control.SourceFree {
		t.Errorf("the address is %+v", got)
	}
}

// TestDrainsThoughItsRowChanges: what is noted of a relay that drains, and that no
// relay has to hear of, moves its row ahead of all views. It has drained all the same.
func TestDrainsThoughItsRowChanges(t *testing.T) {
	f := newFixture(t)
	node := f.join(t, "edge1")
	f.NodeSeen(ctx, node, HelloInfo{Generation: f.Generation()})
	must[*control.Node](t)(f.SetNodeState(ctx, operator, "edge1", control.NodeDraining, Change{}))
	view := f.state.Read().ViewRevision()
	if _, err := f.log.Propose(ctx, &command.IPHeard{Meta: &command.Meta{Actor: "system"}, Processes: []*command.LeaseProcess{{Node: node[:], Incarnation: 7}}}); err != nil {
		t.Fatal(err)
	}
	if r := f.state.Read(); r.Node(node).Revision <= view || r.ViewRevision() != view {
		t.Fatalf("the row has revision %d, views have %d, before %d", r.Node(node).Revision, r.ViewRevision(), view)
	}
	f.NodeReported(node, ReportInfo{Generation: f.Generation(), Revision: view - 1})
	if err := f.SettleDrains(ctx); err != nil || f.state.Read().Node(node).State != control.NodeDraining {
		t.Errorf("with a view of before the drain: %v, %v", f.state.Read().Node(node).State, err)
	}
	f.NodeReported(node, ReportInfo{Generation: f.Generation(), Revision: view})
	if err := f.SettleDrains(ctx); err != nil || f.state.Read().Node(node).State != control.NodeDrained {
		t.Errorf("with the newest view: %v, %v", f.state.Read().Node(node).State, err)
	}
}
