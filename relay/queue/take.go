package queue

import (
	"slices"
	"time"

	"github.com/relais-mta/relais/relay"
	"github.com/relais-mta/relais/relay/store"
	"github.com/relais-mta/relais/shared/fault"
	"github.com/relais-mta/relais/shared/ids"
)

// Take returns the due head message of a queue with at most maxRecipients of
// its recipients that became due together; they are the caller's until Finish
// or Return. False: nothing is due, or the head is being read from disk and
// Notify will tell. Take reads nothing from disk, so it may be called with a
// lock held; what memory does not have is left to Load.
func (q *Queue) Take(n Number, now time.Time, maxRecipients int) (*Work, bool) {
	q.mu.Lock()
	defer q.mu.Unlock()
	wq := q.byNumber[n]
	if wq == nil || q.closed || wq.blockedTo > now.UnixMilli() {
		return nil, false
	}
	var w *Work
	needsState := false
	for w == nil {
		if wq.win.len() == 0 {
			q.wantPage(wq)
			return nil, false
		}
		if wq.win.first().due > now.UnixMilli() {
			return nil, false
		}
		w, needsState = q.takeHead(wq, max(maxRecipients, 1))
	}
	if !wq.complete && wq.win.len() < q.pageSize()/4 {
		q.wantPage(wq)
	}
	m := w.msg
	if m.env != nil && !needsState && (m.total == 1 || m.known) {
		w.Env = m.env
	}
	return w, true
}

// takeHead moves the recipients of the head message from the window into the
// caller's hands; nil: they are in other hands. Call with the lock held.
func (q *Queue) takeHead(wq *workQueue, most int) (w *Work, needsState bool) {
	head := wq.win.first().pos
	w = &Work{Queue: wq.number, Key: wq.key, wq: wq}
	for len(w.Recipients) < most && wq.win.len() > 0 {
		next := wq.win.first()
		if next.id != head.id || next.due != head.due {
			break
		}
		it := wq.win.popFirst()
		q.inMemory--
		if m := q.live[it.id]; m != nil && m.isAloft(it.index) {
			// Two keys for one recipient: whoever has it goes by the other.
			q.badRecord(WaitingExtra, "a second waiting key of a recipient", "message", it.id, "queue", wq.number)
			q.passOver(wq, it.due)
			q.forget(it)
			continue
		}
		switch {
		case it.msg == nil && w.msg == nil:
			w.msg = q.messageFor(it.id)
		case it.msg == nil:
			w.msg.refs++
		default:
			w.msg = it.msg
		}
		w.Recipients = append(w.Recipients, WorkRecipient{Index: it.index, State: relay.RecipientState{State: relay.StateWaiting, Next: time.UnixMilli(it.due)}})
		w.held = append(w.held, heldItem{due: it.due, waits: true, stored: !it.fresh})
		needsState = needsState || !it.fresh
	}
	if len(w.Recipients) == 0 {
		return nil, false
	}
	q.own(w)
	return w, needsState
}

// own books work as the caller's. Call with the lock held.
func (q *Queue) own(w *Work) {
	n := len(w.Recipients)
	m := w.msg
	for i := range w.Recipients {
		if !m.setFlying(w.Recipients[i].Index, true) {
			_ = q.violation("a recipient was taken twice", "message", m.id, "index", w.Recipients[i].Index)
		}
	}
	m.flying += n
	m.version++
	q.fresh.remove(m)
	w.wq.inFlight += n
	q.inFlight += n
	q.flights[w] = struct{}{}
}

// disown ends the caller's ownership. Call with the lock held.
func (q *Queue) disown(w *Work) {
	n := len(w.Recipients)
	for i := range w.Recipients {
		w.msg.setFlying(w.Recipients[i].Index, false)
	}
	w.msg.flying -= n
	w.msg.version++
	w.wq.inFlight -= n
	q.inFlight -= n
	delete(q.flights, w)
	w.state = workEnded
	if m := w.msg; m.flying == 0 && m.refs > n && m.env != nil {
		q.fresh.add(m, q.nowMS()) // other recipients wait with it
	}
}

// setFlying records whether a recipient is in a caller's hands and reports
// whether that is a change.
func (m *message) setFlying(index uint16, on bool) bool {
	at := slices.Index(m.aloft, index)
	switch {
	case on == (at >= 0):
		return false
	case on:
		m.aloft = append(m.aloft, index)
	default:
		last := len(m.aloft) - 1
		m.aloft[at] = m.aloft[last]
		m.aloft = m.aloft[:last]
	}
	return true
}

// Load reads from disk what memory did not have about taken work: fresh mail
// costs no read, other mail costs two. False: the work has ended, because its
// message does not exist, is damaged or cannot be read; its queue rests in the last
// case, and Notify tells either way.
func (q *Queue) Load(w *Work) bool {
	if w.Loaded() {
		return true
	}
	m := w.msg
	q.mu.Lock()
	env := m.env // nil: to be read as well
	q.mu.Unlock()
	read, err := q.readMessage(m.id, env)
	if fault.Is(err, fault.NotFound) {
		q.dropOrphans(w)
		return false
	}
	if fault.Is(err, fault.Invalid) {
		q.unreadable(m.id, err)
		q.setAside(w)
		return false
	}
	if err != nil {
		q.log.Error("cannot read a message; its queue rests", "message", m.id, "error", err)
		q.mu.Lock()
		w.wq.blockedTo = q.nowMS() + readRetryMS
		q.mu.Unlock()
		q.giveBack(w)
		q.notify(w.Queue)
		return false
	}
	q.mu.Lock()
	q.learn(m, read)
	q.mu.Unlock()
	if !q.settlePlaces(w, &read) {
		return false
	}
	q.mu.Lock()
	defer q.mu.Unlock()
	w.Env = m.env
	for i := range w.Recipients {
		r := &w.Recipients[i]
		s, stored := read.states[r.Index]
		w.held[i].stored = stored
		if stored {
			r.State = s
		}
	}
	return true
}

// readMessage is what the disk says about a message.
type readMessage struct {
	env      *relay.Envelope
	firstDue int64
	states   map[uint16]relay.RecipientState
}

// state is what the disk says about a recipient, or what it means that it says nothing.
func (r *readMessage) state(index uint16) relay.RecipientState {
	if s, stored := r.states[index]; stored {
		return s
	}
	return relay.RecipientState{State: relay.StateWaiting, Next: time.UnixMilli(r.firstDue)}
}

// readMessage reads a message's envelope, unless it is known, and the states
// of its recipients. A message that does not exist is a NotFound fault, one that is
// damaged or set aside an Invalid one.
func (q *Queue) readMessage(id ids.Message, env *relay.Envelope) (r readMessage, err error) {
	sc := scratchPool.Get().(*scratch)
	defer scratchPool.Put(sc)
	if err := q.asideFault(id); err != nil {
		return r, err
	}
	snap := q.st.Snapshot()
	defer snap.Close()
	r.env = env
	if env == nil {
		sc.key = store.AppendMessageKey(sc.key[:0], id)
		if sc.value, err = snap.Get(sc.key, sc.value[:0]); err != nil {
			return r, err
		}
		if r.env, r.firstDue, err = parseEnvelope(id, sc.value); err != nil {
			return r, err
		}
	}
	r.states = make(map[uint16]relay.RecipientState)
	if len(r.env.Recipients) == 1 {
		sc.key = store.AppendStateKey(sc.key[:0], id, 0)
		sc.value, err = snap.Get(sc.key, sc.value[:0])
		if fault.Is(err, fault.NotFound) {
			return r, nil
		}
		if err == nil {
			r.states[0], err = parseState(sc.value)
		}
		return r, err
	}
	var inner error
	err = snap.Iterate(store.AppendStatePrefix(sc.key[:0], id), nil, false, func(k, v []byte) bool {
		_, index, ok := store.ParseStateKey(k)
		if !ok || int(index) >= len(r.env.Recipients) {
			inner = fault.New(fault.Invalid, "queue.readMessage", "message %s has a state for recipient %d, which it does not have", id, index)
			return false
		}
		r.states[index], inner = parseState(v)
		return inner == nil
	})
	if err == nil {
		err = inner
	}
	return r, err
}

// learn puts what was read into memory. What became final since the read is
// there already and stays. Call with the lock held.
func (q *Queue) learn(m *message, r readMessage) {
	if m.env == nil {
		m.setEnvelope(r.env, r.firstDue)
	}
	for index, s := range r.states {
		if s.State.Final() {
			m.setFinal(index)
		}
	}
	m.known = true
}

// setAside ends work of a damaged message and leaves its recipients in no window,
// where they would stand before all others. Their keys stay on disk for the repair.
func (q *Queue) setAside(w *Work) {
	q.mu.Lock()
	q.disown(w)
	for _, h := range w.held {
		q.passOver(w.wq, h.due)
	}
	q.unref(w.msg, len(w.Recipients))
	q.mu.Unlock()
	q.notify(w.Queue)
}

// passOver notes the place of a key that is on disk and in no window: the floor stays
// below it. Call with the lock held.
func (q *Queue) passOver(wq *workQueue, due int64) {
	if wq.aside == 0 || due < wq.aside {
		wq.aside = due
	}
}

// dropOrphans removes waiting keys whose message does not exist.
func (q *Queue) dropOrphans(w *Work) {
	q.log.Error("a recipient waits whose message does not exist; it is removed", "message", w.msg.id, "queue", w.Queue)
	q.metrics.orphans.Inc()
	b := q.st.NewBatch()
	for i, r := range w.Recipients {
		b.Delete(store.AppendWaitingKey(nil, uint32(w.Queue), w.held[i].due, w.msg.id, r.Index))
	}
	q.mu.Lock()
	err := q.begin()
	q.mu.Unlock()
	if err != nil {
		b.Abandon()
		return
	}
	q.st.CommitAsync(b, func(err error) {
		q.mu.Lock()
		m := w.msg
		q.disown(w)
		q.unref(m, len(w.Recipients))
		if err == nil {
			q.waiting -= int64(len(w.Recipients))
			w.wq.waits -= int64(len(w.Recipients))
		}
		q.mu.Unlock()
		q.pending.Done()
		q.notify(w.Queue)
	})
}

// Return gives work back untouched, to be due as before. A journalled attempt
// is forgotten: nothing was sent.
func (q *Queue) Return(w *Work) {
	q.mu.Lock()
	if w.state != workTaken {
		q.mu.Unlock()
		_ = q.violation("work was given back twice", "message", w.msg.id)
		return
	}
	if w.journaled && q.begin() == nil {
		b := q.st.NewBatch()
		b.Delete(store.AppendAttemptKey(nil, w.msg.id, w.Recipients[0].Index))
		q.st.CommitAsync(b, func(err error) {
			if err != nil {
				q.log.Warn("cannot forget an attempt that did not happen; the next start finds it in doubt", "message", w.msg.id, "error", err)
			}
			q.pending.Done()
		})
	}
	q.mu.Unlock()
	q.giveBack(w)
	q.notify(w.Queue)
}

func (q *Queue) giveBack(w *Work) {
	q.mu.Lock()
	defer q.mu.Unlock()
	m := w.msg
	q.disown(w)
	for i := range w.Recipients {
		q.putBack(w, i)
	}
	q.checkDeadline(m)
	q.unref(m, len(w.Recipients))
}

// putBack lets one recipient of ended work wait as before. Call with the lock
// held.
func (q *Queue) putBack(w *Work, i int) {
	h := w.held[i]
	if !h.waits {
		return
	}
	it := item{pos: pos{h.due, w.msg.id, w.Recipients[i].Index}, fresh: !h.stored}
	if m := w.msg; it.fresh && m.env != nil && q.roomFor(m.env, it.due, q.nowMS()) {
		it.msg = m
		m.refs++
		if m.flying == 0 {
			q.fresh.add(m, q.nowMS())
		}
	}
	q.enqueue(w.wq, it)
}

// checkDeadline puts a message that came back after its deadline into the
// deadline window again. Call with the lock held.
func (q *Queue) checkDeadline(m *message) {
	if m.env != nil && !m.gone && store.Milliseconds(m.env.ExpiresAt) <= q.nowMS() {
		q.addDeadline(m.env)
		q.overdue.Store(true)
	}
}
