package sim

import (
	"testing"
	"time"

	"github.com/relais-mta/relais/shared/ownership"
)

// The addresses of scenarios, by what they are.
const (
	pinned   = 0
	floating = addresses - 1
)

// owners is a calm world in which the first relay has an address, and the time of
// the last report about addresses is known.
func owners(t *testing.T, relays, ip int) *world {
	t.Helper()
	w := fixture(t, relays, rateOf(20, 20))
	w.recording = true
	w.assignIP(ip, w.relays[0], false)
	w.sending(t, w.relays[0], ip)
	return w
}

func (w *world) sending(t *testing.T, r *relay, ip int) time.Duration {
	t.Helper()
	return w.waitFor(t, r.name+" sends from the address", 2*time.Minute, func() bool { return r.uses[ip].Open() > 0 })
}

func (w *world) ip(ip int) ownership.Address { return w.log.state.ips[ip].Address }

// Test15TakeoverOfAFloatingAddress (A1): the owner is stopped with connections
// open, or cut off, or both one after the other; another relay has the address when
// its lease is over, and not before.
func Test15TakeoverOfAFloatingAddress(t *testing.T) {
	for name, lose := range map[string]func(*world, *relay){
		"stopped":      func(w *world, r *relay) { w.stop(&r.machine, 80*time.Second) },
		"cut off":      func(w *world, r *relay) { w.cut(&r.machine, 80*time.Second) },
		"not answered": func(w *world, r *relay) { w.unanswered(r, 80*time.Second) },
		"stopped for less": func(w *world, r *relay) {
			w.stop(&r.machine, 15*time.Second)
			w.cut(&r.machine, 80*time.Second)
		},
		"killed": func(w *world, r *relay) { r.crash(80 * time.Second) },
		"under a new leader": func(w *world, r *relay) {
			w.cut(&r.machine, 80*time.Second)
			w.elect(w.servers[1])
		},
	} {
		t.Run(name, func(t *testing.T) { takeover(t, lose) })
	}
}

// unanswered cuts a relay off on the way back only, once it is not heard any more
// by the leader either: its last report is answered late.
func (w *world) unanswered(r *relay, d time.Duration) {
	for _, s := range w.servers {
		w.block(&s.machine, &r.machine, d)
	}
	w.after(4*time.Second, func() { w.cut(&r.machine, d) })
}

func takeover(t *testing.T, lose func(*world, *relay)) {
	w := owners(t, 2, floating)
	a, b := w.relays[0], w.relays[1]
	// As unlike as clocks may be: the owner's is slow, the leaders' fast.
	a.ppm = -4000
	for _, s := range w.servers {
		s.ppm = 4000
	}
	w.run(time.Minute)
	lose(w, a)
	begun := w.now
	w.waitFor(t, "the address is nobody's", 3*time.Minute, func() bool {
		w.assignIP(floating, b, false) // refused while it has an owner
		return w.ip(floating).Owner != nodeID(a.node)
	})
	if w.now-begun > 40*time.Second && !w.log.leader.leads {
		t.Errorf("the take-over took %v", w.now-begun)
	}
	w.assignIP(floating, b, false)
	w.sending(t, b, floating)
	w.run(2 * time.Minute) // the former owner comes back
	if a.uses[floating].Open() > 0 || b.uses[floating].Open() == 0 {
		t.Error("the former owner uses the address again")
	}
}

// Test15AnswerComesLate: answers to the owner's last reports come after the address
// was given to another relay.
func Test15AnswerComesLate(t *testing.T) {
	w := owners(t, 2, floating)
	a, b := w.relays[0], w.relays[1]
	for round := range 4 {
		late := time.Duration(round+2) * 9 * time.Second
		w.net.hold = func(_, to *machine) time.Duration {
			if to == &a.machine {
				return late
			}
			return 0
		}
		w.run(9 * time.Second)
		w.net.hold = nil
		w.cut(&a.machine, time.Minute) // what is on its way arrives
		w.waitFor(t, "the address is nobody's", 3*time.Minute, func() bool { return w.ip(floating).Owner.IsZero() })
		w.assignIP(floating, b, false)
		w.run(time.Minute)
		w.releaseIP(floating, false)
		w.waitFor(t, "it is given back", 4*time.Minute, func() bool { return w.ip(floating).State == ownership.Free })
		w.assignIP(floating, a, false)
		w.sending(t, a, floating)
	}
}

// TestReleaseWaitsForTheOwner (A1): an address is moved from relay to relay while
// mail flows, everything comes late or twice, and owners crash before what they were
// told is on their disk.
func TestReleaseWaitsForTheOwner(t *testing.T) {
	for _, ip := range []int{pinned, floating} {
		w := owners(t, 3, ip)
		w.net.dup = 40
		w.net.hold = func(_, to *machine) time.Duration {
			if w.chance(30) {
				return w.between(0, 6*time.Second)
			}
			return 0
		}
		w.sync = func() time.Duration { return w.between(0, 3*time.Second) }
		moves := 0
		for range 120 {
			r := w.relays[w.rng.IntN(3)]
			w.assignIP(ip, r, false)
			w.run(w.between(0, 3*time.Second))
			w.releaseIP(ip, false)
			w.run(w.between(0, 3*time.Second))
			if owner := w.ip(ip).Owner; w.chance(30) && owner[0] > 0 {
				o := w.relays[owner[0]-1]
				o.crash(100 * time.Millisecond)
				if w.chance(50) {
					w.cut(&o.machine, 10*time.Second)
				}
			}
			if w.ip(ip).State == ownership.Free {
				moves++
			}
		}
		if moves < 10 {
			t.Errorf("address %d moved only %d times", ip, moves)
		}
		w.net.hold, w.net.dup, w.sync = nil, 0, nil
		w.run(20 * time.Second)
		w.releaseIP(ip, false)
		w.waitFor(t, "the owner gives it back", 3*time.Minute, func() bool { return w.ip(ip).State == ownership.Free })
	}
}

// Test15ClocksDiffer: the owner's clock is slow, the leader's fast, and the owner
// has connections open to the last moment.
func Test15ClocksDiffer(t *testing.T) {
	w := owners(t, 2, floating)
	a := w.relays[0]
	a.ppm = -4000
	for _, s := range w.servers {
		s.ppm = 4000
	}
	for range 30 {
		w.waitFor(t, "long connections", 10*time.Minute, func() bool {
			return len(a.mail[floating]) > 0 && a.mail[floating][0].busy
		})
		w.cut(&a.machine, 30*time.Second)
		w.waitFor(t, "the address is nobody's", time.Minute, func() bool { return w.ip(floating).Owner.IsZero() })
		w.run(20 * time.Second)
		w.assignIP(floating, a, false)
	}
}

// TestReleaseIsSavedFirst (A1): an owner crashes when it has said that it stopped,
// is cut off, and starts from its disk.
func TestReleaseIsSavedFirst(t *testing.T) {
	w := owners(t, 2, pinned)
	a := w.relays[0]
	for range 20 {
		w.sync = nil
		w.run(10 * time.Second)
		w.sync = func() time.Duration { return 4 * time.Second }
		w.releaseIP(pinned, false)
		w.waitFor(t, "the owner gives it back", 4*time.Minute, func() bool { return w.ip(pinned).State == ownership.Free })
		a.crash(100 * time.Millisecond)
		w.cut(&a.machine, 20*time.Second)
		w.run(30 * time.Second)
		w.assignIP(pinned, a, false)
		w.sending(t, a, pinned)
	}
}

// TestPinnedAddressGoesOn: cut off and restarted, its relay goes on sending from it,
// and nobody else gets it but on the word that the machine is off.
func TestPinnedAddressGoesOn(t *testing.T) {
	w := owners(t, 2, pinned)
	a, b := w.relays[0], w.relays[1]
	w.run(3 * time.Second)
	w.cut(&a.machine, time.Hour)
	a.crash(time.Second)
	w.run(10 * time.Minute)
	w.assignIP(pinned, b, false)
	w.run(time.Second)
	if w.ip(pinned).Owner != nodeID(a.node) {
		t.Error("it has another owner")
	}
	w.sending(t, a, pinned)
	a.crash(time.Second)
	w.off(a, time.Hour)
	w.assignIP(pinned, b, true)
	w.sending(t, b, pinned)
}

// Test16CopiedMachine (A4): a copy of a machine's disk is started while the machine
// runs. It gets nothing while the first is heard, and its place when that is silent
// for longer than any lease.
func Test16CopiedMachine(t *testing.T) {
	w := owners(t, 2, floating)
	first := w.relays[0]
	held := w.usable(first, 1)
	if held.Amount == 0 {
		t.Fatal("the machine holds nothing")
	}
	second := w.copyOf(first)
	for range 120 {
		w.run(time.Second)
		if second.session || second.uses[floating].Open() > 0 || w.usable(second, 1).Amount > 0 {
			t.Fatal("the copy was taken in")
		}
	}
	if first.down || !first.session || first.uses[floating].Open() == 0 && w.sending(t, first, floating) > time.Minute {
		t.Error("the first suffers from its copy")
	}
	first.crash(5 * time.Minute)
	began := w.now
	w.waitFor(t, "the copy has the place", time.Minute, func() bool { return second.session })
	if waited := w.now - began; waited < config().TTL-4*time.Second {
		t.Errorf("the copy got the place after %v", waited)
	}
	w.waitFor(t, "the copy sends from the address", time.Minute, func() bool {
		w.assignIP(floating, second, false) // which the silence made free
		return second.uses[floating].Open() > 0
	})
	w.run(5 * time.Minute) // the first comes back, and is the copy now
	if first.session || first.uses[floating].Open() > 0 || !second.session {
		t.Error("two machines with one key work at once, or the wrong one does")
	}
}

// Test17EvictedRelayDoesNotListen: it goes on with what it has. What it held of
// limits is given to others when its lease is over; its pinned address to nobody.
func Test17EvictedRelayDoesNotListen(t *testing.T) {
	w := owners(t, 3, pinned)
	rogue := w.relays[0]
	w.run(time.Minute)
	for _, s := range w.servers { // it hears nothing, and speaks on
		w.block(&s.machine, &rogue.machine, time.Hour)
	}
	begun := w.now
	w.evict(rogue)
	w.waitFor(t, "its shares are others'", 30*time.Second, func() bool {
		return w.usable(w.relays[1], 1).Amount+w.usable(w.relays[2], 1).Amount >= 18_000
	})
	if took := w.now - begun; took > config().TTL+3*time.Second {
		t.Errorf("it took %v", took)
	}
	w.run(5 * time.Minute)
	if a := w.ip(pinned); a.State != ownership.Quarantined || a.Owner != nodeID(rogue.node) || rogue.uses[pinned].Open() == 0 && w.sending(t, rogue, pinned) < 0 {
		t.Errorf("the address is %+v", a)
	}
	w.assignIP(pinned, w.relays[1], false)
	w.unquarantineIP(pinned, false)
	w.run(time.Minute)
	if a := w.ip(pinned); a.Owner != nodeID(rogue.node) || w.relays[1].uses[pinned].Open() > 0 {
		t.Errorf("another relay sends from the address: %+v", a)
	}
	rogue.crash(time.Second)
	w.off(rogue, time.Hour)
	w.assignIP(pinned, w.relays[1], true)
	w.sending(t, w.relays[1], pinned)
	if got := w.log.state.table.Holding(1, rogue.node); got.Ceiling.Amount+got.Floor.Amount != 0 {
		t.Errorf("the evicted relay still holds %v", got)
	}
}

// evict puts a relay out.
func (w *world) evict(r *relay) {
	s := w.log.leader
	w.propose(s, func(st *state) any {
		st.table.Evict(r.node)
		w.checker.put[r.node] = 1 << 62 // until the leader is told
		return nil
	}, func(any) {
		if s.grantor != nil {
			s.grantor.Evict(r.node)
			w.checker.put[r.node] = w.now
		}
	})
	for ip, row := range w.log.state.ips {
		if row.Owner == nodeID(r.node) {
			w.quarantineIP(ip)
		}
	}
}

// Test18AddressIsDedicatedMeanwhile (A3): an address goes back and forth between
// everybody's mail and one tenant's, while mail of two tenants waits for it.
func Test18AddressIsDedicatedMeanwhile(t *testing.T) {
	for _, ip := range []int{pinned, floating} {
		w := owners(t, 2, ip)
		w.net.hold = func(_, to *machine) time.Duration {
			if w.chance(20) {
				return w.between(0, 5*time.Second)
			}
			return 0
		}
		flips := 0
		for i := range 40 {
			tenant := (i + 1) % 3
			w.placeIP(ip, tenant) // refused while it is in use
			w.run(w.between(0, 2*time.Second))
			w.releaseIP(ip, true)
			if i%4 == 0 {
				w.quarantineIP(ip) // in a hurry
			}
			w.placeIP(ip, tenant)
			w.run(w.between(0, 4*time.Second))
			w.placeIP(ip, tenant)
			w.waitFor(t, "it is quarantined and nobody's", 4*time.Minute, func() bool {
				return w.ip(ip).State == ownership.Quarantined && w.ip(ip).Owner.IsZero()
			})
			w.placeIP(ip, tenant)
			w.unquarantineIP(ip, false)
			w.waitFor(t, "it is free", time.Minute, func() bool { return w.ip(ip).State == ownership.Free })
			if w.ip(ip).Tenant == tenantID(tenant) {
				flips++
			}
			r := w.relays[i%2]
			w.assignIP(ip, r, false)
			w.sending(t, r, ip)
			if w.chance(30) {
				r.crash(w.between(0, time.Second))
			}
		}
		if flips < 40 {
			t.Errorf("address %d: %d of 40 flips", ip, flips)
		}
	}
}

// copyOf starts a copy of a machine's disk as it is now, but for floors.
func (w *world) copyOf(of *relay) *relay {
	r := w.newRelay(of.node, len(w.all))
	r.copy, r.server, r.steady = true, of.server, true
	r.disk.incarnation = of.disk.incarnation
	copy(r.disk.news, of.disk.news)
	for id, m := range of.disk.marks {
		r.disk.marks[id] = m
	}
	for id, d := range of.demand {
		r.demand[id] = d
	}
	w.all, w.copies = append(w.all, r), append(w.copies, r)
	r.boot()
	return r
}
