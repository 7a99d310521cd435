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

	// What a collection costs goes by the memory with pointers, all of which it looks
	// at. From one part in so many of the limit on, garbage may fill the rest of the
	// limit; below that no memory is taken just because it may be.
	fillFrom     = 12
	fillPercent  = 100 * (fillFrom - 1) // GOGC: garbage for what lives
	usualPercent = 100
)

// Target has the runtime keep the memory of a program near a size that is ample
// for it. Without, garbage may double what lives, and what a peak has left
// behind is given back to the system slowly. Up to it garbage may fill what is free
// when collections are dear. The target is no bound: where more
// than that lives, room for garbage stays, so that the program never does little
// but collect.
type Target struct {
	hard   int64 // set by Apply; never exceeded
	off    bool  // the environment says what is done
	wanted atomic.Int64

	read func() held
	set  func(limit int64)
	last int64

	setPercent  func(percent int) // nil: the environment says what it is
	percent     int
	collections uint64
	pointers    int64 // least that was seen since then: what was made later may be garbage
}

// held is what the runtime tells about memory, in bytes.
type held struct {
	live        int64 // by the last collection
	pointers    int64 // what has pointers of it, and of all that was made since
	collections uint64
}

// NewTarget returns a target that changes nothing before Set. It must be called
// after Apply. With GOMEMLIMIT in the environment it never changes anything, and with
// GOGC not how much garbage there may be below the limit.
func NewTarget(getenv func(string) string) *Target {
	samples := []metrics.Sample{
		{Name: "/gc/cycles/total:gc-cycles"}, {Name: "/gc/scan/total:bytes"},
		{Name: "/gc/heap/live:bytes"}, {Name: "/memory/classes/heap/stacks:bytes"},
		{Name: "/memory/classes/os-stacks:bytes"}, {Name: "/memory/classes/metadata/other:bytes"}, {Name: "/memory/classes/other:bytes"},
	}
	hard := debug.SetMemoryLimit(-1)
	t := &Target{
		hard: hard, last: hard, percent: usualPercent, off: getenv("GOMEMLIMIT") != "",
		set: func(limit int64) { debug.SetMemoryLimit(limit) },
		read: func() held {
			metrics.Read(samples)
			h := held{collections: samples[0].Value.Uint64(), pointers: int64(samples[1].Value.Uint64())}
			for _, s := range samples[2:] {
				h.live += int64(s.Value.Uint64())
			}
			return h
		},
	}
	if getenv("GOGC") == "" {
		t.setPercent = func(percent int) { debug.SetGCPercent(percent) }
	}
	return t
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
	limit, percent := t.hard, usualPercent
	if wanted := t.wanted.Load(); wanted > 0 {
		h := t.read()
		limit = min(limit, roundUp(max(wanted, h.live+h.live/targetGarbage+targetRoom)))
		if h.collections != t.collections {
			t.collections, t.pointers = h.collections, h.pointers
		}
		if t.pointers = min(t.pointers, h.pointers); t.pointers >= limit/fillFrom {
			percent = fillPercent
		}
	}
	if limit != t.last {
		t.last = limit
		t.set(limit)
	}
	if percent != t.percent && t.setPercent != nil {
		t.percent = percent
		t.setPercent(percent)
	}
}

func roundUp(n int64) int64 {
	if n > math.MaxInt64-targetStep {
		return math.MaxInt64
	}
	return (n + targetStep - 1) / targetStep * targetStep
}
