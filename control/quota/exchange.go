package quota

import (
	"context"
	"encoding/json"
	"sync"
	"time"

	"github.com/relais-mta/relais/shared/fault"
	"github.com/relais-mta/relais/shared/ids"
	"github.com/relais-mta/relais/shared/wire"
)

// Requests of one server to the leader.
const (
	requestUp   = "quota-up"   // these relays, linked here, said this
	requestDown = "quota-down" // what is there for relays linked here? Waits until there is something

	requestFloating = "quota-floating" // who has floating addresses, and when do their leases end?
)

const (
	maxBoxItems   = 8192
	maxBoxBytes   = 32 << 20
	maxUpBytes    = 720 << 10 // of bodies in one request: a third more as JSON, within cluster's 1 MiB
	maxDownBytes  = 8 << 20   // of bodies in one answer, within cluster's 16 MiB
	maxBatchItems = 2048
	itemBytes     = 64 // of an item beside its body
	passTimeout   = 3 * time.Second
	pollWait      = 2 * time.Second // an answer without anything comes after this; a leader that is stopped keeps one waiting
	pollTimeout   = pollWait + passTimeout
	askPause      = 250 * time.Millisecond // after a leader did not answer
	maxServers    = 64
	boxLife       = time.Minute // of what waits for a server that does not ask
)

// item is one message on its way between two servers.
type item struct {
	Node ids.Node `json:"node"`
	Kind uint32   `json:"kind"`
	Body []byte   `json:"body,omitempty"`
}

type batch struct {
	Items []item `json:"items,omitempty"`
}

// outbox holds messages until they are taken. It is bounded: the oldest make
// room for new ones.
type outbox struct {
	mu    sync.Mutex
	items []item
	bytes int
	more  chan struct{} // gets a token when there is something
}

func newOutbox() *outbox { return &outbox{more: make(chan struct{}, 1)} }

// put adds a message and returns how many old ones were dropped for it.
func (b *outbox) put(i item) (dropped int) {
	b.mu.Lock()
	b.items = append(b.items, i)
	b.bytes += len(i.Body) + itemBytes
	for dropped < len(b.items)-1 && (len(b.items)-dropped > maxBoxItems || b.bytes > maxBoxBytes) {
		b.bytes -= len(b.items[dropped].Body) + itemBytes
		dropped++
	}
	b.items = b.items[dropped:]
	b.mu.Unlock()
	select {
	case b.more <- struct{}{}:
	default:
	}
	return dropped
}

// take removes the oldest messages, as many as fit, one at least if there is any.
func (b *outbox) take(most int) []item {
	b.mu.Lock()
	defer b.mu.Unlock()
	n, size := 0, 0
	for n < len(b.items) && n < maxBatchItems {
		size += len(b.items[n].Body) + itemBytes
		if n > 0 && size > most {
			break
		}
		n++
	}
	out := b.items[:n:n]
	for _, i := range out {
		b.bytes -= len(i.Body) + itemBytes
	}
	if b.items = b.items[n:]; len(b.items) == 0 {
		b.items = nil
	} else {
		select {
		case b.more <- struct{}{}:
		default:
		}
	}
	return out
}

// pass hands the leader what relays linked here said, one request at a time.
func (q *Quota) pass(ctx context.Context) {
	for {
		select {
		case <-q.up.more:
		case <-ctx.Done():
			return
		}
		items := q.up.take(maxUpBytes)
		if len(items) == 0 {
			continue
		}
		if _, leads := q.o.Cluster.Term(); leads {
			for _, i := range items {
				q.receive(q.o.Self, i.Node, &wire.QuotaUp{Kind: i.Kind, Body: i.Body})
			}
			continue
		}
		asking, cancel := context.WithTimeout(ctx, passTimeout)
		err := q.o.Cluster.AskLeader(asking, requestUp, batch{items}, &struct{}{})
		cancel()
		if err != nil {
			q.dropped("up", len(items))
			if pause(ctx, askPause) != nil {
				return
			}
		}
	}
}

// poll asks the leader, while that is another server, for what is there for
// relays linked here.
func (q *Quota) poll(ctx context.Context) {
	for ctx.Err() == nil {
		if _, leads := q.o.Cluster.Term(); leads {
			if pause(ctx, leadershipGap) != nil {
				return
			}
			continue
		}
		asking, cancel := context.WithTimeout(ctx, pollTimeout)
		var got batch
		err := q.o.Cluster.AskLeader(asking, requestDown, struct{}{}, &got)
		cancel()
		if err != nil {
			if pause(ctx, askPause) != nil {
				return
			}
			continue
		}
		for _, i := range got.Items {
			q.deliver(i.Node, &wire.QuotaDown{Kind: i.Kind, Body: i.Body})
		}
	}
}

// Request answers another server, in the words of control/cluster.
type Request func(ctx context.Context, from ids.Node, body []byte) (any, error)

// Requests are what this server answers to others.
func (q *Quota) Requests() map[string]Request {
	return map[string]Request{requestUp: q.onUp, requestDown: q.onDown, requestStatus: q.onStatus, requestFloating: q.onFloating}
}

// RequestNames are the names of all Requests.
func RequestNames() []string { return []string{requestUp, requestDown, requestStatus, requestFloating} }

func (q *Quota) onUp(_ context.Context, from ids.Node, body []byte) (any, error) {
	const op = "quota.onUp"
	if _, leads := q.o.Cluster.Term(); !leads {
		return nil, fault.New(fault.Unavailable, op, "this server does not lead")
	}
	var in batch
	if err := json.Unmarshal(body, &in); err != nil {
		return nil, fault.Wrap(err, fault.Invalid, op, "the messages cannot be read")
	}
	q.boxOf(from)
	for _, i := range in.Items {
		q.receive(from, i.Node, &wire.QuotaUp{Kind: i.Kind, Body: i.Body})
	}
	return struct{}{}, nil
}

func (q *Quota) onDown(ctx context.Context, from ids.Node, _ []byte) (any, error) {
	box := q.boxOf(from)
	if box == nil {
		return nil, fault.New(fault.Exhausted, "quota.onDown", "more than %d servers ask", maxServers)
	}
	ctx, cancel := context.WithTimeout(ctx, pollWait)
	defer cancel()
	for {
		if _, leads := q.o.Cluster.Term(); !leads {
			return nil, fault.New(fault.Unavailable, "quota.onDown", "this server does not lead")
		}
		if items := box.take(maxDownBytes); len(items) > 0 {
			return batch{items}, nil
		}
		select {
		case <-box.more:
		case <-time.After(leaderLook):
		case <-ctx.Done():
			return batch{}, nil
		}
	}
}

// leaderLook is how often a waiting answer looks whether this server still leads:
// the asking one must soon ask the new leader.
const leaderLook = 500 * time.Millisecond

// boxOf returns what waits for a server, and notes that the server was there.
// Servers that were not for long are forgotten.
func (q *Quota) boxOf(server ids.Node) *outbox {
	q.mu.Lock()
	defer q.mu.Unlock()
	now := time.Now()
	for s, at := range q.polled {
		if now.Sub(at) > boxLife {
			delete(q.polled, s)
			delete(q.down, s)
		}
	}
	if q.down[server] == nil {
		if len(q.down) >= maxServers {
			return nil
		}
		q.down[server] = newOutbox()
	}
	q.polled[server] = now
	return q.down[server]
}
