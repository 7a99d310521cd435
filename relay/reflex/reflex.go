package reflex

import (
	"math"
	"time"
)

// Settings are the bounds of a lane, from policy. Rates are in messages an hour.
type Settings struct {
	Off bool // the lane is never slowed down

	MaxRate        int64 // of the provider's profile; 0: it has none
	MaxConnections int   // likewise
	MinRate        int64 // it is never slower than that, but held: 1 or more

	Keep    int           // percent that a decrease leaves: 10 to 95
	After   int           // signals that make a decrease: 1 or more
	Share   int           // and the percent of results that they must be: 1 to 100
	Spacing time.Duration // between two decreases: what comes meanwhile is one burst
	Step    time.Duration // between two increases
	Hold    time.Duration // of a lane whose host takes nothing, at first; it doubles
	MaxHold time.Duration
	Probe   int // messages that must be answered well before a held lane is brought back
}

// Phase is what is done to a lane.
type Phase uint8

// The phases.
const (
	Free    Phase = iota // nothing: policy's limits alone hold
	Slowed               // it climbs step by step
	Held                 // nothing starts until a time
	Probing              // one connection looks whether the host takes mail again
)

var phaseNames = [...]string{"free", "slowed", "held", "probing"}

// String returns the name that people and metrics see.
func (p Phase) String() string { return phaseNames[p] }

// Cause is the last signal that a lane was slowed down for.
type Cause struct {
	Signal Signal
	Class  string // of the verdict
	Reply  string // of the host
	At     time.Time
}

// Allowance is what the reflex allows a lane.
type Allowance struct {
	Phase       Phase
	Rate        int64 // messages an hour; 0: no bound of its own
	Connections int   // likewise
	Until       time.Time
}

const (
	slots        = 6
	window       = time.Minute // results older than that do not count
	deepestCut   = 4           // one decrease leaves a quarter at least
	floorSignals = 3           // decreases in a row at the slowest before the lane is held
	hopeless     = 3           // times After failures to connect in a row end all tries at once
	maxDoublings = 16
	maxRate      = 1 << 40 // of all rates here: no arithmetic comes near an overflow
)

// slot counts what happened in a part of the window.
type slot struct {
	begun, good, bad, opened, broken uint32
}

// Lane is the reflex of one lane. The zero value is a free lane. It does not lock.
type Lane struct {
	Seed uint64 // spreads the ends of holds

	phase       Phase
	rate        int64
	connections int
	until       time.Time // of Held
	next        time.Time // of the next step
	cause       Cause
	since       time.Time // the lane was free until then

	knee      int64 // the rate at the last decrease: the provider's limit as far as it is known
	top       int64 // the highest rate that a decrease began from
	topConns  int
	search    int64 // last increase beyond the knee
	ramp      bool  // doubling, after a hold
	holds     int   // in a row
	atFloor   int   // decreases asked for in a row at the slowest
	probeLeft int
	decreased time.Time
	step      slot // what happened since the last step

	open         int // sessions open or being opened
	streak       int // signals in a row without a good answer
	brokenStreak int
	slots        [slots]slot
	slotAt       int64 // number of the newest slot
	startedAt    time.Time
}

// Allowance returns what the lane may do now.
func (l *Lane) Allowance() Allowance {
	return Allowance{Phase: l.phase, Rate: l.rate, Connections: l.connections, Until: l.until}
}

// Cause returns what the lane was slowed down for last; the zero Cause if it is
// free.
func (l *Lane) Cause() Cause { return l.cause }

// Since returns since when the lane is not free.
func (l *Lane) Since() time.Time { return l.since }

// Next returns when Tick has something to do, or the zero time.
func (l *Lane) Next() time.Time {
	switch l.phase {
	case Held:
		return l.until
	case Slowed:
		return l.next
	}
	return time.Time{}
}

// Quiet reports whether nothing of the lane is worth keeping.
func (l *Lane) Quiet(now time.Time) bool {
	return l.phase == Free && l.open == 0 && now.UnixNano()/int64(window/slots)-l.slotAt > slots
}

// at returns the counters of now.
func (l *Lane) at(now time.Time) *slot {
	n := now.UnixNano() / int64(window/slots)
	if l.startedAt.IsZero() || n-l.slotAt >= slots {
		l.clear(now)
	}
	for l.slotAt < n {
		l.slotAt++
		l.slots[mod(l.slotAt)] = slot{}
	}
	return &l.slots[mod(l.slotAt)] // a clock that goes back counts in the newest
}

func mod(n int64) int { return int((n%slots + slots) % slots) }

// clear forgets what was counted.
func (l *Lane) clear(now time.Time) {
	l.slots = [slots]slot{}
	l.startedAt, l.slotAt = now, now.UnixNano()/int64(window/slots)
	l.streak = 0
}

// share reports whether the signals are at least a part of the results, in percent.
func (c *slot) share(percent int) bool {
	return uint64(c.bad)*100 >= uint64(percent)*(uint64(c.bad)+uint64(c.good))
}

// many reports whether the signals are enough for a decrease.
func (c *slot) many(s *Settings) bool { return int(c.bad) >= s.After && c.share(s.Share) }

func (l *Lane) sum() (s slot) {
	for i := range l.slots {
		s.begun += l.slots[i].begun
		s.good += l.slots[i].good
		s.bad += l.slots[i].bad
		s.opened += l.slots[i].opened
		s.broken += l.slots[i].broken
	}
	return s
}

// perHour is a count since the lane's counters began, as messages an hour.
func (l *Lane) perHour(n uint32, now time.Time) int64 {
	span := min(max(now.Sub(l.startedAt), time.Second), window)
	return int64(n) * int64(time.Hour/time.Second) * 1000 / int64(span/time.Millisecond)
}

// Opening tells that a session is being opened; Closed tells its end.
func (l *Lane) Opening() { l.open++ }

// Closed tells that a session has ended, or could not be opened.
func (l *Lane) Closed() { l.open = max(0, l.open-1) }

// Opened tells that a session is open, which says that the host can be reached.
func (l *Lane) Opened(now time.Time) {
	l.at(now).opened++
	l.brokenStreak = 0
}

// Began tells that a message was begun.
func (l *Lane) Began(now time.Time) { l.at(now).begun++ }

// Ended tells what came of a transaction, or of the try to open a session, that
// began at a time. It reports whether the allowance changed. What began before
// the last decrease belongs to the burst that this one answered, and counts for
// nothing.
func (l *Lane) Ended(now, began time.Time, c Cause, s *Settings) bool {
	if s.Off || c.Signal == Silent {
		return false
	}
	count := l.at(now)
	if c.Signal == Clean {
		count.good++
		l.step.good++
		l.streak, l.brokenStreak = 0, 0
		l.atFloor = 0
		if l.phase == Probing {
			return l.probed(now, s)
		}
		return false
	}
	if !began.After(l.decreased) && !l.decreased.IsZero() || l.phase == Held {
		return false
	}
	if c.Signal == Broken {
		count.broken++
		l.brokenStreak++
	} else {
		count.bad++
		l.step.bad++
		l.streak++
	}
	c.At = now
	return l.judge(now, c, s)
}

// judge decides whether the signals so far are enough for a decrease.
func (l *Lane) judge(now time.Time, c Cause, s *Settings) bool {
	if l.phase == Probing {
		l.hold(now, c, s)
		return true
	}
	if c.Signal == Broken && l.brokenStreak >= hopeless*s.After {
		l.hold(now, c, s)
		return true
	}
	if now.Sub(l.decreased) < s.Spacing && !now.Before(l.decreased) {
		return false
	}
	sum := l.sum()
	if c.Signal == Broken {
		if l.brokenStreak < s.After && (int(sum.broken) < s.After || sum.broken <= sum.opened) {
			return false
		}
		return l.broken(now, c, s)
	}
	if l.streak < s.After && !sum.many(s) && !l.step.many(s) {
		return false
	}
	if c.Signal == Blocked {
		l.hold(now, c, s)
		return true
	}
	l.slow(now, c, s)
	return true
}

// slow decreases rate and connections.
func (l *Lane) slow(now time.Time, c Cause, s *Settings) {
	keep := int64(s.Keep)
	if c.Signal == Unwell { // it is not our speed, or not alone
		keep = (100 + keep) / 2
	}
	sum := l.sum()
	floor := max(s.MinRate, 1)
	base := l.perHour(sum.begun, now)
	if l.rate > 0 {
		base = min(l.rate, max(base*5/4, floor)) // what was not used is not the limit
	}
	if s.MaxRate > 0 {
		base = min(base, s.MaxRate)
	}
	base = min(max(base, floor), maxRate)
	if l.rate == floor {
		if l.atFloor++; l.atFloor >= floorSignals {
			l.hold(now, c, s)
			return
		}
	}
	l.leave(now, s)
	l.knee, l.rate = base/10*9, base*keep/100
	if sum.bad > sum.good {
		// Far too fast: what the host took meanwhile is about what it bears.
		took := max(l.perHour(sum.good, now), base/deepestCut)
		l.knee, l.rate = min(l.knee, max(took, base/2)), min(l.rate, took)
	}
	l.knee, l.rate = max(l.knee, floor), max(l.rate, floor)
	l.top = max(l.top, base)
	if conns := max(l.open, 1); l.connections == 0 || conns < l.connections {
		l.connections = conns
	}
	l.connections = max(1, l.connections*int(keep)/100)
	l.slowed(now, c, s)
}

// leave notes how fast a free lane was.
func (l *Lane) leave(now time.Time, s *Settings) {
	if l.phase != Free {
		return
	}
	speed := max(l.perHour(l.sum().begun, now), s.MinRate, 1)
	if s.MaxRate > 0 {
		speed = min(speed, s.MaxRate)
	}
	l.since, l.top, l.knee, l.topConns = now, min(speed, maxRate), min(speed, maxRate), max(l.open, 1)
}

// broken decreases connections; when one alone does not come about, the lane is
// held.
func (l *Lane) broken(now time.Time, c Cause, s *Settings) bool {
	if l.connections == 1 && l.brokenStreak >= s.After {
		l.hold(now, c, s)
		return true
	}
	l.leave(now, s)
	have := max(l.open, 1)
	if l.connections > 0 {
		have = min(have, l.connections)
	}
	l.connections = max(1, have*s.Keep/100)
	l.slowed(now, c, s)
	return true
}

func (l *Lane) slowed(now time.Time, c Cause, s *Settings) {
	l.phase, l.cause, l.decreased = Slowed, c, now
	l.next = now.Add(s.Step)
	l.search, l.ramp = 0, false
	l.step = slot{}
	l.clear(now)
}

// hold lets nothing start for a while, twice as long each time in a row.
func (l *Lane) hold(now time.Time, c Cause, s *Settings) {
	l.leave(now, s)
	span := s.MaxHold
	if n := min(l.holds, maxDoublings); s.Hold<<n > 0 && s.Hold<<n < span {
		span = s.Hold << n
	}
	// Up to a tenth more, so that lanes that were blocked together do not come
	// back together.
	span += span / 100 * time.Duration((l.Seed^uint64(l.holds)*0x9e3779b97f4a7c15)%11)
	l.holds++
	l.phase, l.cause, l.decreased, l.until = Held, c, now, now.Add(span)
	l.atFloor, l.brokenStreak = 0, 0
	l.clear(now)
}

// probed notes a good answer to a probe.
func (l *Lane) probed(now time.Time, s *Settings) bool {
	if l.probeLeft--; l.probeLeft > 0 {
		return false
	}
	l.phase, l.ramp, l.search = Slowed, true, 0
	l.step = slot{good: 1}
	l.next = now.Add(s.Step)
	return true
}

// Tick does what is due by itself: the end of a hold, a step up. It reports
// whether the allowance changed.
func (l *Lane) Tick(now time.Time, s *Settings) bool {
	switch {
	case s.Off:
		return l.free()
	case l.phase == Held && !l.until.After(now):
		l.phase, l.until = Probing, time.Time{}
		l.connections, l.probeLeft = 1, max(s.Probe, 1)
		l.rate = max(s.MinRate, 1, l.knee/10)
		if s.MaxRate > 0 {
			l.rate = min(l.rate, s.MaxRate)
		}
		l.clear(now)
		return true
	case l.phase == Slowed && !l.next.After(now):
		l.next = now.Add(s.Step)
		step := l.step
		l.step = slot{}
		return step.good > 0 && !step.share(max(s.Share/2, 1)) && l.grow(s)
	}
	return false
}

// grow is one step up.
func (l *Lane) grow(s *Settings) bool {
	before := l.Allowance()
	if l.connections > 0 {
		if l.ramp {
			l.connections *= 2
		} else {
			l.connections++
		}
		if s.MaxConnections > 0 && l.connections >= s.MaxConnections || s.MaxConnections == 0 && l.connections >= 2*l.topConns {
			l.connections = 0
		}
	}
	if l.rate > 0 {
		l.growRate()
		if s.MaxRate > 0 && l.rate >= s.MaxRate || s.MaxRate == 0 && l.rate >= 2*l.top {
			l.rate = 0
		}
	}
	if l.rate == 0 && l.connections == 0 {
		l.free()
	}
	return before != l.Allowance()
}

// growRate climbs quickly to the knee, slowly around it, and ever quicker once
// it is well beyond: then the provider's limit has risen.
func (l *Lane) growRate() {
	knee := max(l.knee, 1)
	switch {
	case l.ramp:
		l.rate *= 2
		if l.rate >= knee/2 {
			l.ramp, l.holds = false, 0
		}
	case l.rate < knee/10*9:
		l.rate += max(1, knee/20)
	case l.rate < knee+knee/10:
		l.rate += max(1, knee/50)
	default:
		l.search = min(max(2*l.search, knee/50, 1), max(l.rate/12, 1))
		l.rate += l.search
	}
	l.rate = min(l.rate, maxRate)
}

// Release ends all that the reflex does to the lane, on a person's word. It reports
// whether that was anything.
func (l *Lane) Release() bool { return l.free() }

// free ends all of it.
func (l *Lane) free() bool {
	changed := l.phase != Free
	l.phase, l.rate, l.connections, l.until, l.next = Free, 0, 0, time.Time{}, time.Time{}
	l.cause, l.since = Cause{}, time.Time{}
	l.ramp, l.holds, l.atFloor, l.search = false, 0, 0, 0
	l.streak, l.brokenStreak = 0, 0
	return changed
}

// Clamp takes over changed settings: what was allowed beyond them is cut.
func (l *Lane) Clamp(s *Settings) bool {
	before := l.Allowance()
	if s.Off {
		return l.free()
	}
	if l.rate > 0 {
		l.rate = max(l.rate, s.MinRate, 1)
		if s.MaxRate > 0 && l.rate >= s.MaxRate {
			l.rate = s.MaxRate
		}
	}
	if s.MaxConnections > 0 && l.connections > s.MaxConnections {
		l.connections = s.MaxConnections
	}
	return before != l.Allowance()
}

// Spaced returns a rate an hour as a number of events in a span, for a bucket
// that takes at most limit events a span: rounded down, so that it is never
// more.
func Spaced(perHour int64, limit int) (events int, per time.Duration) {
	per = time.Hour
	for perHour > int64(limit) && per > time.Second {
		perHour, per = perHour/60, per/60
	}
	return int(min(max(perHour, 1), int64(limit), math.MaxInt32)), per
}
