package queue

import (
	"testing"
	"time"

	"github.com/relais-mta/relais/relay"
	"github.com/relais-mta/relais/relay/outbox"
	"github.com/relais-mta/relais/relay/store"
	"github.com/relais-mta/relais/shared/policy"
)

// TestWhatHappensWhileAPageIsReadIsInTheWindow holds a page between its
// snapshot and its arrival and lets mail come, go and come back meanwhile.
func TestWhatHappensWhileAPageIsReadIsInTheWindow(t *testing.T) {
	f := newFixture(t).open()
	stays := f.accept("a@one.example")
	f.clock.Add(time.Millisecond)
	ends := f.accept("b@one.example")
	f.clock.Add(time.Millisecond)
	returns := f.accept("c@one.example")
	var wq *workQueue
	var works []*Work
	for range 3 {
		works = append(works, f.take(1))
	}
	f.q.Return(works[0])
	// The window is cut to nothing, as it is when memory is short.
	var snap *store.Snapshot
	if err := f.st.Barrier(func() {
		f.q.mu.Lock()
		defer f.q.mu.Unlock()
		wq = works[0].wq
		wq.end, _ = wq.win.shrink(0, func(it item) {
			f.q.inMemory--
			f.q.forget(it)
		})
		wq.complete, wq.paging, wq.wanted, wq.pageEnd = false, true, true, wq.end
		snap = f.st.Snapshot()
	}); err != nil {
		t.Fatal(err)
	}
	f.delivered(works[1], nil)
	f.q.Return(works[2])
	f.clock.Add(time.Millisecond)
	comes := f.accept("d@one.example")
	f.q.readPage(snap, wq, 100)
	snap.Close()
	var got []string
	for {
		w, ok := takeLoaded(f.q, wq.number, f.clock.Now(), 10)
		if !ok {
			break
		}
		got = append(got, w.Env.ID.String())
		f.finish(w, nil, all(w, relay.StateDelivered, outbox.Delivered, time.Time{}))
	}
	want := []string{stays.ID.String(), returns.ID.String(), comes.ID.String()}
	if len(got) != 3 || got[0] != want[0] || got[1] != want[1] || got[2] != want[2] {
		t.Errorf("the window gave %v, want %v (ended meanwhile: %s)", got, want, ends.ID)
	}
	f.empty()
}

func TestFairLengthFillsTheTotal(t *testing.T) {
	for _, tc := range []struct {
		lengths     []int
		total, want int
	}{
		{[]int{10, 10, 10}, 30, 30},
		{[]int{100, 10, 10}, 60, 40},
		{[]int{100, 100, 1}, 51, 25},
		{[]int{5, 5, 5}, 1, 1},
		{nil, 10, 10},
	} {
		if got := fairLength(tc.lengths, tc.total); got != tc.want {
			t.Errorf("fairLength(%v, %d) = %d, want %d", tc.lengths, tc.total, got, tc.want)
		}
	}
}

// A floor must stay below what is in flight: a crash makes that wait again.
func TestFloorsStayBelowWhatIsInFlight(t *testing.T) {
	f := newFixture(t)
	f.sizes.floorEvery = 2
	f.open()
	slow := f.envelope("slow@one.example")
	slow.ExpiresAt = slow.AcceptedAt.Add(2 * time.Hour)
	if err := f.q.Accept(t.Context(), slow, f.body("x")); err != nil {
		t.Fatal(err)
	}
	if w := f.take(1); w.Env.ID != slow.ID {
		t.Fatalf("took %s", w.Env.ID)
	}
	f.clock.Add(4 * time.Hour)
	if got := f.q.PopExpired(f.clock.Now(), 10); len(got) != 0 {
		t.Fatalf("%s expired in flight", got[0].Env.ID)
	}
	for range 10 {
		f.accept("quick@one.example")
		f.delivered(f.take(1), nil)
	}
	f.reopen()
	f.loaded()
	if due, ok := f.q.NextDeadline(); !ok || !due.Equal(slow.ExpiresAt) {
		t.Errorf("the deadline of what was in flight is %v, %v, want %v", due, ok, slow.ExpiresAt)
	}
	if w := f.take(1); w.Env.ID != slow.ID {
		t.Errorf("took %s, want what was in flight", w.Env.ID)
	}
}

// When the clock is set back, new work is due before the floor.
func TestAClockSetBackHidesNoMail(t *testing.T) {
	f := newFixture(t)
	f.sizes.floorEvery = 2
	f.open()
	for range 10 {
		f.accept("quick@one.example")
		f.delivered(f.take(1), nil)
	}
	f.clock.Add(-30 * 24 * time.Hour)
	late := f.accept("late@one.example")
	f.reopen()
	f.loaded()
	if w := f.take(1); w.Env.ID != late.ID {
		t.Errorf("took %s, want %s", w.Env.ID, late.ID)
	}
	if due, ok := f.q.NextDeadline(); !ok || !due.Equal(late.ExpiresAt) {
		t.Errorf("the next deadline is %v, %v, want %v", due, ok, late.ExpiresAt)
	}
}

// After a start all queues of a backlog want their heads. Those of transactional
// mail, and the deadlines, are read first; the others not never.
func TestPagesOfTransactionalMailAreReadFirst(t *testing.T) {
	q := &Queue{deadlines: &workQueue{}, pageWake: make(chan struct{}, 1)}
	want := func(n int, kind policy.StreamKind) {
		for range n {
			q.wantPage(&workQueue{number: 1, key: Key{Kind: kind}})
		}
	}
	next := func(urgent, rest int) {
		t.Helper()
		for i, wq := range q.nextPages() {
			if first := wq == q.deadlines || wq.key.Kind == policy.Transactional; first != (i < urgent) {
				t.Fatalf("page %d of %d urgent ones and %d others is urgent: %v", i, urgent, rest, first)
			}
			if i >= urgent+rest {
				t.Fatalf("more than %d pages", urgent+rest)
			}
		}
	}
	want(1000, policy.Bulk)
	want(3, policy.Transactional)
	q.wantPage(q.deadlines)
	next(4, 252)
	want(1000, policy.Transactional)
	next(192, 64)
	if left := len(q.pageList) + len(q.urgentPages); left != 1000-252-64+1000-192 {
		t.Errorf("%d are left", left)
	}
}
