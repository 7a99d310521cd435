package queue

import (
	"fmt"
	"math/bits"
	"sort"

	"github.com/relais-mta/relais/relay"
	"github.com/relais-mta/relais/relay/outbox"
	"github.com/relais-mta/relais/relay/store"
	"github.com/relais-mta/relais/shared/fault"
)

// Begin journals an attempt for the work's recipients; the final dot must not
// be sent before done was called with nil. If the process ends before Finish,
// the next start finds these recipients in doubt. A second Begin of the same
// work (the next host) replaces the first. done runs on the commit goroutine:
// it must not block.
func (q *Queue) Begin(w *Work, a *relay.Attempt, done func(error)) {
	sc := scratchPool.Get().(*scratch)
	b := q.st.NewBatch()
	sc.key = store.AppendAttemptKey(sc.key[:0], w.msg.id, w.Recipients[0].Index)
	sc.value = appendAttempt(sc.value[:0], w.Queue, w.Recipients, a)
	b.Set(sc.key, sc.value)
	scratchPool.Put(sc)
	q.mu.Lock()
	err := q.begin()
	if err == nil && w.state != workTaken {
		q.pending.Done()
		err = fault.New(fault.Internal, "queue.Begin", "the work was given back already")
	}
	if err != nil {
		q.mu.Unlock()
		b.Abandon()
		done(err)
		return
	}
	w.journaled = true
	q.mu.Unlock()
	q.st.CommitAsync(b, func(err error) {
		q.pending.Done()
		done(err)
	})
}

// ending is a Finish on its way through a commit.
type ending struct {
	w       *Work
	results []Result
	at      []int // position in w.Recipients of each result
	mails   []*placedMail
	finals  int
	removes bool // the batch removes the whole message, of whose ends in it this is the last
	deleted int  // waiting keys
}

// Finish records, in one transaction, the new states, their events, the end of
// the journalled attempt and any mail that follows from it (DSNs), whose
// bodies it consumes on success. Recipients of w without a result go back
// unchanged. On error nothing was recorded and w is still the caller's, who
// may call Finish again. a may be nil when nothing was attempted. Neither w
// nor results may be touched before done was called, which happens on the
// commit goroutine: it must not block.
func (q *Queue) Finish(w *Work, a *relay.Attempt, results []Result, extra []Mail, done func(error)) {
	end := &ending{w: w, results: results}
	if err := q.checkResults(end); err != nil {
		done(err)
		return
	}
	for _, m := range extra {
		if err := q.check(m.Env); err != nil {
			done(err)
			return
		}
	}
	b := q.st.NewBatch()
	for _, m := range extra {
		mail, err := q.place(b, m.Env, m.Body)
		if mail != nil {
			end.mails = append(end.mails, mail)
		}
		if err != nil {
			b.Abandon()
			q.endMails(end, err)
			done(err)
			return
		}
	}
	sc := scratchPool.Get().(*scratch)
	q.writeEvents(b, end, a, sc)
	q.mu.Lock()
	err := q.begin()
	if err == nil && w.state != workTaken {
		q.pending.Done()
		err = q.violation("work was ended twice", "message", w.msg.id)
	}
	if err != nil {
		q.mu.Unlock()
		scratchPool.Put(sc)
		b.Abandon()
		q.endMails(end, err)
		done(err)
		return
	}
	ends := [1]*ending{end}
	q.writeEndings(b, ends[:], sc)
	q.mu.Unlock()
	scratchPool.Put(sc)
	q.st.CommitAsync(b, func(err error) {
		q.finished(end, err)
		q.pending.Done()
		done(err)
	})
}

// endMails books extra mail whose commit ended.
func (q *Queue) endMails(end *ending, err error) {
	for _, mail := range end.mails {
		q.accepted(mail, err)
		q.pending.Done()
	}
}

// checkResults finds each result's recipient and refuses what would lose one.
func (q *Queue) checkResults(end *ending) error {
	w := end.w
	if !w.Loaded() {
		return q.violation("work was ended that was never loaded", "message", w.msg.id)
	}
	end.at = make([]int, len(end.results))
	for i := range end.results {
		r := &end.results[i]
		at := sort.Search(len(w.Recipients), func(j int) bool { return w.Recipients[j].Index >= r.Index })
		if at == len(w.Recipients) || w.Recipients[at].Index != r.Index || i > 0 && end.results[i-1].Index >= r.Index {
			return q.violation(fmt.Sprintf("result %d is for recipient %d, which is not in the work or out of order", i, r.Index), "message", w.Env.ID)
		}
		end.at[i] = at
		switch {
		case r.State.State < relay.StateWaiting || r.State.State > relay.StateMoved:
			return q.violation("a result has no state", "message", w.Env.ID, "index", r.Index)
		case r.State.State == relay.StateWaiting && r.State.Next.IsZero():
			return q.violation("a waiting result has no next time", "message", w.Env.ID, "index", r.Index)
		case r.State.State.Final():
			end.finals++
		}
	}
	return nil
}

func (q *Queue) writeEvents(b *store.Batch, end *ending, a *relay.Attempt, sc *scratch) {
	now := q.cfg.Now()
	for i := range end.results {
		r := &end.results[i]
		if r.Event == outbox.None && r.Told == outbox.None {
			continue
		}
		q.envelopeEvent(&sc.ev, end.w.Env, r.Index, now)
		e := &sc.ev
		e.Type, e.Phase, e.Class, e.Reply = r.Event, r.Phase, r.State.LastClass, r.State.LastReply
		e.Attempts = r.State.Attempts
		if r.State.State == relay.StateWaiting {
			e.Next = r.State.Next
		}
		fillNote(e, r.Note)
		fillAttempt(e, a)
		for _, e.Type = range [...]outbox.Type{r.Event, r.Told} {
			if e.Type != outbox.None {
				sc.event = q.ob.Add(b, e, sc.event)
			}
		}
	}
}

func fillNote(e *outbox.Event, n *Note) {
	if n == nil {
		return
	}
	e.Actor, e.Class = n.Actor, n.Class
	if n.Text != "" {
		e.Reply = relay.Reply{Text: n.Text}
	}
}

func fillAttempt(e *outbox.Event, a *relay.Attempt) {
	if a == nil {
		return
	}
	e.Source, e.SourceIP, e.Epoch, e.Provider = a.Source, a.SourceIP, a.Epoch, a.Provider
	e.MX, e.RemoteIP, e.TLS = a.MX, a.RemoteIP, a.TLS
	e.StartedAt, e.EndedAt = a.StartedAt, a.EndedAt
}

// writeEndings writes what the ends of works of one message change about its
// recipients, all of them in one transaction, and decides whether the message
// goes with them. Call with the lock held.
func (q *Queue) writeEndings(b *store.Batch, ends []*ending, sc *scratch) {
	last := ends[len(ends)-1]
	m := last.w.msg
	last.removes = q.lastOnes(m, ends)
	for _, end := range ends {
		end.w.state = workEnding
		q.writeStates(b, end, last.removes, sc)
	}
	if last.removes {
		m.removing = true
		stored := m.total > 1 || last.w.held[0].stored
		q.writeRemoval(b, m.env, stored, sc)
	}
	q.storeFloor(b, q.deadlines, sc)
}

// writeStates writes what one end changes about its recipients; removed says that
// the whole message goes. Call with the lock held.
func (q *Queue) writeStates(b *store.Batch, end *ending, removed bool, sc *scratch) {
	w, m := end.w, end.w.msg
	id := m.id
	if w.journaled {
		sc.key = store.AppendAttemptKey(sc.key[:0], id, w.Recipients[0].Index)
		b.Delete(sc.key)
	}
	for i := range end.results {
		r, h := &end.results[i], w.held[end.at[i]]
		if h.waits {
			sc.key = store.AppendWaitingKey(sc.key[:0], uint32(w.Queue), h.due, id, r.Index)
			b.Delete(sc.key)
			end.deleted++
		}
		q.writeHeld(b, id, r, h.hold, sc)
		if !removed {
			sc.key = store.AppendStateKey(sc.key[:0], id, r.Index)
			sc.value = appendState(sc.value[:0], &r.State)
			b.Set(sc.key, sc.value)
		}
		if r.State.State == relay.StateWaiting {
			due := store.Milliseconds(r.State.Next)
			q.lowerFloor(b, w.wq, due, sc)
			if !w.wq.stored {
				q.putFloor(b, w.wq, sc)
			}
			sc.key = store.AppendWaitingKey(sc.key[:0], uint32(w.Queue), due, id, r.Index)
			b.Set(sc.key, nil)
		}
	}
	m.pending++
	w.wq.pins++
	w.wq.removed += end.deleted
	q.storeFloor(b, w.wq, sc)
}

// lastOnes reports whether with these ends the whole message is final. Only what
// is durable or in the same transaction counts, so it is left to the later of two
// commits under way to find out (see finished). Call with the lock held.
func (q *Queue) lastOnes(m *message, ends []*ending) bool {
	finals := 0
	for _, end := range ends {
		finals += end.finals
	}
	if finals == 0 || m.total == 1 {
		return finals > 0
	}
	if m.pending > 0 || m.removing || !m.known {
		return false
	}
	left := m.open()
	for _, end := range ends {
		for i := range end.results {
			if end.results[i].State.State.Final() && !m.isFinal(end.results[i].Index) {
				left--
			}
		}
	}
	return left == 0
}

// open counts the recipients that are not final.
func (m *message) open() int {
	left := m.total
	for _, word := range m.final {
		left -= bits.OnesCount64(word)
	}
	return left
}

// writeRemoval removes everything about a message: envelope, deadline, states
// and, once that is durable, its body.
func (q *Queue) writeRemoval(b *store.Batch, env *relay.Envelope, stored bool, sc *scratch) {
	sc.key = store.AppendMessageKey(sc.key[:0], env.ID)
	b.Delete(sc.key)
	sc.key = store.AppendDeadlineKey(sc.key[:0], store.Milliseconds(env.ExpiresAt), env.ID)
	b.Delete(sc.key)
	if stored {
		for i := range env.Recipients {
			sc.key = store.AppendStateKey(sc.key[:0], env.ID, uint16(i))
			b.Delete(sc.key)
		}
	}
	b.DropBody(env.Body)
	q.deadlines.removed++
}

// finished books a Finish whose commit ended. It runs on the commit goroutine.
func (q *Queue) finished(end *ending, err error) {
	w, m := end.w, end.w.msg
	q.endMails(end, err)
	q.mu.Lock()
	m.pending--
	w.wq.pins--
	if err != nil {
		w.state = workTaken
		if end.removes {
			m.removing = false
		}
		q.mu.Unlock()
		return
	}
	w.wq.stored = true
	q.waiting -= int64(end.deleted)
	w.wq.waits -= int64(end.deleted)
	q.disown(w)
	next := 0
	for i := range w.Recipients {
		if next == len(end.results) || end.at[next] != i {
			q.putBack(w, i)
			continue
		}
		r := &end.results[next]
		next++
		if h := w.held[i]; h.waits {
			q.keyGone(w.wq, pos{h.due, m.id, r.Index})
		}
		q.bookHeld(w.held[i].hold, &r.State)
		q.metrics.results[min(r.State.State, relay.StateMoved)].Inc()
		switch {
		case r.State.State.Final():
			m.setFinal(r.Index)
		case r.State.State == relay.StateWaiting:
			q.waiting++
			w.wq.waits++
			q.enqueue(w.wq, item{pos: pos{store.Milliseconds(r.State.Next), m.id, r.Index}})
		}
	}
	if end.removes {
		q.removed(m)
	} else {
		q.checkDeadline(m)
		q.cleanUp(m)
	}
	q.unref(m, len(w.Recipients))
	q.trim()
	q.mu.Unlock()
	q.notify(w.Queue)
}

// removed books that a message is gone from disk. Call with the lock held.
func (q *Queue) removed(m *message) {
	m.gone, m.removing = true, false
	q.leave(q.deadlines, pos{due: store.Milliseconds(m.env.ExpiresAt), id: m.id})
	d := q.deadlines
	if !d.complete && d.win.len() < q.sizes.maxDeadlines/8 {
		q.wantPage(d)
	}
	q.metrics.messagesDone.Inc()
}

// cleanUp removes a message whose recipients became final in several commits.
// Call with the lock held.
func (q *Queue) cleanUp(m *message) {
	if m.total <= 1 || !m.known || m.pending > 0 || m.removing || m.gone || m.open() > 0 || q.begin() != nil {
		return
	}
	m.removing = true
	q.leaving[m.id] = store.Milliseconds(m.env.ExpiresAt)
	sc := scratchPool.Get().(*scratch)
	b := q.st.NewBatch()
	q.writeRemoval(b, m.env, true, sc)
	scratchPool.Put(sc)
	q.st.CommitAsync(b, func(err error) {
		q.mu.Lock()
		delete(q.leaving, m.id)
		if err == nil {
			q.removed(m)
		} else {
			m.removing = false // its deadline finds it again
		}
		q.unref(m, 0)
		q.mu.Unlock()
		q.pending.Done()
	})
}
