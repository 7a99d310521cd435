package e2e

import (
	"encoding/json"
	"fmt"
	"math/rand/v2"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/relais-mta/relais/shared/lab"
	"github.com/relais-mta/relais/shared/lab/fleet"
)

// What warms up in the test, and what must come of it.
const (
	warmQuota = 500 // recipients a day
	// Messages to each provider, half of them on each relay: more than the quota on
	// either, so that one has mail that waits although the other was off for long.
	warmMail  = 2*warmQuota + 8
	warmKills = 10
	warmMost  = 60 // recipients between two kills, at most
	// A killed relay loses at most its step of each reservation, which is what it
	// sends in a second (the rate and its burst, here), and what it is offering on
	// its connections.
	warmRate        = 12
	warmBurst       = 2
	warmConnections = 2
	warmLost        = warmRate + warmBurst + warmConnections
	warmQuiet       = 5 * time.Second
	warmMidnight    = 5 * time.Minute // the test is to end on the day on which it begins
)

var warmPolicy = map[string]string{
	"providers": fmt.Sprintf(`limit = [
  { provider = "*", kind = "connections", scope = "source", max = %d },
  { provider = "*", kind = "messages_per_connection", scope = "source", max = 0 },
  { provider = "*", kind = "message_rate", scope = "source", max = %d, per = "1s", burst = %d },
  { provider = "*", kind = "connection_rate", scope = "source", max = 0 },
]
`, warmConnections, warmRate, warmBurst),
	"warmup": fmt.Sprintf(`[[plan]]
name = "of-the-pool"
overflow = "wait"
hour_percent = 100
[[plan.track]]
class = "google"
stages = [%[1]d]
target = %[1]d
[[plan.track]]
class = "other"
stages = [100000]
target = 100000

[[plan]]
name = "of-the-domain"
hour_percent = 100
[[plan.track]]
class = "yahoo"
stages = [%[1]d]
target = %[1]d
[[plan.track]]
class = "other"
stages = [100000]
target = 100000
`, warmQuota),
}

// offered counts the recipients that providers were offered.
type offered struct {
	mu   sync.Mutex
	to   map[string]int
	last time.Time // the last of them; zero: there was none
}

func (o *offered) at(provider string) int {
	o.mu.Lock()
	defer o.mu.Unlock()
	return o.to[provider]
}

func (o *offered) quiet(d time.Duration) bool {
	o.mu.Lock()
	defer o.mu.Unlock()
	return !o.last.IsZero() && time.Since(o.last) > d
}

func watchOffers(t *testing.T, l *lab.Lab, providers ...string) *offered {
	t.Helper()
	o := &offered{to: make(map[string]int)}
	for _, provider := range providers {
		if err := l.SetBehaviour(provider, lab.Behaviour{Answer: func(e lab.Event) lab.Answer {
			if e.Phase == lab.PhaseRcpt {
				o.mu.Lock()
				o.to[provider]++
				o.last = time.Now()
				o.mu.Unlock()
			}
			return lab.Answer{}
		}}); err != nil {
			t.Fatal(err)
		}
	}
	return o
}

// warmDay is when the next day begins.
func warmDay() time.Time { return time.Now().UTC().Truncate(24 * time.Hour).Add(24 * time.Hour) }

// awayFromMidnight waits for the next day if this one ends soon.
func awayFromMidnight(t *testing.T) {
	t.Helper()
	if midnight := warmDay(); time.Until(midnight) < warmMidnight {
		eventually(t, 2*warmMidnight, "the next day", func() bool { return time.Now().After(midnight) })
	}
}

// TestWarmUpOfKilledRelays has two relays with more mail than the pool that they
// share may send to one provider a day, and than the domain may send to another,
// and kills them at random while they send it.
func TestWarmUpOfKilledRelays(t *testing.T) {
	awayFromMidnight(t)
	f := start(t, fleet.Config{Relays: 2, Open: true, NoDKIM: true, Policy: warmPolicy})
	for _, what := range [][]string{{"--pool", "default", "--plan", "of-the-pool"}, {"--domain", fleet.Domain, "--plan", "of-the-domain"}} {
		eventually(t, 30*time.Second, "a day to have begun, and a warm-up to start", func() bool {
			_, err := f.Ctl(t.Context(), append([]string{"warmup", "start"}, what...)...)
			if err != nil && !strings.Contains(err.Error(), "no day has begun yet") {
				t.Fatal(err)
			}
			return err == nil
		})
	}
	submitted := submitHeld(t, f)
	o := watchOffers(t, f.Lab, lab.Google, lab.Yahoo)
	releaseHeld(t, f)
	kills := killAtRandom(t, f, o)
	explained := func() {
		for _, r := range f.Relays {
			for _, provider := range []string{lab.Google, lab.Yahoo} {
				warmExplained(t, f, r, provider)
			}
		}
	}
	explained() // all is reserved: without that, a silence may be a pause
	eventually(t, 2*time.Minute, "the quotas to be spent", func() bool { return o.quiet(warmQuiet) })
	explained()
	if !o.quiet(warmQuiet) {
		t.Error("mail goes on while warm-up is given as what it waits for")
	}
	for provider, args := range map[string][]string{lab.Google: {"--pool", "default"}, lab.Yahoo: {"--domain", fleet.Domain}} {
		n := o.at(provider)
		t.Logf("%s was offered %d of %d recipients, after %d kills", provider, n, warmQuota, kills)
		if n > warmQuota || n < warmQuota-kills*warmLost {
			t.Errorf("%s was offered %d recipients, want at most %d, and at least %d after %d kills", provider, n, warmQuota, warmQuota-kills*warmLost, kills)
		}
		warmAccounted(t, f, provider, n, args)
	}
	waiting, err := f.InQueue(t.Context())
	if err != nil || waiting < 2*(warmMail-warmQuota) {
		t.Errorf("%d recipients wait, want those that the quotas had no room for: %v", waiting, err)
	}
	for _, what := range [][]string{{"--pool", "default"}, {"--domain", fleet.Domain}} {
		if out, err := f.Ctl(t.Context(), append([]string{"warmup", "stop", "--yes", "--reason", "the test ends"}, what...)...); err != nil {
			t.Fatalf("%v: %s", err, out)
		}
	}
	if a := settle(t, f, submitted); a.delivered != a.accepted || a.accepted != 2*warmMail {
		t.Errorf("%d of %d messages arrived, want all %d", a.delivered, a.accepted, 2*warmMail)
	}
}

// submitHeld submits all mail while a brake holds it.
func submitHeld(t *testing.T, f *fleet.Fleet) []fleet.Submitted {
	t.Helper()
	if out, err := f.Ctl(t.Context(), "brake", "set", "--pool", "default", "--hold", "--cause", "the mail is being submitted"); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	if err := f.WaitApplied(t.Context()); err != nil {
		t.Fatal(err)
	}
	to := make([]string, 2*warmMail)
	for i := range to {
		provider := lab.Google
		if i/4%2 == 1 { // of both streams of both relays
			provider = lab.Yahoo
		}
		var err error
		if to[i], err = f.Lab.Recipient(provider, i, lab.Accept); err != nil {
			t.Fatal(err)
		}
	}
	submitted, err := f.Submit(within(t, 4*time.Minute), fleet.Stream{Recipients: to, Size: 1000, Connections: 8, Tag: "warm"})
	if err != nil {
		t.Fatal(err)
	}
	return submitted
}

func releaseHeld(t *testing.T, f *fleet.Fleet) {
	t.Helper()
	var brakes []struct{ ID string }
	out, err := f.Ctl(t.Context(), "brake", "list", "--json")
	if err != nil || json.Unmarshal(out, &brakes) != nil || len(brakes) != 1 {
		t.Fatalf("%v: %s", err, out)
	}
	if out, err := f.Ctl(t.Context(), "brake", "cancel", brakes[0].ID, "--reason", "the mail is submitted"); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
}

// killAtRandom kills one of the relays and starts it again, each time after some
// more recipients, until the quotas are spent or it is enough, and returns how
// often it did.
func killAtRandom(t *testing.T, f *fleet.Fleet, o *offered) int {
	t.Helper()
	rng := rand.New(rand.NewPCG(6, 5))
	for kills := range warmKills {
		until := o.at(lab.Google) + o.at(lab.Yahoo) + 10 + rng.IntN(warmMost-10)
		spent := false
		eventually(t, time.Minute, "more mail", func() bool {
			spent = o.quiet(warmQuiet)
			return spent || o.at(lab.Google)+o.at(lab.Yahoo) >= until
		})
		if spent {
			return kills
		}
		r := f.Relays[rng.IntN(len(f.Relays))]
		r.Kill()
		if err := f.Restart(within(t, time.Minute), r); err != nil {
			t.Fatal(err)
		}
	}
	return warmKills
}

// warmExplained waits until the relay says of mail to a provider that it waits for
// warm-up, and of what.
func warmExplained(t *testing.T, f *fleet.Fleet, r *fleet.Relay, provider string) {
	t.Helper()
	var last []byte
	defer func() {
		if t.Failed() {
			t.Logf("%s says: %s", r.Name, last)
		}
	}()
	text := fmt.Sprintf("stage 1, %d a day to %s, %d of it reserved by all relays", warmQuota, provider, warmQuota)
	eventually(t, 2*time.Minute, "mail to "+provider+" to say that it waits for warm-up", func() bool {
		var list []listed
		if err := json.Unmarshal(relayCommand(t, r, "queue", "list", "--provider", provider, "--limit", "1", "--json"), &list); err != nil || len(list) == 0 {
			return false
		}
		if last = queueWhy(t, r, list[0].ID, "--json"); last == nil {
			return false // it went while there was still quota to spend
		}
		var why struct {
			Recipients []struct {
				Why struct {
					Reason, Text string
					Until        time.Time
				}
			}
		}
		if err := json.Unmarshal(last, &why); err != nil || len(why.Recipients) != 1 {
			t.Fatalf("%v: %s", err, last)
		}
		w := why.Recipients[0].Why
		return w.Reason == "warmup" && strings.Contains(w.Text, text) && w.Until.Equal(warmDay())
	})
}

// warmAccounted waits until control counts what a provider was offered, and no more
// than the quota.
func warmAccounted(t *testing.T, f *fleet.Fleet, provider string, n int, what []string) {
	t.Helper()
	var shown struct {
		Classes []struct {
			Class                 string
			Quota, Reserved, Used int
		}
	}
	defer func() {
		if t.Failed() {
			t.Logf("warmup show %v: %+v", what, shown)
		}
	}()
	eventually(t, 30*time.Second, "control to count it", func() bool {
		out, err := f.Ctl(t.Context(), append([]string{"warmup", "show", "--json"}, what...)...)
		if err != nil || json.Unmarshal(out, &shown) != nil {
			t.Fatalf("%v: %s", err, out)
		}
		for _, c := range shown.Classes {
			if c.Class == provider && c.Quota == warmQuota && c.Reserved <= warmQuota && c.Used >= n && c.Used <= c.Reserved {
				return true
			}
		}
		return false
	})
}
