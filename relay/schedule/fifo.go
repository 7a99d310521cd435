package schedule

// fifo is a queue on a slice whose front is reused.
type fifo[T comparable] struct {
	items []T
	head  int
}

func (f *fifo[T]) len() int { return len(f.items) - f.head }

func (f *fifo[T]) push(x T) {
	if f.head > 0 && len(f.items) == cap(f.items) {
		n := copy(f.items, f.items[f.head:])
		clear(f.items[n:])
		f.items, f.head = f.items[:n], 0
	}
	f.items = append(f.items, x)
}

// drop takes x out wherever it stands.
func (f *fifo[T]) drop(x T) {
	for i := f.head; i < len(f.items); i++ {
		if f.items[i] == x {
			f.items = append(f.items[:i], f.items[i+1:]...)
			return
		}
	}
}

// first returns the front without taking it.
func (f *fifo[T]) first() (x T, ok bool) {
	if f.len() == 0 {
		return x, false
	}
	return f.items[f.head], true
}

func (f *fifo[T]) pop() (T, bool) {
	var zero T
	if f.len() == 0 {
		return zero, false
	}
	x := f.items[f.head]
	f.items[f.head] = zero
	f.head++
	if f.head == len(f.items) {
		f.items, f.head = f.items[:0], 0
	}
	return x, true
}

// standing is where something stands in a waitlist.
type standing uint8

const (
	nowhere standing = iota
	ordinary
	urgent
)

// waiter is something that can stand in one waitlist.
type waiter interface {
	comparable
	standing() *standing
}

// urgentRun is how many urgent ones go before one ordinary one that waits.
const urgentRun = 4

// waitlist holds those that wait for room in a limit of the whole relay. Those
// with transactional mail go first, but not for ever.
type waitlist[T waiter] struct {
	lists [2]fifo[T] // ordinary, urgent
	run   int
	count [2]int // entries that are no left-overs
}

func (w *waitlist[T]) len() int { return w.count[0] + w.count[1] }

// push puts x at the end, or moves it to the urgent ones.
func (w *waitlist[T]) push(x T, hurry bool) {
	at := x.standing()
	want := ordinary
	if hurry {
		want = urgent
	}
	if *at >= want {
		return
	}
	w.leave(x)
	*at = want
	w.lists[want-ordinary].push(x)
	w.count[want-ordinary]++
}

// leave takes x out; its entry is dropped when it is reached.
func (w *waitlist[T]) leave(x T) {
	if at := x.standing(); *at != nowhere {
		w.count[*at-ordinary]--
		*at = nowhere
	}
}

func (w *waitlist[T]) pop() (x T, ok bool) {
	kind := urgent
	if w.count[1] == 0 || w.run >= urgentRun && w.count[0] > 0 {
		kind = ordinary
	}
	w.run++
	if kind == ordinary {
		w.run = 0
	}
	for w.count[kind-ordinary] > 0 {
		x, _ = w.lists[kind-ordinary].pop()
		if *x.standing() == kind {
			w.leave(x)
			return x, true
		}
	}
	return x, false
}
