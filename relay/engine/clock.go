package engine

import (
	"encoding/json"
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"time"

	"github.com/relais-mta/relais/shared/fault"
)

// maxClockError is how far the wall clock may be off before nothing expires.
const maxClockError = 60 * time.Second

const clockFile = "clock.json"

// Clock says whether the wall clock can be trusted with ending messages. A
// machine whose clock jumps a day ahead must not bounce its whole queue.
type Clock struct {
	path    string
	start   time.Time
	latest  time.Time // of an earlier run
	control func() (offset time.Duration, known bool)
}

type clockRecord struct {
	Format int       `json:"format"`
	Latest time.Time `json:"latest"`
}

// NewClock reads the latest time that an earlier run saw. control returns how
// far this machine is ahead of the control server.
func NewClock(dir string, now time.Time, control func() (time.Duration, bool)) (*Clock, error) {
	const op = "engine.NewClock"
	c := &Clock{path: filepath.Join(dir, clockFile), start: now, control: control}
	text, err := os.ReadFile(c.path)
	if errors.Is(err, fs.ErrNotExist) {
		return c, nil
	}
	if err != nil {
		return nil, fault.Wrap(err, fault.Internal, op, "%s cannot be read", c.path)
	}
	var r clockRecord
	if err := json.Unmarshal(text, &r); err != nil {
		// It was being written when the power went: no worse than a first start.
		return c, nil
	}
	c.latest = r.Latest
	return c, nil
}

// Problem says what is wrong with the wall clock, "" if it can be trusted.
func (c *Clock) Problem(now time.Time) string {
	// Round strips the monotonic reading, so the first difference is of the
	// wall clock and the second of the monotonic one.
	jump := now.Round(0).Sub(c.start.Round(0)) - now.Sub(c.start)
	if jump.Abs() > maxClockError {
		return "the wall clock moved by " + jump.Round(time.Second).String() + " since the start: nothing expires until the relay is restarted with a right clock"
	}
	if back := c.latest.Sub(now.Round(0)); back > maxClockError {
		return "the wall clock is " + back.Round(time.Second).String() + " behind the time of an earlier run: nothing expires until it is set"
	}
	if c.control == nil {
		return ""
	}
	if offset, known := c.control(); known && offset.Abs() > maxClockError {
		return "the wall clock differs by " + offset.Round(time.Second).String() + " from control's: nothing expires until it is set"
	}
	return ""
}

// Save keeps the time for the next run, unless the clock is not trusted.
func (c *Clock) Save(now time.Time) error {
	if c.Problem(now) != "" {
		return nil
	}
	text, err := json.Marshal(clockRecord{Format: 1, Latest: now.Round(0)})
	if err != nil {
		return err
	}
	temp := c.path + ".new"
	if err := os.WriteFile(temp, text, 0o600); err != nil {
		return fault.Wrap(err, fault.Internal, "engine.Save", "%s cannot be written", temp)
	}
	return os.Rename(temp, c.path)
}
