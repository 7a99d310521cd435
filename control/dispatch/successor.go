package dispatch

import (
	"time"

	"github.com/relais-mta/relais/shared/ids"
)

// Succeeds reports, at the server that leads, whether the relay's process of an
// incarnation that speaks through a server is the one that has the relay's session
// in the whole cluster. What it says of itself may then end what a former process
// held. It is false while this server does not know of all sessions, and while
// another process has one that is not known to be silent: of a copied machine the
// copy has the higher number, so the number alone proves nothing.
func (s *Server) Succeeds(node, through ids.Node, incarnation uint64) bool {
	unlock, err := s.leading()
	if err != nil {
		return false
	}
	defer unlock()
	now := time.Now()
	return s.presence.reg.complete(s.config.Peers.Servers(), now) && s.presence.reg.holds(node, through, incarnation, now)
}

// complete reports whether all sessions are known that can matter: every server has
// told all of its own in this term, or has told nothing for so long that what its
// relays held has ended.
func (r *registry) complete(servers []ids.Node, now time.Time) bool {
	if now.Sub(r.since) >= r.silence() {
		return true
	}
	for _, server := range servers {
		if _, told := r.rounds[server]; !told {
			return false
		}
	}
	return true
}

// holds reports whether the process of an incarnation has the node's session, and
// has it through the server.
func (r *registry) holds(node, through ids.Node, incarnation uint64, now time.Time) bool {
	mine, silence := r.sessions[node][through], r.silence()
	if mine == nil || mine.Incarnation != incarnation {
		return false
	}
	for _, o := range r.sessions[node] {
		if o != mine && !o.same(mine) && now.Sub(o.heard) < silence {
			return false
		}
	}
	c := r.contests[node]
	return c == nil || c.nonce == string(mine.Nonce) || now.Sub(c.heard) >= silence
}
