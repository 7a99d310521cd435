package memlimit

import (
	"context"
	"math"
	"runtime"
	"runtime/debug"
	"slices"
	"testing"
	"testing/synctest"
	"time"
)

func TestTargetFollowsWhatLives(t *testing.T) {
	const mib = 1 << 20
	for _, tc := range []struct {
		name               string
		hard, wanted, live int64
		want               int64 // 0: nothing is set
	}{
		{"none", math.MaxInt64, 0, 900 * mib, 0},
		{"ample", math.MaxInt64, 640 * mib, 300 * mib, 640 * mib},
		{"no multiple of a step", math.MaxInt64, 630 * mib, 300 * mib, 640 * mib},
		{"more lives", math.MaxInt64, 640 * mib, 1024 * mib, (1280 + 64) * mib},
		{"the group's limit is less", 500 * mib, 640 * mib, 300 * mib, 0},
		{"more lives than the group's limit", 700 * mib, 640 * mib, 690 * mib, 0},
		{"absurd", math.MaxInt64, math.MaxInt64, 1, 0},
	} {
		var set []int64
		g := &Target{hard: tc.hard, last: tc.hard, read: func() int64 { return tc.live }, set: func(n int64) { set = append(set, n) }}
		g.Set(tc.wanted)
		g.adjust()
		g.adjust()
		var want []int64
		if tc.want != 0 {
			want = []int64{tc.want}
		}
		if !slices.Equal(set, want) {
			t.Errorf("%s: limits %v, want %v once", tc.name, set, want)
		}
		g.Set(0)
		g.adjust()
		if g.last != tc.hard {
			t.Errorf("%s: without a target the limit is %d, want %d", tc.name, g.last, tc.hard)
		}
	}
}

func TestTargetRunsUntilTheEnd(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var set []int64
		g := &Target{hard: math.MaxInt64, last: math.MaxInt64, read: func() int64 { return 1 }, set: func(n int64) { set = append(set, n) }}
		ctx, cancel := context.WithCancel(t.Context())
		done := make(chan struct{})
		go func() {
			defer close(done)
			g.Run(ctx)
		}()
		synctest.Wait()
		g.Set(10 * targetStep)
		time.Sleep(2 * targetInterval) // of the bubble's clock
		g.Set(20 * targetStep)
		time.Sleep(2 * targetInterval)
		cancel()
		<-done
		if !slices.Equal(set, []int64{10 * targetStep, 20 * targetStep}) {
			t.Errorf("limits %v", set)
		}
	})
}

// Garbage of a program that holds little does not grow beyond the target.
func TestTargetOfThisProgram(t *testing.T) {
	was := debug.SetMemoryLimit(math.MaxInt64)
	defer debug.SetMemoryLimit(was)
	g := NewTarget(func(string) string { return "" })
	g.Set(128 << 20)
	g.adjust()
	if got := debug.SetMemoryLimit(-1); got < 128<<20 || got == math.MaxInt64 {
		t.Fatalf("the runtime's limit is %d", got)
	}
	held := make([]byte, 256<<20)
	runtime.GC()
	g.adjust()
	if got := debug.SetMemoryLimit(-1); got < 320<<20 {
		t.Errorf("256 MiB live, and the limit is %d MiB", got>>20)
	}
	runtime.KeepAlive(held)
	debug.SetMemoryLimit(math.MaxInt64)
	off := NewTarget(func(string) string { return "1GiB" })
	off.Set(128 << 20)
	off.adjust()
	if got := debug.SetMemoryLimit(-1); got != math.MaxInt64 {
		t.Errorf("with GOMEMLIMIT in the environment the limit became %d", got)
	}
}
