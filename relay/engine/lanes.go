package engine

import (
	"sort"
	"sync"
	"time"

	"github.com/relais-mta/relais/relay"
	"github.com/relais-mta/relais/relay/queue"
	"github.com/relais-mta/relais/relay/schedule"
	"github.com/relais-mta/relais/shared/ids"
)

// LaneInfo describes a lane for people.
type LaneInfo struct {
	Source   string `json:"source"`
	Provider string `json:"provider"`
	Pool     string `json:"pool"`
	Sessions int    `json:"sessions"`
	InFlight int64  `json:"in_flight"` // recipients of the transactions under way
	Waiting  int    `json:"waiting"`   // recipients due for the provider in the pool, all its sources

	// Since the lane was first used, or not used for an hour.
	Delivered uint64 `json:"delivered"`
	Deferred  uint64 `json:"deferred"`
	Bounced   uint64 `json:"bounced"` // and whatever else ended without being delivered
	// In the last ten seconds.
	DeliveredPerSecond float64 `json:"delivered_per_s"`
	DeferredPerSecond  float64 `json:"deferred_per_s"`
	BouncedPerSecond   float64 `json:"bounced_per_s"`

	Reflex       string    `json:"reflex,omitempty"`       // how the relay slows the lane down by itself, after what
	Hold         string    `json:"hold,omitempty"`         // what keeps due mail from the lane now, a word as in Explanation
	HoldText     string    `json:"hold_text,omitempty"`    // the same for people
	HoldUntil    time.Time `json:"hold_until,omitzero"`    // when that ends, if it is known
	WaitingSince time.Time `json:"waiting_since,omitzero"` // when what is due longest became due
}

// Lanes lists the lanes that have sessions or work, busiest first.
func (e *Engine) Lanes() []LaneInfo {
	now := e.cfg.Now()
	e.mu.Lock()
	lanes := e.sched.LaneStates(now)
	e.mu.Unlock()
	out := make([]LaneInfo, 0, len(lanes))
	dir := e.cfg.Directory()
	due := e.dueSince(now)
	for _, l := range lanes {
		if since, ok := due[poolProvider{l.Pool, l.Lane.Provider}]; ok && l.Waiting > 0 && (l.Since.IsZero() || since.Before(l.Since)) {
			l.Since = since // the scheduler knows when it served the lane's hosts last
		}
		info := LaneInfo{
			Source: e.sourceName(l.Lane.Source), Provider: l.Lane.Provider, Pool: l.Pool.String(), Sessions: l.Sessions, Waiting: l.Waiting,
			Hold: l.Hold, HoldText: whyTexts[l.Hold], HoldUntil: l.Until, WaitingSince: l.Since,
		}
		if h, ok := e.explainGate(l.Gate); ok {
			info.HoldText, info.HoldUntil = h.Text, h.Until
			if !l.Until.IsZero() {
				info.HoldUntil = l.Until
			}
		}
		info.Reflex = e.describe(l.Lane)
		if dir != nil {
			if p, ok := dir.Pool(l.Pool); ok {
				info.Pool = p.Name
			}
		}
		e.metrics.lanes.read(l.Lane, now, &info)
		out = append(out, info)
	}
	sort.Slice(out, func(i, j int) bool {
		a, b := &out[i], &out[j]
		if a.Sessions != b.Sessions {
			return a.Sessions > b.Sessions
		}
		if a.Waiting != b.Waiting {
			return a.Waiting > b.Waiting
		}
		return a.Provider+a.Source < b.Provider+b.Source
	})
	return out
}

// poolProvider names the lanes that the same mail may take.
type poolProvider struct {
	pool     ids.Pool
	provider string
}

// dueSince finds since when what is due longest has been due, for each pool and
// provider of which some is.
func (e *Engine) dueSince(now time.Time) map[poolProvider]time.Time {
	out := make(map[poolProvider]time.Time)
	e.queue.Queues(func(q queue.QueueInfo) bool {
		if q.Next.IsZero() || q.Next.After(now) {
			return true
		}
		of := poolProvider{q.Key.Pool, e.Provider(q.Key.Domain)}
		if have, ok := out[of]; !ok || q.Next.Before(have) {
			out[of] = q.Next
		}
		return true
	})
	return out
}

// Bounds of counting by lane.
const (
	rateSeconds     = 10
	maxCountedLanes = 1 << 14 // about 250 octets each; others are shown without counts
	laneSweepWait   = 10      // seconds between two looks for lanes to forget, while there are too many
	laneCountIdle   = time.Hour
)

// The results that are counted.
const (
	laneDelivered = iota
	laneDeferred
	laneBounced
	laneResults
)

// laneCount is what became of a lane's recipients.
type laneCount struct {
	inFlight int64
	totals   [laneResults]uint64
	seconds  [rateSeconds + 1][laneResults]uint32 // by second, the one that runs included
	last     int64                                // Unix second that was written last
}

// roll forgets the seconds that have passed.
func (c *laneCount) roll(second int64) {
	for n := min(second-c.last, int64(len(c.seconds))); n > 0; n-- {
		c.seconds[(second-n+1)%int64(len(c.seconds))] = [laneResults]uint32{}
	}
	c.last = max(c.last, second) // a clock that goes back forgets nothing
}

// laneCounts counts by lane. The zero value is ready.
type laneCounts struct {
	mu    sync.Mutex
	lanes map[schedule.Lane]*laneCount
	swept int64 // Unix second of the last sweep
}

// at returns the counts of a lane, nil if there are too many lanes. l.mu is held.
func (l *laneCounts) at(lane schedule.Lane, second int64) *laneCount {
	c := l.lanes[lane]
	if c == nil {
		if l.lanes == nil {
			l.lanes = make(map[schedule.Lane]*laneCount)
		}
		if len(l.lanes) >= maxCountedLanes && !l.sweep(second) {
			return nil
		}
		c = &laneCount{last: second}
		l.lanes[lane] = c
	}
	c.roll(second)
	return c
}

// sweep drops lanes that were not used for long and reports whether there is
// room for another one. It looks at all of them, and so only now and then: a
// relay that serves more lanes than are counted asks for each of its messages.
func (l *laneCounts) sweep(second int64) bool {
	if since := second - l.swept; since >= 0 && since < laneSweepWait {
		return false
	}
	l.swept = second
	for lane, c := range l.lanes {
		if c.inFlight == 0 && second-c.last > int64(laneCountIdle/time.Second) {
			delete(l.lanes, lane)
		}
	}
	return len(l.lanes) < maxCountedLanes
}

// begin notes that a transaction of so many recipients is under way. Its end is
// told to end.
func (l *laneCounts) begin(lane schedule.Lane, recipients int, now time.Time) {
	l.mu.Lock()
	if c := l.at(lane, now.Unix()); c != nil {
		c.inFlight += int64(recipients)
	}
	l.mu.Unlock()
}

func (l *laneCounts) end(lane schedule.Lane, recipients int) {
	l.mu.Lock()
	if c := l.lanes[lane]; c != nil {
		c.inFlight = max(0, c.inFlight-int64(recipients)) // it may have been too many lanes at the begin
	}
	l.mu.Unlock()
}

// count notes what an attempt came to.
func (l *laneCounts) count(a *relay.Attempt, s *settlement) {
	if a.Source.IsZero() {
		return // it had no lane
	}
	var results [laneResults]uint32
	for i := range s.results {
		switch state := s.results[i].State.State; {
		case state == relay.StateDelivered:
			results[laneDelivered]++
		case state.Final():
			results[laneBounced]++
		default:
			results[laneDeferred]++
		}
	}
	second := a.EndedAt.Unix()
	l.mu.Lock()
	defer l.mu.Unlock()
	c := l.at(schedule.Lane{Source: a.Source, Provider: a.Provider}, second)
	if c == nil {
		return
	}
	slot := &c.seconds[c.last%int64(len(c.seconds))]
	for i, n := range results {
		c.totals[i] += uint64(n)
		slot[i] += n
	}
}

// read fills in what was counted of a lane.
func (l *laneCounts) read(lane schedule.Lane, now time.Time, info *LaneInfo) {
	l.mu.Lock()
	defer l.mu.Unlock()
	c := l.lanes[lane]
	if c == nil {
		return
	}
	var sums [laneResults]uint64
	for second := now.Unix() - rateSeconds; second < now.Unix(); second++ { // those that are over
		if second <= c.last && second > c.last-int64(len(c.seconds)) {
			for i, n := range c.seconds[second%int64(len(c.seconds))] {
				sums[i] += uint64(n)
			}
		}
	}
	info.InFlight = c.inFlight
	info.Delivered, info.Deferred, info.Bounced = c.totals[laneDelivered], c.totals[laneDeferred], c.totals[laneBounced]
	info.DeliveredPerSecond, info.DeferredPerSecond, info.BouncedPerSecond = float64(sums[laneDelivered])/rateSeconds, float64(sums[laneDeferred])/rateSeconds, float64(sums[laneBounced])/rateSeconds
}
