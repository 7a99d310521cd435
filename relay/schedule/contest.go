package schedule

// contest is the sites that could use something of which there is not enough
// for all: the room in a lane's rate, or connections. Each site stands there for
// every stream with work for it, so that the order of tenants counts and not the
// number of their sites, and nobody is hidden by another one's mail for the same
// hosts. Sites of one stream take turns.
//
// What cannot be used any more is left standing until it comes first. It then
// waits at its seat, and comes back when that can be used: a site that is busy
// and idle in turn costs nothing but for those whose turn came meanwhile.
type contest struct {
	entrants map[*member]*entrant
	order    order
}

// entrant is a tenant in a contest.
type entrant struct {
	place  place
	lines  []*line
	stakes int
}

// line is what stands for one stream, the next one first.
type line struct {
	flow    *flow
	entrant *entrant
	ring    ring
}

// seat is a site's place in a contest: that for one more session, or that among
// the idle sessions of a lane.
type seat struct {
	site   *site
	post   *post // of the lane; nil: for one more session
	in     *[ways]contest
	usable bool // when it was evaluated last
	out    ring // of stakes that came first while it could not be used
}

// live reports whether the seat can be used now.
func (t *seat) live() bool { return t.usable && (t.post == nil || len(t.post.idle) > 0) }

// evaluated notes whether a seat can be used, and has those that wait for it
// take part again.
func (t *seat) evaluated(usable bool) {
	t.usable = usable
	if !t.live() {
		return
	}
	for k := t.out.head; k != nil; k = t.out.head {
		t.out.remove(k)
		k.waits = false
		k.enter()
	}
}

// stake is the part of a strand in a contest.
type stake struct {
	strand *strand
	seat   *seat
	way    int
	line   *line // nil: it takes no part
	waits  bool  // in seat.out
	next   *stake
	prev   *stake
}

// ring is stakes that take turns.
type ring struct{ head *stake }

// push adds a stake behind all others.
func (r *ring) push(k *stake) {
	if r.head == nil {
		k.next, k.prev, r.head = k, k, k
		return
	}
	k.next, k.prev = r.head, r.head.prev
	k.prev.next, k.next.prev = k, k
}

func (r *ring) remove(k *stake) {
	switch {
	case k.next == k:
		r.head = nil
	case r.head == k:
		r.head = k.next
	}
	k.prev.next, k.next.prev = k.next, k.prev
	k.next, k.prev = nil, nil
}

// live reports whether there is work that the seat can be used for.
func (k *stake) live() bool { return k.strand.head != nil && k.seat.live() }

// enter has a stake take part, or wait until its seat can be used. Without work
// it does neither, until there is some.
func (k *stake) enter() {
	switch {
	case k.line != nil || k.waits || k.strand.head == nil:
	case k.seat.live():
		k.seat.in[k.way].join(k)
	default:
		k.waits = true
		k.seat.out.push(k)
	}
}

// leave takes a stake away from where it stands.
func (k *stake) leave() {
	switch {
	case k.line != nil:
		k.seat.in[k.way].leave(k)
	case k.waits:
		k.waits = false
		k.seat.out.remove(k)
	}
}

// pass gives the next turn of the stream to another site.
func (k *stake) pass() { k.line.ring.head = k.next }

// before reports whether k has its turn before the work of a stream at a site, by
// the same way: of one stream, the site goes first that was served longer ago.
func (k *stake) before(f *flow, way int, st *site) bool {
	if f == nil {
		return true
	}
	mine := k.strand.flow
	switch {
	case mine.member != f.member:
		return mine.member.accounts[way].before(&f.member.accounts[way])
	case mine != f:
		return mine.before(f)
	}
	return k.seat.site.servedAt < st.servedAt
}

// behind is before, but between tenants by more than a round: one that has
// sessions elsewhere is served by these, and needs no other one's.
func (k *stake) behind(f *flow, way int, st *site) bool {
	if mine := k.strand.flow; f != nil && mine.member != f.member {
		return mine.member.accounts[way].round+1 < f.member.accounts[way].round
	}
	return k.before(f, way, st)
}

// losing reports whether a tenant or stream waits for the first session to a host
// and falls so far behind that it would soon lose turns for good. Runs of others
// end early then, if there is a rate: it is turns that are short, and not the time
// that opening a session takes.
func (k *stake) losing(way int) bool {
	st, f := k.seat.site, k.strand.flow
	return st.open+st.opening == 0 &&
		(st.group.passes[way].lag(&f.member.accounts[way]) > maxLagRounds/2 || f.stream.level.pass.lag(&f.stream.account) > maxLagRounds/2)
}

func (c *contest) empty() bool { return c.first() == nil }

func (c *contest) join(k *stake) {
	f := k.strand.flow
	e := c.entrants[f.member]
	if e == nil {
		if c.entrants == nil {
			c.entrants = make(map[*member]*entrant)
		}
		e = &entrant{}
		e.place = place{account: &f.member.accounts[k.way], entrant: e}
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
	in.ring.push(k)
	if e.stakes++; e.stakes == 1 {
		c.order.push(&e.place)
	}
}

func (c *contest) leave(k *stake) {
	e := k.line.entrant
	k.line.ring.remove(k)
	k.line = nil
	if e.stakes--; e.stakes == 0 {
		c.order.remove(&e.place)
	}
}

// first returns the stake whose turn it is, nil if there is none. Whoever uses
// it moves the line on.
func (c *contest) first() *stake {
	for {
		p := c.order.top()
		if p == nil {
			return nil
		}
		var best *line
		for _, in := range p.entrant.lines {
			if in.ring.head != nil && (best == nil || in.flow.before(best.flow)) {
				best = in
			}
		}
		k := best.ring.head
		if k.live() {
			return k
		}
		c.leave(k)
		k.enter() // waits for its seat, if it has work
	}
}

// forget drops what is kept of a tenant that takes no part.
func (c *contest) forget(m *member) {
	if e := c.entrants[m]; e != nil && e.stakes == 0 {
		delete(c.entrants, m)
	}
}
