package engine

import (
	"net/netip"
	"testing"
	"time"

	"github.com/relais-mta/relais/relay"
	"github.com/relais-mta/relais/relay/dsn"
	"github.com/relais-mta/relais/relay/outbox"
	"github.com/relais-mta/relais/relay/queue"
	"github.com/relais-mta/relais/shared/ids"
	"github.com/relais-mta/relais/shared/mailaddr"
	"github.com/relais-mta/relais/shared/policy"
)

func testDocument(t *testing.T) *policy.Document {
	t.Helper()
	doc, err := policy.Parse(nil)
	if err != nil {
		t.Fatal(err)
	}
	return &doc
}

func testWork(kind policy.StreamKind, recipients int) *queue.Work {
	at := time.Unix(1_800_000_000, 0)
	env := &relay.Envelope{
		ID: ids.NewMessage(at), Kind: kind, Sender: mailaddr.Address{Local: "me", Domain: "brand.test"},
		AcceptedAt: at, ExpiresAt: at.Add(24 * time.Hour),
	}
	w := &queue.Work{Env: env}
	for i := range recipients {
		env.Recipients = append(env.Recipients, relay.Recipient{Address: mailaddr.Address{Local: "you", Domain: "there.test"}})
		w.Recipients = append(w.Recipients, queue.WorkRecipient{Index: uint16(i), State: relay.RecipientState{State: relay.StateWaiting, Next: at}})
	}
	return w
}

func testAttempt(w *queue.Work, after time.Duration, outcomes ...relay.Outcome) *relay.Attempt {
	return &relay.Attempt{
		Message: w.Env.ID, Provider: "mx:there.test", MX: "mx.there.test", SourceIP: netip.MustParseAddr("127.0.0.9"),
		StartedAt: w.Env.AcceptedAt.Add(after - time.Second), EndedAt: w.Env.AcceptedAt.Add(after), Outcomes: outcomes,
	}
}

func TestDecide(t *testing.T) {
	doc := testDocument(t)
	reply := func(code uint16, esc, text string) relay.Reply {
		return relay.Reply{Code: code, Enhanced: esc, Text: text}
	}
	for _, tc := range []struct {
		name    string
		outcome relay.Outcome
		inDoubt uint8
		state   relay.State
		event   outbox.Type
		told    bool
	}{
		{"accepted", relay.Outcome{Status: relay.Delivered, Phase: relay.PhaseFinalDot, Reply: reply(250, "2.0.0", "ok")}, 0, relay.StateDelivered, outbox.Delivered, false},
		{"no such user", relay.Outcome{Status: relay.Failed, Phase: relay.PhaseRCPT, Reply: reply(550, "5.1.1", "no such user")}, 0, relay.StateBounced, outbox.Bounced, true},
		{"busy", relay.Outcome{Status: relay.Deferred, Phase: relay.PhaseRCPT, Reply: reply(450, "4.2.0", "busy")}, 0, relay.StateWaiting, outbox.Deferred, false},
		{"5xx at connect is about us", relay.Outcome{Status: relay.Deferred, Phase: relay.PhaseConnect, Reply: reply(554, "5.7.1", "not from you")}, 0, relay.StateWaiting, outbox.Deferred, false},
		{"in doubt", relay.Outcome{Status: relay.InDoubt, Phase: relay.PhaseFinalDot, Reply: reply(0, "4.4.2", "connection lost")}, 0, relay.StateWaiting, outbox.InDoubt, false},
		{"in doubt twice", relay.Outcome{Status: relay.InDoubt, Phase: relay.PhaseFinalDot, Reply: reply(0, "4.4.2", "connection lost")}, 1, relay.StateUnknown, outbox.Unknown, true},
	} {
		t.Run(tc.name, func(t *testing.T) {
			w := testWork(policy.Transactional, 1)
			w.Recipients[0].State.InDoubt = tc.inDoubt
			a := testAttempt(w, time.Minute, tc.outcome)
			s := decide(w, a, &doc.Queue)
			if len(s.results) != 1 {
				t.Fatalf("%d results", len(s.results))
			}
			r := s.results[0]
			if r.State.State != tc.state || r.Event != tc.event || len(s.failed) > 0 != tc.told {
				t.Errorf("state %v, event %v, told %v", r.State.State, r.Event, len(s.failed) > 0)
			}
			if r.State.State == relay.StateWaiting && !r.State.Next.After(a.EndedAt) {
				t.Errorf("next attempt at %v, the last one ended at %v", r.State.Next, a.EndedAt)
			}
			if r.State.Attempts != 1 || r.State.LastMX != "mx.there.test" {
				t.Errorf("state %+v", r.State)
			}
		})
	}
}

func TestNotTriedCostsNothing(t *testing.T) {
	w := testWork(policy.Bulk, 2)
	a := testAttempt(w, time.Minute,
		relay.Outcome{Index: 0, Status: relay.Delivered, Phase: relay.PhaseFinalDot},
		relay.Outcome{Index: 1, Status: relay.NotTried, Phase: relay.PhaseRCPT})
	if s := decide(w, a, &testDocument(t).Queue); len(s.results) != 1 || s.results[0].Index != 0 {
		t.Errorf("results %+v: the recipient that was not tried must go back as it was", s.results)
	}
}

func TestRetryNeverPassesTheDeadline(t *testing.T) {
	doc := testDocument(t)
	w := testWork(policy.Transactional, 1)
	w.Env.ExpiresAt = w.Env.AcceptedAt.Add(5 * time.Minute)
	w.Recipients[0].State.Attempts = 3
	a := testAttempt(w, 4*time.Minute+59*time.Second, relay.Outcome{Status: relay.Deferred, Phase: relay.PhaseRCPT, Reply: relay.Reply{Code: 451, Text: "later"}})
	s := decide(w, a, &doc.Queue)
	if next := s.results[0].State.Next; next.After(w.Env.ExpiresAt) {
		t.Errorf("next attempt at %v, after the deadline %v", next, w.Env.ExpiresAt)
	}
}

func TestGreylistingKeepsTheSource(t *testing.T) {
	doc := testDocument(t)
	w := testWork(policy.Transactional, 1)
	a := testAttempt(w, time.Second, relay.Outcome{Status: relay.Deferred, Phase: relay.PhaseRCPT, Reply: relay.Reply{Code: 450, Enhanced: "4.7.1", Text: "greylisted, try again later"}})
	st := decide(w, a, &doc.Queue).results[0].State
	if st.Sticky != a.SourceIP {
		t.Errorf("sticky source %v, want %v", st.Sticky, a.SourceIP)
	}
	if want := a.EndedAt.Add(doc.Queue.GreylistRetry.D()); !st.Next.Equal(want) {
		t.Errorf("next %v, want %v", st.Next, want)
	}
}

func TestDelayIsToldOnce(t *testing.T) {
	doc := testDocument(t)
	w := testWork(policy.Transactional, 1)
	told := 0
	for hour := 1; hour <= 8; hour++ {
		a := testAttempt(w, time.Duration(hour)*time.Hour, relay.Outcome{Status: relay.Deferred, Phase: relay.PhaseRCPT, Reply: relay.Reply{Code: 451, Text: "later"}})
		s := decide(w, a, &doc.Queue)
		told += len(s.delayed)
		w.Recipients[0].State = s.results[0].State
	}
	if told != 1 {
		t.Errorf("the sender was told %d times of the delay, want once", told)
	}
}

func TestWhoIsTold(t *testing.T) {
	failed := []failedRecipient{{index: 0}}
	for _, tc := range []struct {
		name   string
		kind   policy.StreamKind
		notify relay.Notify
		change func(*relay.Envelope)
		want   int
	}{
		{"transactional", policy.Transactional, 0, nil, 1},
		{"bulk", policy.Bulk, 0, nil, 0},
		{"bulk that asked", policy.Bulk, relay.NotifyFailure, nil, 1},
		{"never", policy.Transactional, relay.NotifyNever, nil, 0},
		{"only delays", policy.Transactional, relay.NotifyDelay, nil, 0},
		{"a bounce", policy.Transactional, 0, func(e *relay.Envelope) { e.Sender = mailaddr.Address{} }, 0},
		{"our own mail", policy.Transactional, 0, func(e *relay.Envelope) { e.Internal = true }, 0},
	} {
		w := testWork(tc.kind, 1)
		w.Env.Recipients[0].Notify = tc.notify
		if tc.change != nil {
			tc.change(w.Env)
		}
		if got := len(wanted(w.Env, failed, dsn.Failed)); got != tc.want {
			t.Errorf("%s: told of %d recipients, want %d", tc.name, got, tc.want)
		}
	}
}
