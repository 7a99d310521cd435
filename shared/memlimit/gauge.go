package memlimit

import (
	"bufio"
	"bytes"
	"io/fs"
	"math"
	"runtime"
	"runtime/debug"
	"runtime/metrics"
	"strconv"
	"strings"
	"sync"
	"time"
)

// Times of a Gauge.
const (
	sampleInterval  = 100 * time.Millisecond // a look costs about a microsecond
	collectInterval = 5 * time.Second
)

// Gauge tells how much of its memory a program holds, so that it can stop taking
// on work before there is none left. What counts is what a collection could not
// free: garbage may fill the rest of the limit at any time, and means nothing.
type Gauge struct {
	limit int64
	read  func() (live int64, collections uint64)
	free  func() // begins a collection

	mu          sync.Mutex
	sampled     time.Time
	percent     int
	collections uint64
	collected   time.Time // when a collection was last seen
}

// NewGauge returns the gauge of this program. Its limit is the runtime's, which
// Apply or GOMEMLIMIT has set. Without one it is half of the machine's memory,
// because the heap may grow to twice of what lives in it. Root is the root of the
// file system; where it does not tell the machine's memory the gauge stays at 0.
func NewGauge(root fs.FS) *Gauge {
	limit := debug.SetMemoryLimit(-1)
	if limit == math.MaxInt64 {
		limit = machine(root) / 2
	}
	samples := []metrics.Sample{
		{Name: "/gc/cycles/total:gc-cycles"}, {Name: "/gc/heap/live:bytes"}, {Name: "/memory/classes/heap/stacks:bytes"},
		{Name: "/memory/classes/os-stacks:bytes"}, {Name: "/memory/classes/metadata/other:bytes"}, {Name: "/memory/classes/other:bytes"},
	}
	return &Gauge{limit: limit, free: func() { go runtime.GC() }, read: func() (live int64, collections uint64) {
		metrics.Read(samples)
		for _, s := range samples[1:] {
			live += int64(s.Value.Uint64())
		}
		return live, samples[0].Value.Uint64()
	}}
}

// Over reports whether more than percent of the limit is held at now. What it
// goes by is at most 100 ms old and was measured by the last collection; while
// it is over, one is begun every 5 s, because a program that turns work away may
// make too little garbage for the runtime to begin one.
func (g *Gauge) Over(percent int, now time.Time) bool {
	if g.limit <= 0 {
		return false
	}
	g.mu.Lock()
	defer g.mu.Unlock()
	if since := now.Sub(g.sampled); since >= sampleInterval || since < 0 {
		live, collections := g.read()
		g.sampled, g.percent = now, int(min(live/max(1, g.limit/100), 1000))
		if collections != g.collections || g.collected.IsZero() {
			g.collections, g.collected = collections, now
		}
	}
	over := g.percent > percent
	if over && now.Sub(g.collected) >= collectInterval {
		g.collected = now
		g.free()
	}
	return over
}

// machine returns MemTotal of proc_meminfo(5) in bytes, 0 if it cannot be read.
func machine(root fs.FS) int64 {
	text, err := fs.ReadFile(root, "proc/meminfo")
	if err != nil {
		return 0
	}
	for lines := bufio.NewScanner(bytes.NewReader(text)); lines.Scan(); {
		if f := strings.Fields(lines.Text()); len(f) == 3 && f[0] == "MemTotal:" && f[2] == "kB" {
			n, err := strconv.ParseInt(f[1], 10, 64)
			if err == nil && n > 0 && n < math.MaxInt64>>10 {
				return n << 10
			}
		}
	}
	return 0
}
