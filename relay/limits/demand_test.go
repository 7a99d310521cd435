package limits

import (
	"testing"
	"time"

	"github.com/relais-mta/relais/relay/schedule"
	"github.com/relais-mta/relais/shared/lease"
	"github.com/relais-mta/relais/shared/policy"
	"github.com/relais-mta/relais/shared/wire"
)

// A relay that has no connection under one limit leaves the rate of another to
// those that have one, and asks for it as soon as it gets one.
func TestNoRateIsWantedWithoutAConnection(t *testing.T) {
	w := newWorld(t, rateLimit(1, func(l *policy.SharedLimit) { l.FloorPercent = 0 }), slotLimit(2, 1))
	rate := w.limits.table.Load().byNumber[1]
	wanted := func() int64 { return rate.demand(&schedule.GateState{Waiting: 600}, sampleEvery) }
	w.wants(600, 0)
	w.pass(3 * time.Second)
	if got := wanted(); got < 600*lease.Milli {
		t.Fatalf("with the connection %d of the rate is wanted", got)
	}
	p := place(func() {})
	if !w.connect(p) {
		t.Fatal("no connection")
	}
	w.cut = true // the leader gives it to somebody else
	w.limits.Linked(false)
	w.pass(11 * time.Second)
	if wanted() == 0 {
		t.Error("a connection is open and has the right to go on, but no rate is wanted")
	}
	w.limits.Closed(time.Now(), p)
	w.limits.round()
	if got := wanted(); got != 0 {
		t.Errorf("without a connection %d of the rate is wanted", got)
	}
	w.cut = false
	w.limits.Linked(true)
	w.pass(2 * time.Second)
	if got := wanted(); got < 600*lease.Milli {
		t.Errorf("with the connection again %d of the rate is wanted", got)
	}
	if g := w.gate(1); g.NoMessages {
		t.Errorf("and nothing given: %+v", g)
	}
}

// What counts all that a rate counts, and what does not.
func TestConnectionsBehindARate(t *testing.T) {
	provider := func(name string) func(*policy.SharedLimit) {
		return func(l *policy.SharedLimit) { l.Provider = name }
	}
	open := func(name string) policy.SharedLimit {
		l := slotLimit(9, 1)
		l.Provider = name
		return l
	}
	for _, c := range []struct {
		rate, open string
		want       bool
	}{{"google", "google", true}, {"google", "", true}, {"", "google", false}, {"yahoo", "google", false}} {
		lim, slots := limit{SharedLimit: rateLimit(1, provider(c.rate))}, limit{SharedLimit: open(c.open)}
		if got := slots.covers(&lim); got != c.want {
			t.Errorf("connections of %q cover a rate of %q: %v", c.open, c.rate, got)
		}
	}
	lim, slots := limit{SharedLimit: rateLimit(1, nil)}, limit{SharedLimit: open("google")}
	slots.Tenant = acme
	if slots.covers(&lim) {
		t.Error("the connections of one tenant cover the rate of all")
	}
	lim.Tenant = acme
	if !slots.covers(&lim) {
		t.Error("a tenant's connections do not cover its rate")
	}
	lim.Domain, slots.Pool = "gmail.test", pool
	if slots.covers(&lim) {
		t.Error("the connections of a pool cover the rate of a domain in all pools")
	}
}

// Mail that waits for something else takes of a limit what it uses, and not what
// others could use.
func TestAHostThatIsSlowWantsNoMoreThanItTakes(t *testing.T) {
	lim := &limit{SharedLimit: rateLimit(1, nil)}
	sample := func(held bool, begun int, d time.Duration) (got int64) {
		for ; d > 0; d -= 250 * time.Millisecond {
			lim.begun = begun
			got = lim.demand(&schedule.GateState{Waiting: 10_000, Held: held}, 250*time.Millisecond)
		}
		return got
	}
	all := demandFactor * lim.Max
	if got := sample(true, 1, 5*time.Second); got != all {
		t.Errorf("the limit holds the mail, %d is wanted, not %d", got, all)
	}
	if got := sample(false, 1, 10*time.Second); got < 240_000 || got > 490_000 {
		t.Errorf("240 a minute are used, %d is wanted", got)
	}
	if got := sample(false, 0, 30*time.Second); got > 10*lease.Milli || got < lease.Milli {
		t.Errorf("nothing is used, %d is wanted", got)
	}
	if got := sample(true, 0, time.Millisecond); got != all {
		t.Errorf("the limit holds the mail again, %d is wanted", got)
	}
}

// A limit that goes while the scheduler is asked what waits for it is not wanted:
// its number is never used again, and would be in every report.
func TestALimitThatIsGoneIsNotWanted(t *testing.T) {
	w := newWorld(t, slotLimit(1, 2), rateLimit(2, nil))
	w.wants(100, 0)
	w.pass(2 * time.Second)
	w.see(slotLimit(1, 2), rateLimit(2, nil), slotLimit(3, 5))
	w.wants(100, 0)
	w.meanwhile = func() {
		w.table.DropLimit(3)
		w.grantor.DropLimit(3)
		w.see(slotLimit(1, 2), rateLimit(2, nil))
	}
	w.pass(5 * time.Second)
	report := last[*wire.LeaseReport](w)
	decoded, err := wire.DecodeLeaseReport(self, report)
	if err != nil || w.meanwhile != nil {
		t.Fatal("the view did not change meanwhile", err)
	}
	if len(decoded.Lines) != 2 {
		t.Errorf("the report lists %+v", decoded.Lines)
	}
}
