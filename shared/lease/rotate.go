package lease

import (
	"cmp"
	"slices"
	"time"
)

// hold is how long a relay may keep a seat that others wait for: three quarters of
// Config.Hold to all of it, another part for each limit and each turn. Turns of one
// length would keep step: of two relays with mail that two limits count, each would
// have the seat of the one while the other has that of the other, for good.
func (e *entry) hold(cfg Config) time.Duration {
	// The finalizer of SplitMix64: any mixture that spreads neighbours will do.
	x := uint64(e.since) ^ uint64(e.l.ID)*0x9e3779b97f4a7c15
	x = (x ^ x>>30) * 0xbf58476d1ce4e5b9
	x = (x ^ x>>27) * 0x94d049bb133111eb
	return cfg.Hold - time.Duration((x^x>>31)%256)*(cfg.Hold/1024)
}

// seat decides who may have a ceiling. When a limit has room for all who want
// some, they all do. When it has fewer seats than that, a seat is held for
// Config.Hold at most and then goes to who has waited longest, if anybody waits:
// with n relays that want k seats each waits n/k holds at most, and the time it
// takes a relay to give its seat back.
func (g *Grantor) seat(now Instant, l *limitState, seats int64) {
	wanting, seated := int64(0), int64(0)
	for _, e := range l.entries {
		wants := e.n.heard && !e.n.gone && e.demand > e.floor.max(e.floorW).Amount
		switch {
		case !wants:
			e.seated, e.waits = false, false
			continue
		case !e.seated && !e.waits:
			e.waits, e.since = true, now
		case e.seated:
			seated++
		}
		wanting++
	}
	l.rotate(g, wanting > seats)
	// Those whose time is up make room, the longest seated first, but only for
	// somebody.
	waiting := wanting - seated
	for short := waiting - max(0, seats-seated); short > 0; short-- {
		e := l.oldest(func(e *entry) bool {
			return e.seated && e.sent.usable(l.Kind) && now >= e.since.Add(e.hold(g.cfg))
		})
		if e == nil {
			break
		}
		e.seated, e.waits, e.since = false, true, now
		seated--
	}
	for ; seated > seats; seated-- {
		e := l.oldest(func(e *entry) bool { return e.seated })
		e.seated, e.waits, e.since = false, true, now
	}
	for ; seated < seats; seated++ {
		e := l.oldest(func(e *entry) bool { return e.waits })
		if e == nil {
			break
		}
		e.seated, e.waits, e.since = true, false, now
	}
	l.due = now.Add(g.cfg.Hold)
	for _, e := range l.entries {
		if e.seated {
			l.due = min(l.due, e.since.Add(e.hold(g.cfg)))
		}
	}
}

// oldest returns who of some has been as it is for longest, by node among equals.
func (l *limitState) oldest(of func(*entry) bool) *entry {
	var found *entry
	for _, e := range l.entries {
		if of(e) && (found == nil || e.since < found.since) {
			found = e
		}
	}
	return found
}

// rotate notes whether the limit must be looked at as time passes.
func (l *limitState) rotate(g *Grantor, on bool) {
	if l.rotates == on {
		return
	}
	l.rotates = on
	if on {
		g.rotates = append(g.rotates, l)
	} else {
		g.rotates = slices.DeleteFunc(g.rotates, func(r *limitState) bool { return r == l })
	}
}

// divideFloors decides what everybody may use when cut off: a fixed part of the
// limit, by recent use, among those who were heard of or have a floor. It is done
// seldom, for a floor is taken back only by its holder's word or after a day.
func (g *Grantor) divideFloors(now Instant, l *limitState) {
	budget := Share{
		Amount: scale(l.Max, int64(l.FloorPercent), 100) / l.quantum() * l.quantum(),
		Burst:  scale(l.Burst, int64(l.FloorPercent), 100),
	}
	if !l.floorsDue(g, now, budget) {
		return
	}
	l.floorAt, l.floored = now, true
	g.wants = g.wants[:0]
	for _, e := range l.entries {
		e.floorW = Share{}
		if use := max(e.recent, min(e.demand, l.quantum())); e.n.heard && !e.n.gone && use > 0 {
			g.wants = append(g.wants, want{e: e, want: use, weight: 1})
		} else if !e.n.heard {
			e.floorW = e.floor // it may be using it
			budget = budget.sub(e.floor).max(Share{})
		}
	}
	seats := l.floorSeats(budget)
	if int64(len(g.wants)) > seats {
		slices.SortStableFunc(g.wants, func(a, b want) int {
			return cmp.Or(-cmp.Compare(a.want, b.want), cmp.Compare(a.e.n.id, b.e.n.id))
		})
		g.wants = g.wants[:seats]
	}
	total := int64(0)
	for i := range g.wants {
		total += g.wants[i].want
	}
	extra := budget.sub(Share{int64(len(g.wants)) * l.quantum(), int64(len(g.wants))})
	for i := range g.wants {
		w := &g.wants[i]
		next := Share{Amount: l.quantum() + scale(extra.Amount, w.want, total)/l.quantum()*l.quantum()}
		if l.Kind == Rate {
			next.Burst = 1 + scale(extra.Burst, w.want, total)
		}
		w.e.floorW = next
	}
	l.keepFloors(g.wants, budget)
}

// floorSeats returns how many relays can have a part of what there is for floors.
func (l *limitState) floorSeats(budget Share) int64 {
	seats := budget.Amount / l.quantum()
	if l.Kind == Rate {
		seats = min(seats, budget.Burst)
	}
	return seats
}

// keepFloors leaves floors as they are that are nearly right, if all of them fit.
func (l *limitState) keepFloors(wants []want, budget Share) {
	keep := func(e *entry) Share {
		moved := max(e.floorW.Amount-e.floor.Amount, e.floor.Amount-e.floorW.Amount)
		if e.floor.usable(l.Kind) && moved <= e.floor.Amount/5 {
			return e.floor
		}
		return e.floorW
	}
	kept := Share{}
	for i := range wants {
		kept = kept.add(keep(wants[i].e))
	}
	if !kept.within(budget) {
		return
	}
	for i := range wants {
		wants[i].e.floorW = keep(wants[i].e)
	}
}

// floorsDue reports whether floors are to be divided: at first, when the limit
// became too small for them, and, not too often, by use. The first division is
// among those who were heard so far, which after a leader's start may be one relay;
// so who has none and could have one does not wait for long.
func (l *limitState) floorsDue(g *Grantor, now Instant, budget Share) bool {
	if l.FloorPercent == 0 {
		for _, e := range l.entries {
			if !e.floorW.zero() {
				return true
			}
		}
		return false
	}
	sum, taken, bare, any := Share{}, int64(0), false, false
	for _, e := range l.entries {
		sum = sum.add(e.floorW)
		if !e.floorW.zero() {
			taken++
		}
		if e.n.heard && e.demand > 0 {
			any = true
			bare = bare || e.floorW.zero()
		}
	}
	switch {
	case !sum.within(budget):
		return true
	case !any:
		return false
	case !l.floored:
		return true
	}
	gap := g.cfg.FloorGap
	if bare && taken < l.floorSeats(budget) {
		gap = min(g.cfg.TTL, gap/10)
	}
	return now >= l.floorAt.Add(gap)
}
