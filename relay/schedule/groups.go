package schedule

import (
	"fmt"
	"slices"
	"sort"
	"time"

	"github.com/relais-mta/relais/shared/ids"
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
// Fairness between tenants and streams holds over all of it.
type group struct {
	key     groupKey
	limits  Shape
	use     *providerUse
	lanes   []*lane
	mixed   bool // sources of both address families
	sites   map[string]*site
	order   []*site
	gates   []*groupGate
	members map[ids.Tenant]*member
	passes  [ways]pass
	classes classes
	used    time.Time // when Sweep last saw it in use

	touched []*site       // something happened to them
	active  []*lane       // may have room for messages of idle sessions
	open    [ways]contest // sites that want one more session
	free    []*lane       // may have room for one more session
	served  uint64        // messages that were started
	asides  int           // sites that wait for a particular lane
	spare   chain
	closing int
	dirty   bool

	inLine    bool     // stands in use.line
	inWaiters bool     // stands in use.waiters
	queued    standing // in Scheduler.waiters
	rateTurn  bool     // may take one message before those in use.line
	useTurn   bool     // may open one session before those in use.waiters
	relayTurn bool     // may open one session before those in Scheduler.waiters
	gateTurn  *gate    // may pass it once before those that wait there

	waiting    int  // recipients known to be due, over all sites
	lanesGated bool // some lane has a gate of its own
}

func (g *group) standing() *standing { return &g.queued }

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
	gates    []*gate
	gone     bool // the source left the pool; sessions end at the next chance

	idle   [ways]contest // sites with work and an idle session of the lane
	active bool          // stands in group.active
	free   bool          // stands in group.free
	aside  fifo[*site]   // sites that only this lane or one like it can serve
	timer  slot          // when its rates have room again
}

func (l *lane) slot() *slot { return &l.timer }

// providerUse counts what all lanes of the relay do towards one provider.
type providerUse struct {
	groups   []*group
	sessions int
	opening  int
	closing  int
	messages throttle.Bucket
	connects throttle.Bucket
	line     fifo[*group] // held by the relay's message rate
	waiters  fifo[*group] // held by the relay's or its share's connections, or their rate
	freed    bool         // stands in Scheduler.freed
	timer    slot         // when the rates have room again
}

func (u *providerUse) slot() *slot { return &u.timer }

// site is one set of MX hosts within a group.
type site struct {
	id       string
	key      string // in group.sites
	group    *group
	gates    []*gate // count its sessions, because of its mail's tenant or domain
	bars     []*gate // keep its mail from particular lanes, likewise
	barredAt []*gate // of these, those where it waits for their rate
	families Families
	turns    map[*member]*turn
	orders   [ways]order
	pinned   int       // ready queues that only one lane may serve
	backlog  int       // recipients known to wait in ready queues
	gated    int       // likewise in queues that wait at a gate
	gatedBy  *gate     // one such gate
	since    time.Time // a recipient has waited at least since then
	servedAt uint64    // group.served when it last had a turn, or got work
	open     int       // sessions that are connected
	opening  int
	idle     int // sessions
	posts    []*post
	byLane   map[*lane]*post

	window   int       // sessions that the host's speed deserves
	heardAt  time.Time // when it last took a message, or answered to one
	provedAt time.Time // when it last did so promptly; zero: it has been slow since

	seat      seat     // in group.open
	aside     bool     // no lane with room can serve it
	asideOn   []*lane  // where it is listed
	trial     standing // in Scheduler.trials
	trialTurn bool     // may open one session before those there
	gateWait  *gate    // wants a session that it does not let pass
	gateTurn  *gate    // may pass it once before those that wait there
	touched   bool
	timer     slot
}

func (st *site) slot() *slot { return &st.timer }

func (st *site) standing() *standing { return &st.trial }

// post is a site's place at a lane.
type post struct {
	lane     *lane
	sessions int
	idle     []*session // the most recently used last
	backoff  time.Time
	seat     seat // in lane.idle
	inRelay  link // in Scheduler.spare
	inGroup  link // in group.spare
}

func (st *site) post(l *lane) *post {
	p := st.byLane[l]
	if p == nil {
		p = &post{lane: l}
		p.inRelay.post, p.inGroup.post = p, p
		p.seat = seat{site: st, post: p, in: &l.idle}
		st.byLane[l] = p
		st.posts = append(st.posts, p)
		st.enterPost()
	}
	return p
}

// backingOff reports whether a lane leaves the site alone.
func (st *site) backingOff(l *lane, now time.Time) bool {
	p := st.byLane[l]
	return p != nil && p.backoff.After(now)
}

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
	g.lanes, g.mixed = nil, false
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
		g.mixed = g.mixed || l.ipv6 != g.lanes[0].ipv6
	}
	for _, l := range old {
		l.gone = true
	}
	for _, l := range g.lanes {
		l.gone = false
	}
	for _, l := range old {
		if !l.gone {
			continue
		}
		s.timers.remove(l)
		for st, ok := l.aside.pop(); ok; st, ok = l.aside.pop() {
			st.dropAside(l)
		}
	}
	s.gateLanes(g)
	s.closeGone(g)
	s.revise(g)
}

// closeGone ends the idle sessions of lanes that left the pool.
func (s *Scheduler) closeGone(g *group) {
	for _, st := range g.order {
		for _, p := range st.posts {
			for p.lane.gone && len(p.idle) > 0 {
				ss := p.idle[len(p.idle)-1]
				s.unpark(ss)
				ss.state = closing
				s.goneIdle = append(s.goneIdle, ss.id)
			}
		}
	}
}

// revise looks at everything in a group anew, after a change of its lanes or
// limits.
func (s *Scheduler) revise(g *group) {
	for _, l := range g.free {
		l.free = false
	}
	clear(g.free)
	g.free = g.free[:0]
	for _, l := range g.lanes {
		l.free = true
		g.free = append(g.free, l)
		s.activateLane(l)
	}
	for _, st := range g.order {
		s.unaside(st)
		s.touchSite(st)
	}
	s.touch(g)
	s.free(g.use)
}

// siteOf returns the site of a queue whose domain is routed, making group and
// site when they are new.
func (s *Scheduler) siteOf(q *queue) (*site, []*gate) {
	route := &q.domain.route
	g := s.groups[groupKey{q.key.Pool, route.Provider}]
	if g == nil {
		g = s.newGroup(groupKey{q.key.Pool, route.Provider}, route.Shape)
	}
	gates, apart, bars := s.gatesOf(&q.key, route.Provider)
	key := route.Site
	for _, list := range [...][]*gate{apart, bars} {
		for _, gt := range list {
			key = fmt.Sprintf("%s\x00%s%d", key, gt.ID.Owner, gt.ID.Number)
		}
	}
	st := g.sites[key]
	if st == nil {
		st = &site{id: route.Site, key: key, group: g, turns: make(map[*member]*turn), byLane: make(map[*lane]*post), window: 1}
		st.seat = seat{site: st, in: &g.open}
		g.sites[key] = st
		g.order = append(g.order, st)
	}
	st.families = route.Families
	st.gates, st.bars = apart, bars // a gate may be another one by the same number
	return st, gates
}

func (s *Scheduler) newGroup(key groupKey, shape Shape) *group {
	use := s.relays[key.provider]
	if use == nil {
		use = &providerUse{messages: bucket(shape.RelayMessageRate), connects: bucket(shape.RelayConnectionRate)}
		s.relays[key.provider] = use
	}
	g := &group{key: key, limits: shape, use: use, sites: make(map[string]*site), members: make(map[ids.Tenant]*member)}
	g.classes.setReserve(s.limits.TransactionalReserve)
	use.groups = append(use.groups, g)
	s.groups[key] = g
	p := s.poolOf(key.pool)
	p.groups = append(p.groups, g)
	s.gateGroup(g)
	s.setLanes(g, p.sources)
	return g
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
	s.revise(g)
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

// forget drops a provider's group for good.
func (u *providerUse) forget(g *group) {
	if i := slices.Index(u.groups, g); i >= 0 {
		u.groups = slices.Delete(u.groups, i, i+1)
	}
}
