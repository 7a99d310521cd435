package submission

import (
	"container/heap"
	"context"
	"fmt"
	"log/slog"
	"net/netip"
	"sync"
	"time"

	"github.com/relais-mta/relais/relay"
	"github.com/relais-mta/relais/relay/outbox"
	"github.com/relais-mta/relais/shared/ids"
	"github.com/relais-mta/relais/shared/throttle"
)

// A lock has an event at its begin and one at its end, whatever is refused in
// between. Somebody who has many addresses can earn many locks: how many have
// events is bounded, the others are counted.

// Bounds of the events of locks.
const (
	toldLocksPerMinute = 60   // that begin, and as many more after a pause
	maxToldLocks       = 1024 // at once; each takes about 200 octets
	lockEventTimeout   = 10 * time.Second
)

// told is a lock whose begin has an event.
type told struct {
	lock
	from   time.Time
	client netip.Addr // whose failure was the last
	tenant ids.Tenant // of the account
}

// lockTeller knows which locks have events.
type lockTeller struct {
	refused func(lockKey) uint32
	dropped func()
	wake    chan struct{} // has room for one

	mu    sync.Mutex
	rate  throttle.Bucket
	begun []told   // not written yet
	open  toldHeap // written; the one that ends first in front
}

func newLockTeller(refused func(lockKey) uint32, dropped func()) *lockTeller {
	return &lockTeller{refused: refused, dropped: dropped, wake: make(chan struct{}, 1), rate: throttle.NewBucket(mustLockRate())}
}

func mustLockRate() throttle.Rate {
	r, err := throttle.NewRate(toldLocksPerMinute, time.Minute, toldLocksPerMinute)
	if err != nil {
		panic(err) // constants
	}
	return r
}

// begin notes a lock that begins now. It does not wait for its event.
func (t *lockTeller) begin(l lock, client netip.Addr, tenant ids.Tenant, now time.Time) {
	t.mu.Lock()
	defer t.mu.Unlock()
	if ok, _ := t.rate.Peek(now, 1); !ok || len(t.begun)+len(t.open) >= maxToldLocks {
		t.dropped()
		return
	}
	t.rate.Take(now, 1)
	t.begun = append(t.begun, told{lock: l, from: now, client: client, tenant: tenant})
	select {
	case t.wake <- struct{}{}:
	default: // it is awake
	}
}

// run writes events until ctx ends.
func (t *lockTeller) run(ctx context.Context, write func(context.Context, []outbox.Event) error, logger *slog.Logger) {
	timer := time.NewTimer(0)
	defer timer.Stop()
	for ended := false; !ended; {
		select {
		case <-t.wake:
		case <-timer.C:
		case <-ctx.Done():
			ended = true
		}
		now := time.Now()
		events, next := t.due(now, ended)
		if len(events) > 0 {
			// The last ones are written although ctx is over.
			writing, cancel := context.WithTimeout(context.WithoutCancel(ctx), lockEventTimeout)
			if err := write(writing, events); err != nil {
				logger.Error("events of locks were not kept", "events", len(events), "error", err)
			}
			cancel()
		}
		if !next.IsZero() {
			timer.Reset(next.Sub(now))
		}
	}
}

// due returns the events that are due, all ends among them if the relay stops,
// and when the next lock ends, zero if none is open.
func (t *lockTeller) due(now time.Time, stops bool) (events []outbox.Event, next time.Time) {
	t.mu.Lock()
	defer t.mu.Unlock()
	for i := range t.begun {
		events = append(events, t.begun[i].begins())
		heap.Push(&t.open, t.begun[i])
	}
	t.begun = nil
	for len(t.open) > 0 && (stops || !now.Before(t.open[0].until)) {
		l := heap.Pop(&t.open).(told)
		events = append(events, l.ends(t.refused(l.lockKey), now))
	}
	if len(t.open) > 0 {
		next = t.open[0].until
	}
	return events, next
}

func (l *told) event(at time.Time, kind outbox.Type, count uint32, text string) outbox.Event {
	return outbox.Event{
		Type: kind, At: at, Class: lockNames[l.scope], Address: l.network.String(), RemoteIP: l.client, Tenant: l.tenant, Credential: l.account,
		StartedAt: l.from, Attempts: count, Reply: relay.Reply{Enhanced: "4.7.0", Text: text},
	}
}

// begins is the event of a lock that began.
func (l *told) begins() outbox.Event {
	e := l.event(l.from, outbox.Locked, uint32(l.failures), fmt.Sprintf("%d failed logins, no more until %s", l.failures, l.until.UTC().Format(time.RFC3339)))
	e.Next = l.until
	return e
}

// ends is the event of a lock that is over.
func (l *told) ends(refused uint32, now time.Time) outbox.Event {
	e := l.event(now, outbox.Unlocked, refused, fmt.Sprintf("logins are looked at again, %d were refused", refused))
	e.EndedAt = now
	return e
}

// toldHeap implements heap.Interface.
type toldHeap []told

func (h toldHeap) Len() int           { return len(h) }
func (h toldHeap) Less(i, j int) bool { return h[i].until.Before(h[j].until) }
func (h toldHeap) Swap(i, j int)      { h[i], h[j] = h[j], h[i] }
func (h *toldHeap) Push(x any)        { *h = append(*h, x.(told)) }
func (h *toldHeap) Pop() any {
	last := (*h)[len(*h)-1]
	*h = (*h)[:len(*h)-1]
	return last
}
