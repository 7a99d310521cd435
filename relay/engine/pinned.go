package engine

import (
	"net/netip"
	"time"

	"github.com/relais-mta/relais/relay/queue"
	"github.com/relais-mta/relais/relay/schedule"
)

// maxPinnedPerLane bounds the work that waits for one particular source. What
// is beyond goes through whichever source is free: a greylisting peer then
// merely starts its clock again.
const maxPinnedPerLane = 256

// firstPinned begins the numbers of pinned queues, which the queue's own
// numbers stay below.
const firstPinned = schedule.Queue(1 << 31)

// pinnedKey is a lane together with what waits for it.
type pinnedKey struct {
	lane  schedule.Lane
	queue queue.Number
}

// pinnedQueue holds work that was taken for one lane and belongs to another,
// because a greylisting peer wants to see it from the same address again.
type pinnedQueue struct {
	key  pinnedKey
	work []*queue.Work
}

// pin moves work to the lane of its sticky source if that is another one than
// the given and still usable; the work is loaded. e.mu is held.
func (e *Engine) pin(w *queue.Work, lane schedule.Lane, now time.Time) bool {
	sticky := w.Recipients[0].State.Sticky
	if !sticky.IsValid() || !now.Before(w.Env.ExpiresAt) {
		return false
	}
	id, ok := e.sourceAt(sticky, w)
	if !ok || id == lane.Source {
		return false
	}
	key := pinnedKey{lane: schedule.Lane{Source: id, Provider: lane.Provider}, queue: w.Queue}
	n, ok := e.pinnedBy[key]
	if !ok {
		if e.lastPin < firstPinned {
			e.lastPin = firstPinned
		}
		e.lastPin++
		n = e.lastPin
		e.pinnedBy[key] = n
		e.pinned[n] = &pinnedQueue{key: key}
	}
	p := e.pinned[n]
	if len(p.work) >= maxPinnedPerLane {
		return false
	}
	p.work = append(p.work, w)
	e.pinnedWork.Add(1)
	e.setPinnedHead(n, p, now)
	return true
}

// sourceAt finds the usable source of the work's pool with the bind address.
func (e *Engine) sourceAt(addr netip.Addr, w *queue.Work) (id sourceID, ok bool) {
	dir := e.cfg.Directory()
	if dir == nil {
		return id, false
	}
	for _, s := range dir.LocalSources(w.Key.Pool) {
		if s.Bind == addr && e.cfg.Egress.Usable(s.ID) {
			return s.ID, true
		}
	}
	return id, false
}

func (e *Engine) takePinned(n schedule.Queue, p *pinnedQueue, now time.Time) *queue.Work {
	if len(p.work) == 0 {
		return nil
	}
	w := p.work[0]
	p.work[0] = nil
	p.work = p.work[1:]
	e.pinnedWork.Add(-1)
	e.setPinnedHead(n, p, now)
	return w
}

// setPinnedHead reports a pinned queue to the scheduler and drops an empty one.
func (e *Engine) setPinnedHead(n schedule.Queue, p *pinnedQueue, now time.Time) {
	if len(p.work) == 0 {
		e.sched.SetHead(n, schedule.Key{}, time.Time{}, 0, now)
		delete(e.pinned, n)
		delete(e.pinnedBy, p.key)
		return
	}
	e.sched.SetPinnedHead(n, scheduleKey(&p.work[0].Key), p.key.lane, now, len(p.work), now)
}

// unpinAll gives pinned work back to the queue, for when sources changed.
// e.mu is held; the returned work must be given back after it was released.
func (e *Engine) unpinAll(now time.Time) []*queue.Work {
	var back []*queue.Work
	for n, p := range e.pinned {
		back = append(back, p.work...)
		p.work = nil
		e.setPinnedHead(n, p, now)
	}
	e.pinnedWork.Store(0)
	return back
}

// unpinOverdue gives pinned work back whose deadline has passed, so that it ends:
// what holds its lane may last. It takes the lock only if anything is pinned.
func (e *Engine) unpinOverdue(now time.Time) {
	if e.pinnedWork.Load() == 0 || !e.cfg.ClockTrusted() {
		return
	}
	var back []*queue.Work
	e.mu.Lock()
	for n, p := range e.pinned {
		var left []*queue.Work
		for _, w := range p.work {
			if now.Before(w.Env.ExpiresAt) {
				left = append(left, w)
			} else {
				back = append(back, w)
			}
		}
		if len(left) < len(p.work) {
			p.work = left
			e.setPinnedHead(n, p, now)
		}
	}
	e.pinnedWork.Add(int64(-len(back)))
	e.mu.Unlock()
	for _, w := range back {
		e.queue.Return(w)
	}
}
