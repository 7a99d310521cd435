package limits

import (
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/relais-mta/relais/shared/lease"
)

func kernelClock(t *testing.T) lease.Instant {
	t.Helper()
	var ts unix.Timespec
	if err := unix.ClockGettime(unix.CLOCK_BOOTTIME, &ts); err != nil {
		t.Fatal(err)
	}
	return lease.Instant(ts.Nano())
}

// near asserts that the clock says what the kernel says, between two looks at it.
func near(t *testing.T, c *bootClock, what string) {
	t.Helper()
	before := kernelClock(t)
	got := c.now()
	if after := kernelClock(t); got < before-lease.Instant(clockSlack) || got > after+lease.Instant(clockSlack) {
		t.Errorf("%s: the clock says %v, the kernel %v to %v", what, got, before, after)
	}
}

// TestTheClockGoesOnInSuspend: the time that the machine slept is there at the first
// look, and nobody asks the kernel for that each time.
func TestTheClockGoesOnInSuspend(t *testing.T) {
	c := &bootClock{base: time.Now().Add(-time.Hour)}
	c.ask()
	near(t, c, "at first")
	for last := c.now(); last < lease.Instant(1<<62); {
		next := c.now()
		if next < last {
			t.Fatal("the clock goes back")
		}
		if next.Sub(last) > 0 {
			break
		}
	}
	// The machine slept for a minute: as the clock was before, everything is a
	// minute less but the monotonic clock.
	slept := int64(time.Minute)
	c.offset.Add(-slept)
	c.wall.Add(-slept)
	near(t, c, "after a suspend")
	// A suspend that the time of day does not show, for it was set back meanwhile, is
	// found soon.
	c.offset.Add(-slept)
	asked := c.asked.Load()
	c.asked.Store(asked + int64(time.Hour)) // however long this machine stands still here
	if got := c.now(); got > kernelClock(t)-lease.Instant(slept/2) {
		t.Error("the kernel is asked each time")
	}
	c.asked.Store(asked - 2*clockLook)
	near(t, c, "after a suspend that the time of day hides")
	// The time of day is set: nothing happened.
	c.wall.Add(-slept)
	before := c.offset.Load()
	near(t, c, "after the time of day was set")
	if c.offset.Load() != before {
		t.Error("setting the time of day moved the clock")
	}
	if n := testing.AllocsPerRun(1000, func() { c.now() }); n > 0 {
		t.Errorf("%v allocations for an instant", n)
	}
}

func BenchmarkNow(b *testing.B) {
	for b.Loop() {
		Now()
	}
}
