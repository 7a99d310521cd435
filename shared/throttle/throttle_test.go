package throttle

import (
	"math"
	"testing"
	"time"

	"pgregory.net/rapid"

	"github.com/relais-mta/relais/shared/fault"
)

var start = time.Unix(1_700_000_000, 0)

func rate(t testing.TB, limit int, per time.Duration, burst int) Rate {
	t.Helper()
	r, err := NewRate(limit, per, burst)
	if err != nil {
		t.Fatal(err)
	}
	return r
}

func TestNewRateRefuses(t *testing.T) {
	for _, tc := range []struct {
		limit int
		per   time.Duration
		burst int
		field string
	}{
		{0, time.Second, 1, "limit"}, {-1, time.Second, 1, "limit"}, {MaxLimit + 1, time.Second, 1, "limit"},
		{10, 9, 1, "per"}, {1, MaxPer + 1, 1, "per"}, {1, 0, 1, "per"},
		{1, time.Second, 0, "burst"}, {1, time.Second, MaxBurst + 1, "burst"}, {1, MaxPer, 1000, "burst"},
	} {
		_, err := NewRate(tc.limit, tc.per, tc.burst)
		var f *fault.Error
		if !fault.Is(err, fault.Invalid) {
			t.Errorf("NewRate(%d, %v, %d): %v", tc.limit, tc.per, tc.burst, err)
		} else if f = err.(*fault.Error); f.Field != tc.field {
			t.Errorf("NewRate(%d, %v, %d) blames %s, want %s", tc.limit, tc.per, tc.burst, f.Field, tc.field)
		}
	}
}

func TestBurstThenSpacing(t *testing.T) {
	b := NewBucket(rate(t, 10, time.Second, 3))
	for i := range 3 {
		if ok, _ := b.Take(start, 1); !ok {
			t.Fatalf("event %d of the burst was refused", i)
		}
	}
	for i := range 5 {
		now := start.Add(time.Duration(i) * 100 * time.Millisecond)
		ok, wait := b.Take(now, 1)
		if ok || wait != 100*time.Millisecond {
			t.Fatalf("event %d: ok %v, wait %v; want to wait 100ms", i, ok, wait)
		}
		if ok, _ := b.Take(now.Add(wait-1), 1); ok {
			t.Fatal("started a nanosecond early")
		}
		if ok, _ := b.Take(now.Add(wait), 1); !ok {
			t.Fatal("refused after the wait it asked for")
		}
	}
	if ok, wait := b.Take(start.Add(time.Hour), 4); ok || wait >= 0 {
		t.Errorf("more than the burst at once: ok %v, wait %v; want never", ok, wait)
	}
	if ok, _ := b.Take(start.Add(time.Hour), 3); !ok {
		t.Error("the burst is not saved up again")
	}
	if ok, _ := b.Take(start.Add(time.Hour), 1); ok {
		t.Error("more than the burst was saved up")
	}
}

func TestZeroIsUnbounded(t *testing.T) {
	var b Bucket
	if ok, wait := b.Take(start, math.MaxInt); !ok || wait != 0 {
		t.Error("the zero bucket must not limit")
	}
	limited := NewBucket(rate(t, 1, time.Hour, 1))
	if ok, _ := limited.Take(start, 0); !ok {
		t.Error("nothing must always fit")
	}
	if ok, _ := limited.Take(start, 1); !ok {
		t.Error("taking nothing must cost nothing")
	}
}

func TestSetGivesNoSecondBurst(t *testing.T) {
	slow, fast := rate(t, 1, time.Minute, 5), rate(t, 60, time.Minute, 5)
	b := NewBucket(slow)
	b.Take(start, 5)
	b.Set(fast, start)
	if ok, wait := b.Take(start, 1); ok || wait != time.Second {
		t.Errorf("after a change to a faster rate: ok %v, wait %v; want to wait 1s", ok, wait)
	}
	b.Set(slow, start)
	if ok, wait := b.Take(start, 1); ok || wait != time.Minute {
		t.Errorf("after a change back: ok %v, wait %v; want to wait 1m", ok, wait)
	}
	b.Set(slow, start.Add(time.Hour)) // no change, no effect
	b.Set(Rate{}, start)
	if ok, _ := b.Take(start, 1000); !ok {
		t.Error("a removed limit still holds")
	}
}

// TestClockStepsBack sets the clock back by an hour when the burst is used up:
// one interval later the next event may start, and no second burst with it.
func TestClockStepsBack(t *testing.T) {
	b := NewBucket(rate(t, 1, time.Second, 2))
	b.Take(start, 2)
	back := start.Add(-time.Hour)
	if ok, wait := b.Take(back, 1); ok || wait != time.Second {
		t.Errorf("ok %v, wait %v; want what is owed and no more: 1s", ok, wait)
	}
	back = back.Add(time.Second)
	if ok, _ := b.Take(back, 1); !ok {
		t.Error("refused after its own wait")
	}
	if ok, wait := b.Take(back, 1); ok || wait != time.Second {
		t.Errorf("ok %v, wait %v: the step gave a second burst", ok, wait)
	}
}

// The bound of the package comment against the plainest model there is: all
// starts are kept, and every window that ends at a start is counted.
func TestRateNeverPassesItsBound(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		limit := rapid.IntRange(1, 50).Draw(t, "limit")
		per := time.Duration(rapid.Int64Range(int64(limit), int64(10*time.Second)).Draw(t, "per"))
		burst := rapid.IntRange(1, 20).Draw(t, "burst")
		r, err := NewRate(limit, per, burst)
		if err != nil {
			t.Fatal(err)
		}
		b := NewBucket(r)
		now := start
		var starts []time.Time
		for range rapid.IntRange(1, 200).Draw(t, "steps") {
			n := rapid.IntRange(1, burst).Draw(t, "n")
			ok, wait := b.Take(now, n)
			switch {
			case ok:
				for range n {
					starts = append(starts, now)
				}
			case wait <= 0:
				t.Fatalf("refused without a wait: %v", wait)
			case rapid.Bool().Draw(t, "obey"):
				now = now.Add(wait)
				if ok, again := b.Peek(now, n); !ok {
					t.Fatalf("still refused after its own wait of %v: %v more", wait, again)
				}
			}
			now = now.Add(time.Duration(rapid.Int64Range(0, int64(per)).Draw(t, "gap")))
		}
		for i := range starts {
			for j := i; j < len(starts); j++ {
				w := starts[j].Sub(starts[i])
				// In whole numbers: count ≤ limit·w/per + burst.
				count := int64(j - i + 1)
				if (count-int64(burst))*int64(per) > int64(limit)*int64(w) {
					t.Fatalf("%d starts in %v: more than %d per %v and %d", count, w, limit, per, burst)
				}
			}
		}
	})
}

// A busy bucket must not waste its limit either.
func TestRateIsUsedUp(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		limit := rapid.IntRange(1, 1000).Draw(t, "limit")
		r, err := NewRate(limit, time.Second, rapid.IntRange(1, 5).Draw(t, "burst"))
		if err != nil {
			t.Fatal(err)
		}
		b := NewBucket(r)
		count, now := 0, start
		for now.Before(start.Add(time.Second)) {
			ok, wait := b.Take(now, 1)
			if ok {
				count++
			}
			now = now.Add(wait)
		}
		if count < limit {
			t.Fatalf("%d started in a second, %d were allowed", count, limit)
		}
	})
}

func BenchmarkTake(b *testing.B) {
	bucket := NewBucket(rate(b, 1000, time.Second, 100))
	now := start
	b.ReportAllocs()
	for b.Loop() {
		if ok, wait := bucket.Take(now, 1); !ok {
			now = now.Add(wait)
		}
	}
}

func TestTakeDoesNotAllocate(t *testing.T) {
	bucket := NewBucket(rate(t, 1000, time.Second, 100))
	if n := testing.AllocsPerRun(100, func() { bucket.Take(start, 1) }); n != 0 {
		t.Errorf("%v allocations", n)
	}
}

func TestUntake(t *testing.T) {
	b := NewBucket(rate(t, 1, time.Second, 1))
	for _, again := range []bool{true, false} {
		if ok, _ := b.Take(start, 1); !ok {
			t.Fatal("the bucket is full")
		}
		if again {
			b.Untake(start, 1)
		}
	}
	b.Untake(start, 0)
	if ok, wait := b.Take(start, 1); ok || wait != time.Second {
		t.Errorf("one was given back and taken again: %v %v", ok, wait)
	}
	// Another one was taken since, which would have come sooner otherwise.
	later := start.Add(time.Second)
	if ok, _ := b.Take(later, 1); !ok {
		t.Fatal("its time has come")
	}
	b.Untake(start, 1)
	if ok, wait := b.Take(later, 1); ok || wait != time.Second {
		t.Errorf("what others waited for was given back: %v %v", ok, wait)
	}
	var none Bucket
	none.Take(start, 1)
	none.Untake(start, 1)
	none.Set(rate(t, 1, time.Second, 1), start)
	if ok, _ := none.Take(start, 1); !ok {
		t.Error("without a rate nothing was taken")
	}
}
