package engine

import (
	"fmt"
	"sort"
	"time"

	"github.com/relais-mta/relais/relay"
	"github.com/relais-mta/relais/relay/queue"
	"github.com/relais-mta/relais/relay/schedule"
)

// Explanation names the one thing a recipient waits for.
type Explanation struct {
	Reason   string    `json:"reason"` // stable word: retry, dns, resolve, source, family, backoff, source-connections, unproven, relay-connections, provider-share, sessions, connects, rate, session, held, in-flight
	Text     string    `json:"text"`
	Until    time.Time `json:"until,omitzero"` // when it ends, if that is known
	Source   string    `json:"source,omitempty"`
	Provider string    `json:"provider,omitempty"`
	Rule     string    `json:"rule,omitempty"` // of held: the rule that holds it
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
		text := "it waits for its next attempt"
		if st.LastReply.Text != "" {
			text = fmt.Sprintf("the last attempt ended with %q; it waits for the next one", replyText(&st.LastReply))
		}
		return Explanation{Reason: "retry", Text: text, Until: st.Next}
	}
	n, ok := e.queueOf(env, index)
	if !ok {
		return Explanation{Reason: "in-flight", Text: "it is being delivered"}
	}
	e.mu.Lock()
	w := e.sched.Why(schedule.Queue(n), now)
	failure := e.failures[siteKey{w.Lane.Source, w.Site}]
	e.mu.Unlock()
	if w.Reason == "" || w.Reason == "due" {
		return Explanation{Reason: "in-flight", Text: "it is being delivered", Provider: w.Lane.Provider}
	}
	x := Explanation{Reason: w.Reason, Text: whyTexts[w.Reason], Until: w.Until, Provider: w.Lane.Provider}
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

// queueOf finds the number of the work queue that holds a recipient.
func (e *Engine) queueOf(env *relay.Envelope, index int) (number queue.Number, found bool) {
	want := queue.Key{Tenant: env.Tenant, Stream: env.Stream, Pool: env.Pool, Domain: env.Recipients[index].Address.Domain, Kind: env.Kind}
	e.queue.Queues(func(info queue.QueueInfo) bool {
		if info.Key == want {
			number, found = info.Number, info.InMemory > 0 || info.More
		}
		return !found
	})
	return number, found
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

// LaneInfo is one lane for people.
type LaneInfo struct {
	Source   string `json:"source"`
	Provider string `json:"provider"`
	Pool     string `json:"pool"`
	Sessions int    `json:"sessions"`
	Waiting  int    `json:"waiting"` // recipients due for the provider in the pool, all its sources
}

// Lanes lists the lanes that have sessions or work, busiest first.
func (e *Engine) Lanes() []LaneInfo {
	e.mu.Lock()
	lanes := e.sched.Lanes()
	e.mu.Unlock()
	out := make([]LaneInfo, 0, len(lanes))
	dir := e.cfg.Directory()
	for _, l := range lanes {
		info := LaneInfo{Source: e.sourceName(l.Lane.Source), Provider: l.Lane.Provider, Pool: l.Pool.String(), Sessions: l.Sessions, Waiting: l.Waiting}
		if dir != nil {
			if p, ok := dir.Pool(l.Pool); ok {
				info.Pool = p.Name
			}
		}
		out = append(out, info)
	}
	sort.Slice(out, func(i, j int) bool {
		a, b := &out[i], &out[j]
		if a.Sessions != b.Sessions {
			return a.Sessions > b.Sessions
		}
		if a.Waiting != b.Waiting {
			return a.Waiting > b.Waiting
		}
		return a.Provider+a.Source < b.Provider+b.Source
	})
	return out
}
