package dispatch

import (
	"context"
	"math/rand/v2"
	"net/netip"
	"time"

	"github.com/relais-mta/relais/shared/fault"
	"github.com/relais-mta/relais/shared/wire"
)

const (
	// probeTimeout is how long a linked relay has to show that it lives when
	// another process comes with its key.
	probeTimeout = time.Second
	// cloneSilence is how long the first of two machines must have been silent at
	// least before the second gets its place; see silence.
	cloneSilence = 30*time.Second + 300*time.Millisecond
)

// silence is how long the first of two machines must have been silent before the
// second gets its place: 1.01 times the life of a lease in force, so that whatever
// the first held has ended. Shorter leases do not shorten it: servers must have told
// each other of their sessions meanwhile.
func (r *registry) silence() time.Duration {
	if r.ttl == nil {
		return cloneSilence
	}
	ttl := r.ttl()
	return max(cloneSilence, ttl+ttl/100)
}

func (s *Server) silence() time.Duration { return s.presence.reg.silence() }

// contest remembers that two machines claimed to be one node.
type contest struct {
	nonce  string // of the process that has, or had, the session
	remote netip.AddrPort
	heard  time.Time // when it said something last, once its session is over
}

func (n *session) lastHeard() time.Time { return time.Unix(0, n.heard.Load()) }

// enter makes n the session of its node, or refuses it. The same process may
// open a new session at any time. A relay that was restarted may, because its
// former process cannot answer any more: the lock on its directory keeps two
// processes of one machine apart. Two that both answer are two machines with
// one key, and the newer is refused.
func (s *Server) enter(ctx context.Context, n *session) error {
	for {
		old, err := s.claim(n)
		if old == nil {
			return err
		}
		if old.answers(ctx) {
			return s.refuseClone(n, old)
		}
		s.mu.Lock()
		if s.sessions[n.node] == old {
			s.take(n)
			s.mu.Unlock()
			return nil
		}
		s.mu.Unlock() // others moved meanwhile: look again
	}
}

// claim takes the node's place if that can be decided at once. It returns the
// session that has to be asked whether it lives.
func (s *Server) claim(n *session) (old *session, err error) {
	silence := s.silence()
	s.mu.Lock()
	old = s.sessions[n.node]
	c := s.contests[n.node]
	if c != nil && old == nil {
		if c.nonce != n.nonce && time.Since(c.heard) < silence {
			s.mu.Unlock()
			return nil, s.clone(n, c.remote)
		}
		delete(s.contests, n.node)
	}
	switch {
	case old == nil, old.nonce == n.nonce && n.nonce != "", time.Since(old.lastHeard()) >= silence:
		s.take(n)
		s.mu.Unlock()
		return nil, nil
	case n.nonce == "" || old.nonce == "":
		defer s.mu.Unlock()
		if old.hello.Incarnation > n.hello.Incarnation {
			return nil, fault.New(fault.Conflict, "dispatch.enter", "a newer process of %s is linked: stop this one", n.node)
		}
		s.take(n)
		return nil, nil
	}
	s.mu.Unlock()
	// A start counts one up, durably: a process that does not come with a higher
	// number is not the successor of the one that is linked.
	if c != nil || n.hello.Incarnation <= old.hello.Incarnation {
		return nil, s.refuseClone(n, old)
	}
	return old, nil
}

// take makes n the session of its node. The caller holds mu.
func (s *Server) take(n *session) {
	if old := s.sessions[n.node]; old != nil {
		close(old.replaced)
	}
	if c := s.contests[n.node]; c != nil && c.nonce != n.nonce {
		delete(s.contests, n.node)
	}
	s.sessions[n.node] = n
	s.config.Nodes.NodeConnected(n.node, n.hello) // under the lock: in order with NodeGone
	s.presence.move()
}

// refuseClone refuses n because of a session that lives.
func (s *Server) refuseClone(n, holder *session) error {
	s.mu.Lock()
	s.contests[n.node] = &contest{nonce: holder.nonce, remote: holder.hello.Remote, heard: holder.lastHeard()}
	s.mu.Unlock()
	return s.clone(n, holder.hello.Remote)
}

func (s *Server) clone(n *session, holder netip.AddrPort) error {
	found := Clone{At: time.Now(), Holder: holder, Refused: n.hello.Remote}
	s.config.Nodes.NodeCloned(n.node, found)
	s.presence.noteClone(n.node, found)
	s.presence.move()
	n.log.Error("two machines have the key of one relay: the one that came later is refused", "holder", holder.String(), "incarnation", n.hello.Incarnation)
	return fault.New(fault.Conflict, "dispatch.enter",
		"another machine is linked as %s from %s: this one looks like a copy of it; remove its identity directory and join it as a relay of its own, or stop the other for %s",
		n.node, holder.Addr(), s.silence().Round(time.Second))
}

// answers asks the relay of a session whether it lives.
func (n *session) answers(ctx context.Context) bool {
	if !n.probes {
		return false
	}
	n.probing.Lock() // two who ask at once would take each other's answers
	defer n.probing.Unlock()
	nonce := rand.Uint64()
	go func() { _ = n.send(&wire.Probe{Nonce: nonce}) }() // a session that cannot send does not answer either
	timeout := time.NewTimer(probeTimeout)
	defer timeout.Stop()
	for {
		select {
		case got := <-n.replies:
			if got == nonce {
				return true
			}
		case <-timeout.C:
			return false
		case <-n.link.Done():
			return false
		case <-ctx.Done():
			return true // the newcomer went away, the old session has done nothing wrong
		}
	}
}
