package schedule

import "time"

// sweepAge is how long a group must have been unused before its counters are
// dropped: longer than any rate's period, so that a rate cannot start anew by
// being forgotten.
const sweepAge = 25 * time.Hour

// Sweep forgets domains, sites and groups in which nothing waits and nothing
// is open. It visits everything; call it rarely.
func (s *Scheduler) Sweep(now time.Time) {
	s.sweepGroups(now)
	for name, d := range s.domains {
		if len(d.queues) == 0 && !d.resolving && !d.wanted && !d.route.Expires.After(now) && !d.refuse.After(now) {
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
		s.timers.remove(g)
		delete(s.groups, key)
		p := s.pools[key.pool]
		for i, other := range p.groups {
			if other == g {
				p.groups = append(p.groups[:i], p.groups[i+1:]...)
				break
			}
		}
	}
	for name, use := range s.relays {
		if use.groups(s, name) == 0 {
			delete(s.relays, name)
		}
	}
}

func (u *providerUse) groups(s *Scheduler, provider string) (n int) {
	for id := range s.pools {
		if s.groups[groupKey{id, provider}] != nil {
			n++
		}
	}
	return n
}

func (g *group) sweepSites(s *Scheduler, now time.Time) {
	kept := g.order[:0]
	for _, st := range g.order {
		for i := range st.rings {
			// A round in which nothing is usable drops what is not ready.
			st.rings[i].pick(s, func(*queue) bool { return false })
		}
		for l, until := range st.backoff {
			if !until.After(now) {
				delete(st.backoff, l)
			}
		}
		if st.backlog == 0 && st.open+st.opening == 0 && len(st.backoff) == 0 && st.rings[0].order.len() == 0 && st.rings[1].order.len() == 0 {
			delete(g.sites, st.id)
			continue
		}
		kept = append(kept, st)
	}
	clear(g.order[len(kept):])
	g.order = kept
	g.cursor = 0
}
