package service

import (
	"context"

	"github.com/relais-mta/relais/control"
	"github.com/relais-mta/relais/control/command"
	"github.com/relais-mta/relais/control/state"
	"github.com/relais-mta/relais/shared/fault"
	"github.com/relais-mta/relais/shared/ids"
)

// LeftSource is an address from which a relay has nothing open and never will
// under that epoch.
type LeftSource struct {
	Source ids.Source
	Epoch  uint64
}

// maxLeftAtOnce bounds how many addresses become free in one round.
const maxLeftAtOnce = 200

// leavingReady refuses what an older server of the cluster would not know.
func (s *Service) leavingReady(op string) error {
	return s.needs(op, "releasing addresses", state.PeersVersion)
}

// retireIP asks the owner of an address to stop using it.
func (s *Service) retireIP(ctx context.Context, a Actor, src *control.Source, c Change) (*control.Source, error) {
	if err := s.leavingReady("service.ReleaseIP"); err != nil {
		return nil, err
	}
	return propose[control.Source](ctx, s, &command.IPRetire{Meta: c.meta(a), Expect: c.revision(src.Revision), Source: src.ID[:]})
}

// QuarantineIP has nobody send from an address, named by itself or by its id,
// until its quarantine is ended. Its relay stops as for a release.
func (s *Service) QuarantineIP(ctx context.Context, a Actor, ref string, c Change) (*control.Source, error) {
	const op = "service.QuarantineIP"
	if err := s.enter(a, control.RoleOperator, op); err != nil {
		return nil, err
	}
	src, err := sourceByRef(s.state.Read(), ref)
	if err != nil {
		return nil, err
	}
	if c.Reason == "" {
		return nil, fault.Field(op, "reason", "is missing: say why nobody may use the address")
	}
	if err := s.leavingReady(op); err != nil {
		return nil, err
	}
	return propose[control.Source](ctx, s, &command.IPQuarantine{Meta: c.meta(a), Expect: c.revision(src.Revision), Source: src.ID[:]})
}

// SettleReleases frees addresses whose relays say that they have stopped using
// them. The leader calls it from time to time. A word that was said about a
// former assignment does no harm: it names the epoch.
func (s *Service) SettleReleases(ctx context.Context) error {
	r := s.state.Read()
	if s.leavingReady("") != nil || r.Recovery() != nil {
		return nil
	}
	var owners map[ids.Node]Seen
	settled := 0
	for _, src := range r.Sources() {
		if src.Owner.IsZero() || src.State != control.SourceReleasing && src.State != control.SourceQuarantined {
			continue
		}
		if owners == nil {
			owners = s.seenAnywhere()
		}
		report := owners[src.Owner].Report
		if report == nil || !saysLeft(report, src) {
			continue
		}
		if settled++; settled > maxLeftAtOnce {
			return nil
		}
		meta := &command.Meta{Actor: System.Name, Reason: "its relay has stopped using it"}
		if _, err := propose[control.Source](ctx, s, &command.IPLeft{Meta: meta, Source: src.ID[:], Node: src.Owner[:], Epoch: src.Epoch}); err != nil {
			return err
		}
	}
	return nil
}

func saysLeft(report *ReportInfo, src *control.Source) bool {
	for _, left := range report.Left {
		if left.Source == src.ID && left.Epoch == src.Epoch {
			return true
		}
	}
	return false
}
