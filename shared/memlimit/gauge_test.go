package memlimit

import (
	"math"
	"os"
	"runtime"
	"runtime/debug"
	"testing"
	"testing/fstest"
	"time"
)

func TestGauge(t *testing.T) {
	var live int64
	var collections uint64
	reads, freed := 0, 0
	g := &Gauge{limit: 1000, free: func() { freed++ }, read: func() (int64, uint64) { reads++; return live, collections }}
	now := time.Unix(1_800_000_000, 0)
	for i, step := range []struct {
		after       time.Duration
		live        int64
		collections uint64
		want        bool
		reads       int
		freed       int
	}{
		{0, 500, 1, false, 1, 0},
		{50 * time.Millisecond, 900, 2, false, 1, 0}, // not looked at again so soon
		{50 * time.Millisecond, 900, 2, true, 2, 0},
		{4 * time.Second, 900, 2, true, 3, 0},
		{time.Second, 900, 2, true, 4, 1}, // no collection for 5 s: one is begun
		{time.Second, 900, 2, true, 5, 1},
		{time.Second, 800, 3, false, 6, 1}, // exactly the part is not over it
		{time.Minute, 801, 3, false, 7, 1},
		{-time.Hour, 820, 4, true, 8, 1}, // the clock went back
	} {
		now, live, collections = now.Add(step.after), step.live, step.collections
		if got := g.Over(80, now); got != step.want || reads != step.reads || freed != step.freed {
			t.Errorf("step %d: over %v after %d reads and %d collections, want %v, %d, %d", i, got, reads, freed, step.want, step.reads, step.freed)
		}
	}
}

func TestGaugeOfThisProgram(t *testing.T) {
	was := debug.SetMemoryLimit(-1)
	defer debug.SetMemoryLimit(was)
	debug.SetMemoryLimit(64 << 20)
	runtime.GC() // what the last collection saw may be of another test
	g := NewGauge(os.DirFS("/"))
	now := time.Now()
	if g.Over(80, now) {
		t.Error("an idle test is over 80 % of 64 MiB")
	}
	held := make([]byte, 60<<20)
	for i := 0; i < len(held); i += 4096 {
		held[i] = 1
	}
	runtime.GC()
	if now = now.Add(time.Second); !g.Over(80, now) {
		t.Errorf("60 of 64 MiB are held, and the gauge says %d %%", g.percent)
	}
	runtime.KeepAlive(held)
	held = nil
	runtime.GC()
	if now = now.Add(time.Second); g.Over(80, now) {
		t.Errorf("60 MiB were let go of, and the gauge says %d %%", g.percent)
	}
	debug.SetMemoryLimit(math.MaxInt64)
	meminfo := fstest.MapFS{"proc/meminfo": {Data: []byte("MemFree: 1 kB\nMemTotal:        2000 kB\n")}}
	if g := NewGauge(meminfo); g.limit != 1000<<10 {
		t.Errorf("the limit is %d, want half of the machine's memory", g.limit)
	}
	if g := NewGauge(fstest.MapFS{}); g.Over(0, now) {
		t.Error("a gauge without a limit is over it")
	}
}
