package schedule

import (
	"slices"
	"time"
)

// Timing of the decision to open one more session for a site that has some.
const (
	// backlogPerSession is how many waiting recipients one busy session is
	// trusted to take soon.
	backlogPerSession = 4
	// patience is how long work waits for a busy session before another is
	// opened for it.
	patience = 500 * time.Millisecond
	// proofAge is how long the messages that a host took speak for more
	// sessions to it.
	proofAge = time.Minute
)

// pump starts what a group can start now.
func (s *Scheduler) pump(g *group, now time.Time) {
	for i := 0; i < len(g.touched); i++ {
		st := g.touched[i]
		st.touched = false
		s.evaluate(st, now)
	}
	clear(g.touched)
	g.touched = g.touched[:0]
	s.serve(g, now)
}

func (s *Scheduler) serve(g *group, now time.Time) {
	s.serveIdle(g, now)
	s.serveOpen(g, now)
}

// evaluate finds out in which contests a site takes part: its idle sessions in
// those of their lanes, and the site in that for one more session.
func (s *Scheduler) evaluate(st *site, now time.Time) {
	g := st.group
	served := false
	for _, p := range st.posts {
		if s.evaluatePost(st, p, now) {
			served = true
		}
	}
	want := false
	switch {
	case st.backlog == 0:
		s.siteTimers.remove(st)
		s.unaside(st)
	case st.aside || st.trial != nowhere || st.gateWait != nil:
	case !served || g.otherLanes() || st.pinnedApart(now):
		var at time.Time
		if want, at = st.wantsSession(now); !want && !at.IsZero() && (st.timer.index == 0 || at.Before(st.timer.at)) {
			s.siteTimers.set(st, at)
		}
	}
	st.seat.evaluated(want)
}

func (f *strand) stream() *flow {
	if f == nil {
		return nil
	}
	return f.flow
}

// evaluatePost enters a site's idle sessions of a lane for what they can carry,
// if there is anything.
func (s *Scheduler) evaluatePost(st *site, p *post, now time.Time) (served bool) {
	served = st.backlog > 0 && len(p.idle) > 0 && !p.lane.gone && st.best(general, p.lane) != nil && !s.barred(st, p.lane, now)
	p.seat.evaluated(served)
	if served {
		s.activateLane(p.lane)
	}
	s.noteSpare(st.group, p)
	return served
}

// pinnedApart reports whether work waits for a lane that has no session to the
// site.
func (st *site) pinnedApart(now time.Time) bool {
	if st.pinned == 0 {
		return false
	}
	for i := range st.orders[general].items {
		p := st.orders[general].items[i].place
		for _, f := range p.turn.strands {
			if f.head != nil && f.pinned && !st.hasSession(f.only) && !st.shutTo(f.only, now) {
				return true
			}
		}
	}
	return false
}

func (st *site) hasSession(lane Lane) bool {
	for _, p := range st.posts {
		if p.lane.key == lane && p.sessions > 0 {
			return true
		}
	}
	return false
}

// wantsSession decides whether one more session is worth opening, and if not,
// when to ask again.
func (st *site) wantsSession(now time.Time) (bool, time.Time) {
	total := st.open + st.opening
	switch {
	case total == 0 || st.pinnedApart(now) || st.barredApart(now):
		return true, time.Time{}
	case st.opening > st.open || total >= st.room(now):
		// As in slow start: a host that has not answered yet, or takes long for
		// a message, is not asked for ever more connections. But another host
		// of the site may be quicker.
		at := st.since.Add(prompt)
		return !at.After(now), at
	case st.backlog > backlogPerSession*total:
		return true, time.Time{}
	}
	if at := st.since.Add(patience); at.After(now) {
		return false, at
	}
	return true, time.Time{}
}

// room is how many sessions the host deserves: by each message that it took one
// more, up to twice as many as it had then.
func (st *site) room(now time.Time) int {
	if now.Sub(st.heardAt) > proofAge {
		return 1
	}
	return st.window
}

// contender returns whose turn it is in a contest, and the way by which it has
// it.
func (g *group) contender(c *[ways]contest) (int, *stake) {
	way := g.classes.choose(!c[reserved].empty())
	return way, c[way].first()
}

// serveIdle gives work to the idle sessions of the group's lanes, for as long
// as rates have room.
func (s *Scheduler) serveIdle(g *group, now time.Time) {
	if len(g.lanes) > 1 && (g.limits.RelayMessageRate.Max > 0 || len(g.gates) > 0) {
		s.serveTogether(g, now)
		return
	}
	for len(g.active) > 0 {
		last := len(g.active) - 1
		l := g.active[last]
		g.active[last] = nil
		g.active = g.active[:last]
		l.active = false
		if !s.serveLane(l, now) {
			s.activateLane(l)
			return
		}
	}
}

// serveLane serves the idle sessions of one lane; false: the provider's rate,
// which holds all lanes, is used up.
func (s *Scheduler) serveLane(l *lane, now time.Time) bool {
	g := l.group
	for {
		way, k := g.contender(&l.idle)
		if k == nil {
			return true
		}
		if reason, until := g.laneHolds(l, false, now); reason != "" {
			s.wakeLane(l, until)
			return true
		}
		if s.inLine(g, now) {
			return false
		}
		if g.limited() && s.openInstead(l, way, k, now) {
			continue
		}
		s.dispatch(k, now)
	}
}

// limited reports whether messages of the group share a rate, so that one that
// goes first takes something from the others.
func (g *group) limited() bool {
	return g.limits.SourceMessageRate.Max > 0 || g.limits.RelayMessageRate.Max > 0 || len(g.gates) > 0 || g.lanesGated
}

// otherLanes reports whether a site whose idle sessions wait for the rate of
// their lane may be served by another one.
func (g *group) otherLanes() bool {
	return len(g.lanes) > 1 && (g.limits.SourceMessageRate.Max > 0 || g.lanesGated)
}

// openInstead opens a session for a site without one, if its tenant's turn is
// before that of the site with the idle session; false: it was not possible.
func (s *Scheduler) openInstead(l *lane, way int, k *stake, now time.Time) bool {
	g := l.group
	openWay, other := g.contender(&g.open)
	if other == nil || other.seat.site.idle > 0 {
		return false
	}
	if openWay != way {
		if way == reserved { // the other contest has none
			return false
		}
	} else if !other.before(k.strand.flow, way, k.seat.site) {
		return false
	}
	return s.tryOpen(other, now)
}

// dispatch gives the most recently used idle session of a site at a lane the
// next message; the others can then run into their idle limit.
func (s *Scheduler) dispatch(k *stake, now time.Time) {
	k.pass()
	st, p := k.seat.site, k.seat.post
	ss := p.idle[len(p.idle)-1]
	q := s.pick(st, p.lane, now)
	if q == nil { // it all waits at gates
		s.evaluate(st, now)
		return
	}
	s.unpark(ss)
	ss.state = busy
	s.reserve(ss, q, now)
	s.effects = append(s.effects, Effect{Kind: Dispatch, Session: ss.id, Lane: p.lane.key, Queue: q.number})
	s.evaluate(st, now)
}

// serveOpen opens the sessions that sites want, in the order of their tenants.
func (s *Scheduler) serveOpen(g *group, now time.Time) {
	for {
		_, k := g.contender(&g.open)
		if k == nil {
			if s.releaseAside(g, now) {
				continue
			}
			if g.asides > 0 {
				s.stealIdle(g, holdSourceConnections)
			}
			return
		}
		if !s.tryOpen(k, now) {
			return
		}
	}
}

// tryOpen opens a session for the site whose turn it is, or puts it aside;
// false: nothing can be opened by the group now.
func (s *Scheduler) tryOpen(k *stake, now time.Time) bool {
	st := k.seat.site
	g := st.group
	if want, _ := st.wantsSession(now); !want { // any more
		s.evaluate(st, now)
		return true
	}
	if len(st.gates) > 0 && s.siteHeld(st, now) {
		s.evaluate(st, now)
		return true
	}
	if s.groupHeld(g, now) {
		return false
	}
	if s.trialHolds(st, now) || s.trials.len() > 0 && !st.proven(now) && !st.trialTurn {
		s.trials.push(st, st.orders[reserved].len() > 0)
		s.evaluate(st, now)
		return true
	}
	k.pass()
	for s.tried = s.tried[:0]; ; {
		l := s.chooseLane(st, now)
		if l == nil {
			break
		}
		if q := s.pick(st, l, now); q != nil {
			s.openOn(st, l, q, now)
			return true
		}
		s.tried = append(s.tried, l)
	}
	if len(g.free) == 0 {
		// The lanes come back with their rates or with the end of a session.
		s.stealIdle(g, holdSourceConnections)
		return false
	}
	s.setAside(st, now)
	s.evaluate(st, now)
	return true
}

func (s *Scheduler) openOn(st *site, l *lane, q *queue, now time.Time) {
	g := st.group
	l.connects.Take(now, 1)
	g.use.connects.Take(now, 1)
	s.lastID++
	p := st.post(l)
	ss := &session{id: s.lastID, lane: l, site: st, post: p, state: connecting, trial: !st.proven(now)}
	s.reserve(ss, q, now)
	s.enterGates(ss)
	s.sessions[ss.id] = ss
	l.sessions++
	p.sessions++
	g.use.sessions++
	g.use.opening++
	st.opening++
	s.opening++
	if ss.trial {
		s.trialSessions++
		s.trialOpening++
	}
	g.useTurn, g.relayTurn, st.trialTurn = false, false, false
	s.effects = append(s.effects, Effect{Kind: Open, Session: ss.id, Lane: l.key, Queue: q.number, Domain: q.key.Domain})
	s.evaluate(st, now)
}

// chooseLane is smooth weighted round robin among the lanes that can open a
// session to the site now. Lanes that turn out to have no room leave the list
// of free ones.
func (s *Scheduler) chooseLane(st *site, now time.Time) *lane {
	g := st.group
	ranks := s.ranks(st, now)
	var best *lane
	total := 0
	for i := 0; i < len(g.free); {
		l := g.free[i]
		if reason, until := g.laneHolds(l, true, now); reason != "" {
			last := len(g.free) - 1
			g.free[i], g.free[last] = g.free[last], nil
			g.free = g.free[:last]
			l.free = false
			s.wakeLane(l, until)
			continue
		}
		i++
		if !ranks[st.rank(l)] || st.backingOff(l, now) || s.barred(st, l, now) || slices.Contains(s.tried, l) {
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

// setAside takes a site out of the contest until a lane that may serve it has
// room: the lanes that have some cannot reach it now, or it has mail only for
// others.
func (s *Scheduler) setAside(st *site, now time.Time) {
	st.aside = true
	st.group.asides++
	var until time.Time
	for _, p := range st.posts {
		if p.backoff.After(now) && (until.IsZero() || p.backoff.Before(until)) {
			until = p.backoff
		}
	}
	if !until.IsZero() {
		s.siteTimers.set(st, until)
	}
	for _, l := range st.group.lanes {
		if !l.free && !slices.Contains(st.asideOn, l) {
			st.asideOn = append(st.asideOn, l)
			l.aside.push(st)
		}
	}
}

// unaside lets a site take part again.
func (s *Scheduler) unaside(st *site) {
	if st.aside {
		st.aside = false
		st.group.asides--
		s.touchSite(st)
	}
}

// releaseAside lets one site that waits for a lane with room take part again.
func (s *Scheduler) releaseAside(g *group, now time.Time) bool {
	if g.asides == 0 {
		return false
	}
	for _, l := range g.free {
		for l.aside.len() > 0 {
			st, _ := l.aside.pop()
			st.dropAside(l)
			if st.aside {
				st.aside = false
				g.asides--
				s.evaluate(st, now)
				return true
			}
		}
	}
	return false
}

func (st *site) dropAside(l *lane) {
	if i := slices.Index(st.asideOn, l); i >= 0 {
		st.asideOn = slices.Delete(st.asideOn, i, i+1)
	}
}
