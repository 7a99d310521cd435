// Package schedule decides which work a relay does next. It is pure: it takes
// what changed and the time, and returns what to do; the engine does it.
//
// Work waits in queues (tenant, stream, pool, domain). A queue's domain has a
// route: a provider and a site, which is the exact set of MX hosts and so what
// one SMTP session can serve. A pool's sources times a provider are lanes, the
// unit of shaping; all lanes of one pool and one provider form a group, and
// every queue belongs to exactly one group at a time. A session belongs to one
// lane and one site.
//
// A session that finished a transaction asks NextFor; everything else happens
// in Next, which visits only the groups that something happened to. Nothing is
// polled: every reason to wait has a time, and Wake returns the earliest.
package schedule

import (
	"time"

	"github.com/relais-mta/relais/shared/ids"
	"github.com/relais-mta/relais/shared/mailaddr"
	"github.com/relais-mta/relais/shared/policy"
)

// Queue is the number of a work queue.
type Queue uint32

// Session is the number of an outbound session, given by the scheduler.
type Session uint64

// Key says what a queue holds.
type Key struct {
	Tenant ids.Tenant
	Stream string
	Kind   policy.StreamKind
	Pool   ids.Pool
	Domain mailaddr.Domain

	Priority policy.Priority // of its mail within the stream
}

// Lane is source × provider.
type Lane struct {
	Source   ids.Source
	Provider string
}

// Limits bounds the whole relay; zero means no limit. Parts are in percent of
// MaxSessions and of MaxConnectsInFlight, and zero means all of it.
type Limits struct {
	MaxSessions         int
	MaxConnectsInFlight int
	MaxResolvesInFlight int
	ProviderShare       int // the part that one provider may have
	UnprovenShare       int // the part of all hosts that have not taken mail lately

	// TransactionalReserve is the part of every lane's turns, in percent, that
	// transactional mail has before all other mail while it waits: 0 to 90.
	TransactionalReserve int
}

// Shape is what a provider allows; zero means no limit.
type Shape struct {
	SourceConnections     int
	RelayConnections      int
	MessagesPerConnection int
	SourceMessageRate     Rate
	RelayMessageRate      Rate
	SourceConnectionRate  Rate
	RelayConnectionRate   Rate
}

// Rate is a number of events per time span with a burst; Max 0 is no limit.
type Rate struct {
	Max   int
	Per   time.Duration
	Burst int
}

// Route is where mail for a domain goes.
type Route struct {
	Provider string
	Site     string // equal for equal sets of MX hosts
	Shape    Shape
	Families Families
	Expires  time.Time // look it up again after this; it stays in use meanwhile
}

// Source is a source of a pool with its share of new work.
type Source struct {
	ID     ids.Source
	Weight int // 1 or more
	IPv6   bool
}

// EffectKind says what to do.
type EffectKind uint8

// The effects.
const (
	Resolve  EffectKind = iota + 1 // look up Domain, then call Routed, Unroutable or Undeliverable
	Open                           // open Session on Lane for Queue, with its first message in hand
	Dispatch                       // give the idle Session a message of Queue
	Close                          // end the idle Session
	Refuse                         // Queue's domain cannot be mailed: fail what is due
)

// Effect is one thing to do.
type Effect struct {
	Kind    EffectKind
	Domain  mailaddr.Domain
	Session Session
	Lane    Lane
	Queue   Queue
}

// Scheduler holds the state. It is not safe for concurrent use.
type Scheduler struct {
	limits   Limits
	queues   map[Queue]*queue
	domains  map[mailaddr.Domain]*domain
	pools    map[ids.Pool]*pool
	groups   map[groupKey]*group
	sessions map[Session]*session
	relays   map[string]*providerUse // relay-scoped counters by provider

	due        timerHeap[*queue]
	timers     timerHeap[*lane]
	siteTimers timerHeap[*site]
	useTimers  timerHeap[*providerUse]
	retries    timerHeap[*domain]
	dirty      []*group
	visiting   []*group
	unrouted   waitlist[*domain] // want a look-up, in order of arrival
	refused    []*queue
	effects    []Effect
	waiters    waitlist[*group] // held by the relay's own limits
	trials     waitlist[*site]  // unproven hosts that wait for room for such
	freed      []*providerUse
	gates      gateTable
	spare      chain
	goneIdle   []Session // to be closed, their lane left the pool
	tried      []*lane   // scratch of tryOpen
	shares     func(ids.Tenant, string, policy.StreamKind) Share

	lastID        Session
	opening       int
	resolving     int
	closing       int // idle sessions that make way
	trialSessions int
	trialOpening  int
}

// New returns an empty scheduler.
func New(limits Limits) *Scheduler {
	return &Scheduler{
		limits:   limits,
		queues:   make(map[Queue]*queue),
		domains:  make(map[mailaddr.Domain]*domain),
		pools:    make(map[ids.Pool]*pool),
		groups:   make(map[groupKey]*group),
		sessions: make(map[Session]*session),
		relays:   make(map[string]*providerUse),
	}
}

// SetLimits changes the relay's bounds; sessions above them end by themselves.
func (s *Scheduler) SetLimits(limits Limits) {
	s.limits = limits
	// In the order of pools and of their groups, so that the same inputs give
	// the same decisions.
	for _, id := range s.Pools() {
		for _, g := range s.pools[id].groups {
			g.classes.setReserve(limits.TransactionalReserve)
			s.revise(g)
		}
	}
}

// Wake returns the time of the next thing to do by itself, or the zero time.
func (s *Scheduler) Wake() time.Time {
	wake := s.due.next()
	for _, t := range [...]time.Time{s.timers.next(), s.siteTimers.next(), s.useTimers.next(), s.retries.next(), s.gates.timers.next()} {
		if !t.IsZero() && (wake.IsZero() || t.Before(wake)) {
			wake = t
		}
	}
	return wake
}

// Next returns what to do now. The slice is valid until the next call.
func (s *Scheduler) Next(now time.Time) []Effect {
	s.effects = s.effects[:0]
	s.popTimers(now)
	s.resolveSome()
	for _, q := range s.refused {
		q.refusing = false
		if q.ready {
			s.effects = append(s.effects, Effect{Kind: Refuse, Queue: q.number})
		}
	}
	s.refused = s.refused[:0]
	for _, id := range s.goneIdle {
		s.effects = append(s.effects, Effect{Kind: Close, Session: id})
	}
	s.goneIdle = s.goneIdle[:0]
	// Only groups that something happened to since the last call are visited.
	for len(s.dirty) > 0 || len(s.freed) > 0 || len(s.gates.freed) > 0 {
		s.dirty, s.visiting = s.visiting[:0], s.dirty
		for _, g := range s.visiting {
			g.dirty = false
			s.pump(g, now)
		}
		clear(s.visiting)
		s.serveGates(now)
		s.serveWaiters(now)
	}
	s.serveWaiters(now)
	return s.effects
}

// popTimers notes what is due.
func (s *Scheduler) popTimers(now time.Time) {
	for q, ok := s.due.popDue(now); ok; q, ok = s.due.popDue(now) {
		s.activate(q, now)
	}
	for d, ok := s.retries.popDue(now); ok; d, ok = s.retries.popDue(now) {
		s.wantRoute(d)
	}
	for l, ok := s.timers.popDue(now); ok; l, ok = s.timers.popDue(now) {
		s.freeLane(l)
	}
	for st, ok := s.siteTimers.popDue(now); ok; st, ok = s.siteTimers.popDue(now) {
		s.unaside(st)
		s.touchSite(st)
	}
	for u, ok := s.useTimers.popDue(now); ok; u, ok = s.useTimers.popDue(now) {
		s.free(u)
	}
	for gt, ok := s.gates.timers.popDue(now); ok; gt, ok = s.gates.timers.popDue(now) {
		s.freeGate(gt)
	}
}

// hurriedShare is the part of look-ups in flight, in percent, that is kept for
// domains with transactional mail: the servers of the others may be slow.
const hurriedShare = 25

func (s *Scheduler) resolveSome() {
	most := max(1, s.limits.MaxResolvesInFlight)
	for s.unrouted.len() > 0 && s.resolving < most {
		if s.unrouted.count[1] == 0 && s.resolving >= max(1, most-most*hurriedShare/percent) {
			return
		}
		d, ok := s.unrouted.pop()
		if !ok {
			return
		}
		d.resolving = true
		s.resolving++
		s.effects = append(s.effects, Effect{Kind: Resolve, Domain: d.name})
	}
}

func (s *Scheduler) touch(g *group) {
	if !g.dirty {
		g.dirty = true
		s.dirty = append(s.dirty, g)
	}
}

func (s *Scheduler) touchSite(st *site) {
	if !st.touched {
		st.touched = true
		st.group.touched = append(st.group.touched, st)
		s.touch(st.group)
	}
}
