package schedule

import (
	"slices"
	"time"
)

// serveTogether is serveIdle for lanes that have a rate in common: whose turn it
// is goes first, on whatever lane its session is.
func (s *Scheduler) serveTogether(g *group, now time.Time) {
	for {
		l, way, k := s.firstOfLanes(g, now)
		if k == nil || s.inLine(g, now) {
			return
		}
		if s.openInstead(l, way, k, now) {
			continue
		}
		// Behind the others: lanes take turns where nothing else decides.
		i, last := slices.Index(g.active, l), len(g.active)-1
		copy(g.active[i:], g.active[i+1:])
		g.active[last] = l
		s.dispatch(k, now)
	}
}

// firstOfLanes returns whose turn it is among the idle sessions of all lanes with
// room. The other lanes are left to their timers.
func (s *Scheduler) firstOfLanes(g *group, now time.Time) (*lane, int, *stake) {
	hasReserved := false
	kept := g.active[:0]
	for _, l := range g.active {
		idle := !l.idle[general].empty()
		if idle {
			if reason, until := g.laneHolds(l, false, now); reason != "" {
				s.wakeLane(l, until)
				idle = false
			}
		}
		if !idle {
			l.active = false
			continue
		}
		kept = append(kept, l)
		hasReserved = hasReserved || !l.idle[reserved].empty()
	}
	clear(g.active[len(kept):])
	g.active = kept
	way := g.classes.choose(hasReserved)
	var lead *lane
	var best *stake
	for _, l := range g.active {
		k := l.idle[way].first()
		if k != nil && (best == nil || k.before(best.strand.flow, way, best.seat.site)) {
			lead, best = l, k
		}
	}
	return lead, way, best
}
