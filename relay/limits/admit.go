package limits

import (
	"cmp"
	"slices"
	"time"

	"github.com/relais-mta/relais/relay"
	"github.com/relais-mta/relais/relay/engine"
	"github.com/relais-mta/relais/relay/schedule"
	"github.com/relais-mta/relais/shared/lease"
	"github.com/relais-mta/relais/shared/throttle"
)

// maxMatched is how many limits of one kind the work of one place usually has at
// most; more cost an allocation.
const maxMatched = 8

// wall is an instant for what counts in times; it is no time of the day.
func wall(at lease.Instant) time.Time { return time.Unix(0, int64(at)) }

// Connect asks every limit of connections for one.
func (l *Limits) Connect(now time.Time, p *engine.Place) engine.Hold {
	t := l.table.Load()
	if !t.kinds[lease.Slots] {
		return engine.Hold{}
	}
	var room [maxMatched]*limit
	matched := t.match(lease.Slots, p, room[:0])
	if len(matched) == 0 {
		return engine.Hold{}
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	at := l.cfg.Clock()
	for i, lim := range matched {
		r := l.rightsOf(lim)
		if r.Opened() < lim.Max && r.Open(at) {
			lim.used++
			continue
		}
		lim.denied++
		for _, before := range matched[:i] {
			before.rights.Close()
		}
		l.wake()
		return hold(lim, now, -1)
	}
	s := &session{place: p, slots: make([]*lease.Rights, len(matched))}
	for i, lim := range matched {
		s.slots[i] = lim.rights
	}
	l.opened++
	s.seq = l.opened
	l.sessions[p] = s
	return engine.Hold{}
}

// Closed gives the connections of a session back.
func (l *Limits) Closed(_ time.Time, p *engine.Place) {
	l.mu.Lock()
	s := l.sessions[p]
	if s != nil {
		delete(l.sessions, p)
		for _, r := range s.slots {
			r.Close()
		}
	}
	l.mu.Unlock()
	if s != nil {
		l.wake() // it may have been one too many
	}
}

// Begin asks every limit of messages for one: all or none.
func (l *Limits) Begin(now time.Time, p *engine.Place) engine.Hold {
	t := l.table.Load()
	if !t.kinds[lease.Rate] {
		return engine.Hold{}
	}
	var room [maxMatched]*limit
	matched := t.match(lease.Rate, p, room[:0])
	if len(matched) == 0 {
		return engine.Hold{}
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	at := l.cfg.Clock()
	when := wall(at)
	for i, lim := range matched {
		if ok, _ := l.rightsOf(lim).Peek(at, 1); !ok {
			untake(matched[:i], when)
			_, wait := lim.rights.Take(at, 1) // it counts the refusal
			lim.denied++
			l.wake()
			return hold(lim, now, wait)
		}
		if ok, wait := l.within(lim, at, when); !ok {
			untake(matched[:i], when)
			return hold(lim, now, wait)
		}
	}
	for _, lim := range matched {
		lim.rights.Start(at, 1)
		lim.used++
		lim.begun++
	}
	return engine.Hold{}
}

// Done is of no interest: what was begun counts, whatever became of it.
func (*Limits) Done(time.Time, *engine.Place, []relay.Outcome) {}

// within takes a message of the whole limit, which allows what the books do unless
// these are wrong, or were made by another revision of the limit than that of the view. l.mu is
// held; when is at as a time.
func (l *Limits) within(lim *limit, at lease.Instant, when time.Time) (bool, time.Duration) {
	if lim.apart && lim.fits(at) {
		lim.apart, lim.whole = false, throttle.NewBucket(lim.rate())
	}
	ok, wait := lim.whole.Take(when, 1)
	if !ok && !lim.apart {
		l.overuse.Inc()
		l.log.Error("the rights under a shared limit allow more than the limit; the work is refused", "limit", lim.Name, "number", uint64(lim.ID))
	}
	return ok, wait
}

// untake gives back what within took, for another limit refused.
func untake(taken []*limit, when time.Time) {
	for _, lim := range taken {
		lim.whole.Untake(when, 1)
	}
}

// fits reports whether what was lent is a part of the limit that the view knows.
func (lim *limit) fits(at lease.Instant) bool {
	return lim.rights == nil || lim.usable(at) == lim.rights.Usable(at)
}

// usable is what the relay may use of a limit. It is a part of the limit that the
// view knows, although the grant of one that was changed may come before the view,
// or after it.
func (lim *limit) usable(at lease.Instant) lease.Share {
	if lim.rights == nil {
		return lease.Share{}
	}
	share := lim.rights.Usable(at)
	return lease.Share{Amount: min(share.Amount, lim.Max), Burst: min(share.Burst, lim.Burst)}
}

// rightsOf returns the rights under a limit. l.mu is held.
func (l *Limits) rightsOf(lim *limit) *lease.Rights {
	if lim.rights == nil {
		lim.rights = l.holder.Rights(lim.ID, lim.Kind, lim.Per)
	}
	return lim.rights
}

// hold is a refusal: it is worded when somebody asks. Wait is negative if only a
// grant can help.
func hold(lim *limit, now time.Time, wait time.Duration) engine.Hold {
	h := engine.Hold{Reason: Reason, Name: lim.Name, Scope: lim.scope, Gate: schedule.GateID{Owner: Owner, Number: uint64(lim.ID)}}
	if wait >= 0 {
		h.Until = now.Add(wait)
	}
	return h
}

// closeSlots ends sessions that must not be open any more, whatever they do, and
// returns the instant at which others must not, or 0. l.mu is held.
func (l *Limits) closeSlots(now lease.Instant, t *table) (abort []func(), next lease.Instant) {
	for _, lim := range t.limits {
		r := lim.rights
		if r == nil || lim.Kind != lease.Slots || r.Opened() == 0 {
			continue
		}
		if _, atOnce := r.Excess(now); atOnce > 0 {
			abort = append(abort, l.abort(r, int(atOnce))...)
		}
		if end := r.CloseBy(now); end > now && (next == 0 || end < next) {
			next = end
		}
	}
	return abort, next
}

// abort picks sessions that hold a slot, the oldest first; those that are ending
// already count. l.mu is held.
func (l *Limits) abort(r *lease.Rights, n int) (out []func()) {
	var open []*session
	for _, s := range l.sessions {
		switch {
		case !slices.Contains(s.slots, r):
		case s.aborted:
			n--
		default:
			open = append(open, s)
		}
	}
	slices.SortFunc(open, func(a, b *session) int { return cmp.Compare(a.seq, b.seq) })
	for _, s := range open[:min(max(n, 0), len(open))] {
		s.aborted = true
		out = append(out, s.place.Abort)
	}
	return out
}
