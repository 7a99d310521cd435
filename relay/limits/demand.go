package limits

import (
	"math"
	"time"

	"github.com/relais-mta/relais/relay/schedule"
	"github.com/relais-mta/relais/shared/lease"
)

const (
	sampleEvery  = 250 * time.Millisecond // what is due is looked at while there are limits: a share is to move within a second
	demandTau    = 5 * time.Second        // over which arrivals are averaged
	backlogIn    = 30 * time.Second       // in which what waits is to be gone
	perSession   = 4                      // recipients that one more connection is wanted for
	demandFactor = 4                      // no more of a limit than this is asked for
	roomFor      = time.Second            // mail has waited so long, and not for the limit: something else holds it
	roomFactor   = 2                      // as much as is used is asked for then
)

// behind finds the limits of connections that count all that a rate counts. While
// one of them leaves the relay no connection, nothing of the rate can be used.
func (t *table) behind(rate *limit) (out []*limit) {
	for _, lim := range t.limits {
		if lim.Kind == lease.Slots && lim.covers(rate) {
			out = append(out, lim)
		}
	}
	return out
}

// covers reports whether all that other counts is counted by lim.
func (lim *limit) covers(other *limit) bool {
	return (lim.Provider == "" || lim.Provider == other.Provider) && (lim.Domain == "" || lim.Domain == other.Domain) &&
		(lim.Pool.IsZero() || lim.Pool == other.Pool) && (lim.Tenant.IsZero() || lim.Tenant == other.Tenant)
}

// look notes which rates can not be used at all for want of a connection, and
// whether that is other than before: then the leader is told soon, for the rate is
// wanted where the connection goes. l.mu is held.
func (l *Limits) look(now lease.Instant, t *table) (changed bool) {
	for _, lim := range t.limits {
		blocked := false
		for _, s := range lim.behind {
			blocked = blocked || s.rights == nil || s.rights.Opened() == 0 && s.rights.Usable(now).Amount == 0
		}
		if blocked != lim.blocked {
			lim.blocked, lim.roomy, lim.roomyBegun, changed = blocked, 0, 0, true
		}
	}
	return changed
}

// sample looks at what is due under each limit and tells the holder what the relay
// could use.
func (l *Limits) sample() {
	l.mu.Lock()
	now := l.cfg.Clock()
	t, since := l.table.Load(), now.Sub(l.sampled)
	due := l.look(now, t) || len(t.limits) > 0 && since >= sampleEvery
	if l.sampled == 0 || since <= 0 {
		since = sampleEvery
	}
	if due {
		l.sampled = now
	}
	l.mu.Unlock()
	if !due || l.gates == nil {
		return
	}
	states := l.gates.GateStates(Owner, nil)
	byNumber := make(map[uint64]*schedule.GateState, len(states))
	for i := range states {
		byNumber[states[i].Number] = &states[i]
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.table.Load() != t {
		return // the view changed meanwhile; who changed it has the loop look again
	}
	for _, lim := range t.limits {
		s := byNumber[uint64(lim.ID)]
		if s == nil {
			s = &schedule.GateState{}
		}
		demand := lim.demand(s, since)
		if lim.rights != nil || demand > 0 {
			l.holder.SetDemand(l.rightsOf(lim), demand)
		}
	}
}

// demand is what the relay could use of a limit, in the unit of amounts.
func (lim *limit) demand(s *schedule.GateState, since time.Duration) int64 {
	if lim.Kind == lease.Slots {
		return min(lim.Max, int64(s.Sessions+(s.Waiting+perSession-1)/perSession))
	}
	came, begun := max(0, s.Waiting-lim.waiting+lim.begun), lim.begun
	lim.waiting, lim.begun = s.Waiting, 0
	part := 1 - math.Exp(-since.Seconds()/demandTau.Seconds())
	lim.arrivals += part * (float64(came)/since.Seconds() - lim.arrivals)
	wanted := (lim.arrivals + float64(s.Waiting)/backlogIn.Seconds()) * lim.Per.Seconds() * lease.Milli
	demand := int64(min(wanted, demandFactor*float64(lim.Max)))
	most := lim.room(s, begun, since)
	switch {
	case lim.blocked:
		return 0
	case s.Waiting > 0:
		demand = max(min(demand, most), lease.Milli)
	case demand < lease.Milli/100:
		demand, lim.arrivals = 0, 0
	}
	return demand
}

// room returns the most that can be used as long as something else than this limit
// holds the mail: hosts that are slow, few connections, a brake. What is set aside
// for it here is missed elsewhere.
func (lim *limit) room(s *schedule.GateState, begun int, since time.Duration) int64 {
	if s.Waiting == 0 || s.Held {
		lim.roomy, lim.roomyBegun = 0, 0
		return math.MaxInt64
	}
	lim.roomy += since
	lim.roomyBegun += begun
	if lim.roomy < roomFor {
		return math.MaxInt64
	}
	used := float64(lim.roomyBegun) / lim.roomy.Seconds() * lim.Per.Seconds() * lease.Milli
	if lim.roomy >= 2*roomFor { // what was long ago counts less and less
		lim.roomy, lim.roomyBegun = lim.roomy/2, lim.roomyBegun/2
	}
	return int64(min(roomFactor*used, demandFactor*float64(lim.Max))) + lease.Milli
}
