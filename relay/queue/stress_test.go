package queue

import (
	"context"
	"fmt"
	"math/rand/v2"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/relais-mta/relais/relay"
	"github.com/relais-mta/relais/relay/outbox"
	"github.com/relais-mta/relais/shared/ids"
)

// TestEveryRecipientEndsOnceUnderConcurrency runs clients, workers and the
// pager against each other with windows of a few recipients, so that windows
// are cut and read while their recipients come and go. A recipient with two
// owners panics (Strict); one without an owner never ends.
func TestEveryRecipientEndsOnceUnderConcurrency(t *testing.T) {
	const clients, messages, workers = 4, 120, 4
	f := newFixture(t)
	f.sizes = sizes{minMemory: 10, minPage: 2, maxPage: 5, maxDeadlines: 8, floorEvery: 3}
	f.policy.MaxMemoryRecipients = 10
	f.clock.now = time.Now()
	f.open()
	var left atomic.Int64
	left.Store(clients * messages * 3)
	var mu sync.Mutex
	ended := map[ids.Recipient]int{}
	allDone := make(chan struct{})
	end := func(id ids.Message, results []Result) {
		mu.Lock()
		defer mu.Unlock()
		for _, r := range results {
			if r.State.State.Final() {
				ended[ids.Recipient{Message: id, Index: r.Index}]++
				if left.Add(-1) == 0 {
					close(allDone)
				}
			}
		}
	}
	var wg sync.WaitGroup
	for c := range clients {
		wg.Go(func() {
			for i := range messages {
				env := f.envelope(fmt.Sprintf("a%d@d%d.example", i, i%3), fmt.Sprintf("b%d@d%d.example", i, i%3), fmt.Sprintf("c@d%d.example", c))
				env.AcceptedAt = env.AcceptedAt.Add(-time.Duration(rand.IntN(30_000)) * time.Millisecond)
				if err := f.q.Accept(context.Background(), env, f.body("x")); err != nil {
					t.Error(err)
				}
			}
		})
	}
	for range workers {
		wg.Go(func() {
			for n := 0; ; n++ {
				select {
				case <-allDone:
					return
				default:
				}
				f.stressOnce(t, n, end)
			}
		})
	}
	select {
	case <-allDone:
	case <-time.After(2 * time.Minute):
		t.Errorf("%d recipients never ended: %+v", left.Load(), f.q.Summary())
		close(allDone)
	}
	wg.Wait()
	for id, n := range ended {
		if n != 1 {
			t.Errorf("%v ended %d times", id, n)
		}
	}
	f.q.pending.Wait()
	f.empty()
	if s := f.q.Summary(); s.InFlight != 0 || s.InMemory != 0 || s.Messages != 0 {
		t.Errorf("left in memory: %+v", s)
	}
}

// stressOnce takes from every queue once and does something with what it gets.
func (f *fixture) stressOnce(t *testing.T, n int, end func(ids.Message, []Result)) {
	f.mu.Lock()
	changed := f.changed
	f.mu.Unlock()
	took := false
	f.q.Queues(func(info QueueInfo) bool {
		w, ok := takeLoaded(f.q, info.Number, time.Now().Add(time.Second), 1+n%3)
		if !ok {
			return true
		}
		took = true
		switch rand.IntN(6) {
		case 0:
			f.q.Return(w)
		case 1:
			next := time.Now().Add(time.Duration(rand.IntN(20)-10) * time.Millisecond)
			f.endAsync(t, w, all(w, relay.StateWaiting, outbox.Deferred, next), end)
		case 2:
			results := all(w, relay.StateDelivered, outbox.Delivered, time.Time{})
			f.endAsync(t, w, results[:len(results)/2], end)
		default:
			f.endAsync(t, w, all(w, relay.StateDelivered, outbox.Delivered, time.Time{}), end)
		}
		return true
	})
	if !took {
		select {
		case <-changed:
		case <-time.After(10 * time.Millisecond): // a retry became due
		}
	}
}

func (f *fixture) endAsync(t *testing.T, w *Work, results []Result, end func(ids.Message, []Result)) {
	id := w.Env.ID
	f.q.Finish(w, nil, results, nil, func(err error) {
		if err != nil {
			t.Error(err)
			return
		}
		end(id, results)
	})
}
