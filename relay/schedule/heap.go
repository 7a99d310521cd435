package schedule

import (
	"time"
)

// timed is something with one place in one heap.
type timed interface {
	comparable
	slot() *slot
}

// slot is a place in a timerHeap: at most one time per thing.
type slot struct {
	at    time.Time
	seq   uint64 // equal times leave in order of arrival
	index int    // 1-based; 0: not in the heap
}

// timerHeap is a binary heap of things by time, with removal.
type timerHeap[T timed] struct {
	items []T
	seq   uint64
}

func (h *timerHeap[T]) next() time.Time {
	if len(h.items) == 0 {
		return time.Time{}
	}
	return h.items[0].slot().at
}

// set places x at the time, replacing its earlier one.
func (h *timerHeap[T]) set(x T, at time.Time) {
	sl := x.slot()
	h.seq++
	sl.at, sl.seq = at, h.seq
	if sl.index == 0 {
		h.items = append(h.items, x)
		sl.index = len(h.items)
	}
	h.down(h.up(sl.index - 1))
}

// remove takes x out if it is in.
func (h *timerHeap[T]) remove(x T) {
	i := x.slot().index - 1
	if i < 0 {
		return
	}
	last := len(h.items) - 1
	h.swap(i, last)
	var zero T
	h.items[last] = zero
	h.items = h.items[:last]
	x.slot().index = 0
	if i < last {
		h.down(h.up(i))
	}
}

// popDue removes and returns the first thing whose time has come.
func (h *timerHeap[T]) popDue(now time.Time) (T, bool) {
	var zero T
	if len(h.items) == 0 || h.items[0].slot().at.After(now) {
		return zero, false
	}
	x := h.items[0]
	h.remove(x)
	return x, true
}

func (h *timerHeap[T]) less(i, j int) bool {
	a, b := h.items[i].slot(), h.items[j].slot()
	if a.at.Equal(b.at) {
		return a.seq < b.seq
	}
	return a.at.Before(b.at)
}

func (h *timerHeap[T]) swap(i, j int) {
	h.items[i], h.items[j] = h.items[j], h.items[i]
	h.items[i].slot().index, h.items[j].slot().index = i+1, j+1
}

func (h *timerHeap[T]) up(i int) int {
	for i > 0 && h.less(i, (i-1)/2) {
		h.swap(i, (i-1)/2)
		i = (i - 1) / 2
	}
	return i
}

func (h *timerHeap[T]) down(i int) {
	for {
		c := 2*i + 1
		if c >= len(h.items) {
			return
		}
		if c+1 < len(h.items) && h.less(c+1, c) {
			c++
		}
		if !h.less(c, i) {
			return
		}
		h.swap(i, c)
		i = c
	}
}
