package limits

import (
	"bytes"
	"log/slog"
	"testing"
	"time"

	"github.com/relais-mta/relais/relay/engine"
	"github.com/relais-mta/relais/shared/lease"
	"github.com/relais-mta/relais/shared/policy"
	"github.com/relais-mta/relais/shared/throttle"
)

// lend makes limits those of the cluster; the relay's view comes later.
func (w *world) lend(limits ...policy.SharedLimit) {
	w.t.Helper()
	for _, l := range limits {
		if err := w.table.PutLimit(l.Limit); err != nil {
			w.t.Fatal(err)
		}
		w.grantor.PutLimit(l.Limit)
	}
}

// seeBefore makes limits those of the relay's view alone: the leader lends by those of before.
func (w *world) seeBefore(limits ...policy.SharedLimit) {
	w.t.Helper()
	before := w.grantor
	w.grantor = nil
	table := w.table
	w.table = lease.NewTable()
	w.see(limits...)
	w.table, w.grantor = table, before
}

func (w *world) connectAll(n int) (places []*engine.Place) {
	for range n {
		if p := place(nil); w.connect(p) {
			places = append(places, p)
		}
	}
	return places
}

// defects keeps what the relay logs as errors.
func (w *world) defects() *bytes.Buffer {
	var out bytes.Buffer
	w.limits.log = slog.New(slog.NewTextHandler(&out, &slog.HandlerOptions{Level: slog.LevelError}))
	return &out
}

// A limit is raised, and the grant of it comes before the view: until that is
// there the former limit holds. No slot is lost by that, and nobody is told of a
// defect.
func TestAGrantMayComeBeforeItsView(t *testing.T) {
	w := newWorld(t, slotLimit(1, 2), rateLimit(2, nil))
	defects := w.defects()
	w.wants(1000, 0)
	w.pass(2 * time.Second)
	rate := rateLimit(2, func(l *policy.SharedLimit) { l.Max, l.Burst = 60_000*lease.Milli, 200 })
	w.lend(slotLimit(1, 10), rate)
	w.pass(2 * time.Second)
	if g := w.gate(1); g.Sessions != 2 {
		t.Errorf("the scheduler may have %d sessions, the view says 2", g.Sessions)
	}
	if g := w.gate(2); g.Messages.Per < 100*time.Millisecond || g.Messages.Burst > 10 {
		t.Errorf("the scheduler has a rate of %+v, the view says 600 a minute", g.Messages)
	}
	open := w.connectAll(8)
	if len(open) != 2 {
		t.Errorf("%d connections are open, the view says 2", len(open))
	}
	for _, p := range open {
		w.limits.Closed(time.Now(), p)
	}
	begun := 0
	for range 100 {
		if w.begin().Reason == "" {
			begun++
		}
	}
	if begun > 11 {
		t.Errorf("%d messages begun at once, the view says 10", begun)
	}
	w.seeBefore(slotLimit(1, 10), rate)
	w.pass(2 * time.Second)
	if open = w.connectAll(20); len(open) != 10 {
		t.Errorf("%d connections are open when the view is there, not 10", len(open))
	}
	if defects.Len() > 0 {
		t.Errorf("errors of the program are told of:\n%s", defects)
	}
}

// A limit is lowered, and the view comes before the grant that says less.
func TestAViewMayComeBeforeItsGrant(t *testing.T) {
	w := newWorld(t, slotLimit(1, 10), rateLimit(2, nil))
	defects := w.defects()
	w.wants(1000, 0)
	w.pass(2 * time.Second)
	open := w.connectAll(8)
	for range 5 {
		w.begin()
	}
	rate := rateLimit(2, func(l *policy.SharedLimit) { l.Max, l.Burst = 6*lease.Milli, 3 })
	w.seeBefore(slotLimit(1, 2), rate)
	if got := w.connectAll(5); len(got) > 0 {
		t.Errorf("%d connections more beside the 8 that are open, the view says 2", len(got))
	}
	for range 20 {
		w.begin()
	}
	for _, p := range open {
		w.limits.Closed(time.Now(), p)
	}
	if open = w.connectAll(5); len(open) != 2 {
		t.Errorf("%d connections are open, the view says 2", len(open))
	}
	for _, p := range open {
		w.limits.Closed(time.Now(), p)
	}
	w.lend(slotLimit(1, 2), rate)
	w.pass(5 * time.Second)
	begun := 0
	for end := w.clock.Add(time.Minute); w.clock < end; w.pass(250 * time.Millisecond) {
		if w.begin().Reason == "" {
			begun++
		}
	}
	if begun < 5 || begun > 9 {
		t.Errorf("%d messages in a minute, the limit is 6 and a burst of 3", begun)
	}
	if open = w.connectAll(5); len(open) != 2 {
		t.Errorf("%d connections are open, the limit is 2", len(open))
	}
	if defects.Len() > 0 {
		t.Errorf("errors of the program are told of:\n%s", defects)
	}
}

// A burst of far more than the rate gives in the span is saved for as long as that
// takes: the gate of the scheduler lets through what the books do.
func TestABurstOfYears(t *testing.T) {
	w := newWorld(t, rateLimit(1, func(l *policy.SharedLimit) { l.Max, l.Per, l.Burst = lease.Milli, lease.MaxPer, lease.MaxBurst }))
	w.wants(1000, 0)
	w.pass(2 * time.Second)
	g := w.gate(1)
	if g.NoMessages || g.Messages.Per > 26*time.Hour || g.Messages.Burst < 1 {
		t.Fatalf("%+v", g)
	}
	if g.Messages.Per > 0 && int64(g.Messages.Burst) > (1<<61)/int64(g.Messages.Per) {
		t.Errorf("the scheduler does not know a rate of %+v, and lets one message a year through", g.Messages)
	}
	if lim := w.limits.table.Load().limits[0]; lim.whole == (throttle.Bucket{}) {
		t.Error("nothing is held against the whole limit")
	}
}

// What one limit refuses takes nothing of the whole of another that was asked before.
func TestARefusalTakesNothingOfAnother(t *testing.T) {
	w := newWorld(t, rateLimit(1, nil))
	defects := w.defects()
	w.wants(1000, 0)
	w.pass(5 * time.Second)
	w.seeBefore(rateLimit(1, nil), rateLimit(2, nil)) // of the second nothing is lent
	for range 50 {
		if h := w.begin(); h.Reason == "" || h.Gate.Number != 2 {
			t.Fatalf("%+v", h)
		}
	}
	w.seeBefore(rateLimit(1, nil))
	begun := 0
	for w.begin().Reason == "" {
		begun++
	}
	if begun < 8 || defects.Len() > 0 {
		t.Errorf("%d begun of a burst of 9\n%s", begun, defects)
	}
}
