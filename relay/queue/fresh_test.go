package queue

import (
	"testing"
	"time"

	"github.com/relais-mta/relais/relay"
	"github.com/relais-mta/relais/relay/outbox"
)

// roomForTen is a fixture whose fresh mail has room for ten messages of one
// recipient.
func roomForTen(t *testing.T) *fixture {
	f := newFixture(t)
	f.policy.MaxMemoryRecipients = 1
	f.sizes.minMemory = 10 * freshBytes / freshBytesPerRecipient
	return f.open()
}

// books checks that the list of fresh messages agrees with what is in memory,
// and returns how many messages are.
func (f *fixture) books() (messages int) {
	f.t.Helper()
	q := f.q
	q.mu.Lock()
	defer q.mu.Unlock()
	var bytes int64
	listed := 0
	for m := q.fresh.first; m != nil; m = m.newer {
		if q.live[m.id] != m || m.env == nil || m.flying > 0 {
			f.t.Errorf("message %s is listed: live %v, %d in flight", m.id, q.live[m.id] == m, m.flying)
		}
		bytes += m.freshBytes
		listed++
	}
	if limit := int64(q.memoryLimit()) * freshBytesPerRecipient; bytes != q.fresh.bytes || bytes > limit {
		f.t.Errorf("%d messages count %d bytes, the list says %d, the limit is %d", listed, bytes, q.fresh.bytes, limit)
	}
	for id, m := range q.live {
		if m.flying == 0 && m.pending == 0 && m.freshBytes == 0 {
			f.t.Errorf("message %s is in memory and neither listed nor in flight", id)
		}
	}
	return len(q.live)
}

// takeHeadOf takes work of a domain that is in memory.
func (f *fixture) takeHeadOf(domain string, most int) *Work {
	f.t.Helper()
	var w *Work
	f.q.Queues(func(info QueueInfo) bool {
		if string(info.Key.Domain) == domain {
			w, _ = f.q.Take(info.Number, f.clock.Now(), most)
		}
		return w == nil
	})
	if w == nil {
		f.t.Fatalf("no work for %s", domain)
	}
	return w
}

func TestEnvelopesInMemoryAreBounded(t *testing.T) {
	f := roomForTen(t)
	for range 25 {
		f.accept("a@one.example")
	}
	if n := f.books(); n != 10 {
		t.Errorf("%d messages are in memory, there is room for 10", n)
	}
	loaded := 0
	for range 25 {
		w := f.takeHeadOf("one.example", 1)
		if w.Loaded() {
			loaded++
		}
		if !f.q.Load(w) {
			t.Fatal("work cannot be loaded")
		}
		f.delivered(w, f.begin(w))
		f.books()
	}
	if loaded != 10 {
		t.Errorf("%d messages were delivered without a read, want the 10 that came first", loaded)
	}
	f.empty()
	if n := f.books(); n != 0 || f.q.fresh.first != nil || f.q.fresh.last != nil {
		t.Errorf("%d messages are left in memory", n)
	}
}

func TestMailThatWaitedInVainGivesWayToNewMail(t *testing.T) {
	f := roomForTen(t)
	for range 12 {
		f.accept("a@stuck.example")
	}
	f.accept("a@one.example")
	if w := f.takeHeadOf("one.example", 1); w.Loaded() {
		t.Error("new mail has room although what came before it is fresh")
	} else if !f.q.Load(w) {
		t.Fatal("work cannot be loaded")
	} else {
		f.delivered(w, f.begin(w))
	}
	f.clock.Add(freshPatience)
	for range 3 {
		f.accept("a@two.example")
	}
	if n := f.books(); n != 3 {
		t.Errorf("%d messages are in memory, want the 3 that are new", n)
	}
	for range 3 {
		w := f.takeHeadOf("two.example", 1)
		if !w.Loaded() {
			t.Error("new mail has no room although old mail waits in vain")
		}
		f.q.Return(w)
		f.books()
	}
	// What gave way is delivered all the same.
	for range 12 + 3 {
		w := f.take(1)
		f.delivered(w, f.begin(w))
	}
	f.empty()
	f.books()
}

// Mail that waits in vain is not kept in memory because there is room, where each
// collection of garbage would look at it; and no new message pays for much of it.
func TestMailThatWaitedInVainGivesWayBeforeRoomIsShort(t *testing.T) {
	f := roomForTen(t)
	for range wayFor + 2 {
		f.accept("a@stuck.example")
	}
	f.clock.Add(freshPatience - time.Millisecond)
	f.accept("a@new.example")
	if n := f.books(); n != wayFor+3 {
		t.Errorf("%d messages are in memory, want all %d while none has waited for long", n, wayFor+3)
	}
	f.clock.Add(time.Millisecond)
	for i, want := range []int{2 + 1 + 1, 1 + 2, 1 + 3} { // left of those that wait, and the new ones
		f.accept("a@new.example")
		if n := f.books(); n != want {
			t.Errorf("%d messages are in memory after %d new ones, want %d", n, i+1, want)
		}
	}
	for range wayFor + 2 {
		w := f.takeHeadOf("stuck.example", 1)
		if w.Loaded() || !f.q.Load(w) {
			t.Error("mail that waited in vain is in memory, or cannot be loaded")
		}
		f.delivered(w, f.begin(w))
	}
	for range 4 {
		w := f.takeHeadOf("new.example", 1)
		if !w.Loaded() {
			t.Error("new mail is not in memory")
		}
		f.delivered(w, f.begin(w))
	}
	f.empty()
	f.books()
}

func TestMailForLaterDoesNotWaitInMemory(t *testing.T) {
	f := roomForTen(t)
	env := f.envelope("a@one.example")
	env.NotBefore = f.clock.Now().Add(time.Hour)
	if err := f.q.Accept(t.Context(), env, f.body("Subject: x\r\n\r\nlater")); err != nil {
		t.Fatal(err)
	}
	if n := f.books(); n != 0 {
		t.Errorf("%d messages are in memory", n)
	}
	f.clock.Add(time.Hour)
	w := f.take(1)
	f.delivered(w, f.begin(w))
	f.empty()
}

// A message stays whole while some of its recipients are in flight, and gives
// way with all that wait when they are back.
func TestAMessageOfManyRecipientsGivesWayWhole(t *testing.T) {
	f := roomForTen(t)
	env := f.accept("a@one.example", "b@one.example", "c@two.example", "d@three.example")
	w := f.takeHeadOf("one.example", 2)
	if !w.Loaded() || len(w.Recipients) != 2 {
		t.Fatalf("took %d recipients, loaded: %v", len(w.Recipients), w.Loaded())
	}
	f.books()
	f.delivered(w, f.begin(w))
	if n := f.books(); n != 1 {
		t.Errorf("%d messages are in memory, want the one with recipients that wait", n)
	}
	f.clock.Add(freshPatience)
	for range 10 {
		f.accept("a@four.example")
	}
	f.q.mu.Lock()
	m := f.q.live[env.ID]
	f.q.mu.Unlock()
	if m != nil {
		t.Error("the message did not give way")
	}
	for _, domain := range []string{"two.example", "three.example"} {
		w := f.takeHeadOf(domain, 1)
		if w.Loaded() || !f.q.Load(w) {
			t.Fatal("work is in memory or cannot be loaded")
		}
		f.delivered(w, f.begin(w))
	}
	f.books()
	for range 10 {
		w := f.take(1)
		f.delivered(w, f.begin(w))
	}
	f.empty()
}

// With more queues than recipients may be in memory every queue keeps its head;
// all windows are looked at only now and then.
func TestManyQueuesAreNotTrimmedForEachMessage(t *testing.T) {
	f := newFixture(t)
	f.policy.MaxMemoryRecipients = 1
	f.sizes.minMemory = 10
	f.open()
	const queues = 200
	trims, last := 0, 0
	for _, to := range numbered("a@d%d.example", queues) {
		f.accept(to)
		f.q.mu.Lock()
		if f.q.trimAbove != last && f.q.trimAbove != 0 {
			trims++
		}
		last = f.q.trimAbove
		f.q.mu.Unlock()
	}
	if s := f.q.Summary(); s.InMemory != queues {
		t.Errorf("%d recipients are in memory, want the head of each of the %d queues", s.InMemory, queues)
	}
	if trims == 0 || trims > 20 { // log(200/10) / log(1.25) = 13.4
		t.Errorf("all windows were looked at %d times for %d messages", trims, queues)
	}
	for range queues {
		w := f.take(1)
		f.delivered(w, f.begin(w))
	}
	f.empty()
}

// What comes back after its deadline has to be ended at once: the listener is
// told, and needs no other reason to look.
func TestMailThatComesBackAfterItsDeadlineIsAnnounced(t *testing.T) {
	for name, end := range map[string]func(f *fixture, w *Work){
		"returned": func(f *fixture, w *Work) { f.q.Return(w) },
		"deferred": func(f *fixture, w *Work) {
			f.finish(w, f.begin(w), all(w, relay.StateWaiting, outbox.Deferred, f.clock.Now().Add(time.Hour)))
		},
		"held": func(f *fixture, w *Work) {
			f.finish(w, f.begin(w), all(w, relay.StateHeld, outbox.Deferred, time.Time{}))
		},
	} {
		t.Run(name, func(t *testing.T) {
			told := make(chan struct{}, 1)
			f := newFixture(t)
			f.told = func(n Number) {
				if n == 0 {
					select {
					case told <- struct{}{}:
					default:
					}
				}
			}
			f.open()
			f.loaded()
			f.accept("a@one.example")
			w := f.take(1)
			f.clock.Add(25 * time.Hour)
			if got := f.q.PopExpired(f.clock.Now(), 10); len(got) != 0 {
				t.Fatalf("%d pieces of work expired that are in flight", len(got))
			}
			select {
			case <-told: // of its acceptance
			default:
			}
			end(f, w)
			select {
			case <-told:
			case <-time.After(patience):
				t.Fatal("nobody was told")
			}
			for _, w := range f.q.PopExpired(f.clock.Now(), 10) {
				f.finish(w, nil, all(w, relay.StateExpired, outbox.Expired, time.Time{}))
			}
			f.empty()
		})
	}
}

// The metric "oldest recipient past its deadline" sees mail in every state, and
// is 0 again when the mail has ended.
func TestOverdueMailIsSeenInEveryState(t *testing.T) {
	const life = 24 * time.Hour
	later := func(f *fixture, s relay.State, next time.Time) *Work {
		w := f.take(1)
		f.finish(w, f.begin(w), all(w, s, outbox.Deferred, next))
		return nil
	}
	for name, put := range map[string]func(f *fixture) *Work{
		"in memory": func(*fixture) *Work { return nil },
		"on disk": func(f *fixture) *Work {
			for range 40 {
				f.accept("a@one.example")
			}
			return nil
		},
		"for later": func(f *fixture) *Work { return later(f, relay.StateWaiting, f.clock.Now().Add(2*life)) },
		"held":      func(f *fixture) *Work { return later(f, relay.StateHeld, time.Time{}) },
		"in flight": func(f *fixture) *Work { return f.takeHeadOf("one.example", 1) },
		"in flight from disk": func(f *fixture) *Work {
			f.reopen()
			f.loaded()
			f.counted() // what waits is looked at below
			w := f.takeHeadOf("one.example", 1)
			if w.Loaded() {
				f.t.Fatal("work of a queue that was opened is in memory")
			}
			return w
		},
		"blocked by a failed read": func(f *fixture) *Work {
			f.q.mu.Lock()
			defer f.q.mu.Unlock()
			for _, wq := range f.q.byNumber {
				wq.blockedTo = f.clock.Now().Add(2 * life).UnixMilli()
			}
			return nil
		},
		"behind the window of deadlines": func(f *fixture) *Work {
			for range 20 {
				f.accept("a@one.example")
			}
			return nil
		},
	} {
		t.Run(name, func(t *testing.T) {
			f := newFixture(t)
			f.policy.MaxMemoryRecipients = 1
			f.sizes.minMemory, f.sizes.minPage, f.sizes.maxPage, f.sizes.maxDeadlines = 8, 2, 4, 8
			f.open()
			f.clock.Add(300 * time.Microsecond) // deadlines are kept in milliseconds
			f.accept("a@one.example")
			w := put(f)
			if got := f.q.Summary().OldestOverdue; got != 0 {
				t.Fatalf("overdue by %v before any deadline", got)
			}
			f.clock.Add(life + time.Minute)
			f.eventually("the metric", func() bool { return f.q.Summary().OldestOverdue == time.Minute })
			if w != nil {
				f.q.Return(w)
			}
			f.until("everything to expire", func() bool {
				for _, w := range f.q.PopExpired(f.clock.Now(), 100) {
					f.finish(w, nil, all(w, relay.StateExpired, outbox.Expired, time.Time{}))
				}
				s := f.q.Summary()
				return s.Waiting == 0 && s.OldestOverdue == 0
			})
			f.empty()
		})
	}
}
