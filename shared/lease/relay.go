package lease

import "time"

// Peek answers as Take does, and takes and counts nothing.
func (r *Rights) Peek(now Instant, n int64) (bool, time.Duration) {
	r.expire(now)
	return r.bucket.peek(now, n)
}

// Start starts n events that Peek has just allowed at the same instant: who needs
// rights under several limits asks all of them first, and takes then.
func (r *Rights) Start(now Instant, n int64) {
	r.bucket.start(now, n)
	r.used += n
}

// Ends returns the instant at which what may be used becomes less if nothing is
// granted before, or 0.
func (r *Rights) Ends(now Instant) Instant {
	r.settle(now)
	end := Instant(0)
	if r.leased {
		end = r.stop
	}
	if !r.floor.zero() && !r.soft && (end == 0 || r.floorUntil < end) {
		end = r.floorUntil
	}
	return end
}

// FloorEnds returns when the floor ends by itself; meaningless without one.
func (r *Rights) FloorEnds() Instant { return r.floorUntil }

// Config returns the lengths of time in use.
func (h *Holder) Config() Config { return h.cfg }

// Soon has the next report sent at once: a leader is heard that may know nothing
// of this relay.
func (h *Holder) Soon() { h.confirm = true }

// Configure changes the lengths of time. What was granted under a longer TTL ends
// by the new one, counted from now.
func (h *Holder) Configure(now Instant, cfg Config) {
	if cfg == h.cfg {
		return
	}
	h.cfg = cfg
	for _, r := range h.rights {
		r.settle(now)
		if end := now.Add(cfg.TTL); r.until > end {
			r.until = end
		}
		r.stop = r.until.Add(-cfg.Guard)
		if end := now.Add(cfg.FloorTTL); r.floorUntil > end {
			r.floorUntil = end
		}
	}
}

// Known reports whether the relay has rights under a limit, or had.
func (h *Holder) Known(id LimitID) bool {
	_, found := h.find(id)
	return found
}
