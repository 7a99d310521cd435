package queue

import (
	"net/netip"
	"time"

	"github.com/relais-mta/relais/relay"
	"github.com/relais-mta/relais/relay/outbox"
	"github.com/relais-mta/relais/relay/store"
	"github.com/relais-mta/relais/shared/ids"
	"github.com/relais-mta/relais/shared/mailaddr"
)

// Holding reports whether there is any rule that holds mail.
func (q *Queue) Holding() bool { return q.active.Load() != nil }

// provider names the provider of a recipient domain, as far as it is known.
func (q *Queue) provider(d mailaddr.Domain) string {
	if q.cfg.Provider == nil {
		return ""
	}
	return q.cfg.Provider(d)
}

// HoldIfRuled compares loaded work, which is about to go to a provider from a
// source, with the rules, and takes it from the caller if one holds it; no
// attempt is counted. It does not wait for the disk. Should the state not
// become durable, the recipients wait as before.
func (q *Queue) HoldIfRuled(w *Work, provider string, source netip.Addr) bool {
	set := q.active.Load()
	if set == nil {
		return false
	}
	for _, r := range set.rules {
		m := &r.Match
		if m.message(w.Env) && m.domain(w.Key.Domain) && (m.Provider == "" || m.Provider == provider) && (!m.Source.IsValid() || m.Source == source) {
			return q.holdWork(w, r)
		}
	}
	return false
}

func (q *Queue) holdWork(w *Work, r *activeRule) bool {
	q.mu.Lock()
	pinned := r.pin()
	q.mu.Unlock()
	if !pinned {
		return false
	}
	q.Finish(w, nil, r.results(w), nil, func(err error) {
		q.mu.Lock()
		r.unpin()
		q.mu.Unlock()
		if err != nil {
			q.log.Error("mail that a rule holds could not be held; it waits", "message", w.msg.id, "rule", r.ID, "error", err)
			q.Return(w)
		}
	})
	return true
}

// results holds all recipients of work.
func (r *activeRule) results(w *Work) []Result { return held(w, r.held, r.note) }

func held(w *Work, by *relay.Held, note *Note) []Result {
	out := make([]Result, 0, len(w.Recipients))
	for i := range w.Recipients {
		s := w.Recipients[i].State
		s.State, s.Next, s.Held = relay.StateHeld, time.Time{}, by
		out = append(out, Result{Index: w.Recipients[i].Index, State: s, Event: outbox.Held, Phase: relay.PhaseLocal, Note: note})
	}
	return out
}

// pin keeps a rule from being forgotten while mail is being held by it, and
// reports false if it ended. Call with the queue's lock held.
func (r *activeRule) pin() bool {
	if r.use.ended {
		return false
	}
	r.use.pending++
	return true
}

// unpin ends pin. Call with the queue's lock held.
func (r *activeRule) unpin() {
	r.use.pending--
}

// heldAtOnce names the rule that holds each recipient of mail that arrives; nil
// if none is held. Rules that name a source are asked when one was chosen.
// Call without the lock.
func (q *Queue) heldAtOnce(env *relay.Envelope) []*activeRule {
	set := q.active.Load()
	if set == nil {
		return nil
	}
	var out []*activeRule
	for _, r := range set.rules {
		m := &r.Match
		if m.Source.IsValid() || !m.message(env) {
			continue
		}
		for i := range env.Recipients {
			d := env.Recipients[i].Address.Domain
			if out != nil && out[i] != nil || !m.domain(d) || m.Provider != "" && m.Provider != q.provider(d) {
				continue
			}
			if out == nil {
				out = make([]*activeRule, len(env.Recipients))
			}
			out[i] = r
		}
	}
	return out
}

// pinRules pins the rules that hold arriving mail, and forgets those that
// ended. Call with the lock held.
func (q *Queue) pinRules(rules []*activeRule) []*activeRule {
	for i, r := range rules {
		if r != nil && !r.pin() {
			rules[i] = nil
		}
	}
	return rules
}

// unpinRules ends pinRules. Call with the lock held.
func (q *Queue) unpinRules(rules []*activeRule) {
	for _, r := range rules {
		if r != nil {
			r.unpin()
		}
	}
}

// heldBy is the rule that holds a recipient of arriving mail; nil: it waits.
func (m *placedMail) heldBy(i int) *activeRule {
	if m.rules == nil {
		return nil
	}
	return m.rules[i]
}

// placeHeld writes a recipient that is held from the start.
func (q *Queue) placeHeld(b *store.Batch, env *relay.Envelope, index uint16, r *activeRule, sc *scratch) {
	s := relay.RecipientState{State: relay.StateHeld, Held: r.held}
	sc.key = store.AppendStateKey(sc.key[:0], env.ID, index)
	sc.value = appendState(sc.value[:0], &s)
	b.Set(sc.key, sc.value)
	sc.key = store.AppendHeldKey(sc.key[:0], r.ID, env.ID, index)
	b.Set(sc.key, nil)
}

var byHand = &relay.Held{}

// holder is what a held state says of who holds it.
func holder(s *relay.RecipientState) *relay.Held {
	if s.State != relay.StateHeld {
		return nil
	}
	if s.Held == nil {
		return byHand
	}
	return s.Held
}

// writeHeld keeps the index of held recipients right when a result is written;
// was is who held the recipient before.
func (q *Queue) writeHeld(b *store.Batch, id ids.Message, r *Result, was *relay.Held, sc *scratch) {
	now := holder(&r.State)
	if was != nil && (now == nil || now.Rule != was.Rule) {
		sc.key = store.AppendHeldKey(sc.key[:0], was.Rule, id, r.Index)
		b.Delete(sc.key)
	}
	if now != nil && (was == nil || now.Rule != was.Rule) {
		sc.key = store.AppendHeldKey(sc.key[:0], now.Rule, id, r.Index)
		b.Set(sc.key, nil)
	}
}

// bookHeld counts what writeHeld wrote. Call with the lock held.
func (q *Queue) bookHeld(was *relay.Held, s *relay.RecipientState) {
	if was != nil {
		q.heldBy[was.Rule]--
	}
	if now := holder(s); now != nil {
		q.heldBy[now.Rule]++
	}
}
