package memlimit

import (
	"context"
	"math"
	"runtime/debug"
	"runtime/metrics"
	"sync/atomic"
	"time"
)

// How a Target keeps memory.
const (
	targetInterval = time.Second
	targetRoom     = 64 << 20 // bytes above what lives that there is always
	targetStep     = 16 << 20 // a limit is a multiple of it, so that it seldom changes
	targetGarbage  = 4        // one part in so many of what lives may be garbage at least
)

// Target has the runtime keep the memory of a program near a size that is ample
// for it. Without, garbage may double what lives, and what a peak has left
// behind is given back to the system slowly. The target is no bound: where more
// than that lives, room for garbage stays, so that the program never does little
// but collect.
type Target struct {
	hard   int64 // set by Apply; never exceeded
	off    bool  // the environment says what is done
	wanted atomic.Int64

	read func() (live int64)
	set  func(limit int64)
	last int64
}

// NewTarget returns a target that changes nothing before Set. It must be called
// after Apply. With GOMEMLIMIT in the environment it never changes anything.
func NewTarget(getenv func(string) string) *Target {
	samples := []metrics.Sample{
		{Name: "/gc/heap/live:bytes"}, {Name: "/memory/classes/heap/stacks:bytes"},
		{Name: "/memory/classes/os-stacks:bytes"}, {Name: "/memory/classes/metadata/other:bytes"}, {Name: "/memory/classes/other:bytes"},
	}
	hard := debug.SetMemoryLimit(-1)
	return &Target{
		hard: hard, last: hard, off: getenv("GOMEMLIMIT") != "",
		set: func(limit int64) { debug.SetMemoryLimit(limit) },
		read: func() (live int64) {
			metrics.Read(samples)
			for _, s := range samples {
				live += int64(s.Value.Uint64())
			}
			return live
		},
	}
}

// Set names the size in bytes; 0: none. It may be called at any time.
func (t *Target) Set(bytes int64) { t.wanted.Store(bytes) }

// Run keeps to the target until ctx ends.
func (t *Target) Run(ctx context.Context) {
	tick := time.NewTicker(targetInterval)
	defer tick.Stop()
	for {
		t.adjust()
		select {
		case <-ctx.Done():
			return
		case <-tick.C:
		}
	}
}

func (t *Target) adjust() {
	if t.off {
		return
	}
	limit := t.hard
	if wanted := t.wanted.Load(); wanted > 0 {
		live := t.read()
		limit = min(limit, roundUp(max(wanted, live+live/targetGarbage+targetRoom)))
	}
	if limit != t.last {
		t.last = limit
		t.set(limit)
	}
}

func roundUp(n int64) int64 {
	if n > math.MaxInt64-targetStep {
		return math.MaxInt64
	}
	return (n + targetStep - 1) / targetStep * targetStep
}
