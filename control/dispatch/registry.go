package dispatch

import (
	"bytes"
	"net/netip"
	"sync"
	"time"

	"github.com/relais-mta/relais/shared/ids"
)

const (
	maxRegistered      = 1 << 15 // sessions that the leader remembers, all servers
	maxContests        = 1 << 12 // nodes that two machines claim, remembered by the leader
	maxProbesPerReport = 16      // conflicts that one report settles; the next settles more
	beganSlack         = time.Second
	claimGrace         = presenceTimeout // for a session that was claimed to be in its server's report
)

// Claim is one live session, as its server tells the leader. Times are told as
// durations, so that no server's clock matters.
type Claim struct {
	Node         ids.Node       `json:"node"`
	Nonce        []byte         `json:"nonce,omitempty"` // of the relay's process; empty: an old relay
	Incarnation  uint64         `json:"incarnation"`
	Remote       netip.AddrPort `json:"remote"`
	AgeMillis    int64          `json:"age_ms"`    // of the session
	SilentMillis int64          `json:"silent_ms"` // since the relay said something
}

// standing is a session that the leader knows of.
type standing struct {
	Claim
	server ids.Node
	began  time.Time // on this server's monotonic clock, as the next
	heard  time.Time
	round  uint64 // of its server's reports; 0: claimed, in no report yet
}

func (s *standing) same(o *standing) bool { return bytes.Equal(s.Nonce, o.Nonce) && len(s.Nonce) > 0 }

// registry is what the leader knows of all servers' sessions. It is memory: a
// new leader has it again once every server has reported. Its methods take the
// time, and decide nothing that needs an answer from elsewhere.
type registry struct {
	ttl func() time.Duration // of leases in force; nil: as by default

	mu       sync.Mutex
	term     uint64    // in which it was filled
	since    time.Time // when that began here
	sessions map[ids.Node]map[ids.Node]*standing
	count    int
	rounds   map[ids.Node]uint64 // the last whole report of each server
	contests map[ids.Node]*contest
}

// conflict is a session that stands in the way of another one of its node.
type conflict struct {
	newer, older *standing
	contested    bool // a copy was refused because of the older one before
}

// begin empties the registry when another term begins.
func (r *registry) begin(term uint64, now time.Time) {
	if r.sessions == nil || r.term != term {
		r.term, r.count, r.since = term, 0, now
		r.sessions = make(map[ids.Node]map[ids.Node]*standing)
		r.rounds = make(map[ids.Node]uint64)
		r.contests = make(map[ids.Node]*contest)
	}
}

// put takes in one session of a server.
func (r *registry) put(from ids.Node, c Claim, round uint64, now time.Time) *standing {
	s := &standing{Claim: c, server: from, round: round,
		began: now.Add(-time.Duration(c.AgeMillis) * time.Millisecond), heard: now.Add(-time.Duration(c.SilentMillis) * time.Millisecond)}
	if r.sessions[c.Node] == nil {
		r.sessions[c.Node] = make(map[ids.Node]*standing)
	}
	switch old := r.sessions[c.Node][from]; {
	case old == nil:
		r.count++
	case old.same(s) && old.began.Sub(s.began).Abs() < beganSlack:
		s.began = old.began // so that the order of two sessions does not change with the network
	}
	r.sessions[c.Node][from] = s
	if k := r.contests[c.Node]; k != nil && k.nonce == string(c.Nonce) {
		k.heard = s.heard
	}
	return s
}

func (r *registry) remove(node, from ids.Node) {
	if r.sessions[node][from] == nil {
		return
	}
	delete(r.sessions[node], from)
	r.count--
	if len(r.sessions[node]) == 0 {
		delete(r.sessions, node)
	}
}

// settle ends a server's round of reports: what it did not name is gone, unless
// it was claimed a moment ago, maybe after the report was begun. So is what no
// server named for so long that its relay counts as silent.
func (r *registry) settle(from ids.Node, round uint64, now time.Time) {
	r.rounds[from] = round
	silence := r.silence()
	for node, at := range r.sessions {
		for server, s := range at {
			claimed := s.round == 0 && now.Sub(s.began) < claimGrace
			if server == from && s.round != round && !claimed || now.Sub(s.heard) >= silence {
				r.remove(node, server)
			}
		}
	}
	for node, c := range r.contests {
		if now.Sub(c.heard) >= silence {
			delete(r.contests, node)
		}
	}
}

// against returns the session, of another server, that s has to be weighed
// with: the oldest that lives. Two sessions that began in the same moment go by
// their process numbers, so that everybody decides alike.
func (r *registry) against(s *standing, now time.Time) (c conflict, found bool) {
	silence := r.silence()
	for server, o := range r.sessions[s.Node] {
		if server == s.server || now.Sub(o.heard) >= silence {
			continue
		}
		if !found || before(o, c.older) {
			c, found = conflict{newer: s, older: o}, true
		}
	}
	if found && before(s, c.older) {
		c.newer, c.older = c.older, s
	}
	if found {
		k := r.contests[s.Node]
		c.contested = k != nil && k.nonce == string(c.older.Nonce)
	}
	return c, found
}

func before(a, b *standing) bool {
	if !a.began.Equal(b.began) {
		return a.began.Before(b.began)
	}
	return bytes.Compare(a.Nonce, b.Nonce) < 0
}

// ruling is what can be said of a conflict without asking.
type ruling int

const (
	endOlder ruling = iota // its process opened the newer one
	endNewer               // it is of a copy, or of a process that is over
	askOlder               // whether its process lives
)

// rule decides what the numbers of the processes decide. A start counts one up,
// durably: a process that does not come with a higher number is not the
// successor of the one that is linked. Where there is a copy, a higher number
// and silence prove nothing before a lease has run out.
func (c conflict) rule() ruling {
	switch {
	case c.newer.same(c.older):
		return endOlder
	case len(c.newer.Nonce) == 0 || len(c.older.Nonce) == 0:
		if c.older.Incarnation > c.newer.Incarnation {
			return endNewer
		}
		return endOlder
	case c.contested, c.newer.Incarnation <= c.older.Incarnation:
		return endNewer
	}
	return askOlder
}

// dispute remembers who keeps a node's place.
func (r *registry) dispute(holder *standing) {
	if len(r.contests) < maxContests || r.contests[holder.Node] != nil {
		r.contests[holder.Node] = &contest{nonce: string(holder.Nonce), remote: holder.Remote, heard: holder.heard}
	}
}
