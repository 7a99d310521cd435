package schedule

import (
	"testing"
	"time"

	"github.com/relais-mta/relais/shared/mailaddr"
	"github.com/relais-mta/relais/shared/policy"
)

// TestNewLimitsHoldWhereNothingWaits: a limit that changes while no mail for the
// provider waits counts for the next, over sessions that are kept and over new ones.
func TestNewLimitsHoldWhereNothingWaits(t *testing.T) {
	for _, tc := range []struct {
		name  string
		shape Shape
	}{
		{"of each source", Shape{SourceMessageRate: Rate{Max: 10, Per: time.Second, Burst: 1}}},
		{"of the relay", Shape{RelayMessageRate: Rate{Max: 10, Per: time.Second, Burst: 1}}},
	} {
		t.Run(tc.name, func(t *testing.T) {
			const messages = 100
			w := newWorld(t, 1, Limits{})
			w.s.SetPool(testPool(1), sources(1))
			w.route("a.test", "a", "mx", Shape{})
			w.add(1, testKey(1, policy.Bulk, "a.test"), messages)
			w.run(time.Minute)
			lane := Lane{Source: sources(1)[0].ID, Provider: "a"}
			if n := len(w.sent[lane]); n != messages {
				t.Fatalf("%d of %d messages were sent without limits", n, messages)
			}
			clear(w.sent)
			clear(w.opened)
			w.shapes["a"] = tc.shape // which checkRates goes by
			w.s.Reshape(func(string) (Shape, bool) { return tc.shape, true }, w.now)
			w.add(2, testKey(2, policy.Bulk, "a.test"), messages)
			before := w.now
			w.run(time.Minute)
			w.checkRates()
			if n, took := len(w.sent[lane]), w.now.Sub(before); n != messages {
				t.Errorf("%d of %d messages were sent in %v", n, messages, took)
			}
		})
	}
}

// TestDomainsKeepNoFormerLimits: what a domain knows of its provider's limits is
// not brought back by its next mail, whether or not it is looked up again.
func TestDomainsKeepNoFormerLimits(t *testing.T) {
	s := New(Limits{})
	now := time.Unix(1_800_000_000, 0)
	s.SetPool(testPool(1), sources(1))
	key := testKey(1, policy.Bulk, "a.test")
	s.SetHead(1, key, now, 1, now)
	s.Next(now)
	s.Routed("a.test", Route{Provider: "a", Site: "mx", Expires: now.Add(time.Hour)}, now)
	want := Shape{SourceConnections: 3}
	s.Reshape(func(provider string) (Shape, bool) { return want, provider == "a" }, now)
	if got := s.domains[mailaddr.Domain("a.test")].route.Shape; got != want {
		t.Errorf("the domain has the limits %+v, want %+v", got, want)
	}
	key.Pool = testPool(2) // another pool's mail to it makes a group of its own
	s.SetHead(2, key, now, 1, now)
	if got := s.groups[groupKey{testPool(2), "a"}].limits; got != want {
		t.Errorf("a new group has the limits %+v, want %+v", got, want)
	}
	s.Reshape(func(string) (Shape, bool) { return Shape{}, false }, now)
	if got := s.groups[groupKey{testPool(1), "a"}].limits; got != want {
		t.Errorf("a provider that the policy does not name lost its limits: %+v", got)
	}
}
