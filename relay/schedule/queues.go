package schedule

import (
	"slices"
	"time"

	"github.com/relais-mta/relais/shared/mailaddr"
	"github.com/relais-mta/relais/shared/policy"
)

// queue is a work queue as the scheduler sees it.
type queue struct {
	number   Queue
	key      Key
	domain   *domain
	site     *site   // of the domain's current route; nil without one
	strand   *strand // its place there
	only     Lane    // pinned: only this lane may serve it
	pinned   bool
	ready    bool    // its head is due; with a site it stands in its strand's ring
	waiting  int     // due recipients not yet picked, as far as known
	refusing bool    // stands in the list of refusals
	gates    []*gate // of its tenant and domain
	gated    *gate   // waits there, and so not in its strand's ring
	off      *putOff // refused where it was to begin; nil: not
	next     *queue
	prev     *queue
	timer    slot
}

func (q *queue) slot() *slot { return &q.timer }

// domain is a recipient domain with its route.
type domain struct {
	name      mailaddr.Domain
	route     Route
	routed    bool
	wanted    standing // in Scheduler.unrouted
	resolving bool
	refuse    time.Time // mail is refused until then: null MX or no such domain
	backoff   time.Time // no look-up before this
	queues    []*queue
	timer     slot
}

func (d *domain) slot() *slot { return &d.timer }

func (d *domain) standing() *standing { return &d.wanted }

// SetHead tells when the head of a queue is due and how many of its recipients
// wait at least; a zero due time says that nothing waits.
func (s *Scheduler) SetHead(n Queue, key Key, due time.Time, waiting int, now time.Time) {
	s.setHead(n, key, Lane{}, false, due, waiting, now)
}

// SetPinnedHead is SetHead for a queue that only one lane may serve, such as
// mail that a greylisting peer wants to see again from the same address.
func (s *Scheduler) SetPinnedHead(n Queue, key Key, only Lane, due time.Time, waiting int, now time.Time) {
	s.setHead(n, key, only, true, due, waiting, now)
}

func (s *Scheduler) setHead(n Queue, key Key, only Lane, pinned bool, due time.Time, waiting int, now time.Time) {
	q := s.queues[n]
	if q == nil {
		if due.IsZero() {
			return
		}
		d := s.domains[key.Domain]
		if d == nil {
			d = &domain{name: key.Domain}
			s.domains[key.Domain] = d
		}
		q = &queue{number: n, key: key, domain: d, only: only, pinned: pinned}
		d.queues = append(d.queues, q)
		s.queues[n] = q
	}
	if q.off != nil && !due.IsZero() {
		if due = q.off.after(due); !due.After(now) {
			q.off = nil
		}
	}
	if due.IsZero() || due.After(now) {
		s.deactivate(q)
		if due.IsZero() {
			s.due.remove(q)
			s.forget(q)
			return
		}
		s.due.set(q, due)
		return
	}
	s.due.remove(q)
	s.setWaiting(q, max(1, waiting))
	s.activate(q, now)
}

// setWaiting keeps the site's backlog equal to the sum over its ready queues.
func (s *Scheduler) setWaiting(q *queue, waiting int) {
	switch {
	case q.gated != nil:
		q.site.gated += waiting - q.waiting
		q.tally(waiting - q.waiting)
	case q.site != nil && q.ready:
		q.site.backlog += waiting - q.waiting
		q.tally(waiting - q.waiting)
	}
	q.waiting = waiting
}

// forget drops a queue in which nothing waits. Its domain stays until Sweep, so
// that the next message finds the route.
func (s *Scheduler) forget(q *queue) {
	s.detach(q)
	delete(s.queues, q.number)
	d := q.domain
	for i, other := range d.queues {
		if other == q {
			d.queues[i] = d.queues[len(d.queues)-1]
			d.queues = d.queues[:len(d.queues)-1]
			break
		}
	}
}

func (s *Scheduler) activate(q *queue, now time.Time) {
	s.setWaiting(q, max(1, q.waiting))
	if q.gated != nil {
		return
	}
	if q.ready && q.site != nil {
		s.touchSite(q.site) // there may be more of it
		return
	}
	d := q.domain
	switch {
	case d.routed:
		s.refresh(d, now)
		s.join(q, now)
	case d.refuse.After(now):
		q.ready = true
		s.refuseQueue(q)
	default:
		q.ready = true
		if d.backoff.After(now) {
			s.retries.set(d, d.backoff)
			return
		}
		s.wantRoute(d)
	}
}

func (s *Scheduler) refuseQueue(q *queue) {
	if !q.refusing {
		q.refusing = true
		s.refused = append(s.refused, q)
	}
}

// join puts a ready queue into its place at its domain's site.
func (s *Scheduler) join(q *queue, now time.Time) {
	if q.site == nil {
		s.attach(q)
	}
	q.ready = true
	s.list(q, now)
}

// deactivate takes a queue out of service until SetHead says it is due again.
func (s *Scheduler) deactivate(q *queue) {
	switch {
	case q.gated != nil:
		s.unwait(q)
	case q.ready && q.site != nil:
		s.unlist(q)
	}
	q.ready, q.waiting = false, 0
}

// refresh asks for a new route when the one in use is old.
func (s *Scheduler) refresh(d *domain, now time.Time) {
	if d.routed && !d.route.Expires.After(now) && !d.backoff.After(now) {
		s.wantRoute(d)
	}
}

// wantRoute has a domain looked up: those with transactional mail first, which
// must not wait until the domains of a backlog are found.
func (s *Scheduler) wantRoute(d *domain) {
	if d.resolving || d.wanted == urgent {
		return
	}
	s.unrouted.push(d, slices.ContainsFunc(d.queues, func(q *queue) bool {
		return q.ready && q.key.Kind == policy.Transactional
	}))
}

// resolved ends the look-up of a domain.
func (s *Scheduler) resolved(name mailaddr.Domain) *domain {
	d := s.domains[name]
	if d == nil || !d.resolving {
		return nil
	}
	d.resolving = false
	s.resolving--
	return d
}

// Routed ends a look-up with a route.
func (s *Scheduler) Routed(name mailaddr.Domain, route Route, now time.Time) {
	if d := s.resolved(name); d != nil {
		s.route(d, route, now)
	}
}

// Reroute replaces the route of a domain that has one, for when the table of
// providers changed and the MX set did not.
func (s *Scheduler) Reroute(name mailaddr.Domain, route Route, now time.Time) {
	if d := s.domains[name]; d != nil && d.routed {
		s.route(d, route, now)
	}
}

func (s *Scheduler) route(d *domain, route Route, now time.Time) {
	moved := d.routed && (d.route.Provider != route.Provider || d.route.Site != route.Site)
	d.route, d.routed, d.refuse, d.backoff = route, true, time.Time{}, time.Time{}
	for _, q := range d.queues {
		if moved && q.site != nil {
			s.leave(q)
		}
		if q.ready && q.site == nil {
			s.join(q, now)
		}
		if q.site != nil {
			q.site.group.shape(s, route.Shape, now)
			if q.site.families != route.Families {
				q.site.families = route.Families
				s.unaside(q.site)
			}
		}
	}
}

// leave takes a queue from its site without changing what waits in it.
func (s *Scheduler) leave(q *queue) {
	switch {
	case q.gated != nil:
		s.unwait(q)
	case q.ready:
		s.unlist(q)
	}
	s.detach(q)
}

// Unroutable ends a look-up that failed for now; the domain's mail waits until
// the given time. A domain that had a route keeps it meanwhile.
func (s *Scheduler) Unroutable(name mailaddr.Domain, until time.Time) {
	d := s.resolved(name)
	if d == nil {
		return
	}
	d.backoff = until
	if d.routed {
		d.route.Expires = until
		return
	}
	s.retries.set(d, until)
}

// Undeliverable ends a look-up that says that the domain takes no mail; until
// the given time its mail is refused without another look-up.
func (s *Scheduler) Undeliverable(name mailaddr.Domain, until time.Time) {
	d := s.resolved(name)
	if d == nil {
		return
	}
	d.routed, d.refuse = false, until
	for _, q := range d.queues {
		if q.site != nil {
			s.leave(q)
		}
		if q.ready {
			s.refuseQueue(q)
		}
	}
}

// Parked returns the queues of a domain that are due and wait for its route.
func (s *Scheduler) Parked(name mailaddr.Domain) []Queue {
	d := s.domains[name]
	if d == nil {
		return nil
	}
	var out []Queue
	for _, q := range d.queues {
		if q.ready && q.site == nil {
			out = append(out, q.number)
		}
	}
	return out
}
