package outbox

import (
	"bytes"
	"encoding/binary"
	"fmt"
	"time"

	"github.com/relais-mta/relais/relay/store"
	"github.com/relais-mta/relais/shared/fault"
)

// maxRunEvents is more than a run can hold: an event takes at least sixteen
// bytes. Where the newest run is unreadable so many numbers are given up, so
// that none is used twice.
const maxRunEvents = maxRunBytes / 16

// Damage is a stored run of events, or the outbox's own record, that cannot be
// used. Without repair Read says that its events are lost.
type Damage struct {
	Key, Value []byte // Value is nil where a record is missing
	Detail     string
	Instead    []byte // what takes its place: a run with a gap in it
}

// Check reads all stored events and calls f for what is damaged or missing.
// step is called once for each run. The outbox need not be open.
func Check(snap *store.Snapshot, now time.Time, step func() error, f func(Damage) error) error {
	c := &check{now: now, f: f}
	var inner error
	err := snap.Iterate([]byte{store.SpaceOutbox}, nil, false, func(key, value []byte) bool {
		if inner = step(); inner == nil {
			inner = c.run(key, value)
		}
		return inner == nil
	})
	if err == nil {
		err = inner
	}
	if err == nil {
		err = c.settle(c.next + maxRunEvents)
	}
	if err != nil {
		return err
	}
	meta, err := snap.Get(store.KeyOutbox, nil)
	if fault.Is(err, fault.NotFound) || err == nil && len(meta) == metaBytes && meta[0] == metaVersion {
		return nil
	}
	if err != nil {
		return err
	}
	first := c.first
	if first == 0 {
		first = uint64(now.UnixMilli()) // above any number that was used
	}
	return f(Damage{
		Key: bytes.Clone(store.KeyOutbox), Value: meta, Detail: "the outbox's own record is unreadable",
		Instead: binary.BigEndian.AppendUint64([]byte{metaVersion}, first),
	})
}

type check struct {
	now     time.Time
	f       func(Damage) error
	first   uint64  // number of the oldest event
	next    uint64  // number that must come next; 0: any
	end     uint64  // bytes stored so far
	pending *Damage // an unreadable run, whose number of events the next one tells
}

func (c *check) run(key, value []byte) error {
	seq, before, count, events, ok := parseRun(key, value)
	if _, named := store.ParseOutboxKey(key); !named {
		return c.f(Damage{Key: bytes.Clone(key), Value: bytes.Clone(value), Detail: "the key of a run of events has another length"})
	}
	if c.first == 0 {
		c.first = seq
		if !ok {
			c.first, _ = store.ParseOutboxKey(key)
		}
	}
	if !ok || !wholeRun(events, count) {
		at, _ := store.ParseOutboxKey(key)
		if err := c.settle(at); err != nil {
			return err
		}
		c.next = at
		c.pending = &Damage{Key: bytes.Clone(key), Value: bytes.Clone(value), Detail: fmt.Sprintf("the events from number %d on are unreadable", at)}
		return nil
	}
	if err := c.settle(seq); err != nil {
		return err
	}
	c.next, c.end = seq+uint64(count), before+uint64(len(value))
	return nil
}

// settle reports what lies before the event upTo: an unreadable run, or none.
func (c *check) settle(upTo uint64) error {
	d := c.pending
	c.pending = nil
	switch {
	case c.next == 0 || upTo <= c.next:
		return nil
	case d == nil && upTo == c.next+maxRunEvents:
		return nil // the end
	case d == nil:
		d = &Damage{Key: store.AppendOutboxKey(nil, c.next), Detail: fmt.Sprintf("the events from number %d to %d are missing", c.next, upTo-1)}
	}
	d.Instead = gapRun(c.end, upTo-c.next, c.now)
	c.end += uint64(len(d.Instead))
	return c.f(*d)
}

// gapRun is a run that stands for count events that are lost.
func gapRun(before, count uint64, now time.Time) []byte {
	v := binary.BigEndian.AppendUint64([]byte{runVersion}, before)
	v = binary.BigEndian.AppendUint32(v, uint32(min(count, 1<<32-1)))
	event := (&Event{Type: Gap, At: now}).Append(nil)
	v = binary.AppendUvarint(v, uint64(len(event)))
	return append(v, event...)
}

// wholeRun reports whether a run holds as many readable events as it says, or
// stands for a gap.
func wholeRun(events []byte, count uint32) bool {
	var e Event
	n := uint32(0)
	for len(events) > 0 {
		event, rest, ok := nextEvent(events)
		if !ok || e.Parse(event) != nil {
			return false
		}
		if events = rest; e.Type == Gap && len(rest) == 0 && n == 0 {
			return true
		}
		n++
	}
	return n == count
}
