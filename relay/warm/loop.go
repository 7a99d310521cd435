package warm

import (
	"cmp"
	"context"
	"slices"
	"time"

	"github.com/relais-mta/relais/relay/schedule"
	"github.com/relais-mta/relais/shared/ids"
	"github.com/relais-mta/relais/shared/policy"
	"github.com/relais-mta/relais/shared/warmup"
	"github.com/relais-mta/relais/shared/wire"
)

// Run keeps marks, reservations and gates right until ctx ends, and tells the
// leader at the end what was spent.
func (k *Keeper) Run(ctx context.Context) {
	timer := time.NewTimer(0)
	defer timer.Stop()
	for {
		select {
		case <-ctx.Done():
			k.talliedAt = time.Time{}
			k.saved()
			k.say(k.cfg.Now(), true)
			return
		case <-k.kick:
		case <-timer.C:
		}
		for more := true; more; {
			select {
			case down := <-k.downs:
				k.read(down)
			default:
				more = false
			}
		}
		now := k.cfg.Now()
		k.tidy(now)
		k.saved()
		k.say(now, false)
		k.setGates(now)
		timer.Reset(lookWait)
	}
}

// saved saves, or says why it cannot: nothing is spent beyond the marks that are there.
func (k *Keeper) saved() {
	if err := k.save(); err != nil {
		k.cfg.Logger.Error("the marks of warm-up cannot be saved", "error", err)
	}
}

// save puts on the disk what changed: new reservations, higher marks, cuts, and with
// them, or now and then, what providers answered.
func (k *Keeper) save() error {
	type change struct {
		s *slot
		m warmup.Mark
		c bool
	}
	k.mu.Lock()
	var changes []change
	now := k.cfg.Now()
	tallies, dirty := now.Sub(k.talliedAt) >= settleEvery, false
	for _, s := range k.slots {
		if !s.saved {
			changes = append(changes, change{s: s})
			k.disk[s.key], dirty = row{tally: s.tally}, true
			continue
		}
		if on := k.disk[s.key]; tallies && on.tally != s.tally {
			k.disk[s.key], dirty, k.talliedAt = row{on.Mark, s.tally}, true, now
		}
		if !s.mark || s.over {
			continue
		}
		if m, ok := s.spender.Raise(s.step()); ok {
			changes = append(changes, change{s: s, m: m, c: true})
			k.disk[s.key], dirty = row{m, s.tally}, true
		}
		s.mark = false
	}
	for of := range k.disk {
		if k.slots[of] == nil {
			delete(k.disk, of)
			dirty = true
		}
	}
	k.mu.Unlock()
	if !dirty {
		return nil
	}
	if err := k.write(); err != nil {
		return err
	}
	k.mu.Lock()
	defer k.mu.Unlock()
	for _, c := range changes {
		c.s.saved = true
		if c.c {
			c.s.spender.Saved(c.m)
		}
	}
	return nil
}

// cut gives back what a reservation has beyond an amount. k.mu is held; the disk
// has it before the ledger is told.
func (k *Keeper) cut(s *slot, amount uint32) error {
	m := s.spender.CutTo(amount)
	k.disk[s.key] = row{m, s.tally}
	k.mu.Unlock()
	err := k.write()
	k.mu.Lock()
	if err == nil {
		s.spender.Saved(m)
		s.cutSeq = k.number()
		s.asked = time.Time{}
	}
	return err
}

// number returns a number that rises over all lives of this relay. k.mu is held.
func (k *Keeper) number() uint64 {
	k.seq++
	return uint64(k.life)<<32 | uint64(k.seq)
}

// tidy ends reservations of days that are over, of addresses that were handed on
// and of subjects that are gone, and prepares the next day.
func (k *Keeper) tidy(now time.Time) {
	dir := k.cfg.Directory()
	if dir == nil {
		return
	}
	k.mu.Lock()
	defer k.mu.Unlock()
	today := k.day(now, dir)
	subjects := map[warmup.Subject]*policy.WarmSubject{}
	for _, s := range dir.WarmHere() {
		subjects[warmup.Subject(s.Number)] = s
	}
	restored := dir.View().Generation != k.generation
	ahead := !now.Before((today + 1).Start(time.UTC).Add(-aheadOf))
	for of, s := range k.slots {
		subject := subjects[of.Subject]
		if of.Day < today-1 || subject == nil && of.Day < today {
			if !s.over {
				k.free(s)
			}
			delete(k.slots, of)
			continue
		}
		before := s.over
		s.over = of.Day < today || subject == nil || !subject.Source.IsZero() && !owned(dir, subject.Source, of.Epoch)
		if s.over && !before {
			k.free(s) // mail that waited has another quota, or none
		}
		// After a restore the ledger may know less than was reserved and spent: all is
		// told again, and what is left given back and asked for anew.
		used, amount := s.spender.Peek()
		if restored {
			s.settled, s.owed, s.told = 0, used, time.Time{}
			s.known = 0
		}
		if subject == nil {
			s.owed = 0 // the cluster does not know that it warmed up
		}
		if s.over || restored {
			amount = used
		}
		// A cut that the disk did not take is made again.
		if s.saved && s.cutSeq == 0 && (s.spender.Cutting() || s.spender.Reserved() > amount) {
			if err := k.cut(s, amount); err != nil {
				k.cfg.Logger.Error("the marks of warm-up cannot be saved", "error", err)
				return
			}
		}
		if ahead && of.Day == today && !s.over && used > 0 {
			next := of
			next.Day++
			if n := k.slot(next); n != nil && n.want == 0 && !n.heard {
				n.want, n.percent = 1, s.percent
			}
		}
	}
	if restored {
		k.generation = dir.View().Generation
		if err := k.write(); err != nil {
			k.cfg.Logger.Error("the marks of warm-up cannot be saved", "error", err)
		}
	}
}

// free has mail looked at again that was refused for the reservation. k.mu is held.
func (k *Keeper) free(s *slot) {
	if s.plan != "" {
		k.freed[s.plan] = true
	}
}

// owned reports whether this relay has the address under the epoch.
func owned(dir *policy.Directory, id ids.Source, epoch uint64) bool {
	for _, s := range dir.Sources() {
		if s.ID == id {
			return s.Owner == dir.View().Node && s.Epoch == epoch
		}
	}
	return false
}

// say asks the leader for what is wanted and tells it what is spent.
func (k *Keeper) say(now time.Time, last bool) {
	k.mu.Lock()
	if !k.linked {
		k.mu.Unlock()
		return
	}
	up := &wire.WarmUp{}
	for _, s := range k.slots {
		if len(up.Items) >= wire.MaxWarmItems-1 {
			break // the next look goes on
		}
		if i := k.item(s, now, last); i != nil {
			up.Items = append(up.Items, i)
		}
		on := k.disk[s.key]
		if i := s.tell(now, &on.tally, last); i != nil {
			up.Items = append(up.Items, i)
		}
	}
	if i := k.declaration(now); i != nil && len(up.Items) < wire.MaxWarmItems && !last {
		up.Items = append(up.Items, i)
	}
	k.mu.Unlock()
	if len(up.Items) == 0 {
		return
	}
	slices.SortFunc(up.Items, func(a, b *wire.WarmItem) int {
		return cmp.Or(cmp.Compare(a.Subject, b.Subject), cmp.Compare(a.Class, b.Class), cmp.Compare(a.Day, b.Day))
	})
	if err := k.cfg.Send(up); err != nil {
		k.cfg.Logger.Debug("the leader is not told about warm-up now", "error", err)
	}
}

// declaration says that the leader has confirmed all that was spent before this
// generation of the cluster, or this life: after a restore nothing is reserved until
// all relays have said so. k.mu is held.
func (k *Keeper) declaration(now time.Time) *wire.WarmItem {
	dir := k.cfg.Directory()
	if dir == nil {
		return nil
	}
	generation := dir.View().Generation
	if k.declared == generation || k.generation != generation || now.Sub(k.declaredAt) < settleEvery {
		return nil
	}
	for _, s := range k.slots {
		if s.settled < s.owed {
			return nil
		}
	}
	k.declaredAt = now
	return &wire.WarmItem{Kind: wire.WarmDeclare, Epoch: generation}
}

// item is what is to be said about one reservation; nil: nothing. k.mu is held.
func (k *Keeper) item(s *slot, now time.Time, last bool) *wire.WarmItem {
	if !s.saved || s.spender.Cutting() {
		return nil
	}
	i := &wire.WarmItem{Subject: uint64(s.Subject), Class: uint32(s.Class), Day: int32(s.Day), Epoch: s.Epoch}
	used, _ := s.spender.Peek()
	waited := now.Sub(s.asked)
	asks := !s.over && (!s.probed || s.want > 0 && s.spender.Left() < s.want || s.low())
	switch {
	case s.cutSeq != 0:
		if waited < askAgain {
			return nil
		}
		i.Kind, i.Seq = wire.WarmCut, s.cutSeq
		i.Used, i.Amount = s.spender.Settle()
	case asks && !last && waited >= askAgain && (!s.full() || waited >= settleEvery):
		// A quota that is used up may be raised, or given back by others.
		i.Kind, i.Seq = wire.WarmReserve, k.number()
		if s.probed && s.heard {
			i.Amount = s.upTo()
		}
		s.spender.Ask(i.Seq)
	case used != s.settled && (now.Sub(s.told) >= settleEvery || last || s.over):
		if s.over && now.Sub(s.told) < askAgain {
			return nil
		}
		i.Kind = wire.WarmSettle
		i.Used, _ = s.spender.Settle()
		s.told = now
		return i
	default:
		return nil
	}
	s.asked = now
	return i
}

// low reports that a reservation that is in use will soon be spent.
func (s *slot) low() bool {
	used, amount := s.spender.Peek()
	return s.heard && s.rate > 0 && !s.full() && amount-min(used, amount) < max(s.rate*2, amount/10)
}

// read takes an answer of the leader.
func (k *Keeper) read(down *wire.WarmDown) {
	k.mu.Lock()
	defer k.mu.Unlock()
	k.today = max(k.today, warmup.Day(down.GetToday()))
	for _, r := range down.GetReplies() {
		if r.GetKind() == wire.WarmDeclare {
			k.declared = r.GetEpoch()
			continue
		}
		s := k.slots[key{warmup.Subject(r.GetSubject()), warmup.Class(r.GetClass()), warmup.Day(r.GetDay()), r.GetEpoch()}]
		if s != nil {
			k.reply(s, r)
		}
	}
	for _, r := range down.GetRecalls() {
		s := k.slots[key{warmup.Subject(r.GetSubject()), warmup.Class(r.GetClass()), warmup.Day(r.GetDay()), r.GetEpoch()}]
		if s == nil || !s.saved || s.cutSeq != 0 {
			continue
		}
		if _, amount := s.spender.Peek(); amount > r.GetAmount() {
			if err := k.cut(s, r.GetAmount()); err != nil {
				k.cfg.Logger.Error("the marks of warm-up cannot be saved", "error", err)
			}
		}
	}
}

// reply takes the state of a reservation. k.mu is held.
func (k *Keeper) reply(s *slot, r *wire.WarmReply) {
	switch r.GetKind() {
	case wire.WarmCut:
		if r.GetSeq() == s.cutSeq {
			s.cutSeq, s.settled = 0, r.GetUsed()
		}
	case wire.WarmSettle:
		s.settled = max(s.settled, r.GetUsed())
	case wire.WarmTell:
		s.heardTally(int64(r.GetAttempts()))
		return
	case wire.WarmReserve:
		if !s.spender.Granted(warmup.Reply{Seq: r.GetSeq(), Amount: r.GetAmount(), Used: r.GetUsed()}) {
			return // of a request that was given up
		}
		if !s.probed {
			// What an earlier life reserved, of which the marks are lost.
			s.probed = true
			s.spender = warmup.Resume(warmup.Mark{Used: r.GetAmount(), Amount: r.GetAmount()})
		}
		s.asked = time.Time{}
		s.mark = true
	}
	before := s.full()
	s.heard, s.quota, s.committed, s.stage, s.relays, s.refused = true, r.GetQuota(), r.GetCommitted(), r.GetStage(), r.GetRelays(), r.GetRefused()
	if before && !s.full() {
		k.free(s)
	}
	if r.GetKind() == wire.WarmReserve && s.full() && s.spender.Left() == 0 {
		s.asked = k.cfg.Now() // ask again, but not at once
	}
	k.wake()
}

// setGates drops the gates of what has room again, and sets new ones.
func (k *Keeper) setGates(now time.Time) {
	k.mu.Lock()
	changed := k.stale
	k.stale = false
	numbers := make(map[uint64]bool, len(k.held))
	names := k.freed
	k.freed = make(map[string]bool)
	var gates []schedule.Gate
	for of, h := range k.held {
		lack := h.slot.lacks(1, now)
		if h.slot.over || k.slots[h.slot.key] != h.slot || lack != quota && lack != anHour {
			delete(k.held, of)
			delete(k.byGate, h.number)
			k.unspill(h.spills)
			names[h.hold.Name] = true
			changed = true
			continue
		}
		numbers[h.number] = true
		gates = append(gates, schedule.Gate{ID: schedule.GateID{Owner: Reason, Number: h.number}, Match: schedule.Match{Source: of.source, Pool: of.pool, Provider: of.provider},
			Reason: Reason, NoMessages: true, NoSessions: true, Until: h.hold.Until})
	}
	k.mu.Unlock()
	if k.gates == nil {
		return
	}
	if changed {
		k.gates.SetGates(gates...)
		k.gates.KeepGates(Reason, numbers)
	}
	for name := range names {
		k.gates.Recall(name)
	}
}
