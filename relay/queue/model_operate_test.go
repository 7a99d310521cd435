package queue

import (
	"context"
	"fmt"
	"time"

	"pgregory.net/rapid"

	"github.com/relais-mta/relais/relay"
	"github.com/relais-mta/relais/relay/outbox"
	"github.com/relais-mta/relais/shared/ids"
)

// holdAtOnce is what a rule does to a recipient that arrives.
func (m *model) holdAtOnce(r *modelRecipient) {
	if id, ok := m.rules[r.domain]; ok {
		r.state, r.rule = relay.StateHeld, id
		m.events++
	}
}

// rule makes a rule for a domain, or ends the one that is there.
func (m *model) rule(t *rapid.T) {
	domain := fmt.Sprintf("d%d.example", rapid.IntRange(0, 3).Draw(t, "domain"))
	if id, ok := m.rules[domain]; ok {
		delete(m.rules, domain)
		m.f.remove(id)
		now := m.f.clock.Now()
		for _, r := range m.recipients {
			if r.rule == id && r.state == relay.StateHeld {
				m.dueNow(r, now.UnixMilli())
				r.rule = ids.Hold{}
			}
		}
		return
	}
	m.rules[domain] = m.f.put(Match{Domain: splitAddress("x@" + domain).Domain})
	for _, r := range m.recipients {
		if r.domain == domain && r.state == relay.StateWaiting && !r.owned {
			r.state, r.rule = relay.StateHeld, m.rules[domain]
			m.events++
		}
	}
}

// dueNow lets a recipient wait for an attempt at once, though not before the
// time that its client set.
func (m *model) dueNow(r *modelRecipient, now int64) {
	if at := m.envelopes[r.msg].NotBefore; !at.IsZero() {
		now = max(now, at.UnixMilli())
	}
	r.state, r.due = relay.StateWaiting, now
	m.events++
}

// operate carries out an action on the mail of a domain, or on all of it.
func (m *model) operate(t *rapid.T) {
	f := Filter{}
	if i := rapid.IntRange(0, 4).Draw(t, "domain"); i < 4 {
		f.Domain = splitAddress(fmt.Sprintf("x@d%d.example", i)).Domain
	}
	op := Operation{Action: rapid.SampledFrom([]Action{ActionRetry, ActionHold, ActionRelease, ActionPurge, ActionBounce}).Draw(t, "action"), Filter: f, Actor: "ada", Reason: "the model says so"}
	op.End = m.f.bounce
	now := m.f.clock.Now()
	var want Progress
	for _, r := range m.recipients {
		if f.Domain != "" && r.domain != string(f.Domain) || r.state.Final() {
			continue
		}
		m.expect(&op, r, now.UnixMilli(), &want)
	}
	got, err := m.f.q.Operate(context.Background(), op, func(Progress) {})
	if err != nil {
		t.Fatal(err)
	}
	if got.Done != want.Done || got.InFlight != want.InFlight || got.Matched != want.Matched || got.Skipped != want.Skipped || !got.Finished {
		t.Fatalf("%s of %q: %+v, want %+v", op.Action, f.Domain, got, want)
	}
	for id := range m.envelopes {
		m.forgetFinal(id)
	}
}

// expect does to a recipient of the model what an operation has to do.
func (m *model) expect(op *Operation, r *modelRecipient, now int64, want *Progress) {
	held := r.state == relay.StateHeld
	switch op.Action {
	case ActionRetry, ActionHold:
		if held {
			return
		}
	case ActionRelease:
		if !held {
			return
		}
	}
	want.Matched++
	if r.owned {
		want.InFlight++
		return
	}
	switch op.Action {
	case ActionRetry:
		due := now
		if at := m.envelopes[r.msg].NotBefore; !at.IsZero() {
			due = max(due, at.UnixMilli())
		}
		if r.due <= due || r.doubts > 0 {
			want.Skipped++
			return
		}
		m.dueNow(r, now)
	case ActionHold:
		r.state = relay.StateHeld
		m.events++
	case ActionRelease:
		if r.rule != (ids.Hold{}) {
			want.Skipped++
			return
		}
		m.dueNow(r, now)
	case ActionPurge:
		r.state = relay.StatePurged
		m.events++
	case ActionBounce:
		r.state = relay.StateBounced
		m.events++
	}
	want.Done++
}

// bounce ends works as the engine does, without telling anybody.
func (f *fixture) bounce(works []*Work, done func(error)) {
	left := len(works)
	for _, w := range works {
		f.q.Finish(w, nil, all(w, relay.StateBounced, outbox.Bounced, time.Time{}), nil, func(err error) {
			if err != nil {
				f.t.Errorf("bouncing: %v", err)
			}
			if left--; left == 0 { // the commit goroutine calls them all
				done(nil)
			}
		})
	}
}

// checkCounts compares the counts that need no reading with the model.
func (m *model) checkCounts(t *rapid.T, s Summary) {
	if !s.Counted {
		return
	}
	var held, waiting int64
	rules := map[ids.Hold]int64{}
	for _, r := range m.recipients {
		switch r.state {
		case relay.StateHeld:
			held++
			rules[r.rule]++
		case relay.StateWaiting:
			waiting++
		}
	}
	var inQueues int64
	m.f.q.Queues(func(info QueueInfo) bool {
		inQueues += info.Waiting
		return true
	})
	if s.Held != held || inQueues != waiting {
		t.Fatalf("%d held and %d waiting in work queues, want %d and %d", s.Held, inQueues, held, waiting)
	}
	for _, h := range m.f.q.Holds() {
		if h.Held != rules[h.ID] {
			t.Fatalf("rule %s holds %d, want %d", h.ID, h.Held, rules[h.ID])
		}
	}
}
