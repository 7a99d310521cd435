package handover

import (
	"sync"
	"time"

	"github.com/relais-mta/relais/relay/queue"
	"github.com/relais-mta/relais/shared/ids"
)

// backlog knows which work queues may hold mail for other relays. That a queue
// is in it proves nothing, and one that is missed is found by the next scan.
type backlog struct {
	mu       sync.Mutex
	byPool   map[ids.Pool]map[queue.Number]struct{}
	notified map[queue.Number]struct{}
	size     int
	held     bool                      // held mail is to be looked for
	passed   map[ids.Message]time.Time // messages to be left alone until then
}

func (b *backlog) init() {
	b.byPool = make(map[ids.Pool]map[queue.Number]struct{})
	b.notified = make(map[queue.Number]struct{})
	b.passed = make(map[ids.Message]time.Time)
}

func (b *backlog) fresh(n queue.Number) {
	b.mu.Lock()
	defer b.mu.Unlock()
	if len(b.notified) < maxBacklog {
		b.notified[n] = struct{}{}
	}
}

func (b *backlog) takeFresh() []queue.Number {
	b.mu.Lock()
	defer b.mu.Unlock()
	out := make([]queue.Number, 0, len(b.notified))
	for n := range b.notified {
		out = append(out, n)
	}
	clear(b.notified)
	return out
}

func (b *backlog) add(pool ids.Pool, n queue.Number) {
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.byPool[pool] == nil {
		b.byPool[pool] = make(map[queue.Number]struct{})
	}
	if _, there := b.byPool[pool][n]; !there && b.size < maxBacklog {
		b.byPool[pool][n] = struct{}{}
		b.size++
	}
}

func (b *backlog) clear() {
	b.mu.Lock()
	defer b.mu.Unlock()
	clear(b.byPool)
	clear(b.notified)
	b.size, b.held = 0, false
}

func (b *backlog) has(pool ids.Pool) bool {
	b.mu.Lock()
	defer b.mu.Unlock()
	return len(b.byPool[pool]) > 0
}

func (b *backlog) lookAtHeld() {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.held = true
}

func (b *backlog) heldDue() bool {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.held
}

// entry is a work queue of a pool.
type entry struct {
	pool   ids.Pool
	number queue.Number
}

// take takes some queues of pools that may concern the caller out of the
// backlog, and whether held mail is to be looked for.
func (b *backlog) take(may func(ids.Pool) bool) (out []entry, held bool) {
	b.mu.Lock()
	defer b.mu.Unlock()
	for pool, set := range b.byPool {
		if !may(pool) {
			continue
		}
		for n := range set {
			if len(out) == maxQueuesAtOnce {
				return out, false
			}
			delete(set, n)
			b.size--
			out = append(out, entry{pool, n})
		}
		delete(b.byPool, pool)
	}
	held, b.held = b.held, false
	return out, held
}

// pass leaves a message alone for a while.
func (b *backlog) pass(id ids.Message, until time.Time) {
	b.mu.Lock()
	defer b.mu.Unlock()
	if len(b.passed) < maxPassedOver {
		b.passed[id] = until
	}
}

// passes reports whether a message is to be left alone.
func (b *backlog) passes(id ids.Message, now time.Time) bool {
	b.mu.Lock()
	defer b.mu.Unlock()
	until, ok := b.passed[id]
	if ok && !now.Before(until) {
		delete(b.passed, id)
		ok = false
	}
	return ok
}

// prune forgets messages that need not be left alone any more, when there are
// many.
func (b *backlog) prune(now time.Time) {
	b.mu.Lock()
	defer b.mu.Unlock()
	if len(b.passed) < maxPassedOver/2 {
		return
	}
	for id, until := range b.passed {
		if !now.Before(until) {
			delete(b.passed, id)
		}
	}
}

// rate counts recipients and how many there were a second of late.
type rate struct {
	mu      sync.Mutex
	total   uint64
	seconds [int(rateWindow/time.Second) + 1]struct {
		at int64
		n  uint64
	}
}

func (r *rate) add(now time.Time, n int) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.total += uint64(n)
	at := now.Unix()
	slot := &r.seconds[int(at%int64(len(r.seconds)))]
	if slot.at != at {
		slot.at, slot.n = at, 0
	}
	slot.n += uint64(n)
}

// read returns the total and the recipients a second over the last whole
// seconds of the window.
func (r *rate) read(now time.Time) (total, perSecond uint64) {
	r.mu.Lock()
	defer r.mu.Unlock()
	var n uint64
	window := int64(rateWindow / time.Second)
	for _, s := range r.seconds {
		if age := now.Unix() - s.at; age >= 1 && age <= window {
			n += s.n
		}
	}
	return r.total, n / uint64(window)
}
