package queue

import (
	"testing"
	"time"

	"github.com/relais-mta/relais/relay"
	"github.com/relais-mta/relais/relay/store"
	"github.com/relais-mta/relais/shared/ids"
)

// TestDamagedMailHoldsUpNothing: a damaged envelope and a damaged state at the head
// of a work queue wait for the repair. What stands behind them is delivered, held,
// released, purged, handed over and listed.
func TestDamagedMailHoldsUpNothing(t *testing.T) {
	f := newFixture(t)
	f.sizes.floorEvery = 1
	f.open()
	to := func() *relay.Envelope {
		f.clock.Add(time.Millisecond)
		return f.accept("a@one.example")
	}
	envelope, state := to(), to()
	b := f.st.NewBatch()
	b.Set(store.AppendMessageKey(nil, envelope.ID), []byte{99})
	b.Set(store.AppendStateKey(nil, state.ID, 0), []byte{99})
	if err := f.st.Commit(t.Context(), b); err != nil {
		t.Fatal(err)
	}
	f.reopen()
	for range 3 {
		to()
	}
	for range 3 {
		w := f.take(1)
		if w.Env.ID == envelope.ID || w.Env.ID == state.ID {
			t.Fatalf("took the damaged %s", w.Env.ID)
		}
		f.delivered(w, f.begin(w))
	}

	held := to()
	rule := f.put(Match{Domain: "one.example"})
	f.remove(rule)
	if list, next, err := f.q.List(Filter{}, 10); err != nil || next != (ids.Message{}) || len(list) != 2 || list[0].Env.ID != state.ID || list[0].Damaged == "" || list[1].Env.ID != held.ID || list[1].Damaged != "" {
		t.Errorf("listed %+v, %v", list, err)
	}
	parcels, drained, err := f.q.Claim(f.numbers(), true, 10, anything)
	if err != nil || !drained || len(parcels) != 1 {
		t.Fatalf("claimed %d, drained %v, %v", len(parcels), drained, err)
	}
	if err := f.q.TakeBack(parcels); err != nil {
		t.Fatal(err)
	}
	p, err := f.q.Operate(t.Context(), Operation{Action: ActionPurge, Actor: "ada"}, func(Progress) {})
	if err != nil || p.Done != 1 || !p.Finished {
		t.Errorf("purged %+v, %v", p, err)
	}

	// The repair finds them, after the queue's floor was stored and it was idle.
	f.clock.Add(time.Hour)
	w := f.takeFrom(string(to().Recipients[0].Address.Domain))
	f.delivered(w, f.begin(w))
	for range 2 {
		f.q.dropIdle()
		f.clock.Add(2 * idleBeforeDrop)
	}
	found := map[Damage]int{}
	count, err := Fsck(t.Context(), f.st, FsckConfig{Live: true, Now: f.clock.Now, Logger: f.log(), Report: func(f Finding) { found[f.Kind]++ }})
	if err != nil || len(found) != 2 || found[EnvelopeDamaged] != 1 || found[StateDamaged] != 1 || count.Waiting != 2 {
		t.Errorf("found %v, %d waiting, %v", found, count.Waiting, err)
	}
}
