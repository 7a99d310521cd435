package queue

import (
	"fmt"
	"testing"
	"time"

	"github.com/relais-mta/relais/relay"
	"github.com/relais-mta/relais/relay/outbox"
)

// TestAStartReportsWhatItEndsAsUnknown: the report is in the queue exactly when
// the end is, also if the relay is killed again.
func TestAStartReportsWhatItEndsAsUnknown(t *testing.T) {
	f := newFixture(t)
	f.policy.InDoubtRetries = 0
	var asked []Result
	f.tell = func(env *relay.Envelope, ended []Result) []Mail {
		asked = append(asked, ended...)
		ended[0].Told = outbox.Untold
		report := f.envelope(env.Sender.String())
		report.Internal = true
		return []Mail{{Env: report, Body: f.body("report on " + env.ID.String())}}
	}
	f.open()
	env := f.accept("a@one.example", "b@one.example", "c@two.example")
	f.begin(f.takeFrom("one.example"))
	f.reopen()
	if len(asked) != 2 || asked[0].State.State != relay.StateUnknown || asked[1].Index != 1 {
		t.Fatalf("asked for a report on %+v", asked)
	}
	f.reopen()
	if len(asked) != 2 {
		t.Errorf("asked again: %+v", asked[2:])
	}
	info, err := f.q.Show(env.ID)
	if err != nil || info.States[0].State != relay.StateUnknown || info.States[2].State != relay.StateWaiting {
		t.Errorf("%+v, %v", info, err)
	}
	w := f.takeFrom("example.com")
	text, err := f.st.ReadBody(w.Env.Body, nil)
	if err != nil || string(text) != "report on "+env.ID.String() || !w.Env.Internal {
		t.Errorf("the report is %q, %v", text, err)
	}
	events, err := f.ob.Read(0, 1<<20)
	if err != nil {
		t.Fatal(err)
	}
	n := map[outbox.Type]int{}
	for i := range events {
		n[events[i].Type]++
	}
	if n[outbox.Unknown] != 2 || n[outbox.Untold] != 1 || n[outbox.DSN] != 1 {
		t.Errorf("events %v", n)
	}
}

// TestAStartResolvesManyAttemptsAtOnce: the disk is not asked once for each, and of
// two attempts of one message the second knows the end of the first.
func TestAStartResolvesManyAttemptsAtOnce(t *testing.T) {
	const messages = 300
	f := newFixture(t)
	f.policy.InDoubtRetries = 0
	f.tell = func(env *relay.Envelope, _ []Result) []Mail {
		report := f.envelope("sender@example.com")
		report.Internal = true
		return []Mail{{Env: report, Body: f.body("report on " + env.ID.String())}}
	}
	f.open()
	for range messages {
		f.accept("a@one.example", "b@two.example")
	}
	for range 2 * messages {
		f.begin(f.take(1))
	}
	f.reopen()
	if n := f.st.Stats().Transactions; n > messages*5/4 {
		t.Errorf("%d attempts took %d transactions", 2*messages, n)
	}
	f.eventually("the count", func() bool { return f.q.Summary().Counted })
	if s := f.q.Summary(); s.Waiting != 2*messages {
		t.Errorf("%d recipients wait, want those of %d reports", s.Waiting, 2*messages)
	}
	for range 2 * messages {
		w := f.takeFrom("example.com")
		f.delivered(w, nil)
	}
	f.empty()
}

// TestAStartSharesTransactionsBetweenMessages: of different messages many attempts
// are resolved at once.
func TestAStartSharesTransactionsBetweenMessages(t *testing.T) {
	const messages = 300
	f := newFixture(t).open()
	for i := range messages {
		f.accept(fmt.Sprintf("u%d@one.example", i))
	}
	for range messages {
		f.begin(f.take(1))
	}
	f.reopen()
	if n := f.st.Stats().Transactions; n > messages/10 {
		t.Errorf("%d attempts took %d transactions", messages, n)
	}
	f.clock.Add(2 * time.Hour)
	for range messages {
		w := f.take(1)
		if w.Recipients[0].State.InDoubt != 1 {
			t.Fatalf("tried again: %+v", w.Recipients)
		}
		f.delivered(w, f.begin(w))
	}
	f.empty()
}
