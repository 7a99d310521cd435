package queue

import (
	"github.com/relais-mta/relais/relay"
	"github.com/relais-mta/relais/relay/store"
)

// settlePlaces compares the waiting keys by which work was taken with what the
// recipients' states ask for. A key that nobody asks for delivers nothing: its
// recipient waits under another one, is held, or has its end. A key in the wrong work
// queue, or one of a queue whose record is wrong, would take the mail to the hosts of
// another domain: it is moved. It reports whether anything is left of the work. Call
// without the lock, with the envelope known.
func (q *Queue) settlePlaces(w *Work, read *readMessage) (left bool) {
	q.mu.Lock()
	stale := q.split(w, func(i int) bool { return !q.asksFor(w, i, read) })
	wrong := q.split(w, func(i int) bool { return keyOf(w.msg.env, int(w.Recipients[i].Index)) != w.Key })
	left = len(w.Recipients) > 0
	q.mu.Unlock()
	if stale != nil {
		q.badRecord(WaitingExtra, "a waiting key that nobody asks for", "message", w.msg.id, "queue", w.Queue)
		q.setAside(stale)
	}
	if wrong != nil {
		q.moveKeys(wrong)
	}
	if !left {
		q.notify(w.Queue)
	}
	return left
}

// asksFor reports whether a recipient's state asks for its waiting key. Call with the
// lock held.
func (q *Queue) asksFor(w *Work, i int, read *readMessage) bool {
	index := w.Recipients[i].Index
	if int(index) >= w.msg.total {
		return false
	}
	due := w.msg.firstDue
	if s, stored := read.states[index]; stored {
		if s.State != relay.StateWaiting {
			return false
		}
		due = store.Milliseconds(s.Next)
	}
	return due == w.held[i].due
}

// split moves recipients of work into work of its own; nil: there are none. What is
// left may be nothing, and has ended then. Call with the lock held.
func (q *Queue) split(w *Work, part func(i int) bool) *Work {
	other := &Work{Queue: w.Queue, Key: w.Key, Env: w.Env, msg: w.msg, wq: w.wq}
	n := 0
	for i := range w.Recipients {
		if part(i) {
			other.Recipients, other.held = append(other.Recipients, w.Recipients[i]), append(other.held, w.held[i])
			continue
		}
		w.Recipients[n], w.held[n] = w.Recipients[i], w.held[i]
		n++
	}
	if len(other.Recipients) == 0 {
		return nil
	}
	w.Recipients, w.held = w.Recipients[:n], w.held[:n]
	q.flights[other] = struct{}{}
	if n == 0 {
		delete(q.flights, w)
		w.state = workEnded
	}
	return other
}

// moveKeys puts the waiting keys of work into the work queue that their recipients
// belong to, and ends it.
func (q *Queue) moveKeys(w *Work) {
	q.badRecord(WaitingExtra, "a waiting key in another work queue, from which it is moved", "message", w.msg.id, "queue", w.Queue)
	sc := scratchPool.Get().(*scratch)
	b := q.st.NewBatch()
	q.mu.Lock()
	if q.begin() != nil {
		q.mu.Unlock()
		scratchPool.Put(sc)
		b.Abandon()
		q.setAside(w)
		return
	}
	to := make([]*workQueue, len(w.Recipients))
	for i, r := range w.Recipients {
		due := w.held[i].due
		to[i] = q.intern(b, keyOf(w.msg.env, int(r.Index)), due, sc)
		to[i].pins++
		b.Delete(store.AppendWaitingKey(nil, uint32(w.Queue), due, w.msg.id, r.Index))
		b.Set(store.AppendWaitingKey(nil, uint32(to[i].number), due, w.msg.id, r.Index), nil)
	}
	q.mu.Unlock()
	scratchPool.Put(sc)
	q.st.CommitAsync(b, func(err error) {
		if err != nil {
			q.log.Error("mail could not be moved to its work queue; the next start tries again", "message", w.msg.id, "error", err)
		}
		q.keysMoved(w, to, err)
		q.pending.Done()
	})
}

// keysMoved books moveKeys when its commit has ended.
func (q *Queue) keysMoved(w *Work, to []*workQueue, err error) {
	q.mu.Lock()
	for _, wq := range to {
		wq.pins--
	}
	if err != nil {
		q.mu.Unlock()
		q.setAside(w)
		return
	}
	q.disown(w)
	for i, r := range w.Recipients {
		p := pos{w.held[i].due, w.msg.id, r.Index}
		to[i].stored = true
		w.wq.waits--
		q.keyGone(w.wq, p)
		if to[i].win.find(p) != nil {
			q.waiting-- // it had both keys, and one is left
			continue
		}
		to[i].waits++
		q.enqueue(to[i], item{pos: p})
	}
	q.checkDeadline(w.msg)
	q.unref(w.msg, len(w.Recipients))
	q.mu.Unlock()
	for _, wq := range to {
		q.notify(wq.number)
	}
}
