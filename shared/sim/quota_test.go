package sim

import (
	"testing"
	"time"

	"github.com/relais-mta/relais/shared/warmup"
)

// quotas begins the warm-up of an address and a domain.
func (w *world) quotas(t *testing.T, addresses, domains uint32) {
	t.Helper()
	w.assign(address, w.relays[0])
	w.setQuota(address, 0, addresses)
	w.setQuota(domain, 0, domains)
	for _, r := range w.relays {
		r.appetite = 3
	}
	w.run(time.Second)
}

// Test11CrashAtEverySync: a relay crashes at every point of reserving, spending
// and settling, with what was written synced in part. W2, W3.
func Test11CrashAtEverySync(t *testing.T) {
	w := fixture(t, 2, rateOf(20, 20))
	w.quotas(t, 2000, 2000)
	crashes := 0
	for ; crashes < 60; crashes++ {
		r := w.relays[crashes%2]
		for range w.rng.IntN(3) + 1 { // now the first write after a start, now a later one
			w.waitFor(t, "a write", time.Minute, func() bool { return len(r.disk.writes) == 0 })
			w.waitFor(t, "a write", time.Minute, func() bool { return len(r.disk.writes) > 0 })
		}
		r.crash(w.between(0, 100*time.Millisecond))
	}
	if got := w.checker.offers[quotaKey{domain, firstDay}]; got < 100 {
		t.Errorf("only %d recipients were offered", got)
	}
}

// Test11PowerLossAtEverySync: the power fails at every single write, before it is
// synced, with nothing of what was written on the disk, with a part, or with all.
func Test11PowerLossAtEverySync(t *testing.T) {
	for at := 1; at <= 60; at++ {
		for kept := range 3 {
			w := fixture(t, 2, floored(rateOf(20, 20)))
			r := w.relays[at%2]
			writes := 0
			w.sync = func() time.Duration {
				writes++
				if writes == at {
					w.after(0, func() { r.losePower(kept) })
				}
				return w.between(time.Millisecond, 300*time.Millisecond)
			}
			w.quotas(t, 300, 300)
			w.run(30 * time.Second)
			if writes < at {
				t.Fatalf("there were only %d writes", writes)
			}
		}
	}
}

// Test12LeaderDiesAfterReserve: the reservation is committed, the reply is lost, and
// the relay asks the next leader again: there is one reservation (W5).
func Test12LeaderDiesAfterReserve(t *testing.T) {
	w := fixture(t, 2, rateOf(20, 20))
	w.quotas(t, 300, 300)
	for i := range 20 {
		old := w.log.leader
		for _, r := range w.relays { // replies are lost, requests are not
			w.block(&old.machine, &r.machine, 3*time.Second)
		}
		w.run(2 * time.Second)
		w.elect(w.servers[(i+1)%3])
		w.run(6 * time.Second)
	}
	for _, s := range []warmup.Subject{address, domain} {
		quota, reserved, _ := w.log.state.ledger.Totals(s, 0, firstDay)
		if reserved > quota {
			t.Errorf("subject %d: reserved %d of %d", s, reserved, quota)
		}
		if got := w.checker.offers[quotaKey{s, firstDay}]; got < 200 {
			t.Errorf("subject %d: only %d of 300 were offered", s, got)
		}
	}
}

// Test13DayBeginsOnce: two leaders that both think that it is time begin one day;
// the clock guard is tested with shared/warmup.
func Test13DayBeginsOnce(t *testing.T) {
	w := fixture(t, 3, rateOf(20, 20))
	w.quotas(t, 100, 100)
	for i := range 10 {
		w.setQuota(address, 1, 100)
		w.setQuota(domain, 1, 100)
		w.run(5 * time.Second)
		before := w.log.state.ledger.Today()
		w.roll(before + 1)
		w.elect(w.servers[(i+1)%3])
		w.roll(before + 1)
		w.run(15 * time.Second)
		if today := w.log.state.ledger.Today(); today > before+1 {
			t.Fatalf("from %v to %v at once", before, today)
		}
	}
	if today := w.log.state.ledger.Today(); today < firstDay+5 {
		t.Errorf("it is only %v", today)
	}
}

// Test14AddressMovesInTheDay (W4): what the former owner settles late counts, and
// the new one reserves what is left.
func Test14AddressMovesInTheDay(t *testing.T) {
	w := fixture(t, 3, rateOf(20, 20))
	w.quotas(t, 400, 400)
	w.run(5 * time.Second)
	for i := range 8 {
		from, to := w.relays[i%3], w.relays[(i+1)%3]
		if i%2 == 0 {
			w.cut(&from.machine, 20*time.Second) // and goes on with what it has
		} else {
			for _, s := range w.servers { // it is heard, and does not hear that it is none any more
				w.block(&s.machine, &from.machine, 20*time.Second)
			}
		}
		w.assign(address, to)
		w.run(10 * time.Second)
	}
	w.run(40 * time.Second)
	_, reserved, used := w.log.state.ledger.Totals(address, 0, firstDay)
	if offers := uint64(w.checker.offers[quotaKey{address, firstDay}]); used < offers || reserved > 400 || offers < 150 {
		t.Errorf("%d offered, %d settled, %d reserved", offers, used, reserved)
	}
}

// TestRecall: a quota that is lowered in the day comes back from who holds it, but
// for what is spent; what was cut is not spent, also after a crash.
func TestRecall(t *testing.T) {
	w := fixture(t, 3, rateOf(20, 20))
	w.quotas(t, 400, 400)
	for i := range 30 {
		w.run(w.between(0, 2*time.Second))
		w.setQuota(domain, 0, uint32(50+w.rng.IntN(300)))
		w.run(w.between(0, time.Second))
		if i%3 == 0 {
			w.relays[w.rng.IntN(3)].crash(time.Second)
		}
	}
	w.setQuota(domain, 0, 60)
	w.run(20 * time.Second)
	if _, reserved, used := w.log.state.ledger.Totals(domain, 0, firstDay); reserved > max(60, used+3*markStep) {
		t.Errorf("%d are reserved, %d used, of a quota of 60", reserved, used)
	}
}

// TestRelayCutOffAtMidnight: with a reservation for the next day it goes on.
func TestRelayCutOffAtMidnight(t *testing.T) {
	w := fixture(t, 2, rateOf(20, 20))
	w.quotas(t, 100, 100)
	w.setQuota(address, 1, 100)
	r := w.relays[0]
	next := accountID{address, firstDay + 1, 1}
	w.waitFor(t, "half of tomorrow's quota is reserved", 2*time.Minute, func() bool {
		a := r.accounts[next]
		return a != nil && a.spender.Left() >= 20
	})
	w.cut(&r.machine, time.Hour)
	w.roll(firstDay + 1)
	w.run(5 * time.Second)
	r.today = firstDay + 1 // by its own clock
	w.run(20 * time.Second)
	if got := w.checker.offers[quotaKey{address, firstDay + 1}]; got < 10 || got > 50 {
		t.Errorf("cut off, %d recipients of the new day were offered, of the 50 at most that could be reserved", got)
	}
}

// TestRepeatedRequests: quotas that go up and down, and a network that repeats and
// delays what relays and the ledger say to each other (W2, W5).
func TestRepeatedRequests(t *testing.T) {
	w := fixture(t, 3, rateOf(20, 20))
	w.quotas(t, 400, 400)
	w.net.dup = 60
	w.net.hold = func(from, to *machine) time.Duration {
		if w.chance(30) {
			return w.between(0, 6*time.Second)
		}
		return 0
	}
	for i := range 60 {
		w.run(w.between(0, 3*time.Second))
		w.setQuota(domain, 0, uint32(w.rng.IntN(400)))
		w.setQuota(address, 0, uint32(w.rng.IntN(400)))
		if i%10 == 9 {
			w.setQuota(domain, 1, 400)
			w.setQuota(address, 1, 400)
			w.run(time.Second)
			w.roll(w.tomorrow())
		}
	}
}

// TestCutBehindAMark (W2): reservations are recalled while a mark is on its way to
// the disk, and asked for again.
func TestCutBehindAMark(t *testing.T) {
	w := fixture(t, 3, rateOf(20, 20))
	w.quotas(t, 400, 400)
	w.sync = func() time.Duration { return w.between(0, time.Second) }
	for range 400 {
		_, reserved, _ := w.log.state.ledger.Totals(domain, 0, firstDay)
		w.setQuota(domain, 0, uint32(reserved)+60)
		w.run(w.between(500*time.Millisecond, 2*time.Second))
		_, reserved, used := w.log.state.ledger.Totals(domain, 0, firstDay)
		w.setQuota(domain, 0, uint32(used+(reserved-used)/2))
		w.run(w.between(0, 300*time.Millisecond))
	}
	if _, reserved, _ := w.log.state.ledger.Totals(domain, 0, firstDay); reserved < 2000 {
		t.Errorf("only %d were reserved", reserved)
	}
}

// TestMarkOnItsWayAtACut (W2): a higher mark is on its way to the disk when what is
// reserved is recalled in part; the power fails when the lower mark of the cut has
// followed it.
func TestMarkOnItsWayAtACut(t *testing.T) {
	w := fixture(t, 2, rateOf(20, 20))
	w.quotas(t, 4000, 4000)
	r := w.relays[0]
	w.sync = func() time.Duration { return 900 * time.Millisecond }
	id, cuts := accountID{domain, firstDay, 0}, 0
	for range 60 {
		w.setQuota(domain, 0, 4000)
		a := r.accounts[id]
		w.waitFor(t, "a mark on its way", time.Minute, func() bool { a = r.accounts[id]; return a != nil && a.saving && a.spender.Left() > 6 })
		used, _ := a.spender.Settle()
		w.run(w.between(0, 800*time.Millisecond))
		r.recalled(quotaKey{domain, firstDay}, 0, used+6)
		if !a.spender.Cutting() {
			continue
		}
		cuts++
		w.waitFor(t, "the end of the cut", time.Minute, func() bool { return !a.spender.Cutting() })
		r.losePower(0)
		w.run(time.Second)
	}
	if cuts < 20 {
		t.Errorf("only %d cuts", cuts)
	}
}
