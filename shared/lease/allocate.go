package lease

import (
	"cmp"
	"math/bits"
	"slices"
)

// want is one relay's part in dividing an amount.
type want struct {
	e      *entry
	want   int64
	weight int64
	gets   int64
}

// scale returns a × b / c, rounded down, for 0 ≤ a, 0 ≤ b ≤ c.
func scale(a, b, c int64) int64 {
	if c <= 0 {
		return 0
	}
	hi, lo := bits.Mul64(uint64(a), uint64(b))
	q, _ := bits.Div64(hi, lo, uint64(c)) // b ≤ c, so it fits
	return int64(q)
}

// allocate decides what everybody is to have of a limit and adds what that takes
// to the command: first what comes back, then what can be given at once. It
// returns pushed with the relays that are to be told of less right away.
func (g *Grantor) allocate(now Instant, l *limitState, t *Tick, pushed []*nodeState) []*nodeState {
	l.prune(g)
	for _, e := range l.entries {
		e.lower(t)
	}
	g.divideFloors(now, l)
	g.divideCeilings(now, l)
	for _, e := range l.entries {
		if e.shrink(g) {
			pushed = append(pushed, e.n)
		}
	}
	g.lift(l, t)
	return pushed
}

// prune forgets relays that neither have nor want anything.
func (l *limitState) prune(g *Grantor) {
	for i := len(l.entries) - 1; i >= 0; i-- {
		e := l.entries[i]
		if e.demand == 0 && e.ceiling.zero() && e.floor.zero() && e.sent.zero() && e.sentFloor.zero() {
			g.remove(e)
		}
	}
}

// change adds a change to the command. What falls comes before what rises, so a
// relay of which one part falls and another rises has two.
func (e *entry) change(t *Tick, ceiling, floor Share, why Reason) {
	t.Changes = append(t.Changes, Change{e.l.ID, e.n.id, e.n.incarnation, ceiling, floor, why})
	e.at = len(t.Changes)
}

// current returns a relay's ceiling and floor as the command will leave them.
func (e *entry) current(t *Tick) (ceiling, floor Share) {
	if e.at > 0 {
		c := &t.Changes[e.at-1]
		return c.Ceiling, c.Floor
	}
	return e.ceiling, e.floor
}

// lower adds to the command what the relay has confirmed to hold no longer.
func (e *entry) lower(t *Tick) {
	if e.acked == 0 || e.acked != e.seq || e.at > 0 || e.n.anew() {
		return
	}
	ceiling, floor := e.sent, e.sentFloor
	if e.l.Kind == Slots {
		// What is still open stays counted, as ceiling as far as that goes.
		ceiling.Amount = min(max(ceiling.Amount, e.held), e.ceiling.Amount)
		floor.Amount = min(e.floor.Amount, floor.Amount+max(0, e.held-ceiling.Amount))
	}
	ceiling, floor = ceiling.min(e.ceiling), floor.min(e.floor)
	if ceiling != e.ceiling || floor != e.floor {
		e.change(t, ceiling, floor, Acked)
	}
}

// shrink tells a relay of less, if it is to have less.
func (e *entry) shrink(g *Grantor) bool {
	sent, floor := e.sent.min(e.want), e.sentFloor.min(e.floorW)
	if !sent.usable(e.l.Kind) {
		sent = Share{}
	}
	if sent == e.sent && floor == e.sentFloor {
		return false
	}
	e.sent, e.sentFloor = sent, floor
	e.stamp(g)
	return true
}

// lift adds to the command what can be given out, and remembers whom to tell when
// it is committed.
func (g *Grantor) lift(l *limitState, t *Tick) {
	free, need := l.whole(), Share{}
	for _, e := range l.entries {
		ceiling, floor := e.current(t)
		free = free.sub(ceiling).sub(floor)
		need = need.add(e.lack(t))
	}
	free = free.max(Share{})
	// Whole things cannot be divided: who comes first gets them.
	inTurn := l.Kind == Slots || need.Burst > free.Burst
	for _, e := range l.entries {
		lack := e.lack(t)
		if inTurn {
			give := e.lift(g, t, lack.min(free))
			free = free.sub(give)
		} else {
			e.lift(g, t, Share{share(lack.Amount, free.Amount, need.Amount), lack.Burst})
		}
	}
}

// share is a lack's part of what is free, all of it if there is enough.
func share(lack, free, need int64) int64 {
	if need <= free {
		return lack
	}
	return scale(free, lack, need)
}

// lack returns what is missing to what a relay is to have.
func (e *entry) lack(t *Tick) Share {
	if !e.n.heard || e.n.gone || e.n.anew() {
		return Share{}
	}
	ceiling, floor := e.current(t)
	return e.want.sub(ceiling).max(Share{}).add(e.floorW.sub(floor).max(Share{}))
}

// lift raises a relay by what can be given, the floor first, and returns how much
// of it was of use.
func (e *entry) lift(g *Grantor, t *Tick, give Share) Share {
	if !e.n.heard || e.n.gone || e.n.anew() {
		return Share{}
	}
	ceiling, floor := e.current(t)
	toFloor := e.floorW.sub(floor).max(Share{}).min(give)
	if !floor.add(toFloor).usable(e.l.Kind) {
		toFloor = Share{}
	}
	toCeiling := e.want.sub(ceiling).max(Share{}).min(give.sub(toFloor))
	if !ceiling.add(toCeiling).usable(e.l.Kind) {
		toCeiling = Share{}
	}
	if !toFloor.zero() || !toCeiling.zero() {
		ceiling, floor = ceiling.add(toCeiling), floor.add(toFloor)
		e.change(t, ceiling, floor, Raised)
	}
	if next := e.want.min(ceiling); next.usable(e.l.Kind) && !next.within(e.sent) || !e.floorW.min(floor).within(e.sentFloor) {
		g.plans = append(g.plans, e)
	}
	return toFloor.add(toCeiling)
}

// divideCeilings decides what everybody is to hold beyond the floor: by weighted
// max-min over what is wanted, and what is left over likewise. A reserve stays
// free, so that a new demand is met before others have given anything back.
func (g *Grantor) divideCeilings(now Instant, l *limitState) {
	room := l.whole()
	for _, e := range l.entries {
		room = room.sub(e.floor.max(e.floorW))
		if !e.n.heard {
			// Not to be had before the relay speaks or is reclaimed.
			room = room.sub(e.ceiling)
		}
	}
	room = room.max(Share{})
	pool := room.sub(l.reserve()).max(Share{})
	seats := pool.Amount / l.quantum()
	if l.Kind == Rate {
		if pool.Amount > 0 {
			seats = max(seats, 1)
		}
		seats = min(seats, pool.Burst)
	}
	g.seat(now, l, seats)

	g.wants = g.wants[:0]
	for _, e := range l.entries {
		switch {
		case !e.n.heard:
			e.want = e.sent // as it was
		case e.seated:
			e.want = Share{}
			g.wants = append(g.wants, want{e: e, want: e.demand - e.floor.max(e.floorW).Amount, weight: e.n.weight})
		default:
			e.want = Share{}
		}
	}
	fill(g.wants, pool.Amount, l.Kind == Slots)
	l.settle(g.wants, pool, room)
}

// reserve is what stays free. Without an event of the burst the rate would be of
// no use.
func (l *limitState) reserve() Share {
	r := Share{scale(l.Max, int64(l.ReservePercent), 100) / l.quantum() * l.quantum(), scale(l.Burst, int64(l.ReservePercent), 100)}
	if r.Amount > 0 && l.Burst >= 4 {
		r.Burst = max(r.Burst, 1)
	}
	return r
}

// settle turns what the division gives into what is wanted. Changes that are too
// small to be worth a command are passed over, if there is room for that.
func (l *limitState) settle(wants []want, pool, room Share) {
	spare, total := max(0, pool.Burst-int64(len(wants))), int64(0)
	for i := range wants {
		total += wants[i].gets
	}
	kept := Share{}
	for i := range wants {
		w := &wants[i]
		w.e.want = Share{Amount: w.gets}
		if l.Kind == Rate && w.gets > 0 {
			w.e.want.Burst = 1 + scale(spare, w.gets, total)
		}
		kept = kept.add(w.e.keep())
	}
	if !kept.within(room) || !l.sum.within(l.whole()) {
		return
	}
	for i := range wants {
		wants[i].e.want = wants[i].e.keep()
	}
}

// keep returns what a relay has, if what it is to have is nearly that: at most a
// twentieth more or less, or a tenth if that is less than one event. From and to
// nothing is never a small step.
func (e *entry) keep() Share {
	old, next := e.sent, e.want
	if !old.usable(e.l.Kind) || !next.usable(e.l.Kind) {
		return next
	}
	moved := max(next.Amount-old.Amount, old.Amount-next.Amount)
	if moved > old.Amount/20 && (moved >= e.l.quantum() || moved > old.Amount/10) {
		return next
	}
	if old.Burst > 2*next.Burst || next.Burst > 2*old.Burst {
		return next
	}
	return old
}

// fill divides an amount by weighted max-min: in the order of want per weight
// each gets what it wants or, if that is more than its part of what is left, that
// part. What nobody wants is divided by weight too, so that growth need not wait
// for a command. Slots are whole, and everybody gets one first.
func fill(wants []want, amount int64, whole bool) {
	slices.SortStableFunc(wants, func(a, b want) int {
		return cmp.Or(cmp.Compare(a.want*b.weight, b.want*a.weight), cmp.Compare(a.e.n.id, b.e.n.id))
	})
	weights, left := int64(0), amount
	for i := range wants {
		w := &wants[i]
		weights += w.weight
		if whole && left > 0 {
			w.gets, w.want = 1, w.want-1
			left--
		}
	}
	heavy := weights
	for i := range wants {
		w := &wants[i]
		part := min(w.want, scale(left, w.weight, heavy))
		w.gets += part
		left -= part
		heavy -= w.weight
	}
	for i, rest := 0, left; i < len(wants); i++ {
		part := scale(rest, wants[i].weight, weights)
		if i == len(wants)-1 {
			part = left
		}
		wants[i].gets += part
		left -= part
	}
}
