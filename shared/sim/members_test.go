package sim

import (
	"maps"
	"slices"
	"time"
)

// Relays come and go, servers too, and machines are copied.

// mostRelays is how many a random world has at most at once: with more, a limit of
// two slots does not come round to everybody in the calm at its end.
const mostRelays = 6

// evicted reports whether a relay was put out.
func (w *world) evicted(r *relay) bool {
	_, gone := w.log.state.table.Session(r.node)
	return gone
}

// somebody returns one of the relays that were not put out.
func (w *world) somebody() *relay {
	for {
		if r := w.relays[w.rng.IntN(len(w.relays))]; !w.evicted(r) {
			return r
		}
	}
}

// member returns one of the servers, but for one of them.
func (w *world) member(but *server) *server {
	for {
		if s := w.servers[w.rng.IntN(len(w.servers))]; !s.left && s != but {
			return s
		}
	}
}

// turnover has a relay join, or one be put out, which may not listen and goes on
// until its machine is switched off, or both.
func (w *world) turnover(r *relay) {
	members := 0
	for _, o := range w.relays {
		if !w.evicted(o) {
			members++
		}
	}
	leaves := w.forgetful || members > 3 && w.chance(60)
	if leaves {
		w.note("%s is put out", r.name)
		w.tally.met[relayLeaves]++
		w.evict(r)
		w.after(w.between(0, time.Minute), func() {
			if !w.evicted(r) {
				return // what the leader decided was lost with it
			}
			r.crash(100 * 24 * time.Hour)
			if w.forgetful {
				r.known, r.sessions, r.stamps, r.uses, r.mail = nil, nil, nil, nil, nil
				maps.DeleteFunc(w.net.ways, func(k [2]*machine, _ *way) bool { return k[0] == &r.machine || k[1] == &r.machine })
			}
		})
	}
	if w.forgetful || members < mostRelays {
		w.tally.met[relayJoins]++
		n := w.addRelay()
		n.appetite, n.steady = r.appetite, r.steady
		w.note("%s joins", n.name)
		if w.forgetful {
			w.soakDemand(n)
		}
	}
}

// changeServers has a server join, or one leave. A leader that leaves gives the lead
// away first, and does nothing any more.
func (w *world) changeServers(s *server) {
	serving := 0
	for _, o := range w.servers {
		if !o.left {
			serving++
		}
	}
	if serving <= 3 && len(w.servers) < 7 {
		w.note("%s joins", w.addServer().name)
		w.tally.met[serverJoins]++
		return
	}
	if serving <= 3 {
		return
	}
	w.note("%s leaves", s.name)
	w.tally.met[serverLeaves]++
	if s == w.log.leader {
		w.elect(w.member(s))
	}
	s.left, s.down, s.leads, s.grantor = true, true, false, nil
	s.life++
}

// duplicate starts a copy of a relay's machine, made before its disk held floors, for
// so long that the first is never silent for long enough: so the copy gets nothing.
func (w *world) duplicate(r *relay) {
	p := placeOf(&w.places, r.node)
	if r.down || p.r != r || w.now > p.heard+3*time.Second || w.forgetful {
		return
	}
	w.note("%s is copied", r.name)
	w.tally.met[copies]++
	c := w.copyOf(r)
	w.after(w.between(0, ipConfig().TTL-5*time.Second), func() {
		w.note("the copy %s ends", c.name)
		c.crash(100 * 24 * time.Hour)
		w.copies = slices.DeleteFunc(w.copies, func(o *relay) bool { return o == c })
		w.all = slices.DeleteFunc(w.all, func(o *relay) bool { return o == c })
	})
}
