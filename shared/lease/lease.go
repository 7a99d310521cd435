// Package lease shares limits that several relays work under at once: at most so
// much mail to a provider from the whole cluster, at most so many connections.
// A limit that one relay alone can reach needs no lease; this package is for
// those that cross relays, and it keeps them through leader loss, partition,
// restart and clocks of different speed.
//
// It has three parts, all of them pure. The Table is what the servers replicate:
// who may hold how much of what. The Grantor runs on the leader and decides who
// is to hold how much. The Holder runs on a relay and says what may start now.
// What they promise and why it holds is in DESIGN.md.
//
// Amounts are whole numbers: of a rate in thousandths of an event per the limit's
// span (Milli), of slots in slots. Times are Instants of the caller's own clock;
// no two clocks are ever compared, only lengths of time measured by them.
package lease

import (
	"cmp"
	"time"

	"github.com/relais-mta/relais/shared/fault"
)

// Milli is one event of a rate in the unit of amounts.
const Milli = 1000

// Bounds of a Limit and of what hangs on it.
const (
	MaxSlots   = 1_000_000
	MaxEvents  = 1_000_000 // of a rate within its span
	MaxBurst   = 100_000
	MaxPer     = 24 * time.Hour
	MaxLimits  = 20_000
	MaxNodes   = 10_000
	MaxHolders = 200_000 // pairs of limit and relay
)

// Instant is a time in nanoseconds by the monotonic clock of one machine, which
// must go on while the machine is suspended (CLOCK_BOOTTIME). It means nothing
// on another machine.
type Instant int64

// Add returns the instant d later.
func (i Instant) Add(d time.Duration) Instant { return i + Instant(d) }

// Sub returns the time from o to i.
func (i Instant) Sub(o Instant) time.Duration { return time.Duration(i - o) }

// LimitID numbers a limit, Node a relay. The cluster gives each number once.
type (
	LimitID uint64
	Node    uint64
)

// Kind says what a limit counts.
type Kind uint8

// The kinds of limits.
const (
	Rate  Kind = iota + 1 // events that start within a span of time
	Slots                 // things open at once
)

// Limit is one limit that relays share. Kind and Per of an id never change.
type Limit struct {
	ID    LimitID
	Kind  Kind
	Max   int64         // Rate: thousandths of an event per Per; Slots: slots
	Per   time.Duration // of rates: 1 s to 24 h
	Burst int64         // of rates: events that may start at once after a pause, all relays together

	FloorPercent   int  // of Max and Burst, set aside for relays that are cut off: 0 to 90
	ReservePercent int  // of Max, left free so that a new demand is met at once: 0 to 50
	SoftFloor      bool // a floor never ends by itself
}

// Validate refuses a limit that cannot be kept. The error is fault.Invalid and
// names the field.
func (l Limit) Validate() error {
	const op = "lease.Limit"
	switch {
	case l.ID == 0:
		return fault.Field(op, "id", "is missing: a limit needs a number of its own")
	case l.Kind != Rate && l.Kind != Slots:
		return fault.Field(op, "kind", "is %d: write a rate or slots", l.Kind)
	case l.Kind == Slots && (l.Max < 1 || l.Max > MaxSlots):
		return fault.Field(op, "max", "is %d slots, write 1 to %d", l.Max, MaxSlots)
	case l.Kind == Rate && (l.Max < Milli || l.Max > MaxEvents*Milli):
		return fault.Field(op, "max", "is %d thousandths of an event, write 1 to %d events", l.Max, MaxEvents)
	case l.Kind == Slots && (l.Per != 0 || l.Burst != 0):
		return fault.Field(op, "per", "and burst belong to rates only: remove them")
	case l.Kind == Rate && (l.Per < time.Second || l.Per > MaxPer):
		return fault.Field(op, "per", "is %v, write %v to %v", l.Per, time.Second, MaxPer)
	case l.Kind == Rate && (l.Burst < 1 || l.Burst > MaxBurst):
		return fault.Field(op, "burst", "is %d events, write 1 to %d", l.Burst, MaxBurst)
	case l.FloorPercent < 0 || l.FloorPercent > 90:
		return fault.Field(op, "floor_percent", "is %d, write 0 to 90: what is set aside cannot be lent", l.FloorPercent)
	case l.ReservePercent < 0 || l.ReservePercent > 50:
		return fault.Field(op, "reserve_percent", "is %d, write 0 to 50", l.ReservePercent)
	case l.FloorPercent+l.ReservePercent > 95:
		return fault.Field(op, "floor_percent", "and reserve_percent leave %d %% to lend, leave 5 at least", 100-l.FloorPercent-l.ReservePercent)
	}
	return nil
}

// quantum is the least that is worth holding.
func (l *Limit) quantum() int64 {
	if l.Kind == Slots {
		return 1
	}
	return Milli
}

func (l *Limit) whole() Share { return Share{l.Max, l.Burst} }

// Share is a part of a limit.
type Share struct {
	Amount int64 // Rate: thousandths of an event per Per; Slots: slots
	Burst  int64 // Rate: events
}

func (s Share) add(o Share) Share { return Share{s.Amount + o.Amount, s.Burst + o.Burst} }
func (s Share) sub(o Share) Share { return Share{s.Amount - o.Amount, s.Burst - o.Burst} }
func (s Share) max(o Share) Share { return Share{max(s.Amount, o.Amount), max(s.Burst, o.Burst)} }
func (s Share) min(o Share) Share { return Share{min(s.Amount, o.Amount), min(s.Burst, o.Burst)} }

// within reports whether neither part of s is above o's.
func (s Share) within(o Share) bool { return s.Amount <= o.Amount && s.Burst <= o.Burst }

func (s Share) zero() bool { return s == Share{} }

// usable reports whether anything can be done with s.
func (s Share) usable(k Kind) bool { return s.Amount > 0 && (k == Slots || s.Burst > 0) }

// Stamp orders the grants that one relay gets for one limit, across leaders and
// across restores of the cluster.
type Stamp struct {
	Generation, Term, Seq uint64
}

// Compare returns -1, 0 or 1.
func (s Stamp) Compare(o Stamp) int {
	return cmp.Or(cmp.Compare(s.Generation, o.Generation), cmp.Compare(s.Term, o.Term), cmp.Compare(s.Seq, o.Seq))
}

// Config holds the lengths of time that both halves must agree on.
type Config struct {
	TTL      time.Duration // a ceiling is usable this long after the report that earned it was sent
	FloorTTL time.Duration // likewise a floor
	Guard    time.Duration // a relay stops starting work this long before a ceiling ends
	Linger   time.Duration // slots in use may stay so this long after a ceiling ended
	Hold     time.Duration // a seat of a limit too small for all is given up after this or a little less, if others wait
	FloorGap time.Duration // floors are divided anew this often at most
}

// DefaultConfig returns the values for a cluster on one network.
func DefaultConfig() Config {
	return Config{
		TTL: 30 * time.Second, FloorTTL: 24 * time.Hour, Guard: 200 * time.Millisecond,
		Linger: time.Minute, Hold: 30 * time.Second, FloorGap: 10 * time.Minute,
	}
}

// Validate refuses lengths that do not fit together.
func (c Config) Validate() error {
	const op = "lease.Config"
	switch {
	case c.TTL < 5*time.Second || c.TTL > 2*time.Minute:
		return fault.Field(op, "ttl", "is %v, write 5s to 2m", c.TTL)
	case c.FloorTTL < c.TTL || c.FloorTTL > 30*24*time.Hour:
		return fault.Field(op, "floor_ttl", "is %v, write %v to 720h", c.FloorTTL, c.TTL)
	case c.Guard < 0 || c.Guard > c.TTL/4:
		return fault.Field(op, "guard", "is %v, write 0s to %v", c.Guard, c.TTL/4)
	case c.Linger < 0 || c.Linger > 10*time.Minute:
		return fault.Field(op, "linger", "is %v, write 0s to 10m", c.Linger)
	case c.Hold < time.Second || c.Hold > time.Hour:
		return fault.Field(op, "hold", "is %v, write 1s to 1h", c.Hold)
	case c.FloorGap < time.Second || c.FloorGap > 24*time.Hour:
		return fault.Field(op, "floor_gap", "is %v, write 1s to 24h", c.FloorGap)
	}
	return nil
}

// Refresh is how often a relay reports; callers spread it by a fifth.
func (c Config) Refresh() time.Duration { return c.TTL / 3 }

// Outlast returns how long a leader must wait by its own clock so that d has
// passed by any relay's: clocks differ in speed by less than one percent.
func Outlast(d time.Duration) time.Duration { return d + d/100 + 50*time.Millisecond }
