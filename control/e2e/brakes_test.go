package e2e

import (
	"encoding/json"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/relais-mta/relais/shared/lab"
	"github.com/relais-mta/relais/shared/lab/fleet"
)

// What a provider in TestAReflexSettlesNearAProvidersLimit bears, and how it is
// watched.
const (
	reflexRate    = 20 // messages a second; the policy allows ten times that
	reflexMail    = 4000
	reflexSettles = 15 * time.Second
	reflexWatch   = 20 * time.Second
	reflexPolicy  = `
limit = [
  { provider = "*", kind = "connections", scope = "source", max = 5 },
  { provider = "*", kind = "messages_per_connection", scope = "source", max = 0 },
  { provider = "*", kind = "message_rate", scope = "source", max = 200, per = "1s", burst = 20 },
  { provider = "*", kind = "connection_rate", scope = "source", max = 0 },
]

[reflex]
min_per_hour = 3600
spacing = "1s"
step = "1s"
hold = "2s"
max_hold = "10s"
`
)

// tempfailing answers 421 to what comes above a rate, counted over a second.
type tempfailing struct {
	mu     sync.Mutex
	second int64
	n      int
	limit  int
	taken  atomic.Int64
	tried  atomic.Int64
}

func (p *tempfailing) answer(e lab.Event) lab.Answer {
	if e.Phase != lab.PhaseMail {
		return lab.Answer{}
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	if now := time.Now().Unix(); now != p.second {
		p.second, p.n = now, 0
	}
	p.tried.Add(1)
	if p.n++; p.n > p.limit {
		return lab.Answer{Reply: "451 4.7.28 an unusual rate of mail comes from you"}
	}
	p.taken.Add(1)
	return lab.Answer{}
}

// shownLane is a lane as `relais-relay lanes --json` shows it.
type shownLane struct{ Source, Provider, Reflex, Hold string }

// TestAReflexSettlesNearAProvidersLimit: a provider that answers 4xx above a rate
// gets about what it bears before long, and a provider beside it all that policy
// allows.
func TestAReflexSettlesNearAProvidersLimit(t *testing.T) {
	t.Parallel()
	f := start(t, fleet.Config{Open: true, NoDKIM: true, Policy: map[string]string{"providers": reflexPolicy}})
	slow := &tempfailing{limit: reflexRate}
	if err := f.Lab.SetBehaviour(lab.Google, lab.Behaviour{Answer: slow.answer}); err != nil {
		t.Fatal(err)
	}
	send := func(provider, tag string, n int) {
		to := make([]string, n)
		for i := range to {
			var err error
			if to[i], err = f.Lab.Recipient(provider, i, lab.Accept); err != nil {
				t.Fatal(err)
			}
		}
		if _, err := f.Submit(within(t, 2*time.Minute), fleet.Stream{Recipients: to, Size: 1000, Connections: 8, Tag: tag}); err != nil {
			t.Fatal(err)
		}
	}
	send(lab.Google, "slow", reflexMail)
	settled := time.Now().Add(reflexSettles)
	eventually(t, time.Minute, "time to settle", func() bool { return time.Now().After(settled) })
	tried, taken, began := slow.tried.Load(), slow.taken.Load(), time.Now()
	send(lab.Yahoo, "beside", 200)
	eventually(t, time.Minute, "the provider beside it to have its mail", func() bool {
		for _, l := range f.Lab.Report().Lanes {
			if l.Provider == lab.Yahoo && l.Recipients == 200 {
				return true
			}
		}
		return false
	})
	watched := began.Add(reflexWatch)
	eventually(t, time.Minute, "the watch to end", func() bool { return time.Now().After(watched) })
	span := time.Since(began).Seconds()
	triedRate, takenRate := float64(slow.tried.Load()-tried)/span, float64(slow.taken.Load()-taken)/span
	t.Logf("tried %.1f a second, taken %.1f, the provider bears %d", triedRate, takenRate, reflexRate)
	if triedRate > 1.5*reflexRate {
		t.Errorf("%.1f a second were tried, the provider bears %d", triedRate, reflexRate)
	}
	if takenRate < 0.5*reflexRate {
		t.Errorf("%.1f a second were taken, the provider bears %d", takenRate, reflexRate)
	}
	var lanes []shownLane
	if err := json.Unmarshal(relayCommand(t, f.Relays[0], "lanes", "--json"), &lanes); err != nil {
		t.Fatal(err)
	}
	for _, l := range lanes {
		if slowed := strings.Contains(l.Reflex, "451 4.7.28"); slowed != (l.Provider == lab.Google) {
			t.Errorf("%+v", l)
		}
	}
}

// TestBrakesHoldMailEverywhere: a brake holds mail on two relays within two
// seconds, also on one that is killed meanwhile, and lets it go when cancelled.
func TestBrakesHoldMailEverywhere(t *testing.T) {
	t.Parallel()
	f := start(t, fleet.Config{Relays: 2, Open: true, NoDKIM: true})
	w := startFlow(t, f)
	arrived := func() int64 { return f.Lab.Report().Recipients }
	still := func(text string) {
		t.Helper()
		last, since := arrived(), time.Now()
		eventually(t, 30*time.Second, text, func() bool {
			if n := arrived(); n != last {
				last, since = n, time.Now()
			}
			return time.Since(since) > 2*time.Second
		})
	}
	works := func(r *fleet.Relay, revision uint64) bool {
		return metricOf(t, r, "relais_relay_policy_revision") >= float64(revision)
	}
	eventually(t, time.Minute, "mail to arrive", func() bool { return arrived() > 50 })
	var brake struct {
		ID       string
		Revision uint64
	}
	set, err := f.Ctl(t.Context(), "brake", "set", "--pool", "default", "--hold", "--cause", "a test", "--json")
	began := time.Now()
	if err != nil || json.Unmarshal(set, &brake) != nil || !strings.HasPrefix(brake.ID, "brk_") || brake.Revision == 0 {
		t.Fatalf("%v: %s", err, set)
	}
	// Asked of the relays themselves: a command line that asks takes time of its own.
	eventually(t, 30*time.Second, "both relays to know of the brake", func() bool {
		return works(f.Relays[0], brake.Revision) && works(f.Relays[1], brake.Revision)
	})
	applied := time.Since(began)
	t.Logf("applied by both relays %v after the answer", applied.Round(time.Millisecond))
	if applied > 2*time.Second {
		t.Errorf("both relays knew of the brake only after %v", applied)
	}
	still("mail to stop")
	// What was being delivered then may still arrive, however late, and nothing else.
	eventually(t, time.Minute, "deliveries that had begun to end", func() bool {
		for _, r := range f.Relays {
			if q, err := r.Queue(t.Context()); err != nil || q.InFlight > 0 {
				return false
			}
		}
		return true
	})
	before := arrived()
	f.Relays[1].Kill()
	if err := f.Restart(within(t, time.Minute), f.Relays[1]); err != nil {
		t.Fatal(err)
	}
	still("the relay that was killed to be quiet")
	if n := arrived(); n != before {
		t.Errorf("%d recipients got mail while the brake held it", n-before)
	}
	w.stop()
	why := ""
	eventually(t, 30*time.Second, "a recipient to say what it waits for", func() bool {
		var list []listed
		if json.Unmarshal(relayCommand(t, f.Relays[0], "queue", "list", "--json"), &list) != nil || len(list) == 0 {
			return false
		}
		why = string(queueWhy(t, f.Relays[0], list[0].ID))
		return strings.Contains(why, "a test")
	})
	if !strings.Contains(why, "a brake of admin holds it") {
		t.Errorf("%s", why)
	}
	if out, err := f.Ctl(t.Context(), "brake", "list", "--json"); err != nil || !strings.Contains(string(out), brake.ID) {
		t.Errorf("%v: %s", err, out)
	}
	if out, err := f.Ctl(t.Context(), "brake", "cancel", brake.ID, "--reason", "done"); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	if err := f.WaitEmpty(within(t, 2*time.Minute), func(int64) {}); err != nil {
		t.Fatal(err)
	}
	if out, err := f.Ctl(t.Context(), "brake", "list"); err != nil || strings.Contains(string(out), brake.ID) {
		t.Errorf("%v: %s", err, out)
	}
}
