// Package state holds the replicated state of a cluster: tables of immutable
// rows that only Apply changes. It is pure. Two servers that applied the same
// log hold the same rows and the same state hash; nothing here reads a clock, a
// file, a random number or the order of a map.
//
// Rows live in go-memdb, whose trees are copied on write, so a reader or a
// snapshot costs a few pointers and never waits for the writer.
package state

import (
	"sync"
	"sync/atomic"
	"time"

	"github.com/hashicorp/go-memdb"

	"github.com/relais-mta/relais/control/command"
	"github.com/relais-mta/relais/shared/fault"
)

// CheckpointEvery is the number of log entries between two checkpoints of the
// state hash.
const CheckpointEvery = 4096

// maxCheckpoints is how many checkpoints are remembered for comparison.
const maxCheckpoints = 8

// progress is what the state knows of the log it was made from. It is itself
// a row, so a snapshot of the tables holds it too.
type progress struct {
	index       uint64
	lastMillis  int64
	viewIndex   uint64
	hash        hash
	counts      [maxSections]int
	checkpoints []Checkpoint
}

// Checkpoint is the state hash after the entry with this index was applied.
type Checkpoint struct {
	Index uint64
	Hash  [32]byte
}

// Result is what applying one entry gave.
type Result struct {
	Index uint64
	Row   any   // the row as stored: a pointer to a type of package control, not to be changed
	Err   error // a rule refused the entry; nothing changed
}

// Store is the state. One goroutine applies; any number read.
type Store struct {
	db       atomic.Pointer[memdb.MemDB]
	diverged atomic.Pointer[Divergence]

	mu          sync.Mutex
	changed     chan struct{}
	viewChanged chan struct{}
	viewIndex   uint64
}

// Divergence says that this server's state differs from the leader's.
type Divergence struct {
	Index     uint64 // of the checkpoint
	Want, Got [32]byte
}

// Error implements error.
func (d *Divergence) Error() string { return d.Unwrap().Error() }

// Unwrap lets the text be shown to operators.
func (d *Divergence) Unwrap() error {
	return fault.New(fault.Internal, "state.Apply", "the state of this server differs from the leader's at log index %d (%x, leader %x): stop it, move its data directory away and let it join again with `relais-control join --token ct1.…`", d.Index, d.Got[:8], d.Want[:8])
}

// New returns an empty state.
func New() *Store {
	s := &Store{changed: make(chan struct{}), viewChanged: make(chan struct{})}
	s.db.Store(newDB())
	return s
}

func newDB() *memdb.MemDB {
	db, err := memdb.NewMemDB(schema())
	if err != nil {
		panic("state: schema: " + err.Error())
	}
	return db
}

// Read returns a reader of the state as it is now. It must not be shared
// between goroutines.
func (s *Store) Read() *Reader { return &Reader{txn: s.db.Load().Txn(false)} }

// Diverged returns what a checkpoint of the leader contradicted, or nil.
func (s *Store) Diverged() *Divergence { return s.diverged.Load() }

// Watch returns a channel that is closed at the next applied entry.
func (s *Store) Watch() <-chan struct{} {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.changed
}

// WatchViews returns a channel that is closed at the next change that relays
// must hear of.
func (s *Store) WatchViews() <-chan struct{} {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.viewChanged
}

func (s *Store) notify(viewIndex uint64) {
	s.mu.Lock()
	defer s.mu.Unlock()
	close(s.changed)
	s.changed = make(chan struct{})
	if viewIndex != s.viewIndex {
		s.viewIndex = viewIndex
		close(s.viewChanged)
		s.viewChanged = make(chan struct{})
	}
}

// Apply applies one decoded entry. Entries come in the order of their index,
// from one goroutine.
func (s *Store) Apply(index uint64, e command.Envelope) Result {
	db := s.db.Load()
	before := readProgress(db.Txn(false))
	a := newApplier(db.Txn(true), before, index, e)
	row, err := a.apply(e.Body)
	if err != nil {
		// Nothing half-applied: only the progress of the log is kept.
		a.txn.Abort()
		a = newApplier(db.Txn(true), before, index, e)
		row = nil
	}
	a.finish()
	a.txn.Commit()
	if h, ok := e.Body.(*command.StateHash); ok {
		s.compare(&a.progress, h)
	}
	s.notify(a.progress.viewIndex)
	return Result{Index: index, Row: row, Err: err}
}

// compare checks a checkpoint of the leader against our own. The outcome is
// this server's alone, so it never becomes part of the state.
func (s *Store) compare(p *progress, h *command.StateHash) {
	for _, c := range p.checkpoints {
		if c.Index == h.GetIndex() && string(c.Hash[:]) != string(h.GetHash()) {
			d := &Divergence{Index: c.Index, Got: c.Hash}
			copy(d.Want[:], h.GetHash())
			s.diverged.CompareAndSwap(nil, d)
		}
	}
}

// applier carries one entry through the tables.
type applier struct {
	txn      *memdb.Txn
	index    uint64
	now      time.Time // the log's time, which never goes back
	actor    string
	reason   string
	action   string
	progress progress
}

func newApplier(txn *memdb.Txn, p *progress, index uint64, e command.Envelope) *applier {
	a := &applier{txn: txn, index: index, action: e.Type.String(), progress: *p}
	a.progress.checkpoints = append([]Checkpoint(nil), p.checkpoints...)
	a.progress.lastMillis = max(p.lastMillis, e.Time.UnixMilli())
	a.now = time.UnixMilli(a.progress.lastMillis).UTC()
	if e.Body != nil {
		a.actor, a.reason = e.Body.GetMeta().GetActor(), e.Body.GetMeta().GetReason()
	}
	return a
}

// finish records that the entry was applied, and a checkpoint if one is due.
func (a *applier) finish() {
	p := &a.progress
	if a.index/CheckpointEvery > p.index/CheckpointEvery {
		if len(p.checkpoints) == maxCheckpoints {
			p.checkpoints = p.checkpoints[1:]
		}
		p.checkpoints = append(p.checkpoints, Checkpoint{Index: a.index, Hash: p.hash.bytes()})
	}
	p.index = a.index
	writeProgress(a.txn, p)
}

func writeProgress(txn *memdb.Txn, p *progress) {
	if err := txn.Insert(progressTable, p); err != nil {
		panic("state: progress: " + err.Error())
	}
}

func readProgress(txn *memdb.Txn) *progress {
	raw, err := txn.First(progressTable, "id", progressKey)
	if err != nil {
		panic("state: progress: " + err.Error())
	}
	if raw == nil {
		return &progress{}
	}
	return raw.(*progress)
}

// Reader reads the state of one moment.
type Reader struct{ txn *memdb.Txn }

// Index returns the index of the last entry applied.
func (r *Reader) Index() uint64 { return readProgress(r.txn).index }

// Time returns the time of the last entry applied, as the log knows it.
func (r *Reader) Time() time.Time { return time.UnixMilli(readProgress(r.txn).lastMillis).UTC() }

// ViewRevision returns the index of the last change that relays must hear of.
func (r *Reader) ViewRevision() uint64 { return readProgress(r.txn).viewIndex }

// Hash returns the state hash.
func (r *Reader) Hash() [32]byte { return readProgress(r.txn).hash.bytes() }

// LastCheckpoint returns the newest checkpoint, if there is one.
func (r *Reader) LastCheckpoint() (Checkpoint, bool) {
	c := readProgress(r.txn).checkpoints
	if len(c) == 0 {
		return Checkpoint{}, false
	}
	return c[len(c)-1], true
}
