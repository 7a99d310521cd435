package store

import (
	"context"
	"sync"
	"time"

	"github.com/dgraph-io/badger/v4"
	"github.com/relais-mta/relais/shared/fault"
)

// Bounds of one group, that is one Badger transaction with its bodies, and of
// the queue in front of it.
const (
	maxGroupBodyBytes = 8 << 20
	maxQueuedBatches  = 4096     // Commit waits above it
	maxQueuedBytes    = 32 << 20 // of keys, values and bodies; Commit waits above it
)

// A group is what one Badger transaction commits.
type group struct {
	batches    []*Batch
	bytes      int64
	bodyBytes  int64
	entries    int
	eventCount int
	segment    uint64 // that its bodies are in; 0: it has none
	vectors    [][]byte
}

func (g *group) reset() {
	clear(g.batches)
	clear(g.vectors)
	*g = group{batches: g.batches[:0], vectors: g.vectors[:0]}
}

// Sequencer numbers events at the moment of commit. The outbox is the only one.
type Sequencer interface {
	// Assign is called once for each transaction that carries events, in the
	// order of commit, with the encoded events of all its batches, each with
	// its length in front. It adds its own writes with set and remove.
	Assign(events [][]byte, count int, set func(key, value []byte), remove func(key []byte))
}

// SetSequencer names the sequencer. It must be called before the first batch
// with events is committed.
func (s *Store) SetSequencer(q Sequencer) {
	s.submitLock.Lock()
	defer s.submitLock.Unlock()
	s.sequencer = q
}

var errClosing = fault.New(fault.Unavailable, "store.Commit", "the relay is shutting down")

type commitWaiter struct{ ch chan error }

var waiterPool = sync.Pool{New: func() any { return &commitWaiter{ch: make(chan error, 1)} }}

// Commit makes the batch durable and returns then. ctx bounds the wait for a
// place in the queue only: once the batch is in it, its outcome is awaited,
// because a write under way cannot be taken back. Errors are faults:
// Unavailable when the store failed or is closed, NoSpace when a body found no
// room, TooLarge for a batch no transaction can hold.
func (s *Store) Commit(ctx context.Context, b *Batch) error {
	if err := s.checkSize(b); err != nil {
		b.release()
		return err
	}
	w := waiterPool.Get().(*commitWaiter)
	b.done = func(err error) { w.ch <- err }
	if err := s.waitForRoom(ctx); err != nil {
		b.release()
		waiterPool.Put(w)
		return err
	}
	s.submit(b)
	err := <-w.ch
	waiterPool.Put(w)
	return err
}

// Submit is CommitAsync with the back-pressure of Commit: it waits for a place
// in the queue for as long as ctx allows. done is always called once.
func (s *Store) Submit(ctx context.Context, b *Batch, done func(error)) {
	if err := s.waitForRoom(ctx); err != nil {
		b.release()
		done(err)
		return
	}
	s.CommitAsync(b, done)
}

// CommitAsync hands the batch to the committer and returns at once; done gets
// the outcome on the committer's goroutine, which it must not block. Batches
// are committed in the order of the calls. There is no back-pressure here:
// callers bound their own work in flight.
func (s *Store) CommitAsync(b *Batch, done func(error)) {
	if err := s.checkSize(b); err != nil {
		b.release()
		done(err)
		return
	}
	b.done = done
	s.submit(b)
}

// Barrier runs f on the committer's goroutine when everything submitted before is
// durable with its callbacks done, and nothing is under way: what a Snapshot
// taken in f sees is exactly what callbacks were told. f must not block. Who
// does not care for what was submitted just before asks Settled, which does not
// wait.
func (s *Store) Barrier(f func()) error {
	w := waiterPool.Get().(*commitWaiter)
	b := s.NewBatch()
	b.barrier = f
	b.done = func(err error) { w.ch <- err }
	s.submit(b)
	err := <-w.ch
	waiterPool.Put(w)
	return err
}

// submit puts a batch into the queue, or answers it when the store is closed.
func (s *Store) submit(b *Batch) {
	s.submitLock.Lock()
	if s.closing {
		s.submitLock.Unlock()
		done := b.done
		b.release()
		done(errClosing)
		return
	}
	s.queued = append(s.queued, b)
	s.queuedBytes += b.indexBytes() + b.bodyBytes
	s.submitLock.Unlock()
	select {
	case s.wake <- struct{}{}:
	default:
	}
}

func (s *Store) waitForRoom(ctx context.Context) error {
	for {
		s.submitLock.Lock()
		full := len(s.queued) >= maxQueuedBatches || s.queuedBytes >= maxQueuedBytes
		room := s.room
		s.submitLock.Unlock()
		if !full {
			return nil
		}
		select {
		case <-room:
		case <-ctx.Done():
			return fault.Wrap(ctx.Err(), fault.Timeout, "store.Commit", "the disk is too slow for the mail that comes in")
		}
	}
}

// gather moves the batches that fit into one group from the queue. It reports
// false when the store is closing and nothing is left.
func (s *Store) gather(g *group) bool {
	for {
		s.submitLock.Lock()
		n := 0
		for _, b := range s.queued {
			bytes := b.indexBytes()
			if n > 0 && (g.bytes+bytes > s.maxGroupBytes || g.entries+len(b.ops) > s.maxGroupEntries || g.bodyBytes+b.bodyBytes > maxGroupBodyBytes) {
				break
			}
			g.batches = append(g.batches, b)
			g.bytes += bytes
			g.bodyBytes += b.bodyBytes
			g.entries += len(b.ops)
			g.eventCount += b.eventCount
			s.queuedBytes -= bytes + b.bodyBytes
			n++
		}
		if n > 0 {
			rest := copy(s.queued, s.queued[n:])
			clear(s.queued[rest:])
			s.queued = s.queued[:rest]
			close(s.room)
			s.room = make(chan struct{})
			s.submitLock.Unlock()
			return true
		}
		closing := s.closing
		s.submitLock.Unlock()
		if closing {
			return false
		}
		<-s.wake
	}
}

// writeLoop is the committer's first half: it gathers, and makes bodies
// durable. While the second half commits one group, the next is gathered and
// its bodies are synced.
func (s *Store) writeLoop() {
	defer close(s.groups)
	for {
		g := <-s.freeGroups
		if !s.gather(g) {
			return
		}
		if g.bodyBytes > 0 || s.hasBodies(g) {
			s.writeBodies(g)
		}
		s.groups <- g
	}
}

func (s *Store) hasBodies(g *group) bool {
	for _, b := range g.batches {
		if len(b.bodies) > 0 {
			return true
		}
	}
	return false
}

// commitLoop is the committer's second half: one transaction per group, then
// the answers.
func (s *Store) commitLoop() {
	defer close(s.committerDone)
	for {
		g := s.nextGroup()
		if g == nil {
			return
		}
		wrote, err := s.commitGroup(g)
		s.settling.Lock()
		if wrote {
			s.publish()
		}
		s.ledger.landed(g.segment)
		s.answer(g, err)
		s.settling.Unlock()
		g.reset()
		s.freeGroups <- g
	}
}

// nextGroup returns the next group; nil when there is none any more.
func (s *Store) nextGroup() *group {
	if len(s.ahead) > 0 {
		g := s.ahead[0]
		s.ahead = s.ahead[1:]
		return g
	}
	if s.groupsDone {
		return nil
	}
	return <-s.groups
}

// commitGroup reports whether it has changed the index.
func (s *Store) commitGroup(g *group) (wrote bool, err error) {
	if err := s.failure(); err != nil {
		return false, err
	}
	if err := s.awaitDisk(g); err != nil {
		return false, err
	}
	if err := s.stillMounted(); err != nil {
		return false, s.fail(err)
	}
	began := time.Now()
	txn := s.db.NewTransaction(true)
	defer txn.Discard()
	writes := 0
	set := func(key, value []byte) {
		s.slab = append(s.slab, badger.Entry{Key: key, Value: value})
		writes++
	}
	var failed error
	remove := func(key []byte) {
		writes++
		if err := txn.Delete(key); err != nil && failed == nil {
			failed = err
		}
	}
	s.reserveSlab(g.entries + 8)
	for _, b := range g.batches {
		if b.err != nil {
			continue
		}
		for _, o := range b.ops {
			key := b.data[o.key:o.value:o.value]
			if o.remove {
				remove(key)
				continue
			}
			// Set and delete of one key must reach the transaction in order.
			s.slab = append(s.slab, badger.Entry{Key: key, Value: b.data[o.value:o.end:o.end]})
			writes++
			if err := txn.SetEntry(&s.slab[len(s.slab)-1]); err != nil && failed == nil {
				failed = err
			}
		}
	}
	if g.eventCount > 0 {
		from := len(s.slab)
		s.assignEvents(g, set, remove)
		for i := from; i < len(s.slab); i++ {
			if err := txn.SetEntry(&s.slab[i]); err != nil && failed == nil {
				failed = err
			}
		}
	}
	if failed == nil && writes > 0 {
		s.commitSince.Store(began.UnixNano())
		if failed = txn.Commit(); failed == nil {
			failed = s.stillMounted()
		}
		s.commitSince.Store(0)
		s.metrics.observe(time.Since(began), g)
	}
	clear(s.slab)
	s.slab = s.slab[:0]
	if failed != nil {
		return false, s.fail(failed)
	}
	s.afterCommit(g)
	return writes > 0, nil
}

// reserveSlab makes room for n entries, because the transaction keeps pointers
// into the slab and it must not move.
func (s *Store) reserveSlab(n int) {
	if cap(s.slab) < n {
		s.slab = make([]badger.Entry, 0, n+n/2)
	}
}

func (s *Store) assignEvents(g *group, set func(key, value []byte), remove func(key []byte)) {
	runs, count := s.runs[:0], 0
	for _, b := range g.batches {
		if b.err == nil && b.eventCount > 0 {
			runs = append(runs, b.events)
			count += b.eventCount
		}
	}
	s.submitLock.Lock()
	q := s.sequencer
	s.submitLock.Unlock()
	if count > 0 && q != nil {
		q.Assign(runs, count, set, remove)
	}
	clear(runs)
	s.runs = runs[:0]
}

// afterCommit books what a durable transaction changed about bodies.
func (s *Store) afterCommit(g *group) {
	dropped := false
	for _, b := range g.batches {
		if b.err != nil {
			continue
		}
		for _, p := range b.bodies {
			p.body.committed()
		}
		if len(b.drops) > 0 {
			s.ledger.drop(b.drops)
			dropped = true
		}
	}
	if dropped {
		s.wakeReclaim()
	}
	s.prepareMemtable()
	s.measureSpace(false)
}

func (s *Store) answer(g *group, err error) {
	for i, b := range g.batches {
		if b.barrier != nil {
			continue
		}
		result := err
		if result == nil {
			result = b.err
		}
		done := b.done
		b.release()
		g.batches[i] = nil
		done(result)
	}
	for _, b := range g.batches {
		if b == nil {
			continue
		}
		if err == nil {
			b.barrier()
		}
		done := b.done
		b.release()
		done(err)
	}
}

// fail puts the store into its failed state: Badger's memory and disk may
// disagree now, so nothing is written until the log was replayed (decision 0044).
func (s *Store) fail(cause error) error {
	err := &fault.Error{Kind: fault.Unavailable, Op: "store.Commit", Public: "the queue's disk or index failed: it is opened again once the disk takes writes", Cause: cause}
	if s.failed.CompareAndSwap(nil, err) {
		s.log.Error("the queue's disk or index failed: nothing more is accepted or recorded until it was opened again", "error", cause)
		close(s.failedNow)
	}
	return s.failure()
}

func (s *Store) failure() error {
	if f := s.failed.Load(); f != nil {
		return f
	}
	return nil
}
