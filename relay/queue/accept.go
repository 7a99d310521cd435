package queue

import (
	"context"
	"sync"
	"time"

	"github.com/relais-mta/relais/relay"
	"github.com/relais-mta/relais/relay/outbox"
	"github.com/relais-mta/relais/relay/store"
	"github.com/relais-mta/relais/shared/fault"
)

// MaxRecipients is the most recipients one message may have here, whatever
// policy says: their keys must fit into one transaction.
const MaxRecipients = 10_000

// maxClockLag is how far behind now a due time may lie when it is stored.
// Together with floorMargin it makes floors safe: see floorOf.
const maxClockLag = time.Minute

// placedMail is a message on its way through a commit.
type placedMail struct {
	env      *relay.Envelope
	body     *store.Body
	firstDue int64
	queues   []*workQueue  // by recipient
	rules    []*activeRule // by recipient, those that hold it from the start; nil: none is held
}

// scratch holds buffers for encoding, reused between calls.
type scratch struct {
	key, value, event []byte
	ev                outbox.Event
}

var scratchPool = sync.Pool{New: func() any { return new(scratch) }}

// Accept stores a message and returns nil only when it is on stable storage;
// its recipients are due at NotBefore or at once. It consumes body and fills
// env.Body; from then on the envelope is shared and must not be changed. On
// error nothing was stored and the body is discarded. ctx bounds the wait for
// a place in the commit queue only: once submitted, the outcome is awaited.
func (q *Queue) Accept(ctx context.Context, env *relay.Envelope, body *store.Body) error {
	if err := q.check(env); err != nil {
		discard(body)
		return err
	}
	b := q.st.NewBatch()
	b.Refusable()
	mail, err := q.place(b, env, body)
	if err != nil {
		b.Abandon()
		if mail != nil {
			q.accepted(mail, err)
			q.pending.Done()
		}
		discard(body)
		return err
	}
	// The books are kept on the committer's goroutine, see readPages.
	wait := make(chan error, 1)
	q.st.Submit(ctx, b, func(err error) {
		q.accepted(mail, err)
		q.pending.Done()
		wait <- err
	})
	if err = <-wait; err != nil {
		discard(body)
	}
	return err
}

func discard(body *store.Body) {
	if body != nil {
		body.Discard()
	}
}

func (q *Queue) check(env *relay.Envelope) error {
	const op = "queue.Accept"
	switch n := len(env.Recipients); {
	case env.ID.IsZero():
		return fault.New(fault.Internal, op, "the message has no id")
	case n == 0:
		return fault.Field(op, "recipients", "a message needs at least one")
	case n > MaxRecipients:
		return fault.New(fault.TooLarge, op, "a message has at most %d recipients, this one has %d", MaxRecipients, n)
	case !env.ExpiresAt.After(env.AcceptedAt):
		return fault.Field(op, "expires_at", "must lie after the acceptance")
	case !env.ExpiresAt.After(q.cfg.Now().Add(-maxClockLag)):
		return fault.Field(op, "expires_at", "the message is past its deadline already")
	}
	return nil
}

// place writes a message into a batch: envelope, waiting keys, deadline, and
// an accepted event for each recipient. A result that is not nil must be given
// to accepted, whatever becomes of the batch.
func (q *Queue) place(b *store.Batch, env *relay.Envelope, body *store.Body) (*placedMail, error) {
	sc := scratchPool.Get().(*scratch)
	defer scratchPool.Put(sc)
	mail := &placedMail{env: env, body: body}
	now := q.cfg.Now()
	due := env.AcceptedAt
	if env.NotBefore.After(due) {
		due = env.NotBefore
	}
	mail.firstDue = max(store.Milliseconds(due), store.Milliseconds(now.Add(-maxClockLag)))
	mail.rules = q.heldAtOnce(env)

	q.mu.Lock()
	if err := q.begin(); err != nil {
		q.mu.Unlock()
		return nil, err
	}
	mail.queues = make([]*workQueue, len(env.Recipients))
	for i := range env.Recipients {
		if i > 0 && env.Recipients[i].Address.Domain == env.Recipients[i-1].Address.Domain {
			mail.queues[i] = mail.queues[i-1]
		} else {
			mail.queues[i] = q.intern(b, keyOf(env, i), mail.firstDue, sc)
		}
		mail.queues[i].pins++
	}
	q.lowerFloor(b, q.deadlines, store.Milliseconds(env.ExpiresAt), sc)
	mail.rules = q.pinRules(mail.rules)
	q.mu.Unlock()

	for i := range env.Recipients {
		if rule := mail.heldBy(i); rule != nil {
			q.placeHeld(b, env, uint16(i), rule, sc)
			continue
		}
		sc.key = store.AppendWaitingKey(sc.key[:0], uint32(mail.queues[i].number), mail.firstDue, env.ID, uint16(i))
		b.Set(sc.key, nil)
	}
	sc.key = store.AppendDeadlineKey(sc.key[:0], store.Milliseconds(env.ExpiresAt), env.ID)
	b.Set(sc.key, nil)
	ref := relay.BodyRef{}
	if body != nil {
		ref = body.Ref()
	}
	sc.key = store.AppendMessageKey(sc.key[:0], env.ID)
	sc.value = appendEnvelope(sc.value[:0], env, ref, mail.firstDue)
	if body == nil {
		b.Set(sc.key, sc.value)
	} else if err := b.SetWithBody(sc.key, sc.value, 1, env.ID, body); err != nil {
		return mail, err
	}
	for i := range env.Recipients {
		q.envelopeEvent(&sc.ev, env, uint16(i), now)
		sc.ev.Type, sc.ev.Size, sc.ev.Next = outbox.Accepted, ref.Length, time.UnixMilli(mail.firstDue)
		if env.Internal {
			sc.ev.Type = outbox.DSN
		}
		sc.event = q.ob.Add(b, &sc.ev, sc.event)
		if rule := mail.heldBy(i); rule != nil {
			sc.ev.Type, sc.ev.Next = outbox.Held, time.Time{}
			fillNote(&sc.ev, rule.note)
			sc.event = q.ob.Add(b, &sc.ev, sc.event)
		}
	}
	return mail, nil
}

// envelopeEvent fills in what every event about a recipient says.
func (q *Queue) envelopeEvent(e *outbox.Event, env *relay.Envelope, index uint16, now time.Time) {
	*e = outbox.Event{
		At: now, Message: env.ID, Index: index, Tenant: env.Tenant, Project: env.Project, Stream: env.Stream, Tag: env.Tag, Pool: env.Pool,
		Address: env.Recipients[index].Address.String(), Size: env.Body.Length, AcceptedAt: env.AcceptedAt, Revision: env.Revision,
	}
}

// intern returns the work queue of a key, new if needed, and writes its record
// until that is known to be durable. Call with the lock held.
func (q *Queue) intern(b *store.Batch, key Key, due int64, sc *scratch) *workQueue {
	wq := q.queueFor(key)
	q.lowerFloor(b, wq, due, sc)
	if !wq.stored {
		q.putFloor(b, wq, sc)
	}
	return wq
}

// queueFor returns the work queue of a key, new if needed. Call with the lock
// held.
func (q *Queue) queueFor(key Key) *workQueue {
	wq := q.byKey[key]
	if wq == nil {
		wq = &workQueue{number: q.nextNumber, key: key, complete: true, floor: floorBefore(q.nowMS())}
		q.nextNumber++
		q.byKey[key], q.byNumber[wq.number] = wq, wq
	}
	wq.emptyAt = 0
	return wq
}

// accepted books a message whose commit ended.
func (q *Queue) accepted(mail *placedMail, err error) {
	if err == nil && mail.body != nil {
		mail.env.Body = mail.body.Ref()
	}
	q.mu.Lock()
	for _, wq := range mail.queues {
		wq.pins--
	}
	q.unpinRules(mail.rules)
	if err != nil {
		q.mu.Unlock()
		return
	}
	env := mail.env
	m := q.messageFor(env.ID)
	m.setEnvelope(env, mail.firstDue)
	m.known = true // nothing is final yet
	nowMS := q.nowMS()
	q.giveWay(env, nowMS)
	keep := q.roomFor(env, mail.firstDue, nowMS)
	for i, wq := range mail.queues {
		wq.stored = true
		if rule := mail.heldBy(i); rule != nil {
			q.heldBy[rule.ID]++
			continue
		}
		q.waiting++
		wq.waits++
		it := item{pos: pos{mail.firstDue, env.ID, uint16(i)}, fresh: true}
		if keep {
			it.msg = m
			m.refs++
		}
		q.enqueue(wq, it)
	}
	soonest := q.addDeadline(env)
	if keep {
		q.fresh.add(m, nowMS)
	}
	q.unref(m, 1)
	q.trim()
	q.mu.Unlock()
	q.metrics.accepted.Add(float64(len(mail.queues)))
	if soonest {
		q.notify(0)
	}
	var last *workQueue
	for _, wq := range mail.queues {
		if wq != last {
			q.notify(wq.number)
			last = wq
		}
	}
}

// enqueue puts a recipient whose waiting key is durable where it belongs: into
// the window if that covers its place, else it stays on disk. The item's
// reference to its message is given back if it does. Call with the lock held.
func (q *Queue) enqueue(wq *workQueue, it item) {
	if !wq.complete && !it.less(wq.end) {
		q.forget(it)
		if wq.paging {
			it.msg = nil
			wq.late = append(wq.late, it)
		}
		return
	}
	if !wq.win.insert(it) {
		q.forget(it)
		_ = q.violation("a recipient waits twice", "message", it.id, "index", it.index)
		return
	}
	q.inMemory++
}

// forget drops an item from memory. Call with the lock held.
func (q *Queue) forget(it item) {
	if it.msg != nil {
		q.unref(it.msg, 1)
	}
}

// addDeadline puts a message's deadline into the window of the deadline index
// if that covers it, and reports whether it is the earliest now. Call with the
// lock held.
func (q *Queue) addDeadline(env *relay.Envelope) (earliest bool) {
	d := q.deadlines
	it := item{pos: pos{due: store.Milliseconds(env.ExpiresAt), id: env.ID}}
	if !d.complete && !it.less(d.end) {
		if d.paging {
			d.late = append(d.late, it)
		}
		return false
	}
	d.win.insert(it) // it may be there: a message can come back to the index
	earliest = d.win.first().pos == it.pos
	if d.win.len() > q.sizes.maxDeadlines {
		if end, dropped := d.win.shrink(q.sizes.maxDeadlines*3/4, func(item) {}); dropped {
			d.complete, d.end = false, end
		}
	}
	return earliest
}
