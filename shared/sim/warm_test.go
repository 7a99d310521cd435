package sim

import (
	"cmp"
	"slices"
	"time"

	"github.com/relais-mta/relais/shared/warmup"
)

const firstDay = warmup.Day(20_000)

// The subjects of the world: an address, which has one owner at a time, and a
// domain, from which everybody reserves.
const (
	address warmup.Subject = 1
	domain  warmup.Subject = 2
)

// accountID names one relay's reservation.
type accountID struct {
	subject warmup.Subject
	day     warmup.Day
	epoch   uint64
}

// account is what a relay does with a reservation.
type account struct {
	id      accountID
	spender warmup.Spender
	saving  bool
	want    uint32        // asked for, cumulative
	seq     uint64        // of what is asked
	sent    time.Duration // last
	tries   int
	cut     bool // what is asked is to cut
	cutTo   uint32
	closed  bool
	settled time.Duration
}

const markStep = 8

func sortedIDs[T any](m map[accountID]T) []accountID {
	out := make([]accountID, 0, len(m))
	for id := range m {
		out = append(out, id)
	}
	slices.SortFunc(out, func(a, b accountID) int {
		return cmp.Or(cmp.Compare(a.subject, b.subject), cmp.Compare(a.day, b.day), cmp.Compare(a.epoch, b.epoch))
	})
	return out
}

func (r *relay) account(id accountID) *account {
	a := r.accounts[id]
	if a == nil {
		a = &account{id: id}
		r.accounts[id] = a
		r.order = append(r.order, id)
	}
	return a
}

// nextSeq numbers a request: higher than any before, also of former processes.
func (r *relay) nextSeq() uint64 {
	r.seq++
	return r.disk.incarnation<<32 | r.seq
}

// warm works at every reservation.
func (r *relay) warm() {
	if r.appetite == 0 {
		return
	}
	r.account(accountID{domain, r.today, 0})
	if o := r.owned[address]; o.mine {
		r.account(accountID{address, r.today, o.epoch})
		if r.w.chance(2) {
			r.ask(r.account(accountID{address, r.today + 1, o.epoch}), 20)
		}
	}
	for _, id := range r.order {
		a := r.accounts[id]
		mine := id.subject == domain || r.owned[address] == owning{id.epoch, true}
		switch {
		case a.closed || id.day < r.today-1:
		case id.day < r.today || id.day == r.today && !mine:
			r.cutAccount(a, 0)
		case id.day == r.today:
			r.spend(a)
		}
		r.repeat(a)
		if used, _ := a.spender.Settle(); used > 0 && r.w.now >= a.settled+2*time.Second && id.day >= r.today-1 {
			a.settled = r.w.now
			r.settle(a, used)
		}
	}
}

// spend offers recipients to hosts as far as the reservation goes.
func (r *relay) spend(a *account) {
	for range r.w.rng.IntN(r.appetite + 1) {
		n := uint32(r.w.rng.IntN(3) + 1)
		if !a.spender.Take(n) {
			break
		}
		if r.w.chance(5) {
			a.spender.Refund(n) // the connection failed first
			continue
		}
		r.w.checker.offered(r.w, a.id, n)
		r.w.checker.marked(r.w, r, a.id)
	}
	if m, ok := a.spender.Raise(markStep); ok && !a.saving {
		a.saving = true
		r.save(a, m, func() { a.saving = false })
	}
	if a.spender.Left() < 10 && a.seq == 0 {
		r.ask(a, uint32(r.w.rng.IntN(40)+1))
	}
}

// save puts a mark on disk.
func (r *relay) save(a *account, m warmup.Mark, done func()) {
	r.write(func() { r.disk.marks[a.id] = m }, func() {
		a.spender.Saved(m)
		done()
	})
}

// ask asks for more.
func (r *relay) ask(a *account, more uint32) {
	if a.seq != 0 || a.closed || a.spender.Cutting() {
		return
	}
	_, amount := a.spender.Settle()
	a.want, a.seq, a.cut, a.tries = amount+more, r.nextSeq(), false, 0
	a.spender.Ask(a.seq)
	a.sent = -time.Hour
	r.repeat(a)
}

// cutAccount gives back what is above an amount, once that is on disk.
func (r *relay) cutAccount(a *account, to uint32) {
	if a.cut || a.spender.Cutting() {
		return
	}
	m := a.spender.CutTo(to)
	a.seq = 0
	holder := r.holder
	r.save(a, m, func() {
		if r.holder != holder || a.spender.Cutting() {
			return
		}
		a.cut, a.cutTo, a.seq, a.tries = true, m.Amount, r.nextSeq(), 0
		a.spender.Ask(a.seq)
		a.sent = -time.Hour
		r.repeat(a)
	})
}

// repeat sends what is asked, and again while nothing comes back.
func (r *relay) repeat(a *account) {
	if a.seq == 0 || r.w.now < a.sent+2*time.Second {
		return
	}
	a.sent = r.w.now
	if a.tries++; a.tries > 5 {
		a.seq, a.cut = 0, false // once more from the beginning, later
		return
	}
	s, id, seq := r.to(), a.id, a.seq
	if a.cut {
		used, _ := a.spender.Settle()
		r.w.checker.claim(r, id, used)
		c := warmup.Cut{Settlement: r.settlement(id, used), Seq: seq, Amount: a.cutTo}
		r.w.send(&r.machine, &s.machine, func() {
			s.ledger(r, id, func(l *warmup.Ledger) warmup.Reply { return l.Cut(c) })
		})
		return
	}
	q := warmup.Request{Subject: id.subject, Day: id.day, Node: warmup.Node(r.node), Epoch: id.epoch, Seq: seq, UpTo: a.want}
	r.w.send(&r.machine, &s.machine, func() {
		s.ledger(r, id, func(l *warmup.Ledger) warmup.Reply {
			reply, err := l.Reserve(q)
			if err != nil {
				reply.Seq = 0 // refused: nothing is known from it
			}
			return reply
		})
	})
}

func (r *relay) settlement(id accountID, used uint32) warmup.Settlement {
	return warmup.Settlement{Subject: id.subject, Day: id.day, Node: warmup.Node(r.node), Epoch: id.epoch, Used: used}
}

func (r *relay) settle(a *account, used uint32) {
	r.w.checker.claim(r, a.id, used)
	s, m := r.to(), r.settlement(a.id, used)
	r.w.send(&r.machine, &s.machine, func() {
		s.hears(r, func() {
			s.w.dutifulBy(s, func(st *state) any {
				st.ledger.Settle(m)
				return ledgerResult{id: a.id}
			})
		})
	})
}

// replied takes what the ledger says.
func (r *relay) replied(id accountID, reply warmup.Reply) {
	a := r.accounts[id]
	if a == nil || r.holder == nil || !a.spender.Granted(reply) {
		return
	}
	r.w.checker.reserved(r.w, r)
	a.seq = 0
	if a.cut {
		a.cut = false
		a.closed = id.day < r.today || r.owned[id.subject] != owning{id.epoch, true} && id.subject == address
	}
}

// recalled gives back what the leader asks for.
func (r *relay) recalled(key quotaKey, epoch uint64, amount uint32) {
	if a := r.accounts[accountID{key.subject, key.day, epoch}]; a != nil && r.holder != nil && !a.closed {
		r.cutAccount(a, amount)
	}
}

// assigned tells who owns a subject. Former news change nothing.
func (r *relay) assigned(s warmup.Subject, epoch uint64, mine bool) {
	if epoch > r.owned[s].epoch {
		r.owned[s] = owning{epoch, mine}
	}
}
