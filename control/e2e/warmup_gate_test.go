package e2e

import (
	"encoding/json"
	"strings"
	"testing"
	"time"

	"github.com/relais-mta/relais/shared/lab"
	"github.com/relais-mta/relais/shared/lab/fleet"
)

// answers is what `warmup show` says that a provider answered.
type answers struct{ Attempts, Accepted, Deferred, Blocked, Hard, Signatures int }

// TestWarmUpListensToProviders: what providers answer to mail that warms up, a block
// of the address included, is what the day will be judged by: all relays' together,
// and still there when one was killed.
func TestWarmUpListensToProviders(t *testing.T) {
	awayFromMidnight(t) // answers are counted by the day
	f := start(t, fleet.Config{Relays: 2, Open: true, NoDKIM: true})
	eventually(t, 30*time.Second, "a day to have begun, and the warm-up to start", func() bool {
		_, err := f.Ctl(t.Context(), "warmup", "start", "--pool", "default", "--plan", "standard", "--proven", lab.Google+"=40000/day", "--evidence", "logs")
		if err != nil && !strings.Contains(err.Error(), "no day has begun yet") {
			t.Fatal(err)
		}
		return err == nil
	})
	if err := f.WaitApplied(t.Context()); err != nil {
		t.Fatal(err)
	}
	var last answers
	shown := func(want answers) {
		t.Helper()
		defer func() {
			if t.Failed() {
				t.Logf("google answered %+v, want %+v", last, want)
			}
		}()
		eventually(t, time.Minute, "what google answered to be known", func() bool {
			out, err := f.Ctl(t.Context(), "warmup", "show", "--pool", "default", "--json")
			var v struct {
				Classes []struct {
					Class   string
					Answers answers
				}
			}
			if err != nil || json.Unmarshal(out, &v) != nil {
				return false // there may be no leader at the moment
			}
			for _, c := range v.Classes {
				if c.Class == lab.Google {
					last = c.Answers
				}
			}
			return last == want
		})
	}
	submit := func(n int, o lab.Outcome) {
		t.Helper()
		to := make([]string, n)
		for i := range to {
			var err error
			if to[i], err = f.Lab.Recipient(lab.Google, i, o); err != nil {
				t.Fatal(err)
			}
		}
		if _, err := f.Submit(within(t, time.Minute), fleet.Stream{Recipients: to, Size: 1000, Connections: 4, Tag: "warm"}); err != nil {
			t.Fatal(err)
		}
	}
	submit(40, lab.Accept)
	submit(4, lab.Nobody)
	shown(answers{Attempts: 44, Accepted: 40, Hard: 4})
	r := f.Relays[0]
	r.Kill()
	if err := f.Restart(within(t, time.Minute), r); err != nil {
		t.Fatal(err)
	}
	submit(10, lab.Accept)
	shown(answers{Attempts: 54, Accepted: 50, Hard: 4})
	submit(1, lab.Block)
	shown(answers{Attempts: 55, Accepted: 50, Hard: 4, Blocked: 1, Signatures: 1})
}
