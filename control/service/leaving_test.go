package service

import (
	"net/netip"
	"testing"

	"github.com/relais-mta/relais/control"
	"github.com/relais-mta/relais/control/command"
	"github.com/relais-mta/relais/control/state"
	"github.com/relais-mta/relais/shared/fault"
	"github.com/relais-mta/relais/shared/ids"
)

// TestReleaseWaitsForTheRelay follows an address that is released and one that is
// put in quarantine until their relay says, of the right assignment, that it has
// stopped using them.
func TestReleaseWaitsForTheRelay(t *testing.T) {
	f := newFixture(t)
	node := f.join(t, "edge1")
	f.join(t, "edge2")
	add := func(address string) *control.Source {
		return must[*control.Source](t)(f.AddIP(ctx, operator, IPRequest{Bind: netip.MustParseAddr(address), EHLO: "mta1.example.net", Pool: "default", Node: "edge1"}, Change{}))
	}
	a, b := add("192.0.2.1"), add("192.0.2.2")
	f.refused(t, fault.Denied, "", func() error {
		_, err := f.ReleaseIP(ctx, viewer, "192.0.2.1", false, Change{Reason: "moves"})
		return err
	})
	f.refused(t, fault.Denied, "", func() error { _, err := f.QuarantineIP(ctx, viewer, "192.0.2.2", Change{Reason: "listed"}); return err })
	f.refused(t, fault.Invalid, "reason", func() error { _, err := f.QuarantineIP(ctx, operator, "192.0.2.2", Change{}); return err })
	must[*control.Source](t)(f.ReleaseIP(ctx, operator, "192.0.2.1", false, Change{Reason: "moves"}))
	must[*control.Source](t)(f.QuarantineIP(ctx, operator, "192.0.2.2", Change{Reason: "listed"}))
	if v := must[IPView](t)(f.IPView(ctx, viewer, "192.0.2.1")); v.State != control.SourceReleasing || v.Unused != "relay edge1 finishes what it has begun" {
		t.Errorf("got %+v", v)
	}
	settle := func(what string, first, second ids.Node) {
		t.Helper()
		if err := f.SettleReleases(ctx); err != nil {
			t.Fatal(err)
		}
		r := f.state.Read()
		if x, y := r.Source(a.ID), r.Source(b.ID); x.Owner != first || y.Owner != second {
			t.Errorf("%s: %s is %s of %s, %s is %s of %s", what, x.Bind, x.State, x.Owner, y.Bind, y.State, y.Owner)
		}
	}
	settle("nothing was said", node, node)
	f.NodeSeen(ctx, node, HelloInfo{})
	f.NodeReported(node, ReportInfo{Left: []LeftSource{{Source: a.ID, Epoch: a.Epoch - 1}, {Source: b.ID, Epoch: b.Epoch + 1}}})
	settle("of other epochs", node, node)
	f.NodeReported(node, ReportInfo{Left: []LeftSource{{Source: b.ID, Epoch: b.Epoch}}})
	settle("of one", node, ids.Node{})
	f.NodeReported(node, ReportInfo{Left: []LeftSource{{Source: a.ID, Epoch: a.Epoch}}})
	settle("of the other", ids.Node{}, ids.Node{})
	r := f.state.Read()
	if x, y := r.Source(a.ID), r.Source(b.ID); x.State != control.SourceFree || y.State != control.SourceQuarantined {
		t.Errorf("got %+v and %+v", x, y)
	}
	must[*control.Source](t)(f.AssignIP(ctx, operator, "192.0.2.1", AssignRequest{Node: "edge2"}, Change{}))
	f.refused(t, fault.Conflict, "node", func() error {
		_, err := f.AssignIP(ctx, operator, "192.0.2.2", AssignRequest{Node: "edge2"}, Change{})
		return err
	})
	must[*control.Source](t)(f.UnquarantineIP(ctx, operator, "192.0.2.2", false, Change{Reason: "delisted"}))
	f.refused(t, fault.Conflict, "", func() error {
		_, err := f.UnquarantineIP(ctx, operator, "192.0.2.1", false, Change{Reason: "delisted"})
		return err
	})
	must[*control.Source](t)(f.AssignIP(ctx, operator, "192.0.2.2", AssignRequest{Node: "edge2"}, Change{}))
}

// TestReleasingNeedsTheUpgrade: servers of the release before would not know it.
func TestReleasingNeedsTheUpgrade(t *testing.T) {
	f := newFixture(t)
	old := command.ClusterRecord(f.state.Read().Cluster())
	old.FsmVersion = state.PeersVersion - 1
	f.reset(t, old)
	if _, err := propose[control.Source](ctx, f.Service, &command.IPPut{Source: &command.Source{Id: []byte("sixteen bytes id"), Bind: []byte{192, 0, 2, 1}, Public: []byte{192, 0, 2, 1}, Ehlo: "mta1.example.net", State: "free"}}); err != nil {
		t.Fatal(err)
	}
	f.refused(t, fault.Unavailable, "", func() error {
		_, err := f.ReleaseIP(ctx, operator, "192.0.2.1", false, Change{Reason: "moves"})
		return err
	})
	f.refused(t, fault.Unavailable, "", func() error {
		_, err := f.QuarantineIP(ctx, operator, "192.0.2.1", Change{Reason: "listed"})
		return err
	})
}
