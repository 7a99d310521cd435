package queue

import (
	"fmt"

	"pgregory.net/rapid"

	"github.com/relais-mta/relais/relay"
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
