package schedule

import (
	"github.com/relais-mta/relais/shared/ids"
	"github.com/relais-mta/relais/shared/policy"
)

// Share is what the policy gives the mail of a stream. The zero Share has the
// default weights and priority 0.
type Share struct {
	TenantWeight int // of the tenant among all tenants; below 1: DefaultWeight
	StreamWeight int // of the stream among its tenant's streams of equal priority; below 1: DefaultWeight
	Priority     int // 0 to 100, among the streams of one tenant
}

// The shares of mail of which the policy says nothing.
const (
	DefaultWeight   = 10
	DefaultPriority = 50
	maxPriority     = policy.MaxPriority
)

// messageCost is what one message takes of a deficit: a tenant of the default
// weight has one message a round.
const messageCost = DefaultWeight

// maxLagRounds is how far a party may fall behind the rounds of the others, and
// so how much it can catch up: what its hosts were too slow to take it does not
// get later at the cost of others. It is more than a party loses that waits for
// a session, see losing, because that is ours to make good.
const maxLagRounds = 4 * minRun

// account is the place of one party in a deficit round robin. The party with
// the lowest round goes first, and within a round the one that came to it
// first. A message is paid from the deficit; a party that cannot pay the next
// one enters the next round, or as many as it needs, with one weight more each.
// So a session that can serve only some of the parties, because the others'
// mail goes to other hosts, still follows the order of all.
type account struct {
	weight  int
	deficit int
	round   uint64
	seq     uint64 // order of arrival in the round
}

// before reports whether a's turn is before b's.
func (a *account) before(b *account) bool {
	if a.round != b.round {
		return a.round < b.round
	}
	return a.seq < b.seq
}

// pass is the highest round of which anybody was served.
type pass struct{ round, seq uint64 }

// enter admits a party that had nothing to offer: it gets no credit for that
// time, nor does it lose what it has spent ahead.
func (p *pass) enter(a *account) {
	if a.round < p.round || a.seq == 0 {
		p.seq++
		a.round, a.seq = max(a.round, p.round), p.seq
		a.deficit = max(a.deficit, a.weight, messageCost)
	}
}

// lag is how many rounds a party is behind.
func (p *pass) lag(a *account) uint64 {
	if a.round >= p.round {
		return 0
	}
	return p.round - a.round
}

// charge books one message that costs so much.
func (p *pass) charge(a *account, cost int) {
	if a.round+maxLagRounds < p.round {
		a.round = p.round - maxLagRounds
	}
	p.round = max(p.round, a.round)
	a.deficit -= cost
	if a.deficit < cost {
		rounds := (cost - a.deficit + a.weight - 1) / a.weight
		a.deficit += rounds * a.weight
		a.round += uint64(rounds)
		p.seq++
		a.seq = p.seq
	}
}

// The two ways to a turn. Mail of transactional streams has both.
const (
	reserved = iota // the share kept for transactional mail
	general         // everything
	ways
)

// percent is what a decision between the two ways costs: each has its part of
// the turns, in percent.
const percent = 100

// classes shares the turns of a group between the two ways.
type classes struct {
	pass     pass
	accounts [ways]account
}

// setReserve gives the reserved way its part, 0 to 90 percent.
func (c *classes) setReserve(part int) {
	c.accounts[reserved].weight, c.accounts[general].weight = part, percent-part
	for i := range c.accounts {
		a := &c.accounts[i]
		a.deficit = max(a.deficit, percent)
	}
}

// choose returns the way that has the turn, of those that have work. The
// reserved one goes first in every round: its mail is urgent.
func (c *classes) choose(hasReserved bool) int {
	a, b := &c.accounts[reserved], &c.accounts[general]
	if hasReserved && a.weight > 0 && a.round <= b.round {
		return reserved
	}
	return general
}

// charge books a turn of a way.
func (c *classes) charge(way int) {
	if c.accounts[reserved].weight > 0 {
		c.pass.charge(&c.accounts[way], percent)
	}
}

// member is a tenant in a group: what it has taken of the group's rates and
// sessions, over all sites of the provider.
type member struct {
	id       ids.Tenant
	accounts [ways]account
	turns    uint64 // messages of the tenant that were started
	levels   []*level
	streams  []*stream
	ready    [ways]int // queues
	queues   int       // that name it, ready or not
}

// level is one priority of a tenant's streams. Its next turn is due a number of
// the tenant's turns after its last: the fewer the higher the priority.
type level struct {
	priority int
	due      uint64
	pass     pass // of its streams
	ready    int  // queues
}

// stream is a stream of a tenant in a group.
type stream struct {
	member  *member
	name    string
	kind    policy.StreamKind
	level   *level
	account account
	turns   uint64 // messages of the stream that were started
	flows   []*flow
	ready   int // queues
}

// flow is the mail of one priority of a stream. Its next turn is due a number of
// the stream's turns after its last, as that of a level among those of its
// tenant: so mail of the lowest priority moves on, whatever comes before it.
type flow struct {
	member   *member
	stream   *stream
	priority int
	due      uint64
	ready    int // queues
}

// before reports whether f has its turn before g, a flow of the same tenant:
// the level that is due first, the higher of two due at once, within a level by
// deficit round robin between streams, and within a stream as between levels.
func (f *flow) before(g *flow) bool {
	if f.stream == g.stream {
		if f.due != g.due {
			return f.due < g.due
		}
		return f.priority > g.priority
	}
	a, b := f.stream.level, g.stream.level
	if a == b {
		return f.stream.account.before(&g.stream.account)
	}
	if a.due != b.due {
		return a.due < b.due
	}
	return a.priority > b.priority
}

// dueAfter is when a party of a priority is due that had its turn now, or comes.
func dueAfter(turns uint64, priority int) uint64 { return turns + uint64(maxPriority-priority) }

// serve books one message of the flow.
func (f *flow) serve() {
	m, st, l := f.member, f.stream, f.stream.level
	m.turns++
	l.due = dueAfter(m.turns, l.priority)
	l.pass.charge(&st.account, messageCost)
	st.turns++
	f.due = dueAfter(st.turns, f.priority)
}

// begin and end count the ready queues of the flow.
func (f *flow) begin() {
	st, l := f.stream, f.stream.level
	if l.ready == 0 {
		l.due = max(l.due, dueAfter(f.member.turns, l.priority))
	}
	if st.ready == 0 {
		l.pass.enter(&st.account)
	}
	if f.ready == 0 {
		f.due = max(f.due, dueAfter(st.turns, f.priority))
	}
	f.ready++
	st.ready++
	l.ready++
}

func (f *flow) end() {
	f.ready--
	f.stream.ready--
	f.stream.level.ready--
}

// member returns a tenant's place in the group.
func (g *group) member(id ids.Tenant) *member {
	m := g.members[id]
	if m == nil {
		m = &member{id: id}
		for i := range m.accounts {
			m.accounts[i].weight = DefaultWeight
		}
		g.members[id] = m
	}
	return m
}

// flow returns the place of a queue's mail.
func (s *Scheduler) flow(g *group, key *Key) *flow {
	st, priority := s.stream(g, key), key.Priority.Number()
	for _, f := range st.flows {
		if f.priority == priority {
			return f
		}
	}
	f := &flow{member: st.member, stream: st, priority: priority}
	st.flows = append(st.flows, f)
	return f
}

func (s *Scheduler) stream(g *group, key *Key) *stream {
	m := g.member(key.Tenant)
	for _, st := range m.streams {
		if st.name == key.Stream && st.kind == key.Kind {
			return st
		}
	}
	st := &stream{member: m, name: key.Stream, kind: key.Kind}
	m.streams = append(m.streams, st)
	s.setShare(st)
	return st
}

// setShare takes over what the policy gives a stream.
func (s *Scheduler) setShare(st *stream) {
	share := Share{Priority: DefaultPriority}
	if s.shares != nil {
		share = s.shares(st.member.id, st.name, st.kind)
	}
	for i := range st.member.accounts {
		st.member.accounts[i].weight = weight(share.TenantWeight)
	}
	st.account.weight = weight(share.StreamWeight)
	l := st.member.level(min(max(share.Priority, 0), maxPriority))
	if st.level == l {
		return
	}
	if st.level != nil {
		st.level.ready -= st.ready
	}
	st.level = l
	st.account.round, st.account.seq = 0, 0
	l.pass.enter(&st.account)
	l.ready += st.ready
}

func weight(w int) int {
	if w < 1 {
		return DefaultWeight
	}
	return w
}

func (m *member) level(priority int) *level {
	for _, l := range m.levels {
		if l.priority == priority {
			return l
		}
	}
	l := &level{priority: priority, due: dueAfter(m.turns, priority)}
	m.levels = append(m.levels, l)
	return l
}

// SetShares tells how to find the share of a stream, and that the answers may
// have changed.
func (s *Scheduler) SetShares(of func(ids.Tenant, string, policy.StreamKind) Share) {
	s.shares = of
	for _, g := range s.groups {
		for _, m := range g.members {
			for _, st := range m.streams {
				s.setShare(st)
			}
		}
	}
}

// urgent reports whether the flow has a part in the reserve.
func (f *flow) urgent() bool { return f.stream.kind == policy.Transactional }
