package service

import (
	"context"

	"github.com/relais-mta/relais/control"
	"github.com/relais-mta/relais/control/command"
	"github.com/relais-mta/relais/shared/ids"
)

// SettleDrains moves a draining relay that has nothing left to drained: its
// queue is empty by its own word, said since it knows that it drains, and no
// address is assigned to it. The leader calls it from time to time.
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
	owners := map[ids.Node]bool{}
	for _, src := range r.Sources() {
		owners[src.Owner] = true
	}
	heard := s.seenAnywhere()
	for _, n := range draining {
		seen := heard[n.ID]
		if owners[n.ID] || !seen.Connected || seen.Report == nil || seen.Report.Revision < n.Revision {
			continue
		}
		if seen.Report.WaitingRecipients+seen.Report.InFlightRecipients+seen.Report.HeldRecipients > 0 {
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
