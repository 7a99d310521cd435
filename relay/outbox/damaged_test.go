package outbox

import (
	"bytes"
	"context"
	"testing"

	"github.com/relais-mta/relais/relay/store"
)

// keys returns the keys of the stored runs, in order.
func (b *box) keys() (keys [][]byte) {
	b.t.Helper()
	snap := b.st.Snapshot()
	defer snap.Close()
	err := snap.Iterate([]byte{store.SpaceOutbox}, nil, true, func(k, _ []byte) bool {
		keys = append(keys, bytes.Clone(k))
		return true
	})
	if err != nil {
		b.t.Fatal(err)
	}
	return keys
}

// put writes a record as damage leaves it; nil: it is gone.
func (b *box) put(key, value []byte) {
	b.t.Helper()
	batch := b.st.NewBatch()
	if value == nil {
		batch.Delete(key)
	} else {
		batch.Set(key, value)
	}
	if err := b.st.Commit(context.Background(), batch); err != nil {
		b.t.Fatal(err)
	}
}

func (b *box) value(key []byte) []byte {
	b.t.Helper()
	value, err := b.st.Get(key, nil)
	if err != nil {
		b.t.Fatal(err)
	}
	return value
}

// TestDamageCostsOnlyTheEventsThatItHit: the outbox opens with each of its records
// damaged, goes on with numbers that were not used, and gives all other events with a
// gap for those that are lost.
func TestDamageCostsOnlyTheEventsThatItHit(t *testing.T) {
	for _, c := range []struct {
		name  string
		do    func(b *box, keys [][]byte)
		lost  int    // events
		trims uint64 // what was uploaded before
	}{
		{"the newest run", func(b *box, keys [][]byte) { b.put(keys[3], []byte("nonsense")) }, 10, 0},
		{"a run in between", func(b *box, keys [][]byte) { b.put(keys[1], []byte{runVersion + 9}) }, 10, 0},
		{"a run cut short", func(b *box, keys [][]byte) {
			v := b.value(keys[1])
			b.put(keys[1], v[:len(v)-3])
		}, 1, 0},
		{"an event in a run", func(b *box, keys [][]byte) {
			v := b.value(keys[2])
			_, rest, _ := nextEvent(v[runHeaderBytes:])
			clear(v[len(v)-len(rest)+2 : len(v)-len(rest)+20])
			b.put(keys[2], v)
		}, 9, 0},
		{"a run that is missing", func(b *box, keys [][]byte) { b.put(keys[1], nil) }, 10, 0},
		{"the outbox's record", func(b *box, _ [][]byte) { b.put(store.KeyOutbox, []byte{7}) }, 0, 5},
		{"all runs and the outbox's record", func(b *box, keys [][]byte) {
			for _, key := range keys {
				b.put(key, []byte{0})
			}
			b.put(store.KeyOutbox, []byte{7})
		}, 40, 0},
		{"a key of another length", func(b *box, keys [][]byte) { b.put(append(bytes.Clone(keys[3]), 1, 2), []byte{7}) }, 0, 0},
	} {
		t.Run(c.name, func(t *testing.T) {
			b := &box{t: t, dir: t.TempDir(), max: 1 << 30}
			b.open()
			for range 4 {
				b.write(10)
			}
			if c.trims > 0 {
				if err := b.ob.Trim(c.trims); err != nil {
					t.Fatal(err)
				}
			}
			last := b.ob.Last()
			c.do(b, b.keys())
			b.close()
			b.open()
			defer b.close()
			b.write(5)
			if n := b.ob.Last(); n < last+5 {
				t.Errorf("the newest number is %d, and was %d before: some are used again", n, last)
			}
			events, gap := b.readAll(c.trims)
			if want := 45 - c.lost - int(c.trims); events != want || gap < uint64(c.lost) || c.lost == 0 && gap != 0 {
				t.Errorf("%d events and a gap of %d, want %d and one of %d at least", events, gap, want, c.lost)
			}
			if s := b.ob.Stats(); s.Bytes < 0 || s.Bytes > 1<<20 {
				t.Errorf("it is said to hold %d bytes", s.Bytes)
			}
			if err := b.ob.Trim(b.ob.Last()); err != nil {
				t.Fatal(err)
			}
			if events, _ := b.readAll(b.ob.Last()); events != 0 || b.ob.Stats().Bytes != 0 {
				t.Errorf("after all were uploaded: %d events, %+v", events, b.ob.Stats())
			}
		})
	}
}
