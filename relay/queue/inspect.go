package queue

import (
	"slices"
	"time"

	"github.com/relais-mta/relais/relay"
	"github.com/relais-mta/relais/relay/store"
	"github.com/relais-mta/relais/shared/fault"
	"github.com/relais-mta/relais/shared/ids"
)

// QueueInfo describes one work queue.
type QueueInfo struct {
	Number   Number
	Key      Key
	Waiting  int64     // recipients with a next time, those in flight included; without those from before the start until they are counted
	InMemory int       // recipients in the window
	InFlight int       // recipients owned by callers
	More     bool      // others wait on disk
	Next     time.Time // earliest due time known; zero: nothing waits, or its head is not read yet
}

// Queues calls f for every work queue until it returns false. f may call the
// queue's methods.
func (q *Queue) Queues(f func(QueueInfo) bool) {
	q.mu.Lock()
	infos := make([]QueueInfo, 0, len(q.byNumber))
	for _, wq := range q.byNumber {
		info := QueueInfo{Number: wq.number, Key: wq.key, Waiting: wq.waits, InMemory: wq.win.len(), InFlight: wq.inFlight, More: !wq.complete}
		if wq.win.len() > 0 {
			info.Next = time.UnixMilli(wq.win.first().due)
		}
		infos = append(infos, info)
	}
	q.mu.Unlock()
	for _, info := range infos {
		if !f(info) {
			return
		}
	}
}

// Key returns what a number stands for.
func (q *Queue) Key(n Number) (Key, bool) {
	q.mu.Lock()
	defer q.mu.Unlock()
	wq := q.byNumber[n]
	if wq == nil {
		return Key{}, false
	}
	return wq.key, true
}

// Find returns the number of the work queue of one recipient. False: there is
// no such queue (any more).
func (q *Queue) Find(env *relay.Envelope, index int) (Number, bool) {
	q.mu.Lock()
	defer q.mu.Unlock()
	wq := q.byKey[keyOf(env, index)]
	if wq == nil {
		return 0, false
	}
	return wq.number, true
}

// Summary counts what the queue holds.
type Summary struct {
	Queues         int           // work queues that have work, or had until a moment ago
	Waiting        int64         // recipients with a next time, those in flight included
	Held           int64         // held recipients
	Counted        bool          // Waiting and Held include what was there at start
	InMemory       int64         // waiting recipients in memory
	InFlight       int64         // recipients owned by callers
	InboundBytes   int64         // inbound mail kept
	SetAside       int           // damaged messages that wait for a repair
	OldestOverdue  time.Duration // how long the most overdue message outlived its deadline
	Messages       int           // messages in memory
	QueuesOnDisk   int           // work queues with more on disk than in memory
	DeadlinesKnown int           // deadlines in memory
}

// Summary counts what the queue holds.
func (q *Queue) Summary() Summary {
	now := q.cfg.Now()
	q.mu.Lock()
	defer q.mu.Unlock()
	s := Summary{
		Queues: len(q.byNumber), Waiting: q.base + q.waiting, Counted: q.counted, InMemory: int64(q.inMemory),
		InFlight: int64(q.inFlight), InboundBytes: q.inbound, OldestOverdue: q.oldestOverdue(now),
		SetAside: q.damaged.asides(), Messages: len(q.live), DeadlinesKnown: q.deadlines.win.len(),
	}
	for _, n := range q.heldBy {
		s.Held += n
	}
	for _, wq := range q.byNumber {
		if !wq.complete {
			s.QueuesOnDisk++
		}
	}
	return s
}

// MessageInfo is a message with the state of each recipient.
type MessageInfo struct {
	Env      *relay.Envelope
	States   []relay.RecipientState // by index
	InFlight []uint16               // recipients that are being tried at the moment
	Damaged  string                 // why it is set aside until a repair; empty: it is not
}

// Show returns a message with the state of each recipient; a NotFound fault
// says that it is not, or not any more, in the queue.
func (q *Queue) Show(id ids.Message) (*MessageInfo, error) {
	read, err := q.readMessage(id, nil)
	if fault.Is(err, fault.Invalid) {
		q.unreadable(id, err)
		if aside := q.asideFault(id); aside != nil {
			err = aside
		}
		return q.showAside(id, err)
	}
	if err != nil {
		return nil, err
	}
	info := &MessageInfo{Env: read.env, States: make([]relay.RecipientState, len(read.env.Recipients))}
	for i := range info.States {
		s, ok := read.states[uint16(i)]
		if !ok {
			s = relay.RecipientState{State: relay.StateWaiting, Next: fromMS(uint64(read.firstDue))}
		}
		info.States[i] = s
	}
	q.mu.Lock()
	if m := q.live[id]; m != nil {
		info.InFlight = append(info.InFlight, m.aloft...)
	}
	q.mu.Unlock()
	return info, nil
}

// maxListed bounds one call of List, and maxLooked the messages it reads for it.
const (
	maxListed = 10_000
	maxLooked = 100_000
)

// List returns up to limit messages in the order of their ids. The last one's
// id, or next when that is not zero, continues the list: next is set when many
// messages were read and few matched.
func (q *Queue) List(f Filter, limit int) (found []MessageInfo, next ids.Message, err error) {
	limit = min(max(limit, 1), maxListed)
	var candidates []*target
	end := false
	snap := q.st.Snapshot()
	if f.Chosen != nil {
		var s step
		s, err = q.readChosen(snap, &f, f.After)
		candidates, next, end = s.targets, s.last, s.end
	} else {
		candidates, next, end, err = q.listStep(snap, &f, limit)
	}
	snap.Close()
	if err != nil {
		return nil, next, err
	}
	if end {
		next = ids.Message{}
	}
	for _, t := range candidates {
		info, err := q.Show(t.env.ID)
		if err != nil {
			continue // it ended while the list was made
		}
		if q.shows(&f, t, info) {
			found = append(found, *info)
		}
	}
	return found, next, nil
}

func (q *Queue) listStep(snap *store.Snapshot, f *Filter, limit int) (found []*target, next ids.Message, end bool, err error) {
	looked := 0
	end = true
	err = snap.Iterate([]byte{store.SpaceMessage}, store.AppendMessageKey(nil, nextID(f.After)), false, func(k, v []byte) bool {
		id, ok := store.ParseMessageKey(k)
		if !ok {
			return true
		}
		if len(found) == limit || looked == maxLooked {
			end = false
			return false
		}
		looked++
		next = id
		env, _, err := parseEnvelope(id, v)
		if err != nil {
			q.unreadable(id, err)
			return true
		}
		if f.message(env) && slices.ContainsFunc(env.Recipients, func(r relay.Recipient) bool { return f.Match.domain(r.Address.Domain) }) {
			found = append(found, &target{env: env})
		}
		return true
	})
	return found, next, end, err
}

// shows reports whether one recipient of a message matches by its state.
func (q *Queue) shows(f *Filter, t *target, info *MessageInfo) bool {
	for i := range info.States {
		if t.wants(uint16(i)) && f.state(&info.States[i], info.Env.Recipients[i].Address.Domain, q.provider) {
			return true
		}
	}
	return false
}
