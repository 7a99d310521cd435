package engine

import (
	"sync/atomic"
	"testing"
	"time"

	"github.com/relais-mta/relais/relay"
	"github.com/relais-mta/relais/relay/outbox"
	"github.com/relais-mta/relais/relay/queue"
	"github.com/relais-mta/relais/relay/schedule"
	"github.com/relais-mta/relais/relay/store"
	"github.com/relais-mta/relais/shared/lab"
	"github.com/relais-mta/relais/shared/policy"
)

// haltingDisk takes no writes while it is halted, and loses none.
type haltingDisk struct {
	store.FileSystem
	halted atomic.Bool
}

func (d *haltingDisk) Space(dir string) (store.Space, error) {
	s, err := d.FileSystem.Space(dir)
	s.ReadOnly = s.ReadOnly || d.halted.Load()
	return s, err
}

// TestMailThatCannotBeSentWaitsForTheDisk has a session for mail whose sending
// domain went out of the view: it takes no second message before the end of the
// first is stored, however many there are.
func TestMailThatCannotBeSentWaitsForTheDisk(t *testing.T) {
	const messages = 20
	disk := &haltingDisk{FileSystem: store.OS()}
	w := newWorld(t, nil)
	w.close()
	w.fs = disk
	w.open()
	w.run(time.Second)
	var envs []*relay.Envelope
	for i := range messages {
		envs = append(envs, w.accept(func(e *relay.Envelope) { e.From = "gone.test" }, w.at(lab.Google, i, lab.Accept)))
	}
	disk.halted.Store(true)
	defer disk.halted.Store(false) // or closing would wait for it
	w.view(func(d *policy.Document) { d.Delivery.MaxSessions = 1 }, first)
	w.until("a message in hand", func() bool { return w.queue.Summary().InFlight > 0 })
	tick := time.NewTicker(5 * time.Millisecond)
	defer tick.Stop()
	for range 100 {
		<-tick.C
		if n := w.queue.Summary().InFlight; n > 1 {
			t.Fatalf("%d messages are in the hands of one session", n)
		}
	}
	disk.halted.Store(false)
	for _, env := range envs {
		if e := w.event(env, outbox.Deferred); e.Phase != relay.PhaseLocal {
			t.Errorf("deferred with %+v", e)
		}
	}
}

// TestPinnedWorkExpires: greylisted mail that waits for its former source ends at
// its deadline, whatever holds that source.
func TestPinnedWorkExpires(t *testing.T) {
	w := newWorld(t, nil, first, second)
	w.stop() // so that the lane of the source takes nothing
	env := w.accept(func(e *relay.Envelope) { e.ExpiresAt = e.AcceptedAt.Add(5 * time.Minute) }, w.at(lab.Free, 0, lab.Accept))
	w.until("the deadline in memory", func() bool { // a page of deadlines may be under way
		_, ok := w.queue.NextDeadline()
		return ok
	})
	take := func() *queue.Work {
		t.Helper()
		var work *queue.Work
		w.until("the message in hand", func() bool {
			w.queue.Queues(func(info queue.QueueInfo) bool {
				work, _ = w.queue.Take(info.Number, w.now(), 1)
				return work == nil
			})
			return work != nil
		})
		if !w.queue.Load(work) {
			t.Fatal("the message cannot be loaded")
		}
		return work
	}
	work := take()
	state := work.Recipients[0].State
	state.Next, state.Sticky = w.now(), second.Bind
	stored := make(chan error, 1)
	w.queue.Finish(work, nil, []queue.Result{{State: state}}, nil, func(err error) { stored <- err })
	if err := <-stored; err != nil {
		t.Fatal(err)
	}
	lane := schedule.Lane{Source: first.ID, Provider: lab.Free}
	pin := func(now time.Time) (*queue.Work, bool) {
		work := take()
		w.engine.mu.Lock()
		defer w.engine.mu.Unlock()
		return work, w.engine.pin(work, lane, now)
	}
	work, pinned := pin(env.ExpiresAt)
	if pinned {
		t.Fatal("mail past its deadline waits for a source")
	}
	w.queue.Return(work)
	if _, pinned = pin(w.now()); !pinned {
		t.Fatal("the mail does not wait for its source")
	}
	w.engine.expire(env.ExpiresAt.Add(-time.Millisecond))
	if n := w.queue.Summary().InFlight; n != 1 {
		t.Errorf("%d in flight before the deadline, want 1", n)
	}
	w.engine.expire(env.ExpiresAt)
	w.event(env, outbox.Expired)
	w.gone(env)
	if n := w.engine.pinnedWork.Load(); n != 0 || len(w.engine.pinned) != 0 {
		t.Errorf("%d pieces of work are pinned still", n)
	}
}
