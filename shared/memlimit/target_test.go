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
		g := &Target{hard: tc.hard, last: tc.hard, read: func() held { return held{live: tc.live} }, set: func(n int64) { set = append(set, n) }}
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

// Where collections are dear, garbage may fill what the limit leaves; otherwise no
// more of it is left lying than by default.
func TestTargetLeavesMoreGarbageWhereCollectionsAreDear(t *testing.T) {
	const mib = 1 << 20
	is := held{live: 300 * mib}
	var set []int
	g := &Target{
		hard: math.MaxInt64, last: math.MaxInt64, percent: usualPercent,
		read: func() held { return is }, set: func(int64) {}, setPercent: func(n int) { set = append(set, n) },
	}
	step := func(what string, pointers int64, want ...int) {
		t.Helper()
		is.pointers = pointers
		g.adjust()
		g.adjust()
		if !slices.Equal(set, want) {
			t.Errorf("%s: garbage of %v percent was allowed, want %v", what, set, want)
		}
		set = nil
	}
	const dear = 640 * mib / fillFrom
	step("no target", dear)
	g.Set(640 * mib)
	is.collections++
	step("cheap collections", dear-1)
	step("what came since may be garbage", 2*dear)
	is.collections++
	step("dear collections", dear, fillPercent)
	is.collections++
	step("dear ones again", 2*dear)
	is.live = 1024 * mib // the limit is 1,344 MiB
	step("a larger limit", 1344*mib/fillFrom-1, usualPercent)
	is.collections++
	step("dear ones by that", 1344*mib/fillFrom, fillPercent)
	g.Set(0)
	step("no target any more", dear, usualPercent)
}

func TestTargetRunsUntilTheEnd(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var set []int64
		g := &Target{hard: math.MaxInt64, last: math.MaxInt64, read: func() held { return held{live: 1} }, set: func(n int64) { set = append(set, n) }}
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
	limit, percent := debug.SetMemoryLimit(math.MaxInt64), debug.SetGCPercent(usualPercent)
	defer func() {
		debug.SetMemoryLimit(limit)
		debug.SetGCPercent(percent)
	}()
	g := NewTarget(func(string) string { return "" })
	g.Set(128 << 20)
	g.adjust()
	if got := debug.SetMemoryLimit(-1); got < 128<<20 || got == math.MaxInt64 {
		t.Fatalf("the runtime's limit is %d", got)
	}
	held := make([]*[1 << 20]*byte, 32) // of 8 MiB each
	for i := range held {
		held[i] = new([1 << 20]*byte)
	}
	runtime.GC()
	g.adjust()
	if got := debug.SetMemoryLimit(-1); got < 320<<20 {
		t.Errorf("256 MiB live, and the limit is %d MiB", got>>20)
	}
	if got := gcPercent(); got != fillPercent {
		t.Errorf("256 MiB are looked at by each collection, and garbage may be %d percent", got)
	}
	runtime.KeepAlive(held)
	debug.SetMemoryLimit(math.MaxInt64)
	debug.SetGCPercent(usualPercent)
	for _, name := range []string{"GOMEMLIMIT", "GOGC"} {
		off := NewTarget(func(key string) string { return map[string]string{name: "1000000000"}[key] })
		off.Set(128 << 20)
		off.adjust()
		if got := debug.SetMemoryLimit(-1); name == "GOMEMLIMIT" && got != math.MaxInt64 {
			t.Errorf("with %s in the environment the limit became %d", name, got)
		}
		if got := gcPercent(); got != usualPercent {
			t.Errorf("with %s in the environment garbage may be %d percent", name, got)
		}
	}
}

// gcPercent returns the runtime's GOGC.
func gcPercent() int {
	is := debug.SetGCPercent(usualPercent)
	debug.SetGCPercent(is)
	return is
}
