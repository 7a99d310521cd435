package queue

import (
	"bytes"
	"slices"
	"sort"

	"github.com/relais-mta/relais/shared/ids"
)

// pos is a place in a work queue: the order in which recipients become due.
type pos struct {
	due   int64 // Unix milliseconds
	id    ids.Message
	index uint16
}

func (p pos) less(o pos) bool {
	if p.due != o.due {
		return p.due < o.due
	}
	if c := bytes.Compare(p.id[:], o.id[:]); c != 0 {
		return c < 0
	}
	return p.index < o.index
}

// next is the place right behind p.
func (p pos) next() pos {
	if p.index < 1<<16-1 {
		p.index++
		return p
	}
	p.index = 0
	for i := len(p.id) - 1; i >= 0; i-- {
		if p.id[i]++; p.id[i] != 0 {
			return p
		}
	}
	p.due++
	return p
}

// item is a waiting recipient in memory.
type item struct {
	pos
	fresh bool     // as it was accepted: no state is stored
	msg   *message // nil: to be read from disk when it is taken
}

// chunkItems is the size of a window's pieces: small enough to insert by
// copying, large enough to keep the list of pieces short.
const chunkItems = 128

// window is an ordered set of waiting recipients in memory. Most mail is
// appended at its end and taken from its front, and both are cheap.
type window struct {
	chunks [][]item
	n      int
}

func (w *window) len() int { return w.n }

// chunkFor returns the chunk that p belongs into.
func (w *window) chunkFor(p pos) int {
	c := sort.Search(len(w.chunks), func(i int) bool {
		last := w.chunks[i][len(w.chunks[i])-1].pos
		return !last.less(p)
	})
	return min(c, len(w.chunks)-1)
}

func place(chunk []item, p pos) (at int, found bool) {
	at = sort.Search(len(chunk), func(i int) bool { return !chunk[i].less(p) })
	return at, at < len(chunk) && chunk[at].pos == p
}

// insert adds it and reports false if its place is taken.
func (w *window) insert(it item) bool {
	if len(w.chunks) == 0 {
		w.chunks = append(w.chunks, append(make([]item, 0, 4), it))
		w.n++
		return true
	}
	c := w.chunkFor(it.pos)
	chunk := w.chunks[c]
	at, found := place(chunk, it.pos)
	if found {
		return false
	}
	w.n++
	if len(chunk) < chunkItems {
		w.chunks[c] = slices.Insert(chunk, at, it)
		return true
	}
	if at == len(chunk) && c == len(w.chunks)-1 {
		w.chunks = append(w.chunks, append(make([]item, 0, chunkItems), it))
		return true
	}
	upper := append(make([]item, 0, chunkItems), chunk[chunkItems/2:]...)
	clear(chunk[chunkItems/2:])
	chunk = chunk[:chunkItems/2]
	if at <= len(chunk) {
		chunk = slices.Insert(chunk, at, it)
	} else {
		upper = slices.Insert(upper, at-len(chunk), it)
	}
	w.chunks[c] = chunk
	w.chunks = slices.Insert(w.chunks, c+1, upper)
	return true
}

// first returns the earliest item; the window must not be empty.
func (w *window) first() *item { return &w.chunks[0][0] }

func (w *window) popFirst() item {
	it := w.chunks[0][0]
	w.chunks[0][0] = item{}
	w.chunks[0] = w.chunks[0][1:]
	w.n--
	if len(w.chunks[0]) == 0 {
		w.dropChunk(0)
	}
	return it
}

func (w *window) dropChunk(c int) {
	if c == 0 {
		w.chunks[0] = nil
		w.chunks = w.chunks[1:] // popping from the front must not move the rest
	} else {
		w.chunks = slices.Delete(w.chunks, c, c+1)
	}
	if len(w.chunks) == 0 {
		w.chunks = nil
	}
}

// find returns the item at p, nil if there is none. It is valid until the
// window changes.
func (w *window) find(p pos) *item {
	if w.n == 0 {
		return nil
	}
	chunk := w.chunks[w.chunkFor(p)]
	if at, found := place(chunk, p); found {
		return &chunk[at]
	}
	return nil
}

// remove takes the item at p out.
func (w *window) remove(p pos) (item, bool) {
	if w.n == 0 {
		return item{}, false
	}
	c := w.chunkFor(p)
	at, found := place(w.chunks[c], p)
	if !found {
		return item{}, false
	}
	it := w.chunks[c][at]
	w.chunks[c] = slices.Delete(w.chunks[c], at, at+1)
	w.n--
	if len(w.chunks[c]) == 0 {
		w.dropChunk(c)
	}
	return it, true
}

// shrink keeps about the first keep items, calls drop for the others and
// returns the place of the first dropped one.
func (w *window) shrink(keep int, drop func(item)) (end pos, dropped bool) {
	seen := 0
	for c, chunk := range w.chunks {
		if seen+len(chunk) <= keep {
			seen += len(chunk)
			continue
		}
		at := keep - seen
		end = chunk[at].pos
		for _, it := range chunk[at:] {
			drop(it)
		}
		for _, later := range w.chunks[c+1:] {
			for _, it := range later {
				drop(it)
			}
		}
		clear(chunk[at:])
		clear(w.chunks[c+1:])
		w.chunks = w.chunks[:c+1]
		w.chunks[c] = slices.Clone(chunk[:at])
		w.n = keep
		if at == 0 {
			w.chunks = w.chunks[:c]
		}
		if len(w.chunks) == 0 {
			w.chunks = nil
		}
		return end, true
	}
	return end, false
}
