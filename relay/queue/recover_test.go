package queue

import (
	"testing"

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
