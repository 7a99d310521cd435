package queue

import (
	"bytes"

	"github.com/relais-mta/relais/relay"
	"github.com/relais-mta/relais/relay/store"
	"github.com/relais-mta/relais/shared/fault"
	"github.com/relais-mta/relais/shared/ids"
)

// heldPlace is a key in the index of held recipients.
type heldPlace struct {
	rule  ids.Hold
	index uint16
}

// holdRules reads which rules there are.
func (c *checker) holdRules() error {
	return c.each(store.SpaceRule, false, func(key, value []byte) error {
		id, ok := store.ParseRuleKey(key)
		if !ok {
			return c.stray(key, value, "the key of a rule has another length")
		}
		if _, err := parseRule(id, value); err != nil {
			const detail = "the record of the rule is unreadable: it holds nothing new, and does not release what it holds"
			if c.report(Finding{Kind: RuleDamaged, Rule: &id, Detail: detail}) {
				return c.asideRecord(RuleDamaged, bytes.Clone(key), bytes.Clone(value), detail)
			}
			return nil
		}
		c.rules[id] = struct{}{}
		return nil
	})
}

// heldKeys sums up the index of held recipients.
func (c *checker) heldKeys() error {
	return c.each(store.SpaceHeld, true, func(key, _ []byte) error {
		if _, _, _, ok := store.ParseHeldKey(key); !ok {
			return c.stray(key, nil, "a held recipient's key has another length")
		}
		c.heldFound.add(c.seed, key)
		return nil
	})
}

// expectHeld notes the key that a held recipient's state asks for, and looks
// for the rule.
func (c *checker) expectHeld(m *messageRecords, i int, s *relay.RecipientState) {
	if s.Held == nil {
		return // its state is being repaired, and the key with it
	}
	index, rule := uint16(i), s.Held.Rule
	m.helds = append(m.helds, heldPlace{rule, index})
	if c.quiet {
		return
	}
	c.count.Held++
	c.key = store.AppendHeldKey(c.key[:0], rule, m.id, index)
	c.heldWant.add(c.seed, c.key)
	if _, ok := c.rules[rule]; ok || rule.IsZero() {
		return
	}
	if c.report(aboutRecipient(HeldWithoutRule, m.id, index, "the rule that holds it does not exist: nothing would release it")) {
		state := *s
		by := *s.Held
		by.Rule = ids.Hold{}
		state.Held = &by
		c.set(store.AppendStateKey(nil, m.id, index), appendState(nil, &state))
		c.remove(store.AppendHeldKey(nil, rule, m.id, index))
		c.set(store.AppendHeldKey(nil, by.Rule, m.id, index), nil)
	}
}

// findHolder looks for the rule under which a recipient stands in the index.
func (c *checker) findHolder(id ids.Message, index uint16) (*relay.Held, error) {
	var by *relay.Held
	err := c.exists(store.AppendHeldKey(nil, ids.Hold{}, id, index), func() { by = &relay.Held{} })
	for rule := range c.rules {
		if by == nil && err == nil {
			err = c.exists(store.AppendHeldKey(nil, rule, id, index), func() { by = &relay.Held{Rule: rule} })
		}
	}
	return by, err
}

func (c *checker) exists(key []byte, f func()) error {
	_, err := c.snap.Get(key, nil)
	if fault.Is(err, fault.NotFound) {
		return nil
	}
	if err == nil {
		f()
	}
	return err
}

// missingHeld looks for the keys in the index that a message's held recipients
// ask for.
func (c *checker) missingHeld(m *messageRecords) error {
	if c.heldFound == c.heldWant {
		return nil
	}
	for _, h := range m.helds {
		err := c.missing(store.AppendHeldKey(nil, h.rule, m.id, h.index), func() {
			if c.report(aboutRecipient(HeldMissing, m.id, h.index, "it is held and not in the index: its rule would not release it")) {
				c.set(store.AppendHeldKey(nil, h.rule, m.id, h.index), nil)
			}
		})
		if err != nil {
			return err
		}
	}
	return nil
}

// extraHeld looks for keys in the index that no held recipient asks for. A
// release that does not know the index leaves some.
func (c *checker) extraHeld() error {
	return c.pieces([]byte{store.SpaceHeld}, func(key []byte) error {
		rule, id, index, ok := store.ParseHeldKey(key)
		if !ok {
			return nil
		}
		found, err := c.load(id)
		if err != nil {
			return err
		}
		if found && c.rec.env == nil {
			return nil // reported with its message
		}
		for _, h := range c.rec.helds {
			if found && h.rule == rule && h.index == index {
				return nil
			}
		}
		note := aboutRecipient(HeldExtra, id, index, "it is not held by this rule; the end of the rule clears that up")
		note.Note = true
		if c.report(note) {
			c.remove(key)
		}
		return c.settle()
	})
}

// pieces calls f for each key with a prefix; f may use iterators of its own and
// keep the key.
func (c *checker) pieces(prefix []byte, f func(key []byte) error) error {
	var keys [][]byte
	for from := prefix; ; {
		keys = keys[:0]
		err := c.snap.Iterate(prefix, from, true, func(key, _ []byte) bool {
			keys = append(keys, bytes.Clone(key))
			return len(keys) < fsckStep
		})
		if err != nil {
			return err
		}
		for _, key := range keys {
			if err = c.step(); err == nil {
				err = f(key)
			}
			if err != nil {
				return err
			}
		}
		if len(keys) < fsckStep {
			return nil
		}
		from = append(bytes.Clone(keys[len(keys)-1]), 0)
	}
}
