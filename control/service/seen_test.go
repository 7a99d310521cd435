package service

import (
	"context"
	"encoding/json"
	"net/netip"
	"testing"
	"time"

	"github.com/relais-mta/relais/control"
	"github.com/relais-mta/relais/control/command"
	"github.com/relais-mta/relais/shared/fault"
	"github.com/relais-mta/relais/shared/ids"
)

// elsewhere is a membership whose one other server heard from relays.
type elsewhere struct{ seen map[ids.Node]Seen }

func (elsewhere) ServerMembers(context.Context) ([]ServerMember, error) { return nil, nil }

func (e elsewhere) Ask(_ context.Context, _, what string, v any) error {
	if what != "seen" {
		return fault.New(fault.NotFound, "test", "%s is not asked here", what)
	}
	text, err := json.Marshal(e.seen)
	if err != nil {
		return err
	}
	return json.Unmarshal(text, v)
}

// TestRelaysHeardElsewhereCount asks a server that heard of no relay: what
// another one heard counts for lists, the policy's status, addresses and the
// end of recovery mode.
func TestRelaysHeardElsewhereCount(t *testing.T) {
	f := newFixture(t)
	node, silent := f.join(t, "edge1"), f.join(t, "edge2")
	src := must[*control.Source](t)(f.AddIP(ctx, operator, IPRequest{Bind: netip.MustParseAddr("192.0.2.1"), EHLO: "mta1.example.net", Node: "edge1"}, Change{}))
	put := must[PolicyView](t)(f.PutPolicy(ctx, operator, map[string]string{"queue": ""}, nil, Change{}))
	must[*control.Cluster](t)(propose[control.Cluster](ctx, f.Service, &command.ClusterRecover{Meta: &command.Meta{Actor: System.Name}, Generation: 2, Cause: string(control.CauseRestore), Server: command.ServerRecord(f.state.Read().Servers()[0])}))
	if v := f.recovery(); len(v.Heard) != 0 || len(v.Missing) != 2 {
		t.Fatalf("nobody was heard, but %+v", v)
	}
	at := time.Now().Add(time.Minute)
	other := elsewhere{map[ids.Node]Seen{node: {Connected: true, Since: at, LastContact: at, Acked: put.Revision, Addresses: []netip.Addr{src.Bind}, Clone: &Clone{At: at, Times: 3}}}}
	var self ids.Node
	stamp(&self, time.Now())
	f.SetMembership(other, self)
	if v := f.recovery(); len(v.Heard) != 1 || v.Heard[0].ID != node || len(v.Missing) != 1 || v.Missing[0].ID != silent {
		t.Errorf("recovery mode counts %+v", v)
	}
	status := must[PolicyStatus](t)(f.PolicyStatus(viewer))
	if status.Applied != 1 || status.Total != 2 {
		t.Errorf("applied by %d of %d", status.Applied, status.Total)
	}
	if ips := must[[]IPView](t)(f.IPs(ctx, viewer)); len(ips) != 1 || ips[0].Present == nil || !*ips[0].Present {
		t.Errorf("the address is %+v", ips)
	}
	// Whoever saw most of a copied machine is believed, not who heard last.
	f.NodeSeen(ctx, node, HelloInfo{})
	f.ClonesElsewhere(map[ids.Node]Clone{node: {At: time.Now()}})
	if v := must[NodeView](t)(f.Node(viewer, "edge1")); v.Seen.Clone == nil || v.Seen.Clone.Times != 3 {
		t.Errorf("the copied machine is shown as %+v", v.Seen.Clone)
	}
	if f.CloneProblem() == "" {
		t.Error("health does not tell of a copy that another server refused")
	}
}
