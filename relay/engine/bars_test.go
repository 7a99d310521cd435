package engine

import (
	"testing"
	"time"

	"github.com/relais-mta/relais/relay"
	"github.com/relais-mta/relais/relay/outbox"
	"github.com/relais-mta/relais/relay/schedule"
	"github.com/relais-mta/relais/shared/ids"
	"github.com/relais-mta/relais/shared/lab"
	"github.com/relais-mta/relais/shared/policy"
)

// What keeps some mail from one source leaves it the others, and is named when it
// keeps it from all.
func TestMailThatOneSourceMayNotCarry(t *testing.T) {
	const each = 40
	w := newWorld(t, nil, first, second)
	w.close()
	w.admit = []Admitter{&talker{}}
	w.open()
	shut := func(number uint64, source policy.Source) schedule.Gate {
		return schedule.Gate{ID: schedule.GateID{Owner: "test", Number: number}, Match: schedule.Match{Source: source.ID, Tenant: acme}, Reason: "brake", NoMessages: true}
	}
	w.engine.SetGates(shut(1, first))
	w.run(time.Second)
	other := func(e *relay.Envelope) { e.Tenant = ids.Tenant{15: 9} }
	for n := range each {
		w.accept(nil, w.at(lab.Google, n, lab.Accept))
		w.accept(other, w.at(lab.Google, each+n, lab.Accept))
	}
	delivered := func() (own, others int) {
		for _, e := range w.events() {
			switch {
			case e.Type != outbox.Delivered:
			case e.Tenant != acme:
				others++
			case e.SourceIP != second.Bind:
				t.Fatalf("mail that may not leave from %s left from %s", first.Bind, e.SourceIP)
			default:
				own++
			}
		}
		return own, others
	}
	w.until("all mail to leave", func() bool {
		own, others := delivered()
		return own == each && others == each
	})

	w.engine.SetGates(shut(2, second))
	env := w.accept(nil, w.at(lab.Google, 0, lab.Accept))
	state := relay.RecipientState{State: relay.StateWaiting, Next: env.AcceptedAt}
	var x Explanation
	w.until("what keeps it to be named", func() bool {
		x = w.engine.Explain(env, 0, state)
		return x.Reason == "brake"
	})
	if x.Limit != "night" || x.Text != "shut at night" || x.Source != first.Bind.String() {
		t.Errorf("%+v", x)
	}
	w.event(w.accept(other, w.at(lab.Google, 1, lab.Accept)), outbox.Delivered)
	w.engine.KeepGates("test", map[uint64]bool{1: true})
	w.event(env, outbox.Delivered)
	delivered()
}
