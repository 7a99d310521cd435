package outbox

import (
	"github.com/relais-mta/relais/relay/store"
)

// Read returns the events after seq, in order, up to about maxBytes of stored
// size and at least one if there is one. An event of type Gap stands for events
// that are not here any more or cannot be read.
func (o *Outbox) Read(after uint64, maxBytes int) ([]Event, error) {
	snap := o.st.Snapshot()
	defer snap.Close()
	o.mu.Lock()
	first := o.first
	o.mu.Unlock()
	var out []Event
	if after+1 < first {
		out = append(out, Event{Type: Gap, Seq: first - 1, Count: first - 1 - after})
		after = first - 1
	}
	prefix := []byte{store.SpaceOutbox}
	from, err := firstRun(snap, after+1)
	if err != nil {
		return nil, err
	}
	r := reader{o: o, after: after, next: after + 1, maxBytes: maxBytes, out: out}
	err = snap.Iterate(prefix, from, false, func(k, v []byte) bool { return r.run(k, v) && r.newer == nil })
	if err == nil {
		err = r.newer
	}
	return r.out, err
}

// reader collects events for Read.
type reader struct {
	o        *Outbox
	after    uint64 // events up to here are not wanted
	next     uint64 // the number that comes next
	maxBytes int
	size     int
	out      []Event
	newer    error // an event of a release after this one, which must not pass for a lost one
}

// run adds the events of a stored run, and reports whether there is room for more.
// Where events are missing or cannot be read, a gap stands for them as soon as a later
// run tells how many they were.
func (r *reader) run(key, value []byte) (more bool) {
	seq, _, count, events, ok := parseRun(key, value)
	if !ok {
		r.o.unreadable(key)
		return true
	}
	for ; len(events) > 0; seq++ {
		event, rest, ok := nextEvent(events)
		if !ok {
			r.o.unreadable(key)
			return true
		}
		events = rest
		last := seq
		if len(event) >= eventHeaderBytes && Type(event[1]) == Gap { // its run stands for events that were lost, see Check
			last = seq + uint64(count) - 1
		}
		if last <= r.after {
			r.next = max(r.next, last+1)
			continue
		}
		if r.size > 0 && r.size+len(event) > r.maxBytes {
			return false
		}
		var e Event
		if err := e.Parse(event); err != nil {
			if len(event) > 0 && event[0] == Schema+1 {
				r.newer = err
				return false
			}
			r.o.unreadable(key)
			return true
		}
		r.size += len(event)
		if e.Type == Gap {
			e.Count = last - max(r.after, seq-1)
		} else if seq > r.next {
			r.out = append(r.out, Event{Type: Gap, Seq: seq - 1, Count: seq - r.next})
		}
		e.Seq = last
		r.out = append(r.out, e)
		r.next = last + 1
	}
	return true
}

// unreadable says once that a run of events cannot be read.
func (o *Outbox) unreadable(key []byte) {
	at, _ := store.ParseOutboxKey(key)
	o.mu.Lock()
	known := o.damaged[at] || len(o.damaged) >= maxDamagedRuns
	if !known {
		if o.damaged == nil {
			o.damaged = make(map[uint64]bool)
		}
		o.damaged[at] = true
	}
	o.mu.Unlock()
	if !known {
		o.log.Error("events cannot be read and are reported as lost: "+remedy, "from", at)
	}
}

// maxDamagedRuns bounds the runs that the log names.
const maxDamagedRuns = 100
