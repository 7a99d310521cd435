package schedule

import (
	"slices"
	"time"

	"github.com/relais-mta/relais/shared/ids"
	"github.com/relais-mta/relais/shared/mailaddr"
	"github.com/relais-mta/relais/shared/policy"
	"github.com/relais-mta/relais/shared/throttle"
)

// GateID names a gate: the number that its owner gave it.
type GateID struct {
	Owner  string
	Number uint64
}

// Match says what passes through a gate. A zero field matches everything.
type Match struct {
	Source   ids.Source
	Provider string
	Pool     ids.Pool
	Tenant   ids.Tenant
	Domain   mailaddr.Domain // of recipients
}

// Gate is a limit that somebody outside sets and changes at any time: what this
// relay may use of a limit that relays share, or a brake. A rate begins empty.
type Gate struct {
	ID         GateID
	Match      Match
	Slots      bool      // it counts sessions; those with mail of its tenant or domain carry no other. Not for some mail of a source
	Reason     string    // the word of Waiting
	Messages   Rate      // begun; Max 0: no limit
	Sessions   int       // of one that counts them: open or being opened; 0: no limit
	NoMessages bool      // none may begin
	NoSessions bool      // likewise: none may be opened, and those open end
	Until      time.Time // of these two: when to look again, if that is known
}

// gate is a Gate in use. By what it matches it belongs to lanes, to groups, to
// queues or to sites of some mail, see bars, and has those wait in its lists that it
// holds.
type gate struct {
	Gate
	bucket   throttle.Bucket
	sessions int
	closing  int // idle sessions that make way
	freed    bool
	gone     bool
	timer    slot

	lanes   []*lane          // held ones, of a gate with a source
	groups  []*groupGate     // all of a gate without source, tenant and domain
	line    fifo[*groupGate] // held by the rate
	waiters fifo[*groupGate] // held by the sessions
	sites   fifo[*site]      // likewise, of a gate with a tenant or domain
	barred  fifo[*site]      // held by the rate of a bar
	parked  int              // queues that wait
	waiting int              // recipients known to be due that it matches, of a gate with a tenant or domain
	lines   waitlist[*gateLine]
	byFlow  map[flowKey]*gateLine
}

func (gt *gate) slot() *slot { return &gt.timer }

// groupGate is a group at a gate.
type groupGate struct {
	gate      *gate
	group     *group
	inLine    bool
	inWaiters bool
}

type flowKey struct {
	tenant   ids.Tenant
	stream   string
	priority policy.Priority
	urgent   bool
}

// gateLine is the queues of one stream and priority that a gate holds. Lines take
// turns, transactional ones first.
type gateLine struct {
	key  flowKey
	head *queue // of a ring, by next and prev
	at   standing
}

func (l *gateLine) standing() *standing { return &l.at }

// gateTable is all gates, by what finds them.
type gateTable struct {
	all      map[GateID]*gate
	ofLanes  []*gate
	ofGroups []*gate
	byTenant map[ids.Tenant][]*gate
	byDomain map[mailaddr.Domain][]*gate // of those without a tenant
	timers   timerHeap[*gate]
	freed    []*gate
}

func (m *Match) ofQueues() bool { return !m.Tenant.IsZero() || m.Domain != "" }

// ofMailOfASource reports whether a gate is a bar.
func (m *Match) ofMailOfASource() bool { return m.ofQueues() && !m.Source.IsZero() }

func (m *Match) group(key groupKey) bool {
	return (m.Provider == "" || m.Provider == key.provider) && (m.Pool.IsZero() || m.Pool == key.pool)
}

func (m *Match) queue(k *Key, provider string) bool {
	return m.group(groupKey{k.Pool, provider}) && (m.Tenant.IsZero() || m.Tenant == k.Tenant) && (m.Domain == "" || m.Domain == k.Domain)
}

// holdsMessage returns what holds one more message, and until when if that is
// known.
func (gt *gate) holdsMessage(now time.Time) (string, time.Time) {
	if gt.NoMessages {
		return gt.Reason, gt.later(now)
	}
	if _, wait := gt.bucket.Peek(now, 1); wait > 0 {
		return gt.Reason, now.Add(wait)
	}
	return "", time.Time{}
}

// holdsSession is holdsMessage for one more session.
func (gt *gate) holdsSession(now time.Time) (string, time.Time) {
	if gt.NoSessions {
		return gt.Reason, gt.later(now)
	}
	if reached(gt.sessions, gt.Sessions) {
		return gt.Reason, time.Time{}
	}
	return "", time.Time{}
}

// later is the time that the gate's owner named, if it is still to come: a time
// that is over would have it looked at without an end.
func (gt *gate) later(now time.Time) time.Time {
	if gt.Until.After(now) {
		return gt.Until
	}
	return time.Time{}
}

func (gt *gate) holds(connect bool, now time.Time) (string, time.Time) {
	reason, until := gt.holdsMessage(now)
	if reason == "" && connect {
		return gt.holdsSession(now)
	}
	return reason, until
}

// SetGate adds a gate or changes one. What a changed one lets pass is looked at in
// Next; sessions that are too many end, idle ones at once.
func (s *Scheduler) SetGate(g Gate, now time.Time) {
	gt := s.gates.all[g.ID]
	if gt != nil && (gt.Match != g.Match || gt.Slots != g.Slots) {
		s.DropGate(g.ID, now)
		gt = nil
	}
	if gt == nil {
		gt = &gate{Gate: Gate{ID: g.ID, Match: g.Match, Slots: g.Slots, NoMessages: true}}
		s.attachGate(gt, now)
	}
	shut, changed := gt.NoMessages || gt.Messages.Max == 0, gt.Gate != g
	gt.Gate = g
	gt.bucket.Set(rate(g.Messages), now)
	if shut && g.Messages.Max > 0 {
		gt.bucket.Take(now, max(1, g.Messages.Burst))
	}
	s.closeExcess(gt)
	s.freeGate(gt)
	if changed {
		s.freeBar(gt)
	}
}

// DropGate removes a gate; what it held goes on.
func (s *Scheduler) DropGate(id GateID, now time.Time) {
	gt := s.gates.all[id]
	if gt == nil {
		return
	}
	gt.Gate = Gate{ID: id, Match: gt.Match, Slots: gt.Slots} // lets everything pass
	gt.bucket = throttle.Bucket{}
	s.emptyGate(gt, now)
	s.detachGate(gt, now)
}

// GateState is what there is for a gate to let pass.
type GateState struct {
	Number   uint64
	Waiting  int  // recipients known to be due, wherever they wait
	Sessions int  // open or being opened
	Held     bool // some waits for this gate, not for something else
}

// GateStates returns the states of an owner's gates that have work or sessions, in
// no order. Those for some mail of one source count neither and are left out.
func (s *Scheduler) GateStates(owner string, dst []GateState) []GateState {
	for id, gt := range s.gates.all {
		if id.Owner != owner {
			continue
		}
		waiting := gt.waiting
		for _, gg := range gt.groups {
			waiting += gg.group.waiting
		}
		if waiting > 0 || gt.sessions > 0 {
			dst = append(dst, GateState{id.Number, waiting, gt.sessions, gt.holdsMail()})
		}
	}
	return dst
}

// holdsMail reports whether something waits in the gate's lists.
func (gt *gate) holdsMail() bool {
	return len(gt.lanes) > 0 || gt.line.len() > 0 || gt.waiters.len() > 0 || gt.sites.len() > 0 || gt.parked > 0
}

// tally counts recipients that are due, or fewer of them, for all that asks.
func (q *queue) tally(n int) {
	q.site.group.waiting += n
	for _, gt := range q.gates {
		gt.waiting += n
	}
}

// Gates returns the numbers of an owner's gates, in order.
func (s *Scheduler) Gates(owner string) []uint64 {
	var out []uint64
	for id := range s.gates.all {
		if id.Owner == owner {
			out = append(out, id.Number)
		}
	}
	slices.Sort(out)
	return out
}

// attachGate puts a new gate in front of all that it matches.
func (s *Scheduler) attachGate(gt *gate, now time.Time) {
	t := &s.gates
	if t.all == nil {
		t.all = make(map[GateID]*gate)
		t.byTenant, t.byDomain = make(map[ids.Tenant][]*gate), make(map[mailaddr.Domain][]*gate)
	}
	t.all[gt.ID] = gt
	m := &gt.Match
	switch {
	case m.ofQueues():
		if m.Tenant.IsZero() {
			t.byDomain[m.Domain] = append(t.byDomain[m.Domain], gt)
		} else {
			t.byTenant[m.Tenant] = append(t.byTenant[m.Tenant], gt)
		}
		s.regate(m, now)
	case !m.Source.IsZero():
		t.ofLanes = append(t.ofLanes, gt)
		s.eachGroup(func(g *group) { s.gateLanes(g) })
	default:
		t.ofGroups = append(t.ofGroups, gt)
		s.eachGroup(func(g *group) {
			if m.group(g.key) {
				g.enterGate(gt)
			}
		})
	}
	s.recount(gt)
}

// detachGate takes a gate away; nothing waits at it.
func (s *Scheduler) detachGate(gt *gate, now time.Time) {
	t := &s.gates
	gt.gone = true
	delete(t.all, gt.ID)
	t.timers.remove(gt)
	m := &gt.Match
	is := func(other *gate) bool { return other == gt }
	switch {
	case m.ofQueues():
		if m.Tenant.IsZero() {
			t.byDomain[m.Domain] = slices.DeleteFunc(t.byDomain[m.Domain], is)
		} else {
			t.byTenant[m.Tenant] = slices.DeleteFunc(t.byTenant[m.Tenant], is)
		}
		s.regate(m, now)
	case !m.Source.IsZero():
		t.ofLanes = slices.DeleteFunc(t.ofLanes, is)
		s.eachGroup(func(g *group) { s.gateLanes(g) })
	default:
		t.ofGroups = slices.DeleteFunc(t.ofGroups, is)
		for _, gg := range gt.groups {
			gg.group.gates = slices.DeleteFunc(gg.group.gates, func(other *groupGate) bool { return other == gg })
		}
	}
	for _, ss := range s.sessions {
		if slices.Contains(ss.gates, gt) {
			ss.gates = slices.DeleteFunc(slices.Clone(ss.gates), is)
		}
	}
}

// eachGroup visits all groups in an order that is the same each time.
func (s *Scheduler) eachGroup(f func(*group)) {
	for _, id := range s.Pools() {
		for _, g := range s.pools[id].groups {
			f(g)
		}
	}
}

// gateLanes finds the gates of a group's lanes.
func (s *Scheduler) gateLanes(g *group) {
	g.lanesGated = false
	for _, l := range g.lanes {
		l.gates = nil
		for _, gt := range s.gates.ofLanes {
			if gt.Match.Source == l.key.Source && gt.Match.group(g.key) {
				l.gates, g.lanesGated = append(l.gates, gt), true
			}
		}
	}
}

// gateGroup finds the gates of a new group.
func (s *Scheduler) gateGroup(g *group) {
	for _, gt := range s.gates.ofGroups {
		if gt.Match.group(g.key) {
			g.enterGate(gt)
		}
	}
}

func (g *group) enterGate(gt *gate) {
	gg := &groupGate{gate: gt, group: g}
	g.gates = append(g.gates, gg)
	gt.groups = append(gt.groups, gg)
}

// leaveGates takes a group that is dropped away from its gates.
func (g *group) leaveGates() {
	for _, gg := range g.gates {
		gg.gate.groups = slices.DeleteFunc(gg.gate.groups, func(other *groupGate) bool { return other == gg })
		gg.gate.line.drop(gg)
		gg.gate.waiters.drop(gg)
	}
	g.gates = nil
}

// gatesOf returns the gates of a queue behind a provider. For two kinds its mail
// needs sessions of its own: apart are those that count sessions, bars those for one
// source, which are not in all.
func (s *Scheduler) gatesOf(k *Key, provider string) (all, apart, bars []*gate) {
	for _, list := range [...][]*gate{s.gates.byTenant[k.Tenant], s.gates.byDomain[k.Domain]} {
		for _, gt := range list {
			switch {
			case !gt.Match.queue(k, provider):
			case gt.Match.ofMailOfASource():
				bars = append(bars, gt)
			default:
				all = append(all, gt)
				if gt.Slots {
					apart = append(apart, gt)
				}
			}
		}
	}
	return all, apart, bars
}

// regate finds the gates anew of all queues that something matches.
func (s *Scheduler) regate(m *Match, now time.Time) {
	var numbers []Queue
	for n, q := range s.queues {
		if q.site != nil && m.queue(&q.key, q.site.group.key.provider) {
			numbers = append(numbers, n)
		}
	}
	slices.Sort(numbers)
	for _, n := range numbers {
		q := s.queues[n]
		s.leave(q)
		if q.ready {
			s.join(q, now)
		}
	}
}

// recount gives a new gate the sessions that are open already.
func (s *Scheduler) recount(gt *gate) {
	m := &gt.Match
	if m.ofQueues() {
		return // mail that has such a gate has sessions of its own, from now on
	}
	for _, ss := range s.sessions {
		if (m.Source.IsZero() || m.Source == ss.lane.key.Source) && m.group(ss.lane.group.key) {
			ss.gates = append(slices.Clip(ss.gates), gt)
			gt.sessions++
		}
	}
}

// closeExcess ends idle sessions that a gate has too many of; others end after
// their message.
func (s *Scheduler) closeExcess(gt *gate) {
	if !gt.excess() {
		return
	}
	var idle []*session
	for _, ss := range s.sessions {
		if ss.state == parked && slices.Contains(ss.gates, gt) {
			idle = append(idle, ss)
		}
	}
	slices.SortFunc(idle, func(a, b *session) int { return int(a.id) - int(b.id) })
	most := gt.sessions - gt.Sessions
	if gt.NoSessions {
		most = len(idle)
	}
	for _, ss := range idle[:min(most, len(idle))] {
		s.unpark(ss)
		ss.state = closing
		s.goneIdle = append(s.goneIdle, ss.id)
		s.touchSite(ss.site)
	}
}
