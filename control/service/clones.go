package service

import (
	"fmt"
	"net/netip"
	"time"

	"github.com/relais-mta/relais/shared/ids"
)

// Clone is a node that two machines claim to be: a copy of its disk is running.
type Clone struct {
	At      time.Time      // last time
	Holder  netip.AddrPort // of the machine that works as the node
	Refused netip.AddrPort // of the one that came later
	Times   int            // since this server started
}

// cloneShown is how long a claim is shown as a present problem. A refused
// machine tries again at least once a minute.
const cloneShown = 5 * time.Minute

// NodeCloned records that a second machine came with a node's key.
func (s *Service) NodeCloned(id ids.Node, c Clone) {
	s.seenMu.Lock()
	defer s.seenMu.Unlock()
	n := s.heard(id)
	if n.Clone != nil {
		c.Times = n.Clone.Times
	}
	c.Times++
	n.Clone = &c
}

// CloneProblem names the nodes that two machines claim to be now; empty: none.
func (s *Service) CloneProblem() string {
	r := s.state.Read()
	s.seenMu.Lock()
	defer s.seenMu.Unlock()
	text, more := "", 0
	for id, n := range s.seen {
		if n.Clone == nil || time.Since(n.Clone.At) > cloneShown {
			continue
		}
		if more++; more > 1 {
			continue
		}
		name := id.String()
		if row := r.Node(id); row != nil && row.Name != "" {
			name = row.Name
		}
		text = fmt.Sprintf("two machines claim to be relay %s: %s works, %s is refused; remove the identity of the copy and join it anew", name, n.Clone.Holder.Addr(), n.Clone.Refused.Addr())
	}
	if more > 1 {
		text += fmt.Sprintf(" (and %d more)", more-1)
	}
	return text
}
