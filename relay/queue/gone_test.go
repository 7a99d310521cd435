package queue

import (
	"context"
	"strings"
	"testing"
	"time"

	"github.com/relais-mta/relais/relay"
	"github.com/relais-mta/relais/relay/outbox"
	"github.com/relais-mta/relais/relay/store"
	"github.com/relais-mta/relais/shared/fault"
)

// TestAMessageOfSeveralQueuesGoesInOneTransaction: what another relay has is gone
// from here in the transaction that remembers it. Remains would answer for the
// message when that relay hands it back after a crash, and lose it.
func TestAMessageOfSeveralQueuesGoesInOneTransaction(t *testing.T) {
	w := newWay(t)
	env := w.giver.accept("a@one.example", "b@two.example", "c@one.example")
	w.claim()
	if len(w.parcels) != 1 || len(w.parcels[0].works) != 2 {
		t.Fatalf("claimed %d parcels, want one of two works", len(w.parcels))
	}
	var ends []*ending
	for _, work := range w.parcels[0].works {
		ends = append(ends, &ending{w: work, results: movedResults(work, &Note{Class: classMoved})})
	}
	left := make(chan error, 1)
	w.giver.q.commitEndings(context.Background(), ends, func(err error) {
		if err != nil {
			left <- err
			return
		}
		snap := w.giver.st.Snapshot() // as a crash at this moment leaves it
		defer snap.Close()
		_, err = snap.Get(store.AppendMessageKey(nil, env.ID), nil)
		left <- err
	})
	if err := <-left; !fault.Is(err, fault.NotFound) {
		t.Errorf("the message is still there: %v", err)
	}
	w.giver.nothing()
	if s := w.giver.q.Summary(); s.Messages != 0 || s.InFlight != 0 || s.Waiting != 0 {
		t.Errorf("the books are wrong: %+v", s)
	}
}

// TestMailComesBackWhileItIsLookedAt: mail goes to another relay and comes back
// while somebody here still looks at the first of the two.
func TestMailComesBackWhileItIsLookedAt(t *testing.T) {
	w := newWay(t)
	env := w.giver.accept("a@one.example")
	w.giver.q.mu.Lock()
	looked := w.giver.q.messageFor(env.ID)
	w.giver.q.mu.Unlock()
	for _, step := range w.steps() {
		step()
	}
	back := &way{t: t, giver: w.taker, taker: w.giver}
	back.claim()
	if err := back.giver.q.Offer(giverNode, back.parcels); err != nil {
		t.Fatal(err)
	}
	back.write()
	back.answers = back.receiveAs(takerNode, 1, func(*relay.Envelope) error { return nil })
	work := w.giver.take(1)
	if work.Env.Hops != 2 {
		t.Errorf("what is delivered went %d ways, want that of two", work.Env.Hops)
	}
	w.giver.q.mu.Lock()
	w.giver.q.unref(looked, 1)
	w.giver.q.mu.Unlock()
	if _, err := w.giver.st.ReadBody(work.Env.Body, nil); err != nil {
		t.Error(err)
	}
	w.giver.delivered(work, w.giver.begin(work))
	if s := w.giver.q.Summary(); s.Messages != 0 || w.giver.q.fresh.bytes != 0 || w.giver.q.fresh.first != nil {
		t.Errorf("in memory are left %+v, and %d bytes of envelopes", s, w.giver.q.fresh.bytes)
	}
}

// TestManyRecipientsOfOneDomainEndTogether: their states and events, with the
// replies that they got, are more than one transaction holds.
func TestManyRecipientsOfOneDomainEndTogether(t *testing.T) {
	const recipients = 3000
	f := newFixture(t).open()
	env := f.accept(numbered("user%d@one.example", recipients)...)
	reply := relay.Reply{Code: 450, Enhanced: "4.2.1", Text: strings.Repeat("later ", 150)}
	for range recipients / 200 {
		w := f.take(200)
		results := all(w, relay.StateWaiting, outbox.Deferred, f.clock.Now().Add(time.Hour))
		for i := range results {
			results[i].State.LastReply = reply
		}
		f.finish(w, nil, results)
	}
	hold := Operation{Action: ActionHold, Actor: "ada", Reason: "a test"}
	if p, err := f.q.Operate(t.Context(), hold, func(Progress) {}); err != nil || p.Done != recipients {
		t.Fatalf("held %d of %d: %v", p.Done, recipients, err)
	}
	f.clock.Add(25 * time.Hour)
	n := 0
	f.until("the deadline", func() bool {
		for _, w := range f.q.PopExpired(f.clock.Now(), 10) {
			n += len(w.Recipients)
			f.finish(w, nil, all(w, relay.StateExpired, outbox.Expired, time.Time{}))
		}
		return n > 0
	})
	if n != recipients {
		t.Errorf("%d of %d recipients expired", n, recipients)
	}
	if err := f.st.Barrier(func() {}); err != nil {
		t.Fatal(err)
	}
	f.empty()
	if _, err := f.q.Show(env.ID); !fault.Is(err, fault.NotFound) {
		t.Errorf("the message is still there: %v", err)
	}
}

// TestInDoubtOnAClockThatWasSetBack: the retry is due before anything that the last
// run had in its queue.
func TestInDoubtOnAClockThatWasSetBack(t *testing.T) {
	f := newFixture(t)
	f.sizes.floorEvery = 1
	f.open()
	for range 3 {
		f.accept("a@one.example")
		f.clock.Add(time.Hour)
		w := f.take(1)
		f.delivered(w, f.begin(w))
	}
	env := f.accept("b@one.example")
	f.begin(f.take(1))
	f.clock.Add(-3 * time.Hour)
	f.reopen()
	f.clock.Add(time.Hour)
	if w := f.take(1); w.Env.ID != env.ID || w.Recipients[0].State.InDoubt != 1 {
		t.Errorf("tried again is %s, %+v", w.Env.ID, w.Recipients)
	}
}

// TestReportsOfAStartAreCountedOnce: they are in the snapshot that is counted.
func TestReportsOfAStartAreCountedOnce(t *testing.T) {
	f := newFixture(t)
	f.policy.InDoubtRetries = 0
	f.tell = func(env *relay.Envelope, _ []Result) []Mail {
		return []Mail{{Env: f.envelope("sender@example.com"), Body: f.body("report on " + env.ID.String())}}
	}
	f.open()
	f.accept("a@one.example")
	f.begin(f.take(1))
	f.reopen()
	f.eventually("the count", func() bool { return f.q.Summary().Counted })
	if n := f.q.Summary().Waiting; n != 1 {
		t.Errorf("%d recipients wait, want that of the report", n)
	}
	f.q.Queues(func(i QueueInfo) bool {
		if i.Key.Domain == "example.com" && i.Waiting != 1 {
			t.Errorf("%d recipients wait in its work queue, want 1", i.Waiting)
		}
		return true
	})
}

// TestARuleThatIsReleasedDuringTheCount: what it held at the start is counted when
// nothing of it is left.
func TestARuleThatIsReleasedDuringTheCount(t *testing.T) {
	f := newFixture(t).open()
	f.eventually("the count", func() bool { return f.q.Summary().Counted })
	rule := f.put(Match{Domain: "one.example"})
	f.accept("a@one.example", "b@one.example")
	f.q.mu.Lock() // as at a start
	snap := f.q.beginCount()
	f.q.mu.Unlock()
	f.remove(rule)
	f.q.done.Add(1)
	f.q.countWaiting(snap)
	if s := f.q.Summary(); !s.Counted || s.Held != 0 || s.Waiting != 2 {
		t.Errorf("held %d and waiting %d, want 0 and 2", s.Held, s.Waiting)
	}
}

// TestARuleWhoseMailIsInOtherHandsHoldsUpNoOther: what another relay was offered
// cannot be released before that relay has answered. Other rules hold and release
// meanwhile.
func TestARuleWhoseMailIsInOtherHandsHoldsUpNoOther(t *testing.T) {
	w := newWay(t)
	f := w.giver
	offered := f.put(Match{Domain: "one.example"})
	f.accept("a@one.example")
	w.claim()
	w.offer()
	if err := f.q.RemoveHold(offered, "ada"); err != nil {
		t.Fatal(err)
	}
	f.eventually("the rule to be looked at", func() bool {
		f.q.mu.Lock()
		defer f.q.mu.Unlock()
		return f.q.rules[offered].use.pause > 0
	})
	f.accept("b@two.example")
	other, err := f.q.PutHold(HoldRule{Match: Match{Domain: "two.example"}, Cause: "a test", Owner: "operator"})
	if err != nil {
		t.Fatal(err)
	}
	f.eventually("what waited to be held", func() bool { return f.index(other) == 1 })
	if err := f.q.RemoveHold(other, "ada"); err != nil {
		t.Fatal(err)
	}
	f.eventually("it to be released", func() bool { return len(f.q.Holds()) == 1 })
	if h := f.q.Holds(); h[0].ID != offered || !h[0].Ending || h[0].Held != 1 {
		t.Errorf("the rule whose mail was offered: %+v", h)
	}
	if err := f.q.TakeBack(w.parcels); err != nil {
		t.Fatal(err)
	}
	f.swept()
	if got := f.states(); got[relay.StateWaiting] != 2 || got[relay.StateHeld] != 0 {
		t.Errorf("in the end %v", got)
	}
}
