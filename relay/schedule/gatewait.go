package schedule

import (
	"slices"
	"time"
)

// excess reports whether more sessions are open than the gate lets.
func (gt *gate) excess() bool {
	return gt.NoSessions && gt.sessions > 0 || gt.Sessions > 0 && gt.sessions > gt.Sessions
}

// freeGate has those that wait at a gate looked at.
func (s *Scheduler) freeGate(gt *gate) {
	if !gt.freed && !gt.gone {
		gt.freed = true
		s.gates.freed = append(s.gates.freed, gt)
	}
}

// wakeGate has a gate looked at when it may let something pass.
func (s *Scheduler) wakeGate(gt *gate, at time.Time) {
	if !at.IsZero() && !gt.gone && (gt.timer.index == 0 || at.Before(gt.timer.at)) {
		s.gates.timers.set(gt, at)
	}
}

// gateHolds returns what of the gates of a lane holds it.
func (l *lane) gateHolds(connect bool, now time.Time) (string, time.Time) {
	for _, gt := range l.gates {
		if reason, until := gt.holds(connect, now); reason != "" {
			return reason, until
		}
	}
	return "", time.Time{}
}

// waitAtGates notes that a lane is held, should it be by a gate that knows no
// time.
func (l *lane) waitAtGates() {
	for _, gt := range l.gates {
		if !slices.Contains(gt.lanes, l) {
			gt.lanes = append(gt.lanes, l)
		}
	}
}

// gateHolds returns what of the gates of a group holds it.
func (g *group) gateHolds(connect bool, now time.Time) (string, time.Time) {
	for _, gg := range g.gates {
		if reason, until := gg.gate.holds(connect, now); reason != "" {
			return reason, until
		}
	}
	return "", time.Time{}
}

// inGateLine reports whether a gate's rate has no room for the group, and has it
// wait in line with the others there.
func (s *Scheduler) inGateLine(g *group, now time.Time) bool {
	for _, gg := range g.gates {
		gt := gg.gate
		reason, until := gt.holdsMessage(now)
		if reason == "" && (gt.line.len() == 0 || g.gateTurn == gt) {
			continue
		}
		if !gg.inLine {
			gg.inLine = true
			gt.line.push(gg)
		}
		if reason == "" {
			s.freeGate(gt)
		}
		s.wakeGate(gt, until)
		return true
	}
	return false
}

// inGateWaiters is inGateLine for one more session.
func (s *Scheduler) inGateWaiters(g *group, now time.Time) bool {
	for _, gg := range g.gates {
		gt := gg.gate
		reason, until := gt.holdsSession(now)
		if reason == "" && (gt.waiters.len() == 0 || g.gateTurn == gt) {
			continue
		}
		if !gg.inWaiters {
			gg.inWaiters = true
			gt.waiters.push(gg)
		}
		if reason == "" {
			s.freeGate(gt)
		}
		s.wakeGate(gt, until)
		s.stealAtGate(gt)
		return true
	}
	return false
}

// siteHeld is inGateWaiters for a site whose sessions a gate counts that is not
// of its group.
func (s *Scheduler) siteHeld(st *site, now time.Time) bool {
	for _, gt := range st.gates {
		reason, until := gt.holdsSession(now)
		if reason == "" && (gt.sites.len() == 0 || st.gateTurn == gt) {
			continue
		}
		st.gateWait = gt
		gt.sites.push(st)
		if reason == "" {
			s.freeGate(gt)
		}
		s.wakeGate(gt, until)
		s.stealAtGate(gt)
		return true
	}
	return false
}

// stealAtGate ends an idle session without work that a gate counts, so that
// another one has its turn.
func (s *Scheduler) stealAtGate(gt *gate) {
	if gt.closing > 0 || gt.NoSessions || !reached(gt.sessions, gt.Sessions) {
		return
	}
	for _, gg := range gt.groups {
		if k := gg.group.spare.first; k != nil {
			s.closeSpare(k.post)
			return
		}
	}
	if !gt.Match.ofQueues() {
		return
	}
	for k := s.spare.first; k != nil; k = k.next {
		if len(k.post.idle) > 0 && slices.Contains(k.post.idle[0].gates, gt) {
			s.closeSpare(k.post)
			return
		}
	}
}

// enterGates counts a new session at all gates that it passes.
func (s *Scheduler) enterGates(ss *session) {
	l, st, g := ss.lane, ss.site, ss.lane.group
	n := len(l.gates) + len(st.gates) + len(g.gates)
	if n == 0 {
		return
	}
	ss.gates = make([]*gate, 0, n)
	ss.gates = append(append(ss.gates, l.gates...), st.gates...)
	for _, gg := range g.gates {
		ss.gates = append(ss.gates, gg.gate)
	}
	for _, gt := range ss.gates {
		gt.sessions++
	}
	g.gateTurn, st.gateTurn = nil, nil
}

// leaveGates ends that.
func (s *Scheduler) leaveGates(ss *session) {
	for _, gt := range ss.gates {
		gt.sessions--
		if gt.Slots {
			s.freeGate(gt)
		}
	}
}

// gateWants reports whether a session must end for a gate: it lets fewer pass now,
// or another one waits for its place and it has had its turn.
func (ss *session) gateWants() bool {
	for _, gt := range ss.gates {
		if gt.excess() {
			return true
		}
		if !reached(gt.sessions, gt.Sessions) || ss.site.backlog > 0 && ss.messages < minRun {
			continue
		}
		if gg, ok := gt.waiters.first(); ok && (gg.group != ss.lane.group || gt.waiters.len() > 1) {
			return true
		}
		if st, ok := gt.sites.first(); ok && (st != ss.site || gt.sites.len() > 1) {
			return true
		}
		if gg, ok := gt.waiters.first(); ok {
			if k := gg.group.open[general].first(); k != nil && k.seat.site != ss.site {
				return true // another site of its own group
			}
		}
	}
	return false
}

// heldAt returns the gate that holds a queue's mail, nil if none does.
func (q *queue) heldAt(now time.Time) (*gate, time.Time) {
	for _, gt := range q.gates {
		if reason, until := gt.holdsMessage(now); reason != "" {
			return gt, until
		}
	}
	return nil, time.Time{}
}

// wait takes a queue out of service until a gate lets its mail pass.
func (s *Scheduler) wait(q *queue, gt *gate, until time.Time) {
	s.unlist(q)
	q.gated, q.site.gatedBy = gt, gt
	q.site.gated += q.waiting
	q.tally(q.waiting)
	gt.parked++
	key := flowKey{q.key.Tenant, q.key.Stream, q.key.Priority, q.strand.flow.urgent()}
	in := gt.byFlow[key]
	if in == nil {
		if gt.byFlow == nil {
			gt.byFlow = make(map[flowKey]*gateLine)
		}
		in = &gateLine{key: key}
		gt.byFlow[key] = in
	}
	if in.head == nil {
		q.next, q.prev, in.head = q, q, q
		gt.lines.push(in, key.urgent)
	} else {
		q.next, q.prev = in.head, in.head.prev
		q.prev.next, q.next.prev = q, q
	}
	s.wakeGate(gt, until)
	s.freeOthers(q)
}

// freeOthers has the gates of a queue that cannot go looked at: others of its
// stream may have waited there for it to go first.
func (s *Scheduler) freeOthers(q *queue) {
	for _, gt := range q.gates {
		if gt != q.gated && gt.parked > 0 {
			s.freeGate(gt)
		}
	}
}

// unwait takes a queue out of a gate's line. It stands nowhere then.
func (s *Scheduler) unwait(q *queue) {
	gt := q.gated
	key := flowKey{q.key.Tenant, q.key.Stream, q.key.Priority, q.strand.flow.urgent()}
	in := gt.byFlow[key]
	switch {
	case q.next == q:
		in.head = nil
		gt.lines.leave(in)
		delete(gt.byFlow, key)
	case in.head == q:
		in.head = q.next
	}
	q.prev.next, q.next.prev = q.next, q.prev
	q.next, q.prev, q.gated = nil, nil, nil
	q.site.gated -= q.waiting
	q.tally(-q.waiting)
	gt.parked--
}

// release lets the queue whose turn it is at a gate go back to its site, unless
// others that go first are there already; nil: it stays.
func (s *Scheduler) release(gt *gate, all bool, now time.Time) *queue {
	in, ok := gt.lines.pop()
	if !ok {
		return nil
	}
	q := in.head
	in.head = q.next
	if q.next != q || !all && q.behind(gt) {
		gt.lines.push(in, in.key.urgent)
	}
	if !all && q.behind(gt) {
		return nil
	}
	s.unwait(q)
	s.list(q, now)
	return q
}

// behind reports whether mail of the queue's stream that passes the same gate
// stands at its site, and so goes first.
func (q *queue) behind(gt *gate) bool { return gt.Match.Domain == "" && q.strand.head != nil }

// serveGates lets those that wait at gates pass, as far as these have room.
func (s *Scheduler) serveGates(now time.Time) {
	for i := 0; i < len(s.gates.freed); i++ {
		gt := s.gates.freed[i]
		gt.freed = false
		if !gt.gone {
			s.serveGate(gt, now)
		}
	}
	clear(s.gates.freed)
	s.gates.freed = s.gates.freed[:0]
}

// serveGate serves one gate. Each that waits either uses room or stops waiting,
// so it ends.
func (s *Scheduler) serveGate(gt *gate, now time.Time) {
	held := gt.lanes
	gt.lanes = nil
	for _, l := range held {
		s.freeLane(l)
	}
	// Who is found held at another gate, or has no lane, has lost nothing but its
	// place here; who comes back here stands behind the others.
	for n := gt.line.len(); n > 0 && s.gateRoom(gt, now); n-- {
		gg, _ := gt.line.pop()
		gg.inLine, gg.group.gateTurn = false, gt
		s.serve(gg.group, now)
		gg.group.gateTurn = nil
	}
	for n := gt.parked; n > 0 && s.gateRoom(gt, now); n-- {
		if q := s.release(gt, false, now); q != nil {
			s.pump(q.site.group, now)
		}
	}
	for n := gt.barred.len(); n > 0 && s.gateRoom(gt, now); n-- {
		st := s.unbar(gt)
		s.pump(st.group, now)
	}
	for n := gt.waiters.len(); n > 0 && s.gateSlot(gt, now); n-- {
		gg, _ := gt.waiters.pop()
		gg.inWaiters, gg.group.gateTurn = false, gt
		s.serveOpen(gg.group, now)
		gg.group.gateTurn = nil
	}
	for n := gt.sites.len(); n > 0 && s.gateSlot(gt, now); n-- {
		if st, _ := gt.sites.pop(); st.gateWait == gt {
			st.gateWait, st.gateTurn = nil, gt
			s.evaluate(st, now)
			s.serveOpen(st.group, now)
			st.gateTurn = nil
		}
	}
}

// gateRoom reports whether a gate lets a message pass, and otherwise has it looked
// at when it does.
func (s *Scheduler) gateRoom(gt *gate, now time.Time) bool {
	reason, until := gt.holdsMessage(now)
	s.wakeGate(gt, until)
	return reason == ""
}

// gateSlot is gateRoom for a session.
func (s *Scheduler) gateSlot(gt *gate, now time.Time) bool {
	reason, until := gt.holdsSession(now)
	s.wakeGate(gt, until)
	if reason != "" {
		s.stealAtGate(gt)
	}
	return reason == ""
}

// emptyGate has all that wait at a gate look elsewhere.
func (s *Scheduler) emptyGate(gt *gate, now time.Time) {
	for _, l := range gt.lanes {
		s.freeLane(l)
	}
	gt.lanes = nil
	for _, gg := range gt.groups {
		if gg.inLine || gg.inWaiters {
			s.revise(gg.group)
		}
	}
	for st, ok := gt.sites.pop(); ok; st, ok = gt.sites.pop() {
		if st.gateWait == gt {
			st.gateWait = nil
			s.touchSite(st)
		}
	}
	for gt.parked > 0 {
		s.release(gt, true, now)
	}
	for gt.barred.len() > 0 {
		s.unbar(gt)
	}
}

// takeGates takes one message from the gates that it passes.
func (s *Scheduler) takeGates(ss *session, q *queue, now time.Time) {
	for _, gt := range ss.lane.gates {
		gt.bucket.Take(now, 1)
	}
	for _, gg := range ss.lane.group.gates {
		gg.gate.bucket.Take(now, 1)
	}
	for _, gt := range q.gates {
		gt.bucket.Take(now, 1)
		if gt.parked > 0 {
			s.freeGate(gt) // there may be room for one more
		}
	}
	for _, gt := range ss.site.bars {
		if gt.Match.Source == ss.lane.key.Source {
			gt.bucket.Take(now, 1)
		}
	}
	ss.lane.group.gateTurn = nil
}

// untake gives back what takeGates took, for a message that was not begun.
func (s *Scheduler) untake(ss *session) {
	for _, gt := range ss.lane.gates {
		gt.bucket.Untake(ss.began, 1)
		s.freeGate(gt)
	}
	for _, gg := range ss.lane.group.gates {
		gg.gate.bucket.Untake(ss.began, 1)
		s.freeGate(gg.gate)
	}
	for _, gt := range ss.passed {
		gt.bucket.Untake(ss.began, 1)
		s.freeGate(gt)
	}
	for _, gt := range ss.site.bars {
		if gt.Match.Source == ss.lane.key.Source {
			gt.bucket.Untake(ss.began, 1)
			s.freeGate(gt)
		}
	}
}
