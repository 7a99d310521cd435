package schedule

import (
	"slices"
	"sort"
	"time"

	"github.com/relais-mta/relais/shared/ids"
	"github.com/relais-mta/relais/shared/policy"
	"github.com/relais-mta/relais/shared/throttle"
)

type groupKey struct {
	pool     ids.Pool
	provider string
}

// pool is a pool with its usable sources on this relay.
type pool struct {
	sources []Source
	groups  []*group
}

// group is all lanes of one pool towards one provider, and what waits for them.
type group struct {
	key    groupKey
	limits Shape
	use    *providerUse
	lanes  []*lane
	sites  map[string]*site
	order  []*site
	cursor int
	used   time.Time // when Sweep last saw it in use
	dirty  bool
	timer  slot

	waitsForSession bool // stands in Scheduler.waiters
	waitsForRelay   bool // stands in use.waiters
}

func (g *group) slot() *slot { return &g.timer }

// lane is one source towards one provider.
type lane struct {
	key      Lane
	group    *group
	ipv6     bool
	weight   int
	credit   int // smooth weighted round robin
	sessions int // open or opening
	messages throttle.Bucket
	connects throttle.Bucket
	gone     bool // the source left the pool; sessions end at the next chance
}

// providerUse counts what all lanes of the relay do towards one provider.
type providerUse struct {
	sessions int
	messages throttle.Bucket
	connects throttle.Bucket
	waiters  fifo[*group] // held by a relay-wide connection limit
	freed    bool         // stands in Scheduler.freed
}

// site is one set of MX hosts within a group.
type site struct {
	id       string
	group    *group
	families Families
	rings    [2]ring   // transactional, all other
	run      int       // transactional picks in a row
	backlog  int       // recipients known to wait in ready queues
	since    time.Time // a recipient has waited at least since then
	open     int       // sessions that are connected
	opening  int
	idle     []*session
	backoff  map[*lane]time.Time
}

func (st *site) ring(k policy.StreamKind) *ring { return &st.rings[kindIndex(k)] }

// SetPool tells which sources of a pool this relay may use now.
func (s *Scheduler) SetPool(id ids.Pool, sources []Source) {
	p := s.poolOf(id)
	p.sources = append([]Source(nil), sources...)
	for _, g := range p.groups {
		s.setLanes(g, p.sources)
	}
}

// Pools returns the pools that have been set or asked for.
func (s *Scheduler) Pools() []ids.Pool {
	out := make([]ids.Pool, 0, len(s.pools))
	for id := range s.pools {
		out = append(out, id)
	}
	sort.Slice(out, func(i, j int) bool { return string(out[i][:]) < string(out[j][:]) })
	return out
}

func (s *Scheduler) poolOf(id ids.Pool) *pool {
	p := s.pools[id]
	if p == nil {
		p = &pool{}
		s.pools[id] = p
	}
	return p
}

// setLanes makes the group's lanes equal to the sources, keeping the counters
// of those that stay.
func (s *Scheduler) setLanes(g *group, sources []Source) {
	old := g.lanes
	g.lanes = nil
	for _, src := range sources {
		var l *lane
		for _, have := range old {
			if have.key.Source == src.ID {
				l = have
			}
		}
		if l == nil {
			l = &lane{key: Lane{Source: src.ID, Provider: g.key.provider}, group: g}
			l.messages, l.connects = bucket(g.limits.SourceMessageRate), bucket(g.limits.SourceConnectionRate)
		}
		l.weight, l.ipv6 = max(1, src.Weight), src.IPv6
		g.lanes = append(g.lanes, l)
	}
	for _, l := range old {
		l.gone = true
	}
	for _, l := range g.lanes {
		l.gone = false
	}
	s.touch(g)
}

// siteOf returns the site of a queue whose domain is routed, making group and
// site when they are new.
func (s *Scheduler) siteOf(q *queue) *site {
	route := &q.domain.route
	key := groupKey{q.key.Pool, route.Provider}
	g := s.groups[key]
	if g == nil {
		use := s.relays[route.Provider]
		if use == nil {
			use = &providerUse{messages: bucket(route.Shape.RelayMessageRate), connects: bucket(route.Shape.RelayConnectionRate)}
			s.relays[route.Provider] = use
		}
		g = &group{key: key, limits: route.Shape, use: use, sites: make(map[string]*site)}
		s.groups[key] = g
		p := s.poolOf(q.key.Pool)
		p.groups = append(p.groups, g)
		s.setLanes(g, p.sources)
	}
	st := g.sites[route.Site]
	if st == nil {
		st = &site{id: route.Site, group: g, backoff: make(map[*lane]time.Time)}
		g.sites[route.Site] = st
		g.order = append(g.order, st)
	}
	st.families = route.Families
	return st
}

// shape takes over changed limits; a bucket keeps its debt, so that a change
// of policy never grants a second burst.
func (g *group) shape(s *Scheduler, shape Shape, now time.Time) {
	if g.limits == shape {
		return
	}
	g.limits = shape
	g.use.messages.Set(rate(shape.RelayMessageRate), now)
	g.use.connects.Set(rate(shape.RelayConnectionRate), now)
	for _, l := range g.lanes {
		l.messages.Set(rate(shape.SourceMessageRate), now)
		l.connects.Set(rate(shape.SourceConnectionRate), now)
	}
	s.touch(g)
}

// rate compiles a limit. Policy validation admits only what throttle accepts;
// should a limit still not compile, the strictest rate stands in for it: a
// limit must fail closed.
func rate(r Rate) throttle.Rate {
	if r.Max <= 0 {
		return throttle.Rate{}
	}
	compiled, err := throttle.NewRate(r.Max, r.Per, max(1, r.Burst))
	if err != nil {
		compiled, _ = throttle.NewRate(1, throttle.MaxPer, 1)
	}
	return compiled
}

func bucket(r Rate) throttle.Bucket { return throttle.NewBucket(rate(r)) }

// waitFor is how long two buckets keep one event waiting.
func waitFor(a, b *throttle.Bucket, now time.Time) time.Duration {
	_, wa := a.Peek(now, 1)
	_, wb := b.Peek(now, 1)
	return max(wa, wb)
}

// full reports whether the relay as a whole may open no session now.
func (s *Scheduler) full() bool {
	return s.limits.MaxSessions > 0 && len(s.sessions) >= s.limits.MaxSessions ||
		s.limits.MaxConnectsInFlight > 0 && s.opening >= s.limits.MaxConnectsInFlight
}

func (g *group) relayFull() bool {
	return g.limits.RelayConnections > 0 && g.use.sessions >= g.limits.RelayConnections
}

// laneReady returns when a lane could take work of a site and, if that is not
// now, what holds it. A zero time with a reason means: when a session ends.
func (s *Scheduler) laneReady(l *lane, st *site, connect bool, now time.Time) (time.Time, string) {
	g := l.group
	if until := st.backoff[l]; until.After(now) {
		return until, "backoff"
	}
	if wait := waitFor(&l.messages, &g.use.messages, now); wait > 0 {
		return now.Add(wait), "rate"
	}
	if !connect {
		return now, ""
	}
	// Smallest scope first, so that a refusal names the nearest limit.
	switch {
	case g.limits.SourceConnections > 0 && l.sessions >= g.limits.SourceConnections:
		return time.Time{}, "source-connections"
	case g.relayFull():
		return time.Time{}, "relay-connections"
	case s.full():
		return time.Time{}, "sessions"
	}
	if wait := waitFor(&l.connects, &g.use.connects, now); wait > 0 {
		return now.Add(wait), "rate"
	}
	return now, ""
}

// wait arms the group's timer for the earliest of its reasons.
func (s *Scheduler) wait(g *group, until time.Time) {
	if until.IsZero() {
		return
	}
	if g.timer.index == 0 || until.Before(g.timer.at) {
		s.timers.set(g, until)
	}
}

// pump starts what a group can start now.
func (s *Scheduler) pump(g *group, now time.Time) {
	s.closeGone(g)
	n := len(g.order)
	for i := range n {
		st := g.order[(g.cursor+i)%n]
		s.pumpSite(st, now)
	}
	if n > 0 {
		g.cursor = (g.cursor + 1) % n
	}
}

// closeGone ends idle sessions of lanes that left the pool.
func (s *Scheduler) closeGone(g *group) {
	for _, st := range g.order {
		for i := len(st.idle) - 1; i >= 0; i-- {
			if ss := st.idle[i]; ss.lane.gone {
				s.unpark(ss)
				s.closeIdle(ss)
			}
		}
	}
}

func (s *Scheduler) pumpSite(st *site, now time.Time) {
	g := st.group
	for st.backlog > 0 {
		if s.useIdle(st, now) {
			continue
		}
		more, at := st.wantsSession(now)
		if !more {
			s.wait(g, at)
			return
		}
		if !s.openOne(st, now) {
			return
		}
	}
}

// useIdle gives the most recently used idle session whose lane may send a
// message; the others can then run into their idle limit.
func (s *Scheduler) useIdle(st *site, now time.Time) bool {
	for i := len(st.idle) - 1; i >= 0; i-- {
		ss := st.idle[i]
		if at, reason := s.laneReady(ss.lane, st, false, now); reason != "" {
			s.wait(st.group, at)
			continue
		}
		q := s.pick(st, ss.lane, now)
		if q == nil {
			continue
		}
		s.unpark(ss)
		ss.state = busy
		ss.reserve(now)
		st.since = now
		s.effects = append(s.effects, Effect{Kind: Dispatch, Session: ss.id, Lane: ss.lane.key, Queue: q.number})
		return true
	}
	return false
}

// wantsSession decides whether one more session is worth opening, and if not,
// when to ask again.
func (st *site) wantsSession(now time.Time) (bool, time.Time) {
	switch total := st.open + st.opening; {
	case total == 0:
		return true, time.Time{}
	case st.opening > st.open:
		// As in slow start: a host that has not answered yet is not asked for
		// ever more connections.
		return false, time.Time{}
	case st.backlog > backlogPerSession*total:
		return true, time.Time{}
	}
	if at := st.since.Add(patience); at.After(now) {
		return false, at
	}
	return true, time.Time{}
}

func (s *Scheduler) openOne(st *site, now time.Time) bool {
	g := st.group
	var l *lane
	var q *queue
	for s.tried = s.tried[:0]; q == nil; s.tried = append(s.tried, l) {
		if l = s.chooseLane(st, now); l == nil {
			s.stealIdle(st)
			return false
		}
		q = s.pick(st, l, now)
	}
	l.connects.Take(now, 1)
	g.use.connects.Take(now, 1)
	s.lastID++
	ss := &session{id: s.lastID, lane: l, site: st, state: connecting}
	ss.reserve(now)
	s.sessions[ss.id] = ss
	l.sessions++
	g.use.sessions++
	st.opening++
	s.opening++
	st.since = now
	s.effects = append(s.effects, Effect{Kind: Open, Session: ss.id, Lane: l.key, Queue: q.number, Domain: q.key.Domain})
	return true
}

// chooseLane is smooth weighted round robin among the lanes that can open a
// session to the site now.
func (s *Scheduler) chooseLane(st *site, now time.Time) *lane {
	var best *lane
	total := 0
	for _, l := range st.group.lanes {
		if slices.Contains(s.tried, l) || !s.turnOf(l, st, now) { // it may serve none of what waits
			continue
		}
		if at, reason := s.laneReady(l, st, true, now); reason != "" {
			s.wait(st.group, at)
			s.queueUp(st.group, reason)
			continue
		}
		l.credit += l.weight
		total += l.weight
		if best == nil || l.credit > best.credit {
			best = l
		}
	}
	if best != nil {
		best.credit -= total
	}
	return best
}

// queueUp remembers a group that a limit outside of it holds, so that it is
// visited when the limit has room again. Its own lanes' limits need no memory:
// the end of any of its sessions visits it.
func (s *Scheduler) queueUp(g *group, reason string) {
	switch {
	case reason == "sessions" && !g.waitsForSession:
		g.waitsForSession = true
		s.waiters.push(g)
	case reason == "relay-connections" && !g.waitsForRelay:
		g.waitsForRelay = true
		g.use.waiters.push(g)
	}
}

// serveWaiters visits the groups that waited for room in a limit, for as long
// as there is room. Each visit uses room or stops waiting, so it ends.
func (s *Scheduler) serveWaiters(now time.Time) {
	for _, use := range s.freed {
		use.freed = false
		for use.waiters.len() > 0 {
			g, _ := use.waiters.pop()
			if g.relayFull() {
				use.waiters.push(g)
				break
			}
			g.waitsForRelay = false
			s.pump(g, now)
		}
	}
	s.freed = s.freed[:0]
	for !s.full() {
		g, ok := s.waiters.pop()
		if !ok {
			return
		}
		g.waitsForSession = false
		s.pump(g, now)
	}
}

// stealIdle ends one idle session without work of the group, of the provider
// or of the relay, whichever is full, so that the site gets its turn.
func (s *Scheduler) stealIdle(st *site) {
	g := st.group
	for ss := s.idleFirst; ss != nil; ss = ss.idleNext {
		if ss.site == st || ss.site.backlog > 0 {
			continue
		}
		useful := ss.lane.group == g && g.limits.SourceConnections > 0 && ss.lane.sessions >= g.limits.SourceConnections ||
			ss.lane.group.use == g.use && g.relayFull() ||
			s.limits.MaxSessions > 0 && len(s.sessions) >= s.limits.MaxSessions
		if useful {
			s.unpark(ss)
			s.closeIdle(ss)
			return
		}
	}
}

// pick takes the next queue of a site that the lane may serve: transactional
// mail first, but never more than transactionalRun times in a row while other
// mail waits.
func (s *Scheduler) pick(st *site, l *lane, now time.Time) *queue {
	usable := func(q *queue) bool { return !q.pinned || q.only == l.key }
	first := 0
	if st.run >= transactionalRun {
		first = 1
	}
	for i := range 2 {
		kind := (first + i) % 2
		q := st.rings[kind].pick(s, usable)
		if q == nil {
			continue
		}
		s.refresh(q.domain, now)
		st.run++
		if kind == 1 {
			st.run = 0
		}
		s.setWaiting(q, q.waiting-1)
		if q.waiting <= 0 {
			// Nothing more is known to wait; SetHead brings it back.
			q.ready, q.waiting = false, 0
		}
		return q
	}
	return nil
}
