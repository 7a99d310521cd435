package service

import (
	"context"

	"github.com/relais-mta/relais/control"
	"github.com/relais-mta/relais/control/command"
	"github.com/relais-mta/relais/control/state"
	"github.com/relais-mta/relais/shared/fault"
)

// reverseVersion is the version of the commands that brought verdicts on
// reverse DNS: before it relays use addresses without one.
const reverseVersion = 2

// ReleaseIP asks the relay that has an address, named by itself or by its id, to
// stop using it: it is free when the relay says that it has. An address in
// quarantine is free at once; oldOwnerIsOff is the operator's word that the
// machine that had it is switched off.
func (s *Service) ReleaseIP(ctx context.Context, a Actor, ref string, oldOwnerIsOff bool, c Change) (*control.Source, error) {
	const op = "service.ReleaseIP"
	if err := s.enter(a, control.RoleOperator, op); err != nil {
		return nil, err
	}
	src, err := sourceByRef(s.state.Read(), ref)
	if err != nil {
		return nil, err
	}
	if src.State != control.SourceQuarantined {
		return s.retireIP(ctx, a, src, c)
	}
	return s.UnquarantineIP(ctx, a, ref, oldOwnerIsOff, c)
}

// UnquarantineIP ends the quarantine of an address: it is free again.
func (s *Service) UnquarantineIP(ctx context.Context, a Actor, ref string, oldOwnerIsOff bool, c Change) (*control.Source, error) {
	const op = "service.UnquarantineIP"
	if err := s.enter(a, control.RoleOperator, op); err != nil {
		return nil, err
	}
	src, err := sourceByRef(s.state.Read(), ref)
	if err != nil {
		return nil, err
	}
	if c.Reason == "" {
		return nil, fault.Field(op, "reason", "is missing: say why the address may be used again")
	}
	return propose[control.Source](ctx, s, &command.IPRelease{Meta: c.meta(a), Expect: c.revision(src.Revision), Source: src.ID[:], OldOwnerIsOff: oldOwnerIsOff})
}

// unused says why no mail leaves from an address; empty: it may.
func unused(r *state.Reader, src *control.Source) string {
	owner := r.Node(src.Owner)
	switch {
	case src.State == control.SourceQuarantined:
		return "quarantined: " + src.Quarantine
	case owner != nil && src.State == control.SourceReleasing:
		return "relay " + owner.Name + " finishes what it has begun"
	case owner == nil:
		return "no relay has it"
	case owner.State == control.NodeEvicted:
		return "relay " + owner.Name + " was evicted"
	case owner.State == control.NodePending:
		return "relay " + owner.Name + " waits for approval"
	case r.Cluster().FSMVersion >= reverseVersion && !src.Usable():
		return "its reverse DNS is not confirmed"
	case src.Pool.IsZero():
		return "it is in no pool"
	}
	return ""
}
