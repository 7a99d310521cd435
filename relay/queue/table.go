package queue

import (
	"math"

	"github.com/relais-mta/relais/relay/store"
	"github.com/relais-mta/relais/shared/fault"
	"github.com/relais-mta/relais/shared/ids"
)

// maxAdoptLooks bounds the mail of a work queue that is asked what the queue stands
// for, when its record does not say so: the first that can be read knows.
const maxAdoptLooks = 64

// loadTable reads the names of the work queues. Their heads come later.
func (q *Queue) loadTable(snap *store.Snapshot) error {
	var lost []Number
	err := snap.Iterate([]byte{store.SpaceQueue}, nil, false, func(k, v []byte) bool {
		number, ok := store.ParseQueueKey(k)
		if !ok {
			return true // it names no queue, and no release writes it: the check says so
		}
		q.useNumber(Number(number))
		key, floor, err := parseQueue(v)
		if err != nil {
			lost = append(lost, Number(number))
			return true
		}
		wq := &workQueue{number: Number(number), key: key, stored: true, floor: q.soundFloor(floor)}
		wq.end = pos{due: wq.floor}
		q.byKey[key], q.byNumber[wq.number] = wq, wq
		return true
	})
	if err == nil {
		err = q.passWaitingNumbers(snap)
	}
	for _, n := range lost {
		q.badRecord(QueueDamaged, "that of a work queue; its mail says what it stands for", "queue", n)
		if err == nil {
			err = q.adopt(snap, n)
		}
	}
	if err != nil {
		return err
	}
	value, err := snap.Get(store.KeyDeadlines, nil)
	if fault.Is(err, fault.NotFound) {
		return nil
	}
	if err == nil {
		q.deadlines.floor = q.soundFloor(parseFloor(value))
		q.deadlines.end = pos{due: q.deadlines.floor}
	}
	return err
}

// useNumber gives a number to no other work queue.
func (q *Queue) useNumber(n Number) {
	if n < math.MaxUint32 { // what is there is not from here, and the next would be 0
		q.nextNumber = max(q.nextNumber, n+1)
	}
}

// passWaitingNumbers keeps the number of a work queue whose record is lost from being
// given to another one: its mail would be taken for mail of that domain and go to its
// hosts.
func (q *Queue) passWaitingNumbers(snap *store.Snapshot) error {
	key, _, err := snap.Last([]byte{store.SpaceWaiting}, nil)
	if n, _, _, _, ok := store.ParseWaitingKey(key); err == nil && ok {
		q.useNumber(Number(n))
	}
	return err
}

// soundFloor is a stored floor, or the beginning of time instead of one that cannot
// be: a floor lies ten minutes before the moment at which it is written. A clock
// that was set back looks the same, and reading from the beginning is always right.
func (q *Queue) soundFloor(floor int64) int64 {
	if floor < 0 || floor > q.nowMS() {
		return 0
	}
	return floor
}

// adopt finds out what a work queue without a readable record stands for: what its
// mail says, if no other queue stands for that. Otherwise its mail waits for the
// repair, which moves it. The record is written again with the next mail.
func (q *Queue) adopt(snap *store.Snapshot, n Number) error {
	var inner error
	looked := 0
	var last ids.Message
	err := snap.Iterate(store.AppendWaitingPrefix(nil, uint32(n)), nil, true, func(k, _ []byte) bool {
		_, _, id, index, ok := store.ParseWaitingKey(k)
		if !ok || looked > 0 && id == last {
			return true
		}
		last = id
		if looked++; looked > maxAdoptLooks {
			return false
		}
		read, err := q.readMessage(id, nil)
		if err != nil || int(index) >= len(read.env.Recipients) {
			inner = notOfOthers(err)
			return inner == nil
		}
		q.mu.Lock()
		defer q.mu.Unlock()
		key := keyOf(read.env, int(index))
		if q.byKey[key] == nil && q.byNumber[n] == nil {
			wq := &workQueue{number: n, key: key}
			q.byKey[key], q.byNumber[n] = wq, wq
		}
		return false
	})
	if err == nil {
		err = inner
	}
	return err
}

// notOfOthers leaves of the errors of reading one message those that are about more
// than that message.
func notOfOthers(err error) error {
	if fault.Is(err, fault.Invalid) || fault.Is(err, fault.NotFound) {
		return nil
	}
	return err
}
