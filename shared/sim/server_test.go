package sim

import (
	"slices"
	"time"

	"github.com/relais-mta/relais/shared/lease"
	"github.com/relais-mta/relais/shared/ownership"
	"github.com/relais-mta/relais/shared/warmup"
)

// server is a control server. It may believe to lead when it does not any more.
type server struct {
	machine
	w       *world
	left    bool // it is no member any more
	leads   bool
	term    uint64
	grantor *lease.Grantor
	keeper  *ownership.Keeper
	places  []place         // of relays, by node
	asked   []func([]ipRow) // reports about addresses that wait for a command
}

const tickEvery = 250 * time.Millisecond

func (w *world) addServer() *server {
	s := &server{machine: w.machineNamed("server", len(w.servers)), w: w}
	w.servers = append(w.servers, s)
	return s
}

func (w *world) machineNamed(kind string, n int) machine {
	ppm := w.rng.Int64N(8001) - 4000
	if w.chance(50) { // as fast or slow as clocks may be
		ppm = 4000 - 8000*w.rng.Int64N(2)
	}
	return machine{
		name: kind + string(rune('A'+n)), life: 1,
		ppm: ppm, offset: w.between(time.Hour, 1000*time.Hour),
	}
}

// elect makes a server the leader. The former one hears of it later, if at all.
func (w *world) elect(s *server) { w.electUnheard(s, 0) }

// electUnheard does so, and the former one does not hear of it for a while.
func (w *world) electUnheard(s *server, unheard time.Duration) {
	if s.left {
		s = w.member(nil)
	}
	old := w.log.leader
	pending := w.log.pending
	w.log.pending = nil
	for _, p := range pending {
		if w.chance(50) {
			w.commit(p)
		} else {
			w.tally.met[lostEntries]++
		}
	}
	w.log.term++
	w.log.leader = s
	w.tally.met[leaders]++
	term := w.log.term
	w.note("%s leads term %d", s.name, term)
	if old != nil && old != s && !w.unaware {
		// If it is stopped, then when it goes on, and not first of all.
		hears := max(old.until, w.now+unheard) - w.now + w.between(0, 10*time.Second)
		if hears > time.Second {
			w.tally.met[unaware]++
		}
		w.on(&old.machine, hears, func() { old.depose(term) })
	}
	s.leads, s.grantor = false, nil
	s.term = term
	w.propose(s, func(*state) any { return nil }, func(any) {
		if s.term != term || w.log.term != term {
			return
		}
		// The barrier is applied: the leader begins from what the log gave.
		s.leads, w.led = true, w.now
		s.grantor = lease.NewGrantor(w.cfg, w.log.state.table, 1, term, s.clock(w.now))
		for _, id := range w.limits {
			w.checker.aware[id] = w.now
		}
		for n := range w.checker.put {
			w.checker.put[n] = w.now
		}
		s.keeper, s.asked, s.places = ownership.NewKeeper(ipConfig(), s.clock(w.now)), nil, slices.Clone(w.places)
		s.tick(term)
	})
}

func (s *server) depose(term uint64) {
	if s.term < term {
		s.leads, s.grantor = false, nil
	}
}

// transfer gives the lead away on purpose: R5.
func (w *world) transfer(to *server) {
	if from := w.log.leader; from != nil && from.grantor != nil && from != to {
		from.grantor.Stop()
		w.after(w.between(0, 100*time.Millisecond), func() {
			w.elect(to)
			from.depose(w.log.term) // it knows
		})
	}
}

// tick is the leader's loop.
func (s *server) tick(term uint64) {
	if !s.leads || s.term != term {
		return
	}
	w := s.w
	g := s.grantor
	cmd, grants := g.Tick(s.clock(w.now))
	s.deliver(grants)
	if cmd != nil || len(s.asked) > 0 {
		take, answer := s.told()
		at := w.now
		w.propose(s, func(st *state) any {
			out := tickResult{rows: take(st), at: at}
			if cmd != nil {
				out.refused = st.table.Apply(cmd)
				for _, c := range cmd.Changes {
					out.nodes = append(out.nodes, c.Node)
				}
				for _, c := range cmd.Sessions {
					out.nodes = append(out.nodes, c.Node)
				}
			}
			return out
		}, func(result any) {
			res := result.(tickResult)
			answer(res.rows)
			if s.grantor != g || cmd == nil {
				return
			}
			welcomes, grants := g.Committed(s.clock(w.now), res.refused)
			for _, m := range welcomes {
				s.welcome(m)
			}
			s.deliver(grants)
		})
	}
	s.keep()
	w.on(&s.machine, s.span(tickEvery), func() { s.tick(term) })
}

type tickResult struct {
	refused []lease.Refusal
	rows    []ipRow
	nodes   []lease.Node // whose holdings changed
	at      time.Duration
}

func (s *server) deliver(grants []lease.Grant) {
	for i := range grants {
		g := grants[i]
		r := s.at(g.Node)
		today := s.w.log.state.ledger.Today()
		s.w.send(&s.machine, &r.machine, func() { r.granted(s, &g, today) })
	}
}

func (s *server) welcome(m lease.Welcome) {
	r := s.at(m.Node)
	s.w.send(&s.machine, &r.machine, func() { r.welcomed(s, m) })
}

// place is who has the one session of a relay, and when it was heard last.
type place struct {
	r     *relay
	heard time.Duration
}

// admits decides whether a machine has its relay's session (A4): a second one with
// the same key has to wait until the first is silent for longer than a lease. One
// that was put out has none.
func (s *server) admits(r *relay) bool {
	if _, gone := s.w.log.state.table.Session(r.node); gone {
		return false
	}
	w := s.w
	if r.copy && r.down {
		return false // with the machine its connection ended: nobody takes a place by what is left of it
	}
	p := placeOf(&s.places, r.node)
	if p.r != nil && p.r != r && s.clock(w.now).Sub(s.clock(p.heard)) < lease.Outlast(max(w.cfg.TTL, ipConfig().TTL)) {
		w.send(&s.machine, &r.machine, func() { r.session = false })
		return false
	}
	*p = place{r, w.now}
	if s.term == w.log.term { // servers tell each other, but for one that is alone
		*placeOf(&w.places, r.node) = *p
	}
	return true
}

func placeOf(places *[]place, n lease.Node) *place {
	for len(*places) < int(n) {
		*places = append(*places, place{})
	}
	return &(*places)[n-1]
}

// at returns the machine that has a relay's session.
func (s *server) at(n lease.Node) *relay {
	if int(n) <= len(s.places) && s.places[n-1].r != nil {
		return s.places[n-1].r
	}
	return s.w.relays[n-1]
}

// hears passes on what relays say, if the server takes itself for the leader;
// otherwise it says who leads, as far as it knows.
func (s *server) hears(r *relay, what func()) {
	if s.leads {
		if s.admits(r) {
			what()
		}
		return
	}
	s.w.send(&s.machine, &r.machine, func() { r.redirected(s) })
}

// ledger proposes a command about the ledger and sends back what it gave.
func (s *server) ledger(r *relay, id accountID, cmd func(*warmup.Ledger) warmup.Reply) {
	s.hears(r, func() {
		s.w.propose(s, func(st *state) any {
			_, before, _ := st.ledger.Totals(id.subject, 0, id.day)
			reply := cmd(st.ledger)
			_, after, _ := st.ledger.Totals(id.subject, 0, id.day)
			return ledgerResult{reply, id, after > before && id.epoch != st.epochs[id.subject]}
		}, func(result any) {
			s.w.send(&s.machine, &r.machine, func() { r.replied(id, result.(ledgerResult).Reply) })
		})
	})
}

type ledgerResult struct {
	warmup.Reply
	id    accountID
	stale bool // an owner that is none any more acquired something
}

// The world's own commands: what operators and the leader's other duties do. They
// are proposed by whoever leads.

func (w *world) dutiful(cmd command) {
	if s := w.log.leader; s != nil {
		w.dutifulBy(s, cmd)
	}
}

func (w *world) dutifulBy(s *server, cmd command) { w.propose(s, cmd, nil) }

func (w *world) putLimit(l lease.Limit) {
	w.note("limit %d becomes %d, burst %d", l.ID, l.Max, l.Burst)
	s := w.log.leader
	if s == nil {
		return
	}
	w.propose(s, func(st *state) any { return st.table.PutLimit(l) }, func(any) {
		if s.grantor != nil {
			s.grantor.PutLimit(l)
			w.checker.aware[l.ID] = w.now
		}
	})
}

// setQuota sets a day's quota and has relays recalled if it is lower.
func (w *world) setQuota(subject warmup.Subject, ahead warmup.Day, quota uint32) {
	s := w.log.leader
	if s == nil {
		return
	}
	w.propose(s, func(st *state) any {
		day := st.ledger.Today() + ahead
		if err := st.ledger.SetQuota(subject, 0, day, quota); err == nil {
			k := quotaKey{subject, day}
			st.history[k] = max(st.history[k], quota)
			return recallResult{k, st.ledger.Recalls(subject, 0, day)}
		}
		return recallResult{}
	}, func(result any) {
		w.tally.met[quotas]++
		res := result.(recallResult)
		for _, c := range res.recalls {
			r := w.relays[c.Node-1]
			w.send(&s.machine, &r.machine, func() { r.recalled(res.key, c.Epoch, c.Amount) })
		}
	})
}

type recallResult struct {
	key     quotaKey
	recalls []warmup.Recall
}

// roll begins a day. Whoever thinks that it is time says which day that is, so one
// that was begun meanwhile is not begun twice.
func (w *world) roll(next warmup.Day) {
	w.dutiful(func(st *state) any { return st.ledger.Roll(next, false) })
}

func (w *world) tomorrow() warmup.Day { return w.log.state.ledger.Today() + 1 }

// assign gives a subject to a relay under a new epoch.
func (w *world) assign(subject warmup.Subject, to *relay) {
	s := w.log.leader
	if s == nil {
		return
	}
	w.propose(s, func(st *state) any {
		st.epochs[subject]++
		if err := st.ledger.Assign(subject, st.epochs[subject]); err != nil {
			panic(err)
		}
		return st.epochs[subject]
	}, func(result any) {
		epoch := result.(uint64)
		w.note("subject %d goes to %s, epoch %d", subject, to.name, epoch)
		for _, r := range w.relays {
			w.send(&s.machine, &r.machine, func() { r.assigned(subject, epoch, r == to) })
		}
	})
}
