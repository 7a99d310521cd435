package e2e

import (
	"encoding/json"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/relais-mta/relais/shared/lab"
	"github.com/relais-mta/relais/shared/lab/fleet"
)

// What make soak says to the test: how long to go on, with which seed, and
// where to put the result. Without it the test goes once through the moments.
const (
	soakVariable       = "RELAIS_SOAK"
	soakSeedVariable   = "RELAIS_SOAK_SEED"
	soakResultVariable = "RELAIS_SOAK_RESULT"
)

const (
	crashMails    = 150 // submitted in each round
	crashPatience = 5 * time.Second
	crashDomains  = 40
	settleRounds  = 25 // of a soak, between two accounts
)

// soakResult is the last line of make soak.
type soakResult struct {
	Seconds     float64        `json:"seconds"`
	Seed        uint64         `json:"seed"`
	Rounds      int            `json:"rounds"`
	Kills       int            `json:"kills"`
	PowerCuts   int            `json:"power_cuts"`
	Moments     map[string]int `json:"moments"` // crashes by the moment they came at
	Accepted    int            `json:"accepted"`
	Delivered   int            `json:"delivered"`
	Duplicated  int            `json:"duplicated"`
	InDoubt     int            `json:"in_doubt"`
	Lost        int            `json:"lost"`
	Unexplained int            `json:"duplicates_unexplained"` // copies for which no recipient was in doubt
	Damaged     int            `json:"damaged_queues"`         // crashes after which queue fsck found something
	Violations  int            `json:"violations"`
}

// moment is a point at which the relay crashes. Its arm has fire called then;
// fire returns when the relay is dead.
type moment struct {
	name string
	arm  func(c *crasher, fire func())
}

// At a phase of delivery, after some dozens of others, the remote server crashes the relay before it answers;
// the moments behind a phase come a moment later.
func atPhase(phase lab.Phase, after time.Duration) func(*crasher, func()) {
	return func(c *crasher, fire func()) {
		var left atomic.Int64
		left.Store(int64(20 + c.rng.IntN(40)))
		c.behave(func(e lab.Event) lab.Answer {
			if e.Phase == phase && left.Add(-1) < 0 {
				if after == 0 {
					fire()
				} else {
					time.AfterFunc(after, fire)
				}
			}
			return lab.Answer{}
		})
	}
}

var moments = []moment{
	{"submission", func(c *crasher, fire func()) { time.AfterFunc(c.wait(20, 150), fire) }},
	{"mail", atPhase(lab.PhaseMail, 0)},
	{"rcpt", atPhase(lab.PhaseRcpt, 0)},
	{"data", atPhase(lab.PhaseData, 0)},
	{"dot", atPhase(lab.PhaseFinalDot, 0)},
	{"settle", atPhase(lab.PhaseFinalDot, 2*time.Millisecond)},
	{"reclaim", atPhase(lab.PhaseFinalDot, 60*time.Millisecond)},
	{"random", func(c *crasher, fire func()) { time.AfterFunc(c.wait(20, 900), fire) }},
}

// crasher crashes one relay again and again.
type crasher struct {
	t         *testing.T
	fleet     *fleet.Fleet
	relay     *fleet.Relay
	disk      *disk
	rng       *rand.Rand
	submitted []fleet.Submitted
	result    soakResult
}

func (c *crasher) wait(from, to int) time.Duration {
	return time.Duration(from+c.rng.IntN(to-from)) * time.Millisecond
}

// behave sets what the servers of all domains do.
func (c *crasher) behave(answer func(lab.Event) lab.Answer) {
	c.t.Helper()
	for i := 1; i <= crashDomains; i++ {
		if err := c.fleet.Lab.SetBehaviour(fmt.Sprintf("mx:boutique-%02d.test", i), lab.Behaviour{Answer: answer}); err != nil {
			c.t.Fatal(err)
		}
	}
}

// round submits mail, crashes the relay at a moment, checks its records and
// starts it again.
func (c *crasher) round(n int, m moment, power bool) {
	t := c.t
	t.Helper()
	dead := make(chan struct{})
	fire := sync.OnceFunc(func() {
		defer close(dead)
		if power {
			if err := c.disk.stop(); err != nil {
				t.Error(err) // this is not the test's goroutine
			}
		}
		c.relay.Kill()
	})
	to := make([]string, crashMails)
	for i := range to {
		to[i] = fmt.Sprintf("accept-%d-%d@boutique-%02d.test", n, i, 1+i%crashDomains)
	}
	m.arm(c, fire)
	enough := time.AfterFunc(crashPatience, fire)
	submitted, err := c.fleet.Submit(within(t, crashPatience), fleet.Stream{Recipients: to, Size: 3000, Connections: 8, Tag: fmt.Sprint("crash", n)})
	if err != nil && len(submitted) == 0 {
		t.Logf("round %d: %v", n, err)
	}
	c.submitted = append(c.submitted, submitted...)
	<-dead
	enough.Stop()
	c.behave(nil)
	if power {
		c.disk.replug()
		c.result.PowerCuts++
	} else {
		c.result.Kills++
	}
	if out, err := command(t, filepath.Join(binaries, "relais-relay"), "queue", "fsck", "--bodies", "--data", c.relay.Dir); err != nil {
		c.result.Damaged++
		t.Errorf("after a crash at %q the records disagree: %v\n%s", m.name, err, out)
	}
	if err := c.fleet.Restart(within(t, time.Minute), c.relay); err != nil {
		t.Fatal(err)
	}
	c.result.Rounds++
	c.result.Moments[m.name]++
}

// account waits until the queue is empty and looks at every message: each that
// was answered 250 has arrived, and each copy too many was in doubt before.
func (c *crasher) account() {
	t := c.t
	t.Helper()
	if err := c.fleet.WaitEmpty(within(t, 3*time.Minute), nil); err != nil {
		t.Fatal(err)
	}
	doubts := map[string]int{}
	c.result.InDoubt = 0
	err := c.fleet.NewLedger().Read(t.Context(), func(_ *fleet.Relay, e *fleet.Event) {
		if e.Type == "in-doubt" {
			doubts[e.Address]++
			c.result.InDoubt++
		}
	})
	if err != nil {
		t.Fatal(err)
	}
	for i := range c.submitted {
		s := &c.submitted[i]
		got := c.fleet.Lab.Deliveries(s.MessageID, s.Recipient)
		if s.Result.State == lab.StateAccepted {
			c.result.Accepted++
			if got == 0 {
				c.result.Lost++
				t.Errorf("answered 250 and lost: %s to %s", s.MessageID, s.Recipient)
			}
		}
		if got > 0 {
			c.result.Delivered++
			c.result.Duplicated += got - 1
		}
		if got > 1+doubts[s.Recipient] {
			c.result.Unexplained++
			t.Errorf("%s arrived %d times at %s, and was in doubt %d times", s.MessageID, got, s.Recipient, doubts[s.Recipient])
		}
	}
	c.submitted = c.submitted[:0]
}

// TestCrashesAtEveryMoment kills the relay, and cuts its power, at every moment
// of a message's life. make soak runs it for long.
func TestCrashesAtEveryMoment(t *testing.T) {
	c := &crasher{t: t, result: soakResult{Seed: 1, Moments: map[string]int{}}}
	long := time.Duration(0)
	if text := os.Getenv(soakVariable); text != "" {
		var err error
		if long, err = time.ParseDuration(text); err != nil {
			t.Fatalf("%s: %v", soakVariable, err)
		}
		if _, err := fmt.Sscan(os.Getenv(soakSeedVariable), &c.result.Seed); err != nil {
			t.Fatalf("%s: %v", soakSeedVariable, err)
		}
	}
	c.rng = rand.New(rand.NewPCG(c.result.Seed, 1))
	c.disk = newDisk(t, 1<<30)
	policy := diskPolicy(64 << 20)
	c.fleet = start(t, fleet.Config{Open: true, NoDKIM: true, Sources: 2, Policy: policy, Dirs: map[int]string{0: filepath.Join(c.disk.path, "relay")}})
	c.relay = c.fleet.Relays[0]
	began := time.Now()
	c.run(began, long)
	c.account()
	c.result.Seconds = time.Since(began).Seconds()
	c.result.Violations = c.result.Lost + c.result.Unexplained + c.result.Damaged
	text, err := json.Marshal(c.result)
	if err != nil {
		t.Fatal(err)
	}
	t.Logf("%s", text)
	if path := os.Getenv(soakResultVariable); path != "" {
		if err := os.WriteFile(path, append(text, '\n'), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	if c.result.Accepted < 10*c.result.Rounds {
		t.Errorf("only %d messages were accepted in %d rounds: the test shows little", c.result.Accepted, c.result.Rounds)
	}
	if err := c.relay.Stop(); err != nil {
		t.Error(err)
	}
}

// run crashes once at every moment, by turns with and without power, or at
// random moments for a while.
func (c *crasher) run(began time.Time, long time.Duration) {
	if long == 0 {
		for n, m := range moments {
			c.round(n, m, n%2 == 1)
		}
		return
	}
	for n := 0; time.Since(began) < long; n++ {
		m, power := moments[c.rng.IntN(len(moments))], c.rng.IntN(2) == 1
		c.round(n, m, power)
		c.t.Logf("%s: round %d, crash at %q, power cut %v, %d messages handed over so far", time.Since(began).Round(time.Second), n, m.name, power, len(c.submitted)+c.result.Accepted)
		if n%settleRounds == settleRounds-1 {
			c.account()
		}
		if c.t.Failed() {
			return
		}
	}
}
