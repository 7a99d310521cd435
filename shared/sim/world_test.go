package sim

import (
	"fmt"
	"math/rand/v2"
	"strings"
	"time"

	"github.com/relais-mta/relais/shared/lease"
	"github.com/relais-mta/relais/shared/warmup"
)

// world is everything there is. One goroutine moves it.
type world struct {
	seed      uint64
	rng       *rand.Rand
	now       time.Duration // since the world began
	events    eventHeap
	order     uint64
	cfg       lease.Config
	net       network
	log       raftLog
	servers   []*server
	relays    []*relay
	all       []*relay // with copies of their machines
	copies    []*relay // of machines
	places    []place  // of relays, by node, as servers told each other
	limits    []lease.LimitID
	kinds     []lease.Kind
	checker   checker
	reign     bool                 // the leader stays
	unaware   bool                 // a former leader never hears that it is none any more
	quiet     bool                 // no faults any more
	sync      func() time.Duration // how long a write takes; nil: as usual
	stale     bool                 // all relays must be looked at
	failed    string               // the first broken promise
	trace     []string             // the last things that happened
	recording bool                 // of what costs much to write down
	forgetful bool                 // the log is not kept
	pace      time.Duration        // how many times more seldom relays look around
	count     int                  // events
	tally     tally
	led       time.Duration // since when the leader leads
}

type event struct {
	at    time.Duration
	order uint64
	on    *machine // nil: of the world itself
	life  int      // of the machine; 0: whichever
	do    func()
}

// eventHeap has the next event at its root.
type eventHeap []event

func (e *event) before(o *event) bool { return e.at < o.at || e.at == o.at && e.order < o.order }

func (h *eventHeap) push(e event) {
	*h = append(*h, e)
	all, i := *h, len(*h)-1
	for i > 0 {
		up := (i - 1) / 4
		if !e.before(&all[up]) {
			break
		}
		all[i], i = all[up], up
	}
	all[i] = e
}

func (h *eventHeap) pop() event {
	all := *h
	first, last := all[0], all[len(all)-1]
	all[len(all)-1] = event{}
	all = all[:len(all)-1]
	*h = all
	if len(all) == 0 {
		return first
	}
	i := 0
	for {
		least, down := i, 4*i+1
		next := &last
		for c := down; c < min(down+4, len(all)); c++ {
			if all[c].before(next) {
				least, next = c, &all[c]
			}
		}
		if least == i {
			break
		}
		all[i], i = all[least], least
	}
	all[i] = last
	return first
}

// machine has a clock of its own, may be stopped for a while, and may crash: then
// a new life begins, and what the former one waited for never comes.
type machine struct {
	name   string
	ppm    int64 // how much faster its clock runs, in millionths
	offset time.Duration
	until  time.Duration // stopped until then
	lags   time.Duration // what it is sent comes late until then
	life   int
	down   bool
	runs   *relay // that runs on it, if one does
	resume func() // the first thing that is done after a stop
}

func (m *machine) clock(now time.Duration) lease.Instant {
	return lease.Instant(m.offset + now + now/1_000_000*time.Duration(m.ppm))
}

// span returns how long a length of the machine's time takes in the world, and a
// little more: a timer that fires early is none.
func (m *machine) span(d time.Duration) time.Duration {
	speed := time.Duration(1_000_000 + m.ppm)
	return d/speed*1_000_000 + d%speed*1_000_000/speed + 10*time.Microsecond
}

func newWorld(seed uint64, cfg lease.Config) *world {
	w := &world{seed: seed, rng: rand.New(rand.NewPCG(seed, 0x5eed)), cfg: cfg, pace: 1}
	w.log.state = newState()
	w.net.ways = make(map[[2]*machine]*way)
	w.checker.init()
	return w
}

// kind returns what a limit counts, by its place in the list: that never changes.
func (w *world) kind(i int) lease.Kind {
	for len(w.kinds) <= i {
		l, _ := w.log.state.table.Limit(w.limits[len(w.kinds)])
		w.kinds = append(w.kinds, l.Kind)
	}
	return w.kinds[i]
}

// between returns a time from a to b.
func (w *world) between(a, b time.Duration) time.Duration {
	return a + time.Duration(w.rng.Int64N(int64(b-a)+1))
}

func (w *world) chance(percent int) bool { return w.rng.IntN(100) < percent }

func (w *world) note(format string, args ...any) {
	if len(w.trace) > 400 {
		w.trace = append(w.trace[:0], w.trace[200:]...)
	}
	w.trace = append(w.trace, fmt.Sprintf("%10.3f ", w.now.Seconds())+fmt.Sprintf(format, args...))
}

// fail records a broken promise; the first one ends the run.
func (w *world) fail(format string, args ...any) {
	if w.failed == "" {
		w.failed = fmt.Sprintf(format, args...)
		w.note("BROKEN: %s", w.failed)
	}
}

func (w *world) report() string {
	tail := w.trace[max(0, len(w.trace)-40):]
	return fmt.Sprintf("%s\nat %v, event %d; replay with: make sim SEEDS=1 SEED=%d\n%s", w.failed, w.now, w.count, w.seed, strings.Join(tail, "\n"))
}

// after has the world do something.
func (w *world) after(d time.Duration, do func()) { w.push(event{at: w.now + d, do: do}) }

// on has a machine do something after a length of world time, if it still lives
// the same life then.
func (w *world) on(m *machine, d time.Duration, do func()) {
	w.push(event{at: w.now + d, on: m, life: m.life, do: do})
}

func (w *world) push(e event) {
	w.order++
	e.order = w.order
	w.events.push(e)
}

// run moves the world on. What a stopped machine should have done it does when it
// goes on, in the same order.
func (w *world) run(d time.Duration) {
	end := w.now + d
	for w.failed == "" && len(w.events) > 0 && w.events[0].at <= end {
		e := w.events.pop()
		w.now = e.at
		if m := e.on; m != nil {
			if m.down || e.life != 0 && e.life != m.life {
				continue
			}
			if m.until > w.now {
				e.at = m.until
				w.events.push(e) // its order stays
				continue
			}
			if m.until != 0 {
				m.until = 0
				w.note("%s goes on", m.name)
				if m.resume != nil {
					m.resume()
				}
			}
		}
		e.do()
		w.count++
		w.check(e.on)
	}
	w.now = end
}

// stop stops a machine as SIGSTOP does.
func (w *world) stop(m *machine, d time.Duration) {
	w.note("%s stops for %v", m.name, d)
	if m.runs != nil {
		w.tally.met[relayStops]++
	} else {
		w.tally.met[serverStops]++
	}
	m.until = max(m.until, w.now+d)
	w.push(event{at: m.until, on: m, life: m.life, do: func() {}}) // so that it goes on by itself
}

// network carries messages between machines.
type network struct {
	ways            map[[2]*machine]*way
	loss, dup, tail int // percent
	hold            func(from, to *machine) time.Duration
}

// way is from one machine to another.
type way struct {
	cut  time.Duration // until then
	last time.Duration // when the last message of those that were sent arrives
}

func (n *network) way(from, to *machine) *way {
	v := n.ways[[2]*machine{from, to}]
	if v == nil {
		v = &way{}
		n.ways[[2]*machine{from, to}] = v
	}
	return v
}

// send carries a message, perhaps: it may be lost, come twice, or late by up to 45
// seconds.
func (w *world) send(from, to *machine, deliver func()) {
	way := w.net.way(from, to)
	if way.cut > w.now {
		if w.net.way(to, from).cut > w.now {
			w.tally.met[cutOff]++
		} else {
			w.tally.met[oneWay]++
		}
		return
	}
	if w.chance(w.net.loss) {
		w.tally.met[lost]++
		return
	}
	copies := 1
	if w.chance(w.net.dup) {
		copies = 2
		w.tally.met[repeated]++
	}
	for range copies {
		delay := w.between(time.Millisecond, 40*time.Millisecond)
		if w.chance(w.net.tail) {
			delay = w.between(0, 45*time.Second)
		}
		if to.lags > w.now {
			delay += w.between(0, 3*time.Second)
		}
		if w.net.hold != nil {
			delay += w.net.hold(from, to)
		}
		if delay > time.Second {
			w.tally.met[late]++
		}
		if at := w.now + delay; at < way.last {
			w.tally.met[overtaken]++
		} else {
			way.last = at
		}
		w.push(event{at: w.now + delay, on: to, do: deliver})
	}
}

// block cuts one way for a while.
func (w *world) block(from, to *machine, d time.Duration) {
	v := w.net.way(from, to)
	v.cut = max(v.cut, w.now+d)
}

func (w *world) blockBoth(a, b *machine, d time.Duration) {
	w.block(a, b, d)
	w.block(b, a, d)
}

// cut cuts a machine off from all servers.
func (w *world) cut(m *machine, d time.Duration) {
	w.note("%s is cut off for %v", m.name, d)
	for _, s := range w.servers {
		w.blockBoth(m, &s.machine, d)
	}
}

// state is what the log gives.
type state struct {
	table   *lease.Table
	ledger  *warmup.Ledger
	history map[quotaKey]uint32 // the largest quota of a day
	epochs  map[warmup.Subject]uint64
	ips     []ipRow
	index   uint64 // of the entry
}

type quotaKey struct {
	subject warmup.Subject
	day     warmup.Day
}

func newState() *state {
	return &state{table: lease.NewTable(), ledger: warmup.NewLedger(firstDay), history: make(map[quotaKey]uint32), epochs: make(map[warmup.Subject]uint64), ips: newIPs()}
}

// command is an entry of the log. It may look at nothing but the state.
type command func(*state) any

// raftLog is Raft as seen from outside: entries that a leader proposes are
// committed in order while it leads; at a change those on their way are committed
// before the new leader's barrier, or lost.
type raftLog struct {
	state   *state
	entries []command
	term    uint64
	leader  *server
	pending []*proposal
	slow    func() time.Duration // how long a commit takes; nil: as usual
	stalls  time.Duration        // nothing is committed until then
}

type proposal struct {
	term uint64
	cmd  command
	done func(result any)
	by   *server
}

func (w *world) propose(s *server, cmd command, done func(any)) {
	p := &proposal{term: s.term, cmd: cmd, done: done, by: s}
	if s.term != w.log.term {
		return // nobody will ever commit it, and nobody says so
	}
	w.log.pending = append(w.log.pending, p)
	delay := w.between(500*time.Microsecond, 10*time.Millisecond)
	if w.chance(2) {
		delay = w.between(0, 2*time.Second)
	}
	if w.log.slow != nil {
		delay = w.log.slow()
	}
	w.after(max(delay, w.log.stalls-w.now+time.Millisecond), func() { w.commitUpTo(p) })
}

// commitUpTo commits what was proposed up to p, in order.
func (w *world) commitUpTo(p *proposal) {
	at := -1
	for i, q := range w.log.pending {
		if q == p {
			at = i
		}
	}
	for range at + 1 {
		q := w.log.pending[0]
		w.log.pending = w.log.pending[1:]
		w.commit(q)
	}
}

func (w *world) commit(p *proposal) {
	if !w.forgetful {
		w.log.entries = append(w.log.entries, p.cmd)
	}
	before := w.checker.before(w)
	w.log.state.index++
	result := p.cmd(w.log.state)
	w.checker.committed(w, before, result)
	w.changed(result)
	if p.done != nil {
		w.on(&p.by.machine, w.between(0, 2*time.Millisecond), func() { p.done(result) })
	}
}
