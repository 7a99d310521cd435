package schedule

// contest is the sites that could use something of which there is not enough
// for all: the room in a lane's rate, or connections. Each site stands for the
// tenant and stream whose turn it is there, so that the order of tenants counts
// and not the number of their sites. Sites of one stream take turns.
//
// Who has the turn at a site can change by what is served elsewhere; that is
// found out when the site comes first. Such a site may wait for one round more
// than it should.
type contest struct {
	entrants map[*member]*entrant
	order    order
}

// entrant is a tenant in a contest.
type entrant struct {
	place place
	lines []*line
	sites int
}

// line is the sites that stand for one stream.
type line struct {
	flow    *flow
	entrant *entrant
	head    *stake // of the ring of stakes: the next one
}

// stake is a site's part in a contest.
type stake struct {
	site       *site
	post       *post // the site's place at the lane, for a contest among idle sessions
	line       *line // nil: it takes no part
	next, prev *stake
}

// before reports whether k has its turn before the work of a stream at a site, by
// the same way: of one stream, the site goes first that was served longer ago.
func (k *stake) before(f *flow, way int, st *site) bool {
	if f == nil {
		return true
	}
	mine := k.line.flow
	switch {
	case mine.member != f.member:
		return mine.member.accounts[way].before(&f.member.accounts[way])
	case mine != f:
		return mine.before(f)
	}
	return k.site.servedAt < st.servedAt
}

// behind is before, but between tenants by more than a round: one that has
// sessions elsewhere is served by these, and needs no other one's.
func (k *stake) behind(f *flow, way int, st *site) bool {
	if f != nil && k.line.flow.member != f.member {
		return k.line.flow.member.accounts[way].round+1 < f.member.accounts[way].round
	}
	return k.before(f, way, st)
}

func (c *contest) empty() bool { return len(c.order.items) == 0 }

// set makes a site stand for a stream, nil for none.
func (c *contest) set(k *stake, f *flow, way int) {
	if k.line != nil && k.line.flow == f {
		return
	}
	if k.line != nil {
		c.leave(k)
	}
	if f != nil {
		c.join(k, f, way)
	}
}

func (c *contest) join(k *stake, f *flow, way int) {
	e := c.entrants[f.member]
	if e == nil {
		if c.entrants == nil {
			c.entrants = make(map[*member]*entrant)
		}
		e = &entrant{}
		e.place = place{account: &f.member.accounts[way], entrant: e}
		c.entrants[f.member] = e
	}
	var in *line
	for _, have := range e.lines {
		if have.flow == f {
			in = have
		}
	}
	if in == nil {
		in = &line{flow: f, entrant: e}
		e.lines = append(e.lines, in)
	}
	k.line = in
	if in.head == nil {
		k.next, k.prev, in.head = k, k, k
	} else {
		k.next, k.prev = in.head, in.head.prev
		k.prev.next, k.next.prev = k, k
	}
	if e.sites++; e.sites == 1 {
		c.order.push(&e.place)
	}
}

func (c *contest) leave(k *stake) {
	in := k.line
	switch {
	case k.next == k:
		in.head = nil
	case in.head == k:
		in.head = k.next
	}
	k.prev.next, k.next.prev = k.next, k.prev
	k.line, k.next, k.prev = nil, nil, nil
	if in.entrant.sites--; in.entrant.sites == 0 {
		c.order.remove(&in.entrant.place)
	}
}

// first returns the stake whose turn it is, nil if there is none. Whoever uses
// it moves the line on.
func (c *contest) first() *stake {
	p := c.order.top()
	if p == nil {
		return nil
	}
	var best *line
	for _, in := range p.entrant.lines {
		if in.head != nil && (best == nil || in.flow.before(best.flow)) {
			best = in
		}
	}
	return best.head
}

// forget drops what is kept of a tenant that takes no part.
func (c *contest) forget(m *member) {
	if e := c.entrants[m]; e != nil && e.sites == 0 {
		delete(c.entrants, m)
	}
}
