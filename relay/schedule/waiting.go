package schedule

import "time"

// groupHeld reports whether a limit beyond the group's lanes lets it open no
// session now, and has it wait there: behind others that wait already.
func (s *Scheduler) groupHeld(g *group, now time.Time) bool {
	if s.inLine(g, now) || len(g.gates) > 0 && s.inGateWaiters(g, now) {
		return true
	}
	reason, until := s.providerHolds(g, true, now)
	if reason == "" && g.use.waiters.len() > 0 && !g.useTurn && !g.relayTurn {
		reason = holdRelayConnections
		s.free(g.use)
	}
	if reason != "" {
		if !g.inWaiters {
			g.inWaiters = true
			g.use.waiters.push(g)
		}
		s.wakeUse(g.use, until)
		s.stealIdle(g, reason)
		return true
	}
	reason = s.relayHolds()
	if reason == "" && s.waiters.len() > 0 && !g.useTurn && !g.relayTurn {
		reason = holdSessions
	}
	if reason != "" {
		s.waiters.push(g, !g.open[reserved].empty())
		s.stealIdle(g, reason)
		return true
	}
	return false
}

// inLine reports whether the relay's message rate to the provider has no room
// for the group, and has it wait in line with the provider's other groups.
func (s *Scheduler) inLine(g *group, now time.Time) bool {
	if len(g.gates) > 0 && s.inGateLine(g, now) {
		return true
	}
	u := g.use
	if g.limits.RelayMessageRate.Max == 0 {
		return false
	}
	_, wait := u.messages.Peek(now, 1)
	if wait == 0 && (u.line.len() == 0 || g.rateTurn) {
		return false
	}
	if !g.inLine {
		g.inLine = true
		u.line.push(g)
	}
	if wait > 0 {
		s.wakeUse(u, now.Add(wait))
	} else {
		s.free(u)
	}
	return true
}

// wakeLane has a lane looked at again when its rates have room.
func (s *Scheduler) wakeLane(l *lane, at time.Time) {
	if len(l.gates) > 0 {
		l.waitAtGates()
	}
	if !at.IsZero() && !l.gone && (l.timer.index == 0 || at.Before(l.timer.at)) {
		s.timers.set(l, at)
	}
}

func (s *Scheduler) wakeUse(u *providerUse, at time.Time) {
	if !at.IsZero() && (u.timer.index == 0 || at.Before(u.timer.at)) {
		s.useTimers.set(u, at)
	}
}

// activateLane has a lane's idle sessions looked at.
func (s *Scheduler) activateLane(l *lane) {
	if !l.active {
		l.active = true
		l.group.active = append(l.group.active, l)
	}
}

// freeLane has a lane looked at for its idle sessions and for one more.
func (s *Scheduler) freeLane(l *lane) {
	if l.gone {
		return
	}
	s.activateLane(l)
	if !l.free {
		l.free = true
		l.group.free = append(l.group.free, l)
	}
	s.touch(l.group)
}

// free has those that wait for a provider looked at.
func (s *Scheduler) free(u *providerUse) {
	if !u.freed {
		u.freed = true
		s.freed = append(s.freed, u)
	}
}

// serveWaiters lets those that waited for room in a limit of more than their
// lane have it one after the other, for as long as there is some. Each either
// uses room or stops waiting, so it ends.
func (s *Scheduler) serveWaiters(now time.Time) {
	for i := 0; i < len(s.freed); i++ {
		u := s.freed[i]
		u.freed = false
		s.serveLine(u, now)
		s.serveUse(u, now)
	}
	clear(s.freed)
	s.freed = s.freed[:0]
	// New hosts first: they have a bound of their own.
	for s.relayHolds() == "" && s.trialsWait() {
		st, ok := s.trials.pop()
		if !ok {
			break
		}
		st.trialTurn, st.group.relayTurn = true, true
		s.evaluate(st, now)
		s.serveOpen(st.group, now)
		st.trialTurn, st.group.relayTurn = false, false
	}
	for s.relayHolds() == "" {
		g, ok := s.waiters.pop()
		if !ok {
			break
		}
		g.relayTurn = true
		s.serveOpen(g, now)
		g.relayTurn = false
	}
	if s.sessionsFull() && (s.waiters.len() > 0 || s.trialsWait()) {
		s.stealIdle(nil, holdSessions)
	}
}

// serveLine gives each group in line for a provider's message rate one message.
func (s *Scheduler) serveLine(u *providerUse, now time.Time) {
	for u.line.len() > 0 {
		if _, wait := u.messages.Peek(now, 1); wait > 0 {
			s.wakeUse(u, now.Add(wait))
			return
		}
		g, _ := u.line.pop()
		g.inLine, g.rateTurn = false, true
		s.serve(g, now)
		g.rateTurn = false
	}
}

// serveUse gives each group that waits for a provider's connections one.
func (s *Scheduler) serveUse(u *providerUse, now time.Time) {
	for {
		g, ok := u.waiters.first()
		if !ok {
			return
		}
		if reason, until := s.providerHolds(g, true, now); reason != "" {
			s.wakeUse(u, until)
			s.stealIdle(g, reason)
			return
		}
		u.waiters.pop()
		g.inWaiters, g.useTurn = false, true
		s.serveOpen(g, now)
		g.useTurn = false
	}
}

// trialsWait reports whether an unproven host waits for nothing but room of the
// relay.
func (s *Scheduler) trialsWait() bool { return s.trials.len() > 0 && s.trialRoom() }

func (s *Scheduler) trialRoom() bool {
	return !reached(s.trialSessions, part(s.limits.MaxSessions, s.limits.UnprovenShare)) &&
		!reached(s.trialOpening, part(s.limits.MaxConnectsInFlight, s.limits.UnprovenShare))
}

// reserve spends the right to one message when the work is chosen: two
// sessions must not be given the same room in a rate. unreserve takes it back.
func (s *Scheduler) reserve(ss *session, q *queue, now time.Time) {
	g := ss.lane.group
	ss.lane.messages.Take(now, 1)
	g.use.messages.Take(now, 1)
	g.rateTurn = false
	ss.began = now
	ss.reserved, ss.passed = true, q.gates
	if len(ss.lane.gates)+len(g.gates)+len(q.gates)+len(ss.site.bars) > 0 {
		s.takeGates(ss, q, now)
	}
}

// unreserve gives back what reserve spent, if the session began nothing with it:
// its queue turned out to be empty, or the mail was held.
func (s *Scheduler) unreserve(ss *session) {
	if !ss.reserved {
		return
	}
	ss.reserved = false
	g := ss.lane.group
	ss.lane.messages.Untake(ss.began, 1)
	g.use.messages.Untake(ss.began, 1)
	s.untake(ss)
	if g.limits.SourceMessageRate.Max > 0 {
		s.freeLane(ss.lane)
	}
	if g.limits.RelayMessageRate.Max > 0 {
		s.free(g.use)
	}
}
