package service

import (
	"net/netip"
	"strings"
	"testing"

	"github.com/relais-mta/relais/control"
	"github.com/relais-mta/relais/control/command"
	"github.com/relais-mta/relais/shared/fault"
)

// TestWhyAnAddressIsUnused follows an address from being added to the eviction
// of its relay and its release.
func TestWhyAnAddressIsUnused(t *testing.T) {
	f := newFixture(t)
	node := f.join(t, "edge1")
	src := must[*control.Source](t)(f.AddIP(ctx, operator, IPRequest{Bind: netip.MustParseAddr("192.0.2.1"), EHLO: "mta1.example.net", Pool: "default"}, Change{}))
	is := func(want string) {
		t.Helper()
		v := must[IPView](t)(f.IPView(ctx, viewer, "192.0.2.1"))
		if v.Unused != want {
			t.Errorf("it is unused because %q, want %q", v.Unused, want)
		}
	}
	is("no relay has it")
	must[*control.Source](t)(f.AssignIP(ctx, operator, "192.0.2.1", AssignRequest{Node: "edge1"}, Change{}))
	is("its reverse DNS is not confirmed")
	must[*control.Source](t)(propose[control.Source](ctx, f.Service, &command.IPVerify{Source: src.ID[:], Reverse: "confirmed"}))
	is("")
	must[*control.Node](t)(f.SetNodeState(ctx, operator, node.String(), control.NodeEvicted, Change{Reason: "stolen"}))
	is("quarantined: relay edge1 was evicted: stolen")
	f.refused(t, fault.Denied, "", func() error { _, err := f.ReleaseIP(ctx, viewer, "192.0.2.1", true, Change{Reason: "x"}); return err })
	f.refused(t, fault.Invalid, "reason", func() error { _, err := f.ReleaseIP(ctx, operator, "192.0.2.1", true, Change{}); return err })
	f.refused(t, fault.Conflict, "old_owner_is_off", func() error {
		_, err := f.ReleaseIP(ctx, operator, "192.0.2.1", false, Change{Reason: "wiped"})
		return err
	})
	must[*control.Source](t)(f.ReleaseIP(ctx, operator, "192.0.2.1", true, Change{Reason: "wiped"}))
	is("no relay has it")
	a := must[[]*control.AuditEntry](t)(f.Audit(operator, AuditFilter{Limit: 1}))
	if a[0].Actor != operator.Name || a[0].Reason != "wiped" || a[0].Action != "ip.release" || !strings.Contains(a[0].Before, "quarantined") || !strings.Contains(a[0].After, "state=free") {
		t.Errorf("the audit tail has %+v", a[0])
	}
}
