package queue

import (
	"bytes"
	"encoding/binary"
	"fmt"
	"maps"
	"os"
	"path/filepath"

	"github.com/relais-mta/relais/relay"
	"github.com/relais-mta/relais/relay/store"
	"github.com/relais-mta/relais/shared/ids"
)

// flip changes an octet of a body file.
func (w *ward) flip(ref relay.BodyRef, at int64) {
	w.t.Helper()
	name := fmt.Sprintf("%016x.seg", ref.Segment)
	if ref.Kind == relay.BodyFile {
		name = fmt.Sprintf("%016x.body", ref.Segment)
	}
	f, err := os.OpenFile(filepath.Join(w.dir, "bodies", name), os.O_RDWR, 0)
	if err != nil {
		w.t.Fatal(err)
	}
	b := []byte{0}
	if _, err := f.ReadAt(b, at); err != nil {
		w.t.Fatal(err)
	}
	b[0] ^= 0x40
	if _, err := f.WriteAt(b, at); err != nil {
		w.t.Fatal(err)
	}
	if err := f.Close(); err != nil {
		w.t.Fatal(err)
	}
}

// gone takes a message out of what must be delivered: it must be in quarantine.
func (w *ward) gone(id ids.Message) {
	maps.DeleteFunc(w.left, func(r ids.Recipient, _ relay.State) bool { return r.Message == id })
}

var stranger = ids.Message{0: 1, 15: 9}

// breaking is a way to break a queue.
type breaking struct {
	kind Damage
	name string
	do   func(w *ward)
}

// damages break each kind of record that Fsck knows. Several of them at once do not
// hit the same record, but for bad luck.
var damages = []breaking{
	{WaitingWithoutMessage, "waiting key of no message", func(w *ward) {
		key, _ := w.pick(store.SpaceWaiting, nil)
		n, due, _, _, _ := store.ParseWaitingKey(key)
		w.b.Set(store.AppendWaitingKey(nil, n, due, stranger, 0), nil)
	}},
	{WaitingExtra, "second waiting key", func(w *ward) {
		key, _ := w.pick(store.SpaceWaiting, nil)
		n, due, id, index, _ := store.ParseWaitingKey(key)
		w.b.Set(store.AppendWaitingKey(nil, n, due+1000, id, index), nil)
	}},
	{WaitingExtra, "waiting key in another queue", func(w *ward) {
		key, _ := w.pick(store.SpaceWaiting, nil)
		n, due, id, index, _ := store.ParseWaitingKey(key)
		other, _ := w.pick(store.SpaceQueue, func(k, _ []byte) bool { m, _ := store.ParseQueueKey(k); return m != n })
		m, _ := store.ParseQueueKey(other)
		w.b.Delete(key)
		w.b.Set(store.AppendWaitingKey(nil, m, due, id, index), nil)
	}},
	{WaitingMissing, "no waiting key", func(w *ward) {
		key, _ := w.pick(store.SpaceWaiting, nil)
		w.b.Delete(key)
	}},
	{MessageDone, "nobody left", func(w *ward) {
		_, _, id, _ := w.envelopeOf(nil)
		for rcpt := range w.left {
			if rcpt.Message == id {
				w.b.Set(store.AppendStateKey(nil, id, rcpt.Index), appendState(nil, &relay.RecipientState{State: relay.StateDelivered}))
			}
		}
		w.dropWaiting(id)
		w.dropJournal(id)
		w.gone(id)
	}},
	{DeadlineMissing, "no deadline", func(w *ward) {
		key, _ := w.pick(store.SpaceDeadline, nil)
		w.b.Delete(key)
	}},
	{DeadlineExtra, "second deadline", func(w *ward) {
		key, _ := w.pick(store.SpaceDeadline, nil)
		due, id, _ := store.ParseDeadlineKey(key)
		w.b.Set(store.AppendDeadlineKey(nil, due-5, id), nil)
	}},
	{DeadlineExtra, "deadline of no message", func(w *ward) {
		w.b.Set(store.AppendDeadlineKey(nil, store.Milliseconds(w.clock.Now()), stranger), nil)
	}},
	{StateWithoutMessage, "state of no message", func(w *ward) {
		w.b.Set(store.AppendStateKey(nil, stranger, 3), appendState(nil, &relay.RecipientState{State: relay.StateHeld}))
	}},
	{StateExtra, "state of no recipient", func(w *ward) {
		_, _, id, _ := w.envelopeOf(nil)
		w.b.Set(store.AppendStateKey(nil, id, 99), appendState(nil, &relay.RecipientState{State: relay.StateHeld}))
	}},
	{StateDamaged, "unreadable state of one who waits", func(w *ward) { w.spoilState(relay.StateWaiting) }},
	{StateDamaged, "unreadable state of one who is held", func(w *ward) { w.spoilState(relay.StateHeld) }},
	{EnvelopeDamaged, "unreadable envelope", func(w *ward) {
		key, value, id, _ := w.envelopeOf(nil)
		w.b.Set(key, value[:1+store.RefBytes+3])
		w.gone(id)
	}},
	{EnvelopeDamaged, "unreadable body reference", func(w *ward) {
		key, value, id, _ := w.envelopeOf(nil)
		value[1] = 77
		w.b.Set(key, value)
		w.gone(id)
	}},
	{QueueMissing, "work queue without a record", func(w *ward) {
		key, _ := w.pick(store.SpaceWaiting, nil)
		n, _, _, _, _ := store.ParseWaitingKey(key)
		w.b.Delete(store.AppendQueueKey(nil, n))
	}},
	{QueueDamaged, "unreadable record of a work queue", func(w *ward) {
		key, _ := w.pick(store.SpaceQueue, nil)
		w.b.Set(key, []byte{9, 9, 9})
	}},
	{RuleDamaged, "unreadable rule", func(w *ward) { w.b.Set(store.AppendRuleKey(nil, ids.Hold{5}), []byte{77}) }},
	{HeldMissing, "held and not in the index", func(w *ward) {
		key, _ := w.pick(store.SpaceHeld, nil)
		w.b.Delete(key)
	}},
	{HeldExtra, "in the index and not held", func(w *ward) {
		key, _ := w.pick(store.SpaceWaiting, nil)
		_, _, id, index, _ := store.ParseWaitingKey(key)
		w.b.Set(store.AppendHeldKey(nil, ids.Hold{}, id, index), nil)
	}},
	{HeldWithoutRule, "held by no rule", func(w *ward) {
		key, value := w.pick(store.SpaceState, func(k, v []byte) bool { s, err := parseState(v); return err == nil && s.State == relay.StateHeld })
		id, index, _ := store.ParseStateKey(key)
		s, err := parseState(value)
		if err != nil {
			w.t.Fatal(err)
		}
		w.b.Delete(store.AppendHeldKey(nil, s.Held.Rule, id, index))
		s.Held.Rule = ids.Hold{8}
		w.b.Set(key, appendState(nil, &s))
		w.b.Set(store.AppendHeldKey(nil, s.Held.Rule, id, index), nil)
	}},
	{FloorHigh, "floor above waiting mail", func(w *ward) {
		key, _ := w.pick(store.SpaceWaiting, nil)
		n, due, _, _, _ := store.ParseWaitingKey(key)
		value, err := w.snap.Get(store.AppendQueueKey(nil, n), nil)
		if err != nil {
			w.t.Fatal(err)
		}
		k, _, err := parseQueue(value)
		if err != nil {
			w.t.Fatal(err)
		}
		w.b.Set(store.AppendQueueKey(nil, n), appendQueue(nil, &k, due+1))
	}},
	{FloorHigh, "floor above a deadline", func(w *ward) {
		w.b.Set(store.KeyDeadlines, appendFloor(nil, 1<<50))
	}},
	{FloorDamaged, "unreadable floor", func(w *ward) { w.b.Set(store.KeyDeadlines, []byte{1, 2, 3}) }},
	{JournalWithoutMessage, "journal of no message", func(w *ward) {
		w.b.Set(store.AppendAttemptKey(nil, stranger, 0), appendAttempt(nil, 1, []WorkRecipient{{Index: 0}}, &relay.Attempt{}))
	}},
	{JournalDamaged, "unreadable journal", func(w *ward) {
		key, _ := w.pick(store.SpaceAttempt, nil)
		w.b.Set(key, []byte{8})
	}},
	{JournalDamaged, "journal of a recipient that is not there", func(w *ward) {
		key, value := w.pick(store.SpaceAttempt, nil)
		id, _, _ := store.ParseStateKey(key)
		j, err := parseAttempt(id, value)
		if err != nil {
			w.t.Fatal(err)
		}
		w.b.Set(key, appendAttempt(nil, j.queue, []WorkRecipient{{Index: 500}}, &j.attempt))
	}},
	{BodyMissing, "body file gone", func(w *ward) {
		_, _, id, ref := w.envelopeOf(inFile)
		if err := os.Remove(filepath.Join(w.dir, "bodies", fmt.Sprintf("%016x.body", ref.Segment))); err != nil {
			w.t.Fatal(err)
		}
		w.gone(id)
	}},
	{BodyRange, "body behind the end of its segment", func(w *ward) {
		key, value, id, _ := w.envelopeOf(inSegment)
		binary.BigEndian.PutUint64(value[1+9:], 1<<40) // its offset
		w.b.Set(key, value)
		w.gone(id)
	}},
	{BodyDamaged, "flipped bit in a segment", func(w *ward) {
		_, _, id, ref := w.envelopeOf(inSegment)
		w.flip(ref, ref.Offset+20)
		w.gone(id)
	}},
	{BodyDamaged, "flipped bit in a body file", func(w *ward) {
		_, _, id, ref := w.envelopeOf(inFile)
		w.flip(ref, ref.Offset+100_000)
		w.gone(id)
	}},
	{BodyHeader, "flipped bit in a body's header", func(w *ward) {
		_, _, _, ref := w.envelopeOf(inSegment)
		w.flip(ref, ref.Offset-20)
	}},
	{FileUnreferenced, "segment of nothing", func(w *ward) {
		if err := os.WriteFile(filepath.Join(w.dir, "bodies", "00000000000000f1.seg"), make([]byte, 9999), 0o600); err != nil {
			w.t.Fatal(err)
		}
	}},
	{InboundDamaged, "unreadable inbound mail", func(w *ward) {
		key, _ := w.pick(store.SpaceInbound, nil)
		w.b.Set(key, []byte{1})
	}},
	{EventsDamaged, "unreadable newest events", func(w *ward) {
		key, _, err := w.snap.Last([]byte{store.SpaceOutbox}, nil)
		if err != nil {
			w.t.Fatal(err)
		}
		w.b.Set(key, []byte("nonsense"))
	}},
	{EventsDamaged, "events missing in between", func(w *ward) {
		last, _, _ := w.snap.Last([]byte{store.SpaceOutbox}, nil)
		first := true
		key, _ := w.pick(store.SpaceOutbox, func(k, _ []byte) bool {
			suits := !first && !bytes.Equal(k, last)
			first = false
			return suits
		})
		w.b.Delete(key)
	}},
	{EventsDamaged, "unreadable record of the outbox", func(w *ward) { w.b.Set(store.KeyOutbox, []byte{0}) }},
	{UnknownKey, "unknown space", func(w *ward) { w.b.Set([]byte("zebra"), []byte("stripes")) }},
	{UnknownKey, "unknown record of the store", func(w *ward) { w.b.Set([]byte("\x00what"), nil) }},
	{UnknownKey, "waiting key of another length", func(w *ward) { w.b.Set([]byte("w123"), nil) }},
	{UnknownKey, "envelope's key of another length", func(w *ward) { w.b.Set([]byte("mmm"), []byte{1}) }},
}

func (w *ward) dropWaiting(id ids.Message) {
	_ = w.snap.Iterate([]byte{store.SpaceWaiting}, nil, true, func(k, _ []byte) bool {
		if _, _, of, _, _ := store.ParseWaitingKey(k); of == id {
			w.b.Delete(bytes.Clone(k))
		}
		return true
	})
}

func (w *ward) dropJournal(id ids.Message) {
	_ = w.snap.Iterate(store.AppendAttemptPrefix(nil, id), nil, true, func(k, _ []byte) bool {
		w.b.Delete(bytes.Clone(k))
		return true
	})
}

func (w *ward) spoilState(state relay.State) {
	key, _ := w.pick(store.SpaceState, func(k, v []byte) bool { s, err := parseState(v); return err == nil && s.State == state })
	w.b.Set(key, []byte{1, 2})
}
