package schedule

import "time"

// turn is the ready work of one tenant at one site.
type turn struct {
	member  *member
	site    *site
	strands []*strand
	ready   [ways]int // queues
	places  [ways]place
}

// strand is the ready work of one stream at one site; what only one lane may
// serve is a strand of its own.
type strand struct {
	flow   *flow
	turn   *turn
	pinned bool
	only   Lane
	head   *queue // of the ring of ready queues: the next one
	queues int    // that name it, ready or not
	open   stand
	posted *stand // at places at lanes
	posts  int    // of site.posts that it knows of
}

// serves reports whether the strand has work that a lane may carry; a nil lane
// is any.
func (f *strand) serves(way int, l *lane) bool {
	return f.head != nil && (way == general || f.flow.urgent()) && (!f.pinned || l == nil || f.only == l.key)
}

// best returns the strand whose turn it is within the tenant.
func (t *turn) best(way int, l *lane) *strand {
	var best *strand
	for _, f := range t.strands {
		if f.serves(way, l) && (best == nil || f.flow.before(best.flow)) {
			best = f
		}
	}
	return best
}

// best returns the strand whose turn it is at a site, of those that a lane may
// carry; nil: none.
func (st *site) best(way int, l *lane) *strand {
	p := st.orders[way].top()
	if p == nil {
		return nil
	}
	if f := p.turn.best(way, l); f != nil || st.pinned == 0 {
		return f
	}
	// The first tenant's work is all for other lanes.
	var best *strand
	for i := range st.orders[way].items {
		p := st.orders[way].items[i].place
		if best != nil && best.turn.member.accounts[way].before(p.account) {
			continue
		}
		if f := p.turn.best(way, l); f != nil {
			best = f
		}
	}
	return best
}

// attach gives a queue its place at the site of its domain's route.
func (s *Scheduler) attach(q *queue) {
	st, gates := s.siteOf(q)
	f := s.flow(st.group, &q.key)
	t := st.turns[f.member]
	if t == nil {
		t = &turn{member: f.member, site: st}
		for way := range t.places {
			t.places[way] = place{account: &f.member.accounts[way], turn: t}
		}
		st.turns[f.member] = t
	}
	var strd *strand
	for _, have := range t.strands {
		if have.flow == f && have.pinned == q.pinned && have.only == q.only {
			strd = have
		}
	}
	if strd == nil {
		strd = &strand{flow: f, turn: t, pinned: q.pinned, only: q.only}
		strd.open.set(strd, &st.seat)
		t.strands = append(t.strands, strd)
	}
	strd.queues++
	f.member.queues++
	q.site, q.strand, q.gates = st, strd, gates
}

// detach takes a queue that is not ready away from its site.
func (s *Scheduler) detach(q *queue) {
	f := q.strand
	if f == nil {
		return
	}
	q.site, q.strand, q.gates = nil, nil, nil
	f.flow.member.queues--
	if f.queues--; f.queues > 0 {
		return
	}
	f.leave()
	t := f.turn
	for i, other := range t.strands {
		if other == f {
			last := len(t.strands) - 1
			t.strands[i], t.strands[last] = t.strands[last], nil
			t.strands = t.strands[:last]
			break
		}
	}
	if len(t.strands) == 0 {
		delete(t.site.turns, t.member)
	}
}

// list puts a ready queue into the ring of its strand, behind the others.
func (s *Scheduler) list(q *queue, now time.Time) {
	f, st := q.strand, q.site
	g, m := st.group, f.flow.member
	if f.head == nil {
		q.next, q.prev, f.head = q, q, q
		f.enter()
		s.unaside(st) // another lane may do for this work
	} else {
		q.next, q.prev = f.head, f.head.prev
		q.prev.next, q.next.prev = q, q
	}
	f.flow.begin()
	if f.pinned {
		st.pinned++
	}
	for way := range ways {
		if way == reserved && !f.flow.urgent() {
			continue
		}
		if m.ready[way]++; m.ready[way] == 1 {
			g.passes[way].enter(&m.accounts[way])
		}
		if f.turn.ready[way]++; f.turn.ready[way] == 1 {
			st.orders[way].push(&f.turn.places[way])
		}
	}
	if st.backlog == 0 {
		st.since, st.servedAt = now, g.served
	}
	st.backlog += q.waiting
	q.tally(q.waiting)
	s.touchSite(st)
}

// unlist takes a queue out of its ring.
func (s *Scheduler) unlist(q *queue) {
	f, st := q.strand, q.site
	switch {
	case q.next == q:
		f.head = nil
	case f.head == q:
		f.head = q.next
	}
	q.prev.next, q.next.prev = q.next, q.prev
	q.next, q.prev = nil, nil
	f.flow.end()
	if f.pinned {
		st.pinned--
	}
	for way := range ways {
		if way == reserved && !f.flow.urgent() {
			continue
		}
		f.flow.member.ready[way]--
		if f.turn.ready[way]--; f.turn.ready[way] == 0 {
			st.orders[way].remove(&f.turn.places[way])
		}
	}
	st.backlog -= q.waiting
	q.tally(-q.waiting)
	if st.backlog == 0 {
		s.touchSite(st)
	}
	if f.head == nil && q.gates != nil {
		s.freeOthers(q)
	}
}

// passing returns the strand whose turn it is, with a head that passes its gates.
// Those that do not wait there from now on.
func (s *Scheduler) passing(st *site, l *lane, now time.Time) (int, *strand) {
	for {
		way := st.group.classes.choose(st.orders[reserved].len() > 0)
		f := st.best(way, l)
		if f == nil && way == reserved { // it is all for other lanes
			way = general
			f = st.best(way, l)
		}
		if f == nil {
			return way, nil
		}
		gt, until := f.head.heldAt(now)
		if gt == nil {
			return way, f
		}
		s.wait(f.head, gt, until)
	}
}

// pick takes the next queue of a site that the lane may serve, and charges it
// to all whose turn it was; nil: there is none.
func (s *Scheduler) pick(st *site, l *lane, now time.Time) *queue {
	g := st.group
	way, f := s.passing(st, l, now)
	if f == nil {
		return nil
	}
	q := f.head
	f.head = q.next
	g.classes.charge(way)
	g.passes[way].charge(&f.flow.member.accounts[way], messageCost)
	f.flow.serve()
	g.served++
	st.servedAt = g.served
	s.refresh(q.domain, now)
	st.since = now
	if q.waiting <= 1 {
		// Nothing more is known to wait; SetHead brings it back.
		s.deactivate(q)
	} else {
		s.setWaiting(q, q.waiting-1)
	}
	return q
}
