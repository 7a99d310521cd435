package queue

import (
	"encoding/hex"
	"fmt"

	"github.com/relais-mta/relais/relay"
	"github.com/relais-mta/relais/relay/store"
	"github.com/relais-mta/relais/shared/fault"
	"github.com/relais-mta/relais/shared/ids"
)

// each calls f for every record of a space.
func (c *checker) each(space byte, keysOnly bool, f func(key, value []byte) error) error {
	var inner error
	err := c.snap.Iterate([]byte{space}, nil, keysOnly, func(key, value []byte) bool {
		if inner = c.step(); inner == nil {
			inner = f(key, value)
		}
		return inner == nil
	})
	if err == nil {
		err = inner
	}
	return err
}

// stray is a record that nothing can be made of.
func (c *checker) stray(key, value []byte, detail string) error {
	if c.report(Finding{Kind: UnknownKey, Key: hex.EncodeToString(key), Detail: detail}) {
		return c.asideRecord(UnknownKey, append([]byte(nil), key...), append([]byte(nil), value...), detail)
	}
	return nil
}

// strays looks at the keys that no part of this release writes, and at the
// store's own records.
func (c *checker) strays() error {
	var inner error
	err := c.snap.Strays(func(key, value []byte) bool {
		if inner = c.step(); inner == nil {
			inner = c.stray(key, value, "no part of this release writes such a record; it may be of a newer one")
		}
		return inner == nil
	})
	if err == nil {
		err = inner
	}
	if err != nil {
		return err
	}
	value, err := c.snap.Get(store.KeyDeadlines, nil)
	if err == nil && len(value) != floorBytes {
		if c.report(Finding{Kind: FloorDamaged, Detail: "the floor of the deadlines is unreadable: every start reads them from the beginning"}) {
			c.remove(store.KeyDeadlines)
		}
	}
	if fault.Is(err, fault.NotFound) {
		err = nil
	}
	return err
}

// floorBytes is the length of the deadline index's own record.
const floorBytes = 8

// workQueues reads the table of work queues.
func (c *checker) workQueues() error {
	return c.each(store.SpaceQueue, false, func(key, value []byte) error {
		n, ok := store.ParseQueueKey(key)
		if !ok {
			return c.stray(key, value, "the key of a work queue's record has another length")
		}
		c.highest = max(c.highest, Number(n))
		k, floor, err := parseQueue(value)
		if err != nil {
			detail := "the record of the work queue is unreadable"
			if c.report(Finding{Kind: QueueDamaged, Queue: Number(n), Detail: detail}) {
				return c.asideRecord(QueueDamaged, append([]byte(nil), key...), append([]byte(nil), value...), detail)
			}
			return nil
		}
		c.count.Queues++
		c.queues[Number(n)] = &queueTally{key: k, floor: floor, stored: true}
		c.byKey[k] = Number(n) // of two records with one key the relay goes by the later
		return nil
	})
}

// waitingKeys sums up the waiting keys by work queue.
func (c *checker) waitingKeys() error {
	var q *queueTally
	at := Number(0)
	return c.each(store.SpaceWaiting, true, func(key, _ []byte) error {
		number, due, id, index, ok := store.ParseWaitingKey(key)
		if !ok {
			return c.stray(key, nil, "a waiting key has another length")
		}
		if n := Number(number); q == nil || n != at {
			at = n
			if q = c.queues[n]; q == nil {
				c.highest = max(c.highest, n)
				var err error
				if q, err = c.adopt(n, due, id, index); err != nil {
					return err
				}
			}
			q.first = due
			if due < q.floor && c.report(Finding{Kind: FloorHigh, Queue: n, Detail: fmt.Sprintf("mail is due %d ms before the queue's floor: a start would not see it", q.floor-due)}) {
				c.putQueue(n, q, floorBefore(due))
			}
		}
		q.found.add(c.seed, key)
		c.count.Waiting++
		return nil
	})
}

// adopt finds out what a work queue without a record stands for: what its mail
// says, if no other queue stands for that.
func (c *checker) adopt(n Number, due int64, id ids.Message, index uint16) (*queueTally, error) {
	q := &queueTally{}
	c.queues[n] = q
	value, err := c.snap.Get(store.AppendMessageKey(nil, id), nil)
	if fault.Is(err, fault.NotFound) {
		return q, nil
	}
	if err != nil {
		return nil, err
	}
	env, _, err := parseEnvelope(id, value)
	if err != nil || int(index) >= len(env.Recipients) {
		return q, nil // it is reported with its message
	}
	k := keyOf(env, int(index))
	if _, taken := c.byKey[k]; taken {
		return q, nil
	}
	q.key = k
	c.byKey[k] = n
	if c.report(Finding{Kind: QueueMissing, Queue: n, Detail: "the work queue for " + string(k.Domain) + " has no record: a start would not see its mail"}) {
		c.putQueue(n, q, floorBefore(due))
	}
	return q, nil
}

// deadlineKeys sums up the deadlines.
func (c *checker) deadlineKeys() error {
	floor := int64(0)
	if value, err := c.snap.Get(store.KeyDeadlines, nil); err == nil {
		floor = parseFloor(value)
	}
	return c.each(store.SpaceDeadline, true, func(key, _ []byte) error {
		due, _, ok := store.ParseDeadlineKey(key)
		if !ok {
			return c.stray(key, nil, "a deadline's key has another length")
		}
		if c.deadFound.n == 0 && due < floor && c.report(Finding{Kind: FloorHigh, Detail: fmt.Sprintf("a deadline is %d ms before the floor of the deadlines: a start would not see it", floor-due)}) {
			c.set(store.KeyDeadlines, appendFloor(nil, floorBefore(due)))
		}
		c.deadFound.add(c.seed, key)
		return nil
	})
}

// suspects compares the sums, and looks one by one where they differ.
func (c *checker) suspects() error {
	suspect := c.deadFound != c.deadWant || c.heldFound != c.heldWant
	for _, q := range c.queues {
		if q.suspect = q.found != q.want; q.suspect {
			suspect = true
		}
	}
	if !suspect {
		return nil
	}
	if err := c.missingKeys(); err != nil {
		return err
	}
	for n, q := range c.queues {
		if q.suspect {
			if err := c.extraWaiting(n); err != nil {
				return err
			}
		}
	}
	if c.heldFound != c.heldWant {
		if err := c.extraHeld(); err != nil {
			return err
		}
	}
	if c.deadFound != c.deadWant {
		return c.extraDeadlines()
	}
	return nil
}

// missingKeys looks for the keys that messages ask for.
func (c *checker) missingKeys() error {
	c.quiet = true
	defer func() { c.quiet = false }()
	return c.messages(func(m *messageRecords) error {
		if err := c.judge(m); err != nil || m.env == nil {
			return err
		}
		for _, w := range m.waits {
			if q := c.queues[w.queue]; q == nil || !q.suspect {
				continue
			}
			c.key = store.AppendWaitingKey(c.key[:0], uint32(w.queue), w.due, m.id, w.index)
			if err := c.missing(c.key, func() {
				if c.report(aboutRecipient(WaitingMissing, m.id, w.index, "it waits and is in no work queue: it would only expire")) {
					c.wait(w, m.id)
				}
			}); err != nil {
				return err
			}
		}
		if err := c.missingHeld(m); err != nil {
			return err
		}
		if c.deadFound == c.deadWant {
			return c.settle()
		}
		due := store.Milliseconds(m.env.ExpiresAt)
		c.key = store.AppendDeadlineKey(c.key[:0], due, m.id)
		err := c.missing(c.key, func() {
			if c.report(about(DeadlineMissing, m.id, "it would never expire")) {
				c.set(store.AppendDeadlineKey(nil, due, m.id), nil)
				c.lowerDeadlineFloor(due)
			}
		})
		if err != nil {
			return err
		}
		return c.settle()
	})
}

// missing calls f, with findings reported, if a key does not exist.
func (c *checker) missing(key []byte, f func()) error {
	_, err := c.snap.Get(key, c.val[:0])
	if fault.Is(err, fault.NotFound) {
		c.quiet = false
		f()
		c.quiet = true
		return nil
	}
	return err
}

// wait writes a recipient's waiting key, and makes sure that a start sees it.
func (c *checker) wait(w waitingPlace, id ids.Message) {
	q := c.queues[w.queue]
	if !q.stored || w.due < q.floor {
		c.putQueue(w.queue, q, floorBefore(w.due))
	}
	c.set(store.AppendWaitingKey(nil, uint32(w.queue), w.due, id, w.index), nil)
}

func (c *checker) lowerDeadlineFloor(due int64) {
	if value, err := c.snap.Get(store.KeyDeadlines, nil); err == nil && due < parseFloor(value) {
		c.remove(store.KeyDeadlines) // reading from the start is always right
	}
}

// extraWaiting looks for waiting keys of a work queue that no message asks for.
func (c *checker) extraWaiting(n Number) error {
	return c.pieces(store.AppendWaitingPrefix(nil, uint32(n)), func(key []byte) error { return c.judgeWaiting(n, key) })
}

// judgeWaiting reports a waiting key that its message does not ask for.
func (c *checker) judgeWaiting(n Number, key []byte) error {
	_, due, id, index, ok := store.ParseWaitingKey(key)
	if !ok {
		return nil // reported as a stray
	}
	found, err := c.load(id)
	if err != nil {
		return err
	}
	m := &c.rec
	switch {
	case !found:
		if _, moved := c.moved[id]; !moved {
			c.lose(id)
		}
		if c.report(aboutRecipient(WaitingWithoutMessage, id, index, "its message does not exist")) {
			c.remove(key)
		}
	case m.env == nil: // reported with its message; what is left of it goes when that is moved aside
	default:
		for _, w := range m.waits {
			if w.queue == n && w.due == due && w.index == index {
				return nil
			}
		}
		if c.report(aboutRecipient(WaitingExtra, id, index, "its state does not ask for this place in work queue "+fmt.Sprint(n))) {
			c.remove(key)
		}
	}
	return c.settle()
}

// extraDeadlines looks for deadlines that no message asks for.
func (c *checker) extraDeadlines() error {
	return c.each(store.SpaceDeadline, true, func(key, _ []byte) error {
		due, id, ok := store.ParseDeadlineKey(key)
		if !ok {
			return nil
		}
		value, err := c.snap.Get(store.AppendMessageKey(nil, id), c.val[:0])
		c.val = value
		wrong := fault.Is(err, fault.NotFound)
		if err != nil && !wrong {
			return err
		}
		if !wrong {
			env, _, err := parseEnvelope(id, value)
			wrong = err == nil && store.Milliseconds(env.ExpiresAt) != due
		}
		if wrong && c.report(about(DeadlineExtra, id, "no message asks for this deadline")) {
			c.remove(key)
		}
		return c.settle()
	})
}

// inboundMail looks at the mail to our return paths.
func (c *checker) inboundMail() error {
	return c.each(store.SpaceInbound, false, func(key, value []byte) error {
		id, ok := store.ParseMessageKey(key)
		if !ok {
			return c.stray(key, value, "the key of an inbound mail has another length")
		}
		c.count.Inbound++
		in, err := parseInbound(id, value)
		kind, detail := InboundDamaged, "the inbound mail is unreadable"
		if err == nil {
			if kind, detail, err = c.body(in.Body, id, key); err != nil || kind == "" {
				return err
			}
		}
		if !c.report(about(kind, id, detail)) {
			return nil
		}
		if kind == BodyHeader {
			c.fixes++
			return c.st.RepairHeader(in.Body, id)
		}
		c.lose(id)
		return c.asideRecord(kind, append([]byte(nil), key...), append([]byte(nil), value...), detail)
	})
}

// body checks the body of the record with a key. No kind: it is as it should be.
func (c *checker) body(ref relay.BodyRef, id ids.Message, key []byte) (kind Damage, detail string, err error) {
	if c.quiet {
		return "", "", nil
	}
	if c.cfg.Bodies {
		if err := c.interrupted(); err != nil { // they may be large
			return "", "", err
		}
	}
	err = c.st.CheckRef(ref)
	switch {
	case fault.Is(err, fault.NotFound):
		kind = BodyMissing
	case err != nil:
		kind = BodyRange
	default:
		if ref.Kind != relay.BodyNone {
			c.files[ref.Segment]++
			c.count.BodyBytes += ref.Length
		}
		if !c.cfg.Bodies || !c.first {
			return "", "", nil
		}
		var header bool
		if header, err = c.st.CheckBody(ref, id); err == nil && header {
			return "", "", nil
		}
		switch {
		case err == nil:
			kind, err = BodyHeader, fault.New(fault.Invalid, "queue.Fsck", "the header in front of the body is damaged")
		case fault.Is(err, fault.NotFound):
			kind = BodyMissing
		case fault.Is(err, fault.Internal):
			kind = BodyDamaged
		default:
			return "", "", err // the disk does not answer: nothing is known
		}
	}
	if c.cfg.Live {
		// It may have ended while the check went on.
		if _, gone := c.st.Get(key, nil); fault.Is(gone, fault.NotFound) {
			return "", "", nil
		}
	}
	return kind, fault.Public(err), nil
}

// bodyFiles looks for files that nothing refers to.
func (c *checker) bodyFiles() error {
	if c.cfg.Live {
		return nil // the store looks after them
	}
	for _, f := range c.st.BodyFiles() {
		c.count.BodyFiles++
		if c.files[f.Number] > 0 {
			continue
		}
		note := Finding{Kind: FileUnreferenced, Note: true, File: fmt.Sprintf("%016x", f.Number), Detail: fmt.Sprintf("%d bytes that no record refers to; a start removes them", f.Bytes)}
		if c.report(note) {
			c.fixes++
			if err := c.st.RemoveBodyFile(f); err != nil {
				return err
			}
		}
	}
	return nil
}
