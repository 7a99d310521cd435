package e2e

import (
	"encoding/json"
	"strings"
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
	mail := func(r *fleet.Relay) (stop func()) {
		t.Helper()
		return supply(t, f.Fleet, fleet.Stream{Recipients: to, Size: 1000, Connections: 2, Tag: "move-" + r.Name, Only: r})
	}
	stop := mail(first)
	eventually(t, 2*time.Minute, "the first relay to have nearly all", func() bool { return metricOf(t, first, moveShare) >= 540 })
	mail(second)
	eventually(t, 2*time.Minute, "the second relay to have mail", func() bool { return metricOf(t, second, "relais_relay_queue_waiting_recipients") > 0 })
	before, from := lenders(t, f.servers), time.Now()
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
	eventually(t, 3*moveTTL, "both to have floors", func() bool {
		return metricOf(t, first, `relais_relay_limit_floor{counts="messages",limit="rate"}`) > 0 && metricOf(t, second, `relais_relay_limit_floor{counts="messages",limit="rate"}`) > 0
	})
	// A relay that was not heard for a TTL, on a busy machine, begins anew.
	eventually(t, 3*moveTTL, "the second relay to have at most 400 of 600, as the first wants as much", func() bool {
		share := metricOf(t, second, moveShare)
		return share > 0 && share <= 400
	})
	stop()
	before, from = lenders(t, f.servers), time.Now()
	first.Kill()
	heard := f.heardLast(first)
	dead := has(second, 430, moveDead)
	t.Logf("from mail to a share of a live relay %v, from the end of a relay to its share %v", live.Round(time.Millisecond), dead.Round(time.Millisecond))
	if lent := from.Add(dead).Sub(heard); lent < moveTTL {
		t.Errorf("a dead relay's share was lent %v after its last report: its lease ran for %v", lent, moveTTL)
	}
}

// heardLast returns when the leader heard of a relay last, or sooner by what asking took.
func (f *trio) heardLast(r *fleet.Relay) (at time.Time) {
	f.t.Helper()
	eventually(f.t, time.Minute, "the leader to say when it heard of "+r.Name, func() bool {
		var answer struct {
			Items []struct {
				Holders []struct {
					Node      string     `json:"node"`
					LastHeard *time.Time `json:"last_heard"`
				} `json:"holders"`
			} `json:"items"`
		}
		asked := time.Now()
		if err := json.Unmarshal([]byte(ctl(f.t, f.Fleet, "limit", "show", "rate", "--json")), &answer); err != nil {
			f.t.Fatal(err)
		}
		for _, l := range answer.Items {
			for _, h := range l.Holders {
				if strings.HasPrefix(h.Node, r.Name+".") && h.LastHeard != nil {
					at = h.LastHeard.Add(-time.Since(asked))
				}
			}
		}
		return !at.IsZero()
	})
	return at
}
