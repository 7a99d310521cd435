package service

import (
	"slices"
	"strconv"
	"testing"
	"time"

	"github.com/relais-mta/relais/control"
	"github.com/relais-mta/relais/shared/fault"
)

func TestPolicyRollback(t *testing.T) {
	t.Parallel()
	f := newFixture(t)
	put := func(sections map[string]string) uint64 {
		t.Helper()
		return must[PolicyView](t)(f.PutPolicy(ctx, operator, sections, nil, Change{Reason: "because"})).Revision
	}
	text := func(name string) string {
		for _, s := range must[PolicyView](t)(f.Policy(viewer)).Sections {
			if s.Name == name && !s.Default {
				return s.Text
			}
		}
		return ""
	}
	first := put(map[string]string{"queue": "retry_max = \"7h\"\n"})
	second := put(map[string]string{"queue": "", "delivery": "max_sessions = 7\n"})
	p := must[Preview](t)(f.PreviewRollback(viewer, first))
	if p.Revision != second || len(p.Changes) != 2 || p.Impact.String() != "settings of every relay: queue, delivery" {
		t.Errorf("got %+v", p)
	}
	back := must[PolicyView](t)(f.RollbackPolicy(ctx, operator, first, nil, Change{Reason: "orange defers"}))
	if back.Revision <= second || text("queue") != "retry_max = \"7h\"\n" || text("delivery") != "" {
		t.Errorf("got %+v", back)
	}
	if e := must[[]*control.AuditEntry](t)(f.Audit(operator, AuditFilter{Limit: 1})); e[0].Reason != "rollback to revision "+strconv.FormatUint(first, 10)+": orange defers" || e[0].Actor != "olga" {
		t.Errorf("got %+v", e[0])
	}
	must[PolicyView](t)(f.RollbackPolicy(ctx, operator, 0, nil, Change{}))
	if text("queue") != "" {
		t.Error("revision 0 is not the shipped policy")
	}
	if got := must[[]*control.PolicyVersion](t)(f.PolicyVersions(viewer)); len(got) != 4 || got[3].Policy != first || got[3].Reason != "because" {
		t.Errorf("got %+v", got)
	}
	stale := first
	f.refused(t, fault.Conflict, "", func() error {
		_, err := f.RollbackPolicy(ctx, operator, second, &stale, Change{})
		return err
	})
	f.refused(t, fault.NotFound, "revision", func() error {
		_, err := f.RollbackPolicy(ctx, operator, 12345, nil, Change{})
		return err
	})
	f.refused(t, fault.Invalid, "revision", func() error {
		_, err := f.RollbackPolicy(ctx, operator, 0, nil, Change{})
		return err
	})
	f.refused(t, fault.Denied, "", func() error {
		_, err := f.RollbackPolicy(ctx, viewer, second, nil, Change{})
		return err
	})
}

func TestPreviewIsCheckedAndChangesNothing(t *testing.T) {
	t.Parallel()
	f := newFixture(t)
	before := f.state.Read().Index()
	if _, err := f.PreviewPolicy(viewer, map[string]string{"queue": "retri = 1\n"}); !fault.Is(err, fault.Invalid) {
		t.Errorf("got %v", err)
	}
	p := must[Preview](t)(f.PreviewPolicy(viewer, map[string]string{"queue": "retry_max = \"7h\"\n"}))
	if len(p.Changes) != 1 || p.Changes[0].New != "\"7h\"" || f.state.Read().Index() != before {
		t.Errorf("got %+v", p)
	}
}

func TestPolicyStatus(t *testing.T) {
	t.Parallel()
	f := newFixture(t)
	one, two, gone := f.join(t, "edge-1"), f.join(t, "edge-2"), f.join(t, "edge-3")
	if _, err := f.SetNodeState(ctx, admin, gone.String(), control.NodeEvicted, Change{}); err != nil {
		t.Fatal(err)
	}
	old := must[PolicyView](t)(f.PutPolicy(ctx, operator, map[string]string{"queue": "retry_max = \"6h\"\n"}, nil, Change{})).Revision
	now := must[PolicyView](t)(f.PutPolicy(ctx, operator, map[string]string{"queue": "retry_max = \"7h\"\n"}, nil, Change{})).Revision
	f.NodeSeen(ctx, one, HelloInfo{Generation: f.Generation(), Revision: old})
	f.NodeSeen(ctx, two, HelloInfo{Generation: f.Generation(), Revision: old})
	f.AckView(one, now)
	f.NackView(two, now, "queue.retry_max: no")
	second := func(s PolicyStatus) RelayStatus {
		return s.Relays[slices.IndexFunc(s.Relays, func(r RelayStatus) bool { return r.Node.ID == two })]
	}
	s := must[PolicyStatus](t)(f.PolicyStatus(viewer))
	if r := second(s); s.Revision != now || s.Applied != 1 || s.Total != 2 || !r.Refused || r.Why != "queue.retry_max: no" || r.Acked != old {
		t.Errorf("got %+v", s)
	}
	// What a relay holds of before a restore has a higher number, and is another policy.
	before := f.Generation() - 1
	f.NodeSeen(ctx, one, HelloInfo{Generation: before, Revision: now + 1000})
	f.NodeReported(one, ReportInfo{Generation: before, Revision: now + 1000})
	if s = must[PolicyStatus](t)(f.PolicyStatus(viewer)); s.Applied != 0 || must[NodeView](t)(f.Node(viewer, "edge-1")).Seen.Report.Revision != 0 {
		t.Errorf("a view of before a restore counts: %+v", s)
	}
	f.AckView(one, now)
	f.AckView(two, now+1) // the next one suits it
	if s = must[PolicyStatus](t)(f.PolicyStatus(viewer)); s.Applied != 2 || second(s).Refused {
		t.Errorf("got %+v", s)
	}
}

func TestAuditFilter(t *testing.T) {
	t.Parallel()
	f := newFixture(t)
	must[*control.Tenant](t)(f.AddTenant(ctx, operator, "acme", Change{}))
	must[*control.Tenant](t)(f.AddTenant(ctx, admin, "rival", Change{}))
	must[DomainView](t)(f.AddDomain(ctx, operator, DomainRequest{Tenant: "acme", Name: "example.com"}, Change{}))
	for name, tc := range map[string]struct {
		filter AuditFilter
		want   int
	}{
		"all":    {AuditFilter{Limit: 100}, len(f.state.Read().Audit(100))},
		"limit":  {AuditFilter{Limit: 2}, 2},
		"actor":  {AuditFilter{Limit: 100, Actor: "olga"}, 2},
		"object": {AuditFilter{Limit: 100, Object: "example"}, 1},
		"action": {AuditFilter{Limit: 100, Action: "tenant.put"}, 2},
		"past":   {AuditFilter{Limit: 100, Since: time.Now().Add(time.Hour)}, 0},
		"both":   {AuditFilter{Limit: 100, Actor: "olga", Action: "tenant.put", Since: time.Now().Add(-time.Hour)}, 1},
	} {
		if got := must[[]*control.AuditEntry](t)(f.Audit(operator, tc.filter)); len(got) != tc.want {
			t.Errorf("%s: got %d entries, want %d", name, len(got), tc.want)
		}
	}
}
