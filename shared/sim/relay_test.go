package sim

import (
	"slices"
	"time"

	"github.com/relais-mta/relais/shared/lease"
	"github.com/relais-mta/relais/shared/ownership"
	"github.com/relais-mta/relais/shared/warmup"
)

// relay sends mail under shared limits and quotas.
type relay struct {
	machine
	w    *world
	node lease.Node
	disk disk

	holder       *lease.Holder
	known        []*lease.Rights // in the order of the world's limits
	server       int             // whom it takes for the leader
	session      bool            // the leader welcomed it
	asked        time.Duration
	answered     time.Duration
	spoke        time.Duration // when the leader heard a report of it
	sent         [64]sentReport
	earned       lease.Instant // when the last of this process's reports that were answered was sent
	earnedFloors lease.Instant // likewise, of any process's
	demand       map[lease.LimitID]int64
	sessions     map[lease.LimitID][]*session
	stamps       map[lease.LimitID]lease.Stamp
	steady       bool // demands do not change by themselves
	saving       bool // of floors
	saved        time.Duration
	today        warmup.Day
	owned        map[warmup.Subject]owning
	accounts     map[accountID]*account
	order        []accountID
	seq          uint64
	uses         []ownership.Use
	mail         [][]*ipSession
	closing      []lease.Instant // when connections from an address are looked at
	ipAsked      time.Duration
	ipAcked      time.Duration
	offUntil     time.Duration
	hangs        time.Duration // the disk does, until then
	drags        time.Duration // the disk takes its time, until then
	copy         bool          // the machine is one of another's disk
	appetite     int           // recipients a quarter of a second, of each subject
}

// disk is what survives a crash: what was synced, and perhaps what was written.
type disk struct {
	incarnation uint64
	floors      []lease.Floor
	marks       map[accountID]warmup.Mark
	news        []ownership.News
	writes      []write
}

type write struct {
	apply func()
	done  func()
}

type session struct{ closed bool }

type owning struct {
	epoch uint64
	mine  bool
}

func (w *world) addRelay() *relay {
	n := len(w.relays)
	r := w.newRelay(lease.Node(n+1), n)
	w.relays, w.all = append(w.relays, r), append(w.all, r)
	r.boot()
	return r
}

// newRelay returns a relay that was never started.
func (w *world) newRelay(node lease.Node, n int) *relay {
	r := &relay{machine: w.machineNamed("relay", n), w: w, node: node, server: w.rng.IntN(len(w.servers))}
	r.runs = r
	r.disk.marks = make(map[accountID]warmup.Mark)
	r.resume = func() { r.hardClose(); r.closeAddresses() }
	r.demand = make(map[lease.LimitID]int64)
	r.owned = map[warmup.Subject]owning{}
	r.today = firstDay
	r.disk.news = make([]ownership.News, addresses)
	return r
}

// boot starts the relay's process from its disk.
func (r *relay) boot() {
	if r.offUntil > r.w.now {
		r.w.after(r.offUntil-r.w.now, r.boot)
		return
	}
	r.down, r.hangs = false, 0
	r.life++
	r.disk.incarnation++ // synced before anything else is done
	now := r.clock(r.w.now)
	r.holder = lease.NewHolder(r.w.cfg, r.node, r.disk.incarnation, 1, r.disk.floors, now)
	r.known = r.known[:0]
	r.sessions = make(map[lease.LimitID][]*session)
	r.stamps = make(map[lease.LimitID]lease.Stamp)
	r.session, r.saving = false, false
	r.sent, r.earned = [64]sentReport{}, 0
	r.answered = r.w.now
	r.seq = 0
	r.accounts, r.order = make(map[accountID]*account), nil
	for _, id := range sortedIDs(r.disk.marks) {
		a := r.account(id)
		a.spender = warmup.Resume(r.disk.marks[id])
	}
	r.bootIPs()
	r.w.note("%s starts as %d", r.name, r.disk.incarnation)
	r.loop(r.life)
}

// crash ends the process. Of what was written and not synced a part, from the
// beginning, may have reached the disk.
func (r *relay) crash(down time.Duration) {
	if r.down {
		return
	}
	r.lose(r.w.rng.IntN(len(r.disk.writes) + 1))
	r.w.note("%s crashes", r.name)
	r.w.tally.met[crashes]++
	r.w.checker.crashed(r.w, r)
	r.endIPs()
	r.down, r.holder, r.until = true, nil, 0
	r.life++
	r.w.after(down, r.boot)
}

// lose leaves on the disk the first of what was written and not synced.
func (r *relay) lose(kept int) {
	if kept < len(r.disk.writes) {
		r.w.tally.met[unsynced]++
	}
	for _, wr := range r.disk.writes[:kept] {
		wr.apply()
	}
	r.disk.writes = nil
}

// losePower ends the process with nothing of what was not synced on the disk, with
// the first half, or with all.
func (r *relay) losePower(halves int) {
	if !r.down {
		r.lose(len(r.disk.writes) * halves / 2)
		r.crash(200 * time.Millisecond)
	}
}

// write puts something on disk and calls done when it is synced.
func (r *relay) write(apply, done func()) {
	r.disk.writes = append(r.disk.writes, write{apply, done})
	delay := r.w.between(time.Millisecond, 20*time.Millisecond)
	if r.w.chance(10) {
		delay = r.w.between(0, 2*time.Second)
	}
	if r.w.sync != nil {
		delay = r.w.sync()
	}
	if r.drags > r.w.now {
		delay = r.w.between(0, time.Second)
	}
	delay = max(delay, r.hangs-r.w.now)
	r.w.on(&r.machine, delay, r.synced)
}

// synced completes the oldest write: they are synced in their order.
func (r *relay) synced() {
	if len(r.disk.writes) == 0 {
		return
	}
	wr := r.disk.writes[0]
	r.disk.writes = r.disk.writes[1:]
	wr.apply()
	wr.done()
	for _, id := range r.order {
		r.w.checker.marked(r.w, r, id)
	}
}

func (r *relay) to() *server { return r.w.servers[r.server] }

// nextServer tries another one of those that are members, which the relay knows.
func (r *relay) nextServer() {
	for range r.w.servers {
		if r.server = (r.server + 1) % len(r.w.servers); !r.w.servers[r.server].left {
			return
		}
	}
}

// loop is the relay's work, a few times a second.
func (r *relay) loop(life int) {
	if r.life != life || r.down {
		return
	}
	w := r.w
	now := r.clock(w.now)
	switch {
	case !r.session && w.now >= r.asked+time.Second:
		r.asked = w.now
		if w.now > r.answered+3*time.Second {
			r.nextServer()
			r.answered = w.now
		}
		hello, s := r.holder.Hello(), r.to()
		w.send(&r.machine, &s.machine, func() {
			s.hears(r, func() { s.grantor.Hello(s.clock(w.now), hello) })
		})
	case r.session && w.now > r.answered+r.w.cfg.TTL/2:
		r.session, r.answered = false, w.now
		r.nextServer()
	case r.session && now >= r.holder.ReportAt(w.rng.IntN(1000)):
		r.report()
	}
	if !r.steady && w.chance(4) {
		r.moods()
	}
	r.work(now)
	// Larger floors are saved for a restart while cut off: that has time.
	if !r.saving && (r.holder.FloorsUnsaved() || w.now >= r.saved+8*time.Second) {
		r.saveFloors()
	}
	r.warm()
	r.workAddresses(now)
	w.on(&r.machine, r.span(w.pace*w.between(150*time.Millisecond, 300*time.Millisecond)), func() { r.loop(life) })
}

// sentReport is when a report was sent.
type sentReport struct {
	nonce uint64
	at    lease.Instant
}

func (r *relay) report() {
	now, s := r.clock(r.w.now), r.to()
	report := r.holder.Report(now)
	r.sent[report.Nonce%uint64(len(r.sent))] = sentReport{report.Nonce, now}
	r.w.send(&r.machine, &s.machine, func() {
		s.hears(r, func() {
			r.spoke = s.w.now
			s.grantor.Report(s.clock(s.w.now), &report)
		})
	})
}

// want has the relay want a part of every limit at most.
func (r *relay) want(percent int64) {
	for _, id := range r.w.limits {
		l, _ := r.w.log.state.table.Limit(id)
		r.demand[id] = r.w.rng.Int64N(l.Max*percent/100 + 1)
	}
}

// moods changes what the relay has to send.
func (r *relay) moods() {
	id := r.w.limits[r.w.rng.IntN(len(r.w.limits))]
	l, _ := r.w.log.state.table.Limit(id)
	switch r.w.rng.IntN(4) {
	case 0:
		r.demand[id] = 0
		if r.w.chance(30) && len(r.sessions[id]) == 0 {
			r.release(id)
		}
	case 1:
		r.demand[id] = l.Max * 2
	default:
		r.demand[id] = r.w.rng.Int64N(l.Max) + 1
	}
}

func (r *relay) release(id lease.LimitID) {
	m, ok := r.holder.Release(r.clock(r.w.now), r.rights(id))
	if !ok {
		return
	}
	s := r.to()
	r.w.send(&r.machine, &s.machine, func() {
		s.hears(r, func() { s.grantor.Release(s.clock(s.w.now), m) })
	})
}

func (r *relay) rights(id lease.LimitID) *lease.Rights {
	return r.under(slices.Index(r.w.limits, id))
}

// under returns the rights under a limit by its place in the world's list.
func (r *relay) under(i int) *lease.Rights {
	for len(r.known) <= i {
		id := r.w.limits[len(r.known)]
		l, _ := r.w.log.state.table.Limit(id)
		r.known = append(r.known, r.holder.Rights(id, l.Kind, l.Per))
	}
	return r.known[i]
}

// work starts what may start under every limit.
func (r *relay) work(now lease.Instant) {
	for i, id := range r.w.limits {
		rights, demand := r.under(i), r.demand[id]
		r.holder.SetDemand(rights, demand)
		if r.w.kind(i) == lease.Rate {
			for range 20 {
				if demand == 0 {
					break
				}
				if ok, _ := rights.Take(now, 1); !ok {
					break
				}
				r.w.checker.started(r.w, id)
			}
			continue
		}
		r.closeSoon(id, rights, now)
		for rights.Opened() < demand && rights.Open(now) {
			r.openSession(id, rights)
		}
	}
	r.hardClose()
}

// openSession keeps a slot for as long as a session lasts.
func (r *relay) openSession(id lease.LimitID, rights *lease.Rights) {
	s := &session{}
	r.sessions[id] = append(r.sessions[id], s)
	lasts := r.w.between(500*time.Millisecond, 10*time.Second)
	if r.w.chance(10) {
		lasts = r.w.between(0, 2*time.Minute)
	}
	holder := r.holder
	r.w.on(&r.machine, lasts*r.w.pace, func() {
		if !s.closed && r.holder == holder {
			r.closeSession(id, rights, s)
		}
	})
}

func (r *relay) closeSession(id lease.LimitID, rights *lease.Rights, s *session) {
	s.closed = true
	rights.Close()
	r.sessions[id] = slices.DeleteFunc(r.sessions[id], func(o *session) bool { return o == s })
}

// closeSoon closes some of the sessions that are too many: those that happen to be
// idle.
func (r *relay) closeSoon(id lease.LimitID, rights *lease.Rights, now lease.Instant) {
	for soon, _ := rights.Excess(now); soon > 0 && r.w.chance(30); soon-- {
		r.closeSession(id, rights, r.sessions[id][0])
	}
}

// hardClose closes what must not be open any more, whatever it does, and comes
// again when the next must.
func (r *relay) hardClose() {
	if r.holder == nil {
		return
	}
	now := r.clock(r.w.now)
	for i, id := range r.w.limits {
		if r.w.kind(i) != lease.Slots {
			continue
		}
		rights := r.under(i)
		for _, atOnce := rights.Excess(now); atOnce > 0; atOnce-- {
			r.closeSession(id, rights, r.sessions[id][0])
		}
		if len(r.sessions[id]) > 0 {
			// To the instant: the leader does not wait for a loop to come round.
			if end := rights.CloseBy(now); end > now {
				r.w.on(&r.machine, r.span(end.Sub(now)), func() { r.hardCloseOnce() })
			}
		}
	}
}

func (r *relay) hardCloseOnce() {
	if r.holder == nil {
		return
	}
	now := r.clock(r.w.now)
	for _, id := range r.w.limits {
		if len(r.sessions[id]) == 0 {
			continue
		}
		rights := r.rights(id)
		for _, atOnce := rights.Excess(now); atOnce > 0; atOnce-- {
			r.closeSession(id, rights, r.sessions[id][0])
		}
	}
}

func (r *relay) saveFloors() {
	r.saving, r.saved = true, r.w.now
	floors, version := r.holder.SaveFloors()
	holder := r.holder
	r.write(func() { r.disk.floors = floors }, func() {
		r.saving = false
		holder.FloorsSaved(version)
	})
}

func (r *relay) welcomed(s *server, m lease.Welcome) {
	if m.Incarnation != r.disk.incarnation || r.session {
		return
	}
	r.session, r.answered = true, r.w.now
	r.server = slices.Index(r.w.servers, s)
	r.report()
}

// redirected tries the server that, as far as is known, leads.
func (r *relay) redirected(s *server) {
	if slices.Index(r.w.servers, s) != r.server || r.holder == nil {
		return
	}
	r.server = slices.Index(r.w.servers, r.w.member(nil))
	if l := r.w.log.leader; l != nil && r.w.chance(80) {
		r.server = slices.Index(r.w.servers, l)
	}
	if r.session {
		r.w.on(&r.machine, 200*time.Millisecond, func() {
			if r.session {
				r.report()
			}
		})
	}
}

func (r *relay) granted(s *server, g *lease.Grant, today warmup.Day) {
	if r.holder == nil {
		return
	}
	r.holder.Grant(r.clock(r.w.now), g)
	if sent := r.sent[g.Nonce%uint64(len(r.sent))]; g.Incarnation == r.disk.incarnation && g.Nonce > 0 && sent.nonce == g.Nonce {
		r.earned, r.earnedFloors = max(r.earned, sent.at), max(r.earnedFloors, sent.at)
	}
	if slices.Index(r.w.servers, s) == r.server {
		r.answered = r.w.now
	}
	r.today = max(r.today, today)
	for _, id := range r.w.limits {
		if r.stamps[id] != (lease.Stamp{}) {
			r.w.tally.held[i3]++
		}
		if stamp := r.rights(id).Stamp(); stamp.Compare(r.stamps[id]) < 0 {
			r.w.fail("I3: %s went from stamp %v of limit %d back to %v", r.name, r.stamps[id], id, stamp)
		} else {
			r.stamps[id] = stamp
		}
	}
	r.hardClose()
}
