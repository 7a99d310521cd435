// Package throttle decides whether one more thing may start now under a rate,
// by the generic cell rate algorithm. It is pure and works in whole nanoseconds,
// so that a relay, a preview in the console and a simulation give the same
// answer for the same times.
//
// # What a rate promises
//
// A Rate of Limit events per Per with a Burst lets, in any span of time w,
// at most Limit × w / Per + Burst events start, whatever the order of calls.
// With Burst 1 events keep their distance of Per / Limit; the one that the "+ 1"
// allows is the event at the span's very start. Time spent idle is saved up to
// Burst events and no more. The spacing is rounded up to whole nanoseconds, so
// rounding can only make a limit tighter, by less than one part in a thousand
// as long as Per / Limit is a microsecond or more.
//
// A Bucket does not lock: the one goroutine that schedules owns it. A Gate joins
// all limits of one scope (connections, how often they are opened, messages, and
// messages of one session); Connect and Begin ask several gates at once and take
// from all or none, and a refusal tells the one time at which to ask again.
package throttle

import (
	"math"
	"time"

	"github.com/relais-mta/relais/shared/fault"
)

// Bounds of a Rate.
const (
	MaxLimit = 1_000_000
	MaxBurst = 1_000_000
	MaxPer   = 366 * 24 * time.Hour
)

// Rate is a bound on how often something may start. The zero Rate bounds
// nothing.
type Rate struct {
	interval int64 // nanoseconds from one event to the next at full speed; 0: no bound
	slack    int64 // nanoseconds by which events may come early: (burst-1) × interval
	burst    int64
}

// NewRate returns the rate of limit events per span with a burst. Limit is 1
// to MaxLimit, per 1 ns × limit to MaxPer, burst 1 to MaxBurst. The error is
// fault.Invalid.
func NewRate(limit int, per time.Duration, burst int) (Rate, error) {
	const op = "throttle.NewRate"
	switch {
	case limit < 1 || limit > MaxLimit:
		return Rate{}, fault.Field(op, "limit", "is %d, write 1 to %d", limit, MaxLimit)
	case per < time.Duration(limit) || per > MaxPer:
		return Rate{}, fault.Field(op, "per", "is %v, write %v to %v", per, time.Duration(limit), MaxPer)
	case burst < 1 || burst > MaxBurst:
		return Rate{}, fault.Field(op, "burst", "is %d, write 1 to %d", burst, MaxBurst)
	}
	interval := (int64(per) + int64(limit) - 1) / int64(limit)
	if int64(burst) > math.MaxInt64/4/interval {
		return Rate{}, fault.Field(op, "burst", "is %d, which takes over 73 years to save at this rate; write less", burst)
	}
	return Rate{interval: interval, slack: (int64(burst) - 1) * interval, burst: int64(burst)}, nil
}

// Limited reports whether the rate bounds anything.
func (r Rate) Limited() bool { return r.interval > 0 }

// Bucket holds what has started under a rate. The zero Bucket has no bound;
// use Set to give it one.
type Bucket struct {
	rate Rate
	next int64 // Unix nanoseconds at which an event at full speed would be due
	last int64 // Unix nanoseconds of the last event
	set  bool  // next holds something
}

// NewBucket returns a full bucket: burst events may start at once.
func NewBucket(r Rate) Bucket { return Bucket{rate: r} }

// Set changes the rate and keeps what has started: the events taken so far
// count against the new rate as if they had been taken under it, so a change
// of policy gives no second burst.
func (b *Bucket) Set(r Rate, now time.Time) {
	if r == b.rate {
		return
	}
	if b.set && b.rate.Limited() && r.Limited() {
		// Debt is measured in events: how far next lies ahead of now.
		if ahead := b.next - now.UnixNano(); ahead > 0 {
			events := min((ahead+b.rate.interval-1)/b.rate.interval, r.burst)
			b.next = now.UnixNano() + events*r.interval
		}
	}
	b.rate = r
}

// Take starts n events at now, all or none. It returns true when they may
// start; otherwise how long to wait until they may, if nothing else is taken
// meanwhile. An n above the burst never fits: it returns false and a negative
// wait. An n below 1 fits and takes nothing. After a clock stepped back the
// bucket owes its whole burst, and no more.
func (b *Bucket) Take(now time.Time, n int) (ok bool, wait time.Duration) {
	if n < 1 || !b.rate.Limited() {
		return true, 0
	}
	if int64(n) > b.rate.burst {
		return false, -1
	}
	at := now.UnixNano()
	due := b.due(at)
	if early := b.rate.early(due, at, n); early > 0 {
		return false, time.Duration(early)
	}
	b.next, b.last, b.set = due+int64(n)*b.rate.interval, at, true
	return true, 0
}

// Untake gives back n events that Take took at a time and that did not start: the
// bucket is then as if they had not been taken. If others were taken later they
// are lost, for those may have waited for them.
func (b *Bucket) Untake(taken time.Time, n int) {
	if n > 0 && b.set && b.last == taken.UnixNano() {
		b.next -= int64(n) * b.rate.interval
	}
}

// Peek answers as Take does and takes nothing.
func (b *Bucket) Peek(now time.Time, n int) (ok bool, wait time.Duration) {
	if n < 1 || !b.rate.Limited() {
		return true, 0
	}
	if int64(n) > b.rate.burst {
		return false, -1
	}
	at := now.UnixNano()
	if early := b.rate.early(b.due(at), at, n); early > 0 {
		return false, time.Duration(early)
	}
	return true, 0
}

// early is by how much n events would come too early, the first of which is due at a
// time. The last would be due (n-1) intervals later; it may come early by slack.
func (r *Rate) early(due, at int64, n int) int64 {
	return due + int64(n-1)*r.interval - r.slack - at
}

// due is when an event at full speed would be due, seen at a time. What was
// taken up to then lies at most slack and one interval ahead; if next is
// further ahead, the clock has stepped back. Waiting for it to catch up would
// stop all mail for as long as the step was, so next follows it.
func (b *Bucket) due(at int64) int64 {
	if !b.set {
		return at
	}
	b.next = min(b.next, at+b.rate.slack+b.rate.interval)
	return max(b.next, at)
}
