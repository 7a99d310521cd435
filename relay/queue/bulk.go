package queue

import (
	"bytes"
	"context"
	"slices"
	"time"

	"github.com/relais-mta/relais/relay"
	"github.com/relais-mta/relais/relay/store"
	"github.com/relais-mta/relais/shared/fault"
	"github.com/relais-mta/relais/shared/ids"
)

// Bounds of one step of an action on many messages: what it reads into memory,
// and what one transaction changes.
const (
	maxStepMessages    = 4096
	maxStepRecipients  = 16_384
	maxBatchRecipients = 1024
	maxLockedMessages  = 64   // handled without letting go of the queue's lock
	maxEndBytes        = 3584 // that the end of one recipient writes: keys, state and event, with the longest reply and words
)

// workLimit is the most recipients that one piece of work may have so that one
// transaction of the store ends it.
func workLimit(st *store.Store) int {
	return int(min(st.Stats().MaxBatchBytes/maxEndBytes, maxBatchRecipients))
}

// target is a message that an action may concern.
type target struct {
	env      *relay.Envelope
	firstDue int64
	only     []uint16 // these recipients; nil: all

	msg     *message
	version uint64
	states  map[uint16]relay.RecipientState
	match   []uint16 // recipients that match, in order
	gone    bool
	damaged bool // a record of it cannot be read
}

// step is one part of the way through the messages.
type step struct {
	targets []*target
	looked  int         // recipients
	last    ids.Message // what was looked at up to here
	end     bool        // nothing is left
}

// settledSnapshot is a snapshot in which every message's books are kept: none is
// on its way between the disk and the windows. What was submitted before is in it.
func (q *Queue) settledSnapshot() (*store.Snapshot, error) {
	var snap *store.Snapshot
	err := q.st.Barrier(func() { snap = q.st.Snapshot() })
	return snap, err
}

// readySnapshot is a settledSnapshot that is not waited for: what is being
// written is not in it.
func (q *Queue) readySnapshot() (*store.Snapshot, error) {
	var snap *store.Snapshot
	err := q.st.Settled(func() { snap = q.st.Snapshot() })
	return snap, err
}

// flush waits for everything that was submitted before.
func (q *Queue) flush() error { return q.st.Barrier(func() {}) }

// readStep reads the next messages that match by what their recipients share.
func (q *Queue) readStep(f *Filter, after ids.Message) (s step, err error) {
	snap, err := q.readySnapshot()
	if err != nil {
		return s, err
	}
	defer snap.Close()
	if f.Chosen != nil {
		return q.readChosen(snap, f, after)
	}
	s.end = true
	err = snap.Iterate([]byte{store.SpaceMessage}, store.AppendMessageKey(nil, nextID(after)), false, func(k, v []byte) bool {
		id, ok := store.ParseMessageKey(k)
		if !ok {
			return true
		}
		if len(s.targets) >= q.stepMessages() || s.looked >= maxStepRecipients {
			s.end = false
			return false
		}
		s.last = id
		env, due, ok := q.envelope(id, v)
		if !ok {
			s.looked++
			return true
		}
		s.looked += len(env.Recipients)
		if f.message(env) {
			s.targets = append(s.targets, &target{env: env, firstDue: due})
		}
		return true
	})
	return s, err
}

func (q *Queue) stepMessages() int {
	if q.sizes.stepMessages > 0 {
		return q.sizes.stepMessages
	}
	return maxStepMessages
}

// readChosen reads the next messages that were named. One that is not in the
// queue is passed over.
func (q *Queue) readChosen(snap *store.Snapshot, f *Filter, after ids.Message) (s step, err error) {
	at, _ := slices.BinarySearchFunc(f.Chosen, nextID(after), func(c Chosen, id ids.Message) int { return slices.Compare(c.Message[:], id[:]) })
	for at < len(f.Chosen) && len(s.targets) < q.stepMessages() && s.looked < maxStepRecipients {
		id := f.Chosen[at].Message
		t := &target{only: []uint16{}}
		for ; at < len(f.Chosen) && f.Chosen[at].Message == id; at++ {
			if c := f.Chosen[at]; c.Index == AllRecipients {
				t.only = nil
			} else if t.only != nil {
				t.only = append(t.only, uint16(c.Index))
			}
		}
		s.last = id
		found, err := q.readTarget(snap, t, id)
		if err != nil {
			return s, err
		}
		if !found {
			continue
		}
		s.looked += len(t.env.Recipients)
		if f.message(t.env) {
			s.targets = append(s.targets, t)
		}
	}
	s.end = at == len(f.Chosen)
	return s, nil
}

// wants reports whether the action may concern a recipient.
func (t *target) wants(index uint16) bool { return t.only == nil || slices.Contains(t.only, index) }

// readTarget gets a target's envelope and reports whether the message is there and
// can be read.
func (q *Queue) readTarget(snap *store.Snapshot, t *target, id ids.Message) (bool, error) {
	value, err := snap.Get(store.AppendMessageKey(nil, id), nil)
	if fault.Is(err, fault.NotFound) {
		return false, nil
	}
	if err != nil {
		return false, err
	}
	var ok bool
	t.env, t.firstDue, ok = q.envelope(id, value)
	t.damaged = !ok
	return ok, nil
}

// seize takes those recipients of the targets that match by their states into
// the caller's hands, each message's works one behind the other. What is in
// other hands is counted and left alone.
func (q *Queue) seize(f *Filter, targets []*target) (works []*Work, inFlight int, err error) {
	q.mu.Lock()
	for _, t := range targets {
		t.msg = q.messageFor(t.env.ID)
	}
	q.mu.Unlock()
	left := targets
	for range maxRereads {
		if left, works, inFlight, err = q.seizeRound(f, left, works, inFlight); err != nil || len(left) == 0 {
			break
		}
	}
	for _, t := range left {
		inFlight += len(t.match) // it changes hands all the time
	}
	q.mu.Lock()
	for _, t := range targets {
		q.unref(t.msg, 1)
	}
	q.mu.Unlock()
	if err != nil {
		q.returnAll(works)
		return nil, 0, err
	}
	return works, inFlight, nil
}

// seizeRound reads the states and takes what did not change hands meanwhile.
func (q *Queue) seizeRound(f *Filter, targets []*target, works []*Work, inFlight int) (again []*target, _ []*Work, _ int, err error) {
	for group := range slices.Chunk(targets, maxLockedMessages) {
		q.mu.Lock()
		for _, t := range group {
			t.version = t.msg.version
		}
		q.mu.Unlock()
	}
	if err := q.readStates(f, targets); err != nil {
		return targets, works, inFlight, err
	}
	for group := range slices.Chunk(targets, maxLockedMessages) {
		q.mu.Lock()
		for _, t := range group {
			m := t.msg
			switch {
			case t.gone || t.damaged || m.gone || m.removing || len(t.match) == 0:
				continue
			case m.version != t.version:
				again = append(again, t)
				continue
			}
			q.learn(m, readMessage{env: t.env, firstDue: t.firstDue, states: t.states})
			for _, index := range t.match {
				if m.isAloft(index) {
					inFlight++
				}
			}
			works = append(works, q.takeOpen(m, readMessage{states: t.states}, func(index uint16, _ *relay.RecipientState) bool {
				_, found := slices.BinarySearch(t.match, index)
				return found
			})...)
		}
		q.mu.Unlock()
	}
	return again, works, inFlight, nil
}

// readStates reads the states of the targets' recipients and finds those that
// match. Call without the lock: the provider of a domain is asked for.
func (q *Queue) readStates(f *Filter, targets []*target) error {
	snap := q.st.Snapshot()
	defer snap.Close()
	for _, t := range targets {
		t.gone, t.damaged, t.states, t.match = true, false, nil, t.match[:0]
	}
	// Targets that were found one behind the other are read likewise, which is
	// several times faster than one by one.
	read := readEach
	if f.Chosen == nil && f.rule == nil {
		read = readRange
	}
	if err := read(snap, targets); err != nil {
		return err
	}
	for _, t := range targets {
		if t.damaged {
			q.unreadable(t.env.ID, errStateDamaged)
		}
		if t.gone || t.damaged {
			continue
		}
		for i := range t.env.Recipients {
			index := uint16(i)
			s, stored := t.states[index]
			if !stored {
				s = relay.RecipientState{State: relay.StateWaiting, Next: time.UnixMilli(t.firstDue)}
			}
			if t.wants(index) && f.state(&s, t.env.Recipients[i].Address.Domain, q.provider) {
				t.match = append(t.match, index)
			}
		}
	}
	return nil
}

// readEach finds out which targets exist, and their states, one by one.
func readEach(snap *store.Snapshot, targets []*target) error {
	var key, value []byte
	var err error
	for _, t := range targets {
		key = store.AppendMessageKey(key[:0], t.env.ID)
		if value, err = snap.Get(key, value[:0]); fault.Is(err, fault.NotFound) {
			continue
		} else if err != nil {
			return err
		}
		t.gone = false
		if err = t.readStates(snap); err != nil {
			return err
		}
	}
	return nil
}

func (t *target) readStates(snap *store.Snapshot) error {
	if len(t.env.Recipients) == 1 {
		value, err := snap.Get(store.AppendStateKey(nil, t.env.ID, 0), nil)
		if fault.Is(err, fault.NotFound) {
			return nil
		}
		if err == nil {
			t.setState(0, value)
		}
		return err
	}
	return snap.Iterate(store.AppendStatePrefix(nil, t.env.ID), nil, false, func(k, v []byte) bool {
		if _, index, ok := store.ParseStateKey(k); ok {
			t.setState(index, v)
		}
		return true
	})
}

var errStateDamaged = fault.New(fault.Invalid, "queue.readStates", "the state of a recipient is damaged")

func (t *target) setState(index uint16, value []byte) {
	if int(index) >= len(t.env.Recipients) {
		return
	}
	s, err := parseState(value)
	if err != nil {
		t.damaged = true
		return
	}
	if t.states == nil {
		t.states = make(map[uint16]relay.RecipientState, 1)
	}
	t.states[index] = s
}

// readRange is readEach for targets in the order of their ids between which
// there is little else.
func readRange(snap *store.Snapshot, targets []*target) error {
	if len(targets) == 0 {
		return nil
	}
	first := targets[0].env.ID
	at := 0
	// find moves on to the target of an id; more is false behind the last.
	find := func(id ids.Message) (t *target, more bool) {
		for at < len(targets) && bytes.Compare(targets[at].env.ID[:], id[:]) < 0 {
			at++
		}
		if at < len(targets) && targets[at].env.ID == id {
			return targets[at], true
		}
		return nil, at < len(targets)
	}
	err := snap.Iterate([]byte{store.SpaceMessage}, store.AppendMessageKey(nil, first), true, func(k, _ []byte) bool {
		id, ok := store.ParseMessageKey(k)
		if !ok {
			return true
		}
		t, more := find(id)
		if t != nil {
			t.gone = false
		}
		return more
	})
	if err != nil {
		return err
	}
	at = 0
	return snap.Iterate([]byte{store.SpaceState}, store.AppendStatePrefix(nil, first), false, func(k, v []byte) bool {
		id, index, ok := store.ParseStateKey(k)
		if !ok {
			return true
		}
		t, more := find(id)
		if t != nil {
			t.setState(index, v)
		}
		return more
	})
}

func (q *Queue) returnAll(works []*Work) {
	for _, w := range works {
		q.Return(w)
	}
}

// endAll records results for many works, many in one transaction, and returns
// when they are durable: how many recipients had a result, and what kept the
// others from it; those are the queue's again.
func (q *Queue) endAll(ctx context.Context, works []*Work, results func(*Work) []Result) (done int, err error) {
	type batch struct {
		works []*Work
		ends  []*ending
		n     int
		err   chan error
	}
	var batches []*batch
	var last *batch
	for _, w := range works {
		r := results(w)
		if len(r) == 0 {
			q.Return(w)
			continue
		}
		if last == nil || last.n+len(r) > maxBatchRecipients {
			last = &batch{err: make(chan error, 1)}
			batches = append(batches, last)
		}
		last.works, last.ends, last.n = append(last.works, w), append(last.ends, &ending{w: w, results: r}), last.n+len(r)
	}
	for _, b := range batches {
		q.commitEndings(ctx, b.ends, func(err error) { b.err <- err })
	}
	for _, b := range batches {
		failed := <-b.err
		if failed == nil {
			done += b.n
			continue
		}
		if fault.Is(failed, fault.TooLarge) && len(b.works) > 1 {
			half := len(b.works) / 2
			for _, part := range [][]*Work{b.works[:half], b.works[half:]} {
				n, failed := q.endAll(ctx, part, results)
				if done += n; failed != nil {
					err = failed
				}
			}
			continue
		}
		err = failed
		q.returnAll(b.works)
	}
	return done, err
}

// commitEndings is Finish for several works in one transaction, those of one
// message side by side, without attempts and without mail that follows. done runs
// on the commit goroutine.
func (q *Queue) commitEndings(ctx context.Context, ends []*ending, done func(error)) {
	q.commitEndingsWith(ctx, ends, nil, done)
}

// commitEndingsWith is commitEndings with more in the same transaction, which
// also writes; nil: nothing.
func (q *Queue) commitEndingsWith(ctx context.Context, ends []*ending, also func(*store.Batch), done func(error)) {
	for _, end := range ends {
		if err := q.checkResults(end); err != nil {
			done(err)
			return
		}
	}
	b := q.st.NewBatch()
	if also != nil {
		also(b)
	}
	sc := scratchPool.Get().(*scratch)
	for _, end := range ends {
		q.writeEvents(b, end, nil, sc)
	}
	q.mu.Lock()
	if err := q.begin(); err != nil {
		q.mu.Unlock()
		scratchPool.Put(sc)
		b.Abandon()
		done(err)
		return
	}
	for at, messages := 0, 0; at < len(ends); {
		next := at + 1
		for next < len(ends) && ends[next].w.msg == ends[at].w.msg {
			next++
		}
		q.writeEndings(b, ends[at:next], sc)
		at = next
		if messages++; messages%maxLockedMessages == 0 {
			q.mu.Unlock() // for those who deliver meanwhile
			q.mu.Lock()
		}
	}
	q.mu.Unlock()
	scratchPool.Put(sc)
	q.st.Submit(ctx, b, func(err error) {
		for _, end := range ends {
			q.finished(end, err)
		}
		q.pending.Done()
		done(err)
	})
}
