package lease

import (
	"math/bits"
	"time"
)

// maxInterval bounds the time between two events of a share: a smaller share is
// worth nothing to its holder.
const maxInterval = 7 * 24 * time.Hour

// bucket is a rate that changes while it is used, as a generic cell rate. What it
// saves up is bounded by its burst; a change of rate keeps what was saved as far
// as it fits, and what is added begins empty. So when a part of a limit moves
// from one bucket to another no saved event exists twice.
type bucket struct {
	interval int64 // nanoseconds from event to event; 0: nothing may start
	burst    int64
	next     Instant // when an event at full speed would be due
}

// intervalOf returns the nanoseconds between events of a share, rounded up, or 0
// if it allows nothing.
func intervalOf(s Share, per time.Duration) int64 {
	if s.Amount < 1 || s.Burst < 1 {
		return 0
	}
	hi, lo := bits.Mul64(uint64(per), Milli)
	if hi >= uint64(s.Amount) {
		return 0
	}
	q, rest := bits.Div64(hi, lo, uint64(s.Amount))
	if rest > 0 {
		q++
	}
	if q > uint64(maxInterval) {
		return 0
	}
	return int64(q)
}

// set changes the rate as of an instant that is not before the last event.
func (b *bucket) set(at Instant, s Share, per time.Duration) {
	interval := intervalOf(s, per)
	if interval == 0 {
		*b = bucket{}
		return
	}
	// 2^60 ns are 36 years: more is never saved.
	burst := min(s.Burst, int64(1)<<60/interval)
	saved := int64(0) // in nanoseconds of the new interval
	if b.interval > 0 {
		old := min(b.burst*b.interval, max(0, int64(at)+b.burst*b.interval-int64(b.next)))
		events, part := old/b.interval, old%b.interval
		hi, lo := bits.Mul64(uint64(part), uint64(interval))
		q, _ := bits.Div64(hi, lo, uint64(b.interval)) // part < interval, so it fits
		if events >= burst {
			saved = burst * interval
		} else {
			saved = events*interval + int64(q)
		}
	}
	b.interval, b.burst = interval, burst
	b.next = at + Instant(burst*interval-saved)
}

// take starts n events if they may start now; otherwise it answers as peek does.
func (b *bucket) take(now Instant, n int64) (bool, time.Duration) {
	ok, wait := b.peek(now, n)
	if ok && n > 0 {
		b.start(now, n)
	}
	return ok, wait
}

// start starts n events that may start now.
func (b *bucket) start(now Instant, n int64) {
	b.next = max(b.next, now) + Instant(n*b.interval)
}

// peek tells whether n events may start now, and if not how long to wait, negative
// if they never may. Nothing always may.
func (b *bucket) peek(now Instant, n int64) (bool, time.Duration) {
	if n < 1 {
		return true, 0
	}
	if b.interval == 0 || n > b.burst {
		return false, -1
	}
	if early := int64(max(b.next, now)-now) + (n-b.burst)*b.interval; early > 0 {
		return false, time.Duration(early)
	}
	return true, 0
}
