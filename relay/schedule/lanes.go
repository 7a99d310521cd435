package schedule

import "time"

// LaneState is a lane with what holds it at a time.
type LaneState struct {
	LaneInfo
	Hold  string    // what keeps due work of the lane from a session: a word as in Waiting; "": none is due, or it is served
	Gate  GateID    // that holds it; else zero
	Until time.Time // when that ends, if it is known
	Since time.Time // a recipient of the lane's work has waited at least since then; zero: none waits
}

// LaneStates is Lanes with what holds each. Work that any lane of a group may
// carry counts for all of them.
func (s *Scheduler) LaneStates(now time.Time) []LaneState {
	lanes := s.Lanes()
	out := make([]LaneState, 0, len(lanes))
	for _, info := range lanes {
		st := LaneState{LaneInfo: info}
		if g := s.groups[groupKey{info.Pool, info.Lane.Provider}]; g != nil && info.Waiting > 0 {
			s.hold(g, &st, now)
		}
		out = append(out, st)
	}
	return out
}

// hold finds what the lane waits for: of the sites that have work for it the one
// that is served first, because that ends the wait.
func (s *Scheduler) hold(g *group, l *LaneState, now time.Time) {
	served := false
	for _, st := range g.order {
		if st.backlog == 0 {
			if st.gated > 0 && l.Hold == "" && !served {
				_, until := st.gatedBy.holdsMessage(now)
				l.Hold, l.Until, l.Gate = st.gatedBy.Reason, until, st.gatedBy.ID
			}
			continue
		}
		if l.Since.IsZero() || st.since.Before(l.Since) {
			l.Since = st.since
		}
		if served {
			continue
		}
		w := s.whySite(&queue{site: st, only: l.Lane, pinned: true}, now)
		switch {
		case w.Reason == "session": // it is next, or is being served
			l.Hold, l.Until, l.Gate, served = "", time.Time{}, GateID{}, true
		case l.Hold == "" || !w.Until.IsZero() && (l.Until.IsZero() || w.Until.Before(l.Until)):
			l.Hold, l.Until, l.Gate = w.Reason, w.Until, w.Gate
		}
	}
}
