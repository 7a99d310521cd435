package schedule

import (
	"time"

	"github.com/relais-mta/relais/shared/ids"
	"github.com/relais-mta/relais/shared/mailaddr"
	"github.com/relais-mta/relais/shared/policy"
)

// queue is a work queue as the scheduler sees it.
type queue struct {
	number   Queue
	key      Key
	domain   *domain
	site     *site // of the domain's current route; nil without one
	only     Lane  // pinned: only this lane may serve it
	pinned   bool
	ready    bool // its head is due
	waiting  int  // due recipients not yet picked, as far as known
	listed   bool // stands in the site's ring
	parked   bool // ready, but its domain has no route yet
	refusing bool // stands in the list of refusals
	timer    slot
}

func (q *queue) slot() *slot { return &q.timer }

// domain is a recipient domain with its route.
type domain struct {
	name      mailaddr.Domain
	route     Route
	routed    bool
	wanted    bool // stands in the list of look-ups to start
	resolving bool
	refuse    time.Time // mail is refused until then: null MX or no such domain
	backoff   time.Time // no look-up before this
	queues    []*queue
	timer     slot
}

func (d *domain) slot() *slot { return &d.timer }

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
	if q.site != nil && q.ready {
		q.site.backlog += waiting - q.waiting
	}
	q.waiting = waiting
}

// forget drops a queue in which nothing waits. Its domain stays until Sweep, so
// that the next message finds the route.
func (s *Scheduler) forget(q *queue) {
	if q.listed { // its ring entry is dropped when it is reached
		return
	}
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
	q.waiting = max(1, q.waiting)
	if q.ready && q.site != nil {
		s.touch(q.site.group)
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
		q.ready, q.parked = true, true
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

// join puts a ready queue into the ring of its domain's site.
func (s *Scheduler) join(q *queue, now time.Time) {
	st := s.siteOf(q)
	q.site, q.ready, q.parked = st, true, false
	if st.backlog == 0 {
		st.since = now
	}
	st.backlog += q.waiting
	if !q.listed {
		q.listed = true
		st.ring(q.key.Kind).push(q)
	}
	s.touch(st.group)
}

// deactivate takes a queue out of service until SetHead says it is due again.
func (s *Scheduler) deactivate(q *queue) {
	if q.ready && q.site != nil {
		q.site.backlog -= q.waiting
	}
	q.ready, q.parked, q.waiting = false, false, 0
}

// refresh asks for a new route when the one in use is old.
func (s *Scheduler) refresh(d *domain, now time.Time) {
	if d.routed && !d.route.Expires.After(now) && !d.backoff.After(now) {
		s.wantRoute(d)
	}
}

func (s *Scheduler) wantRoute(d *domain) {
	if d.wanted || d.resolving {
		return
	}
	d.wanted = true
	s.unrouted = append(s.unrouted, d)
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
				s.touch(q.site.group)
			}
		}
	}
}

// leave takes a queue from its site without changing what waits in it.
func (s *Scheduler) leave(q *queue) {
	if q.ready {
		q.site.backlog -= q.waiting
	}
	if q.listed {
		q.site.ring(q.key.Kind).drop(q)
		q.listed = false
	}
	q.site = nil
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
			q.parked = false
			s.refuseQueue(q)
		}
	}
}

// Waiting tells why nothing of the queue is in work, for people.
type Waiting struct {
	Reason string // due, resolve, dns, source, family, backoff, source-connections, relay-connections, sessions, rate, session; "": it is being worked on
	Until  time.Time
	Lane   Lane
	Site   string
}

// Why names the one thing a queue waits for.
func (s *Scheduler) Why(n Queue, now time.Time) Waiting {
	q := s.queues[n]
	if q == nil {
		return Waiting{}
	}
	d := q.domain
	switch {
	case !q.ready:
		return Waiting{Reason: "due", Until: q.timer.at}
	case !d.routed && d.backoff.After(now):
		return Waiting{Reason: "dns", Until: d.backoff}
	case q.site == nil:
		return Waiting{Reason: "resolve"}
	}
	return s.whySite(q, now)
}

func (s *Scheduler) whySite(q *queue, now time.Time) Waiting {
	g := q.site.group
	w := Waiting{Site: q.site.id}
	if len(g.lanes) == 0 {
		w.Reason = "source"
		return w
	}
	banned := false
	for _, l := range g.lanes {
		if q.pinned && l.key != q.only {
			continue
		}
		if q.site.rank(l) == ruledOut {
			banned = true
			continue
		}
		ready, reason := s.laneReady(l, q.site, true, now)
		w.Lane = l.key
		if reason == "" {
			return Waiting{Site: q.site.id, Lane: l.key, Reason: "session"}
		}
		if w.Reason == "" || ready.Before(w.Until) {
			w.Reason, w.Until = reason, ready
		}
	}
	if w.Reason == "" && banned {
		w.Reason = "family"
	}
	return w
}

// ring gives each tenant with ready queues of one site a turn, and each queue
// of the tenant a turn within it.
type ring struct {
	tenants map[ids.Tenant]*turns
	order   fifo[*turns]
}

type turns struct {
	tenant ids.Tenant
	queues fifo[*queue]
	listed bool
}

func (r *ring) push(q *queue) {
	if r.tenants == nil {
		r.tenants = make(map[ids.Tenant]*turns)
	}
	t := r.tenants[q.key.Tenant]
	if t == nil {
		t = &turns{tenant: q.key.Tenant}
		r.tenants[q.key.Tenant] = t
	}
	t.queues.push(q)
	if !t.listed {
		t.listed = true
		r.order.push(t)
	}
}

// drop removes a queue that leaves the site for good.
func (r *ring) drop(q *queue) {
	if t := r.tenants[q.key.Tenant]; t != nil {
		t.queues.remove(q)
	}
}

// pick returns the next queue that usable accepts and moves its tenant to the
// end; queues that are not ready any more leave the ring on the way. A tenant
// with none to offer loses its turn.
func (r *ring) pick(s *Scheduler, usable func(*queue) bool) *queue {
	for range r.order.len() {
		t, ok := r.order.pop()
		if !ok {
			return nil
		}
		q := t.pick(s, usable)
		if t.queues.len() == 0 {
			delete(r.tenants, t.tenant)
		} else {
			r.order.push(t)
		}
		if q != nil {
			return q
		}
	}
	return nil
}

func (t *turns) pick(s *Scheduler, usable func(*queue) bool) *queue {
	for range t.queues.len() {
		q, ok := t.queues.pop()
		if !ok {
			return nil
		}
		if !q.ready {
			q.listed = false
			if q.timer.index == 0 {
				s.forget(q)
			}
			continue
		}
		t.queues.push(q)
		if usable(q) {
			return q
		}
	}
	return nil
}

// fifo is a queue on a slice whose front is reused.
type fifo[T comparable] struct {
	items []T
	head  int
}

func (f *fifo[T]) len() int { return len(f.items) - f.head }

func (f *fifo[T]) push(x T) {
	if f.head > 0 && len(f.items) == cap(f.items) {
		n := copy(f.items, f.items[f.head:])
		clear(f.items[n:])
		f.items, f.head = f.items[:n], 0
	}
	f.items = append(f.items, x)
}

func (f *fifo[T]) pop() (T, bool) {
	var zero T
	if f.len() == 0 {
		return zero, false
	}
	x := f.items[f.head]
	f.items[f.head] = zero
	f.head++
	if f.head == len(f.items) {
		f.items, f.head = f.items[:0], 0
	}
	return x, true
}

func (f *fifo[T]) remove(x T) {
	for i := f.head; i < len(f.items); i++ {
		if f.items[i] == x {
			f.items = append(f.items[:i], f.items[i+1:]...)
			return
		}
	}
}

// kindIndex keeps transactional mail apart from all other mail.
func kindIndex(k policy.StreamKind) int {
	if k == policy.Transactional {
		return 0
	}
	return 1
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
