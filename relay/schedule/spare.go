package schedule

// chain is the places with idle sessions and nothing for them to do, the one
// that has been so for longest first.
type chain struct{ first, last *link }

// link is a place's place in a chain.
type link struct {
	post       *post
	on         *chain
	prev, next *link
}

func (c *chain) push(k *link) {
	k.on, k.prev = c, c.last
	if c.last != nil {
		c.last.next = k
	} else {
		c.first = k
	}
	c.last = k
}

func (k *link) leave() {
	c := k.on
	if c == nil {
		return
	}
	if k.prev != nil {
		k.prev.next = k.next
	} else {
		c.first = k.next
	}
	if k.next != nil {
		k.next.prev = k.prev
	} else {
		c.last = k.prev
	}
	k.on, k.prev, k.next = nil, nil, nil
}

// noteSpare keeps the chains right.
func (s *Scheduler) noteSpare(g *group, p *post) {
	spare := len(p.idle) > 0 && !p.seat.usable
	if spare == (p.inRelay.on != nil) {
		return
	}
	if !spare {
		p.inRelay.leave()
		p.inGroup.leave()
		return
	}
	s.spare.push(&p.inRelay)
	g.spare.push(&p.inGroup)
	if g.use.waiters.len() > 0 {
		s.free(g.use)
	}
	for _, gt := range p.idle[0].gates {
		if gt.waiters.len()+gt.sites.len() > 0 {
			s.freeGate(gt)
		}
	}
}

// stealIdle ends one idle session without work, of those whose end makes room
// in the limit that holds a group, so that another site gets its turn. While
// one is ending no other is.
func (s *Scheduler) stealIdle(g *group, reason string) {
	switch reason {
	case holdSessions:
		if k := s.spare.first; k != nil && s.closing == 0 {
			s.closeSpare(k.post)
		}
	case holdRelayConnections, holdProviderShare:
		if !g.relayFull() && !reached(g.use.sessions, part(s.limits.MaxSessions, s.limits.ProviderShare)) {
			return // it is the connections being opened that are too many
		}
		for _, other := range g.use.groups {
			if k := other.spare.first; k != nil && g.use.closing == 0 {
				s.closeSpare(k.post)
				return
			}
		}
	case holdSourceConnections:
		for k := g.spare.first; k != nil && g.closing == 0; k = k.next {
			if l := k.post.lane; g.laneFull(l) && (len(g.free) == 0 || l.aside.len() > 0) {
				s.closeSpare(k.post)
				return
			}
		}
	}
}

// closeSpare ends the session of a place that has been idle for longest.
func (s *Scheduler) closeSpare(p *post) {
	if len(p.idle) == 0 {
		return // it will be noted
	}
	ss := p.idle[0]
	s.unpark(ss)
	s.closeIdle(ss)
	s.noteSpare(ss.lane.group, p)
}
