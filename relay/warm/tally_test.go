package warm

import (
	"testing"
	"time"

	"github.com/relais-mta/relais/relay"
	"github.com/relais-mta/relais/shared/ids"
	"github.com/relais-mta/relais/shared/policy"
	"github.com/relais-mta/relais/shared/warmup"
)

func reply(phase relay.Phase, status relay.Status, code int, enhanced, text string) relay.Outcome {
	return relay.Outcome{Phase: phase, Status: status, Reply: relay.Reply{Code: uint16(code), Enhanced: enhanced, Text: text}}
}

func TestWhatAnAnswerCountsAs(t *testing.T) {
	for name, tc := range map[string]struct {
		o    relay.Outcome
		want warmup.Tally
	}{
		"accepted":          {relay.Outcome{Phase: relay.PhaseFinalDot, Status: relay.Delivered}, warmup.Tally{Attempts: 1, Accepted: 1}},
		"no such user":      {reply(relay.PhaseRCPT, relay.Failed, 550, "5.1.1", "no such user"), warmup.Tally{Attempts: 1, Hard: 1}},
		"mailbox full":      {reply(relay.PhaseRCPT, relay.Failed, 552, "5.2.2", "mailbox full"), warmup.Tally{Attempts: 1}},
		"spam":              {reply(relay.PhaseFinalDot, relay.Failed, 554, "5.7.1", "message looks like spam"), warmup.Tally{Attempts: 1, Blocked: 1}},
		"greylisted":        {reply(relay.PhaseRCPT, relay.Deferred, 451, "4.7.1", "greylisted, try again later"), warmup.Tally{Attempts: 1, Deferred: 1}},
		"blocked for good":  {reply(relay.PhaseMAIL, relay.Failed, 554, "5.7.1", "your IP address is blocked here for its reputation"), warmup.Tally{Attempts: 1, Blocked: 1, Signatures: 1}},
		"blocked for now":   {reply(relay.PhaseMAIL, relay.Deferred, 421, "4.7.0", "your IP address is on our blocklist"), warmup.Tally{Attempts: 1, Deferred: 1, Signatures: 1}},
		"in doubt":          {relay.Outcome{Phase: relay.PhaseFinalDot, Status: relay.InDoubt}, warmup.Tally{}},
		"not tried":         {relay.Outcome{Phase: relay.PhaseRCPT, Status: relay.NotTried}, warmup.Tally{}},
		"broken connection": {relay.Outcome{Phase: relay.PhaseDATA, Status: relay.Deferred}, warmup.Tally{}},
		"our own trouble":   {reply(relay.PhaseLocal, relay.Deferred, 451, "4.3.0", "disk"), warmup.Tally{}},
		"too many at once":  {reply(relay.PhaseRCPT, relay.Deferred, 452, "4.5.3", "too many recipients"), warmup.Tally{}},
	} {
		if got := tallyOf("mx:example.net", []relay.Outcome{tc.o}); got != tc.want {
			t.Errorf("%s: %+v, want %+v", name, got, tc.want)
		}
	}
}

// seconds lets so many seconds pass.
func (r *testRelay) seconds(n int) {
	r.t.Helper()
	for range n {
		r.look()
		r.now = r.now.Add(time.Second)
	}
}

// TestWhatIsAnsweredIsTold: what providers answer is told at most every ten seconds
// and once, again after a restore, and at most ten seconds of it are forgotten when
// the relay is killed.
func TestWhatIsAnsweredIsTold(t *testing.T) {
	l, relays := newRelays(t, 1, 400)
	r := relays[0]
	today := l.ledger.Today()
	r.reserve(1)
	for range 60 {
		r.send(1)
		r.seconds(1)
	}
	r.seconds(30)
	_, _, used := l.ledger.Totals(1, 0, today)
	if got := l.ledger.Shown(1, 0, today); got.Attempts < 55 || got.Attempts != got.Accepted || uint64(got.Attempts) > used {
		t.Fatalf("%+v was told of %d that were spent", got, used)
	}
	if before := l.tells; before > 10 {
		t.Errorf("told %d times in 90 s", before)
	} else if r.seconds(200); l.tells != before {
		t.Errorf("what is known is told again: %d times, before %d", l.tells, before)
	}
	known := l.ledger.Shown(1, 0, today)

	// Killed after the disk has them, and killed before.
	r.start()
	r.reserve(1)
	r.seconds(30)
	if got := l.ledger.Shown(1, 0, today); got.Attempts != known.Attempts+1 {
		t.Errorf("after it was killed %+v, before %+v", got, known)
	}
	sent := int64(0)
	for range 20 {
		if _, ok := r.send(1); ok {
			sent++
		}
		r.seconds(1)
	}
	r.start()
	r.reserve(1)
	r.seconds(30)
	if got := l.ledger.Shown(1, 0, today).Attempts - known.Attempts - 2; got > sent || got < sent-11 {
		t.Errorf("%d of %d were told", got, sent)
	}

	// A restored ledger knows nothing, and hears it again though messages are lost.
	known = l.ledger.Shown(1, 0, today)
	l.ledger = warmup.NewLedger(today)
	if err := l.ledger.SetQuota(1, 0, today, 400); err != nil {
		t.Fatal(err)
	}
	view := *r.view.View()
	view.Generation++
	restored, err := policy.Compile(&view)
	if err != nil {
		t.Fatal(err)
	}
	r.view = restored
	lost := 8
	l.lost = func() bool { lost--; return lost > 0 }
	r.seconds(300)
	if got := l.ledger.Shown(1, 0, today); got != known {
		t.Errorf("after a restore %+v, before %+v", got, known)
	}
}

// TestRefusedSessionsCount: a host that refuses the session refuses the address and
// its pool; what did reach a host is counted once, when the transaction is done.
func TestRefusedSessionsCount(t *testing.T) {
	l, relays := newRelays(t, 1, 100)
	r, today := relays[0], l.ledger.Today()
	domain := policy.WarmSubject{Number: 3, Domain: "brand.example", Plan: "test"}
	view := *r.view.View()
	view.Tenants = []policy.Tenant{{ID: ids.Tenant{9}, Name: "acme"}}
	view.Domains = []policy.Domain{{Name: "brand.example", Tenant: ids.Tenant{9}, ReturnPath: "bounces.brand.example"}}
	view.Warm.Subjects = append(view.Warm.Subjects, policy.WarmSubject{Number: 2, Source: testSource, Plan: "test"}, domain)
	compiled, err := policy.Compile(&view)
	if err != nil {
		t.Fatal(err)
	}
	r.view = compiled
	for _, s := range []warmup.Subject{2, 3} {
		if err := l.ledger.SetQuota(s, 0, today, 100); err != nil {
			t.Fatal(err)
		}
	}
	if err := l.ledger.Assign(2, 7); err != nil {
		t.Fatal(err)
	}
	blocked := reply(relay.PhaseConnect, relay.Deferred, 554, "", "your IP address is blocked here for its reputation")
	r.k.Observe(&relay.Attempt{Source: testSource, Epoch: 7, Provider: "mx:example.net", Outcomes: []relay.Outcome{blocked, blocked}})
	r.k.Observe(&relay.Attempt{Source: ids.Source{99}, Epoch: 7, Provider: "mx:example.net", Outcomes: []relay.Outcome{blocked}})
	r.k.Observe(&relay.Attempt{Source: testSource, Epoch: 7, Provider: "mx:example.net", Outcomes: []relay.Outcome{{Phase: relay.PhaseConnect, Status: relay.Deferred}}})
	r.k.Observe(&relay.Attempt{Source: testSource, Epoch: 7, Provider: "mx:example.net", Outcomes: []relay.Outcome{reply(relay.PhaseRCPT, relay.Failed, 550, "5.1.1", "no such user")}})
	r.seconds(30)
	want := warmup.Tally{Attempts: 2, Signatures: 2}
	for _, s := range []warmup.Subject{1, 2} {
		got := l.ledger.Shown(s, 0, today)
		want.Blocked, want.Deferred = got.Blocked, 2-got.Blocked // the rules say whether it is for good
		if got != want {
			t.Errorf("subject %d: %+v, want %+v", s, got, want)
		}
	}
	if got := l.ledger.Shown(3, 0, today); got != (warmup.Tally{}) {
		t.Errorf("the domain: %+v", got)
	}
	if _, _, used := l.ledger.Totals(2, 0, today); used != 0 {
		t.Errorf("%d are spent, nothing was offered", used)
	}

	// What is offered counts for all three, when it is done.
	p := place(1)
	p.From = "brand.example"
	for range 60 {
		if h := r.k.Begin(r.now, p); h.Reason == "" {
			r.k.Done(r.now, p, []relay.Outcome{reply(relay.PhaseRCPT, relay.Failed, 550, "5.1.1", "no such user")})
			break
		}
		r.seconds(1)
	}
	r.seconds(30)
	for s := warmup.Subject(1); s <= 3; s++ {
		if got := l.ledger.Shown(s, 0, today); got.Hard != 1 {
			t.Errorf("subject %d: %+v", s, got)
		}
	}
}

// TestLateAnswerOfATally: an answer to what was told before does not stand for what was
// told last, which may be lost.
func TestLateAnswerOfATally(t *testing.T) {
	s := &slot{saved: true}
	now := time.Date(2026, 3, 1, 12, 0, 0, 0, time.UTC)
	tell := func(attempts int64) bool {
		now = now.Add(settleEvery)
		return s.tell(now, &warmup.Tally{Attempts: attempts, Accepted: attempts}, false) != nil
	}
	if !tell(10) || !tell(20) {
		t.Fatal("what was answered is not told")
	}
	s.heardTally(10)
	if now = now.Add(tellAgain); !tell(20) {
		t.Error("what may be lost is not told again")
	}
	s.heardTally(10) // its day is over: the leader does not take it
	if now = now.Add(tellAgain); tell(20) {
		t.Error("what the leader does not take is told again")
	}
	if !tell(30) {
		t.Error("what came since is not told")
	}
	s.heardTally(30)
	if now = now.Add(tellAgain); tell(30) {
		t.Error("what the leader knows is told again")
	}
}
