package sim

import (
	"flag"
	"fmt"
	"reflect"
	"runtime"
	"slices"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/relais-mta/relais/shared/lease"
)

var (
	seeds = flag.Int("seeds", 12, "how many random worlds to run")
	seed  = flag.Uint64("seed", 1, "the first world's seed")
	stop  = flag.Int64("stop", 3, "end after so many worlds in which a promise was broken")
	show  = flag.Bool("show", false, "print what happened in the last world")
)

// config has short times, so that everything happens often.
func config() lease.Config {
	return lease.Config{
		TTL: 10 * time.Second, FloorTTL: 90 * time.Second, Guard: 200 * time.Millisecond,
		Linger: 15 * time.Second, Hold: 5 * time.Second, FloorGap: 20 * time.Second,
	}
}

// randomWorld is a cluster in which everything goes wrong for a while.
func randomWorld(seed uint64) *world {
	w := newWorld(seed, config())
	for range 3 {
		w.addServer()
	}
	w.limits = []lease.LimitID{1, 2, 3, 4}
	for _, l := range []lease.Limit{
		{ID: 1, Kind: lease.Rate, Max: (w.rng.Int64N(15) + 5) * lease.Milli, Per: time.Second, Burst: w.rng.Int64N(20) + 10, FloorPercent: 20, ReservePercent: 5},
		{ID: 2, Kind: lease.Rate, Max: 60 * lease.Milli, Per: time.Minute, Burst: 2}, // fewer seats than relays
		{ID: 3, Kind: lease.Slots, Max: w.rng.Int64N(20) + 10, FloorPercent: 20, ReservePercent: 5},
		{ID: 4, Kind: lease.Slots, Max: 2}, // likewise
	} {
		w.install(l)
	}
	w.reign = w.chance(30)
	w.elect(w.servers[0])
	for range w.rng.IntN(4) + 3 {
		w.addRelay().appetite = w.rng.IntN(4)
	}
	for ip := range addresses {
		w.assignIP(ip, w.relays[w.rng.IntN(len(w.relays))], false)
	}
	w.assign(address, w.relays[0])
	w.setQuota(address, 0, 100)
	w.setQuota(domain, 0, 200)
	return w
}

// install begins the log with a limit.
func (w *world) install(l lease.Limit) {
	cmd := func(st *state) any { return st.table.PutLimit(l) }
	if err, ok := cmd(w.log.state).(error); ok {
		panic(err)
	}
	w.log.state.index++
	w.log.entries = append(w.log.entries, cmd)
}

// misfortune does something to somebody, and comes again.
func (w *world) misfortune() {
	if w.quiet {
		return
	}
	r, s := w.somebody(), w.member(nil)
	// In some worlds the leader stays: only there the long silences end that a new
	// leader would begin to count anew.
	what := w.rng.IntN(24)
	if w.reign && (what == 0 || what >= 6 && what <= 9 || what == 14 || what == 20) {
		what = 2
	}
	switch what {
	case 0:
		w.stop(&s.machine, w.between(0, time.Minute))
	case 1:
		w.stop(&r.machine, w.between(0, time.Minute))
	case 2:
		w.cut(&r.machine, w.between(0, 150*time.Second))
	case 3: // one way only
		if a, b := &r.machine, &s.machine; w.chance(50) {
			w.block(a, b, w.between(0, time.Minute))
		} else {
			w.block(b, a, w.between(0, time.Minute))
		}
	case 4, 5:
		r.crash(w.between(0, 30*time.Second))
	case 6: // entries are committed no more, and then by another one, or lost
		lasts := w.between(0, 3*time.Second)
		w.log.stalls = w.now + lasts
		w.after(lasts, func() { w.elect(s) })
	case 7:
		w.elect(s)
	case 8: // the leader stops, and another one leads before it goes on
		if l := w.log.leader; l != s {
			w.stop(&l.machine, w.between(0, time.Minute))
			w.after(w.between(0, 5*time.Second), func() { w.elect(s) })
		}
	case 9:
		w.transfer(s)
	case 10:
		w.net.loss, w.net.dup, w.net.tail = w.rng.IntN(20), w.rng.IntN(20), w.rng.IntN(10)
	case 11:
		w.alter(w.limits[w.rng.IntN(len(w.limits))], 25)
	case 12:
		w.assign(address, r)
	case 13:
		w.setQuota(address, 0, uint32(w.rng.IntN(300)))
		w.setQuota(domain, 0, uint32(w.rng.IntN(500)))
	case 14:
		w.divide()
	case 15:
		w.hang(r)
	case 16:
		w.crashLoop(r, w.rng.IntN(6)+1)
	case 17, 22, 23: // thrice as often as others: what it takes to meet is rare
		w.crowd()
		w.drag()
		w.wavering(w.rng.IntN(12) + 4)
	case 18:
		w.crowd()
		w.shuffle(w.rng.IntN(addresses), w.rng.IntN(12)+4)
	case 19:
		w.turnover(r)
	case 20:
		w.changeServers(s)
	case 21:
		w.duplicate(r)
	}
	gap := 12 * time.Second
	if w.forgetful {
		gap = time.Minute * w.pace // what is lost has to come back before shares can be right
	}
	w.after(w.between(0, gap), w.misfortune)
}

// alter changes a limit to some tenths of what it is, at most.
func (w *world) alter(id lease.LimitID, tenths int) {
	l, ok := w.log.state.table.Limit(id)
	if !ok || l.Max <= 2 || l.Burst == 2 || w.forgetful {
		return
	}
	l.Max = max(l.Max*int64(w.rng.IntN(tenths)+1)/10, 3*lease.Milli)
	if l.Kind == lease.Slots {
		l.Max = max(l.Max%40, 3)
	}
	l.Max = min(l.Max, 30*lease.Milli)
	w.putLimit(l)
}

// divide leaves the leader alone with a few relays for a while: they go on talking to
// it and want less, and the other servers elect another one, of which it does not hear.
func (w *world) divide() {
	old, lasts := w.log.leader, w.between(0, time.Minute)
	w.note("%s and some relays are alone for %v", old.name, lasts)
	elected := w.between(0, 2*time.Second)
	first, alone := w.rng.IntN(len(w.relays)), w.rng.IntN(min(len(w.relays)/2, 4))+1
	for i := range w.relays {
		r := w.relays[(first+i)%len(w.relays)]
		for _, s := range w.servers {
			if (s == old) != (i < alone) {
				w.blockBoth(&r.machine, &s.machine, lasts)
			}
		}
		if i < alone {
			w.after(elected+w.between(0, time.Second), func() { r.want(20) })
		}
	}
	next := w.member(old)
	w.after(elected, func() {
		if w.log.leader == old {
			w.electUnheard(next, lasts)
		}
	})
}

// hang has a disk hang for a while. In most cases the power fails before it goes on,
// when the relay has less than before of some limit, and addresses no more, but for its
// disk.
func (w *world) hang(r *relay) {
	lasts := w.between(0, 10*time.Second)
	w.note("the disk of %s hangs for %v", r.name, lasts)
	r.hangs = w.now + lasts
	w.tally.met[slowDisk]++
	if id := w.limits[w.rng.IntN(len(w.limits))]; w.chance(70) {
		w.alter(id-(id+1)%2, 9) // those with odd numbers have floors
	}
	for ip, row := range w.log.state.ips {
		if row.Owner == nodeID(r.node) && w.chance(50) {
			w.releaseIP(ip, false)
		}
	}
	if w.chance(70) {
		life := r.life
		w.after(w.between(0, lasts), func() {
			if r.life == life {
				r.crash(w.between(0, 10*time.Second))
			}
		})
	}
}

// crashLoop has a relay start again and again, while what it is told comes late.
func (w *world) crashLoop(r *relay, times int) {
	r.lags = w.now + 10*time.Second
	r.crash(w.between(0, 100*time.Millisecond))
	if times > 1 && !w.quiet {
		w.after(w.between(200*time.Millisecond, 5*time.Second), func() { w.crashLoop(r, times-1) })
	}
}

// crowd has messages to servers come late and twice for a while.
func (w *world) crowd() {
	w.net.dup = max(w.net.dup, w.rng.IntN(60))
	for _, s := range w.servers {
		s.lags = w.now + 20*time.Second
	}
}

// drag has all disks take their time for a while.
func (w *world) drag() {
	w.tally.met[slowDisk]++
	for _, r := range w.relays {
		r.drags = w.now + 20*time.Second
	}
}

// wavering raises and lowers quotas of the day, again and again, about what is
// reserved of them.
func (w *world) wavering(times int) {
	subject := address
	if w.chance(70) {
		subject = domain
	}
	_, reserved, used := w.log.state.ledger.Totals(subject, 0, w.log.state.ledger.Today())
	if w.chance(60) {
		w.setQuota(subject, 0, uint32(reserved)+60)
	} else {
		w.setQuota(subject, 0, uint32(used+(reserved-min(used, reserved))/2))
	}
	if times > 1 && !w.quiet {
		w.after(w.between(0, 2*time.Second), func() { w.wavering(times - 1) })
	}
}

// shuffle gives an address from one to another.
func (w *world) shuffle(ip, times int) {
	if w.chance(50) {
		w.releaseIP(ip, false)
	} else {
		w.assignIP(ip, w.somebody(), false)
	}
	if times > 1 && !w.quiet {
		w.after(w.between(0, 1500*time.Millisecond), func() { w.shuffle(ip, times-1) })
	}
}

// operators do something to addresses all the time.
func (w *world) operators() {
	if !w.quiet {
		w.operator(w.rng.IntN(addresses), w.somebody())
		w.after(w.between(0, 6*time.Second), w.operators)
	}
}

// operator does something to an address. That a machine is off is said only of one
// that is, and whose disk is empty when it comes back.
func (w *world) operator(ip int, r *relay) {
	switch w.rng.IntN(8) {
	case 0, 1, 2:
		w.assignIP(ip, r, false)
	case 3, 4:
		w.releaseIP(ip, w.chance(40))
	case 5:
		w.quarantineIP(ip)
	case 6:
		w.placeIP(ip, w.rng.IntN(3))
		w.unquarantineIP(ip, false)
	case 7:
		row := w.log.state.ips[ip]
		for _, o := range w.relays {
			if row.Owner == nodeID(o.node) && o.down && o != r {
				w.off(o, 5*time.Second)
				w.assignIP(ip, r, true)
			}
		}
	}
}

// off keeps a machine that is down so for a while, and empties its disk of
// addresses: it is set up anew.
func (w *world) off(r *relay, d time.Duration) {
	clear(r.disk.news)
	r.offUntil = w.now + d
}

// nextDays has days begin, and their quotas.
func (w *world) nextDays() {
	w.after(w.between(40*time.Second, 90*time.Second), func() {
		w.setQuota(address, 1, uint32(w.rng.IntN(300)))
		w.setQuota(domain, 1, uint32(w.rng.IntN(500)))
		next := w.tomorrow()
		for range 2 { // two leaders think that it is time
			w.after(w.between(5*time.Second, 20*time.Second), func() { w.roll(next) })
		}
		w.nextDays()
	})
}

// calm ends all faults and has everybody want something.
func (w *world) calm() {
	w.quiet = true
	w.net.loss, w.net.dup, w.net.tail = 0, 0, 0
	clear(w.net.ways)
	w.run(time.Minute) // who is stopped goes on
	for _, r := range w.relays {
		r.steady = true
		for _, id := range w.limits {
			l, _ := w.log.state.table.Limit(id)
			r.demand[id] = l.Max
		}
	}
	w.elect(w.member(nil))
}

// settled holds a calm world against I7 and I8: everybody has something, of the
// small limits in turn, and limits are used.
func (w *world) settled() {
	served := make(map[lease.LimitID]map[*relay]bool)
	for _, id := range w.limits {
		served[id] = make(map[*relay]bool)
	}
	w.run(45 * time.Second) // relays that were down come back, what is lost is reclaimed
	if slices.ContainsFunc(w.relays, w.evicted) {
		w.run(lease.Outlast(w.cfg.FloorTTL+w.cfg.Linger) - 30*time.Second) // and floors
	}
	given := make(map[lease.LimitID]int64)
	for i := range 120 {
		w.run(500 * time.Millisecond)
		for _, id := range w.limits {
			sum := int64(0)
			for _, r := range w.relays {
				if r.holder == nil || w.evicted(r) {
					continue
				}
				if has := r.rights(id).Usable(r.clock(w.now)).Amount; has > 0 {
					served[id][r] = true
					sum += has
				}
			}
			// Now and then a floor is on its way from one to another: in the last
			// ten seconds it must have arrived once.
			if i >= 100 {
				given[id] = max(given[id], sum)
			}
		}
	}
	if w.failed != "" {
		return
	}
	for _, id := range w.limits {
		l, _ := w.log.state.table.Limit(id)
		for _, r := range w.relays {
			if w.evicted(r) {
				continue
			}
			w.tally.held[i8]++
			if !served[id][r] {
				w.fail("I8: in a calm minute %s had nothing of limit %d", r.name, id)
			}
		}
		// With fewer seats than relays a part is on its way from one to the next.
		seats := min(l.Max*3/4/lease.Milli, l.Burst*3/4)
		if l.Kind == lease.Rate && l.Max >= 8*lease.Milli && seats >= int64(len(w.relays)) {
			if w.tally.held[i7]++; given[id] < l.Max*85/100 {
				w.fail("I7: in a calm world %d of limit %d with %d are given out", given[id], id, l.Max)
			}
		}
		w.tally.held[i6]++
		if sum := w.log.state.table.Sum(id); sum.Amount > l.Max || sum.Burst > l.Burst {
			w.fail("I6: long after limit %d became %d and %d are held %v", id, l.Max, l.Burst, sum)
		}
	}
}

// play runs the world of a seed to its end.
func play(seed uint64) *world {
	w := randomWorld(seed)
	w.after(0, w.misfortune)
	w.after(0, w.operators)
	w.nextDays()
	w.run(4 * time.Minute)
	w.calm()
	w.settled()
	if w.failed == "" {
		w.replay()
	}
	w.compareClocks()
	return w
}

// replay applies the log to an empty state: it must come out the same.
func (w *world) replay() {
	st := newState()
	for _, cmd := range w.log.entries {
		st.index++
		cmd(st)
	}
	for _, id := range w.limits {
		if a, b := w.log.state.table.Holdings(id), st.table.Holdings(id); len(a)+len(b) > 0 && !reflect.DeepEqual(a, b) {
			w.fail("the log applied again gives %v of limit %d, not %v", b, id, a)
		}
	}
	if !slices.Equal(st.ips, w.log.state.ips) {
		w.fail("the log applied again gives other addresses")
	}
	if !reflect.DeepEqual(st.ledger, w.log.state.ledger) {
		w.fail("the log applied again gives another ledger")
	}
}

// TestSeeds runs random worlds, on every processor.
func TestSeeds(t *testing.T) {
	var next, events, failed atomic.Int64
	var printing sync.Mutex
	var all tallies
	var wg sync.WaitGroup
	for range runtime.GOMAXPROCS(0) {
		wg.Go(func() {
			for {
				i := next.Add(1) - 1
				if i >= int64(*seeds) || failed.Load() >= *stop {
					return
				}
				n := *seed + uint64(i)
				w := play(n)
				events.Add(int64(w.count))
				printing.Lock()
				all.add(&w.tally)
				printing.Unlock()
				if w.failed != "" && failed.Add(1) <= 3 {
					printing.Lock()
					t.Error(w.report())
					printing.Unlock()
				}
				if *show && i == int64(*seeds)-1 {
					for _, line := range w.trace {
						fmt.Println(line)
					}
				}
			}
		})
	}
	wg.Wait()
	all.print(t)
	t.Logf("%d seeds from %d, %d events, %d broken promises", min(next.Load(), int64(*seeds)), *seed, events.Load(), failed.Load())
}
