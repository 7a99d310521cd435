package e2e

import (
	"testing"
	"time"

	"github.com/relais-mta/relais/shared/lab"
	"github.com/relais-mta/relais/shared/lab/fleet"
)

// The limit of the test and how soon its parts must move. What a part takes to move is
// tried to the millisecond in virtual time (control/quota); here a busy machine counts.
const (
	moveShare = `relais_relay_limit_share{counts="messages",limit="rate"}`
	moveTTL   = 30 * time.Second // of leases, as by default
	moveLive  = 10 * time.Second
	moveDead  = 50 * time.Second
	moveMail  = 2400 // more than goes in the test, to one relay
)

const movePolicy = `[[limit]]
name = "rate"
provider = "google"
messages = "600/1m"
burst = 60
`

// TestSharesMove has one relay with mail for a limit that all have in common, then
// another one, then kills the first, and looks at how long the second waits for its
// part: what the first can spare, and all that it had.
func TestSharesMove(t *testing.T) {
	f := startTrio(t, fleet.Config{Relays: 2, Open: true, NoDKIM: true, Policy: map[string]string{"limits": movePolicy}})
	first, second := f.Relays[0], f.Relays[1]
	var to []string
	for i := range moveMail {
		address, err := f.Lab.Recipient("google", i%200, lab.Accept)
		if err != nil {
			t.Fatal(err)
		}
		to = append(to, address)
	}
	submit := func(r *fleet.Relay, to []string) {
		t.Helper()
		if _, err := f.Submit(within(t, 2*time.Minute), fleet.Stream{Recipients: to, Size: 1000, Connections: 2, Tag: "move", Only: r}); err != nil {
			t.Error(err)
		}
	}
	submit(first, to)
	eventually(t, time.Minute, "the first relay to have nearly all", func() bool { return metricOf(t, first, moveShare) >= 540 })
	submitted := make(chan struct{})
	from := time.Now()
	go func() {
		defer close(submitted)
		submit(second, to)
	}()
	has := func(r *fleet.Relay, least float64, most time.Duration) time.Duration {
		t.Helper()
		eventually(t, most, "the second relay to have its part", func() bool { return metricOf(t, r, moveShare) >= least })
		return time.Since(from)
	}
	live := has(second, 200, moveLive)
	<-submitted
	eventually(t, 3*moveTTL, "both to have floors", func() bool {
		return metricOf(t, first, `relais_relay_limit_floor{counts="messages",limit="rate"}`) > 0 && metricOf(t, second, `relais_relay_limit_floor{counts="messages",limit="rate"}`) > 0
	})
	before := metricOf(t, second, moveShare)
	if before > 400 {
		t.Errorf("of 600 the second relay has %v, and the first wants as much", before)
	}
	from = time.Now()
	first.Kill()
	dead := has(second, 430, moveDead)
	t.Logf("from mail to a share of a live relay %v, from the end of a relay to its share %v", live.Round(time.Millisecond), dead.Round(time.Millisecond))
	if least := moveTTL * 2 / 3 * 9 / 10; dead < least { // it reported a third of a TTL and a fifth of that ago, at most
		t.Errorf("a dead relay's share was lent after %v: its lease may have run for %v", dead, least)
	}
}
