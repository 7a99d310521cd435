package engine

import (
	"fmt"
	"time"

	"github.com/relais-mta/relais/relay"
	"github.com/relais-mta/relais/relay/schedule"
	"github.com/relais-mta/relais/shared/policy"
)

// Explanation names the one thing a recipient waits for.
type Explanation struct {
	Reason   string    `json:"reason"` // stable word: retry, in-doubt, scheduled, deadline, dns, resolve, source, family, backoff, source-connections, unproven, relay-connections, provider-share, sessions, connects, rate, limit, reflex, brake, session, held, in-flight
	Text     string    `json:"text"`
	Until    time.Time `json:"until,omitzero"` // when it ends, if that is known
	Source   string    `json:"source,omitempty"`
	Provider string    `json:"provider,omitempty"`
	Rule     string    `json:"rule,omitempty"`  // of held: the rule that holds it
	Limit    string    `json:"limit,omitempty"` // of limits that the policy names, of plans and of brakes: its name
	Scope    string    `json:"scope,omitempty"` // of that: whom it counts together
}

var whyTexts = map[string]string{
	"dns":                "the mail hosts of the domain could not be looked up; DNS is asked again then",
	"resolve":            "the mail hosts of the domain are being looked up",
	"source":             "no source address of the pool is assigned to this relay and present on it",
	"family":             "the provider's profile rules out the address family of every source of the pool",
	"backoff":            "the mail hosts could not be reached and are left alone for a while",
	"source-connections": "every source has as many connections to the provider as it may",
	"unproven":           "its mail hosts have not taken mail promptly of late, and such hosts have as many sessions of this relay as they may",
	"relay-connections":  "this relay has as many connections to the provider as it may",
	"provider-share":     "the provider has as many of this relay's sessions, or of the connections being opened, as one provider may",
	"sessions":           "this relay has as many sessions as it may",
	"connects":           "this relay opens as many connections at once as it may",
	"rate":               "the provider's rate limit is used up",
	"session":            "it is next for a session",
	"reflex":             "the relay slows the source down by itself, because of what the provider answered",
	"brake":              "a brake holds or slows down such mail",
}

// Explain tells why a waiting recipient is not being delivered now.
func (e *Engine) Explain(env *relay.Envelope, index int, st relay.RecipientState) Explanation {
	now := e.cfg.Now()
	switch {
	case st.State == relay.StateHeld:
		return e.explainHeld(env, st.Held)
	case st.State.Final():
		return Explanation{Reason: st.State.String(), Text: "nothing more will happen to it"}
	case st.Next.After(now):
		return explainRetry(env, &st, now)
	}
	e.mu.Lock()
	n, pinned := e.pinnedFor(env, index)
	e.mu.Unlock()
	if !pinned {
		number, ok := e.queue.Find(env, index)
		if !ok {
			return Explanation{Reason: "in-flight", Text: "it is being delivered"}
		}
		n = schedule.Queue(number)
	}
	e.mu.Lock()
	w := e.sched.Why(n, now)
	failure := e.failures[siteKey{w.Lane.Source, w.Site}]
	e.mu.Unlock()
	if w.Reason == "" || w.Reason == "due" {
		return Explanation{Reason: "in-flight", Text: "it is being delivered", Provider: w.Lane.Provider}
	}
	x := Explanation{Reason: w.Reason, Text: whyTexts[w.Reason], Until: w.Until, Provider: w.Lane.Provider}
	if w.Reason == "source" {
		x.Text += e.unleased(env.Pool)
	}
	if w.Hold.Reason != "" {
		// It is asked again before that, which is not when it ends.
		x.Text, x.Limit, x.Scope, x.Until = w.Hold.Text, w.Hold.Name, w.Hold.Scope, w.Hold.Until
		if h, ok := e.explainGate(w.Hold.Gate); ok {
			x.Text, x.Until = h.Text, h.Until
		}
	}
	if h, ok := e.explainGate(w.Gate); ok {
		x.Text, x.Limit, x.Scope = h.Text, h.Name, h.Scope
		if x.Until.IsZero() {
			x.Until = h.Until
		}
	}
	if x.Text == "" {
		x.Text = "it waits for: " + w.Reason
	}
	if w.Reason == "backoff" && failure.why != "" {
		x.Text += "; the last attempt failed at " + failure.why
	}
	if !w.Lane.Source.IsZero() {
		x.Source = e.sourceName(w.Lane.Source)
	}
	return x
}

func replyText(r *relay.Reply) string {
	switch {
	case r.Code == 0:
		return r.Text
	case r.Enhanced == "":
		return fmt.Sprintf("%d %s", r.Code, r.Text)
	}
	return fmt.Sprintf("%d %s %s", r.Code, r.Enhanced, r.Text)
}

// ExplainInFlight is Explain for a recipient that the engine has taken from the
// queue: it is being delivered, or waits for the one lane that it belongs to.
func (e *Engine) ExplainInFlight(env *relay.Envelope, index int, st relay.RecipientState) Explanation {
	e.mu.Lock()
	_, pinned := e.pinnedFor(env, index)
	e.mu.Unlock()
	if pinned {
		return e.Explain(env, index, st)
	}
	x := Explanation{Reason: "in-flight", Text: "it is being delivered", Provider: st.Provider}
	lane, since := e.carrying(env, index)
	if since.IsZero() {
		return x
	}
	x.Provider, x.Source = lane.Provider, e.sourceName(lane.Source)
	// A host that takes its time is what it waits for then.
	if age := e.cfg.Now().Sub(since).Truncate(time.Second); age > 0 {
		x.Text = fmt.Sprintf("it is being delivered, for %s by now", policy.Duration(age))
	}
	return x
}

// carrying returns the lane of the session that has a recipient in hand, and since
// when; zero: none has.
func (e *Engine) carrying(env *relay.Envelope, index int) (lane schedule.Lane, since time.Time) {
	to := env.Recipients[index].Address.Domain
	e.mu.Lock()
	defer e.mu.Unlock()
	for _, w := range e.sessions {
		if w.carries == env.ID && w.to == to && w.since.After(since) { // one that had it before may be idle
			lane, since = w.lane, w.since
		}
	}
	return lane, since
}

// explainRetry says which time a recipient waits for.
func explainRetry(env *relay.Envelope, st *relay.RecipientState, now time.Time) Explanation {
	x := Explanation{Reason: "retry", Text: "it waits for its next attempt", Until: st.Next, Provider: st.Provider}
	ended := ""
	if st.LastReply.Text != "" {
		ended = fmt.Sprintf("the last attempt ended with %q; ", replyText(&st.LastReply))
	}
	switch {
	case !st.Next.Before(env.ExpiresAt):
		// retryAt lets it wait so when the schedule has no further attempt.
		x.Reason, x.Text = "deadline", ended+"no further attempt fits in before its deadline, which ends it"
	case st.InDoubt > 0 && (st.LastClass == classInDoubt || st.LastClass == classBadConnection):
		x.Reason, x.Text = "in-doubt", "the end of the last attempt was not seen, so it may have arrived; it is tried once more then"
	case st.Attempts == 0 && env.NotBefore.After(now):
		x.Reason, x.Text = "scheduled", "its client asked for it not to be sent before"
	case st.Sticky.IsValid():
		x.Text, x.Source = ended+"it was greylisted and is tried again from the same source", st.Sticky.String()
	case ended != "":
		x.Text = ended + "it waits for the next one"
	}
	return x
}

// classInDoubt is the class that the queue gives to attempts that a crash cut
// short.
const classInDoubt = "in-doubt"

// pinnedFor finds the queue of one lane that holds a recipient. e.mu is held.
func (e *Engine) pinnedFor(env *relay.Envelope, index int) (schedule.Queue, bool) {
	for n, p := range e.pinned {
		for _, w := range p.work {
			if w.Env.ID == env.ID && find(w, uint16(index)) != nil {
				return n, true
			}
		}
	}
	return 0, false
}

func (e *Engine) sourceName(id sourceID) string {
	if dir := e.cfg.Directory(); dir != nil {
		for i := range dir.Sources() {
			if s := &dir.Sources()[i]; s.ID == id {
				return s.Bind.String()
			}
		}
	}
	return id.String()
}
