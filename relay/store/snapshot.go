package store

import (
	"errors"
	"slices"

	"github.com/dgraph-io/badger/v4"

	"github.com/relais-mta/relais/shared/fault"
)

// Snapshot reads the index as it was at one moment. Close it soon: what it can
// see is kept on disk until then. One goroutine uses it at a time.
type Snapshot struct{ view *view }

// Close ends the snapshot. A second call does nothing: others use the same view.
func (v *Snapshot) Close() {
	if v.view != nil {
		v.view.release()
		v.view = nil
	}
}

// Get appends the value of key to dst. A key that does not exist is a NotFound
// fault.
func (v *Snapshot) Get(key, dst []byte) ([]byte, error) {
	item, err := v.view.txn.Get(key)
	if errors.Is(err, badger.ErrKeyNotFound) {
		return nil, errNotFound
	}
	if err == nil {
		err = item.Value(func(value []byte) error {
			dst = append(dst, value...)
			return nil
		})
	}
	if err != nil {
		return nil, readFault(err)
	}
	return dst, nil
}

// Get appends the value of key to dst. A key that does not exist is a NotFound
// fault.
func (s *Store) Get(key, dst []byte) ([]byte, error) {
	v := s.Snapshot()
	defer v.Close()
	return v.Get(key, dst)
}

var errNotFound = fault.New(fault.NotFound, "store.Get", "no such record")

// Iterate calls f for the keys that begin with prefix, in order, from the
// first one at or after from (nil: the first of all), until f returns false.
// Key and value are valid during the call only; without values the value is nil.
func (v *Snapshot) Iterate(prefix, from []byte, keysOnly bool, f func(key, value []byte) bool) error {
	opt := badger.DefaultIteratorOptions
	opt.Prefix = prefix
	opt.PrefetchValues = false // values are in the tree: reading them needs no other access
	it := v.view.txn.NewIterator(opt)
	defer it.Close()
	if from == nil {
		from = prefix
	}
	for it.Seek(from); it.Valid(); it.Next() {
		item := it.Item()
		if keysOnly {
			if !f(item.Key(), nil) {
				return nil
			}
			continue
		}
		more := true
		err := item.Value(func(value []byte) error {
			more = f(item.Key(), value)
			return nil
		})
		if err != nil {
			return readFault(err)
		}
		if !more {
			return nil
		}
	}
	return nil
}

// Last returns the last key that begins with prefix and is not above upTo
// (nil: no limit), with its value; nil if there is none.
func (v *Snapshot) Last(prefix, upTo []byte) (key, value []byte, err error) {
	opt := badger.DefaultIteratorOptions
	opt.Prefix = prefix
	opt.Reverse = true
	opt.PrefetchValues = false
	it := v.view.txn.NewIterator(opt)
	defer it.Close()
	if upTo == nil {
		upTo = append(slices.Clone(prefix), 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff)
	}
	it.Seek(upTo) // in reverse: the last key at or before it
	if !it.ValidForPrefix(prefix) {
		return nil, nil, nil
	}
	value, err = it.Item().ValueCopy(nil)
	if err != nil {
		return nil, nil, readFault(err)
	}
	return it.Item().KeyCopy(nil), value, nil
}

func readFault(err error) error {
	return fault.Wrap(err, fault.Unavailable, "store.Get", "the queue's index cannot be read")
}
