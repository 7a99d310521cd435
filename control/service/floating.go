package service

import (
	"context"
	"fmt"
	"slices"
	"time"

	"github.com/relais-mta/relais/control"
	"github.com/relais-mta/relais/control/quota"
	"github.com/relais-mta/relais/shared/fault"
	"github.com/relais-mta/relais/shared/ids"
)

// Floating knows when relays' leases of floating addresses end; quota.Quota does.
type Floating interface {
	FloatingStatus(ctx context.Context) ([]quota.FloatingStatus, error)
}

// AddressLease is what the leader knows of the lease of a floating address.
type AddressLease struct {
	Heard   bool      // its relay has reported since the leader leads
	Until   time.Time // its relay uses it until then, if that is not heard again; zero: the leader does not say
	FreeAt  time.Time // it is taken back then
	Problem string    // why the leader does not say
}

// addressLeases asks the leader for the leases of all relays.
func (s *Service) addressLeases(ctx context.Context) (map[ids.Node]AddressLease, string) {
	leader, ok := s.lender.(Floating)
	if !ok {
		return nil, "this server leases no addresses"
	}
	status, err := leader.FloatingStatus(ctx)
	if err != nil {
		return nil, fault.Public(err)
	}
	at := now()
	out := make(map[ids.Node]AddressLease, len(status))
	for _, f := range status {
		out[f.Node] = AddressLease{Heard: f.Heard, Until: at.Add(time.Duration(f.EndsMS) * time.Millisecond), FreeAt: at.Add(time.Duration(f.ReclaimMS) * time.Millisecond)}
	}
	return out, ""
}

// addLeases adds to addresses that are leased when that ends.
func (s *Service) addLeases(ctx context.Context, views []IPView) {
	leased := func(v IPView) bool { return v.Leased && !v.Owner.IsZero() }
	if !slices.ContainsFunc(views, leased) {
		return
	}
	leases, problem := s.addressLeases(ctx)
	for i := range views {
		if leased(views[i]) {
			l := leases[views[i].Owner]
			switch l.Problem = problem; {
			case views[i].State == control.SourceAssigned && !views[i].Usable(): // its relay is not told of it
				l = AddressLease{Problem: "there is none while it is not used"}
			case l.Until.IsZero() && problem == "":
				l.Problem = "the leader has just begun"
			}
			views[i].Lease = &l
		}
	}
}

// checkLease refuses to give a floating address away while its relay may use it, and
// says when that ends. What it does not see the state refuses.
func (s *Service) checkLease(ctx context.Context, src *control.Source, node []byte, req AssignRequest) error {
	const op = "service.AssignIP"
	if node == nil {
		return nil
	}
	if !src.Pinned {
		if err := s.needs(op, "assigning a floating address", control.FloatingVersion); err != nil {
			return err
		}
	}
	if !src.Leased || src.Owner.IsZero() || src.Owner == ids.Node(node) || req.OldOwnerIsOff || src.State != control.SourceAssigned {
		return nil
	}
	leases, _ := s.addressLeases(ctx)
	l, known := leases[src.Owner]
	if !known {
		return nil
	}
	name := src.Owner.String()
	if n := s.state.Read().Node(src.Owner); n != nil {
		name = n.Name
	}
	last := "which has not reported to this leader"
	if l.Heard {
		last = "whose lease ends at " + l.Until.UTC().Format(time.TimeOnly) + " UTC if it is not heard again"
	}
	e := fault.New(fault.Conflict, op, "%s", fmt.Sprintf("%s is leased to node %q, %s: it is free at %s UTC then; release it with `relais-control ip release`, wait, or switch that machine off and say so with --old-owner-is-off",
		src.Bind, name, last, l.FreeAt.UTC().Format(time.TimeOnly)))
	e.Field = "node"
	return e
}
