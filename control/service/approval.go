package service

import (
	"context"

	"github.com/relais-mta/relais/control"
	"github.com/relais-mta/relais/control/command"
	"github.com/relais-mta/relais/shared/fault"
)

// approvalVersion is the version of the rules that knows tokens whose nodes
// wait: a server with older rules would let them in.
const approvalVersion = 2

// approvalKnown refuses while a server of the cluster may have older rules.
func (s *Service) approvalKnown(op string) error {
	cluster, err := s.Cluster()
	if err != nil {
		return err
	}
	if cluster.FSMVersion < approvalVersion {
		return fault.New(fault.Unavailable, op, "--approve needs version %d of the rules, the cluster has %d: upgrade all control servers first", approvalVersion, cluster.FSMVersion)
	}
	return nil
}

// ApproveNode accepts a relay that joined with a token that needs approval.
// Accepting one that is active already changes nothing.
func (s *Service) ApproveNode(ctx context.Context, a Actor, ref string, c Change) (*control.Node, error) {
	const op = "service.ApproveNode"
	if err := s.enter(a, control.RoleOperator, op); err != nil {
		return nil, err
	}
	n, err := s.nodeByRef(ref)
	if err != nil {
		return nil, err
	}
	if n.State != control.NodePending && n.State != control.NodeActive {
		return nil, fault.New(fault.Conflict, op, "%s is %s: only a relay that waits for approval is approved", n.ID, n.State)
	}
	return propose[control.Node](ctx, s, &command.NodeSetState{Meta: c.meta(a), Expect: c.revision(n.Revision), Node: n.ID[:], State: string(control.NodeActive)})
}
