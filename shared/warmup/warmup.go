// Package warmup raises the volume of new addresses and domains day by day, and
// keeps each day's quota across relays, crashes and changes of leader.
//
// It has three parts, all pure and in whole numbers. A Plan says how many
// recipients each class of providers is offered at which stage, and what lets a
// subject go on, hold or step back; Preview plays a plan against a volume. The
// Ledger is what the servers replicate: of each day's quota, who reserved how much
// and how much of that is spent. The Spender runs on a relay and spends a
// reservation behind a mark on stable storage. What they promise and why it holds
// is in DESIGN.md.
//
// The unit is a recipient; it is spent when RCPT is sent.
package warmup

import (
	"time"

	"github.com/relais-mta/relais/shared/fault"
)

// Day is a day of the calendar in a plan's time zone, counted from 1 January 1970.
type Day int32

// DayOf returns the day on which a time falls in a zone.
func DayOf(t time.Time, zone *time.Location) Day {
	y, m, d := t.In(zone).Date()
	return Day(time.Date(y, m, d, 0, 0, 0, 0, time.UTC).Unix() / 86400)
}

// Date returns the day's date at midnight UTC.
func (d Day) Date() time.Time { return time.Unix(int64(d)*86400, 0).UTC() }

// String returns the day as 2006-01-02.
func (d Day) String() string { return d.Date().Format(time.DateOnly) }

// Start returns the first instant at which a zone's calendar shows the day or a
// later one, to the second. Days there may have 23 or 25 hours, begin at 01:00, or
// not be at all; a day ends where the next one starts.
func (d Day) Start(zone *time.Location) time.Time {
	// No zone is further than a day from UTC.
	from, to := d.Date().Unix()-2*86400, d.Date().Unix()+2*86400
	for from < to {
		middle := from + (to-from)/2
		if DayOf(time.Unix(middle, 0), zone) >= d {
			to = middle
		} else {
			from = middle + 1
		}
	}
	return time.Unix(to, 0).UTC()
}

// MaxClockSpread is how far a leader's clock may be from the median of the voters'
// for it to begin a day.
const MaxClockSpread = 2 * time.Second

// NextDay is the clock guard of a leader that would begin a day: it returns the
// day to begin, or today if it is not time. Offsets are the clocks of the voters
// that could be asked, less the leader's own, which counts as well; voters is how
// many there are. It refuses, with fault.Unavailable, while the leader's clock is
// not confirmed by a majority, and, with fault.Conflict, a step of more than a day
// unless an operator ordered it.
func NextDay(today Day, wall time.Time, zone *time.Location, offsets []time.Duration, voters int, ordered bool) (Day, error) {
	const op = "warmup.NextDay"
	day := DayOf(wall, zone)
	if day <= today {
		return today, nil // a day that began is not taken back
	}
	if 2*(len(offsets)+1) <= voters {
		return today, fault.New(fault.Unavailable, op, "%s does not begin: only %d of %d servers told their time", day, len(offsets)+1, voters)
	}
	if spread := median(offsets); spread > MaxClockSpread || spread < -MaxClockSpread {
		return today, fault.New(fault.Unavailable, op, "%s does not begin: the leader's clock is %v from the median of the servers; set its clock", day, spread)
	}
	if day > today+1 && !ordered {
		return today, fault.New(fault.Conflict, op, "%s does not begin by itself: the last day was %s, %d days ago; check the clocks and order it", day, today, day-today)
	}
	return day, nil
}

// median of the offsets and of 0, which is the leader's own.
func median(offsets []time.Duration) time.Duration {
	all := make([]time.Duration, 0, len(offsets)+1)
	all = append(all, 0)
	for _, o := range offsets {
		at := len(all)
		for at > 0 && all[at-1] > o {
			at--
		}
		all = append(all, 0)
		copy(all[at+1:], all[at:])
		all[at] = o
	}
	// Of an even number the middle one further from 0, the stricter.
	a, b := all[(len(all)-1)/2], all[len(all)/2]
	if max(a, -a) > max(b, -b) {
		return a
	}
	return b
}
