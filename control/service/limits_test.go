package service

import (
	"context"
	"testing"
	"time"

	"github.com/relais-mta/relais/control"
	"github.com/relais-mta/relais/control/command"
	"github.com/relais-mta/relais/control/quota"
	"github.com/relais-mta/relais/shared/fault"
	"github.com/relais-mta/relais/shared/ids"
	"github.com/relais-mta/relais/shared/lease"
	"github.com/relais-mta/relais/shared/policy"
)

const orangeLimit = "[[limit]]\nname = \"orange\"\nprovider = \"orange\"\nmessages = \"600/1m\"\nconnections = 2\n[[limit]]\nname = \"acme\"\ntenant = \"acme\"\nconnections = 5\n"

// lender answers for the leader.
type lender struct {
	status []quota.HolderStatus
	err    error
}

func (l *lender) Status(context.Context, []lease.LimitID) ([]quota.HolderStatus, error) {
	return l.status, l.err
}

// TestLimitsNeedTheUpgrade: a server of before could make no views of a policy with
// the section.
func TestLimitsNeedTheUpgrade(t *testing.T) {
	f := newFixture(t)
	old := command.ClusterRecord(f.state.Read().Cluster())
	old.FsmVersion = quota.LeaseVersion - 1
	f.reset(t, old)
	text := map[string]string{"limits": "[[limit]]\nname = \"a\"\nconnections = 2\n"}
	f.refused(t, fault.Unavailable, "limits", func() error {
		_, err := f.PutPolicy(ctx, operator, text, nil, Change{})
		return err
	})
	f = newFixture(t)
	if _, err := f.PutPolicy(ctx, operator, text, nil, Change{}); err != nil {
		t.Error(err)
	}
	view, err := f.ViewFor(ctx, ids.Node{1})
	if err != nil || view.Sections["limits"] != "" {
		t.Errorf("a relay gets the section: %+v, %v", view.Sections, err)
	}
}

func TestLimitsAndWhoHoldsThem(t *testing.T) {
	f := newFixture(t)
	if _, err := f.AddTenant(ctx, operator, "acme", Change{}); err != nil {
		t.Fatal(err)
	}
	edge := f.join(t, "edge-1")
	old := f.join(t, "edge-2")
	f.NodeSeen(ctx, edge, HelloInfo{Quota: true})
	f.NodeSeen(ctx, old, HelloInfo{})
	must[PolicyView](t)(f.PutPolicy(ctx, operator, map[string]string{"limits": orangeLimit}, nil, Change{}))
	set := &command.LimitsSet{}
	doc, err := policy.Parse(map[string]string{"limits": orangeLimit})
	if err != nil {
		t.Fatal(err)
	}
	for i := range doc.Limits.Limit {
		e := &doc.Limits.Limit[i]
		limits, err := e.Leases()
		if err != nil {
			t.Fatal(err)
		}
		for _, l := range limits {
			set.Put = append(set.Put, command.SharedLimitRecord(&control.SharedLimit{Limit: l, Name: e.Name, Provider: e.Provider, Tenant: e.Tenant}))
		}
	}
	must[*control.Lease](t)(propose[control.Lease](ctx, f.Service, set))
	must[*control.Lease](t)(propose[control.Lease](ctx, f.Service, &command.LeaseNumber{Nodes: [][]byte{edge[:]}}))
	epoch := must[*control.Lease](t)(propose[control.Lease](ctx, f.Service, &command.LeaseBegin{})).Epoch
	view, err := f.ViewFor(ctx, edge)
	if err != nil || len(view.SharedLimits) != 3 || view.SharedLimits[2].Tenant.IsZero() || view.Lease.TTL != 30*time.Second {
		t.Fatalf("the relay's view: %+v, %v", view.SharedLimits, err)
	}
	rate := view.SharedLimits[0].ID
	must[*control.LeaseResult](t)(propose[control.LeaseResult](ctx, f.Service, command.NewLeaseTick(epoch, []lease.Session{{Node: 1, Incarnation: 7}}, []lease.Change{
		{Limit: rate, Node: 1, Incarnation: 7, Ceiling: lease.Share{Amount: 300_000, Burst: 5}, Floor: lease.Share{Amount: 60_000, Burst: 2}, Why: lease.Raised}})))
	f.SetLender(&lender{status: []quota.HolderStatus{{Node: edge, Limit: rate, Demand: 400_000, Used: 12, Heard: true}}})
	all, err := f.Limits(ctx, viewer)
	if err != nil || len(all) != 3 || all[0].Name != "acme" || all[1].Kind != lease.Rate || all[2].Kind != lease.Slots {
		t.Fatalf("limits %+v, %v", all, err)
	}
	if len(all[1].NotKept) != 1 || all[1].NotKept[0] != "edge-2" {
		t.Errorf("not kept by %v", all[1].NotKept)
	}
	views, err := f.Limit(ctx, viewer, "orange")
	if err != nil || len(views) != 2 || views[0].Held.Amount != 360_000 || views[0].Free.Amount != 240_000 || len(views[0].Holders) != 1 {
		t.Fatalf("orange %+v, %v", views, err)
	}
	if h := views[0].Holders[0]; h.Name != "edge-1" || h.Incarnation != 7 || h.Floor.Amount != 60_000 || h.Live == nil || h.Live.Demand != 400_000 {
		t.Errorf("holder %+v", h)
	}
	if _, err := f.Limit(ctx, viewer, "none"); !fault.Is(err, fault.NotFound) {
		t.Errorf("an unknown limit: %v", err)
	}
	f.SetLender(&lender{err: fault.New(fault.Unavailable, "test", "nobody lends")})
	if views, err = f.Limit(ctx, viewer, "orange"); err != nil || views[0].Problem == "" || len(views[0].Holders) != 1 {
		t.Errorf("without a leader: %+v, %v", views, err)
	}

	why, err := f.PolicyWhy(ctx, viewer, Mail{Provider: "orange", Tenant: "acme"})
	if err != nil || len(why.Shared) != 3 || !why.Provider.Listed || len(why.Provider.Limits) == 0 {
		t.Errorf("why %+v, %v", why, err)
	}
	if why, err = f.PolicyWhy(ctx, viewer, Mail{Provider: "google", Domain: "Example.COM"}); err != nil || len(why.Shared) != 1 || why.Shared[0].Name != "acme" || why.Mail.Domain != "example.com" {
		t.Errorf("of another provider: %+v, %v", why, err)
	}
	for field, m := range map[string]Mail{"provider": {Provider: "nobody"}, "tenant": {Tenant: "nobody"}, "pool": {Pool: "nobody"}, "source": {Source: "10.9.9.9"}} {
		f.refused(t, map[bool]fault.Kind{true: fault.Invalid, false: fault.NotFound}[field == "provider"], field, func() error {
			_, err := f.PolicyWhy(ctx, viewer, m)
			return err
		})
	}

	// In recovery mode a relay that was heard still owes what its disk holds.
	server := f.state.Read().Servers()[0]
	must[*control.Cluster](t)(propose[control.Cluster](ctx, f.Service, &command.ClusterRecover{Generation: 1_900_000_000, Cause: "restore", Server: command.ServerRecord(server)}))
	since := f.state.Read().Recovery().Since
	f.seen[edge].LastContact, f.seen[old].LastContact = since.Add(time.Second), since.Add(time.Second)
	if v := f.recovery(); len(v.Missing) != 1 || v.Missing[0].Name != "edge-1" {
		t.Errorf("recovery %+v", v)
	}
	must[*control.Lease](t)(propose[control.Lease](ctx, f.Service, &command.LeaseDeclare{Node: edge[:]}))
	if v := f.recovery(); len(v.Missing) != 0 {
		t.Errorf("recovery %+v", v)
	}
}
