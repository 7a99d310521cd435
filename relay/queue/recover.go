package queue

import (
	"context"
	"time"

	"github.com/relais-mta/relais/relay"
	"github.com/relais-mta/relais/relay/outbox"
	"github.com/relais-mta/relais/relay/store"
	"github.com/relais-mta/relais/shared/fault"
	"github.com/relais-mta/relais/shared/ids"
	"github.com/relais-mta/relais/shared/policy"
)

// classInDoubt is the class that states and events of attempts with a hidden
// end carry.
const classInDoubt = "in-doubt"

// recover resolves the attempts that were journalled and never ended: the
// remote side may have taken the mail. Each recipient is tried again after the
// policy's delay; one that is in doubt more often than the policy retries ends
// as unknown. Every entry is resolved and removed in one transaction, which it may
// share with others, so a crash here changes nothing.
func (q *Queue) recover(ctx context.Context) error {
	type entry struct {
		id    ids.Message
		index uint16
		value []byte
	}
	var entries []entry
	snap := q.st.Snapshot()
	err := snap.Iterate([]byte{store.SpaceAttempt}, nil, false, func(k, v []byte) bool {
		if id, index, ok := store.ParseStateKey(k); ok {
			entries = append(entries, entry{id, index, append([]byte(nil), v...)})
		}
		return true
	})
	snap.Close()
	if err != nil {
		return err
	}
	r := &recovery{q: q, met: make(map[ids.Message]struct{})}
	for _, e := range entries {
		if err := r.add(ctx, e.id, e.index, e.value); err != nil {
			return r.end(err)
		}
	}
	if err := r.commit(ctx); err != nil {
		return err
	}
	if len(entries) > 0 {
		q.metrics.inDoubt.Add(float64(r.doubted + r.lost))
		q.log.Warn("attempts whose end the last run did not see", "attempts", len(entries), "retried", r.doubted, "unknown", r.lost, "left", r.left)
	}
	return nil
}

// recovery resolves attempts of different messages in one transaction: a crash
// leaves as many as there were sessions, and nothing is accepted before the last
// of them is resolved.
type recovery struct {
	q             *Queue
	b             *store.Batch // nil: nothing is in it
	met           map[ids.Message]struct{}
	size          int // about how many recipients' ends it is worth
	told          []*placedMail
	doubted, lost int
	left          int // attempts in the journal that the repair resolves
}

// add resolves one attempt, after a commit if that needs what the batch writes, or
// more room than it has. An attempt that cannot be read, or of a message that cannot,
// stays in the journal, so it is in doubt still when it was repaired. Its message is
// set aside until then: whom it names may have the mail. Others do not wait for it.
func (r *recovery) add(ctx context.Context, id ids.Message, first uint16, value []byte) error {
	if _, again := r.met[id]; again {
		if err := r.commit(ctx); err != nil {
			return err
		}
	}
	read, err := r.q.readMessage(id, nil)
	gone := fault.Is(err, fault.NotFound) // its Finish was durable and only the journal was left
	var j journalEntry
	if err == nil {
		j, err = parseAttempt(id, value)
	}
	if err == nil {
		err = r.q.checkAttempt(&j, &read)
	}
	if err != nil && !gone {
		r.q.keepAside(id, err)
		r.left++
		return nil
	}
	size := len(j.indexes) + 2 // the report is worth two
	if r.size+size > r.q.workLimit {
		if err := r.commit(ctx); err != nil {
			return err
		}
	}
	if r.b == nil {
		r.b = r.q.st.NewBatch()
	}
	r.met[id] = struct{}{}
	r.size += size
	r.b.Delete(store.AppendAttemptKey(nil, id, first))
	if gone {
		return nil
	}
	retried, unknown, removed, err := r.q.resolve(r.b, j, read, &r.told)
	r.doubted += retried
	r.lost += unknown
	r.size += removed / removedPerEnd
	return err
}

// removedPerEnd is how many of a message's keys may go for the end of a recipient,
// by the number of keys that a transaction takes.
const removedPerEnd = 16

func (r *recovery) commit(ctx context.Context) error {
	if r.b == nil {
		return nil
	}
	b := r.b
	r.b = nil
	return r.end(r.q.st.Commit(ctx, b))
}

// end books a commit that ended, or will not be made.
func (r *recovery) end(err error) error {
	if r.b != nil {
		r.b.Abandon()
		r.b = nil
	}
	for _, mail := range r.told {
		r.q.accepted(mail, err)
		r.q.pending.Done()
	}
	r.told, r.size = r.told[:0], 0
	clear(r.met)
	return err
}

// checkAttempt reports a journalled attempt that its message cannot have made: whom
// it names, or from which work queue, is not to be trusted.
func (q *Queue) checkAttempt(j *journalEntry, read *readMessage) error {
	const op = "queue.checkAttempt"
	id := j.attempt.Message
	for _, index := range j.indexes {
		if int(index) >= len(read.env.Recipients) {
			return fault.New(fault.Invalid, op, "a journalled attempt of %s names recipient %d, which it does not have", id, index)
		}
		s := read.state(index)
		if s.State != relay.StateWaiting {
			continue
		}
		_, err := q.st.Get(store.AppendWaitingKey(nil, uint32(j.queue), store.Milliseconds(s.Next), id, index), nil)
		if fault.Is(err, fault.NotFound) {
			err = fault.New(fault.Invalid, op, "a journalled attempt of %s names recipient %d, which does not wait in its work queue", id, index)
		}
		if err != nil {
			return err
		}
	}
	return nil
}

// resolve writes what becomes of one journalled attempt's recipients, and returns
// how many are tried again, how many are not, and of how many recipients the whole
// message is removed. It runs
// before anything is taken, so the disk is all there is, and what it books stands,
// because without its commit the queue does not open.
func (q *Queue) resolve(b *store.Batch, j journalEntry, read readMessage, told *[]*placedMail) (again, unknown, removed int, err error) {
	now := q.cfg.Now()
	sc := &scratch{}
	m := &message{id: j.attempt.Message}
	q.learn(m, read)
	wq := q.byNumber[j.queue] // nil: its record is lost, which the check of the queue finds
	var ended []Result
	for _, index := range j.indexes {
		s := read.state(index)
		if s.State.Final() || m.isFinal(index) {
			continue
		}
		if s.State == relay.StateWaiting {
			due := store.Milliseconds(s.Next)
			b.Delete(store.AppendWaitingKey(nil, uint32(j.queue), due, m.id, index))
			if wq != nil {
				q.leave(wq, pos{due, m.id, index})
			}
		}
		q.doubt(&s, now, m.env.ExpiresAt)
		s.LastAttempt, s.LastMX = j.attempt.StartedAt, j.attempt.MX
		q.envelopeEvent(&sc.ev, m.env, index, now)
		sc.ev.Type, sc.ev.Class, sc.ev.Attempts = outbox.InDoubt, s.LastClass, s.Attempts
		fillAttempt(&sc.ev, &j.attempt)
		if s.State == relay.StateWaiting {
			again++
			sc.ev.Next = s.Next
			due := store.Milliseconds(s.Next)
			b.Set(store.AppendWaitingKey(nil, uint32(j.queue), due, m.id, index), nil)
			if wq != nil {
				// Pages are read from the floor on that was there at the start. A
				// clock that was set back makes it due before that.
				q.lowerFloor(b, wq, due, sc)
				q.enqueue(wq, item{pos: pos{due, m.id, index}})
			}
		} else {
			unknown++
			sc.ev.Type = outbox.Unknown
			m.setFinal(index)
			ended = append(ended, Result{Index: index, State: s, Event: outbox.Unknown, Phase: relay.PhaseLocal})
		}
		b.Set(store.AppendStateKey(nil, m.id, index), appendState(nil, &s))
		sc.event = q.ob.Add(b, &sc.ev, sc.event)
	}
	if err := q.tellUnconfirmed(b, m.env, ended, now, told, sc); err != nil {
		return 0, 0, 0, err
	}
	if unknown > 0 && (m.total == 1 || m.open() == 0) {
		q.writeRemoval(b, m.env, true, sc)
		removed = m.total
	}
	return again, unknown, removed, nil
}

// Unconfirmed makes the reports about recipients that end as unknown, and may
// name in the results what the events say of telling the sender. The mail goes
// into the transaction that ends them. It is called before Open returns.
type Unconfirmed func(env *relay.Envelope, ended []Result) []Mail

// tellUnconfirmed adds the reports on recipients that end as unknown to the
// transaction that ends them.
func (q *Queue) tellUnconfirmed(b *store.Batch, env *relay.Envelope, ended []Result, now time.Time, told *[]*placedMail, sc *scratch) error {
	if len(ended) == 0 || q.cfg.Unconfirmed == nil {
		return nil
	}
	for _, m := range q.cfg.Unconfirmed(env, ended) {
		if err := q.check(m.Env); err != nil {
			return err
		}
		mail, err := q.place(b, m.Env, m.Body)
		if mail != nil {
			*told = append(*told, mail)
		}
		if err != nil {
			return err
		}
	}
	for i := range ended {
		if ended[i].Told == outbox.None {
			continue
		}
		q.envelopeEvent(&sc.ev, env, ended[i].Index, now)
		sc.ev.Type, sc.ev.Class, sc.ev.Attempts = ended[i].Told, ended[i].State.LastClass, ended[i].State.Attempts
		sc.event = q.ob.Add(b, &sc.ev, sc.event)
	}
	return nil
}

// doubt changes the state of a recipient whose last attempt may have
// succeeded: one more try after the delay, before the deadline, or the end
// when the policy's retries are used up.
func (q *Queue) doubt(s *relay.RecipientState, now, deadline time.Time) {
	doubt(s, &q.policy, now, deadline, q.cfg.Undecided)
}

// Where nobody could be told (undecided) nothing ends: who has the queue next decides.
func doubt(s *relay.RecipientState, p *policy.Queue, now, deadline time.Time, undecided bool) {
	s.InDoubt++
	s.Attempts++
	s.LastClass = classInDoubt
	s.LastReply = relay.Reply{Text: "the relay stopped before it saw the answer"}
	next := now.Add(p.InDoubtRetry.D())
	if !next.Before(deadline) {
		next = deadline.Add(-lastTryMargin)
	}
	if undecided && next.Before(now) {
		next = now
	}
	if !undecided && int(s.InDoubt) > p.InDoubtRetries || next.Before(now) {
		s.State, s.Next = relay.StateUnknown, time.Time{}
		return
	}
	s.State, s.Next = relay.StateWaiting, next
}
