package schedule

import (
	"fmt"
	"testing"
	"time"

	"github.com/relais-mta/relais/shared/mailaddr"
	"github.com/relais-mta/relais/shared/policy"
)

// lookups returns the domains that are to be looked up now.
func lookups(s *Scheduler, now time.Time) (out []mailaddr.Domain) {
	for _, f := range s.Next(now) {
		if f.Kind == Resolve {
			out = append(out, f.Domain)
		}
	}
	return out
}

// After a restart all domains of a backlog want a look-up. New transactional
// mail to another one does not stand behind them, even while all that are in
// flight go to servers that do not answer, nor do they wait for ever.
func TestTransactionalMailIsLookedUpFirst(t *testing.T) {
	const most, backlog = 20, 1_000
	s, now := New(Limits{MaxResolvesInFlight: most}), time.Unix(1_800_000_000, 0)
	for i := range backlog {
		s.SetHead(Queue(i), testKey(1, policy.Bulk, fmt.Sprintf("dead%d.test", i)), now, 10, now)
	}
	if got := len(lookups(s, now)); got != most*3/4 {
		t.Fatalf("%d look-ups for bulk mail at once, want three quarters of %d", got, most)
	}
	for i := range 3 {
		domain := fmt.Sprintf("live%d.test", i)
		s.SetHead(Queue(backlog+i), testKey(2, policy.Transactional, domain), now, 1, now)
		if got := lookups(s, now); len(got) != 1 || string(got[0]) != domain {
			t.Fatalf("transactional mail to %s has %v looked up", domain, got)
		}
	}
	// Mail for a domain that stands in line already takes it forward.
	s.SetHead(backlog+5, testKey(2, policy.Transactional, "dead999.test"), now, 1, now)
	if got := lookups(s, now); len(got) != 1 || string(got[0]) != "dead999.test" {
		t.Fatalf("transactional mail to a domain in line has %v looked up", got)
	}
	// More transactional domains than there is room for leave some to others.
	for i := range 100 {
		s.SetHead(Queue(2*backlog+i), testKey(2, policy.Transactional, fmt.Sprintf("more%d.test", i)), now, 1, now)
	}
	begun := lookups(s, now)
	bulk := 0
	for range 50 {
		for _, d := range begun {
			s.Unroutable(d, now.Add(time.Hour))
			if d[:4] == "dead" {
				bulk++
			}
		}
		begun = lookups(s, now)
	}
	if bulk < 5 {
		t.Errorf("%d look-ups for bulk mail beside much transactional mail, want some", bulk)
	}
}
