package engine

import (
	"testing"
	"time"

	"github.com/relais-mta/relais/relay"
	"github.com/relais-mta/relais/relay/outbox"
	"github.com/relais-mta/relais/shared/lab"
	"github.com/relais-mta/relais/shared/policy"
)

// TestNewLimitsHoldWhereNothingWaited: a provider's limit that is set while no mail
// for it waits holds for the next mail, although the domain's route is still good.
func TestNewLimitsHoldWhereNothingWaited(t *testing.T) {
	w := newWorld(t, nil, first)
	unlimited := func(d *policy.Document) {
		for _, kind := range []policy.LimitKind{policy.MessageRate, policy.ConnectionRate} {
			for _, scope := range []policy.Scope{policy.ScopeSource, policy.ScopeRelay} {
				d.Providers.Limit = append(d.Providers.Limit, policy.Override{Provider: lab.Google, Limit: policy.Limit{Kind: kind, Scope: scope}})
			}
		}
	}
	w.view(unlimited, first)
	to := w.at(lab.Google, 0, lab.Accept)
	env := w.accept(nil, to)
	w.event(env, outbox.Delivered)
	w.gone(env)
	w.until("the scheduler to forget the queue", func() bool {
		w.engine.mu.Lock()
		defer w.engine.mu.Unlock()
		return w.engine.sched.Stats().Queues == 0
	})
	w.view(func(d *policy.Document) {
		unlimited(d)
		d.Providers.Limit = append(d.Providers.Limit, policy.Override{Provider: lab.Google, Limit: policy.Limit{
			Kind: policy.MessageRate, Scope: policy.ScopeSource, Max: 1, Per: policy.Duration(time.Hour), Burst: 1,
		}})
	}, first)
	// The engine takes the limit over at its next round. One mail may go by the limit,
	// and one that was faster than the round: of some, one waits in any case. All are
	// for one domain: another one of the provider's would be looked up anew.
	var envs []*relay.Envelope
	w.until("mail that waits for the rate", func() bool {
		if len(envs) < 50 {
			envs = append(envs, w.accept(nil, to))
		}
		for _, env := range envs {
			state := relay.RecipientState{State: relay.StateWaiting, Next: env.AcceptedAt}
			if x := w.engine.Explain(env, 0, state); x.Reason == "rate" && x.Until.After(time.Now().Add(30*time.Minute)) {
				return true
			}
		}
		return false
	})
}
