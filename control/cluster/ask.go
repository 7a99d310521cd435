package cluster

import (
	"context"
	"encoding/json"

	"github.com/relais-mta/relais/control"
	"github.com/relais-mta/relais/shared/fault"
)

// Term returns the term in which this server leads and is up to date. Without
// that, leads is false.
func (c *Cluster) Term() (term uint64, leads bool) {
	if !c.Ready() {
		return 0, false
	}
	return c.raft.CurrentTerm(), true
}

// AskLeader asks the leader something that a PeerHandler answers. in becomes
// the body of the request, the answer is decoded into out. It fails at once
// where there is no other server to ask.
func (c *Cluster) AskLeader(ctx context.Context, what string, in, out any) error {
	to, id := c.Leader()
	if to == "" || id == c.id {
		return fault.Wrap(control.ErrNoLeader, fault.Unavailable, "cluster.AskLeader", "the cluster has no leader now: try again in a few seconds")
	}
	return c.AskServer(ctx, to, what, in, out)
}

// AskServer asks the server at a raft address, as AskLeader does.
func (c *Cluster) AskServer(ctx context.Context, to, what string, in, out any) error {
	const op = "cluster.AskServer"
	if c.peers == nil {
		return fault.New(fault.Unavailable, op, "this server has no peers")
	}
	body, err := json.Marshal(in)
	if err != nil {
		return fault.Wrap(err, fault.Internal, op, "the request cannot be encoded")
	}
	return c.askFor(ctx, to, what, body, out)
}
