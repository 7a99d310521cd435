//go:build !noraft

package sim

import (
	"sync"
	"time"

	"google.golang.org/protobuf/proto"

	"github.com/relais-mta/relais/shared/lease"
	"github.com/relais-mta/relais/shared/wire"
)

// raftRelay is a relay of the second layer.
type raftRelay struct {
	w     *raftWorld
	node  lease.Node
	clock func() lease.Instant
	gone  chan struct{}
	done  sync.WaitGroup

	mu          sync.Mutex
	incarnation uint64
	holder      *lease.Holder
	floors      []lease.Floor // on disk
	to          int           // the server it takes for the leader
	session     bool
	asked       time.Time
	answered    time.Time
	open        []time.Time // when the slots in use will be free
	stamps      map[lease.LimitID]lease.Stamp
	link        *raftLink
}

func (w *raftWorld) addRelay() {
	r := &raftRelay{w: w, node: lease.Node(len(w.relays) + 1), gone: make(chan struct{})}
	r.clock = w.newClock(int64(w.intN(3)-1) * 4000)
	r.restart()
	w.relays = append(w.relays, r)
	r.done.Go(r.run)
}

// restart ends the process and begins the next.
func (r *raftRelay) restart() {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.incarnation++
	r.holder = lease.NewHolder(r.w.cfg, r.node, r.incarnation, 1, r.floors, r.clock())
	r.session, r.open, r.stamps = false, nil, make(map[lease.LimitID]lease.Stamp)
	r.answered = time.Now()
	r.link.close()
	r.link = nil
}

func (r *raftRelay) run() {
	for {
		r.step()
		select {
		case <-time.After(time.Duration(r.w.intN(150)+100) * time.Millisecond):
		case <-r.gone:
			return
		}
	}
}

func (r *raftRelay) step() {
	r.mu.Lock()
	defer r.mu.Unlock()
	now := r.clock()
	switch since := time.Since(r.answered); {
	case since > r.w.cfg.TTL/2 || !r.session && since > 3*time.Second:
		r.to, r.session, r.answered = r.w.intN(len(r.w.members())), false, time.Now()
	case !r.session && time.Since(r.asked) > time.Second:
		r.asked = time.Now()
		r.say(wire.EncodeLeaseHello(r.holder.Hello(), r.floors))
	case r.session && now >= r.holder.ReportAt(r.w.intN(1000)):
		report := r.holder.Report(now)
		r.say(wire.EncodeLeaseReport(&report))
	}
	if s := r.w.members()[r.to]; r.link == nil || r.link.to != s || r.link.ended() {
		r.dial(s)
	}
	r.work(now)
	if r.holder.FloorsUnsaved() {
		floors, version := r.holder.SaveFloors()
		r.floors = floors
		r.holder.FloorsSaved(version)
	}
	r.check(now)
}

// delay is how long a message takes.
func (w *raftWorld) delay() time.Duration {
	if w.intN(20) == 0 {
		return time.Duration(w.intN(4_000)) * time.Millisecond
	}
	return time.Duration(w.intN(30)+1) * time.Millisecond
}

// say has the server at the other end of the link hear something. r.mu is held.
func (r *raftRelay) say(m proto.Message) {
	if r.link == nil {
		return
	}
	select {
	case r.link.out <- m:
	default:
	}
}

// work starts what may start: of the rate everything, of the slots all it gets.
func (r *raftRelay) work(now lease.Instant) {
	rate, slots := r.holder.Rights(1, lease.Rate, time.Second), r.holder.Rights(2, lease.Slots, 0)
	r.holder.SetDemand(rate, 20_000)
	r.holder.SetDemand(slots, 10)
	for {
		if ok, _ := rate.Take(now, 1); !ok {
			break
		}
		r.w.event()
	}
	soon, atOnce := slots.Excess(now)
	for i := 0; i < len(r.open); {
		if atOnce > 0 || soon > 0 && time.Until(r.open[i]) < time.Second || time.Until(r.open[i]) <= 0 {
			r.open = append(r.open[:i], r.open[i+1:]...)
			slots.Close()
			soon, atOnce = soon-1, atOnce-1
			continue
		}
		i++
	}
	for slots.Open(now) {
		r.open = append(r.open, time.Now().Add(time.Duration(r.w.intN(10_000))*time.Millisecond))
	}
}

// event holds an event of the rate against limit × time + burst.
func (w *raftWorld) event() {
	w.mu.Lock()
	defer w.mu.Unlock()
	l, now := w.limits[0], time.Since(w.began)
	b := w.windows[l.ID]
	if b == nil {
		b = &window{level: float64(l.Burst)}
		w.windows[l.ID] = b
	}
	b.level = min(b.level+float64(now-b.at)/float64(l.Per)*float64(l.Max)/lease.Milli*clockTolerance, float64(l.Burst)) - 1
	b.at = now
	w.started[l.ID]++
	if b.level < -0.01 && w.failed == "" {
		w.failed = "I2: more events than limit × time + burst"
	}
}

// check holds the relay against I2 and I3.
func (r *raftRelay) check(now lease.Instant) {
	for i := range r.w.limits {
		l := &r.w.limits[i]
		rights := r.holder.Rights(l.ID, l.Kind, l.Per)
		has, h := rights.Usable(now), r.w.newest(r.node, l.ID)
		if has.Amount > h.Ceiling.Amount+h.Floor.Amount || has.Burst > h.Ceiling.Burst+h.Floor.Burst {
			r.w.fail("I2: relay %d may use %v of limit %d by its own word, the table says %v and %v", r.node, has, l.ID, h.Ceiling, h.Floor)
		}
		if stamp := rights.Stamp(); stamp.Compare(r.stamps[l.ID]) < 0 {
			r.w.fail("I3: relay %d went from stamp %v of limit %d back to %v", r.node, r.stamps[l.ID], l.ID, stamp)
		} else {
			r.stamps[l.ID] = stamp
		}
	}
}
