package lease

import (
	"cmp"
	"slices"
	"time"
)

// Grantor is the leader's half: it decides who is to hold how much of every
// limit. It begins with the table as of the barrier of its term, and lives as
// long as the term. One goroutine owns it. The caller
//
//   - hands it what relays say (Hello, Report, Release);
//   - calls Tick every quarter of a second, sends the grants that it returns, and
//     proposes the command, if there is one;
//   - calls Committed when the command was applied, and sends what that returns.
//     If its fate is not known, the caller steps down.
type Grantor struct {
	cfg        Config
	generation uint64
	term       uint64
	seq        uint64
	parts      int // entries of all limits

	limits []*limitState
	byID   map[LimitID]*limitState
	nodes  []*nodeState // in order
	byNode map[Node]*nodeState

	queue   []*nodeState // said something since the last tick
	dirty   []*limitState
	rotates []*limitState // must be looked at as time passes
	tick    *Tick         // proposed and not yet committed
	batch   []*nodeState  // to be answered when it is
	plans   []*entry      // to be raised when it is
	stopped bool

	wants []want // kept between calls, for the memory only
}

// nodeState is what the leader knows of a relay.
type nodeState struct {
	id          Node
	incarnation uint64 // replicated
	hello       uint64 // incarnation to be replicated
	basis       Instant
	heard       bool   // in this term, and not silent since
	nonce       uint64 // of the last report received
	batched     uint64 // of the report that the proposed tick answers
	answered    uint64 // of the last report answered
	queued      bool
	welcome     bool
	gone        bool
	weight      int64
	entries     []*entry // in the order of limits
}

// anew reports whether a new incarnation of the relay is about to be replicated.
// What a command says of the former one would be refused: it waits for the next.
func (n *nodeState) anew() bool { return n.hello > n.incarnation }

// limitState is one limit and everybody who holds or wants something of it.
type limitState struct {
	Limit
	entries []*entry // in the order of nodes
	sum     Share    // of ceilings and floors, replicated
	dirty   bool
	rotates bool    // there are fewer seats than relays that want one
	due     Instant // of a limit that rotates: the next seat is given up
	floorAt Instant // floors were divided
	floored bool
	dropped bool
}

// entry is one relay's part in one limit.
type entry struct {
	n *nodeState
	l *limitState

	ceiling, floor Share // replicated
	sent           Share // of the last grant
	sentFloor      Share
	seq            uint64 // of the last grant in this term, 0 if there was none
	acked          uint64 // the last grant that a report confirmed
	held           int64  // as that report said

	demand int64
	used   int64 // as the last report said
	denied int64
	recent int64 // use, averaged over minutes: what floors are divided by
	want   Share // what it is to have, as of the last allocation
	floorW Share
	since  Instant // seated or waiting since
	seated bool    // may have a ceiling
	waits  bool
	push   bool // the last grant was not sent yet
	at     int  // index of its last change in the proposed command, plus one
}

// NewGrantor returns the leader's half for a term, as of the moment at which the
// term's own barrier was applied to the table.
func NewGrantor(cfg Config, t *Table, generation, term uint64, barrier Instant) *Grantor {
	g := &Grantor{
		cfg: cfg, generation: generation, term: term,
		byID: make(map[LimitID]*limitState), byNode: make(map[Node]*nodeState),
	}
	for _, id := range t.Nodes() {
		n := g.node(id)
		n.incarnation, n.gone = t.Session(id)
		// R4. Whoever led before has prolonged nothing after this barrier, so
		// what the relay holds ends within a TTL of it.
		n.basis = barrier
	}
	for _, l := range t.Limits() {
		g.PutLimit(l)
		row := g.byID[l.ID]
		for _, h := range t.Holdings(l.ID) {
			e := g.entry(row, g.node(h.Node))
			e.ceiling, e.floor = h.Ceiling, h.Floor
			// Unknown is what the former leader told the relay: at most all of it.
			e.sent, e.sentFloor, e.want, e.floorW = h.Ceiling, h.Floor, h.Ceiling, h.Floor
			row.sum = row.sum.add(h.Ceiling).add(h.Floor)
			e.seated, e.since = h.Ceiling.usable(l.Kind), barrier
		}
	}
	return g
}

// PutLimit tells of a limit that the table holds now, new or changed.
func (g *Grantor) PutLimit(l Limit) {
	row := g.byID[l.ID]
	if row == nil {
		row = &limitState{}
		g.byID[l.ID] = row
		at, _ := slices.BinarySearchFunc(g.limits, l.ID, func(r *limitState, id LimitID) int { return cmp.Compare(r.ID, id) })
		g.limits = slices.Insert(g.limits, at, row)
	}
	row.Limit = l
	g.touch(row)
}

// DropLimit tells of a limit that the table no longer holds.
func (g *Grantor) DropLimit(id LimitID) {
	row := g.byID[id]
	if row == nil {
		return
	}
	row.dropped = true
	g.parts -= len(row.entries)
	for _, e := range row.entries {
		e.n.forget(e)
	}
	delete(g.byID, id)
	g.limits = slices.DeleteFunc(g.limits, func(r *limitState) bool { return r == row })
	g.dirty = slices.DeleteFunc(g.dirty, func(r *limitState) bool { return r == row })
	g.rotates = slices.DeleteFunc(g.rotates, func(r *limitState) bool { return r == row })
}

// Evict tells of a relay that was put out: it is answered no more, and what it
// holds is reclaimed as if it were silent.
func (g *Grantor) Evict(id Node) {
	n := g.node(id)
	n.gone, n.heard = true, false
	for _, e := range n.entries {
		e.demand = 0
		g.touch(e.l)
	}
}

// Stop ends the giving out. It precedes an intended change of leader: what is
// proposed after it would be of unknown fate.
func (g *Grantor) Stop() { g.stopped = true }

// Hello takes a relay's greeting.
func (g *Grantor) Hello(now Instant, h Hello) {
	if g.byNode[h.Node] == nil && len(g.nodes) >= MaxNodes {
		return // the table would refuse it
	}
	n := g.node(h.Node)
	if n.gone || h.Incarnation < n.incarnation || h.Incarnation < n.hello {
		return
	}
	n.welcome = true
	if h.Incarnation > n.incarnation {
		n.hello = h.Incarnation
	}
	g.enqueue(n)
}

// Report takes a relay's report. Reports of other incarnations and those that
// come out of order are passed over.
func (g *Grantor) Report(now Instant, r *Report) {
	n := g.byNode[r.Node]
	if n == nil || n.gone || r.Incarnation != n.incarnation || n.hello > n.incarnation || r.Nonce <= n.nonce {
		return
	}
	// One that came before the barrier, and waited, proves nothing about it.
	n.nonce, n.basis, n.heard = r.Nonce, max(n.basis, now), true
	n.weight = min(max(r.Weight, 1), 1000)
	g.enqueue(n)
	at := 0
	for i := range r.Lines {
		line := &r.Lines[i]
		row := g.byID[line.Limit]
		if row == nil || i > 0 && line.Limit <= r.Lines[i-1].Limit {
			continue
		}
		for at < len(n.entries) && n.entries[at].l.ID < line.Limit {
			g.unlisted(n.entries[at])
			at++
		}
		if at == len(n.entries) || n.entries[at].l != row {
			if g.parts >= MaxHolders {
				continue
			}
			g.entry(row, n) // inserts at this very place
		}
		n.entries[at].report(g, line)
		g.touch(row)
		at++
	}
	for ; at < len(n.entries); at++ {
		g.unlisted(n.entries[at])
	}
}

// report takes one line of a report.
func (e *entry) report(g *Grantor, line *Line) {
	e.demand, e.used, e.denied = max(line.Demand, 0), max(line.Used, 0), max(line.Denied, 0)
	e.recent += (e.demand - e.recent) / 16
	if e.recent == 0 {
		e.recent = e.demand
	}
	// R2. Only a report about the last grant says what the relay holds.
	e.acked = 0
	if line.Stamp == (Stamp{g.generation, g.term, e.seq}) && e.seq != 0 {
		e.acked, e.held = e.seq, max(line.Held, 0)
	}
}

// unlisted takes it that a full report did not name a limit.
func (g *Grantor) unlisted(e *entry) {
	if e.demand != 0 || !e.sent.zero() || !e.ceiling.zero() || !e.floor.zero() {
		e.demand = 0
		g.touch(e.l)
	}
}

// Release takes a limit back that a relay gave up. A release that does not know
// the last grant means nothing: the relay will act on that grant.
func (g *Grantor) Release(now Instant, r Release) {
	n, row := g.byNode[r.Node], g.byID[r.Limit]
	if n == nil || row == nil || r.Incarnation != n.incarnation || n.hello > n.incarnation {
		return
	}
	e := row.find(n)
	if e == nil || e.seq == 0 || r.Stamp != (Stamp{g.generation, g.term, e.seq}) {
		return
	}
	e.demand, e.sent, e.acked, e.held = 0, Share{}, e.seq, 0
	g.touch(row)
}

// Tick decides what is to change and returns the command to propose, nil if there
// is none, and the grants that need not wait for it: those that only take. While a
// command is on its way there is no other.
func (g *Grantor) Tick(now Instant) (*Tick, []Grant) {
	if g.tick != nil || g.stopped {
		return nil, nil
	}
	t := &Tick{}
	for _, n := range g.queue {
		if n.anew() {
			t.Sessions = append(t.Sessions, Session{n.id, n.hello})
		}
	}
	g.reclaim(now, t)
	g.dueRotations(now)
	var pushed []*nodeState
	for _, row := range g.dirty {
		row.dirty = false
		pushed = g.allocate(now, row, t, pushed)
	}
	g.dirty = g.dirty[:0]
	out := g.pushes(pushed)
	if len(t.Sessions) == 0 && len(t.Changes) == 0 && len(g.queue) == 0 && len(g.plans) == 0 {
		return nil, out
	}
	// R1. A report is answered only when a command proposed after it came is
	// committed: so whoever answers was the leader after the report was sent.
	g.tick = t
	g.batch, g.queue = g.queue, g.batch[:0]
	for _, n := range g.batch {
		n.queued, n.batched = false, n.nonce
	}
	return t, out
}

// Committed tells that the proposed command was applied, and what of it was
// refused. It returns what may be sent now.
func (g *Grantor) Committed(now Instant, refused []Refusal) ([]Welcome, []Grant) {
	t := g.tick
	if t == nil {
		return nil, nil
	}
	g.tick = nil
	failed := make(map[int]bool, len(refused))
	for _, r := range refused {
		failed[r.Item] = true
	}
	for i, s := range t.Sessions {
		if !failed[i] {
			g.begin(g.byNode[s.Node], s.Incarnation)
		}
	}
	for i := range t.Changes {
		c := &t.Changes[i]
		row := g.byID[c.Limit]
		if row == nil {
			continue
		}
		e := row.find(g.byNode[c.Node])
		if e == nil {
			continue // the limit was dropped and put back meanwhile
		}
		e.at = 0
		if !failed[len(t.Sessions)+i] && e.n.incarnation == c.Incarnation {
			e.commit(c)
		}
		g.touch(row)
	}
	var pushed []*nodeState
	for _, e := range g.plans {
		if e.raise(g, now) {
			pushed = append(pushed, e.n)
		}
	}
	g.plans = g.plans[:0]
	return g.answers(pushed)
}

// commit takes over a change that was applied.
func (e *entry) commit(c *Change) {
	e.l.sum = e.l.sum.sub(e.ceiling).sub(e.floor).add(c.Ceiling).add(c.Floor)
	e.ceiling, e.floor = c.Ceiling, c.Floor
	e.sent, e.sentFloor = e.sent.min(e.ceiling), e.sentFloor.min(e.floor)
	if c.Why == Reclaimed {
		e.seq, e.acked = 0, 0 // the relay has not been told
	}
}

// begin starts a relay's new incarnation: what the former held is free, but for
// floors.
func (g *Grantor) begin(n *nodeState, incarnation uint64) {
	n.incarnation = incarnation
	n.nonce, n.batched, n.answered = 0, 0, 0
	for _, e := range n.entries {
		e.l.sum = e.l.sum.sub(e.ceiling)
		e.ceiling, e.sent, e.want = Share{}, Share{}, Share{}
		e.seq, e.acked, e.held, e.demand = 0, 0, 0, 0
		e.seated = false
		g.touch(e.l)
	}
}

// raise gives a relay what is set aside for it now.
func (e *entry) raise(g *Grantor, now Instant) bool {
	if e.l.dropped || !e.n.heard {
		return false
	}
	sent, floor := e.want.min(e.ceiling), e.floorW.min(e.floor)
	if !sent.usable(e.l.Kind) {
		sent = Share{}
	}
	if sent == e.sent && floor == e.sentFloor {
		return false
	}
	if !e.sent.usable(e.l.Kind) {
		e.since = now // the time of a seat counts from when it can be used
	}
	e.sent, e.sentFloor = sent, floor
	e.stamp(g)
	return true
}

func (e *entry) stamp(g *Grantor) {
	g.seq++
	e.seq, e.acked = g.seq, 0
	e.push = true
}

// reclaim takes back what silent relays hold.
func (g *Grantor) reclaim(now Instant, t *Tick) {
	for _, n := range g.nodes {
		if len(n.entries) == 0 || n.anew() || now <= n.basis.Add(Outlast(g.cfg.TTL)) {
			continue
		}
		// R3. The relay's own lease has ended by now, whatever its clock.
		n.heard = false
		for i := len(n.entries) - 1; i >= 0; i-- {
			e := n.entries[i]
			linger := time.Duration(0)
			if e.l.Kind == Slots {
				linger = g.cfg.Linger
			}
			ceiling, floor := e.ceiling, e.floor
			if now > n.basis.Add(Outlast(g.cfg.TTL+linger)) {
				ceiling = Share{}
			}
			if !e.l.SoftFloor && now > n.basis.Add(Outlast(g.cfg.FloorTTL+linger)) {
				floor = Share{}
			}
			if e.demand != 0 {
				e.demand = 0
				g.touch(e.l)
			}
			switch {
			case ceiling != e.ceiling || floor != e.floor:
				e.change(t, ceiling, floor, Reclaimed)
				g.touch(e.l)
			case ceiling.zero() && floor.zero():
				g.remove(e)
			}
		}
	}
}

// dueRotations has limits looked at in which a seat is to change hands.
func (g *Grantor) dueRotations(now Instant) {
	for _, row := range g.rotates {
		if now >= row.due {
			g.touch(row)
		}
	}
}

func (g *Grantor) touch(row *limitState) {
	if !row.dirty && !row.dropped {
		row.dirty = true
		g.dirty = append(g.dirty, row)
	}
}

func (g *Grantor) enqueue(n *nodeState) {
	if !n.queued {
		n.queued = true
		g.queue = append(g.queue, n)
	}
}
