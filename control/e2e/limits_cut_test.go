package e2e

import (
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"math"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/relais-mta/relais/shared/lab/fleet"
)

const (
	sharedTTL     = 10 * time.Second // of the leases, in the policy
	sharedCutUser = 47_110           // the relay that is cut off runs as
	sharedCutOff  = 20 * time.Second // it has its floor alone and is looked at for
	sharedKnown   = 30 * time.Second // it says itself how it stands by then, on a busy machine
	sharedRelink  = 90 * time.Second // at the end of the cut its next try may be 45 s away
)

// allowCuts makes rules of routing come before the addresses of the machine, so
// that a rule can cut a user off from some of them.
func allowCuts(t *testing.T) {
	t.Helper()
	run(t, "ip rule add pref 100 lookup local")
	run(t, "ip rule del pref 0")
}

// cut has nothing pass from the user to the servers, in no protocol, and returns
// what ends that.
func cut(t *testing.T, user uint32, servers []*fleet.ControlServer) (mend func()) {
	t.Helper()
	rules := func(verb string) {
		for _, s := range servers {
			run(t, fmt.Sprintf("ip rule %s pref 50 uidrange %d-%d to %s/32 blackhole", verb, user, user, s.Addr))
		}
	}
	rules("add")
	return func() { rules("del") }
}

// floorOf returns what the relay has on its disk for the time when it is cut off:
// messages a minute and burst; 0 for a relay that has none.
func floorOf(t *testing.T, r *fleet.Relay) (perMinute, burst float64) {
	t.Helper()
	var disk struct {
		Floors []struct {
			Per    time.Duration `json:"per_ns"` // of rates
			Amount float64       `json:"amount"` // thousandths
			Burst  float64       `json:"burst"`
		} `json:"floors"`
	}
	text, err := os.ReadFile(filepath.Join(r.Dir, "limits.json"))
	if errors.Is(err, fs.ErrNotExist) {
		return 0, 0
	}
	if err == nil {
		err = json.Unmarshal(text, &disk)
	}
	if err != nil {
		t.Fatal(err)
	}
	for _, f := range disk.Floors {
		if f.Per > 0 {
			return f.Amount / 1000 / f.Per.Minutes(), f.Burst
		}
	}
	return 0, 0
}

// links counts the relay's sessions since its start.
func links(t *testing.T, r *fleet.Relay) int {
	t.Helper()
	return linkedOver(t, r, "quic") + linkedOver(t, r, "tcp")
}

// cutOff cuts a relay off from all servers. What it sends until a TTL after its last
// report is of its lease; what it sends later is of its floor, and of what that may
// save up.
func (m *mx) cutOff(f *trio, r *fleet.Relay) {
	t, source := m.t, r.Sources[0]
	t.Helper()
	for _, r := range f.Relays { // who began last gets its floor within a TTL of the first division
		eventually(t, 3*sharedTTL, r.Name+" to have a floor", func() bool {
			perMinute, burst := floorOf(t, r)
			return perMinute > 0 && burst > 0
		})
	}
	linked := links(t, r)
	asked := time.Now()
	mend := cut(t, sharedCutUser, f.servers)
	begun := time.Now() // no report is sent later
	var perMinute, burst float64
	eventually(t, sharedKnown, "the floor in use to be the one on the disk", func() bool { // one may have come right before
		perMinute, burst = floorOf(t, r)
		return metricOf(t, r, `relais_relay_limit_floor{counts="messages",limit="rate"}`) == perMinute
	})
	rest(t, sharedTTL+sharedOverlap, "the lease to end")
	from := time.Now()
	eventually(t, sharedKnown, "the relay to know that it has its floor alone", func() bool {
		return slices.ContainsFunc(f.lanes(r), func(l laneRow) bool {
			return l.Provider == "google" && strings.Contains(l.HoldText, "(its floor)") && strings.Contains(l.HoldText, "cut off from control")
		})
	})
	rest(t, sharedCutOff-time.Since(from), "it to be looked at")
	to := time.Now()
	if s, err := statusOf(r); err != nil || s.Connected || links(t, r) != linked {
		t.Errorf("the relay was linked %d times in the cut, and says %+v (%v)", links(t, r)-linked, s, err)
	}
	if now, _ := floorOf(t, r); now != perMinute {
		t.Errorf("the floor was %v a minute and is %v: somebody was heard", perMinute, now)
	}
	mend()
	_, _, leased := m.use(asked, from, source)
	rate, open, floored := m.use(from, to, source)
	// What began right before may be seen right after.
	most := perMinute*(to.Sub(from)+sharedOverlap).Minutes() + burst
	t.Logf("cut off, of a floor of %.0f a minute and a burst of %.0f: %d messages in %v, at most %.1f are right; %d in the %v before, of the lease; all relays had %.0f %% of the rate and %.0f %% of the connections",
		perMinute, burst, floored, to.Sub(from).Round(time.Millisecond), most, leased, from.Sub(begun).Round(time.Millisecond), 100*rate, 100*open)
	if float64(floored) > most {
		t.Errorf("a relay that is cut off sent %d messages in %v: its floor of %.0f a minute and a burst of %.0f allows %.1f", floored, to.Sub(from), perMinute, burst, most)
	}
	if least := math.Floor(perMinute * to.Sub(from).Minutes() / 2); float64(floored) < least {
		t.Errorf("a relay that is cut off sent %d messages in %v: it does not use its floor of %.0f a minute", floored, to.Sub(from), perMinute)
	}
	eventually(t, sharedRelink, "the relay to be linked again", func() bool { return links(t, r) > linked })
	m.back("a relay was cut off")
	if _, _, again := m.use(time.Now().Add(-sharedWindow), time.Now(), source); float64(again) <= perMinute*sharedWindow.Minutes()+burst {
		t.Errorf("the relay sent %d messages in %v long after the cut: it has its floor alone still", again, sharedWindow)
	}
}
