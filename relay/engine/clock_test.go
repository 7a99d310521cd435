package engine

import (
	"testing"
	"time"
)

func TestClockIsNotTrustedAfterAJump(t *testing.T) {
	dir := t.TempDir()
	start := time.Now()
	c, err := NewClock(dir, start, nil)
	if err != nil {
		t.Fatal(err)
	}
	if p := c.Problem(start.Add(time.Hour)); p != "" {
		t.Errorf("an hour later: %s", p)
	}
	// The wall clock alone went an hour ahead: a time without the monotonic
	// reading of the start.
	c.start = start.Add(-time.Hour).Round(0)
	if p := c.Problem(start); p != "" {
		t.Errorf("no monotonic reading to compare with, yet %s", p)
	}
	if err := c.Save(start); err != nil {
		t.Fatal(err)
	}
	again, err := NewClock(dir, start, func() (time.Duration, bool) { return 0, true })
	if err != nil {
		t.Fatal(err)
	}
	if p := again.Problem(start.Add(-time.Hour).Round(0)); p == "" {
		t.Error("a clock an hour behind an earlier run is trusted")
	}
	ahead, err := NewClock(t.TempDir(), start, func() (time.Duration, bool) { return 2 * time.Minute, true })
	if err != nil {
		t.Fatal(err)
	}
	if ahead.Problem(start) == "" {
		t.Error("a clock two minutes ahead of control is trusted")
	}
}
