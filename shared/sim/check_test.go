package sim

import (
	"time"

	"github.com/relais-mta/relais/shared/lease"
	"github.com/relais-mta/relais/shared/warmup"
)

// checker holds the world against what was promised. It knows everything: what no
// machine does.
type checker struct {
	windows map[lease.LimitID]*window
	sent    map[lease.LimitID]int64         // events in all
	offers  map[quotaKey]uint32             // recipients that hosts were offered
	claims  map[claimID]uint32              // the highest that a relay said it spent
	opened  int                             // connections from addresses
	changed map[lease.LimitID]bool          // the limit was lowered or raised
	aware   map[lease.LimitID]time.Duration // since when the leader knows of that
	put     map[lease.Node]time.Duration    // out: since when the leader knows of that
}

type claimID struct {
	relay *relay
	id    accountID
}

// window holds events against limit × time + burst, for every span of time at
// once: as a bucket that fills at the limit's rate.
type window struct {
	level float64
	at    time.Duration
}

// clockTolerance is how much faster than the world a relay's clock may run.
const clockTolerance = 1.005

func (c *checker) init() {
	c.windows = make(map[lease.LimitID]*window)
	c.sent = make(map[lease.LimitID]int64)
	c.offers = make(map[quotaKey]uint32)
	c.claims = make(map[claimID]uint32)
	c.changed = make(map[lease.LimitID]bool)
	c.aware = make(map[lease.LimitID]time.Duration)
	c.put = make(map[lease.Node]time.Duration)
}

// check holds the world against I1, I2, I4 and A1 to A4 after an event. What a relay
// may do is held against the table's word for that relay: that is stricter than I2.
// Time alone only takes away what relays may do, so it is enough to look at whose
// event it was, and at all relays whose word in the table changed.
func (w *world) check(m *machine) {
	switch {
	case w.failed != "":
	case w.stale: // the log went on, or everything may have changed
		w.stale = false
		for _, r := range w.all {
			w.checkRelay(r)
		}
	case m != nil && m.runs != nil:
		w.checkRelay(m.runs)
	}
}

// changed has the relays of a tick looked at, or all.
func (w *world) changed(result any) {
	if _, ledger := result.(ledgerResult); ledger {
		return // it changes nobody's shares
	}
	res, ok := result.(tickResult)
	if !ok || len(w.all) <= 16 {
		w.stale = true
		return
	}
	for _, n := range res.nodes {
		w.checkRelay(w.relays[n-1])
	}
}

func (w *world) checkRelay(r *relay) {
	if r.holder == nil || w.failed != "" {
		return
	}
	now := r.clock(w.now)
	w.checkAddresses(r, now)
	for _, c := range w.copies {
		w.checkCopy(c)
	}
	for i, id := range w.limits {
		rights := r.under(i)
		has, open := rights.Usable(now), rights.Opened()
		if has.Amount == 0 && has.Burst == 0 && open == 0 {
			continue
		}
		w.tally.held[i2]++
		w.checkEnded(r, id, rights, now)
		h := w.log.state.table.Holding(id, r.node)
		may := lease.Share{Amount: h.Ceiling.Amount + h.Floor.Amount, Burst: h.Ceiling.Burst + h.Floor.Burst}
		if has.Amount > may.Amount || has.Burst > may.Burst {
			w.fail("I2: %s may use %v of limit %d by its own word, the table says %v and %v", r.name, has, id, h.Ceiling, h.Floor)
		}
		// A stopped process cannot close anything; it does so first when it
		// goes on.
		if open > may.Amount && r.until == 0 {
			w.fail("I2: %s has %d slots of limit %d open, the table says %v and %v", r.name, open, id, h.Ceiling, h.Floor)
		}
	}
}

// checkEnded holds a relay against I4, by the reports that were answered, of whatever
// limit: a lease ends a TTL after the last of them was sent, a floor a day.
func (w *world) checkEnded(r *relay, id lease.LimitID, rights *lease.Rights, now lease.Instant) {
	share, until, floor := rights.Lease()
	if now >= r.earned.Add(w.cfg.TTL-w.cfg.Guard) {
		w.tally.held[i4]++
		if share.Amount > 0 {
			w.fail("I4: %s uses %v of limit %d until %v and has earned nothing since %v", r.name, share, id, until, r.earned)
		}
	}
	if floor.Amount > 0 && now >= r.earnedFloors.Add(w.cfg.FloorTTL) {
		w.fail("I4: %s uses a floor %v of limit %d and has earned none since %v", r.name, floor, id, r.earnedFloors)
	}
}

// fill lets the window's bucket fill up to now, at the rate that was in force.
func (c *checker) fill(w *world, l lease.Limit) {
	if l.Kind != lease.Rate {
		return
	}
	sum := w.log.state.table.Sum(l.ID)
	burst, amount := float64(max(l.Burst, sum.Burst)), float64(max(l.Max, sum.Amount))
	b := c.windows[l.ID]
	if b == nil {
		b = &window{level: burst, at: w.now}
		c.windows[l.ID] = b
	}
	b.level += float64(w.now-b.at) / float64(l.Per) * amount / lease.Milli * clockTolerance
	b.level, b.at = min(b.level, burst), w.now
}

// started takes it that an event of a rate started.
func (c *checker) started(w *world, id lease.LimitID) {
	l, _ := w.log.state.table.Limit(id)
	c.fill(w, l)
	c.sent[id]++
	b := c.windows[id]
	if b.level -= 1; b.level < -0.01 {
		w.fail("I2: more events of limit %d than limit × time + burst", id)
	}
}

// offered takes it that recipients were offered under a quota: W2.
func (c *checker) offered(w *world, id accountID, n uint32) {
	k := quotaKey{id.subject, id.day}
	c.offers[k] += n
	w.tally.held[w2]++
	if quota := w.log.state.history[k]; c.offers[k] > quota {
		w.fail("W2: %d recipients were offered for subject %d on %v, the quota was never above %d", c.offers[k], id.subject, id.day, quota)
	}
}

// marked holds what a relay spent against what its disk says, as if it crashed now: W2.
func (c *checker) marked(w *world, r *relay, id accountID) {
	used, _ := r.accounts[id].spender.Peek()
	w.tally.held[w3]++
	switch mark := r.disk.marks[id].Used; {
	case used > mark:
		w.fail("W2: %s has spent %d of %v and its disk says %d", r.name, used, id, mark)
	case mark > used+markStep:
		w.fail("W3: a crash of %s now would waste %d of %v", r.name, mark-used, id)
	}
}

func (c *checker) claim(r *relay, id accountID, used uint32) {
	k := claimID{r, id}
	c.claims[k] = max(c.claims[k], used)
}

// crashed holds what a relay's disk says against what it spent: W3.
func (c *checker) crashed(w *world, r *relay) {
	for _, id := range r.order {
		a := r.accounts[id]
		used, _ := a.spender.Peek()
		mark := r.disk.marks[id].Used
		switch {
		case used > mark:
			w.fail("W2: %s crashed and its disk says that %d of %v are spent, %d are", r.name, mark, id, used)
		case mark > used+markStep:
			w.fail("W3: %s crashed and wastes %d of %v", r.name, mark-used, id)
		}
	}
}

// totals is what the log had given before an entry.
type totals struct {
	sums   []lease.Share
	limits []lease.Limit
	quotas [4]uint64 // reserved: address and domain, today and tomorrow
	today  warmup.Day
}

func (c *checker) before(w *world) totals {
	t := totals{today: w.log.state.ledger.Today()}
	for _, id := range w.limits {
		t.sums = append(t.sums, w.log.state.table.Sum(id))
		l, _ := w.log.state.table.Limit(id)
		c.fill(w, l) // by what held until now
		t.limits = append(t.limits, l)
	}
	for i := range t.quotas {
		_, t.quotas[i], _ = w.log.state.ledger.Totals(warmup.Subject(i%2+1), 0, t.today+warmup.Day(i/2))
	}
	return t
}

// committed holds an entry against I1, W1 and W4, and what the table refused
// against what it should have been asked.
func (c *checker) committed(w *world, before totals, result any) {
	st := w.log.state
	for i, id := range w.limits {
		l, ok := st.table.Limit(id)
		if !ok || i >= len(before.sums) {
			continue
		}
		if l != before.limits[i] {
			if l.Max < before.limits[i].Max {
				w.tally.met[limitFalls]++
			} else {
				w.tally.met[limitRises]++
			}
			c.changed[id] = true
			delete(c.aware, id)
		}
		sum := st.table.Sum(id)
		w.tally.held[i1]++
		if sum.Amount > max(l.Max, before.sums[i].Amount) || sum.Burst > max(l.Burst, before.sums[i].Burst) {
			w.fail("I1: of limit %d with %d and %d are held %v", id, l.Max, l.Burst, sum)
		}
	}
	for i, was := range before.quotas {
		subject, day := warmup.Subject(i%2+1), before.today+warmup.Day(i/2)
		quota, reserved, used := st.ledger.Totals(subject, 0, day)
		if reserved > 0 {
			w.tally.held[w1]++
		}
		if used > 0 {
			w.tally.held[w5]++
		}
		if reserved > max(quota, was) {
			w.fail("W1: of %d for subject %d on %v are reserved %d", quota, subject, day, reserved)
		}
		claimed := uint64(0)
		for _, r := range w.relays {
			for _, id := range r.order {
				if id.subject == subject && id.day == day {
					claimed += uint64(c.claims[claimID{r, id}])
				}
			}
		}
		if used > claimed {
			w.fail("W5: %d are settled for subject %d on %v, relays said %d", used, subject, day, claimed)
		}
	}
	if st.ledger.Today() > before.today {
		w.tally.met[days]++
	}
	for _, r := range w.relays {
		c.reserved(w, r)
	}
	switch res := result.(type) {
	case ipResult:
		c.committedIP(w, res)
	case tickResult:
		for _, r := range res.refused {
			// What a leader proposed before it was told of a limit's change may not fit.
			crossed := false
			if r.Change != nil && c.changed[r.Change.Limit] {
				aware, told := c.aware[r.Change.Limit]
				crossed = !told || res.at <= aware
			}
			if r.Why == "the relay was put out" && (r.Change == nil || res.at <= c.put[r.Change.Node]) {
				continue
			}
			if r.Why != "another incarnation" && r.Why != "a later incarnation is known" && !crossed {
				w.fail("I1: the leader proposed %+v, which the table refused: %s", r.Change, r.Why)
			}
		}
	case ledgerResult:
		if res.id.epoch != st.epochs[res.id.subject] {
			w.tally.held[w4]++
		}
		if res.stale {
			w.fail("W4: an owner that is none any more acquired of %v", res.id)
		}
	}
}

// reserved holds what a relay takes for reserved against the ledger's word: that is
// stricter than W2. Days that are over for the ledger are over.
func (c *checker) reserved(w *world, r *relay) {
	if r.holder == nil {
		return
	}
	l := w.log.state.ledger
	for _, id := range r.order {
		if id.day < l.Today()-1 {
			continue
		}
		may, _ := l.Reserved(id.subject, 0, id.day, warmup.Node(r.node), id.epoch)
		if has := r.accounts[id].spender.Reserved(); has > may {
			w.fail("W2: %s takes %d of %v for reserved, the ledger says %d", r.name, has, id, may)
		}
	}
}
