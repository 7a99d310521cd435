package quota

import (
	"golang.org/x/sys/unix"

	"github.com/relais-mta/relais/shared/lease"
)

// Now returns the instant by CLOCK_BOOTTIME, which goes on while the machine is
// suspended. Go's own monotonic clock does not.
func Now() lease.Instant {
	var ts unix.Timespec
	if err := unix.ClockGettime(unix.CLOCK_BOOTTIME, &ts); err != nil {
		panic("quota: the kernel has no CLOCK_BOOTTIME: " + err.Error()) // every Linux since 2.6.39 has it
	}
	return lease.Instant(ts.Nano())
}
