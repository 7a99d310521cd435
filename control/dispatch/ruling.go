package dispatch

import (
	"context"
	"errors"
	"sync"
	"syscall"
	"time"

	"github.com/relais-mta/relais/control"
	"github.com/relais-mta/relais/shared/fault"
	"github.com/relais-mta/relais/shared/ids"
	"github.com/relais-mta/relais/shared/link"
)

// leading locks the registry of the term in which this server leads.
func (s *Server) leading() (unlock func(), err error) {
	term, leads := s.config.Peers.Term()
	if !leads {
		return nil, fault.Wrap(control.ErrNoLeader, fault.Unavailable, "dispatch.leading", "this server does not lead the cluster")
	}
	reg := &s.presence.reg
	reg.mu.Lock()
	reg.begin(term, time.Now())
	return reg.mu.Unlock, nil
}

// onSessions takes in a page of a server's report and rules on what conflicts.
func (s *Server) onSessions(ctx context.Context, from ids.Node, page sessionsReport) (sessionsAnswer, error) {
	const op = "dispatch.onSessions"
	if len(page.Claims) > maxClaimsPerPage || len(page.Clones) > maxSharedClones {
		return sessionsAnswer{}, fault.New(fault.TooLarge, op, "a page holds at most %d sessions", maxClaimsPerPage)
	}
	unlock, err := s.leading()
	if err != nil {
		return sessionsAnswer{}, err
	}
	now, reg := time.Now(), &s.presence.reg
	var conflicts []conflict
	for _, c := range page.Claims {
		if reg.count >= maxRegistered {
			break // more than a cluster can have
		}
		mine := reg.put(from, c, page.Round, now)
		// The newer of two is ruled on when its own server reports it.
		if k, found := reg.against(mine, now); found && len(conflicts) < maxProbesPerReport && (k.newer == mine || k.rule() == endOlder) {
			conflicts = append(conflicts, k)
		}
	}
	if page.Last {
		reg.settle(from, page.Round, now)
	}
	unlock()
	answer := sessionsAnswer{}
	for _, v := range s.weigh(ctx, conflicts) {
		if v != nil && !v.Unsure && v.server == from {
			answer.End = append(answer.End, v.verdict)
		}
	}
	if page.Last {
		answer.Clones = s.presence.share(from, page.Clones)
	}
	return answer, nil
}

// onClaim rules on a relay that comes to a server.
func (s *Server) onClaim(ctx context.Context, from ids.Node, c Claim) (claimAnswer, error) {
	unlock, err := s.leading()
	if err != nil {
		return claimAnswer{}, err
	}
	now, reg, silence := time.Now(), &s.presence.reg, s.silence()
	if here := reg.sessions[c.Node][from]; here != nil && now.Sub(here.heard) < silence && string(here.Nonce) != string(c.Nonce) {
		unlock()
		return claimAnswer{}, nil // the server sees both, and rules by itself
	}
	if k := reg.contests[c.Node]; k != nil && k.nonce != string(c.Nonce) && len(reg.sessions[c.Node]) == 0 && now.Sub(k.heard) < silence {
		unlock()
		return claimAnswer{Refused: &verdict{Node: c.Node, Nonce: c.Nonce, Copied: true, Holder: k.remote, HolderNonce: []byte(k.nonce), SilentMillis: now.Sub(k.heard).Milliseconds()}}, nil
	}
	var conflicts []conflict
	if reg.count < maxRegistered {
		c.AgeMillis, c.SilentMillis = 0, 0
		mine := reg.put(from, c, 0, now)
		if k, found := reg.against(mine, now); found {
			conflicts = append(conflicts, k)
		}
	}
	unlock()
	for _, v := range s.weigh(ctx, conflicts) {
		if v != nil && v.server == from {
			reg.mu.Lock()
			reg.remove(c.Node, from)
			reg.mu.Unlock()
			return claimAnswer{Refused: &v.verdict}, nil
		}
	}
	return claimAnswer{}, nil
}

// ruled is a verdict and the server whose session it is about.
type ruled struct {
	verdict
	server ids.Node
}

// weigh decides conflicts, asking the servers of older sessions where the
// processes' numbers say too little. The result has nil where nothing ends.
func (s *Server) weigh(ctx context.Context, conflicts []conflict) []*ruled {
	out := make([]*ruled, len(conflicts))
	var asking sync.WaitGroup
	for i, k := range conflicts {
		switch k.rule() {
		case endOlder:
			out[i] = &ruled{verdict{Node: k.older.Node, Nonce: k.older.Nonce}, k.older.server}
		case endNewer:
			out[i] = s.copied(k)
		case askOlder:
			asking.Go(func() { out[i] = s.askHolder(ctx, k) })
		}
	}
	asking.Wait()
	return out
}

// copied is the verdict on a copy.
func (s *Server) copied(k conflict) *ruled {
	reg := &s.presence.reg
	reg.mu.Lock()
	defer reg.mu.Unlock()
	if reg.contests != nil {
		reg.dispute(k.older)
	}
	return &ruled{verdict{Node: k.newer.Node, Nonce: k.newer.Nonce, Copied: true, Holder: k.older.Remote, HolderNonce: k.older.Nonce,
		SilentMillis: max(0, time.Since(k.older.heard).Milliseconds())}, k.newer.server}
}

// askHolder asks whether the process of the older session answers.
func (s *Server) askHolder(ctx context.Context, k conflict) *ruled {
	lives := true
	if k.older.server == s.config.Self {
		lives = s.lives(ctx, k.older.Node, k.older.Nonce)
	} else {
		var answer probeAnswer
		err := s.config.Peers.AskServer(ctx, k.older.server, requestProbe, probeRequest{k.older.Node, k.older.Nonce}, &answer)
		switch {
		case err == nil:
			lives = answer.Lives
		case errors.Is(err, syscall.ECONNREFUSED): // no process, no session
			lives = false
		default:
			return &ruled{verdict{Node: k.newer.Node, Nonce: k.newer.Nonce, Unsure: true, Holder: k.older.Remote}, k.newer.server}
		}
	}
	if lives {
		return s.copied(k)
	}
	reg := &s.presence.reg
	reg.mu.Lock()
	defer reg.mu.Unlock()
	if reg.sessions[k.older.Node][k.older.server] == k.older {
		reg.remove(k.older.Node, k.older.server)
	}
	return nil
}

// lives reports whether the process that has a session here answers. A session
// whose process does not is over: another server has its successor.
func (s *Server) lives(ctx context.Context, node ids.Node, nonce []byte) bool {
	s.mu.Lock()
	n := s.sessions[node]
	s.mu.Unlock()
	if n == nil || n.nonce != string(nonce) {
		return false
	}
	if n.answers(ctx) {
		return true
	}
	n.finish(link.CodeReplaced, elsewhereReplaced)
	return false
}
