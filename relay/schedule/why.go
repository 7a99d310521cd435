package schedule

import (
	"time"

	"github.com/relais-mta/relais/shared/mailaddr"
)

// Waiting tells why nothing of the queue is in work, for people.
type Waiting struct {
	Reason string // due, resolve, dns, source, family, backoff, rate, source-connections, unproven, relay-connections, provider-share, sessions, connects, session; "": it is being worked on
	Until  time.Time
	Lane   Lane
	Site   string
	Hold   Hold   // of what somebody outside refused; else zero
	Gate   GateID // that holds it; else zero
}

// Why names the one thing a queue waits for.
func (s *Scheduler) Why(n Queue, now time.Time) Waiting {
	q := s.queues[n]
	if q == nil {
		return Waiting{}
	}
	d := q.domain
	switch {
	case !q.ready && q.off != nil && q.off.until.After(now):
		return Waiting{Reason: q.off.hold.Reason, Until: q.off.until, Hold: q.off.hold}
	case !q.ready:
		return Waiting{Reason: "due", Until: q.timer.at}
	case !d.routed && d.backoff.After(now):
		return Waiting{Reason: "dns", Until: d.backoff}
	case q.site == nil:
		return Waiting{Reason: "resolve"}
	}
	if gt, until := q.heldAt(now); gt != nil {
		return Waiting{Reason: gt.Reason, Until: until, Site: q.site.id, Lane: Lane{Provider: q.site.group.key.provider}, Gate: gt.ID}
	}
	return s.whySite(q, now)
}

// gateOf returns the gate that gives a lane the reason to wait, if one does.
func (st *site) gateOf(l *lane, reason string, now time.Time) GateID {
	for _, gt := range l.gates {
		if r, _ := gt.holds(true, now); r == reason {
			return gt.ID
		}
	}
	for _, gt := range st.gates {
		if r, _ := gt.holdsSession(now); r == reason {
			return gt.ID
		}
	}
	for _, gg := range st.group.gates {
		if r, _ := gg.gate.holds(true, now); r == reason {
			return gg.gate.ID
		}
	}
	return GateID{}
}

func (s *Scheduler) whySite(q *queue, now time.Time) Waiting {
	g := q.site.group
	w := Waiting{Site: q.site.id}
	if len(g.lanes) == 0 {
		w.Reason = "source"
		return w
	}
	banned := false
	var barred Waiting // named if no other lane is nearer
	for _, l := range g.lanes {
		if q.pinned && l.key != q.only {
			continue
		}
		if q.site.rank(l) == ruledOut {
			banned = true
			continue
		}
		if gt, until := q.site.bar(l.key, now); gt != nil {
			if barred.Reason == "" || !until.IsZero() && (barred.Until.IsZero() || until.Before(barred.Until)) {
				barred = Waiting{Site: q.site.id, Lane: l.key, Reason: gt.Reason, Until: until, Gate: gt.ID}
			}
			continue
		}
		reason, until := s.laneReady(l, q.site, true, now)
		if reason == "" {
			return Waiting{Site: q.site.id, Lane: l.key, Reason: "session"}
		}
		// The lane that is ready first; a time that is known says more.
		if w.Reason == "" || !until.IsZero() && (w.Until.IsZero() || until.Before(w.Until)) {
			w.Lane, w.Reason, w.Until, w.Gate = l.key, reason, until, q.site.gateOf(l, reason, now)
		}
	}
	switch {
	case w.Reason != "":
	case barred.Reason != "":
		return barred
	case banned:
		w.Reason = "family"
	}
	return w
}

// DomainWaits names what mail for a domain waits for, "" if nothing is known.
func (s *Scheduler) DomainWaits(name mailaddr.Domain, now time.Time) string {
	d := s.domains[name]
	if d == nil {
		return ""
	}
	for _, q := range d.queues {
		if w := s.Why(q.number, now); w.Reason != "" {
			return w.Reason
		}
	}
	return ""
}
