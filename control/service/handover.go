package service

import (
	"context"
	"net"
	"net/netip"
	"strings"

	"github.com/relais-mta/relais/control"
	"github.com/relais-mta/relais/control/command"
	"github.com/relais-mta/relais/control/state"
	"github.com/relais-mta/relais/shared/fault"
)

// HandoverInfo says how far a relay is with giving its mail to others.
type HandoverInfo struct {
	Given     uint64 // recipients, since its start
	PerSecond uint64 // of late
	Offered   uint64 // messages that are not answered
	Pools     uint32 // whose mail goes to others
}

// HandoverAddress is where the relay takes mail of others; empty: nowhere.
func (n NodeView) HandoverAddress() string {
	if n.Handover == command.HandoverNone {
		return ""
	}
	return n.Handover
}

// maxSettledAtOnce bounds how many relays' addresses are recorded in one round.
const maxSettledAtOnce = 50

// reachedAt completes the address that a relay gives for hand-over: without a
// host it is the one that it links from.
func reachedAt(address string, remote netip.AddrPort) string {
	if port, ok := strings.CutPrefix(address, ":"); ok && remote.IsValid() {
		return net.JoinHostPort(remote.Addr().Unmap().String(), port)
	}
	return address
}

// SettleHandover records where linked relays take mail of others, where that has
// changed. The leader calls it from time to time.
func (s *Service) SettleHandover(ctx context.Context) error {
	r := s.state.Read()
	if cluster := r.Cluster(); cluster == nil || cluster.FSMVersion < state.PeersVersion {
		return nil
	}
	heard := s.seenAnywhere()
	settled := 0
	for _, n := range r.Nodes() {
		seen := heard[n.ID]
		address := seen.Handover
		if address == "" && n.Handover != "" {
			address = command.HandoverNone
		}
		if !n.State.Connects() || !seen.Connected || address == n.Handover {
			continue
		}
		if settled++; settled > maxSettledAtOnce {
			return nil
		}
		body := &command.NodeHandover{Meta: &command.Meta{Actor: System.Name, Reason: "the relay says so"}, Expect: n.Revision, Node: n.ID[:], Address: address}
		if err := body.Validate(); err != nil {
			s.logger.Warn("a relay gives an address for hand-over that cannot be used", "node", n.ID.String(), "name", n.Name, "error", err)
			continue
		}
		if _, err := propose[control.Node](ctx, s, body); err != nil && !fault.Is(err, fault.Conflict) {
			return err
		}
	}
	return nil
}
