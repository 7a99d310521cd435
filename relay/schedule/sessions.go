package schedule

import (
	"time"

	"github.com/relais-mta/relais/shared/ids"
)

type sessionState uint8

const (
	connecting sessionState = iota
	busy
	parked
	closing
)

// session is one SMTP session on a lane towards a site.
type session struct {
	id       Session
	lane     *lane
	site     *site
	state    sessionState
	messages int

	idlePrev, idleNext *session // of the parked sessions
}

// reserve spends the right to one message when the work is chosen: two
// sessions must not be given the same room in a rate. Should the queue turn
// out to be empty the right is lost, which errs on the safe side.
func (ss *session) reserve(now time.Time) {
	ss.lane.messages.Take(now, 1)
	ss.lane.group.use.messages.Take(now, 1)
}

// Answer says what a session does next.
type Answer uint8

// The answers of NextFor.
const (
	Work Answer = iota + 1 // take a message of the queue
	Park                   // keep the connection; Next may dispatch or close it
	End                    // say QUIT, then call Ended
)

// NextFor tells a session that finished a transaction, or found its queue
// empty, what to do next.
func (s *Scheduler) NextFor(id Session, now time.Time) (Queue, Answer) {
	ss := s.sessions[id]
	if ss == nil {
		return 0, End
	}
	g := ss.lane.group
	limit := g.limits.MessagesPerConnection
	switch {
	case ss.lane.gone,
		limit > 0 && ss.messages >= limit,
		s.limits.MaxSessions > 0 && len(s.sessions) > s.limits.MaxSessions,
		g.limits.SourceConnections > 0 && ss.lane.sessions > g.limits.SourceConnections:
		ss.state = closing
		return 0, End
	}
	if at, reason := s.laneReady(ss.lane, ss.site, false, now); reason != "" {
		s.wait(g, at)
		return 0, s.rest(ss)
	}
	if ss.site.backlog > 0 {
		if q := s.pick(ss.site, ss.lane, now); q != nil {
			ss.site.since = now
			ss.reserve(now)
			return q.number, Work
		}
	}
	return 0, s.rest(ss)
}

// rest parks a session that has nothing to do now, unless others wait for its
// place.
func (s *Scheduler) rest(ss *session) Answer {
	if s.othersWait(ss) {
		ss.state = closing
		return End
	}
	return s.park(ss)
}

func (s *Scheduler) park(ss *session) Answer {
	ss.state = parked
	ss.site.idle = append(ss.site.idle, ss)
	ss.idlePrev = s.idleLast
	if s.idleLast != nil {
		s.idleLast.idleNext = ss
	} else {
		s.idleFirst = ss
	}
	s.idleLast = ss
	return Park
}

// unpark takes a session out of both lists of parked ones.
func (s *Scheduler) unpark(ss *session) {
	st := ss.site
	for i := len(st.idle) - 1; i >= 0; i-- {
		if st.idle[i] == ss {
			st.idle = append(st.idle[:i], st.idle[i+1:]...)
			break
		}
	}
	if ss.idlePrev != nil {
		ss.idlePrev.idleNext = ss.idleNext
	} else {
		s.idleFirst = ss.idleNext
	}
	if ss.idleNext != nil {
		ss.idleNext.idlePrev = ss.idlePrev
	} else {
		s.idleLast = ss.idlePrev
	}
	ss.idlePrev, ss.idleNext = nil, nil
}

// othersWait reports whether a limit that this session fills keeps other work
// from its turn.
func (s *Scheduler) othersWait(ss *session) bool {
	g := ss.lane.group
	if s.full() && s.waiters.len() > 0 || g.relayFull() && g.use.waiters.len() > 0 {
		return true
	}
	if g.limits.SourceConnections == 0 || ss.lane.sessions < g.limits.SourceConnections {
		return false
	}
	for _, st := range g.order {
		if st != ss.site && st.backlog > 0 && st.open+st.opening == 0 {
			return true
		}
	}
	return false
}

// Started tells that a session has taken a message of the queue it was given.
func (s *Scheduler) Started(id Session) {
	ss := s.sessions[id]
	if ss == nil {
		return
	}
	if ss.state == parked {
		panic("schedule: a parked session started a message")
	}
	ss.messages++
}

// Opened tells that a session is connected and works on its first message.
func (s *Scheduler) Opened(id Session) {
	ss := s.sessions[id]
	if ss == nil || ss.state != connecting {
		return
	}
	ss.state = busy
	ss.site.opening--
	ss.site.open++
	s.opening--
	delete(ss.site.backoff, ss.lane)
	s.touch(ss.site.group)
}

// Ended tells that a session is gone, for whatever reason.
func (s *Scheduler) Ended(id Session) {
	ss := s.sessions[id]
	if ss == nil {
		return
	}
	delete(s.sessions, id)
	st := ss.site
	switch ss.state {
	case connecting:
		st.opening--
		s.opening--
	default:
		st.open--
	}
	if ss.state == parked {
		s.unpark(ss)
	}
	ss.lane.sessions--
	ss.lane.group.use.sessions--
	if ss.lane.sessions < 0 || st.open < 0 || st.opening < 0 || s.opening < 0 {
		panic("schedule: a session ended twice")
	}
	s.touch(st.group)
	if use := st.group.use; !use.freed {
		use.freed = true
		s.freed = append(s.freed, use)
	}
}

// Failed tells that a session could not be opened; its lane does not try the
// site again before the given time.
func (s *Scheduler) Failed(id Session, until time.Time) {
	if ss := s.sessions[id]; ss != nil {
		ss.site.backoff[ss.lane] = until
		s.wait(ss.site.group, until)
	}
	s.Ended(id)
}

func (s *Scheduler) closeIdle(ss *session) {
	ss.state = closing
	s.effects = append(s.effects, Effect{Kind: Close, Session: ss.id})
}

// Idle reports whether the session is parked, so that its owner may end it for
// having been idle too long.
func (s *Scheduler) Idle(id Session) bool {
	ss := s.sessions[id]
	return ss != nil && ss.state == parked
}

// Stats is a summary for metrics.
type Stats struct {
	Sessions, Opening, Resolving, Queues, Domains, Groups int
}

// Stats returns the sizes of the scheduler's tables.
func (s *Scheduler) Stats() Stats {
	return Stats{
		Sessions: len(s.sessions), Opening: s.opening, Resolving: s.resolving,
		Queues: len(s.queues), Domains: len(s.domains), Groups: len(s.groups),
	}
}

// LaneInfo describes a lane for people.
type LaneInfo struct {
	Lane     Lane
	Pool     ids.Pool
	Sessions int
	Waiting  int // recipients due in the group
}

// Lanes lists the lanes of all groups.
func (s *Scheduler) Lanes() []LaneInfo {
	var out []LaneInfo
	for key, g := range s.groups {
		waiting := 0
		for _, st := range g.order {
			waiting += st.backlog
		}
		for _, l := range g.lanes {
			out = append(out, LaneInfo{Lane: l.key, Pool: key.pool, Sessions: l.sessions, Waiting: waiting})
		}
	}
	return out
}
