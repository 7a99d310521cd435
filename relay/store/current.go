package store

import (
	"sync/atomic"

	"github.com/dgraph-io/badger/v4"
)

// Badger gives a reader no time stamp before the commit that is under way is
// done, which under load takes longer than all the reading. So nobody but the
// committer asks Badger for one: after each transaction, when none is under way,
// it takes a snapshot that all readers share until the next one is there. What
// a callback was told of is always in it, because it is replaced before the
// callbacks run.

// view is one moment of the index that several readers share.
type view struct {
	txn  *badger.Txn
	refs atomic.Int64 // the store's own and one for each Snapshot
}

func (v *view) release() {
	if v.refs.Add(-1) == 0 {
		v.txn.Discard()
	}
}

// publish makes what is durable now what readers see. Only the committer calls
// it, and Open before there is one.
func (s *Store) publish() {
	next := &view{txn: s.db.NewTransaction(false)}
	next.refs.Store(1)
	s.currentLock.Lock()
	last := s.current
	s.current = next
	s.currentLock.Unlock()
	if last != nil {
		last.release()
	}
}

// Snapshot returns the index as it was after the last transaction, without
// waiting for the one under way. Whatever a commit's callback was told of is in
// it.
func (s *Store) Snapshot() *Snapshot {
	s.currentLock.Lock()
	defer s.currentLock.Unlock()
	s.current.refs.Add(1)
	return &Snapshot{view: s.current}
}

// Settled runs f at a moment at which every transaction is either in the
// current snapshot with its callbacks done, or has none of both: what a Snapshot
// taken in f sees is exactly what callbacks were told. It does not wait for a
// transaction that is under way, only for callbacks that are being called. f must
// not block, and callbacks must not call Settled. It fails when the store has
// failed or is closed.
func (s *Store) Settled(f func()) error {
	s.settling.RLock()
	defer s.settling.RUnlock()
	if err := s.failure(); err != nil {
		return err
	}
	s.submitLock.Lock()
	closing := s.closing
	s.submitLock.Unlock()
	if closing {
		return errClosing
	}
	f()
	return nil
}
