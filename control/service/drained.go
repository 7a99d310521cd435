package service

import (
	"context"

	"github.com/relais-mta/relais/control"
	"github.com/relais-mta/relais/control/command"
	"github.com/relais-mta/relais/shared/fault"
	"github.com/relais-mta/relais/shared/ids"
)

// SettleDrains has a draining relay whose queue is empty, by its own word said
// since it knows that it drains, let go of its addresses, and moves it to drained
// when it has none any more. The leader calls it from time to time.
func (s *Service) SettleDrains(ctx context.Context) error {
	r := s.state.Read()
	var draining []*control.Node
	for _, n := range r.Nodes() {
		if n.State == control.NodeDraining {
			draining = append(draining, n)
		}
	}
	if len(draining) == 0 {
		return nil
	}
	owned := map[ids.Node][]*control.Source{}
	for _, src := range r.Sources() {
		owned[src.Owner] = append(owned[src.Owner], src)
	}
	heard := s.seenAnywhere()
	for _, n := range draining {
		seen := heard[n.ID]
		// Its row may be ahead of all views, by what no relay has to hear of.
		if !seen.Connected || seen.Report == nil || seen.Report.Revision < min(n.Revision, r.ViewRevision()) {
			continue
		}
		if seen.Report.WaitingRecipients+seen.Report.InFlightRecipients+seen.Report.HeldRecipients > 0 {
			continue
		}
		if len(owned[n.ID]) > 0 {
			if err := s.retireAll(ctx, owned[n.ID]); err != nil {
				return err
			}
			continue
		}
		// The revision says that nobody let it take mail again meanwhile.
		_, err := propose[control.Node](ctx, s, &command.NodeSetState{Meta: &command.Meta{Actor: System.Name, Reason: "its queue is empty and it has no address"}, Expect: n.Revision, Node: n.ID[:], State: string(control.NodeDrained)})
		if err != nil {
			return err
		}
		s.logger.Info("a relay has drained", "node", n.ID.String(), "name", n.Name)
	}
	return nil
}

// retireAll has a relay that has drained let go of its addresses. Until the upgrade
// to the version that can is finished it keeps them.
func (s *Service) retireAll(ctx context.Context, sources []*control.Source) error {
	if s.leavingReady("") != nil {
		return nil
	}
	retired := 0
	for _, src := range sources {
		if src.State != control.SourceAssigned {
			continue
		}
		if retired++; retired > maxLeftAtOnce {
			return nil
		}
		meta := &command.Meta{Actor: System.Name, Reason: "its relay has drained"}
		if _, err := propose[control.Source](ctx, s, &command.IPRetire{Meta: meta, Expect: src.Revision, Source: src.ID[:]}); err != nil && !fault.Is(err, fault.Conflict) {
			return err
		}
	}
	return nil
}
