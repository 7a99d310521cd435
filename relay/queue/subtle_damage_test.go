package queue

import (
	"google.golang.org/protobuf/encoding/protowire"

	"github.com/relais-mta/relais/relay/store"
	"github.com/relais-mta/relais/shared/ids"
)

// subtleDamages leave records that can be read in part, or that belong together.
var subtleDamages = []breaking{
	{JournalDamaged, "journal cut short behind a field", func(w *ward) {
		key, value := w.pick(store.SpaceAttempt, nil)
		id, _, _ := store.ParseStateKey(key)
		for n := len(value) - 1; ; n-- { // the longest part that reads as fields and lacks what it must have
			if _, err := parseAttempt(id, value[:n]); err != nil && fields(value[1:n], func(protowire.Number, uint64, []byte) {}) == nil {
				w.b.Set(key, value[:n])
				return
			}
		}
	}},
	{JournalDamaged, "journal of another work queue", func(w *ward) {
		key, value := w.pick(store.SpaceAttempt, nil)
		id, _, _ := store.ParseStateKey(key)
		j, err := parseAttempt(id, value)
		if err != nil {
			w.t.Fatal(err)
		}
		var to []WorkRecipient
		for _, index := range j.indexes {
			to = append(to, WorkRecipient{Index: index})
		}
		w.b.Set(key, appendAttempt(nil, j.queue+100, to, &j.attempt))
	}},
	{EnvelopeDamaged, "unreadable envelope of a journalled attempt", func(w *ward) {
		key, _ := w.pick(store.SpaceAttempt, nil)
		id, _, _ := store.ParseStateKey(key)
		w.b.Set(store.AppendMessageKey(nil, id), []byte{77})
		w.gone(id)
	}},
	{EnvelopeDamaged, "envelope cut short behind a field", func(w *ward) {
		key, value, id, _ := w.envelopeOf(nil)
		_, due, err := parseEnvelope(id, value)
		if err != nil {
			w.t.Fatal(err)
		}
		w.b.Set(key, value[:len(value)-len(putUint(nil, envFirstDue, uint64(due)))])
		w.gone(id)
	}},
	{StateDamaged, "unreadable state of a journalled attempt", func(w *ward) {
		key, _ := w.pick(store.SpaceAttempt, nil)
		id, index, _ := store.ParseStateKey(key)
		w.b.Set(store.AppendStateKey(nil, id, index), []byte{1, 2})
	}},
	{WaitingExtra, "record of a work queue that names another domain", func(w *ward) {
		key, _ := w.pick(store.SpaceWaiting, nil)
		n, _, _, _, _ := store.ParseWaitingKey(key)
		value, err := w.snap.Get(store.AppendQueueKey(nil, n), nil)
		if err != nil {
			w.t.Fatal(err)
		}
		k, floor, err := parseQueue(value)
		if err != nil {
			w.t.Fatal(err)
		}
		k.Domain = "d9.example"
		w.b.Set(store.AppendQueueKey(nil, n), appendQueue(nil, &k, floor))
	}},
	{WaitingExtra, "waiting key of one who has an end", func(w *ward) {
		due := store.Milliseconds(w.clock.Now())
		key, value := w.pick(store.SpaceState, func(k, v []byte) bool { s, err := parseState(v); return err == nil && s.State.Final() })
		id, index, _ := store.ParseStateKey(key)
		value, err := w.snap.Get(store.AppendMessageKey(nil, id), value[:0])
		if err != nil {
			w.t.Fatal(err)
		}
		env, _, err := parseEnvelope(id, value)
		if err != nil {
			w.t.Fatal(err)
		}
		record, _ := w.pick(store.SpaceQueue, func(_, v []byte) bool { k, _, _ := parseQueue(v); return k == keyOf(env, int(index)) })
		n, _ := store.ParseQueueKey(record)
		w.b.Set(store.AppendWaitingKey(nil, n, due, id, index), nil)
	}},
	{GivenDamaged, "unreadable offer to another relay", func(w *ward) {
		_, _, id, _ := w.envelopeOf(nil)
		w.b.Set(store.AppendTransferKey(nil, store.SpaceGiven, ids.Node{7}, id, 1), []byte{9})
	}},
	{TakenDamaged, "unreadable memory of a message that came", func(w *ward) {
		_, _, id, _ := w.envelopeOf(nil)
		w.b.Set(store.AppendTransferKey(nil, store.SpaceTaken, ids.Node{7}, id, 1), []byte{9})
	}},
	{UnknownKey, "key of another length of a message on its way", func(w *ward) { w.b.Set([]byte("g123"), []byte{1}) }},
	{UnknownKey, "key of another length of a work queue", func(w *ward) { w.b.Set([]byte("q\x00"), []byte{1}) }},
	{BodyMissing, "body reference to a file that never was", func(w *ward) {
		key, value, id, ref := w.envelopeOf(inFile)
		ref.Segment += 1 << 20
		copy(value[1:], store.AppendRef(nil, ref))
		w.b.Set(key, value)
		w.gone(id)
	}},
}
