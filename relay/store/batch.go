package store

import (
	"encoding/binary"
	"sync"

	"github.com/relais-mta/relais/relay"
	"github.com/relais-mta/relais/shared/fault"
	"github.com/relais-mta/relais/shared/ids"
)

// Batch is a set of writes that become durable together or not at all. It is
// blind: nothing is read or compared. After Commit or CommitAsync it belongs
// to the store and must not be touched.
type Batch struct {
	data       []byte // keys and values one behind the other
	ops        []op
	bodies     []placedBody
	bodyBytes  int64
	drops      []relay.BodyRef // bodies that die with this batch
	events     []byte          // each with its length in front
	eventCount int
	largest    int // of the values, in bytes

	refusable bool

	done    func(error)
	barrier func() // run by the committer between transactions, for Barrier
	err     error  // of its bodies
}

type op struct {
	key, value, end uint32 // offsets into data; the value runs from value to end
	remove          bool
}

type placedBody struct {
	body *Body
	ref  int // offset into data of the reference to complete
}

// maxPooledBatchBytes keeps rare large batches out of the pool.
const maxPooledBatchBytes = 64 << 10

var batchPool = sync.Pool{New: func() any { return new(Batch) }}

// NewBatch returns an empty batch.
func (s *Store) NewBatch() *Batch { return batchPool.Get().(*Batch) }

func (b *Batch) release() {
	if cap(b.data)+cap(b.events) > maxPooledBatchBytes {
		return
	}
	clear(b.bodies)
	*b = Batch{data: b.data[:0], ops: b.ops[:0], bodies: b.bodies[:0], drops: b.drops[:0], events: b.events[:0]}
	batchPool.Put(b)
}

// Abandon gives up a batch that was not committed. Its bodies stay the
// caller's.
func (b *Batch) Abandon() { b.release() }

// Set writes value under key. Both are copied.
func (b *Batch) Set(key, value []byte) {
	at := uint32(len(b.data))
	b.data = append(b.data, key...)
	v := uint32(len(b.data))
	b.data = append(b.data, value...)
	b.ops = append(b.ops, op{key: at, value: v, end: uint32(len(b.data))})
	b.largest = max(b.largest, len(value))
}

// Delete removes key. It is copied.
func (b *Batch) Delete(key []byte) {
	at := uint32(len(b.data))
	b.data = append(b.data, key...)
	v := uint32(len(b.data))
	b.ops = append(b.ops, op{key: at, value: v, end: v, remove: true})
}

// SetWithBody writes value under key and the body it refers to: value[refAt:]
// is the body's own incomplete reference (AppendRef of Body.Ref), which the
// committer completes. A body in a file of its own is made durable here, so
// the call may wait for the disk.
func (b *Batch) SetWithBody(key, value []byte, refAt int, id ids.Message, body *Body) error {
	if err := body.prepare(id); err != nil {
		return err
	}
	b.Set(key, value)
	last := b.ops[len(b.ops)-1]
	b.bodies = append(b.bodies, placedBody{body: body, ref: int(last.value) + refAt})
	if body.file == nil {
		b.bodyBytes += int64(len(body.buf))
	} else {
		b.place(len(b.bodies)-1, body.ref.Segment, body.ref.Offset)
	}
	return nil
}

func (b *Batch) place(i int, segment uint64, offset int64) {
	at := b.bodies[i].ref + refPlace
	binary.BigEndian.PutUint64(b.data[at:], segment)
	binary.BigEndian.PutUint64(b.data[at+8:], uint64(offset))
}

// DropBody says that the batch removes the last reference to a body. Its space
// is given back some time after the batch is durable.
func (b *Batch) DropBody(ref relay.BodyRef) {
	if ref.Kind != relay.BodyNone {
		b.drops = append(b.drops, ref)
	}
}

// AddEvent adds an encoded event, which gets its sequence number at commit.
func (b *Batch) AddEvent(event []byte) {
	b.events = binary.AppendUvarint(b.events, uint64(len(event)))
	b.events = append(b.events, event...)
	b.eventCount++
}

// Empty reports whether the batch writes nothing.
func (b *Batch) Empty() bool { return len(b.ops) == 0 && b.eventCount == 0 }

// badgerEntryBytes is what Badger adds to an entry when it sums up a
// transaction, rounded up.
const badgerEntryBytes = 32

func (b *Batch) indexBytes() int64 {
	return int64(len(b.data)+len(b.events)) + int64(len(b.ops)+2)*badgerEntryBytes
}

func (s *Store) checkSize(b *Batch) error {
	if b.indexBytes() > s.maxGroupBytes || len(b.ops) > s.maxGroupEntries {
		return fault.New(fault.TooLarge, "store.Commit", "one change writes %d keys and %d bytes, the most are %d and %d: split the message over fewer recipients",
			len(b.ops), b.indexBytes(), s.maxGroupEntries, s.maxGroupBytes)
	}
	if b.largest > maxValueBytes { // it would go into the value log, which nothing gives back
		return fault.New(fault.TooLarge, "store.Commit", "one record has %d bytes, the most are %d: split the message over fewer recipients", b.largest, maxValueBytes)
	}
	return nil
}
