package engine

import (
	"sync"
	"sync/atomic"

	"github.com/relais-mta/relais/relay/queue"
)

// notifier gathers queue numbers between two rounds of the loop. It holds each
// number once, so it is bounded by the number of queues.
type notifier struct {
	changed atomic.Bool

	mu      sync.Mutex
	pending map[queue.Number]struct{}
	spare   []queue.Number
}

// add notes a queue and reports whether it is the first since take.
func (n *notifier) add(q queue.Number) bool {
	n.mu.Lock()
	defer n.mu.Unlock()
	if n.pending == nil {
		n.pending = make(map[queue.Number]struct{})
	}
	first := len(n.pending) == 0
	n.pending[q] = struct{}{}
	return first
}

// take returns what was noted; the slice is valid until the next take.
func (n *notifier) take() []queue.Number {
	n.mu.Lock()
	defer n.mu.Unlock()
	n.spare = n.spare[:0]
	for q := range n.pending {
		n.spare = append(n.spare, q)
	}
	clear(n.pending)
	return n.spare
}
