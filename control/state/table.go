package state

import (
	"crypto/sha256"
	"encoding/binary"
	"strconv"

	"github.com/hashicorp/go-memdb"
	"google.golang.org/protobuf/proto"

	"github.com/relais-mta/relais/shared/fault"
)

const op = "state.Apply"

// table describes one kind of row: how it is keyed, stored, counted and hashed.
type table[T any] struct {
	name     string
	section  uint16 // number in snapshots and row hashes; append only
	maxRows  int
	unhashed bool                               // rows are not part of the state hash
	inViews  bool                               // a change moves the revision of views
	moves    func(a *applier, old, row *T) bool // of a table not in views: whether this change does all the same; nil: none does
	key      func(*T) []byte
	record   func(*T) proto.Message
	row      func([]byte) (*T, error)
	revision func(*T) *uint64
	indexes  []index[T]
}

// index is a further way to find rows. An empty key leaves the row out.
type index[T any] struct {
	name   string
	unique bool
	key    func(*T) []byte
}

// indexer adapts an index's key function to memdb.
type indexer[T any] struct{ key func(*T) []byte }

// FromObject implements memdb.SingleIndexer.
func (i indexer[T]) FromObject(raw any) (bool, []byte, error) {
	k := i.key(raw.(*T))
	return len(k) > 0, k, nil
}

// FromArgs implements memdb.Indexer; the only argument is the key itself.
func (i indexer[T]) FromArgs(args ...any) ([]byte, error) { return args[0].([]byte), nil }

// PrefixFromArgs implements memdb.PrefixIndexer.
func (i indexer[T]) PrefixFromArgs(args ...any) ([]byte, error) { return args[0].([]byte), nil }

func (t *table[T]) schema() *memdb.TableSchema {
	s := &memdb.TableSchema{Name: t.name, Indexes: map[string]*memdb.IndexSchema{
		"id": {Name: "id", Unique: true, Indexer: indexer[T]{t.key}},
	}}
	for _, ix := range t.indexes {
		s.Indexes[ix.name] = &memdb.IndexSchema{Name: ix.name, Unique: ix.unique, AllowMissing: true, Indexer: indexer[T]{ix.key}}
	}
	return s
}

// text makes an index key of a string: the final zero keeps one key from being
// the prefix of another.
func text(s string) []byte {
	if s == "" {
		return nil
	}
	return append([]byte(s), 0)
}

var marshal = proto.MarshalOptions{Deterministic: true}

// encode returns revision and record of the row.
func (t *table[T]) encode(row *T) []byte {
	m := t.record(row)
	b := binary.BigEndian.AppendUint64(make([]byte, 0, 8+proto.Size(m)), *t.revision(row))
	b, err := marshal.MarshalAppend(b, m)
	if err != nil {
		// Texts were decoded from protobuf, which refuses what is not UTF-8.
		panic("state: " + t.name + " row does not encode: " + err.Error())
	}
	return b
}

func (t *table[T]) decode(b []byte) (*T, error) {
	if len(b) < 8 {
		return nil, fault.New(fault.Internal, "state.Restore", "a %s row has %d bytes, fewer than its revision's 8", t.name, len(b))
	}
	row, err := t.row(b[8:])
	if err != nil {
		return nil, err
	}
	*t.revision(row) = binary.BigEndian.Uint64(b)
	return row, nil
}

// rowHash is the contribution of one row to the state hash.
func (t *table[T]) rowHash(encoded []byte) hash {
	h := sha256.New()
	var section [2]byte
	binary.BigEndian.PutUint16(section[:], t.section)
	h.Write(section[:])
	h.Write(encoded)
	var sum [32]byte
	return splitHash([32]byte(h.Sum(sum[:0])))
}

// hash is a sum of row hashes: order does not matter, and a row can be taken
// out again. It finds servers that disagree; it is no defence against forgery.
type hash [4]uint64

func splitHash(b [32]byte) (h hash) {
	for i := range h {
		h[i] = binary.BigEndian.Uint64(b[i*8:])
	}
	return h
}

func (h hash) bytes() (b [32]byte) {
	for i, v := range h {
		binary.BigEndian.PutUint64(b[i*8:], v)
	}
	return b
}

func (h hash) add(o hash) hash {
	for i := range h {
		h[i] += o[i]
	}
	return h
}

func (h hash) sub(o hash) hash {
	for i := range h {
		h[i] -= o[i]
	}
	return h
}

// get returns the row that an index finds under key, or nil.
func get[T any](txn *memdb.Txn, t *table[T], indexName string, key []byte) *T {
	if len(key) == 0 {
		return nil
	}
	raw, err := txn.First(t.name, indexName, key)
	if err != nil {
		panic("state: index " + t.name + "." + indexName + ": " + err.Error()) // a wrong index name
	}
	if raw == nil {
		return nil
	}
	return raw.(*T)
}

// each calls fn for every row that an index finds under a prefix of keys, in
// key order, until fn returns false.
func each[T any](txn *memdb.Txn, t *table[T], indexName string, prefix []byte, fn func(*T) bool) {
	it, err := txn.Get(t.name, indexName+"_prefix", prefix)
	if err != nil {
		panic("state: index " + t.name + "." + indexName + ": " + err.Error())
	}
	for raw := it.Next(); raw != nil; raw = it.Next() {
		if !fn(raw.(*T)) {
			return
		}
	}
}

// all returns copies of pointers to every row in key order. Rows are immutable.
func all[T any](txn *memdb.Txn, t *table[T]) []*T {
	var out []*T
	each(txn, t, "id", nil, func(row *T) bool { out = append(out, row); return true })
	return out
}

// put stores row, which nobody may change afterwards, as of the entry that is
// being applied.
func put[T any](a *applier, t *table[T], row *T) error {
	old := get(a.txn, t, "id", t.key(row))
	if old == nil {
		if a.progress.counts[t.section] >= t.maxRows {
			return fault.New(fault.Exhausted, op, "the cluster holds %d rows of %s, its limit: remove some first", t.maxRows, t.name)
		}
		a.progress.counts[t.section]++
	}
	*t.revision(row) = a.index
	if !t.unhashed {
		if old != nil {
			a.progress.hash = a.progress.hash.sub(t.rowHash(t.encode(old)))
		}
		a.progress.hash = a.progress.hash.add(t.rowHash(t.encode(row)))
	}
	if t.inViews || t.moves != nil && t.moves(a, old, row) {
		a.progress.viewIndex = a.index
	}
	if err := a.txn.Insert(t.name, row); err != nil {
		panic("state: insert into " + t.name + ": " + err.Error()) // a schema mistake
	}
	return nil
}

// remove deletes a row that exists.
func remove[T any](a *applier, t *table[T], row *T) {
	a.progress.counts[t.section]--
	if !t.unhashed {
		a.progress.hash = a.progress.hash.sub(t.rowHash(t.encode(row)))
	}
	if t.inViews {
		a.progress.viewIndex = a.index
	}
	if err := a.txn.Delete(t.name, row); err != nil {
		panic("state: delete from " + t.name + ": " + err.Error())
	}
}

// same reports whether two rows differ in nothing but their revision. A
// proposal whose outcome was unknown can therefore be repeated.
func same[T any](t *table[T], a, b *T) bool {
	return string(t.encode(a)[8:]) == string(t.encode(b)[8:])
}

// StaleError is the cause of a Conflict: the row was changed since it was read.
type StaleError struct{ Revision uint64 } // of the change that came between

// Error implements error.
func (e *StaleError) Error() string { return "changed by entry " + strconv.FormatUint(e.Revision, 10) }

// checkRevision compares the revision a change was made from with the row's.
func checkRevision[T any](t *table[T], what string, old *T, expect uint64) error {
	switch {
	case old == nil && expect != 0:
		return fault.New(fault.NotFound, op, "%s does not exist any more", what)
	case old != nil && expect == 0:
		return fault.New(fault.Exists, op, "%s exists already: change it, or choose another name", what)
	case old != nil && *t.revision(old) != expect:
		e := fault.New(fault.Conflict, op, "%s was changed meanwhile: it is at revision %d, the change was made from %d; read it again and repeat", what, *t.revision(old), expect)
		e.Cause = &StaleError{Revision: *t.revision(old)}
		return e
	}
	return nil
}
