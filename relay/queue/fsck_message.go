package queue

import (
	"bytes"
	"fmt"
	"slices"
	"time"

	"github.com/relais-mta/relais/relay"
	"github.com/relais-mta/relais/relay/store"
	"github.com/relais-mta/relais/shared/fault"
	"github.com/relais-mta/relais/shared/ids"
)

// messageRecords are all records under the id of one message.
type messageRecords struct {
	id       ids.Message
	exists   bool // it has an envelope, readable or not
	value    []byte
	env      *relay.Envelope // nil: unreadable
	firstDue int64
	states   []storedState
	journal  []storedAttempt

	known map[uint16]relay.RecipientState // readable states, and what takes the place of damaged ones
	waits []waitingPlace                  // the waiting keys that the states ask for
	helds []heldPlace                     // and those in the index of held recipients
	open  int
}

type storedState struct {
	index uint16
	value []byte
	state relay.RecipientState
	err   error
}

type storedAttempt struct {
	index uint16
	value []byte
	entry journalEntry
	err   error
}

// mayName reports whether the attempt was for a recipient; of an unreadable one only
// the first is known.
func (a *storedAttempt) mayName(index uint16) bool {
	return a.err != nil && index >= a.index || slices.Contains(a.entry.indexes, index)
}

type waitingPlace struct {
	queue Number
	due   int64
	index uint16
}

// state is what a recipient's record says, or what its absence means.
func (m *messageRecords) state(i int) relay.RecipientState {
	if s, ok := m.known[uint16(i)]; ok {
		return s
	}
	return relay.RecipientState{State: relay.StateWaiting, Next: time.UnixMilli(m.firstDue)}
}

func (m *messageRecords) reset(id ids.Message) {
	*m = messageRecords{id: id, states: m.states[:0], journal: m.journal[:0], waits: m.waits[:0], helds: m.helds[:0], known: m.known}
	if m.known == nil {
		m.known = make(map[uint16]relay.RecipientState)
	}
	clear(m.known)
}

func (m *messageRecords) setEnvelope(value []byte) {
	m.exists, m.value = true, value
	if env, due, err := parseEnvelope(m.id, value); err == nil {
		m.env, m.firstDue = env, due
	}
}

func (m *messageRecords) addState(index uint16, value []byte) {
	s := storedState{index: index, value: value}
	s.state, s.err = parseState(value)
	m.states = append(m.states, s)
	if s.err == nil {
		m.known[index] = s.state
	}
}

func (m *messageRecords) addAttempt(index uint16, value []byte) {
	a := storedAttempt{index: index, value: value}
	a.entry, a.err = parseAttempt(m.id, value)
	m.journal = append(m.journal, a)
}

// everyMessage judges each message by itself.
func (c *checker) everyMessage() error { return c.messages(c.judge) }

// messages gathers the records of one message after the other, by walking over
// envelopes, states and journal side by side.
func (c *checker) messages(f func(*messageRecords) error) error {
	cursors := [3]*store.Cursor{c.snap.Cursor([]byte{store.SpaceMessage}), c.snap.Cursor([]byte{store.SpaceState}), c.snap.Cursor([]byte{store.SpaceAttempt})}
	var heads [3][]byte // the key each stands at; nil: at its end
	lengths := [3]int{store.MessageKeyBytes, store.StateKeyBytes, store.StateKeyBytes}
	next := func(i int) error {
		for heads[i] = nil; cursors[i].Next(); {
			if err := c.step(); err != nil {
				return err
			}
			if key := cursors[i].Key(); len(key) == lengths[i] {
				heads[i] = key
				return nil
			}
			value, err := cursors[i].Value(nil)
			if err == nil {
				err = c.stray(cursors[i].Key(), value, "a key of a message's records has another length")
			}
			if err != nil {
				return err
			}
		}
		return nil
	}
	defer func() {
		for _, cursor := range cursors {
			cursor.Close()
		}
	}()
	for i := range cursors {
		if err := next(i); err != nil {
			return err
		}
	}
	for {
		var least []byte
		for _, key := range heads {
			if key != nil && (least == nil || bytes.Compare(key[1:1+ids.Size], least) < 0) {
				least = key[1 : 1+ids.Size]
			}
		}
		if least == nil {
			return nil
		}
		c.rec.reset(ids.Message(least))
		if err := c.gather(&cursors, &heads, next); err != nil {
			return err
		}
		if err := f(&c.rec); err != nil {
			return err
		}
	}
}

// gather reads the records of c.rec and moves behind them.
func (c *checker) gather(cursors *[3]*store.Cursor, heads *[3][]byte, next func(int) error) error {
	m := &c.rec
	for i := range heads {
		for heads[i] != nil && ids.Message(heads[i][1:1+ids.Size]) == m.id {
			value, err := cursors[i].Value(nil)
			if err != nil {
				return err
			}
			_, index, _ := store.ParseStateKey(heads[i])
			switch i {
			case 0:
				m.setEnvelope(value)
			case 1:
				m.addState(index, value)
			default:
				m.addAttempt(index, value)
			}
			if err := next(i); err != nil {
				return err
			}
		}
	}
	return nil
}

// load reads the records of one message into c.rec, without reporting.
func (c *checker) load(id ids.Message) (found bool, err error) {
	m := &c.rec
	if m.exists && m.id == id {
		return true, nil // several recipients of one message follow each other
	}
	m.reset(id)
	value, err := c.snap.Get(store.AppendMessageKey(nil, id), nil)
	if fault.Is(err, fault.NotFound) {
		return false, nil
	}
	if err != nil {
		return false, err
	}
	m.setEnvelope(value)
	err = c.snap.Iterate(store.AppendStatePrefix(nil, id), nil, false, func(key, value []byte) bool {
		if _, index, ok := store.ParseStateKey(key); ok {
			m.addState(index, bytes.Clone(value))
		}
		return true
	})
	if err != nil {
		return false, err
	}
	quiet := c.quiet
	c.quiet = true
	err = c.judge(m)
	c.quiet = quiet
	return true, err
}

// judge checks a message by itself and says which keys it asks for.
func (c *checker) judge(m *messageRecords) error {
	if !m.exists {
		return c.judgeOrphans(m)
	}
	if m.env == nil {
		if !c.quiet {
			c.count.InDoubt += int64(len(m.journal))
		}
		const detail = "its envelope is unreadable"
		if c.report(about(EnvelopeDamaged, m.id, detail)) {
			return c.quarantine(EnvelopeDamaged, detail)
		}
		return nil
	}
	if err := c.judgeStates(m); err != nil {
		return err
	}
	for i := range m.env.Recipients {
		switch s := m.state(i); {
		case s.State.Final():
			continue
		case s.State == relay.StateWaiting:
			c.expectWaiting(m, i, store.Milliseconds(s.Next))
		default:
			c.expectHeld(m, i, &s)
		}
		m.open++
	}
	if !c.quiet {
		c.count.Messages++
		c.count.Recipients += int64(m.open)
		c.key = store.AppendDeadlineKey(c.key[:0], store.Milliseconds(m.env.ExpiresAt), m.id)
		c.deadWant.add(c.seed, c.key)
	}
	if m.open == 0 {
		note := about(MessageDone, m.id, "its recipients are all final; its deadline removes it")
		note.Note = true
		if c.report(note) {
			c.removeMessage(m)
		}
		return c.settle()
	}
	kind, detail, err := c.body(m.env.Body, m.id, store.AppendMessageKey(nil, m.id))
	if err != nil {
		return err
	}
	switch {
	case kind == "" || !c.report(about(kind, m.id, detail)):
	case kind == BodyHeader:
		c.fixes++
		if err := c.st.RepairHeader(m.env.Body, m.id); err != nil {
			return err
		}
	default:
		return c.quarantine(kind, detail)
	}
	return c.judgeJournal(m)
}

func (c *checker) judgeOrphans(m *messageRecords) error {
	for i := range m.states {
		if c.report(aboutRecipient(StateWithoutMessage, m.id, m.states[i].index, "its message does not exist")) {
			c.lose(m.id)
			c.remove(store.AppendStateKey(nil, m.id, m.states[i].index))
		}
	}
	for i := range m.journal {
		if c.report(aboutRecipient(JournalWithoutMessage, m.id, m.journal[i].index, "an attempt is journalled whose message does not exist")) {
			c.remove(store.AppendAttemptKey(nil, m.id, m.journal[i].index))
		}
	}
	return c.settle()
}

// judgeStates checks the states' records, and finds a place for recipients
// whose state is unreadable: what is in a work queue waited, anything else is
// held for a person to decide, so nobody gets a mail twice and none is lost.
func (c *checker) judgeStates(m *messageRecords) error {
	for i := range m.states {
		s := &m.states[i]
		if int(s.index) >= len(m.env.Recipients) {
			if c.report(aboutRecipient(StateExtra, m.id, s.index, fmt.Sprintf("the message has only %d recipients", len(m.env.Recipients)))) {
				c.remove(store.AppendStateKey(nil, m.id, s.index))
			}
			continue
		}
		if s.err == nil {
			continue
		}
		due, waits, err := c.findWaiting(m, s.index)
		if err != nil {
			return err
		}
		state := relay.RecipientState{State: relay.StateHeld, LastReply: relay.Reply{Text: "the record of its state was damaged"}}
		what := "it is held: it may have been delivered"
		if waits {
			state.State, state.Next, what = relay.StateWaiting, time.UnixMilli(due), "it waits, as its work queue says"
		} else if state.Held, err = c.findHolder(m.id, s.index); err != nil {
			return err
		} else if state.Held != nil {
			what = "it is held, as the index of its rule says"
		}
		m.known[s.index] = state
		if c.report(aboutRecipient(StateDamaged, m.id, s.index, "its state is unreadable; "+what)) {
			c.set(store.AppendStateKey(nil, m.id, s.index), appendState(nil, &state))
			if state.State == relay.StateHeld && state.Held == nil {
				c.set(store.AppendHeldKey(nil, ids.Hold{}, m.id, s.index), nil)
			}
		}
	}
	return nil
}

// findWaiting looks for a recipient in its work queue.
func (c *checker) findWaiting(m *messageRecords, index uint16) (due int64, found bool, err error) {
	n, ok := c.byKey[keyOf(m.env, int(index))]
	if !ok {
		return 0, false, nil
	}
	err = c.snap.Iterate(store.AppendWaitingPrefix(nil, uint32(n)), nil, true, func(key, _ []byte) bool {
		_, at, id, i, ok := store.ParseWaitingKey(key)
		if found = ok && id == m.id && i == index; found {
			due = at
		}
		return !found
	})
	return due, found, err
}

// expectWaiting notes the waiting key that a recipient's state asks for.
func (c *checker) expectWaiting(m *messageRecords, i int, due int64) {
	k := keyOf(m.env, i)
	n, ok := c.byKey[k]
	if !ok {
		c.highest++
		n = c.highest
		c.byKey[k] = n
		c.queues[n] = &queueTally{key: k}
	}
	m.waits = append(m.waits, waitingPlace{queue: n, due: due, index: uint16(i)})
	if c.quiet {
		return
	}
	c.key = store.AppendWaitingKey(c.key[:0], uint32(n), due, m.id, uint16(i))
	c.queues[n].want.add(c.seed, c.key)
}

// removeMessage removes a message that nobody waits for.
func (c *checker) removeMessage(m *messageRecords) {
	c.remove(store.AppendMessageKey(nil, m.id))
	c.remove(store.AppendDeadlineKey(nil, store.Milliseconds(m.env.ExpiresAt), m.id))
	for i := range m.states {
		c.remove(store.AppendStateKey(nil, m.id, m.states[i].index))
	}
	for i := range m.journal {
		c.remove(store.AppendAttemptKey(nil, m.id, m.journal[i].index))
	}
	c.batch.DropBody(m.env.Body)
}

// judgeJournal checks the journalled attempts. Of an unreadable one only the
// first recipient is known, and that all were due and of one work queue; so all
// of those are in doubt whom no other attempt names.
func (c *checker) judgeJournal(m *messageRecords) error {
	if c.quiet || len(m.journal) == 0 {
		return nil
	}
	named := make(map[uint16]bool)
	for i := range m.journal {
		c.count.InDoubt++
		if a := &m.journal[i]; c.journalFault(m, a) == "" {
			for _, index := range a.entry.indexes {
				named[index] = true
			}
		}
	}
	for i := len(m.journal) - 1; i >= 0; i-- { // what follows the last one's first recipient is most likely its own
		a := &m.journal[i]
		detail := c.journalFault(m, a)
		if detail == "" || !c.report(aboutRecipient(JournalDamaged, m.id, a.index, detail)) {
			continue
		}
		key := store.AppendAttemptKey(nil, m.id, a.index)
		n, work := c.dueWith(m, a.index, named)
		if len(work) == 0 {
			c.remove(key)
			continue
		}
		attempt := relay.Attempt{StartedAt: c.cfg.Now()}
		if a.err == nil {
			attempt = a.entry.attempt
		}
		c.set(key, appendAttempt(nil, n, work, &attempt))
	}
	return c.settle()
}

// journalFault says what is wrong with a journalled attempt.
func (c *checker) journalFault(m *messageRecords, a *storedAttempt) string {
	switch {
	case a.err != nil:
		return "the journalled attempt is unreadable: whoever may be meant is in doubt"
	case int(a.index) >= len(m.env.Recipients):
		return "the journalled attempt is of a recipient that the message does not have"
	case slices.ContainsFunc(a.entry.indexes, func(n uint16) bool {
		return int(n) >= len(m.env.Recipients) || c.byKey[keyOf(m.env, int(n))] != a.entry.queue
	}):
		return "the journalled attempt names recipients of another work queue"
	}
	return ""
}

// dueWith returns the recipients from first on that wait in the same work
// queue, are due and are not named yet, and names them.
func (c *checker) dueWith(m *messageRecords, first uint16, named map[uint16]bool) (n Number, out []WorkRecipient) {
	if int(first) >= len(m.env.Recipients) {
		return 0, nil
	}
	n, now := c.byKey[keyOf(m.env, int(first))], store.Milliseconds(c.cfg.Now())
	for _, w := range m.waits {
		if w.queue == n && w.index >= first && w.due <= now && !named[w.index] {
			named[w.index] = true
			out = append(out, WorkRecipient{Index: w.index})
		}
	}
	return n, out
}
