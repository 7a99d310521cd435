package queue

import (
	"fmt"
	"maps"
	"slices"
	"strings"
	"sync"
	"sync/atomic"

	"github.com/relais-mta/relais/relay"
	"github.com/relais-mta/relais/relay/store"
	"github.com/relais-mta/relais/shared/fault"
	"github.com/relais-mta/relais/shared/ids"
)

// Bounds of what is remembered of damage.
const (
	maxKnownDamaged  = 65_536 // messages that were found damaged while the queue runs
	maxDamagedLogged = 100    // damaged messages and records that the log names one by one
)

// damageBook is what the open queue knows of damaged records. A message in it is
// passed over by everything until a repair, which needs a queue at rest. One bad
// record must not stop the rest: nothing in here keeps other mail.
type damageBook struct {
	any atomic.Bool // there is something in it

	mu       sync.Mutex
	messages map[ids.Message]string // that are set aside, and why
	records  map[Damage]int         // others, which the queue does without
	logged   int
}

// setAside remembers that a message is passed over, and why. It reports whether
// that is new and is to be logged. always is for what only the memory of it keeps
// from being delivered.
func (d *damageBook) setAside(id ids.Message, why string, always bool) (tell bool) {
	d.mu.Lock()
	defer d.mu.Unlock()
	if _, known := d.messages[id]; known || !always && len(d.messages) >= maxKnownDamaged {
		return false
	}
	if d.messages == nil {
		d.messages = make(map[ids.Message]string)
	}
	d.messages[id] = why
	d.any.Store(true)
	return d.tell()
}

// count remembers a damaged record that is no message's envelope or state.
func (d *damageBook) count(kind Damage) (tell bool) {
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.records == nil {
		d.records = make(map[Damage]int)
	}
	d.records[kind]++
	d.any.Store(true)
	return d.tell()
}

// tell reports whether the log may name another one. Call with d.mu held.
func (d *damageBook) tell() bool {
	d.logged++
	return d.logged <= maxDamagedLogged
}

// why says why a message is set aside; empty: it is not.
func (d *damageBook) why(id ids.Message) string {
	if !d.any.Load() {
		return ""
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	return d.messages[id]
}

// asides counts the messages that are set aside.
func (d *damageBook) asides() int {
	if !d.any.Load() {
		return 0
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	return len(d.messages)
}

// others says which other records are damaged; empty: none.
func (d *damageBook) others() string {
	if !d.any.Load() {
		return ""
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	parts := make([]string, 0, len(d.records))
	for _, kind := range slices.Sorted(maps.Keys(d.records)) {
		parts = append(parts, fmt.Sprintf("%s %d", kind, d.records[kind]))
	}
	return strings.Join(parts, ", ")
}

const remedy = "stop the relay and run relais-relay queue fsck --repair"

// unreadable sets a message aside whose records are damaged: it is passed over
// until the repair, and nothing else waits for it. The log names it once.
func (q *Queue) unreadable(id ids.Message, err error) {
	if q.damaged.setAside(id, fault.Public(err), false) {
		q.log.Error("a message of the queue is damaged and is set aside: "+remedy, "message", id, "error", err)
	}
}

// keepAside is unreadable for a message that can be read and must not be
// delivered, because another record says whether it may be.
func (q *Queue) keepAside(id ids.Message, err error) {
	if q.damaged.setAside(id, fault.Public(err), true) {
		q.log.Error("a message of the queue is set aside, because a record about it is damaged: "+remedy, "message", id, "error", err)
	}
}

// badRecord counts a damaged record that the queue does without.
func (q *Queue) badRecord(kind Damage, detail string, args ...any) {
	if q.damaged.count(kind) {
		q.log.Error("a record of the queue is damaged: "+detail+"; "+remedy, append([]any{"kind", kind}, args...)...)
	}
}

// asideFault says that a message is set aside; nil: it is not.
func (q *Queue) asideFault(id ids.Message) error {
	why := q.damaged.why(id)
	if why == "" {
		return nil
	}
	return fault.New(fault.Invalid, "queue", "message %s is set aside until it is repaired: %s: %s", id, why, remedy)
}

// envelope reads a stored envelope of a message that may be worked on. One that is
// damaged is set aside.
func (q *Queue) envelope(id ids.Message, value []byte) (env *relay.Envelope, firstDue int64, ok bool) {
	if q.damaged.why(id) != "" {
		return nil, 0, false
	}
	env, firstDue, err := parseEnvelope(id, value)
	if err != nil {
		q.unreadable(id, err)
		return nil, 0, false
	}
	return env, firstDue, true
}

// showAside is Show for a message that is set aside: what can be read of it. Whoever
// a journalled attempt names stays in doubt: that attempt may have succeeded.
func (q *Queue) showAside(id ids.Message, cause error) (*MessageInfo, error) {
	snap := q.st.Snapshot()
	defer snap.Close()
	value, err := snap.Get(store.AppendMessageKey(nil, id), nil)
	if err != nil {
		return nil, err
	}
	env, firstDue, err := parseEnvelope(id, value)
	if err != nil {
		return nil, cause
	}
	info := &MessageInfo{Env: env, Damaged: fault.Public(cause), States: make([]relay.RecipientState, len(env.Recipients))}
	for i := range info.States {
		info.States[i] = relay.RecipientState{State: relay.StateWaiting, Next: fromMS(uint64(firstDue))}
	}
	err = snap.Iterate(store.AppendStatePrefix(nil, id), nil, false, func(k, v []byte) bool {
		_, index, ok := store.ParseStateKey(k)
		if s, err := parseState(v); ok && err == nil && int(index) < len(info.States) {
			info.States[index] = s
		}
		return true
	})
	if err != nil {
		return nil, err
	}
	return info, snap.Iterate(store.AppendAttemptPrefix(nil, id), nil, false, func(k, v []byte) bool {
		_, first, _ := store.ParseStateKey(k)
		j, err := parseAttempt(id, v)
		for i := range info.States {
			s := &info.States[i]
			named := slices.Contains(j.indexes, uint16(i)) || err != nil && i >= int(first)
			if named && s.State == relay.StateWaiting {
				s.InDoubt, s.LastClass = max(s.InDoubt, 1), classInDoubt
			}
		}
		return true
	})
}
