package schedule

import (
	"testing"
	"time"

	"github.com/relais-mta/relais/shared/policy"
)

// A lane says what holds its due mail, and nothing when none waits.
func TestLaneStates(t *testing.T) {
	w := newWorld(t, 1, Limits{})
	w.s.SetPool(testPool(1), sources(2))
	w.route("a.test", "p", "a", Shape{SourceConnectionRate: Rate{Max: 1, Per: time.Hour, Burst: 1}})
	w.route("b.test", "q", "b", Shape{})
	w.dials["a"] = 30 * time.Minute
	w.add(1, testKey(1, policy.Bulk, "a.test"), 5)
	w.add(2, testKey(1, policy.Bulk, "b.test"), 1)
	began := w.now
	w.run(time.Minute)
	seen := 0
	for _, l := range w.s.LaneStates(w.now) {
		switch l.Lane.Provider {
		case "p":
			seen++
			if l.Waiting == 0 || l.Hold != holdRate || !l.Until.After(w.now) || l.Since.IsZero() || l.Since.Before(began) || l.Since.After(w.now) {
				t.Errorf("lane %+v waits for %q until %v since %v", l.Lane, l.Hold, l.Until.Sub(began), l.Since.Sub(began))
			}
		case "q":
			if l.Hold != "" || !l.Since.IsZero() {
				t.Errorf("a lane without due mail: %+v", l)
			}
		}
	}
	if seen != 2 {
		t.Errorf("%d lanes of the provider", seen)
	}
	if got, want := len(w.s.LaneStates(w.now)), len(w.s.Lanes()); got != want {
		t.Errorf("%d states of %d lanes", got, want)
	}
}
