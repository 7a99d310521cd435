package queue

import (
	"context"
	"io"
	"testing"
	"time"

	"github.com/relais-mta/relais/relay"
	"github.com/relais-mta/relais/relay/store"
	"github.com/relais-mta/relais/shared/ids"
)

func (f *fixture) spoil(key []byte) {
	f.t.Helper()
	b := f.st.NewBatch()
	b.Set(key, []byte{99})
	if err := f.st.Commit(context.Background(), b); err != nil {
		f.t.Fatal(err)
	}
}

// TestADamagedDeadlineIsReadOnce: damaged mail past its deadline is set aside once,
// and does not keep what stands behind it from expiring.
func TestADamagedDeadlineIsReadOnce(t *testing.T) {
	f := newFixture(t)
	log := &listener{tester: t}
	f.t = log
	f.open()
	damaged := f.accept("a@one.example")
	f.spoil(store.AppendMessageKey(nil, damaged.ID))
	f.reopen()
	f.clock.Add(time.Millisecond)
	whole := f.accept("b@one.example")
	f.loaded()
	f.clock.Add(25 * time.Hour)
	var works []*Work
	for range 5 {
		works = append(works, f.q.PopExpired(f.clock.Now(), 10)...)
		f.clock.Add(time.Minute)
	}
	if len(works) != 1 || works[0].Env.ID != whole.ID {
		t.Fatalf("%d works expired, want that of the message behind the damaged one", len(works))
	}
	f.finish(works[0], nil, all(works[0], relay.StateExpired, 0, time.Time{}))
	if due, ok := f.q.NextDeadline(); ok {
		t.Errorf("the damaged message is looked at again at %s", due)
	}
	if n := log.count("set aside", damaged.ID.String()); n != 1 {
		t.Errorf("the log names the damaged message %d times", n)
	}
	if s := f.q.Summary(); s.SetAside != 1 || s.OldestOverdue != 0 {
		t.Errorf("%d messages are set aside, the oldest is overdue for %s", s.SetAside, s.OldestOverdue)
	}
	f.reopen()
	f.eventually("the damaged message to be found again", func() bool {
		f.q.PopExpired(f.clock.Now(), 10)
		return f.q.Summary().SetAside == 1
	})
}

// TestAnAttemptThatCannotBeReadStaysInDoubt: its message is in nobody's hands until
// the repair, because it may have been delivered, and is listed as in doubt.
func TestAnAttemptThatCannotBeReadStaysInDoubt(t *testing.T) {
	f := newFixture(t).open()
	doubted := f.accept("a@one.example", "b@one.example")
	f.begin(f.take(10))
	f.spoil(store.AppendAttemptKey(nil, doubted.ID, 0))
	f.clock.Add(time.Millisecond)
	other := f.accept("c@one.example")
	f.reopen()
	w := f.take(10)
	if w.Env.ID != other.ID {
		t.Fatalf("took %s, whose attempt cannot be read", w.Env.ID)
	}
	f.delivered(w, f.begin(w))
	f.eventually("the queue to be in memory", func() bool { f.loaded(); return f.q.Summary().Counted })
	f.q.Queues(func(info QueueInfo) bool {
		if w, ok := takeLoaded(f.q, info.Number, f.clock.Now(), 10); ok {
			t.Errorf("took %s", w.Env.ID)
		}
		return true
	})
	if parcels, drained, err := f.q.Claim(f.numbers(), true, 10, anything); err != nil || !drained || len(parcels) != 0 {
		t.Errorf("claimed %d, drained %v, %v", len(parcels), drained, err)
	}
	if p, err := f.q.Operate(t.Context(), Operation{Action: ActionPurge, Actor: "ada"}, func(Progress) {}); err != nil || p.Done != 0 || !p.Finished {
		t.Errorf("purged %+v, %v", p, err)
	}
	list, _, err := f.q.List(Filter{InDoubt: true}, 10)
	if err != nil || len(list) != 1 || list[0].Env.ID != doubted.ID || list[0].Damaged == "" || list[0].States[0].InDoubt != 1 || list[0].States[1].InDoubt != 1 {
		t.Errorf("in doubt are %+v, %v", list, err)
	}
	var left []ids.Message
	count, err := f.q.Export(io.Discard, ExportHeader{}, func(ExportCount) {}, func(id ids.Message, _ error) { left = append(left, id) })
	if err != nil || count.Messages != 0 || count.Damaged != 1 || len(left) != 1 || left[0] != doubted.ID {
		t.Errorf("exported %+v without %v, %v", count, left, err)
	}
	f.clock.Add(25 * time.Hour)
	if works := f.q.PopExpired(f.clock.Now(), 10); len(works) != 0 {
		t.Errorf("%d works expired", len(works))
	}
}
