package queue

import (
	"time"

	"github.com/relais-mta/relais/relay"
	"github.com/relais-mta/relais/relay/store"
	"github.com/relais-mta/relais/shared/fault"
	"github.com/relais-mta/relais/shared/ids"
)

// maxRereads bounds how often a message is read again because its ownership
// changed meanwhile; then its deadline waits for the next call.
const maxRereads = 4

func (q *Queue) clockTrusted() bool { return q.cfg.ClockTrusted == nil || q.cfg.ClockTrusted() }

// NextDeadline returns the earliest deadline of any message that is not wholly
// in callers' hands. False: there is none, it is being read (Notify(0) tells),
// or the clock is not trusted.
func (q *Queue) NextDeadline() (time.Time, bool) {
	if !q.clockTrusted() {
		return time.Time{}, false
	}
	q.mu.Lock()
	defer q.mu.Unlock()
	d := q.deadlines
	if d.win.len() == 0 {
		q.wantPage(d)
		return time.Time{}, false
	}
	return time.UnixMilli(d.win.first().due), true
}

// PopExpired returns work for up to most messages past their deadline (RFC 5321
// section 4.5.4.1), whatever their state, a piece for each work queue or several.
// Recipients in callers' hands are left out: the engine gives them no further
// attempt, and what comes back waiting is found here again. The caller ends the
// work with Finish and StateExpired. Nothing expires while the clock is not
// trusted.
func (q *Queue) PopExpired(now time.Time, most int) []*Work {
	if !q.clockTrusted() {
		return nil
	}
	var out []*Work
	for range most {
		q.mu.Lock()
		d := q.deadlines
		if q.closed || d.win.len() == 0 || d.win.first().due > now.UnixMilli() {
			if !q.closed && d.win.len() == 0 {
				q.wantPage(d)
			}
			q.mu.Unlock()
			return out
		}
		it := d.win.popFirst()
		m := q.messageFor(it.id)
		q.leaving[it.id] = it.due
		q.mu.Unlock()
		out = append(out, q.expire(m, it)...)
	}
	return out
}

// expire takes the open recipients of one message. The caller's reference to
// the message is given back.
func (q *Queue) expire(m *message, deadline item) []*Work {
	for range maxRereads {
		q.mu.Lock()
		version, env := m.version, m.env
		q.mu.Unlock()
		read, err := q.readMessage(m.id, env)
		q.mu.Lock()
		if err != nil || m.version == version || m.gone || m.removing {
			delete(q.leaving, m.id)
		}
		switch {
		case m.gone || m.removing:
			q.unref(m, 1)
			q.mu.Unlock()
			return nil
		case fault.Is(err, fault.NotFound):
			q.unref(m, 1)
			q.mu.Unlock()
			q.dropDeadline(deadline)
			return nil
		case fault.Is(err, fault.Invalid):
			// In no window, where it would be read again and again: its key stays
			// on disk for the repair, and the floor below it.
			q.unreadable(m.id, err)
			q.passOver(q.deadlines, deadline.due)
			q.unref(m, 1)
			q.mu.Unlock()
			return nil
		case err != nil:
			q.log.Error("cannot read an expired message; it is tried again", "message", m.id, "error", err)
			deadline.due += readRetryMS
			q.deadlines.win.insert(deadline)
			q.unref(m, 1)
			q.mu.Unlock()
			return nil
		case m.version != version:
			q.mu.Unlock()
			continue
		}
		q.learn(m, read)
		work := q.takeOpen(m, read, nil)
		if len(work) == 0 {
			q.cleanUp(m)
		}
		q.unref(m, 1)
		q.mu.Unlock()
		return work
	}
	q.mu.Lock()
	delete(q.leaving, m.id)
	q.deadlines.win.insert(deadline)
	q.unref(m, 1)
	q.mu.Unlock()
	return nil
}

// takeOpen moves all recipients that nobody owns, that are not final and that
// are wanted (nil: all) into the caller's hands. A piece of work holds as many as
// one transaction can end, however long the replies are that they got. Call with
// the lock held.
func (q *Queue) takeOpen(m *message, read readMessage, wanted func(index uint16, s *relay.RecipientState) bool) []*Work {
	var out []*Work
	var byQueue map[*workQueue]*Work
	if m.total > 1 {
		byQueue = make(map[*workQueue]*Work)
	}
	for i := range m.env.Recipients {
		index := uint16(i)
		s, stored := read.states[index]
		if s.State.Final() || m.isFinal(index) || m.isAloft(index) {
			continue
		}
		if !stored {
			s = relay.RecipientState{State: relay.StateWaiting, Next: time.UnixMilli(m.firstDue)}
		}
		if wanted != nil && !wanted(index, &s) {
			continue
		}
		wq := q.queueFor(keyOf(m.env, i))
		h := heldItem{due: store.Milliseconds(s.Next), waits: s.State == relay.StateWaiting, stored: stored, hold: s.Held}
		if h.waits {
			q.leave(wq, pos{h.due, m.id, index})
		}
		var w *Work
		if n := len(out); n > 0 && out[n-1].wq == wq {
			w = out[n-1] // recipients of one domain stand together
		} else {
			w = byQueue[wq]
		}
		if w == nil || len(w.Recipients) == q.workLimit {
			w = &Work{Queue: wq.number, Key: wq.key, Env: m.env, msg: m, wq: wq}
			out = append(out, w)
			if m.total > 1 {
				byQueue[wq] = w
			}
		}
		w.Recipients = append(w.Recipients, WorkRecipient{Index: index, State: s})
		w.held = append(w.held, h)
		m.refs++
	}
	for _, w := range out {
		q.own(w)
	}
	return out
}

func (m *message) isAloft(index uint16) bool {
	for _, i := range m.aloft {
		if i == index {
			return true
		}
	}
	return false
}

// dropDeadline removes the deadline of a message that does not exist.
func (q *Queue) dropDeadline(it item) {
	q.mu.Lock()
	err := q.begin()
	q.mu.Unlock()
	if err != nil {
		return
	}
	b := q.st.NewBatch()
	b.Delete(store.AppendDeadlineKey(nil, it.due, it.id))
	q.st.CommitAsync(b, func(err error) {
		if err != nil {
			q.log.Warn("cannot remove the deadline of a message that is gone", "message", it.id, "error", err)
		}
		q.pending.Done()
	})
}

// oldestOverdue is how long the most overdue message outlived its deadline.
// Call with the lock held.
func (q *Queue) oldestOverdue(now time.Time) time.Duration {
	present := now.UnixMilli() // as deadlines are kept: what is left of it is nobody's delay
	oldest := present
	if q.deadlines.win.len() > 0 {
		oldest = min(oldest, q.deadlines.win.first().due)
	}
	for _, due := range q.leaving {
		oldest = min(oldest, due)
	}
	for w := range q.flights {
		if env := w.msg.env; env != nil {
			oldest = min(oldest, env.ExpiresAt.UnixMilli())
		}
	}
	return time.Duration(present-oldest) * time.Millisecond
}

// nextID is the smallest id behind id.
func nextID(id ids.Message) ids.Message {
	for i := len(id) - 1; i >= 0; i-- {
		if id[i]++; id[i] != 0 {
			break
		}
	}
	return id
}
