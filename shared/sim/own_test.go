package sim

import (
	"slices"
	"time"

	"github.com/relais-mta/relais/shared/ids"
	"github.com/relais-mta/relais/shared/lease"
	"github.com/relais-mta/relais/shared/ownership"
)

// The addresses of the world. Two are pinned, two may be taken over.
const addresses = 4

// ipConfig has short times. The leader waits exactly as long as it must: the ten
// seconds beyond that are for networks, and would hide mistakes.
func ipConfig() ownership.Config {
	return ownership.Config{TTL: 20 * time.Second, Guard: 5 * time.Second}
}

// ipRow is an address in the state.
type ipRow struct {
	revision uint64
	ownership.Address
}

func newIPs() []ipRow {
	ips := make([]ipRow, addresses)
	for i := range ips {
		ips[i].State, ips[i].Pinned, ips[i].Placed = ownership.Free, i < addresses/2, true
	}
	return ips
}

func (r ipRow) news() ownership.News {
	return ownership.News{Revision: r.revision, Address: r.Address}
}

// ipSession is a connection from an address, with mail of a tenant.
type ipSession struct {
	tenant ids.Tenant
	busy   bool // with a message that takes long
	closed bool
}

func nodeID(n lease.Node) (id ids.Node) {
	id[0], id[1] = byte(n), byte(n>>8)
	return id
}

// tenantID returns one of two tenants, or nobody.
func tenantID(n int) (id ids.Tenant) {
	id[0] = byte(n)
	return id
}

// change is a step of an address.
type change func(a ownership.Address, index uint64) (ownership.Address, error)

// ipResult is what became of a step.
type ipResult struct {
	ip     int
	before ownership.Address
	err    error
}

// changeIP proposes a step and tells everybody what became of it.
func (w *world) changeIP(ip int, what string, step change) {
	if s := w.log.leader; s != nil {
		w.changeIPBy(s, ip, what, step)
	}
}

func (w *world) changeIPBy(s *server, ip int, what string, step change) {
	w.propose(s, func(st *state) any {
		row := &st.ips[ip]
		out := ipResult{ip: ip, before: row.Address}
		var after ownership.Address
		if after, out.err = step(row.Address, st.index); out.err == nil && after != row.Address {
			row.Address, row.revision = after, st.index
		}
		return out
	}, func(result any) {
		res := result.(ipResult)
		row := w.log.state.ips[ip]
		if w.recording {
			w.note("%s address %d (%v): %s of %x, epoch %d", what, ip, res.err, row.State, row.Owner[0], row.Epoch)
		}
		for _, r := range w.everyone() {
			life := r.life // it is told over a connection of the process
			w.send(&s.machine, &r.machine, func() {
				if r.life == life {
					r.news([]ipRow{row}, ip)
				}
			})
		}
	})
}

func (w *world) assignIP(ip int, r *relay, off bool) {
	w.changeIP(ip, "assign to "+r.name, func(a ownership.Address, index uint64) (ownership.Address, error) {
		return a.Assign(nodeID(r.node), index, off)
	})
}

func (w *world) releaseIP(ip int, aside bool) {
	w.changeIP(ip, "release", func(a ownership.Address, _ uint64) (ownership.Address, error) { return a.Release(aside) })
}

func (w *world) quarantineIP(ip int) {
	w.changeIP(ip, "quarantine", func(a ownership.Address, _ uint64) (ownership.Address, error) { return a.Quarantine(), nil })
}

func (w *world) unquarantineIP(ip int, off bool) {
	w.changeIP(ip, "unquarantine", func(a ownership.Address, _ uint64) (ownership.Address, error) { return a.Unquarantine(off) })
}

func (w *world) placeIP(ip, tenant int) {
	w.changeIP(ip, "place", func(a ownership.Address, _ uint64) (ownership.Address, error) { return a.Place(tenantID(tenant)) })
}

// everyone returns all relays, copies of machines too.
func (w *world) everyone() []*relay { return w.all }

// keep is the leader's duty for floating addresses.
func (s *server) keep() {
	w := s.w
	for ip := range w.log.state.ips {
		row := w.log.state.ips[ip]
		if row.Pinned || row.Owner.IsZero() || !s.keeper.Over(s.clock(w.now), row.Owner) {
			continue
		}
		w.changeIPBy(s, ip, "reclaim", func(a ownership.Address, _ uint64) (ownership.Address, error) { return a.Reclaim(row.Epoch) })
	}
}

// hearsOfAddresses takes a relay's report about its addresses. It is answered when
// a command that was proposed later is committed, with what was so then.
func (s *server) hearsOfAddresses(r *relay, sent lease.Instant, life int) {
	w := s.w
	s.keeper.Heard(s.clock(w.now), nodeID(r.node))
	s.asked = append(s.asked, func(rows []ipRow) {
		w.send(&s.machine, &r.machine, func() {
			if r.life != life || r.down {
				return
			}
			r.news(rows, 0)
			for ip, row := range rows {
				if row.Owner == nodeID(r.node) {
					r.uses[ip].Renew(sent, row.Epoch)
				}
			}
			r.closeAddresses()
		})
	})
}

// told are the answers that wait for a command, and what the command takes down
// for them.
func (s *server) told() (take func(*state) []ipRow, answer func([]ipRow)) {
	asked := s.asked
	s.asked = nil
	take = func(st *state) []ipRow {
		if len(asked) == 0 {
			return nil
		}
		return slices.Clone(st.ips)
	}
	return take, func(rows []ipRow) {
		for _, tell := range asked {
			tell(rows)
		}
	}
}

// bootIPs begins with what the disk says of addresses.
func (r *relay) bootIPs() {
	if r.uses == nil {
		r.uses, r.mail = make([]ownership.Use, addresses), make([][]*ipSession, addresses)
		r.closing = make([]lease.Instant, addresses)
	}
	for ip := range r.uses {
		r.uses[ip] = ownership.NewUse(ipConfig(), nodeID(r.node), r.disk.news[ip])
		r.mail[ip] = nil
	}
	r.ipAsked, r.ipAcked = -time.Hour, -time.Hour
}

// endIPs ends all connections, as the end of a process does.
func (r *relay) endIPs() {
	for ip := range r.mail {
		r.mail[ip] = nil
	}
}

// news takes what control says of addresses from the first one on.
func (r *relay) news(rows []ipRow, first int) {
	if r.down {
		return
	}
	for i, row := range rows {
		ip, n := first+i, row.news()
		if !r.uses[ip].Hear(n) {
			continue
		}
		r.write(func() {
			if n.Revision > r.disk.news[ip].Revision {
				r.disk.news[ip] = n
			}
		}, func() { r.uses[ip].Saved(n.Revision) })
	}
	r.closeAddresses()
}

// workAddresses opens connections where it may, for mail of both tenants, closes
// them where it must, and says what it has stopped using.
func (r *relay) workAddresses(now lease.Instant) {
	w := r.w
	for ip := range r.uses {
		u := &r.uses[ip]
		tenant := tenantID(w.rng.IntN(2) + 1)
		if u.Open() < 3 && w.chance(30) && u.MayOpen(now, tenant) && r.present(ip) {
			r.openFrom(ip, tenant)
		}
		if u.Standing(now) == ownership.Finishing && u.Open() > 0 && !r.mail[ip][0].busy && w.chance(30) {
			r.closeFrom(ip, r.mail[ip][0]) // it happens to be idle
		}
	}
	r.closeAddresses()
	if w.now >= r.ipAsked+4*time.Second {
		r.ipAsked = w.now
		s, sent, life := r.to(), now, r.life
		w.send(&r.machine, &s.machine, func() { s.hears(r, func() { s.hearsOfAddresses(r, sent, life) }) })
	}
	if w.now >= r.ipAcked+2*time.Second {
		r.acknowledge()
	}
}

func (r *relay) acknowledge() {
	w := r.w
	for ip := range r.uses {
		epoch, ok := r.uses[ip].Acknowledge()
		if !ok {
			continue
		}
		r.ipAcked = w.now
		s := r.to()
		w.send(&r.machine, &s.machine, func() {
			s.hears(r, func() {
				w.changeIPBy(s, ip, "acknowledge", func(a ownership.Address, _ uint64) (ownership.Address, error) {
					return a.Acknowledge(nodeID(r.node), epoch), nil
				})
			})
		})
	}
}

// present says whether the machine has the address. A pinned one is routed to one
// machine: a copy of its disk does not have it.
func (r *relay) present(ip int) bool { return !r.copy || ip >= addresses/2 }

func (r *relay) openFrom(ip int, tenant ids.Tenant) {
	c := &ipSession{tenant: tenant}
	r.mail[ip] = append(r.mail[ip], c)
	r.uses[ip].Opened()
	r.w.checker.opened++
	lasts := r.w.between(500*time.Millisecond, 10*time.Second)
	if r.w.chance(10) {
		lasts = r.w.between(0, 2*time.Minute)
		c.busy = true
	}
	r.w.on(&r.machine, lasts, func() {
		if !c.closed {
			r.closeFrom(ip, c)
		}
	})
	r.closeInTime(ip)
}

func (r *relay) closeFrom(ip int, c *ipSession) {
	c.closed = true
	r.uses[ip].Closed()
	r.mail[ip] = slices.DeleteFunc(r.mail[ip], func(o *ipSession) bool { return o == c })
}

// closeInTime has the relay there at the instant at which connections must end.
func (r *relay) closeInTime(ip int) {
	if end := r.uses[ip].CloseBy(); end > r.closing[ip] {
		r.closing[ip] = end
		r.w.on(&r.machine, r.span(end.Sub(r.clock(r.w.now))), r.closeAddresses)
	}
}

// closeAddresses closes what must not be open any more.
func (r *relay) closeAddresses() {
	if r.down {
		return
	}
	now := r.clock(r.w.now)
	for ip := range r.uses {
		if r.uses[ip].Standing(now) == ownership.Gone {
			for len(r.mail[ip]) > 0 {
				r.closeFrom(ip, r.mail[ip][0])
			}
		}
		if len(r.mail[ip]) > 0 {
			r.closeInTime(ip)
		}
	}
}

// checkAddresses holds a relay against A1 and A3: if it may send from an address by
// its own word, or has a connection open, the table names it. That is stricter than
// A1. A stopped process cannot close anything; it does so first when it goes on.
func (w *world) checkAddresses(r *relay, now lease.Instant) {
	for ip := range r.uses {
		u := &r.uses[ip]
		open := u.Open()
		if open > 0 && r.until != 0 {
			open = 0
		}
		if open == 0 && (u.Standing(now) != ownership.Usable || !r.present(ip)) {
			continue
		}
		row := &w.log.state.ips[ip]
		w.tally.held[a1]++
		if row.Owner != nodeID(r.node) {
			w.fail("A1: %s sends from address %d under epoch %d with %d connections, it is %s of %x", r.name, ip, u.Epoch(), open, row.State, row.Owner[0])
		}
		for _, c := range r.mail[ip][:open] {
			if !row.Tenant.IsZero() {
				w.tally.held[a3]++
			}
			if !row.Carries(c.tenant) {
				w.fail("A3: from address %d, which is for tenant %x, goes mail of tenant %x", ip, row.Tenant[0], c.tenant[0])
			}
		}
	}
}

// committedIP holds a step against A2, and what disks say of the address against A1,
// as if every relay crashed now.
func (c *checker) committedIP(w *world, res ipResult) {
	after := w.log.state.ips[res.ip].Address
	w.tally.held[a2]++
	if after.Owner != res.before.Owner && !after.Owner.IsZero() {
		w.tally.met[moves]++
	}
	if after.Epoch < res.before.Epoch || after.Owner != res.before.Owner && !after.Owner.IsZero() && after.Epoch == res.before.Epoch {
		w.fail("A2: address %d went from epoch %d to %d", res.ip, res.before.Epoch, after.Epoch)
	}
	for _, r := range w.relays {
		u := ownership.NewUse(ipConfig(), nodeID(r.node), r.disk.news[res.ip])
		if after.Owner != nodeID(r.node) && u.Standing(r.clock(w.now)) == ownership.Usable {
			w.fail("A1: %s would send from address %d after a restart, it is %s of %x", r.name, res.ip, after.State, after.Owner[0])
		}
	}
}

// checkCopy holds two machines with one key against A4: that only one of them uses
// anything.
func (w *world) checkCopy(second *relay) {
	first := w.relays[second.node-1]
	if first.down || second.down {
		return
	}
	w.tally.held[a4]++
	for _, id := range w.limits {
		if a, b := w.usable(first, id), w.usable(second, id); a.Amount > 0 && b.Amount > 0 {
			w.fail("A4: two machines with one key use %v and %v of limit %d", a, b, id)
		}
	}
	for ip := range first.uses {
		if a, b := first.uses[ip].Open(), second.uses[ip].Open(); a > 0 && b > 0 && first.until == 0 && second.until == 0 {
			w.fail("A4: two machines with one key have %d and %d connections from address %d", a, b, ip)
		}
	}
}
