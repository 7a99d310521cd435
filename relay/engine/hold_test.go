package engine

import (
	"strings"
	"testing"

	"github.com/relais-mta/relais/relay"
	"github.com/relais-mta/relais/relay/outbox"
	"github.com/relais-mta/relais/relay/queue"
	"github.com/relais-mta/relais/shared/ids"
	"github.com/relais-mta/relais/shared/lab"
	"github.com/relais-mta/relais/shared/mailaddr"
	"github.com/relais-mta/relais/shared/policy"
)

func (w *world) hold(m queue.Match) ids.Hold {
	w.t.Helper()
	id, err := w.queue.PutHold(queue.HoldRule{Match: m, Cause: "the owner complained", Owner: "operator"})
	if err != nil {
		w.t.Fatal(err)
	}
	return id
}

// TestRulesHoldBeforeASessionIsDialed: mail that a rule holds by what is known
// only at its turn, the provider or the source, costs no connection and no
// attempt; other mail goes, and the held mail goes when the rule does.
func TestRulesHoldBeforeASessionIsDialed(t *testing.T) {
	for name, match := range map[string]queue.Match{"provider": {Provider: "google"}, "source": {Source: first.Bind}} {
		t.Run(name, func(t *testing.T) {
			w := newWorld(t, nil, first)
			to := w.at(lab.Google, 0, lab.Accept)
			if match.Source.IsValid() { // it is the only one here
				_, domain, _ := strings.Cut(to, "@")
				match.Domain = mailaddr.Domain(domain)
			}
			rule := w.hold(match)
			var held []*relay.Envelope
			for range 3 {
				held = append(held, w.accept(nil, to))
			}
			for _, env := range held {
				e := w.event(env, outbox.Held)
				if e.Attempts != 0 || e.Actor != "operator" || e.Reply.Text != "the owner complained" {
					t.Errorf("event %+v", e)
				}
			}
			w.gone(w.accept(nil, w.at(lab.Yahoo, 0, lab.Accept)))
			for _, l := range w.lab.Report().Lanes {
				if l.Provider == lab.Google && l.Connections != 0 {
					t.Errorf("%d connections were made for held mail", l.Connections)
				}
			}
			info, err := w.queue.Show(held[0].ID)
			if err != nil {
				t.Fatal(err)
			}
			why := w.engine.Explain(held[0], 0, info.States[0])
			if why.Reason != "held" || why.Rule != rule.String() || !strings.Contains(why.Text, "the owner complained") || !why.Until.Equal(held[0].ExpiresAt) {
				t.Errorf("why: %+v", why)
			}
			if err := w.queue.RemoveHold(rule, "operator"); err != nil {
				t.Fatal(err)
			}
			for _, env := range held {
				w.gone(env)
			}
			if n := len(w.arrived(lab.Google)); n != len(held) {
				t.Errorf("%d arrived, want %d", n, len(held))
			}
		})
	}
}

// TestARuleTakesWhatAnOpenSessionWouldCarry has mail in the queue of a session
// that is kept open.
func TestARuleTakesWhatAnOpenSessionWouldCarry(t *testing.T) {
	w := newWorld(t, nil, first)
	to := w.at(lab.Yahoo, 0, lab.Accept)
	w.gone(w.accept(nil, to))
	rule := w.hold(queue.Match{Provider: "yahoo"})
	env := w.accept(nil, to)
	w.event(env, outbox.Held)
	if err := w.queue.RemoveHold(rule, "operator"); err != nil {
		t.Fatal(err)
	}
	w.gone(env)
	if n := len(w.arrived(lab.Yahoo)); n != 2 {
		t.Errorf("%d arrived", n)
	}
}

// TestBounceTellsEachSenderOnce ends mail to several domains for an operator:
// one notification for all of it, with the reason, where policy has one sent.
func TestBounceTellsEachSenderOnce(t *testing.T) {
	w := newWorld(t, nil, first)
	w.hostSender()
	w.hold(queue.Match{Tag: "mistake"})
	tagged := func(kind policy.StreamKind) func(*relay.Envelope) {
		return func(env *relay.Envelope) { env.Tag, env.Kind = "mistake", kind }
	}
	told := w.accept(tagged(policy.Transactional), w.at(lab.Google, 0, lab.Accept), w.at(lab.Orange, 0, lab.Accept), w.at(lab.Google, 1, lab.Accept))
	silent := w.accept(tagged(policy.Bulk), w.at(lab.Google, 0, lab.Accept))
	p, err := w.queue.Operate(t.Context(), queue.Operation{
		Action: queue.ActionBounce, Filter: queue.Filter{Match: queue.Match{Tag: "mistake"}}, Actor: "local:ada", Reason: "sent by mistake",
		End: w.engine.Bounce("local:ada", "sent by mistake"),
	}, func(queue.Progress) {})
	if err != nil || p.Done != 4 || !p.Finished {
		t.Fatalf("%+v, %v", p, err)
	}
	w.gone(told)
	w.gone(silent)
	w.until("the notification", func() bool { return len(w.reports()) == 1 && w.empty() })
	bounced := 0
	for _, e := range w.events() {
		if e.Type == outbox.Bounced {
			bounced++
			if e.Actor != "local:ada" || e.Class != classOperator || e.Reply.Text != "sent by mistake" || e.Attempts != 0 {
				t.Errorf("event %+v", e)
			}
		}
	}
	if bounced != 4 {
		t.Errorf("%d bounced", bounced)
	}
}
