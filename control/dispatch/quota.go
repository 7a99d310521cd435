package dispatch

import (
	"context"

	"github.com/relais-mta/relais/shared/ids"
	"github.com/relais-mta/relais/shared/wire"
)

// maxQuotaWaiting is how many messages about what relays share may wait for one
// relay; the oldest make room for new ones.
const maxQuotaWaiting = 64

// SendQuota hands a message of the leader to a relay that is linked to this
// server. It does not block. It is false if the relay is not linked here, or
// does not know such messages.
func (s *Server) SendQuota(node ids.Node, down *wire.QuotaDown) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	n := s.sessions[node]
	if n == nil || !n.quota {
		return false
	}
	for {
		select {
		case n.downs <- down:
			return true
		default:
		}
		select {
		case <-n.downs:
		default:
		}
	}
}

// sendQuota sends what SendQuota left, until ctx ends.
func (n *session) sendQuota(ctx context.Context) error {
	for {
		select {
		case down := <-n.downs:
			if err := n.send(down); err != nil {
				return err
			}
		case <-ctx.Done():
			return nil
		}
	}
}

// capabilities are what this server announces to relays.
func (s *Server) capabilities() uint64 {
	if s.config.Quota == nil {
		return wire.CapabilityProbe
	}
	return wire.CapabilityProbe | wire.CapabilityQuota
}
