package e2e

import (
	"net/netip"
	"testing"
	"time"

	"github.com/relais-mta/relais/shared/lab"
	"github.com/relais-mta/relais/shared/lab/fleet"
)

const (
	bothMessages = 3000 // for the three relays: more than goes in the test
	bothAnswer   = 50 * time.Millisecond
	bothWindow   = 90 * time.Second
	bothUse      = 0.85 // of the rate: 95 % are lent out, and when a connection changes hands its part of them rests for half a second
)

const bothPolicy = `[[limit]]
name = "both"
provider = "google"
messages = "600/1m"
burst = 60
connections = 2

[lease]
ttl = "10s"
linger = "5s"
hold = "30s"
`

// TestRateMovesWithConnections: one limit of both kinds, with a connection less than
// there are relays. They take turns with the connections, and the rate has to be
// where these are: a relay that waits for its turn can use none of it.
func TestRateMovesWithConnections(t *testing.T) {
	f := start(t, fleet.Config{Relays: 3, Open: true, NoDKIM: true, Policy: map[string]string{"limits": bothPolicy}})
	m := &mx{t: t, lab: f.Lab, slots: "google", servers: []*fleet.ControlServer{f.FirstServer()}, end: make(chan struct{})}
	m.watch(bothAnswer)
	var to []string
	for i := range bothMessages {
		address, err := f.Lab.Recipient("google", i%200, lab.Accept)
		if err != nil {
			t.Fatal(err)
		}
		to = append(to, address)
	}
	supply(t, f, fleet.Stream{Recipients: to, Size: 1000, Connections: 4, Tag: "both"})
	eventually(t, sharedStart, "both to be used", func() bool {
		now := time.Now()
		rate, open, _ := m.use(now.Add(-5*time.Second), now, netip.Addr{})
		return rate > bothUse && open > bothUse/2
	})
	var begun time.Time
	for try := 1; ; try++ {
		before := lenders(t, m.servers)
		begun = time.Now()
		rest(t, bothWindow, "turns to be taken")
		rate, open, _ := m.use(begun, time.Now(), netip.Addr{})
		t.Logf("%.0f %% of the rate was used in %v, and %.0f %% of the connections were open", 100*rate, bothWindow, 100*open)
		if rate >= bothUse {
			break
		}
		// A server that could not write for seconds, on a busy machine, lends anew.
		if more := lenders(t, m.servers) - before; more == 0 || try == sharedTries {
			t.Errorf("%.1f %% of the rate were used, want %.0f %%", 100*rate, 100*bothUse)
			break
		}
	}
	for _, r := range f.Relays {
		if _, _, n := m.use(begun, time.Now(), r.Sources[0]); n == 0 {
			t.Errorf("%s never had its turn", r.Name)
		}
	}
	m.stop()
	m.run.Wait()
	m.check()
}
