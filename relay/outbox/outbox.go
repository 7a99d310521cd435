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
	"bytes"
	"context"
	"encoding/binary"
	"log/slog"
	"sync"
	"time"

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
	damaged  map[uint64]bool // runs that could not be read, by their first number
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

// load finds both ends of the stream without reading what lies between. What is
// damaged of them costs events, never mail: the stream goes on with numbers that were
// not used, and Read says where some are lost.
func (o *Outbox) load() error {
	snap := o.st.Snapshot()
	defer snap.Close()
	meta, err := snap.Get(store.KeyOutbox, nil)
	damaged := false
	switch {
	case fault.Is(err, fault.NotFound):
	case err != nil:
		return err
	case len(meta) != metaBytes || meta[0] != metaVersion:
		o.log.Error("the outbox's own record is damaged; what is stored says where the events begin: " + remedy)
		damaged = true
	default:
		o.first = binary.BigEndian.Uint64(meta[1:])
		o.next = o.first
	}
	stored, err := o.loadEnd(snap)
	if err != nil {
		return err
	}
	if !stored {
		if damaged { // above any number that was used
			o.first = uint64(time.Now().UnixMilli())
			o.next = o.first
		}
		return nil
	}
	var from []byte
	if !damaged {
		if from, err = firstRun(snap, o.first); err != nil {
			return err
		}
	}
	return snap.Iterate([]byte{store.SpaceOutbox}, from, false, func(k, v []byte) bool {
		if seq, before, count, _, ok := parseRun(k, v); ok && (damaged || seq+uint64(count) > o.first) {
			o.begin = before
			o.first = max(o.first, seq)
			return false
		}
		return true
	})
}

const remedy = "stop the relay and run relais-relay queue fsck --repair"

// loadEnd finds the newest run, and reports whether there is any. Behind runs that
// cannot be read so many numbers are given up as the last of them may have held.
func (o *Outbox) loadEnd(snap *store.Snapshot) (stored bool, err error) {
	prefix := []byte{store.SpaceOutbox}
	var upTo []byte
	for {
		key, value, err := snap.Last(prefix, upTo)
		if err != nil || key == nil {
			o.begin = o.end
			return stored, err
		}
		seq, before, count, _, ok := parseRun(key, value)
		if ok {
			o.next = max(o.next, seq+uint64(count))
			o.end = before + uint64(len(value))
			o.begin = o.end
			return true, nil
		}
		if at, named := store.ParseOutboxKey(key); named {
			o.log.Error("the newest events are damaged: "+remedy, "from", at)
			o.next = max(o.next, at+maxRunEvents)
			stored = true
		}
		upTo = beforeKey(key)
	}
}

// beforeKey is a key behind which, up to the one given, there is none but that.
func beforeKey(key []byte) []byte {
	b := bytes.Clone(key)
	last := len(b) - 1
	if b[last] == 0 {
		return b[:last]
	}
	b[last]--
	return append(b, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff)
}

// firstRun returns the key from which the event seq and those after it are
// found. Reading starts there and not at the beginning, where the index still
// holds the markers of what was removed.
func firstRun(snap *store.Snapshot, seq uint64) ([]byte, error) {
	at := store.AppendOutboxKey(nil, seq)
	for upTo := at; ; {
		from, _, err := snap.Last([]byte{store.SpaceOutbox}, upTo)
		if err != nil || from == nil {
			return at, err
		}
		if _, named := store.ParseOutboxKey(from); named {
			return from, nil
		}
		upTo = beforeKey(from) // no run has such a key
	}
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
