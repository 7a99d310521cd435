package limits

import (
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/sys/unix"

	"github.com/relais-mta/relais/shared/lease"
)

const (
	// clockSlack is by how much the time of day and the monotonic clock may move
	// apart before the kernel is asked: less than that is their reading.
	clockSlack = int64(time.Millisecond)
	clockLook  = int64(time.Second) // it is asked this often in any case
)

// bootClock tells CLOCK_BOOTTIME without asking the kernel each time: the process
// reads the monotonic clock and the time of day by itself, and what the first
// misses of a suspend the second shows. So a decision costs no system call.
type bootClock struct {
	base   time.Time
	offset atomic.Int64 // of CLOCK_BOOTTIME from the time since base
	wall   atomic.Int64 // of the time of day from the time since base, when the kernel was asked
	asked  atomic.Int64 // since base
	asking sync.Mutex
}

// now is the instant. It never goes back.
func (c *bootClock) now() lease.Instant {
	at, wall := c.read()
	// The offset is written before what says that it is right.
	if moved := wall - c.wall.Load(); moved > clockSlack || moved < -clockSlack || at-c.asked.Load() > clockLook {
		c.ask()
	}
	return lease.Instant(at + c.offset.Load())
}

// read returns the time since base by the monotonic clock, and by how much the time
// of day is ahead of that.
func (c *bootClock) read() (at, wall int64) {
	now := time.Now()
	at = int64(now.Sub(c.base))
	return at, now.UnixNano() - at
}

// ask asks the kernel.
func (c *bootClock) ask() {
	c.asking.Lock()
	defer c.asking.Unlock()
	at, wall := c.read()
	var ts unix.Timespec
	if err := unix.ClockGettime(unix.CLOCK_BOOTTIME, &ts); err != nil {
		panic("limits: the kernel has no CLOCK_BOOTTIME: " + err.Error()) // every Linux since 2.6.39 has it
	}
	// It grows with each suspend; the time that asking took is none.
	if offset := ts.Nano() - at; c.offset.Load() == 0 || offset-c.offset.Load() > clockSlack {
		c.offset.Store(offset)
	}
	c.wall.Store(wall)
	c.asked.Store(at)
}

var boot = func() *bootClock {
	c := &bootClock{base: time.Now()}
	c.ask()
	return c
}()

// Now is the instant by CLOCK_BOOTTIME, which goes on while the machine is
// suspended; Go's monotonic clock does not.
func Now() lease.Instant { return boot.now() }
