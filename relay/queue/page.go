package queue

import (
	"math"
	"slices"
	"time"

	"github.com/relais-mta/relais/relay/store"
	"github.com/relais-mta/relais/shared/policy"
)

// Paging settings.
const (
	maxPagesPerSnapshot = 256
	laterPages          = maxPagesPerSnapshot / 4 // of these for those that are not urgent, while such are wanted
	sweepInterval       = time.Minute
	idleBeforeDrop      = 10 * time.Minute
	maxDroppedAtOnce    = 1024
	readRetryMS         = 5_000 // milliseconds
)

// sizes bound what is in memory, in recipients or deadlines.
type sizes struct {
	minMemory    int // whatever policy says
	minPage      int // one read from disk
	maxPage      int
	maxDeadlines int
	floorEvery   int // keys deleted before a floor is stored again
	stepMessages int // read at once by an action on many messages; 0: maxStepMessages
}

var defaultSizes = sizes{minMemory: 1_000, minPage: 32, maxPage: 1024, maxDeadlines: 32_768, floorEvery: 4096}

// floorMargin is what a floor stays below the earliest place in use: longer
// than any commit takes, plus maxClockLag.
const floorMargin = 10 * time.Minute

func floorBefore(ms int64) int64 { return max(ms-floorMargin.Milliseconds(), 0) }

// memoryLimit is policy's bound on recipients in memory.
func (q *Queue) memoryLimit() int { return max(q.policy.MaxMemoryRecipients, q.sizes.minMemory) }

// pageSize is how many recipients one read brings in: small when there are
// many queues, so that all heads fit.
func (q *Queue) pageSize() int {
	return min(max(q.memoryLimit()/2/(len(q.byNumber)+1), q.sizes.minPage), q.sizes.maxPage)
}

// wantPage asks for the next page of a queue that has more on disk. Call with
// the lock held.
func (q *Queue) wantPage(wq *workQueue) {
	if wq.complete || wq.wanted {
		return
	}
	wq.wanted = true
	if wq == q.deadlines || wq.key.Kind == policy.Transactional {
		q.urgentPages = append(q.urgentPages, wq)
	} else {
		q.pageList = append(q.pageList, wq)
	}
	select {
	case q.pageWake <- struct{}{}:
	default:
	}
}

// pageLoop reads pages, and drops queues that stayed empty.
func (q *Queue) pageLoop() {
	defer q.done.Done()
	ticker := time.NewTicker(sweepInterval)
	defer ticker.Stop()
	for {
		select {
		case <-q.stop:
			return
		case <-ticker.C:
			q.dropIdle()
		case <-q.pageWake:
			for q.readPages() {
				select {
				case <-q.stop:
					return
				default:
				}
			}
		}
	}
}

// readPages reads one page for each of the queues that asked. It reports
// whether others still wait.
func (q *Queue) readPages() (more bool) {
	var list []*workQueue
	var snap *store.Snapshot
	size := 0
	// At this moment no commit is between its durability and its callback, so
	// the snapshot holds exactly what enqueue was told about: what comes later
	// goes into late and gone.
	err := q.st.Settled(func() {
		q.mu.Lock()
		defer q.mu.Unlock()
		list = q.nextPages()
		more = len(q.pageList)+len(q.urgentPages) > 0
		size = q.pageSize()
		for _, wq := range list {
			wq.paging, wq.pageEnd = true, wq.end
			wq.late, wq.gone = nil, nil
		}
		if len(list) > 0 {
			snap = q.st.Snapshot()
		}
	})
	if err != nil {
		// The store is closing or failed: nothing more will be delivered, and
		// those who asked ask again if it recovers.
		return false
	}
	if snap == nil {
		return false
	}
	defer snap.Close()
	for _, wq := range list {
		q.readPage(snap, wq, size)
	}
	return more
}

// nextPages takes the queues whose pages are read next from the lists: after a
// start, new transactional mail must not wait for the heads of a whole backlog.
// Call with the lock held.
func (q *Queue) nextPages() []*workQueue {
	first := min(len(q.urgentPages), maxPagesPerSnapshot-min(len(q.pageList), laterPages))
	rest := min(len(q.pageList), maxPagesPerSnapshot-first)
	list := append(slices.Clone(q.urgentPages[:first]), q.pageList[:rest]...)
	q.urgentPages = slices.Delete(q.urgentPages, 0, first)
	q.pageList = slices.Delete(q.pageList, 0, rest)
	return list
}

func (q *Queue) readPage(snap *store.Snapshot, wq *workQueue, size int) {
	var items []item
	complete := true
	var prefix, from []byte
	if wq == q.deadlines {
		size = max(q.sizes.maxDeadlines/2, 1)
		prefix = []byte{store.SpaceDeadline}
		from = store.AppendDeadlineKey(nil, wq.pageEnd.due, wq.pageEnd.id)
	} else {
		prefix = store.AppendWaitingPrefix(nil, uint32(wq.number))
		from = store.AppendWaitingKey(nil, uint32(wq.number), wq.pageEnd.due, wq.pageEnd.id, wq.pageEnd.index)
	}
	err := snap.Iterate(prefix, from, true, func(k, _ []byte) bool {
		if len(items) == size {
			complete = false
			return false
		}
		var p pos
		var ok bool
		if wq == q.deadlines {
			p.due, p.id, ok = store.ParseDeadlineKey(k)
		} else {
			_, p.due, p.id, p.index, ok = store.ParseWaitingKey(k)
		}
		if ok {
			items = append(items, item{pos: p})
		}
		return true
	})
	if err != nil {
		q.log.Error("cannot read a queue from disk; it is tried again", "queue", wq.number, "error", err)
		items, complete = nil, false
	}
	q.metrics.pages.Inc()
	q.mergePage(wq, items, complete, err != nil)
	q.notify(wq.number) // the deadline index has number 0
}

// mergePage joins what was read with what happened meanwhile.
func (q *Queue) mergePage(wq *workQueue, items []item, complete, failed bool) {
	q.mu.Lock()
	defer q.mu.Unlock()
	late, gone := wq.late, wq.gone
	wq.paging, wq.wanted, wq.late, wq.gone = false, false, nil, nil
	if failed || wq.complete || wq.end != wq.pageEnd {
		// The window was cut while the page was read: it covers less now, and
		// all of this is on disk.
		if failed {
			wq.blockedTo = q.nowMS() + readRetryMS
		}
		return
	}
	wq.complete = complete
	if !complete {
		wq.end = items[len(items)-1].next()
	}
	for _, it := range items {
		if _, left := gone[it.pos]; left {
			continue
		}
		if wq == q.deadlines {
			wq.win.insert(it)
			continue
		}
		if m := q.live[it.id]; m != nil && m.isAloft(it.index) {
			continue // taken before the window was cut to end in front of it
		}
		q.enqueue(wq, it)
	}
	for _, it := range late {
		// What was given back while the page was read is in the page as well.
		covered := wq.complete || it.less(wq.end)
		if covered && wq.win.insert(it) && wq != q.deadlines {
			q.inMemory++
		}
	}
	q.trim()
}

// keyGone notes that a recipient's waiting key was deleted, for a page that is
// being read and may hold it. Call with the lock held.
func (q *Queue) keyGone(wq *workQueue, p pos) {
	if !wq.paging || p.less(wq.pageEnd) {
		return
	}
	if wq.gone == nil {
		wq.gone = make(map[pos]struct{})
	}
	wq.gone[p] = struct{}{}
}

// leave takes a recipient that stops waiting, without having been taken from
// the window's front, out of memory. Call with the lock held.
func (q *Queue) leave(wq *workQueue, p pos) {
	if it, ok := wq.win.remove(p); ok {
		if wq != q.deadlines {
			q.inMemory--
			q.forget(it)
		}
		return
	}
	at := slices.IndexFunc(wq.late, func(it item) bool { return it.pos == p })
	if at >= 0 {
		wq.late = slices.Delete(wq.late, at, at+1)
		return
	}
	q.keyGone(wq, p)
}

// trim cuts the longest windows when memory holds more recipients than policy
// allows. What is cut is on disk already. Call with the lock held.
func (q *Queue) trim() {
	limit := q.memoryLimit()
	if q.inMemory <= max(limit, q.trimAbove) {
		return
	}
	lengths := make([]int, 0, len(q.byNumber))
	for _, wq := range q.byNumber {
		if n := wq.win.len(); n > 0 {
			lengths = append(lengths, n)
		}
	}
	keep := fairLength(lengths, limit*3/4)
	for _, wq := range q.byNumber {
		end, dropped := wq.win.shrink(keep, func(it item) {
			q.inMemory--
			q.forget(it)
		})
		if dropped {
			wq.complete, wq.end = false, end
		}
	}
	q.trimAbove = 0
	if q.inMemory > limit*3/4 {
		// Every queue keeps its head, and there are more queues than that:
		// looking at all of them again for each further head would help nothing.
		q.trimAbove = q.inMemory + q.inMemory/4
	}
	q.metrics.trims.Inc()
}

// fairLength is the length at which windows must be cut so that together they
// hold at most total; at least 1, so that every queue keeps its head.
func fairLength(lengths []int, total int) int {
	slices.Sort(lengths)
	left := total
	for i, n := range lengths {
		share := left / (len(lengths) - i)
		if n > share {
			return max(share, 1)
		}
		left -= n
	}
	return total
}

// floorOf is a due time before which a queue certainly has no waiting key: not
// in the window, not on disk, not in flight, and, because of the margin, not
// in a commit under way either. Reading the queue after a restart begins there
// and does not wade through what was deleted. Call with the lock held.
func (q *Queue) floorOf(wq *workQueue) int64 {
	earliest := q.nowMS()
	if wq.win.len() > 0 {
		earliest = min(earliest, wq.win.first().due)
	}
	if !wq.complete {
		earliest = min(earliest, wq.end.due)
	}
	if wq.aside > 0 {
		earliest = min(earliest, wq.aside)
	}
	if wq == q.deadlines {
		for _, due := range q.leaving {
			earliest = min(earliest, due)
		}
	}
	for w := range q.flights {
		switch {
		case wq != q.deadlines:
			earliest = min(earliest, w.earliestFrom(wq))
		case w.Env == nil:
			return wq.floor // it is being read: its deadline is not known yet
		default:
			earliest = min(earliest, store.Milliseconds(w.Env.ExpiresAt))
		}
	}
	return max(floorBefore(earliest), wq.floor)
}

// earliestFrom is the earliest waiting key that the work holds of a queue.
func (w *Work) earliestFrom(wq *workQueue) int64 {
	earliest := int64(math.MaxInt64)
	if w.wq != wq {
		return earliest
	}
	for _, h := range w.held {
		if h.waits {
			earliest = min(earliest, h.due)
		}
	}
	return earliest
}

// storeFloor adds a queue's floor to a batch now and then. Call with the lock
// held.
func (q *Queue) storeFloor(b *store.Batch, wq *workQueue, sc *scratch) {
	if wq.removed < q.sizes.floorEvery {
		return
	}
	wq.removed = 0
	wq.floor = q.floorOf(wq)
	q.putFloor(b, wq, sc)
}

// lowerFloor makes a floor right again when the clock went back and work is
// due before it. Call with the lock held.
func (q *Queue) lowerFloor(b *store.Batch, wq *workQueue, due int64, sc *scratch) {
	if due >= wq.floor {
		return
	}
	wq.floor = floorBefore(due)
	wq.removed = q.sizes.floorEvery // a floor computed before may be stored after this one: store it again soon
	q.putFloor(b, wq, sc)
}

// putFloor writes a queue's record.
func (q *Queue) putFloor(b *store.Batch, wq *workQueue, sc *scratch) {
	if wq == q.deadlines {
		sc.value = appendFloor(sc.value[:0], wq.floor)
		b.Set(store.KeyDeadlines, sc.value)
		return
	}
	sc.key = store.AppendQueueKey(sc.key[:0], uint32(wq.number))
	sc.value = appendQueue(sc.value[:0], &wq.key, wq.floor)
	b.Set(sc.key, sc.value)
}

// dropIdle forgets queues that have been empty for a while, with their
// records, so that the table does not grow with every domain ever seen.
func (q *Queue) dropIdle() {
	now := q.nowMS()
	var dropped []Number
	q.mu.Lock()
	b := q.st.NewBatch()
	for n, wq := range q.byNumber {
		if !wq.complete || wq.win.len() > 0 || wq.inFlight > 0 || wq.pins > 0 || wq.aside > 0 {
			wq.emptyAt = 0
			continue
		}
		if wq.emptyAt == 0 {
			wq.emptyAt = now
		}
		if now-wq.emptyAt < idleBeforeDrop.Milliseconds() || len(dropped) == maxDroppedAtOnce {
			continue
		}
		delete(q.byNumber, n)
		delete(q.byKey, wq.key)
		b.Delete(store.AppendQueueKey(nil, uint32(n)))
		dropped = append(dropped, n)
	}
	if len(dropped) == 0 || q.begin() != nil {
		b.Abandon()
		q.mu.Unlock()
		return
	}
	// Submitted with the lock held: a queue of the same key that comes back
	// has another number and its record is written later.
	q.st.CommitAsync(b, func(err error) {
		if err != nil {
			q.log.Warn("cannot remove the records of empty queues; they come back at the next start", "error", err)
		}
		q.pending.Done()
	})
	q.mu.Unlock()
	if q.cfg.Dropped != nil {
		for _, n := range dropped {
			q.cfg.Dropped(n)
		}
	}
}
