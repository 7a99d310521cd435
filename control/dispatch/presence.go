package dispatch

import (
	"context"
	"encoding/json"
	"math/rand/v2"
	"net/netip"
	"sync"
	"time"

	"github.com/relais-mta/relais/shared/fault"
	"github.com/relais-mta/relais/shared/ids"
	"github.com/relais-mta/relais/shared/link"
)

// Requests of one server to another about sessions. None of them is replicated:
// who is linked is a fact of the moment, and the leader has it again one period
// after it began to lead.
const (
	requestClaim    = "link-claim"    // to the leader: may this relay be linked here?
	requestSessions = "link-sessions" // to the leader: these relays are linked here
	requestProbe    = "link-probe"    // to a server: does this relay's process answer?
)

const (
	presencePeriod    = 2 * time.Second
	presenceSpacing   = 250 * time.Millisecond // between two reports, however much moves
	presenceTimeout   = 5 * time.Second        // for one page of a report
	claimTimeout      = 2 * time.Second        // for the leader's word on a newcomer
	leaderPause       = 3 * time.Second        // without asking a leader that did not answer
	maxClaimsAtOnce   = 8
	maxClaimsPerPage  = 1000 // of about 250 bytes
	maxSharedClones   = 64
	cloneMemory       = 5 * time.Minute
	elsewhereReplaced = "the relay opened a session with another server"
)

// Peers is how dispatch speaks with the other servers.
type Peers interface {
	// Term returns the term in which this server leads and is up to date.
	Term() (term uint64, leads bool)
	// Servers returns all servers of the cluster, this one too.
	Servers() []ids.Node
	// AskLeader asks the leader, which is another server.
	AskLeader(ctx context.Context, what string, in, out any) error
	// AskServer asks a server by its id.
	AskServer(ctx context.Context, server ids.Node, what string, in, out any) error
}

// sessionsReport is one page of a server's live sessions.
type sessionsReport struct {
	Round  uint64        `json:"round"` // equal on all pages of one report
	Last   bool          `json:"last"`
	Claims []Claim       `json:"claims,omitempty"`
	Clones []sharedClone `json:"clones,omitempty"` // of the last page
}

// sessionsAnswer is what the leader answers.
type sessionsAnswer struct {
	End    []verdict     `json:"end,omitempty"`
	Clones []sharedClone `json:"clones,omitempty"` // that any server refused lately
}

// verdict ends or refuses a session.
type verdict struct {
	Node   ids.Node       `json:"node"`
	Nonce  []byte         `json:"nonce,omitempty"`
	Copied bool           `json:"copied,omitempty"` // its machine is a copy of the holder's
	Unsure bool           `json:"unsure,omitempty"` // the holder's server cannot be asked now
	Holder netip.AddrPort `json:"holder"`

	HolderNonce  []byte `json:"holder_nonce,omitempty"`
	SilentMillis int64  `json:"silent_ms"` // of the holder
}

type claimAnswer struct {
	Refused *verdict `json:"refused,omitempty"`
}

type probeRequest struct {
	Node  ids.Node `json:"node"`
	Nonce []byte   `json:"nonce"`
}

type probeAnswer struct {
	Lives bool `json:"lives"`
}

// sharedClone tells the other servers that a copied machine was refused.
type sharedClone struct {
	Node      ids.Node       `json:"node"`
	AgoMillis int64          `json:"ago_ms"`
	Holder    netip.AddrPort `json:"holder"`
	Refused   netip.AddrPort `json:"refused"`
}

// presence is this server's part in knowing all servers' sessions.
type presence struct {
	moved  chan struct{} // gets a token when a session came or went
	claims chan struct{} // one token for each claim that waits for the leader
	round  uint64

	mu      sync.Mutex
	silent  time.Time // until when the leader is not asked
	clones  map[ids.Node]Clone
	reg     registry
	learned map[ids.Node]learnedClones // by server; of the leader
}

// learnedClones is what a server told the leader of copied machines.
type learnedClones struct {
	at     time.Time
	clones []sharedClone
}

func newPresence(ttl func() time.Duration) *presence {
	return &presence{reg: registry{ttl: ttl}, moved: make(chan struct{}, 1), claims: make(chan struct{}, maxClaimsAtOnce), round: rand.Uint64(), clones: make(map[ids.Node]Clone), learned: make(map[ids.Node]learnedClones)}
}

// move asks for a report soon.
func (p *presence) move() {
	select {
	case p.moved <- struct{}{}:
	default:
	}
}

// Run tells the leader who is linked here, until ctx ends: when that changes,
// and at each period.
func (s *Server) Run(ctx context.Context) {
	if s.config.Peers == nil {
		<-ctx.Done()
		return
	}
	tick := time.NewTicker(presencePeriod)
	defer tick.Stop()
	for {
		if err := s.tellSessions(ctx); err != nil && ctx.Err() == nil {
			s.config.Logger.Debug("the leader was not told who is linked here", "error", err)
		}
		if pause(ctx, presenceSpacing) != nil {
			return
		}
		select {
		case <-tick.C:
		case <-s.presence.moved:
		case <-ctx.Done():
			return
		}
	}
}

// tellSessions sends one report and does what the leader answers.
func (s *Server) tellSessions(ctx context.Context) error {
	claims := s.claimsHere(time.Now())
	s.presence.round++
	for {
		page := sessionsReport{Round: s.presence.round, Claims: claims[:min(len(claims), maxClaimsPerPage)]}
		claims = claims[len(page.Claims):]
		if page.Last = len(claims) == 0; page.Last {
			page.Clones = s.presence.ownClones(time.Now())
		}
		answer, err := s.tell(ctx, page)
		if err != nil {
			return err
		}
		for _, v := range answer.End {
			s.end(v)
		}
		if page.Last {
			s.config.Nodes.ClonesElsewhere(clonesOf(answer.Clones, time.Now()))
			return nil
		}
	}
}

// claimsHere returns the sessions of this server.
func (s *Server) claimsHere(now time.Time) []Claim {
	s.mu.Lock()
	defer s.mu.Unlock()
	out := make([]Claim, 0, len(s.sessions))
	for _, n := range s.sessions {
		out = append(out, n.claim(now))
	}
	return out
}

func (n *session) claim(now time.Time) Claim {
	return Claim{Node: n.node, Nonce: []byte(n.nonce), Incarnation: n.hello.Incarnation, Remote: n.hello.Remote,
		AgeMillis: now.Sub(n.began).Milliseconds(), SilentMillis: max(0, now.Sub(n.lastHeard()).Milliseconds())}
}

func (s *Server) tell(ctx context.Context, page sessionsReport) (sessionsAnswer, error) {
	ctx, cancel := context.WithTimeout(ctx, presenceTimeout)
	defer cancel()
	if _, leads := s.config.Peers.Term(); leads {
		return s.onSessions(ctx, s.config.Self, page)
	}
	var answer sessionsAnswer
	return answer, s.config.Peers.AskLeader(ctx, requestSessions, page, &answer)
}

// end ends a session that the leader ruled against, if it is still there.
func (s *Server) end(v verdict) {
	s.mu.Lock()
	n := s.sessions[v.Node]
	s.mu.Unlock()
	if n == nil || n.nonce != string(v.Nonce) {
		return
	}
	text := elsewhereReplaced
	if v.Copied {
		text = fault.Public(s.refuseFor(n, v))
	}
	n.finish(link.CodeReplaced, text)
}

// refuseFor remembers a copied machine and returns what it is told.
func (s *Server) refuseFor(n *session, v verdict) error {
	s.mu.Lock()
	s.contests[v.Node] = &contest{nonce: string(v.HolderNonce), remote: v.Holder, heard: time.Now().Add(-time.Duration(v.SilentMillis) * time.Millisecond)}
	s.mu.Unlock()
	return s.clone(n, v.Holder)
}

// admit asks the leader whether n may be linked here. Without a leader that
// answers it may: relays do not depend on the servers' agreement, and the next
// report finds what was missed.
func (s *Server) admit(ctx context.Context, n *session) error {
	if s.config.Peers == nil || !s.presence.asks(time.Now()) {
		return nil
	}
	answer, err := s.askClaim(ctx, n.claim(time.Now()))
	if err != nil {
		s.presence.leaderSilent(time.Now())
		n.log.Debug("the leader was not asked about a relay", "error", err)
		return nil
	}
	v := answer.Refused
	switch {
	case v == nil:
		return nil
	case v.Copied:
		return s.refuseFor(n, *v)
	}
	return fault.New(fault.Unavailable, "dispatch.admit", "%s may be linked to a server that cannot be asked now: try again in a few seconds", n.node)
}

func (s *Server) askClaim(ctx context.Context, c Claim) (answer claimAnswer, err error) {
	ctx, cancel := context.WithTimeout(ctx, claimTimeout)
	defer cancel()
	select {
	case s.presence.claims <- struct{}{}:
		defer func() { <-s.presence.claims }()
	case <-ctx.Done():
		return answer, ctx.Err()
	}
	if _, leads := s.config.Peers.Term(); leads {
		return s.onClaim(ctx, s.config.Self, c)
	}
	return answer, s.config.Peers.AskLeader(ctx, requestClaim, c, &answer)
}

func (p *presence) asks(now time.Time) bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	return now.After(p.silent)
}

func (p *presence) leaderSilent(now time.Time) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.silent = now.Add(leaderPause)
}

// Request is a PeerHandler in the words of control/cluster.
type Request func(ctx context.Context, from ids.Node, body []byte) (any, error)

// Requests are what this server answers to others.
func (s *Server) Requests() map[string]Request {
	return map[string]Request{
		requestClaim:    decoded(s.onClaim),
		requestSessions: decoded(s.onSessions),
		requestProbe: decoded(func(ctx context.Context, _ ids.Node, p probeRequest) (probeAnswer, error) {
			return probeAnswer{Lives: s.lives(ctx, p.Node, p.Nonce)}, nil
		}),
	}
}

// RequestNames are the names of all Requests.
func RequestNames() []string { return []string{requestClaim, requestSessions, requestProbe} }

func decoded[In, Out any](fn func(context.Context, ids.Node, In) (Out, error)) Request {
	return func(ctx context.Context, from ids.Node, body []byte) (any, error) {
		var in In
		if err := json.Unmarshal(body, &in); err != nil {
			return nil, fault.Wrap(err, fault.Invalid, "dispatch.Requests", "the request cannot be read")
		}
		return fn(ctx, from, in)
	}
}

// noteClone remembers a copied machine for the other servers.
func (p *presence) noteClone(node ids.Node, c Clone) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if _, known := p.clones[node]; known || len(p.clones) < maxSharedClones {
		p.clones[node] = c
	}
}

// ownClones returns the copied machines that this server refused lately.
func (p *presence) ownClones(now time.Time) (out []sharedClone) {
	p.mu.Lock()
	defer p.mu.Unlock()
	for node, c := range p.clones {
		if now.Sub(c.At) > cloneMemory {
			delete(p.clones, node)
			continue
		}
		out = append(out, sharedClone{Node: node, AgoMillis: now.Sub(c.At).Milliseconds(), Holder: c.Holder, Refused: c.Refused})
	}
	return out
}

// share remembers what a server refused and returns what all refused.
func (p *presence) share(from ids.Node, clones []sharedClone) []sharedClone {
	p.mu.Lock()
	defer p.mu.Unlock()
	now, silence := time.Now(), p.reg.silence()
	p.learned[from] = learnedClones{now, clones}
	var all []sharedClone
	for server, some := range p.learned {
		if len(some.clones) == 0 || now.Sub(some.at) >= silence {
			delete(p.learned, server) // nothing, or a server that is gone
			continue
		}
		all = append(all, some.clones...)
	}
	return all[:min(len(all), maxSharedClones)]
}

func clonesOf(shared []sharedClone, now time.Time) map[ids.Node]Clone {
	out := make(map[ids.Node]Clone, min(len(shared), maxSharedClones))
	for _, c := range shared[:min(len(shared), maxSharedClones)] {
		at := now.Add(-time.Duration(c.AgoMillis) * time.Millisecond)
		if at.After(out[c.Node].At) {
			out[c.Node] = Clone{At: at, Holder: c.Holder, Refused: c.Refused}
		}
	}
	return out
}
