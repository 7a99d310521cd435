package service

import (
	"context"
	"net/netip"
	"strings"
	"testing"
	"time"

	"github.com/relais-mta/relais/control"
	"github.com/relais-mta/relais/control/command"
	"github.com/relais-mta/relais/control/quota"
	"github.com/relais-mta/relais/shared/fault"
	"github.com/relais-mta/relais/shared/ownership"
)

// addressLeader says when leases end.
type addressLeader struct {
	lender
	leases []quota.FloatingStatus
	fails  error
	asked  context.Context
}

func (l *addressLeader) FloatingStatus(ctx context.Context) ([]quota.FloatingStatus, error) {
	l.asked = ctx
	return l.leases, l.fails
}

// TestFloatingAddresses: who asks sees when a lease ends, and who would give the
// address away too early is told.
func TestFloatingAddresses(t *testing.T) {
	f := newFixture(t)
	edge1, edge2 := f.join(t, "edge-1"), f.join(t, "edge-2")
	if got := f.LeaseTTL(); got >= ownership.DefaultConfig().TTL {
		t.Errorf("without leases of addresses a machine is silent after %v", got)
	}
	a := must[*control.Source](t)(f.AddIP(ctx, operator, IPRequest{Bind: netip.MustParseAddr("198.51.100.1"), EHLO: "mta1.example.net", Pool: "default", Node: "edge-1", Floating: true}, Change{}))
	if a.Pinned || !a.Leased || a.Owner != edge1 {
		t.Fatalf("got %+v", a)
	}
	if v := must[IPView](t)(f.IPView(ctx, viewer, "198.51.100.1")); v.Lease == nil || v.Lease.Problem != "there is none while it is not used" {
		t.Errorf("before its reverse DNS was looked at: %+v", v.Lease)
	}
	must[*control.Source](t)(propose[control.Source](ctx, f.Service, &command.IPVerify{Source: a.ID[:], Reverse: string(control.ReverseConfirmed)}))
	if got := f.LeaseTTL(); got != ownership.DefaultConfig().TTL {
		t.Errorf("a copied machine would get the first one's place after %v", got)
	}
	assign := func(to string, off bool) error {
		_, err := f.AssignIP(ctx, operator, "198.51.100.1", AssignRequest{Node: to, OldOwnerIsOff: off}, Change{})
		return err
	}
	if err := assign("edge-2", false); !fault.Is(err, fault.Conflict) || !strings.Contains(fault.Public(err), "free by itself when that relay is silent") {
		t.Errorf("without a leader's word: %v", err)
	}
	if v := must[IPView](t)(f.IPView(ctx, viewer, "198.51.100.1")); v.Lease == nil || v.Lease.Problem != "this server leases no addresses" {
		t.Errorf("without a leader: %+v", v.Lease)
	}
	leader := &addressLeader{leases: []quota.FloatingStatus{{Node: edge1, Heard: true, EndsMS: 100_000, ReclaimMS: 111_250}}}
	f.SetLender(leader)
	asked := time.Now()
	v := must[[]IPView](t)(f.IPs(ctx, viewer))[0]
	if v.Lease == nil || !v.Lease.Heard || v.Lease.Problem != "" || v.Lease.Until.Before(asked.Add(99*time.Second)) || v.Lease.FreeAt.Sub(v.Lease.Until) != 11_250*time.Millisecond {
		t.Errorf("got %+v", v.Lease)
	}
	err := assign("edge-2", false)
	if !fault.Is(err, fault.Conflict) || !strings.Contains(fault.Public(err), `is leased to node "edge-1", whose lease ends at `) || !strings.Contains(fault.Public(err), "it is free at ") {
		t.Errorf("while it is leased: %v", err)
	}
	leader.leases[0].Heard = false
	if err := assign("edge-2", false); err == nil || !strings.Contains(fault.Public(err), "which has not reported to this leader") {
		t.Errorf("of a relay that was not heard: %v", err)
	}
	if err := assign("edge-1", false); err != nil {
		t.Errorf("to the relay that has it: %v", err)
	}
	leader.fails = fault.New(fault.Unavailable, "test", "nobody leads")
	if v := must[IPView](t)(f.IPView(ctx, viewer, "198.51.100.1")); v.Lease == nil || v.Lease.Problem != "nobody leads" {
		t.Errorf("without a leader: %+v", v.Lease)
	}
	if err := assign("edge-2", true); err != nil || f.state.Read().Source(a.ID).Owner != edge2 {
		t.Errorf("on the word that the machine is off: %v", err)
	}
	f.SetLender(leader)
	leader.fails, leader.leases = nil, nil
	if v := must[IPView](t)(f.IPView(ctx, viewer, "198.51.100.1")); v.Lease == nil || v.Lease.Problem != "the leader has just begun" {
		t.Errorf("of a leader that begins: %+v", v.Lease)
	}
	gone, cancel := context.WithCancel(ctx)
	cancel()
	if must[[]IPView](t)(f.IPs(gone, viewer)); leader.asked.Err() == nil {
		t.Error("the leader is asked for one who has gone")
	}
	pinned := must[*control.Source](t)(f.AddIP(ctx, operator, IPRequest{Bind: netip.MustParseAddr("198.51.100.2"), EHLO: "mta2.example.net", Node: "edge-1"}, Change{}))
	if v := must[IPView](t)(f.IPView(ctx, viewer, "198.51.100.2")); v.Lease != nil || pinned.Leased {
		t.Errorf("a pinned address has a lease: %+v", v)
	}
}

// TestFloatingNeedsTheUpgrade: a server of before would not take an address back, nor
// apply that it was.
func TestFloatingNeedsTheUpgrade(t *testing.T) {
	f := newFixture(t)
	old := command.ClusterRecord(f.state.Read().Cluster())
	old.FsmVersion = control.FloatingVersion - 1
	f.reset(t, old)
	if _, err := propose[control.Source](ctx, f.Service, &command.IPPut{Source: &command.Source{Id: []byte("sixteen bytes id"), Bind: []byte{192, 0, 2, 1}, Public: []byte{192, 0, 2, 1}, Ehlo: "mta1.example.net", State: "free"}}); err != nil {
		t.Fatal(err)
	}
	f.join(t, "edge-1")
	f.refused(t, fault.Unavailable, "", func() error {
		_, err := f.AddIP(ctx, operator, IPRequest{Bind: netip.MustParseAddr("198.51.100.1"), EHLO: "mta1.example.net", Floating: true}, Change{})
		return err
	})
	f.refused(t, fault.Unavailable, "", func() error {
		_, err := f.AssignIP(ctx, operator, "192.0.2.1", AssignRequest{Node: "edge-1"}, Change{})
		return err
	})
}
