package engine

import (
	"net/netip"

	"github.com/relais-mta/relais/relay"
	"github.com/relais-mta/relais/relay/queue"
	"github.com/relais-mta/relais/relay/schedule"
	"github.com/relais-mta/relais/shared/mailaddr"
	"github.com/relais-mta/relais/shared/policy"
)

// maxHeldPerTake bounds how much mail of one queue rules hold in one go while
// the engine is locked.
const maxHeldPerTake = 64

// held gives loaded work that is in hand to the rule that holds it, if one does:
// before a session is dialed for it, and before it is offered on one that is
// there. It costs an atomic load while there is no rule.
func (e *Engine) held(w *queue.Work, lane schedule.Lane) bool {
	if !e.queue.Holding() {
		return false
	}
	source := e.bindOf(lane.Source)
	if sticky := w.Recipients[0].State.Sticky; sticky.IsValid() {
		if _, ok := e.sourceAt(sticky, w); ok {
			source = sticky // it moves there, see pin
		}
	}
	return e.queue.HoldIfRuled(w, lane.Provider, source)
}

// bindOf is the address that a source sends from.
func (e *Engine) bindOf(id sourceID) netip.Addr {
	if dir := e.cfg.Directory(); dir != nil && !id.IsZero() {
		for i := range dir.Sources() {
			if s := &dir.Sources()[i]; s.ID == id {
				return s.Bind
			}
		}
	}
	return netip.Addr{}
}

// Directory is the view in force; nil before the first.
func (e *Engine) Directory() *policy.Directory { return e.cfg.Directory() }

// Provider names the provider of a recipient domain if the domain was looked up
// lately, else "".
func (e *Engine) Provider(domain mailaddr.Domain) string {
	dir := e.cfg.Directory()
	if dir == nil {
		return ""
	}
	e.mu.Lock()
	route := e.routes[domain]
	e.mu.Unlock()
	if route == nil || route.Failure != nil {
		return ""
	}
	name, _ := dir.Providers().Match(route.Names, route.FirstAddr())
	return name
}

// explainHeld says who holds a recipient, why, and when that ends: by the
// rule's own end, or by the message's deadline.
func (e *Engine) explainHeld(env *relay.Envelope, h *relay.Held) Explanation {
	x := Explanation{Reason: "held", Text: "an operator holds it until it is released; its deadline counts", Until: env.ExpiresAt}
	if h == nil {
		return x
	}
	words := ""
	if h.Why != "" {
		words = ": " + h.Why
	}
	if h.Rule.IsZero() {
		if h.By != "" {
			x.Text = h.By + " holds it until it is released; its deadline counts" + words
		}
		return x
	}
	x.Rule = h.Rule.String()
	rule, ok := e.queue.HoldRule(h.Rule)
	if !ok {
		return Explanation{Reason: "held", Text: "the rule " + x.Rule + " that held it is gone; it is being released", Rule: x.Rule}
	}
	x.Text = "rule " + x.Rule + " of " + rule.Owner + " holds it: " + rule.Cause
	if rule.Owner == AlertDKIM {
		x.Text += e.checks.nextLook(env.From)
	}
	if !rule.Until.IsZero() && rule.Until.Before(env.ExpiresAt) {
		x.Until = rule.Until
	}
	return x
}
