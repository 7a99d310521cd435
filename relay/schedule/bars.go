package schedule

import (
	"slices"
	"time"
)

// A bar is a gate for some mail of one source. It keeps lanes from sites: mail that
// has bars is a site of its own at its hosts, and its sessions carry no other. So its
// other lanes, and the other mail of the lane, go on as if it was not there.

// bar returns what keeps the mail of a site from a lane now, nil if nothing does,
// and until when if that is known.
func (st *site) bar(lane Lane, now time.Time) (*gate, time.Time) {
	for _, gt := range st.bars {
		if gt.Match.Source != lane.Source {
			continue
		}
		if reason, until := gt.holdsMessage(now); reason != "" {
			return gt, until
		}
	}
	return nil, time.Time{}
}

// shutTo reports whether a bar keeps the mail of a site from a lane now.
func (st *site) shutTo(lane Lane, now time.Time) bool {
	gt, _ := st.bar(lane, now)
	return gt != nil
}

// barred is shutTo for a site that would use the lane. It has it wait for the bar, if
// that is for a rate; what shuts one has its owner open it.
func (s *Scheduler) barred(st *site, l *lane, now time.Time) bool {
	gt, until := st.bar(l.key, now)
	if gt == nil {
		return false
	}
	if !gt.NoMessages {
		if !slices.Contains(st.barredAt, gt) {
			st.barredAt = append(st.barredAt, gt)
			gt.barred.push(st)
		}
		s.wakeGate(gt, until)
	}
	return true
}

// unbar has the site that has waited longest for the rate of a bar looked at.
func (s *Scheduler) unbar(gt *gate) *site {
	st, _ := gt.barred.pop()
	if i := slices.Index(st.barredAt, gt); i >= 0 {
		st.barredAt = slices.Delete(st.barredAt, i, i+1)
	}
	s.unaside(st)
	s.touchSite(st)
	return st
}

// freeBar has all sites looked at whose mail a bar may keep from its lane, because
// its owner changed it.
func (s *Scheduler) freeBar(gt *gate) {
	if !gt.Match.ofMailOfASource() {
		return
	}
	for gt.barred.len() > 0 {
		s.unbar(gt)
	}
	s.eachGroup(func(g *group) {
		for _, st := range g.order {
			if slices.Contains(st.bars, gt) {
				s.unaside(st)
				s.touchSite(st)
			}
		}
	})
}

// barredApart reports whether all sessions of a site are on lanes that bars keep
// its mail from.
func (st *site) barredApart(now time.Time) bool {
	if len(st.bars) == 0 {
		return false
	}
	for _, p := range st.posts {
		if p.sessions > 0 && !st.shutTo(p.lane.key, now) {
			return false
		}
	}
	return true
}
