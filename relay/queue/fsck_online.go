package queue

import (
	"context"
	"time"

	"github.com/relais-mta/relais/shared/fault"
)

// onlineShare is the part of one processor that a check beside the mail takes at
// most: one in so many.
const onlineShare = 2

// Online says how to check the queue while it is open.
type Online struct {
	Bodies   bool            // read every body and compare its checksum
	Report   func(Finding)   // each finding as it is made
	Progress func(FsckCount) // now and then; nil: nobody cares
}

// FsckOnline is Fsck for the open queue: it reads one snapshot, in which every
// commit is there as a whole or not at all, repairs nothing, and leaves half of a
// processor to the mail. It ends with ctx and with the queue. One runs at a time;
// a second one is a Conflict.
func (q *Queue) FsckOnline(ctx context.Context, o Online) (FsckCount, error) {
	const op = "queue.FsckOnline"
	if !q.checking.CompareAndSwap(false, true) {
		return FsckCount{}, fault.New(fault.Conflict, op, "another check of the queue is under way: wait for its end")
	}
	defer q.checking.Store(false)
	q.mu.Lock()
	if q.closed {
		q.mu.Unlock()
		return FsckCount{}, errClosing
	}
	q.done.Add(1)
	q.mu.Unlock()
	defer q.done.Done()
	timer := time.NewTimer(0)
	defer timer.Stop()
	rest := func(since time.Time) {
		timer.Reset((onlineShare - 1) * time.Since(since))
		select {
		case <-timer.C:
		case <-q.stop:
		case <-ctx.Done():
		}
	}
	return Fsck(ctx, q.st, FsckConfig{
		Bodies: o.Bodies, Events: true, Live: true, Now: q.cfg.Now, Logger: q.log, Report: o.Report, Progress: o.Progress, Rest: rest, stop: q.stop,
	})
}
