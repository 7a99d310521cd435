package engine

import (
	"sync"
	"testing"
	"time"

	"github.com/relais-mta/relais/relay"
	"github.com/relais-mta/relais/relay/outbox"
	"github.com/relais-mta/relais/shared/lab"
	"github.com/relais-mta/relais/shared/policy"
)

const tooMany = "452 4.5.3 Too many recipients"

// TestTooManyRecipientsAreSplit has a host that takes seven recipients of a
// message: the others follow in transactions of the same session at once, and
// not by the retry schedule (RFC 5321 section 4.5.3.1.10).
func TestTooManyRecipientsAreSplit(t *testing.T) {
	w := newWorld(t, nil, first)
	w.view(func(d *policy.Document) { d.Queue.Retry = []policy.Duration{policy.Duration(time.Hour)} }, first)
	var mu sync.Mutex
	taken := make(map[int]int) // by transaction
	err := w.lab.SetBehaviour(lab.Google, lab.Behaviour{Answer: func(e lab.Event) lab.Answer {
		if e.Phase != lab.PhaseRcpt {
			return lab.Answer{}
		}
		mu.Lock()
		defer mu.Unlock()
		if taken[e.Message]++; taken[e.Message] > 7 {
			return lab.Answer{Reply: tooMany}
		}
		return lab.Answer{}
	}})
	if err != nil {
		t.Fatal(err)
	}
	var to []string
	for i := range 30 {
		to = append(to, w.at(lab.Google, i, lab.Accept))
	}
	// One domain, one work queue.
	env := w.accept(func(e *relay.Envelope) {
		for i := range e.Recipients {
			e.Recipients[i].Address.Domain = e.Recipients[0].Address.Domain
		}
	}, to...)
	w.gone(env)
	got := 0
	for _, m := range w.arrived(lab.Google) {
		if len(m.To) > 7 {
			t.Errorf("a transaction of %d recipients", len(m.To))
		}
		got += len(m.To)
	}
	if got != len(to) {
		t.Errorf("%d recipients got the mail, want %d", got, len(to))
	}
	mu.Lock()
	defer mu.Unlock()
	if len(taken) != 5 {
		t.Errorf("%d transactions in the session, want 5: %v", len(taken), taken)
	}
	for _, e := range w.events() {
		if e.Type == outbox.Delivered && e.Attempts != 1 {
			t.Errorf("recipient %d delivered at attempt %d: being left for the next transaction is none", e.Index, e.Attempts)
		}
	}
}

// TestTooManyWithoutProgress: a host that says so to the only recipient is
// asked again by the schedule, not at once for ever.
func TestTooManyWithoutProgress(t *testing.T) {
	w := testWork(policy.Transactional, 2)
	refusal := relay.Outcome{Status: relay.Deferred, Phase: relay.PhaseRCPT, Reply: relay.Reply{Code: 452, Enhanced: "4.5.3", Text: "Too many recipients"}}
	second := refusal
	second.Index = 1
	for _, o := range []relay.Outcome{second, {Index: 1, Status: relay.Failed, Phase: relay.PhaseRCPT, Reply: relay.Reply{Code: 552, Enhanced: "5.5.3", Text: "Too many recipients"}}} {
		a := testAttempt(w, time.Minute, refusal, o)
		for _, r := range decide(w, a, &testDocument(t).Queue).results {
			if r.State.State != relay.StateWaiting || !r.State.Next.After(a.EndedAt) || r.State.Attempts != 1 {
				t.Errorf("%+v, want a retry by the schedule", r.State)
			}
		}
	}
}
