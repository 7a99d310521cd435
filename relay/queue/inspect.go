package queue

import (
	"time"

	"github.com/relais-mta/relais/relay"
	"github.com/relais-mta/relais/relay/store"
	"github.com/relais-mta/relais/shared/ids"
	"github.com/relais-mta/relais/shared/mailaddr"
)

// QueueInfo describes one work queue.
type QueueInfo struct {
	Number   Number
	Key      Key
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
		info := QueueInfo{Number: wq.number, Key: wq.key, InMemory: wq.win.len(), InFlight: wq.inFlight, More: !wq.complete}
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

// Summary counts what the queue holds.
type Summary struct {
	Queues         int           // work queues that have work, or had until a moment ago
	Waiting        int64         // recipients with a next time, those in flight included
	Counted        bool          // Waiting includes what waited at start
	InMemory       int64         // waiting recipients in memory
	InFlight       int64         // recipients owned by callers
	InboundBytes   int64         // inbound mail kept
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
		Messages: len(q.live), DeadlinesKnown: q.deadlines.win.len(),
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
}

// Show returns a message with the state of each recipient; a NotFound fault
// says that it is not, or not any more, in the queue.
func (q *Queue) Show(id ids.Message) (*MessageInfo, error) {
	read, err := q.readMessage(id, nil)
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

// Filter selects messages; zero fields match all. A message matches when one
// of its recipients does.
type Filter struct {
	Tenant ids.Tenant
	Stream string
	Pool   ids.Pool
	Domain mailaddr.Domain
	State  relay.State
	After  ids.Message // continue behind this message
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
	var candidates []*relay.Envelope
	looked := 0
	snap := q.st.Snapshot()
	var inner error
	err = snap.Iterate([]byte{store.SpaceMessage}, store.AppendMessageKey(nil, nextID(f.After)), false, func(k, v []byte) bool {
		id, ok := store.ParseMessageKey(k)
		if !ok {
			return true
		}
		if len(candidates) == limit || looked == maxLooked {
			return false
		}
		looked++
		next = id
		var env *relay.Envelope
		if env, _, inner = parseEnvelope(id, v); inner != nil {
			return false
		}
		if f.matches(env) {
			candidates = append(candidates, env)
		}
		return true
	})
	snap.Close()
	if err == nil {
		err = inner
	}
	if err != nil {
		return nil, next, err
	}
	if looked < maxLooked && len(candidates) < limit {
		next = ids.Message{}
	}
	for _, env := range candidates {
		info, err := q.Show(env.ID)
		if err != nil {
			continue // it ended while the list was made
		}
		if f.State == 0 || f.matchesState(info) {
			found = append(found, *info)
		}
	}
	return found, next, nil
}

func (f *Filter) matches(env *relay.Envelope) bool {
	if !f.Tenant.IsZero() && f.Tenant != env.Tenant || f.Stream != "" && f.Stream != env.Stream || !f.Pool.IsZero() && f.Pool != env.Pool {
		return false
	}
	if f.Domain == "" {
		return true
	}
	for i := range env.Recipients {
		if env.Recipients[i].Address.Domain == f.Domain {
			return true
		}
	}
	return false
}

func (f *Filter) matchesState(info *MessageInfo) bool {
	for i := range info.States {
		if info.States[i].State == f.State && (f.Domain == "" || info.Env.Recipients[i].Address.Domain == f.Domain) {
			return true
		}
	}
	return false
}
