package main

import (
	"context"
	"time"

	"github.com/relais-mta/relais/control"
	"github.com/relais-mta/relais/control/cluster"
	"github.com/relais-mta/relais/control/dispatch"
	"github.com/relais-mta/relais/shared/fault"
	"github.com/relais-mta/relais/shared/ids"
)

// copiedShown is how long node list marks a relay of which a copy was refused;
// node show tells of it for longer.
const copiedShown = 5 * time.Minute

// linkPeers shows the other servers to the link server in its own words.
type linkPeers struct{ server *server }

// Term implements dispatch.Peers.
func (p linkPeers) Term() (uint64, bool) { return p.server.cluster.Term() }

// AskLeader implements dispatch.Peers.
func (p linkPeers) AskLeader(ctx context.Context, what string, in, out any) error {
	return p.server.cluster.AskLeader(ctx, what, in, out)
}

// AskServer implements dispatch.Peers.
func (p linkPeers) AskServer(ctx context.Context, id ids.Node, what string, in, out any) error {
	for _, row := range p.server.service.ServerRows() {
		if row.ID == id && row.State != control.NodeEvicted {
			return p.server.cluster.AskServer(ctx, row.RaftAddress, what, in, out)
		}
	}
	return fault.New(fault.NotFound, "relais-control.serve", "%s is not a server of this cluster", id)
}

// Servers implements dispatch.Peers.
func (p linkPeers) Servers() []ids.Node {
	rows := p.server.service.ServerRows()
	out := make([]ids.Node, 0, len(rows))
	for _, row := range rows {
		out = append(out, row.ID)
	}
	return out
}

// sessionRequests adds what servers ask each other about relays' sessions.
func (s *server) sessionRequests(all map[string]cluster.PeerHandler) map[string]cluster.PeerHandler {
	for _, name := range dispatch.RequestNames() {
		all[name] = func(ctx context.Context, from ids.Node, body []byte) (any, error) {
			if views := s.sessions.Load(); views != nil {
				return views.Requests()[name](ctx, from, body)
			}
			return nil, fault.Wrap(control.ErrNoLeader, fault.Unavailable, "relais-control.serve", "this server is starting")
		}
	}
	return all
}
