package sim

import (
	"testing"
	"time"

	"github.com/relais-mta/relais/shared/lease"
)

// fixture is a calm world for a scenario: three servers, the first of which leads,
// relays that want everything, and no accident that the test does not order.
func fixture(t *testing.T, relays int, limits ...lease.Limit) *world {
	t.Helper()
	w := newWorld(1, config())
	for range 3 {
		w.addServer().ppm = 0
	}
	for _, l := range limits {
		if err := w.log.state.table.PutLimit(l); err != nil {
			t.Fatal(err)
		}
		w.limits = append(w.limits, l.ID)
	}
	w.log.slow = func() time.Duration { return 5 * time.Millisecond }
	w.elect(w.servers[0])
	for range relays {
		r := w.addRelay()
		r.ppm, r.steady, r.server = 0, true, 0
		for _, l := range limits {
			r.demand[l.ID] = l.Max
		}
	}
	t.Cleanup(func() {
		if w.failed != "" {
			t.Error(w.report())
		}
	})
	w.run(15 * time.Second)
	return w
}

// only has one relay want something of a limit.
func (w *world) only(id lease.LimitID, r *relay) {
	for _, o := range w.relays {
		o.demand[id] = 0
	}
	l, _ := w.log.state.table.Limit(id)
	r.demand[id] = l.Max
}

func (w *world) usable(r *relay, id lease.LimitID) lease.Share {
	if r.holder == nil {
		return lease.Share{}
	}
	return r.rights(id).Usable(r.clock(w.now))
}

// waitFor runs the world until something holds, and returns how long that took.
func (w *world) waitFor(t *testing.T, what string, most time.Duration, holds func() bool) time.Duration {
	t.Helper()
	begun := w.now
	for !holds() {
		if w.now > begun+most {
			t.Fatalf("%s: not within %v", what, most)
		}
		if w.run(10 * time.Millisecond); w.failed != "" {
			t.FailNow()
		}
	}
	return w.now - begun
}

func rateOf(perSecond, burst int64) lease.Limit {
	return lease.Limit{ID: 1, Kind: lease.Rate, Max: perSecond * lease.Milli, Per: time.Second, Burst: burst, ReservePercent: 5}
}

func floored(l lease.Limit) lease.Limit {
	l.FloorPercent = 20
	return l
}

func slotsOf(n int64) lease.Limit { return lease.Limit{ID: 1, Kind: lease.Slots, Max: n} }

// Test01OldLeaderResumes: a leader is stopped, another one gives its relays' shares
// to others, and the old one goes on with reports in its queue.
func Test01OldLeaderResumes(t *testing.T) {
	for _, stop := range []time.Duration{12 * time.Second, time.Minute} {
		t.Run(stop.String(), func(t *testing.T) { oldLeaderResumes(t, stop) })
	}
}

func oldLeaderResumes(t *testing.T, stop time.Duration) {
	w := fixture(t, 4, rateOf(20, 20))
	old := w.servers[0]
	// Two relays are heard by the old leader alone, two by the new one alone.
	for _, r := range w.relays {
		for i, s := range w.servers {
			if (r.node <= 2) != (i == 0) {
				w.blockBoth(&r.machine, &s.machine, time.Hour)
			}
		}
	}
	w.waitFor(t, "no command is on its way", time.Minute, func() bool { return len(w.log.pending) == 0 })
	w.run(50 * time.Millisecond)
	w.stop(&old.machine, stop)
	w.relays[0].demand[1] = 2_000 // the old leader will push a smaller share
	w.run(time.Second)
	w.elect(w.servers[1])
	w.run(100 * time.Second)
	for _, r := range w.relays[:2] {
		if got := w.usable(r, 1); got.Amount != 0 {
			t.Errorf("%s, which only a former leader hears, uses %v", r.name, got)
		}
	}
	sum := w.usable(w.relays[2], 1).Amount + w.usable(w.relays[3], 1).Amount
	if sum < 18_000 {
		t.Errorf("the others have %d of 20000", sum)
	}
}

// Test01PushOfAFormerLeader: a leader that is cut off from the other servers, and
// does not know it, still hears a relay and takes a part of its share away. That
// prolongs nothing.
func Test01PushOfAFormerLeader(t *testing.T) {
	w := fixture(t, 2, rateOf(20, 20))
	a, old := w.relays[0], w.servers[0]
	for range 5 {
		answered := a.answered
		w.waitFor(t, "a reply", time.Minute, func() bool { return a.answered > answered && len(w.log.pending) == 0 })
	}
	w.unaware = true
	w.blockBoth(&w.relays[1].machine, &old.machine, time.Hour)
	w.elect(w.servers[1])
	w.run(900 * time.Millisecond)
	a.demand[1] = 2_000
	before := a.rights(1).Stamp()
	w.waitFor(t, "the former leader pushes", 5*time.Second, func() bool { return a.rights(1).Stamp() != before })
	for _, s := range w.servers[1:] {
		w.blockBoth(&a.machine, &s.machine, time.Hour)
	}
	w.run(time.Minute)
}

// Test02PauseBetweenCommitAndReply: the leader is stopped when its command is
// committed and it has not answered; it answers a minute later.
func Test02PauseBetweenCommitAndReply(t *testing.T) {
	w := fixture(t, 3, rateOf(20, 20))
	for range 5 {
		old := w.log.leader
		w.waitFor(t, "a command on its way", 20*time.Second, func() bool { return len(w.log.pending) > 0 })
		w.stop(&old.machine, 40*time.Second)
		w.run(time.Second)
		next := w.servers[0]
		if next == old {
			next = w.servers[1]
		}
		w.elect(next)
		w.run(50 * time.Second)
	}
}

// Test03LateGrant: a grant that comes 45 s late, after its end and after a smaller
// one, changes nothing.
func Test03LateGrant(t *testing.T) {
	w := fixture(t, 2, rateOf(20, 20))
	a, b := w.relays[0], w.relays[1]
	for round := range 6 {
		w.only(1, a)
		w.run(15 * time.Second)
		late := time.Duration(round+1) * 8 * time.Second // also within the TTL
		w.net.hold = func(from, to *machine) time.Duration {
			if to == &a.machine {
				return late
			}
			return 0
		}
		w.run(time.Second) // grants to a are on their way, and late
		w.net.hold = nil
		w.only(1, b)
		w.run(time.Minute)
		if got := w.usable(b, 1).Amount; got < 18_000 {
			t.Errorf("round %d: the busy relay has %d of 20000", round, got)
		}
	}
}

// Test03LateGrantOfASilentRelay: a grant comes late to a relay that is not heard any
// more: it ends when the report that earned it is a TTL old.
func Test03LateGrantOfASilentRelay(t *testing.T) {
	w := fixture(t, 2, rateOf(20, 20))
	a := w.relays[0]
	for range 4 {
		w.net.hold = func(from, to *machine) time.Duration {
			if to == &a.machine {
				return 7 * time.Second
			}
			return 0
		}
		w.run(5 * time.Second)
		w.net.hold = nil
		w.cut(&a.machine, 30*time.Second) // what is on its way arrives
		w.run(time.Minute)
	}
}

// Test03StaleReport: reports cross the grants that take a share away.
func Test03StaleReport(t *testing.T) {
	w := fixture(t, 2, rateOf(20, 20))
	w.net.hold = func(from, to *machine) time.Duration {
		if to == &w.relays[0].machine {
			return 4500 * time.Millisecond
		}
		return 0
	}
	for i := range 12 {
		w.only(1, w.relays[i%2])
		w.run(12 * time.Second)
	}
}

// Test03MovedBurst: a share moves between busy relays every few seconds; what one
// may send at once does not come into being again with each move.
func Test03MovedBurst(t *testing.T) {
	l := rateOf(10, 40)
	l.ReservePercent = 0
	w := fixture(t, 2, l)
	for i := range 30 {
		w.only(1, w.relays[i%2])
		w.run(3 * time.Second)
	}
}

// Test03FloorsAndSlotsEndInTime: a relay whose clock is slow uses its floor and its
// slots to the end, and a leader whose clock is fast waits for that.
func Test03FloorsAndSlotsEndInTime(t *testing.T) {
	w := fixture(t, 2, floored(rateOf(20, 20)), lease.Limit{ID: 2, Kind: lease.Slots, Max: 10, FloorPercent: 40})
	w.relays[0].ppm, w.servers[0].ppm = -4000, 4000
	w.run(time.Minute)
	w.cut(&w.relays[0].machine, time.Hour)
	w.run(5 * time.Minute)
	if got := w.log.state.table.Holding(1, 1); got.Ceiling.Amount+got.Floor.Amount != 0 {
		t.Errorf("of a silent relay %v are still counted", got)
	}
}

// TestReleasesRace: releases that cross grants, and come twice or late.
func TestReleasesRace(t *testing.T) {
	w := fixture(t, 2, rateOf(20, 20))
	r := w.relays[0]
	w.net.dup = 50
	w.net.hold = func(from, to *machine) time.Duration {
		if (to == &r.machine || from == &r.machine) && w.chance(40) {
			return w.between(0, 4*time.Second)
		}
		return 0
	}
	for i := range 150 {
		w.relays[1].demand[1] = int64(i%3) * 10_000
		r.demand[1] = int64(i%2+1) * 10_000
		w.run(w.between(0, 4*time.Second))
		r.release(1)
		r.demand[1] = 20_000
		w.run(w.between(0, 4*time.Second))
	}
}

// TestFloorsAreSavedFirst: floors move to where the use is, writes take a while, and
// a relay crashes right after its floor became smaller.
func TestFloorsAreSavedFirst(t *testing.T) {
	w := fixture(t, 2, floored(rateOf(40, 40)))
	w.sync = func() time.Duration { return 4 * time.Second }
	moved := 0
	for i := range 24 {
		r, other := w.relays[i%2], w.relays[(i+1)%2]
		r.demand[1], other.demand[1] = 100, 40_000
		begun, former := w.now, w.log.state.table.Holding(1, r.node).Floor
		for w.now < begun+2*time.Minute && w.failed == "" {
			w.run(100 * time.Millisecond)
			if _, _, floor := r.rights(1).Lease(); floor.Amount < former.Amount {
				moved++
				w.run(2 * time.Second) // the leader may have heard, the disk has not
				r.crash(100 * time.Millisecond)
				w.cut(&r.machine, 20*time.Second)
				break
			}
		}
		w.run(30 * time.Second)
	}
	if moved < 5 {
		t.Errorf("only %d floors became smaller", moved)
	}
}

// Test04LeadershipTransfers: a hundred changes of leader on purpose, under load.
func Test04LeadershipTransfers(t *testing.T) {
	w := fixture(t, 4, rateOf(20, 20), lease.Limit{ID: 2, Kind: lease.Slots, Max: 10})
	before := w.checker.sent[1]
	begun := w.now
	for i := range 100 {
		w.transfer(w.servers[(i+1)%3])
		w.run(3 * time.Second)
	}
	if sent, could := w.checker.sent[1]-before, int64((w.now-begun).Seconds())*20; sent < could*6/10 {
		t.Errorf("%d of %d events were started meanwhile", sent, could)
	}
}

// Test05OneWayPartition: a relay is heard, but hears nothing, for ten minutes. It
// falls to its floor, and so does, in the end, what is set aside for it.
func Test05OneWayPartition(t *testing.T) {
	w := fixture(t, 3, floored(rateOf(20, 20)))
	w.run(time.Minute)
	deaf := w.relays[0]
	for _, s := range w.servers {
		w.block(&s.machine, &deaf.machine, 10*time.Minute)
	}
	w.run(12 * time.Second)
	_, _, floor := deaf.rights(1).Lease()
	if got := w.usable(deaf, 1); got != floor || floor.Amount == 0 {
		t.Errorf("deaf, the relay uses %v, its floor is %v", got, floor)
	}
	w.run(5 * time.Minute)
	if got := w.usable(deaf, 1); got.Amount != 0 {
		t.Errorf("past the end of its floor the relay uses %v", got)
	}
}

// Test06AllRelaysCutOff: together they go on at the floor of the limit, and stop
// when floors end.
func Test06AllRelaysCutOff(t *testing.T) {
	w := fixture(t, 4, floored(rateOf(20, 20)))
	w.run(time.Minute)
	for _, r := range w.relays {
		w.cut(&r.machine, time.Hour)
	}
	w.run(11 * time.Second)
	before := w.checker.sent[1]
	w.run(75 * time.Second)
	if sent := w.checker.sent[1] - before; sent > 4*75+20 || sent < 4*75/2 {
		t.Errorf("%d events in 75 s, the floor of the limit allows 4 a second", sent)
	}
	w.run(30 * time.Second)
	before = w.checker.sent[1]
	w.run(time.Minute)
	if sent := w.checker.sent[1] - before; sent != 0 {
		t.Errorf("%d events after the floors ended", sent)
	}
}

// Test07LimitIsCutInAPartition (I6): by nine tenths, while some relays do not hear
// of it.
func Test07LimitIsCutInAPartition(t *testing.T) {
	w := fixture(t, 4, rateOf(50, 50))
	w.cut(&w.relays[0].machine, time.Minute)
	w.cut(&w.relays[1].machine, time.Minute)
	w.putLimit(rateOf(5, 50))
	w.run(11 * time.Second)
	if got := w.log.state.table.Sum(1).Amount; got > 5_000 {
		t.Errorf("a TTL after the limit fell to 5000, %d are held", got)
	}
	w.run(90 * time.Second)
	sum := int64(0)
	for _, r := range w.relays {
		sum += w.usable(r, 1).Amount
	}
	if sum < 4_000 || sum > 5_000 {
		t.Errorf("later %d of 5000 are used", sum)
	}
}

// Test08BusyRelayFlips: one relay of many is busy, another one every five seconds;
// its share follows within a second.
func Test08BusyRelayFlips(t *testing.T) {
	w := fixture(t, 60, rateOf(1000, 200))
	w.only(1, w.relays[0])
	w.run(20 * time.Second)
	slowest := time.Duration(0)
	for i := range 10 {
		next := w.relays[(i*7+1)%60]
		w.only(1, next)
		took := w.waitFor(t, "the share moves", 3*time.Second, func() bool { return w.usable(next, 1).Amount >= 900_000 })
		slowest = max(slowest, took)
		w.run(5*time.Second - took)
	}
	// A report may have been sent just before: then the next waits for a second.
	if slowest > 2200*time.Millisecond {
		t.Errorf("a share took %v to move", slowest)
	}
	// Nothing moves by itself.
	commands := len(w.log.entries)
	before := w.usable(w.relays[4], 1)
	w.run(20 * time.Second)
	if got := w.usable(w.relays[4], 1); got != before {
		t.Errorf("with the same demands the share went from %v to %v", before, got)
	}
	if n := len(w.log.entries) - commands; n > 20*4 {
		t.Errorf("%d commands in 20 s", n)
	}
}

// Test09TwoConnectionsForTenRelays (I8): never three, and each is served.
func Test09TwoConnectionsForTenRelays(t *testing.T) {
	w := fixture(t, 10, slotsOf(2))
	served := make(map[*relay]time.Duration)
	for _, r := range w.relays {
		served[r] = w.now
	}
	for range 600 {
		w.run(time.Second)
		for _, r := range w.relays {
			if len(r.sessions[1]) > 0 {
				served[r] = w.now
			} else if w.now-served[r] > 10*time.Minute {
				t.Fatalf("%s had no connection for ten minutes", r.name)
			}
		}
	}
}

// Test10CrashLoop: a relay that starts anew every two seconds gets nothing twice.
func Test10CrashLoop(t *testing.T) {
	w := fixture(t, 3, floored(rateOf(20, 20)), lease.Limit{ID: 2, Kind: lease.Slots, Max: 6, FloorPercent: 40})
	w.quotas(t, 200, 200)
	w.net.hold = func(from, to *machine) time.Duration { // what was meant for the former process
		if to == &w.relays[0].machine && w.chance(40) {
			return w.between(0, 3*time.Second)
		}
		return 0
	}
	for i := range 150 {
		w.relays[0].crash(w.between(0, 200*time.Millisecond))
		w.run(2 * time.Second)
		if i%50 == 49 {
			w.setQuota(domain, 1, 200)
			w.run(time.Second)
			w.roll(w.tomorrow())
		}
	}
}
