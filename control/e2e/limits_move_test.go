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
	moveRest  = 2 * moveTTL // more, if a leader comes meanwhile: it counts the leases that it inherits anew
	moveMail  = 2400        // more than goes in the test, to one relay
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
	eventually(t, 2*time.Minute, "the first relay to have nearly all", func() bool { return metricOf(t, first, moveShare) >= 540 })
	submitted := make(chan struct{})
	before, from := lenders(t, f.servers), time.Now()
	go func() {
		defer close(submitted)
		submit(second, to)
	}()
	// A leader that comes meanwhile, because the machine was too busy for the servers
	// to hear each other, is a fault of its own.
	has := func(r *fleet.Relay, least float64, most time.Duration) time.Duration {
		t.Helper()
		eventually(t, most+moveRest, "the second relay to have its part", func() bool { return metricOf(t, r, moveShare) >= least })
		took := time.Since(from)
		if more := lenders(t, f.servers) - before; took > most && more == 0 {
			t.Errorf("it took %v until the second relay had its part, want %v", took, most)
		} else if more > 0 {
			t.Logf("%d leaders came meanwhile", more)
		}
		return took
	}
	live := has(second, 200, moveLive)
	<-submitted
	eventually(t, 3*moveTTL, "both to have floors", func() bool {
		return metricOf(t, first, `relais_relay_limit_floor{counts="messages",limit="rate"}`) > 0 && metricOf(t, second, `relais_relay_limit_floor{counts="messages",limit="rate"}`) > 0
	})
	if share := metricOf(t, second, moveShare); share > 400 {
		t.Errorf("of 600 the second relay has %v, and the first wants as much", share)
	}
	before, from = lenders(t, f.servers), time.Now()
	first.Kill()
	dead := has(second, 430, moveDead)
	t.Logf("from mail to a share of a live relay %v, from the end of a relay to its share %v", live.Round(time.Millisecond), dead.Round(time.Millisecond))
	if least := moveTTL * 2 / 3 * 9 / 10; dead < least { // it reported a third of a TTL and a fifth of that ago, at most
		t.Errorf("a dead relay's share was lent after %v: its lease may have run for %v", dead, least)
	}
}
