package queue

import (
	"encoding/binary"
	"sync"
	"time"

	"github.com/relais-mta/relais/relay"
	"github.com/relais-mta/relais/relay/store"
	"github.com/relais-mta/relais/shared/fault"
	"github.com/relais-mta/relais/shared/ids"
)

// MaxHops is how often a message may go from relay to relay.
const MaxHops = 16

// Bounds of what is remembered of messages that went to or came from one other
// relay, until that relay has heard of it.
const (
	maxOwed  = 65_536  // gone there, and it is not known yet that it forgot
	maxTaken = 131_072 // came from there, and it has not said yet that it knows
)

// takenMargin is how long after its deadline a message that came from another
// relay is remembered at most: by then nobody may hand it over again.
const takenMargin = 24 * time.Hour

// Transfer is one way of a message from one relay to another. The same message
// may go the same way again later; the hop tells the two apart.
type Transfer struct {
	Message ids.Message
	Hop     uint8
}

// transfers is the queue's memory of them. What it says is durable.
type transfers struct {
	mu      sync.Mutex
	resumed map[ids.Node][]*Parcel             // offered before the start, their end is not known
	owed    map[ids.Node]map[Transfer]struct{} // gone, the taker may forget them
	taken   map[ids.Node]int                   // came, their giver may still ask
	giving  map[ids.Message]ids.Node           // offered, by message
}

// The phases of a message on its way, as they are stored.
const (
	transferVersion = 1
	phaseOffered    = 1 // the other relay may have it
	phaseGone       = 2 // the other relay has it, nothing is left here
)

func appendGiven(b []byte, phase byte, since time.Time) []byte {
	return binary.BigEndian.AppendUint64(append(b, transferVersion, phase), uint64(store.Milliseconds(since)))
}

func parseGiven(v []byte) (phase byte, ok bool) {
	if len(v) < 10 || v[0] != transferVersion {
		return 0, false
	}
	return v[1], v[1] == phaseOffered || v[1] == phaseGone
}

func appendTaken(b []byte, expires time.Time) []byte {
	return binary.BigEndian.AppendUint64(append(b, transferVersion), uint64(store.Milliseconds(expires)))
}

func parseTaken(v []byte) (expiresMS int64, ok bool) {
	if len(v) < 9 || v[0] != transferVersion {
		return 0, false
	}
	return int64(binary.BigEndian.Uint64(v[1:])), true
}

// resumeTransfers finds what was on its way when the last run ended. It runs
// before anything is taken: what another relay may have stays in nobody's
// hands but those of Resumed.
func (q *Queue) resumeTransfers() error {
	t := &q.transfers
	t.resumed = make(map[ids.Node][]*Parcel)
	t.owed = make(map[ids.Node]map[Transfer]struct{})
	t.taken = make(map[ids.Node]int)
	t.giving = make(map[ids.Message]ids.Node)
	snap := q.st.Snapshot()
	defer snap.Close()
	err := snap.Iterate([]byte{store.SpaceGiven}, nil, false, func(k, v []byte) bool {
		peer, id, hop, ok := store.ParseTransferKey(k)
		if !ok {
			return true // it names no message, and no release writes it: the check says so
		}
		phase, known := parseGiven(v)
		if !known {
			// Whom it was offered to is in the key, and that relay is asked.
			q.badRecord(GivenDamaged, "that of a message on its way to another relay, which is asked whether it has it", "message", id, "relay", peer)
			phase = phaseOffered
		}
		q.resume(peer, Transfer{id, hop}, phase)
		return true
	})
	if err != nil {
		return err
	}
	return snap.Iterate([]byte{store.SpaceTaken}, nil, true, func(k, _ []byte) bool {
		if peer, _, _, ok := store.ParseTransferKey(k); ok {
			t.taken[peer]++
		}
		return true
	})
}

// resume takes what is left here of one message. One that cannot be read is set
// aside: the other relay may have it, so nobody may deliver it here.
func (q *Queue) resume(peer ids.Node, tr Transfer, phase byte) {
	t := &q.transfers
	read, err := q.readMessage(tr.Message, nil)
	if err != nil && !fault.Is(err, fault.NotFound) {
		q.keepAside(tr.Message, err)
		t.giving[tr.Message] = peer
		return
	}
	if err == nil && read.env.Hops+1 == tr.Hop {
		q.mu.Lock()
		m := q.messageFor(tr.Message)
		q.learn(m, read)
		works := q.takeOpen(m, read, nil)
		q.unref(m, 1)
		q.mu.Unlock()
		if len(works) > 0 {
			t.resumed[peer] = append(t.resumed[peer], &Parcel{Env: read.env, states: read.states, firstDue: read.firstDue, works: works, to: peer, gone: phase == phaseGone})
			t.giving[tr.Message] = peer
			return
		}
	}
	q.transfers.owe(peer, tr) // nothing is left of it here
}

// owe remembers that a relay may forget a message. Call with t.mu held, or
// before Open returns.
func (t *transfers) owe(peer ids.Node, tr Transfer) {
	if t.owed[peer] == nil {
		t.owed[peer] = make(map[Transfer]struct{})
	}
	t.owed[peer][tr] = struct{}{}
}

// Resumed hands out, once, the messages that the last run had offered to other
// relays and of which it did not see the end, by relay. Until they are ended by
// Moved or TakeBack nobody delivers them.
func (q *Queue) Resumed() map[ids.Node][]*Parcel {
	t := &q.transfers
	t.mu.Lock()
	defer t.mu.Unlock()
	out := t.resumed
	t.resumed = make(map[ids.Node][]*Parcel)
	return out
}

// Owed returns up to most messages that a relay has and may forget to have got
// from here, because nothing is left of them here.
func (q *Queue) Owed(peer ids.Node, most int) []Transfer {
	t := &q.transfers
	t.mu.Lock()
	defer t.mu.Unlock()
	out := make([]Transfer, 0, min(most, len(t.owed[peer])))
	for tr := range t.owed[peer] {
		if len(out) == most {
			break
		}
		out = append(out, tr)
	}
	return out
}

// Owing names the relays for which Owed returns something.
func (q *Queue) Owing() []ids.Node {
	t := &q.transfers
	t.mu.Lock()
	defer t.mu.Unlock()
	out := make([]ids.Node, 0, len(t.owed))
	for peer, set := range t.owed {
		if len(set) > 0 {
			out = append(out, peer)
		}
	}
	return out
}

// MayOffer reports whether another message may be offered to a relay: not while
// too many of before are not forgotten there.
func (q *Queue) MayOffer(peer ids.Node) bool {
	t := &q.transfers
	t.mu.Lock()
	defer t.mu.Unlock()
	return len(t.owed[peer]) < maxOwed
}

// Settled records that a relay has forgotten them: so does this one. Should the
// record be lost, the relay is told again, which changes nothing.
func (q *Queue) Settled(peer ids.Node, list []Transfer) {
	t := &q.transfers
	t.mu.Lock()
	for _, tr := range list {
		delete(t.owed[peer], tr)
	}
	if len(t.owed[peer]) == 0 {
		delete(t.owed, peer)
	}
	t.mu.Unlock()
	b := q.st.NewBatch()
	for _, tr := range list {
		b.Delete(store.AppendTransferKey(nil, store.SpaceGiven, peer, tr.Message, tr.Hop))
	}
	q.mu.Lock()
	err := q.begin()
	q.mu.Unlock()
	if err != nil {
		b.Abandon()
		return
	}
	q.st.CommitAsync(b, func(error) { q.pending.Done() })
}

// Giving names the relay that a message is on its way to.
func (q *Queue) Giving(id ids.Message) (ids.Node, bool) {
	t := &q.transfers
	t.mu.Lock()
	defer t.mu.Unlock()
	peer, ok := t.giving[id]
	return peer, ok
}

// Has reports which of a relay's messages were taken from it.
func (q *Queue) Has(peer ids.Node, list []Transfer) ([]bool, error) {
	out := make([]bool, len(list))
	for i, tr := range list {
		_, err := q.st.Get(store.AppendTransferKey(nil, store.SpaceTaken, peer, tr.Message, tr.Hop), nil)
		if err != nil && !fault.Is(err, fault.NotFound) {
			return nil, err
		}
		out[i] = err == nil
	}
	return out, nil
}

// Forget removes the memory of messages that a relay handed over: it will not
// ask for them again. It returns when that is durable.
func (q *Queue) Forget(peer ids.Node, list []Transfer) error {
	have, err := q.Has(peer, list)
	if err != nil {
		return err
	}
	b := q.st.NewBatch()
	n := 0
	for i, tr := range list {
		if have[i] {
			b.Delete(store.AppendTransferKey(nil, store.SpaceTaken, peer, tr.Message, tr.Hop))
			n++
		}
	}
	if n == 0 {
		b.Abandon()
		return nil
	}
	if err := q.commit(b); err != nil {
		return err
	}
	t := &q.transfers
	t.mu.Lock()
	t.taken[peer] -= n
	t.mu.Unlock()
	return nil
}

// commit makes a batch of this file's durable.
func (q *Queue) commit(b *store.Batch) error {
	q.mu.Lock()
	err := q.begin()
	q.mu.Unlock()
	if err != nil {
		b.Abandon()
		return err
	}
	defer q.pending.Done()
	wait := make(chan error, 1)
	q.st.CommitAsync(b, func(err error) { wait <- err })
	return <-wait
}

// ForgetOverdue removes the memory of messages whose deadline is long over:
// their giver may be gone for good. It does nothing while the clock is not
// trusted.
func (q *Queue) ForgetOverdue(now time.Time) error {
	if !q.clockTrusted() {
		return nil
	}
	before := store.Milliseconds(now.Add(-takenMargin))
	over := make(map[ids.Node][]Transfer)
	snap := q.st.Snapshot()
	err := snap.Iterate([]byte{store.SpaceTaken}, nil, false, func(k, v []byte) bool {
		peer, id, hop, ok := store.ParseTransferKey(k)
		if expires, known := parseTaken(v); ok && known && expires < before && len(over[peer]) < maxStepMessages {
			over[peer] = append(over[peer], Transfer{id, hop})
		}
		return true
	})
	snap.Close()
	for peer, list := range over {
		if err == nil {
			err = q.Forget(peer, list)
		}
	}
	return err
}

// moved is the state of a recipient that another relay has.
var moved = relay.RecipientState{State: relay.StateMoved}
