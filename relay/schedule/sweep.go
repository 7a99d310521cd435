package schedule

import (
	"slices"
	"time"
)

// sweepAge is how long a group must have been unused before its counters are
// dropped: longer than any rate's period, so that a rate cannot start anew by
// being forgotten.
const sweepAge = 25 * time.Hour

// Sweep forgets domains, sites and groups in which nothing waits and nothing
// is open. It visits everything; call it rarely.
func (s *Scheduler) Sweep(now time.Time) {
	s.sweepGroups(now)
	for name, d := range s.domains {
		if len(d.queues) == 0 && !d.resolving && d.wanted == nowhere && !d.route.Expires.After(now) && !d.refuse.After(now) {
			s.retries.remove(d)
			delete(s.domains, name)
		}
	}
}

func (s *Scheduler) sweepGroups(now time.Time) {
	for key, g := range s.groups {
		g.sweepSites(s, now)
		if len(g.order) > 0 {
			g.used = now
			continue
		}
		if now.Sub(g.used) < sweepAge || g.dirty {
			continue
		}
		for _, l := range g.lanes {
			s.timers.remove(l)
		}
		g.use.forget(g)
		g.leaveGates()
		delete(s.groups, key)
		p := s.pools[key.pool]
		for i, other := range p.groups {
			if other == g {
				p.groups = append(p.groups[:i], p.groups[i+1:]...)
				break
			}
		}
	}
	for name, u := range s.relays {
		if len(u.groups) == 0 && !u.freed {
			s.useTimers.remove(u)
			delete(s.relays, name)
		}
	}
}

func (g *group) sweepSites(s *Scheduler, now time.Time) {
	kept := g.order[:0]
	for _, st := range g.order {
		if st.inUse(now) {
			st.dropPosts(now)
			kept = append(kept, st)
			continue
		}
		s.siteTimers.remove(st)
		delete(g.sites, st.key)
	}
	clear(g.order[len(kept):])
	g.order = kept
	alone := true // nobody waits, so nobody is ahead of others
	for _, m := range g.members {
		alone = alone && m.queues == 0
	}
	for id, m := range g.members {
		if !alone && m.inUse(g) {
			continue
		}
		for way := range ways {
			g.open[way].forget(m)
			for _, l := range g.lanes {
				l.idle[way].forget(m)
			}
		}
		delete(g.members, id)
	}
}

// inUse reports whether something waits at the site or is known of it that
// counts.
func (st *site) inUse(now time.Time) bool {
	if len(st.turns) > 0 || st.open+st.opening > 0 || st.touched || st.aside || st.trial != nowhere || st.gateWait != nil || len(st.asideOn)+len(st.barredAt) > 0 || st.proven(now) {
		return true
	}
	for _, p := range st.posts {
		if p.backoff.After(now) {
			return true
		}
	}
	return false
}

// inUse reports whether the tenant has a queue in the group, or has been served
// ahead of others.
func (m *member) inUse(g *group) bool {
	if m.queues > 0 {
		return true
	}
	for way := range ways {
		if m.accounts[way].round > g.passes[way].round {
			return true
		}
	}
	return false
}

// dropPosts forgets the places at lanes that have no session and nothing else to
// remember.
func (st *site) dropPosts(now time.Time) {
	for i := len(st.posts) - 1; i >= 0; i-- {
		p := st.posts[i]
		if p.sessions > 0 || p.inRelay.on != nil || !p.lane.gone && p.backoff.After(now) {
			continue
		}
		delete(st.byLane, p.lane)
		st.posts = slices.Delete(st.posts, i, i+1)
		for _, t := range st.turns {
			for _, f := range t.strands {
				f.dropPost(p, i)
			}
		}
	}
}
