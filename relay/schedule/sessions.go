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
	post     *post
	state    sessionState
	messages int
	proofs   int       // messages whose end was noted
	began    time.Time // the one in work
	stolen   bool      // its end makes room for another
	trial    bool      // to a host that is not proven
	reserved bool      // a right to one message is spent that nothing was begun with
	passed   []*gate   // of the queue that it was spent for
	gates    []*gate   // that count the session
}

// Answer says what a session does next.
type Answer uint8

// The answers of NextFor.
const (
	Work Answer = iota + 1 // take a message of the queue
	Park                   // keep the connection; Next may dispatch or close it
	End                    // say QUIT, then call Ended
)

// minRun is how many messages a session may carry before it must make way for
// a site that has no session: opening one costs about as much as some messages.
const minRun = 16

// NextFor tells a session that finished a transaction, or found its queue
// empty, what to do next.
func (s *Scheduler) NextFor(id Session, now time.Time) (Queue, Answer) {
	ss := s.sessions[id]
	if ss == nil {
		return 0, End
	}
	st, g := ss.site, ss.lane.group
	s.prove(ss, now)
	s.unreserve(ss)
	limit := g.limits.MessagesPerConnection
	if ss.lane.gone || limit > 0 && ss.messages >= limit || s.tooMany(ss) {
		ss.state = closing
		return 0, End
	}
	if s.makesWay(ss) || len(ss.gates) > 0 && ss.gateWants() {
		ss.state = closing
		return 0, End
	}
	if st.backlog == 0 || s.barred(st, ss.lane, now) {
		return 0, s.park(ss)
	}
	if reason, until := g.laneHolds(ss.lane, false, now); reason != "" {
		s.wakeLane(ss.lane, until)
		return 0, s.park(ss)
	}
	if s.inLine(g, now) || g.limited() && s.outranked(ss) {
		return 0, s.park(ss)
	}
	if q := s.pick(st, ss.lane, now); q != nil {
		s.reserve(ss, q, now)
		return q.number, Work
	}
	return 0, s.park(ss)
}

// tooMany reports whether a limit was lowered below what is open.
func (s *Scheduler) tooMany(ss *session) bool {
	g := ss.lane.group
	return s.limits.MaxSessions > 0 && len(s.sessions) > s.limits.MaxSessions ||
		g.limits.SourceConnections > 0 && ss.lane.sessions > g.limits.SourceConnections ||
		g.limits.RelayConnections > 0 && g.use.sessions > g.limits.RelayConnections
}

// prove books that the host took a message, or answered to one.
func (s *Scheduler) prove(ss *session, now time.Time) {
	if ss.messages == ss.proofs {
		return
	}
	ss.proofs = ss.messages
	st := ss.site
	st.window = min(st.room(now)+1, 2*(st.open+st.opening)+1)
	st.heardAt = now
	if now.Sub(ss.began) <= prompt {
		st.provedAt = now
		s.endTrial(ss)
	} else {
		st.provedAt = time.Time{}
		if !ss.trial {
			ss.trial = true
			s.trialSessions++
		}
	}
	if st.backlog > 0 {
		s.touchSite(st)
	}
}

func (s *Scheduler) endTrial(ss *session) {
	if ss.trial {
		ss.trial = false
		s.trialSessions--
	}
}

// outranked reports whether the room that a rate has now belongs to another
// site, by the order of its tenant.
func (s *Scheduler) outranked(ss *session) bool {
	g, l, st := ss.lane.group, ss.lane, ss.site
	own := st.best(reserved, l)
	way := g.classes.choose(own != nil || !l.idle[reserved].empty() || !g.open[reserved].empty())
	if way == general {
		own = st.best(general, l)
	}
	for _, c := range [...]*contest{&l.idle[way], &g.open[way]} {
		if k := c.first(); k != nil && k.seat.site != st && k.before(own.stream(), way, st) {
			return true
		}
	}
	return false
}

// makesWay reports whether a session must end because a limit that it fills
// keeps others from their turn: at once if it has nothing to do or transactional
// mail has the turn, else after a while.
func (s *Scheduler) makesWay(ss *session) bool {
	g, st := ss.lane.group, ss.site
	spent := st.backlog == 0 || ss.messages >= minRun
	calm := st.orders[reserved].len() == 0 // it has no transactional mail itself
	mine := g.laneFull(ss.lane) && len(g.free) == 0
	if s.sessionsFull() {
		if n := s.waiters.len(); n > 1 || n == 1 && g.queued == nowhere {
			return spent || calm && s.waiters.count[1] > 0
		}
		if s.trialsWait() && (spent || calm && s.trials.count[1] > 0) {
			return true
		}
		mine = mine || g.queued != nowhere
	}
	if g.relayFull() || s.shareFull(g.use) {
		if other, ok := g.use.waiters.first(); ok && (other != g || g.use.waiters.len() > 1) {
			return spent || calm && !other.open[reserved].empty()
		}
		mine = mine || g.inWaiters
	}
	if ss.trial && s.trials.len() > 0 && spent {
		return true
	}
	if other, ok := ss.lane.aside.first(); ok && (other != st || ss.lane.aside.len() > 1) && g.laneFull(ss.lane) && spent {
		return true
	}
	return mine && s.makesWayAtHome(ss, spent, calm)
}

// makesWayAtHome is makesWay for the other sites of the session's own group.
func (s *Scheduler) makesWayAtHome(ss *session, spent, calm bool) bool {
	g, st := ss.lane.group, ss.site
	way := g.classes.choose(!g.open[reserved].empty())
	k := g.open[way].first()
	if k != nil && k.seat.site == st { // it has the turn anyhow
		k.pass()
		k = g.open[way].first()
	}
	if k == nil || k.seat.site == st {
		return false
	}
	if way == reserved && calm {
		return true
	}
	return spent && k.behind(st.best(way, ss.lane).stream(), way, st) || g.limited() && k.losing(way)
}

// park keeps a session without work; what it could not take may need the
// group to be looked at.
func (s *Scheduler) park(ss *session) Answer {
	ss.state = parked
	ss.post.idle = append(ss.post.idle, ss)
	ss.site.idle++
	s.touchSite(ss.site)
	return Park
}

// unpark takes a session out of the parked ones.
func (s *Scheduler) unpark(ss *session) {
	p := ss.post
	for i := len(p.idle) - 1; i >= 0; i-- {
		if p.idle[i] == ss {
			p.idle = append(p.idle[:i], p.idle[i+1:]...)
			break
		}
	}
	ss.site.idle--
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
	ss.reserved = false
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
	s.endOpening(ss)
	ss.post.backoff = time.Time{}
	s.unaside(ss.site)
	s.touchSite(ss.site)
}

// endOpening gives back what opening a session took.
func (s *Scheduler) endOpening(ss *session) {
	u := ss.lane.group.use
	s.opening--
	u.opening--
	if ss.trial {
		s.trialOpening--
	}
	s.free(u)
}

// Ended tells that a session is gone, for whatever reason.
func (s *Scheduler) Ended(id Session) {
	ss := s.sessions[id]
	if ss == nil {
		return
	}
	delete(s.sessions, id)
	st, g := ss.site, ss.lane.group
	switch ss.state {
	case connecting:
		ss.reserved = true // whatever it was opened for was not begun
		st.opening--
		s.endOpening(ss)
	default:
		st.open--
	}
	switch ss.state {
	case parked:
		s.unpark(ss)
	case closing:
		if ss.stolen {
			s.closing--
			g.closing--
			g.use.closing--
			for _, gt := range ss.gates {
				gt.closing--
			}
		}
	}
	s.unreserve(ss)
	s.leaveGates(ss)
	s.endTrial(ss)
	ss.lane.sessions--
	ss.post.sessions--
	g.use.sessions--
	if ss.lane.sessions < 0 || st.open < 0 || st.opening < 0 || s.opening < 0 || s.trialSessions < 0 || s.trialOpening < 0 {
		panic("schedule: a session ended twice")
	}
	s.freeLane(ss.lane)
	s.touchSite(st)
	s.free(g.use)
}

// Failed tells that a session could not be opened; its lane does not try the
// site again before the given time.
func (s *Scheduler) Failed(id Session, until time.Time) {
	if ss := s.sessions[id]; ss != nil {
		ss.post.backoff = until
		ss.site.window = max(1, ss.site.window/2)
	}
	s.Ended(id)
}

// closeIdle ends a session that was parked, so that another one can be opened.
func (s *Scheduler) closeIdle(ss *session) {
	ss.state, ss.stolen = closing, true
	g := ss.lane.group
	s.closing++
	g.closing++
	g.use.closing++
	for _, gt := range ss.gates {
		gt.closing++
	}
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
		for _, l := range g.lanes {
			out = append(out, LaneInfo{Lane: l.key, Pool: key.pool, Sessions: l.sessions, Waiting: g.waiting})
		}
	}
	return out
}
