package queue

import (
	"time"

	"github.com/relais-mta/relais/relay"
)

// Mail that was not tried yet waits with its envelope in memory, so that it is
// delivered without a read, when there is room. Room is bounded in bytes, and
// mail that has waited in vain gives way to new mail, sooner than there is need
// for room: what its host does not take need not be at hand, and each collection of
// garbage would look at the half dozen objects of every such message.
const (
	freshBytesPerRecipient = 256 // of policy's bound on recipients in memory
	freshPatience          = 30 * time.Second
	freshBytes             = 1024 // about what a message takes, with its recipient in a window
	furtherBytes           = 192  // and each further recipient
	wayFor                 = 4    // times its own bytes that a new message has given up
)

// freshList is the messages that wait with their envelopes, longest first.
type freshList struct {
	first, last *message
	bytes       int64
}

func (l *freshList) add(m *message, nowMS int64) {
	if m.freshBytes != 0 {
		return
	}
	m.freshAt, m.freshBytes = nowMS, envelopeBytes(m.env)
	l.bytes += m.freshBytes
	m.older, m.newer = l.last, nil
	if l.last != nil {
		l.last.newer = m
	} else {
		l.first = m
	}
	l.last = m
}

func (l *freshList) remove(m *message) {
	if m.freshBytes == 0 {
		return
	}
	l.bytes -= m.freshBytes
	if m.older != nil {
		m.older.newer = m.newer
	} else {
		l.first = m.newer
	}
	if m.newer != nil {
		m.newer.older = m.older
	} else {
		l.last = m.older
	}
	m.older, m.newer, m.freshBytes = nil, nil, 0
}

func envelopeBytes(env *relay.Envelope) int64 {
	return freshBytes + furtherBytes*int64(len(env.Recipients)-1)
}

// roomFor reports whether a message that is due then may wait with its
// envelope in memory. Call with the lock held.
func (q *Queue) roomFor(env *relay.Envelope, dueMS, nowMS int64) bool {
	if dueMS > nowMS+freshPatience.Milliseconds() {
		return false
	}
	limit := int64(q.memoryLimit()) * freshBytesPerRecipient
	for q.fresh.bytes+envelopeBytes(env) > limit {
		oldest := q.fresh.first
		if oldest == nil || nowMS-oldest.freshAt < freshPatience.Milliseconds() {
			return false
		}
		q.strip(oldest)
	}
	return true
}

// giveWay lets mail that has waited in vain wait without its envelopes: as much as
// a few of the message that just came, so that nobody pays for many. Call with the
// lock held.
func (q *Queue) giveWay(env *relay.Envelope, nowMS int64) {
	for left := wayFor * envelopeBytes(env); left > 0; {
		oldest := q.fresh.first
		if oldest == nil || nowMS-oldest.freshAt < freshPatience.Milliseconds() {
			return
		}
		left -= oldest.freshBytes
		q.strip(oldest)
	}
}

// strip lets a message's recipients wait without its envelope. Call with the
// lock held.
func (q *Queue) strip(m *message) {
	q.fresh.remove(m)
	stripped := 0
	var wq *workQueue
	for i := range m.env.Recipients {
		if i == 0 || m.env.Recipients[i].Address.Domain != m.env.Recipients[i-1].Address.Domain {
			wq = q.byKey[keyOf(m.env, i)]
		}
		if wq == nil {
			continue
		}
		if it := wq.win.find(pos{m.firstDue, m.id, uint16(i)}); it != nil && it.msg != nil {
			it.msg = nil
			stripped++
		}
	}
	q.unref(m, stripped)
}
