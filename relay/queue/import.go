package queue

import (
	"cmp"
	"context"
	"encoding/binary"
	"errors"
	"io"
	"os"
	"path/filepath"
	"time"

	"github.com/relais-mta/relais/relay"
	"github.com/relais-mta/relais/relay/outbox"
	"github.com/relais-mta/relais/relay/store"
	"github.com/relais-mta/relais/shared/fault"
	"github.com/relais-mta/relais/shared/ids"
)

// classImported is the class of the accepted events of imported mail.
const classImported = "imported"

// ImportCount is what became of an export's messages.
type ImportCount struct {
	Imported int   `json:"imported"` // messages that are in the queue now
	Known    int   `json:"known"`    // messages that were imported before, or are in the queue
	Bytes    int64 `json:"bytes"`    // of imported bodies
}

// Import takes the messages of an export into the queue under their own ids,
// with the states of their recipients. Each is on stable storage before the
// next. ledgers is a folder that remembers how far each export was imported, so
// that a repeated import adds nothing, not even what was delivered meanwhile.
// On error what was imported stays, and importing again goes on.
func (q *Queue) Import(ctx context.Context, r io.Reader, ledgers string, progress func(ImportCount)) (count ImportCount, err error) {
	e, h, err := openExport(r)
	if err != nil {
		return count, err
	}
	led, err := openLedger(ledgers, h)
	if err != nil {
		return count, err
	}
	defer func() { err = errors.Join(err, led.close()) }()
	for seen := 0; ; seen++ {
		if err := ctx.Err(); err != nil {
			return count, fault.Wrap(err, fault.Unavailable, "queue.Import", "the import was interrupted: repeat it to go on")
		}
		m, err := e.message(seen)
		if err != nil || m == nil {
			return count, err
		}
		known := uint64(seen) < led.done
		if !known {
			if known, err = q.knows(m.env, h.Node); err != nil {
				return count, err
			}
		}
		if known {
			err = e.body(m.env.Body, io.Discard)
			count.Known++
		} else if err = q.importOne(ctx, e, m, h.Node); err == nil {
			count.Imported++
			count.Bytes += m.env.Body.Length
		}
		if err == nil {
			err = led.set(uint64(seen) + 1)
		}
		if err != nil {
			return count, err
		}
		progress(count)
	}
}

// has reports whether the message is in the queue.
func (q *Queue) has(env *relay.Envelope) (bool, error) {
	_, err := q.st.Get(store.AppendMessageKey(nil, env.ID), nil)
	if fault.Is(err, fault.NotFound) {
		return false, nil
	}
	return err == nil, err
}

// knows reports whether a message of a relay's export is here already, or was: that
// relay may have handed it over and not have seen the answer any more.
func (q *Queue) knows(env *relay.Envelope, from ids.Node) (bool, error) {
	known, err := q.has(env)
	if err != nil || known {
		return known, err
	}
	taken, err := q.Has(from, []Transfer{{env.ID, env.Hops + 1}})
	return err == nil && taken[0], err
}

// importOne takes one message over with the memory of where it came from: unlike
// the ledger it is on stable storage when the message is.
func (q *Queue) importOne(ctx context.Context, e *exportReader, m *exported, from ids.Node) error {
	ref := m.env.Body
	if err := q.st.Admit(ref.Length); err != nil {
		return err
	}
	var body *store.Body
	if ref.Kind != relay.BodyNone {
		body = q.st.NewBody()
		if err := e.body(ref, body); err != nil {
			body.Discard()
			return err
		}
		if err := body.Seal(ref.HeaderBytes, ref.BodyHash); err != nil {
			body.Discard()
			return err
		}
	}
	b := q.st.NewBatch()
	b.Refusable()
	mail, err := q.placeImported(b, m, body)
	if err != nil {
		b.Abandon()
		if mail != nil {
			q.imported(mail, err)
			q.pending.Done()
		}
		discard(body)
		return err
	}
	b.Set(store.AppendTransferKey(nil, store.SpaceTaken, from, m.env.ID, m.env.Hops+1), appendTaken(nil, m.env.ExpiresAt))
	q.transfers.count(from, 1)
	wait := make(chan error, 1)
	q.st.Submit(ctx, b, func(err error) { // the books are kept here, as in Accept
		if err != nil {
			q.transfers.count(from, -1)
		}
		q.imported(mail, err)
		q.pending.Done()
		wait <- err
	})
	if err = <-wait; err != nil {
		discard(body)
	}
	return err
}

// importedMail is an imported message on its way through a commit.
type importedMail struct {
	*placedMail
	states map[uint16]relay.RecipientState
	due    []int64 // by recipient; only of those that wait
	waits  []bool
}

// land makes the state of a recipient what it is here: due at earliest at a time,
// held by a rule of this relay or, if it was held where it comes from, by hand.
func (mail *importedMail) land(i int, earliest int64) {
	s, stored := mail.states[uint16(i)]
	mail.due[i] = mail.firstDue
	rule := mail.heldBy(i)
	switch {
	case rule != nil:
		s.State, s.Next, s.Held, mail.waits[i] = relay.StateHeld, time.Time{}, rule.held, false
	case stored && s.State == relay.StateWaiting:
		mail.due[i] = max(store.Milliseconds(s.Next), earliest)
		s.Next = time.UnixMilli(mail.due[i]).UTC() // the waiting key is found by it
	case stored && s.State == relay.StateHeld:
		// The rule is another relay's: from here on it is held by hand.
		byHand := *s.Held
		byHand.Rule = ids.Hold{}
		s.Held = &byHand
	default:
		return
	}
	mail.states[uint16(i)] = s
}

// placeImported writes a message into a batch as place does, but each
// recipient as it stands. A result that is not nil must be given to imported.
func (q *Queue) placeImported(b *store.Batch, m *exported, body *store.Body) (*importedMail, error) {
	sc := scratchPool.Get().(*scratch)
	defer scratchPool.Put(sc)
	env, now := m.env, q.cfg.Now()
	earliest := store.Milliseconds(now.Add(-maxClockLag))
	due := env.AcceptedAt
	if env.NotBefore.After(due) {
		due = env.NotBefore
	}
	n := len(env.Recipients)
	mail := &importedMail{placedMail: &placedMail{env: env, body: body, firstDue: max(store.Milliseconds(due), earliest)}, states: m.states, due: make([]int64, n), waits: make([]bool, n)}

	mail.rules = q.heldAtOnce(env)
	for i := range env.Recipients {
		s, stored := m.states[uint16(i)]
		mail.waits[i] = !stored || s.State == relay.StateWaiting
		if mail.rules != nil && !mail.waits[i] {
			mail.rules[i] = nil // it is held already, or has its end
		}
	}

	q.mu.Lock()
	if err := q.begin(); err != nil {
		q.mu.Unlock()
		return nil, err
	}
	mail.rules = q.pinRules(mail.rules)
	for i := range env.Recipients {
		mail.land(i, earliest)
		wq := q.intern(b, keyOf(env, i), mail.due[i], sc)
		wq.pins++
		mail.queues = append(mail.queues, wq)
	}
	q.lowerFloor(b, q.deadlines, store.Milliseconds(env.ExpiresAt), sc)
	q.mu.Unlock()

	for i := range env.Recipients {
		if s, stored := m.states[uint16(i)]; stored {
			sc.key = store.AppendStateKey(sc.key[:0], env.ID, uint16(i))
			sc.value = appendState(sc.value[:0], &s)
			b.Set(sc.key, sc.value)
			if s.State == relay.StateHeld {
				sc.key = store.AppendHeldKey(sc.key[:0], s.Held.Rule, env.ID, uint16(i))
				b.Set(sc.key, nil)
			}
		}
		if mail.waits[i] {
			sc.key = store.AppendWaitingKey(sc.key[:0], uint32(mail.queues[i].number), mail.due[i], env.ID, uint16(i))
			b.Set(sc.key, nil)
		}
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
		if s := m.states[uint16(i)]; s.State.Final() {
			continue
		}
		q.envelopeEvent(&sc.ev, env, uint16(i), now)
		sc.ev.Type, sc.ev.Class, sc.ev.Size = outbox.Accepted, cmp.Or(m.class, classImported), ref.Length
		if mail.waits[i] {
			sc.ev.Next = time.UnixMilli(mail.due[i])
		}
		sc.event = q.ob.Add(b, &sc.ev, sc.event)
		if rule := mail.heldBy(i); rule != nil {
			sc.ev.Type = outbox.Held
			fillNote(&sc.ev, rule.note)
			sc.event = q.ob.Add(b, &sc.ev, sc.event)
		}
	}
	return mail, nil
}

// imported books an imported message whose commit ended. Its recipients go
// into the windows without the message, as if they had been read from disk.
func (q *Queue) imported(mail *importedMail, err error) {
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
	for i, wq := range mail.queues {
		wq.stored = true
		if s := mail.states[uint16(i)]; s.State == relay.StateHeld {
			q.heldBy[holder(&s).Rule]++
		}
		if mail.waits[i] {
			q.waiting++
			wq.waits++
			q.enqueue(wq, item{pos: pos{mail.due[i], mail.env.ID, uint16(i)}})
		}
	}
	soonest := q.addDeadline(mail.env)
	q.trim()
	q.mu.Unlock()
	if soonest {
		q.notify(0)
	}
	for _, wq := range mail.queues {
		q.notify(wq.number)
	}
}

// ledger remembers how many messages of one export were imported.
type ledger struct {
	file *os.File
	done uint64
}

func openLedger(dir string, h ExportHeader) (*ledger, error) {
	const op = "queue.Import"
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return nil, fault.Wrap(err, fault.Internal, op, "the folder %s cannot be made", dir)
	}
	f, err := os.OpenFile(filepath.Join(dir, h.Export.String()), os.O_CREATE|os.O_RDWR, 0o600)
	if err != nil {
		return nil, fault.Wrap(err, fault.Internal, op, "the import cannot be remembered in %s", dir)
	}
	l := &ledger{file: f}
	var b [8]byte
	if n, err := f.ReadAt(b[:], 0); n == len(b) && err == nil {
		l.done = binary.BigEndian.Uint64(b[:])
	}
	return l, nil
}

func (l *ledger) set(done uint64) error {
	if done <= l.done {
		return nil
	}
	l.done = done
	var b [8]byte
	binary.BigEndian.PutUint64(b[:], done)
	_, err := l.file.WriteAt(b[:], 0)
	return fault.Wrap(err, fault.Internal, "queue.Import", "the import cannot be remembered: is there space left?")
}

func (l *ledger) close() error { return errors.Join(l.file.Sync(), l.file.Close()) }
