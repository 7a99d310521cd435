// Package outbox keeps the events that tell control what happened to mail. An
// event is written in the very transaction that changed the queue, so the two
// can never disagree, and waits here, bounded, until it was uploaded.
//
// Events are numbered by the committer, after the order in which they became
// durable. The events of one transaction are stored as a few runs, each under
// the number of its first event, with the count of bytes stored before it, so
// that the size of the whole is known from its two ends.
package outbox

import (
	"context"
	"encoding/binary"
	"log/slog"
	"sync"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/relais-mta/relais/relay/store"
	"github.com/relais-mta/relais/shared/fault"
)

// maxRunBytes bounds one stored run, so that a reader can stop early and no
// value comes near the size that Badger would store elsewhere.
const maxRunBytes = 128 << 10

// A run's value: version, bytes stored before it (u64), number of events
// (u32), then the events with their lengths in front.
const (
	runVersion     = 1
	runHeaderBytes = 1 + 8 + 4
)

// dropPart is the part of the bound that is freed at once when it is reached.
const dropPart = 16

// Config bounds the outbox.
type Config struct {
	MaxBytes   int64                 // of stored events; the oldest are dropped as a counted gap
	Logger     *slog.Logger          // required
	Registerer prometheus.Registerer // nil: metrics are not exported
}

// Outbox is the stream of events of one data directory. Its methods may be
// called concurrently.
type Outbox struct {
	st      *store.Store
	log     *slog.Logger
	counter *prometheus.CounterVec
	byType  [types]prometheus.Counter
	dropped prometheus.Counter

	buf []byte // of the committer: the runs of one transaction

	mu       sync.Mutex
	next     uint64 // number of the next event
	end      uint64 // bytes stored up to now, counted from the beginning of time
	first    uint64 // number of the oldest event that is kept, if there is one
	begin    uint64 // bytes stored before it
	maxBytes int64
	dropping bool
	idle     sync.WaitGroup
	trimming sync.Mutex // one removal at a time
	closed   bool
}

// Open reads where the stream stands and becomes the store's sequencer.
func Open(st *store.Store, cfg Config) (*Outbox, error) {
	o := &Outbox{st: st, log: cfg.Logger, maxBytes: cfg.MaxBytes, next: 1, first: 1}
	o.counter = prometheus.NewCounterVec(prometheus.CounterOpts{Name: "relais_relay_events_total", Help: "Events written, by type."}, []string{"type"})
	for t := range o.byType {
		o.byType[t] = o.counter.WithLabelValues(Type(t).String())
	}
	o.dropped = prometheus.NewCounter(prometheus.CounterOpts{Name: "relais_relay_events_dropped_total", Help: "Events dropped because the outbox was full."})
	if err := o.load(); err != nil {
		return nil, err
	}
	if cfg.Registerer != nil {
		pending := prometheus.NewGaugeFunc(prometheus.GaugeOpts{Name: "relais_relay_outbox_bytes", Help: "Bytes of events that wait for upload."},
			func() float64 { return float64(o.Stats().Bytes) })
		for _, c := range []prometheus.Collector{o.counter, o.dropped, pending} {
			if err := cfg.Registerer.Register(c); err != nil {
				return nil, fault.Wrap(err, fault.Internal, "outbox.Open", "metrics are registered twice")
			}
		}
	}
	st.SetSequencer(o)
	return o, nil
}

// load finds both ends of the stream without reading what lies between.
func (o *Outbox) load() error {
	snap := o.st.Snapshot()
	defer snap.Close()
	meta, err := snap.Get(store.KeyOutbox, nil)
	switch {
	case fault.Is(err, fault.NotFound):
	case err != nil:
		return err
	case len(meta) != metaBytes || meta[0] != metaVersion:
		return fault.New(fault.Invalid, "outbox.Open", "the outbox record is damaged")
	default:
		o.first = binary.BigEndian.Uint64(meta[1:])
		o.next = o.first
	}
	prefix := []byte{store.SpaceOutbox}
	key, value, err := snap.Last(prefix, nil)
	if err != nil {
		return err
	}
	if key == nil {
		return nil
	}
	seq, before, count, _, ok := parseRun(key, value)
	if !ok {
		return fault.New(fault.Invalid, "outbox.Open", "the newest run of events is damaged")
	}
	o.next = max(o.next, seq+uint64(count))
	o.end = before + uint64(len(value))
	o.begin = o.end
	from, err := firstRun(snap, o.first)
	if err != nil {
		return err
	}
	return snap.Iterate(prefix, from, false, func(k, v []byte) bool {
		if seq, before, count, _, ok := parseRun(k, v); ok && seq+uint64(count) > o.first {
			o.begin = before
			o.first = max(o.first, seq)
			return false
		}
		return true
	})
}

// firstRun returns the key from which the event seq and those after it are
// found. Reading starts there and not at the beginning, where the index still
// holds the markers of what was removed.
func firstRun(snap *store.Snapshot, seq uint64) ([]byte, error) {
	at := store.AppendOutboxKey(nil, seq)
	from, _, err := snap.Last([]byte{store.SpaceOutbox}, at)
	if from == nil {
		from = at
	}
	return from, err
}

// The outbox's own record: version, number of the oldest event kept (u64).
const (
	metaVersion = 1
	metaBytes   = 1 + 8
)

func parseRun(key, value []byte) (seq, before uint64, count uint32, events []byte, ok bool) {
	seq, ok = store.ParseOutboxKey(key)
	if !ok || len(value) < runHeaderBytes || value[0] != runVersion {
		return 0, 0, 0, nil, false
	}
	return seq, binary.BigEndian.Uint64(value[1:]), binary.BigEndian.Uint32(value[9:]), value[runHeaderBytes:], true
}

// Add puts an event into a batch; it is numbered when the batch is committed.
// scratch is reused for the encoding and returned.
func (o *Outbox) Add(b *store.Batch, e *Event, scratch []byte) []byte {
	scratch = e.Append(scratch[:0])
	b.AddEvent(scratch)
	return scratch
}

// Assign implements store.Sequencer: it numbers the events of a transaction.
func (o *Outbox) Assign(batches [][]byte, count int, set func(key, value []byte), _ func(key []byte)) {
	o.mu.Lock()
	next, end := o.next, o.end
	o.mu.Unlock()
	total := count * (runHeaderBytes + store.OutboxKeyBytes)
	for _, b := range batches {
		total += len(b)
	}
	if cap(o.buf) < total {
		o.buf = make([]byte, 0, total+total/2)
	}
	o.buf = o.buf[:0]
	var key, run []byte
	inRun := uint32(0)
	flush := func() {
		if inRun == 0 {
			return
		}
		binary.BigEndian.PutUint32(run[9:], inRun)
		o.buf = o.buf[:len(o.buf)+len(run)]
		set(key, run)
		next += uint64(inRun)
		end += uint64(len(run))
		inRun = 0
	}
	for _, b := range batches {
		for len(b) > 0 {
			event, rest, ok := nextEvent(b)
			if !ok {
				break // cannot happen: the batch wrote the lengths itself
			}
			if inRun > 0 && len(run)+len(event) > maxRunBytes {
				flush()
			}
			if inRun == 0 {
				at := len(o.buf)
				o.buf = store.AppendOutboxKey(o.buf, next)
				key = o.buf[at:len(o.buf):len(o.buf)]
				run = append(o.buf[len(o.buf):], runVersion)
				run = binary.BigEndian.AppendUint64(run, end)
				run = append(run, 0, 0, 0, 0)
			}
			run = append(run, b[:len(b)-len(rest)]...)
			o.byType[min(event[1], types-1)].Inc()
			inRun++
			b = rest
		}
	}
	flush()
	o.mu.Lock()
	o.next, o.end = next, end
	_, full := o.keepFrom()
	if full = full && !o.dropping && !o.closed; full {
		o.dropping = true
		o.idle.Add(1)
	}
	o.mu.Unlock()
	if full {
		go o.dropOldest()
	}
}

// Generation names the stream: it is random per data directory, so a wiped
// disk begins a new stream instead of using numbers again.
func (o *Outbox) Generation() [16]byte { return o.st.Generation() }

// Last is the number of the newest event, 0 before the first.
func (o *Outbox) Last() uint64 {
	o.mu.Lock()
	defer o.mu.Unlock()
	return o.next - 1
}

// Stats says how full the outbox is.
type Stats struct {
	First, Last uint64 // numbers of the oldest and newest event kept; First > Last: none
	Bytes       int64
}

// Stats says how full the outbox is.
func (o *Outbox) Stats() Stats {
	o.mu.Lock()
	defer o.mu.Unlock()
	return Stats{First: o.first, Last: o.next - 1, Bytes: int64(o.end - o.begin)}
}

// SetMaxBytes changes the bound while the outbox runs; it takes effect with
// the next event.
func (o *Outbox) SetMaxBytes(n int64) {
	o.mu.Lock()
	defer o.mu.Unlock()
	o.maxBytes = n
}

// Read returns the events after seq, in order, up to about maxBytes of stored
// size and at least one if there is one. A first event of type Gap stands for
// events that are not here any more.
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
	var damaged error
	size := 0
	err = snap.Iterate(prefix, from, false, func(k, v []byte) bool {
		seq, _, count, events, ok := parseRun(k, v)
		if !ok {
			damaged = fault.New(fault.Invalid, "outbox.Read", "a run of events is damaged")
			return false
		}
		for ; len(events) > 0; seq++ {
			event, rest, ok := nextEvent(events)
			if !ok {
				damaged = fault.New(fault.Invalid, "outbox.Read", "the events after %d are damaged", seq-1)
				return false
			}
			events = rest
			last := seq
			if Type(event[1]) == Gap { // its run stands for events that were lost, see Check
				last = seq + uint64(count) - 1
			}
			if last <= after {
				continue
			}
			if size > 0 && size+len(event) > maxBytes {
				return false
			}
			size += len(event)
			var e Event
			if damaged = e.Parse(event); damaged != nil {
				return false
			}
			e.Seq = last
			if e.Type == Gap {
				e.Count = last - max(after, seq-1)
			}
			out = append(out, e)
		}
		return true
	})
	if err == nil {
		err = damaged
	}
	return out, err
}

// Trim forgets the events up to and including seq: control has them. It
// returns when that is durable.
func (o *Outbox) Trim(seq uint64) error {
	o.trimming.Lock()
	defer o.trimming.Unlock()
	o.mu.Lock()
	seq = min(seq, o.next-1)
	nothing := seq < o.first
	o.mu.Unlock()
	if nothing {
		return nil
	}
	return o.remove(func(run runInfo) bool { return run.seq+uint64(run.count) <= seq+1 }, seq+1)
}

// dropOldest removes runs from the front until the outbox is below its bound
// by a good part.
func (o *Outbox) dropOldest() {
	defer o.idle.Done()
	o.trimming.Lock()
	defer o.trimming.Unlock()
	o.mu.Lock()
	before := o.first
	keepFrom, full := o.keepFrom()
	if !full { // the bound was raised, or the oldest were uploaded, since
		o.dropping = false
		o.mu.Unlock()
		return
	}
	o.mu.Unlock()
	err := o.remove(func(run runInfo) bool { return run.before+run.bytes <= keepFrom }, 0)
	o.mu.Lock()
	count := o.first - before
	o.dropping = false
	o.mu.Unlock()
	if err != nil {
		o.log.Error("cannot drop the oldest events of a full outbox", "error", err)
		return
	}
	o.dropped.Add(float64(count))
	o.log.Warn("outbox full: the oldest events were dropped", "events", count)
}

// keepFrom reports whether more is stored than the bound allows, and then the
// place, in bytes stored, from which on events are kept. Call with the lock held.
func (o *Outbox) keepFrom() (from uint64, full bool) {
	if o.maxBytes <= 0 || int64(o.end-o.begin) <= o.maxBytes {
		return 0, false
	}
	return o.end - uint64(o.maxBytes-o.maxBytes/dropPart), true
}

// runInfo is what removal looks at.
type runInfo struct {
	seq, before, bytes uint64
	count              uint32
}

// maxRemovedRuns bounds one removal's transaction.
const maxRemovedRuns = 4096

// remove deletes runs from the front for as long as old says so, and records
// the oldest event kept: the first of the next run, or atLeast if that is later.
func (o *Outbox) remove(old func(runInfo) bool, atLeast uint64) error {
	for {
		b := o.st.NewBatch()
		o.mu.Lock()
		first, begin := o.first, o.begin
		o.mu.Unlock()
		atLeast = max(atLeast, first) // a run of which the first events are forgotten stays whole
		removed, more := 0, false
		snap := o.st.Snapshot()
		from, err := firstRun(snap, first)
		if err == nil {
			err = snap.Iterate([]byte{store.SpaceOutbox}, from, false, func(k, v []byte) bool {
				seq, before, count, _, ok := parseRun(k, v)
				if ok && !old(runInfo{seq: seq, before: before, bytes: uint64(len(v)), count: count}) || removed == maxRemovedRuns {
					first, begin = max(seq, atLeast), before
					more = removed == maxRemovedRuns
					return false
				}
				b.Delete(k)
				removed++
				first, begin = max(seq+uint64(count), atLeast), before+uint64(len(v))
				return true
			})
		}
		snap.Close()
		if err != nil {
			b.Abandon()
			return err
		}
		b.Set(store.KeyOutbox, binary.BigEndian.AppendUint64([]byte{metaVersion}, first))
		if err := o.st.Commit(context.Background(), b); err != nil {
			return err
		}
		o.mu.Lock()
		o.first, o.begin = first, begin
		o.mu.Unlock()
		if !more {
			return nil
		}
	}
}

// Close waits for a removal under way. The store stays open.
func (o *Outbox) Close() {
	o.mu.Lock()
	o.closed = true
	o.mu.Unlock()
	o.idle.Wait()
}
