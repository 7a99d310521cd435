package queue

import "time"

// Head is what a scheduler needs to know of a work queue.
type Head struct {
	Key     Key
	Due     time.Time // of the earliest waiting recipient; zero: nothing waits, or Notify will tell
	Waiting int       // recipients in memory, a lower bound of those that wait
}

// Head returns the head of a queue, and asks for it to be read from disk if it
// is only there. False: the number stands for no queue (any more).
func (q *Queue) Head(n Number) (Head, bool) {
	q.mu.Lock()
	defer q.mu.Unlock()
	wq := q.byNumber[n]
	if wq == nil {
		return Head{}, false
	}
	h := Head{Key: wq.key, Waiting: wq.win.len()}
	if h.Waiting == 0 {
		q.wantPage(wq)
		return h, true
	}
	h.Due = time.UnixMilli(max(wq.win.first().due, wq.blockedTo))
	return h, true
}
