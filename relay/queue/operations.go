package queue

import (
	"context"
	"sync"

	"github.com/relais-mta/relais/shared/fault"
)

// operations are those under way, each with a channel that closes at its end.
type operations struct {
	mu      sync.Mutex
	begun   map[chan struct{}]Action
	waiting int // of them, for others to end
}

// begin notes an operation and returns what notes its end. One that resumes waits
// before that for those of its action that were begun before.
func (o *operations) begin(ctx context.Context, action Action, resumes bool) (ended func(), err error) {
	end := make(chan struct{})
	var former []chan struct{}
	o.mu.Lock()
	for c, a := range o.begun {
		if resumes && a == action {
			former = append(former, c)
		}
	}
	if o.begun == nil {
		o.begun = make(map[chan struct{}]Action)
	}
	o.begun[end] = action
	o.waiting += min(1, len(former))
	o.mu.Unlock()
	defer func() {
		o.mu.Lock()
		o.waiting -= min(1, len(former))
		o.mu.Unlock()
	}()
	ended = func() {
		o.mu.Lock()
		delete(o.begun, end)
		o.mu.Unlock()
		close(end)
	}
	for _, c := range former {
		select {
		case <-c:
		case <-ctx.Done():
			ended()
			return nil, fault.Wrap(ctx.Err(), fault.Unavailable, "queue.Operate", "interrupted while another operation ended; nothing was begun")
		}
	}
	return ended, nil
}
