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
	Times   int            // since the server that refused it started
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

// ClonesElsewhere records the copied machines that any server refused lately, so
// that each server's health and lists show them.
func (s *Service) ClonesElsewhere(clones map[ids.Node]Clone) {
	s.seenMu.Lock()
	defer s.seenMu.Unlock()
	for id, c := range clones {
		n := s.heard(id)
		if n.Clone != nil {
			if !c.At.After(n.Clone.At) {
				continue
			}
			c.Times = n.Clone.Times
		}
		c.Times = max(1, c.Times)
		n.Clone = &c
	}
}

// moreCloned returns of two servers' words on one node the one that says more.
func moreCloned(a, b *Clone) *Clone {
	if a == nil || b != nil && (b.Times > a.Times || b.Times == a.Times && b.At.After(a.At)) {
		return b
	}
	return a
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
