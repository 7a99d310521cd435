package queue

import (
	"github.com/relais-mta/relais/relay/store"
	"github.com/relais-mta/relais/shared/fault"
)

// startCount is what waits at the start, and what the table of work queues said then.
type startCount struct {
	snap   *store.Snapshot
	floors map[Number]int64 // of every work queue that the start knows
	waits  map[Number]int64 // waiting keys
	first  map[Number]int64 // due time of the first of them
	all    int64
}

// beginCount returns what there is to count at the start, and forgets what was
// counted of it already: the reports that recovery made are in it. Call with the
// lock held, and no commit under way.
func (q *Queue) beginCount() *startCount {
	q.waiting, q.counted = 0, false
	clear(q.heldBy)
	c := &startCount{floors: make(map[Number]int64, len(q.byNumber)), waits: make(map[Number]int64), first: make(map[Number]int64)}
	for n, wq := range q.byNumber {
		wq.waits = 0
		c.floors[n] = wq.end.due // its stored floor: nothing was read yet
	}
	c.snap = q.st.Snapshot()
	return c
}

// countWaiting counts what waited at start, in the background, and finds the mail
// that a damaged table of work queues hides from the start.
func (q *Queue) countWaiting(c *startCount) {
	defer q.done.Done()
	defer c.snap.Close()
	stopped := false
	err := c.snap.Iterate([]byte{store.SpaceWaiting}, nil, true, func(k, _ []byte) bool {
		if number, due, _, _, ok := store.ParseWaitingKey(k); ok {
			if c.waits[Number(number)]++; c.waits[Number(number)] == 1 {
				c.first[Number(number)] = due
			}
		}
		c.all++
		if c.all%4096 == 0 {
			select {
			case <-q.stop:
				stopped = true
				return false
			default:
			}
		}
		return true
	})
	if err != nil || stopped {
		return
	}
	held, err := countHeld(c.snap)
	if err != nil {
		return
	}
	q.findHidden(c)
	q.mu.Lock()
	for rule, n := range held {
		if q.heldBy[rule] += n; q.rules[rule] == nil && q.heldBy[rule] == 0 {
			delete(q.heldBy, rule) // it was released meanwhile
		}
	}
	for number, n := range c.waits {
		if wq := q.byNumber[number]; wq != nil {
			wq.waits += n
		}
	}
	q.base, q.counted = c.all, true
	q.mu.Unlock()
}

// findHidden brings mail into the windows that a start does not see: that of work
// queues without a record, and that before a floor which is too high.
func (q *Queue) findHidden(c *startCount) {
	for n, due := range c.first {
		floor, known := c.floors[n]
		switch {
		case !known:
			q.adoptMissing(c.snap, n)
		case due < floor:
			q.badRecord(FloorHigh, "the floor of a work queue, before which mail waits", "queue", n)
			q.mu.Lock()
			if wq := q.byNumber[n]; wq != nil {
				q.rewind(wq, due)
			}
			q.mu.Unlock()
		}
	}
}

// adoptMissing is adopt for a work queue of which there is mail and no record.
func (q *Queue) adoptMissing(snap *store.Snapshot, n Number) {
	if _, err := snap.Get(store.AppendQueueKey(nil, uint32(n)), nil); !fault.Is(err, fault.NotFound) {
		return // it is damaged, and none of its mail could be read
	}
	q.badRecord(QueueMissing, "that of a work queue is missing; its mail says what it stands for", "queue", n)
	if err := q.adopt(snap, n); err != nil {
		q.log.Error("the mail of a work queue without a record could not be read", "queue", n, "error", err)
		return
	}
	q.mu.Lock()
	wq := q.byNumber[n]
	if wq != nil {
		q.wantPage(wq)
	}
	q.mu.Unlock()
}

// rewind has a work queue read from the disk again, from a due time on. What is in its
// window is on disk as well. Call with the lock held.
func (q *Queue) rewind(wq *workQueue, due int64) {
	wq.win.shrink(0, func(it item) {
		q.inMemory--
		q.forget(it)
	})
	wq.complete, wq.end, wq.floor = false, pos{due: due}, min(wq.floor, floorBefore(due))
	q.wantPage(wq)
}
