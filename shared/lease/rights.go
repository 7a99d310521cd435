package lease

import "time"

// expire is settle for who asks at each event, so that a process which was stopped
// does not go on as if nothing had been: mostly nothing has ended.
func (r *Rights) expire(now Instant) {
	if r.leased && now >= r.stop || !r.soft && now >= r.floorUntil {
		r.settle(now)
	}
}

// settle ends what has ended by now, as of the instant at which it ended.
func (r *Rights) settle(now Instant) {
	if r.leased && now >= r.stop {
		r.leased = false
		r.refill(r.stop)
	}
	if !r.floor.zero() && !r.soft && now >= r.floorUntil {
		r.former, r.floor = r.floor, Share{}
		r.refill(max(r.floorUntil, r.stop))
	}
}

// refill gives the bucket the rate that holds from an instant on.
func (r *Rights) refill(at Instant) {
	if r.kind == Rate {
		r.bucket.set(at, r.now(), r.per)
	}
}

// now is what may be used, as of the last settle.
func (r *Rights) now() Share {
	if r.leased {
		return r.share.add(r.floor)
	}
	return r.floor
}

// Usable returns what may be used at an instant: the ceiling while its lease
// lasts, and the floor.
func (r *Rights) Usable(now Instant) Share {
	r.settle(now)
	return r.now()
}

// Take starts n events of a rate. If they may not start it returns how long to
// wait, as things are; negative if only a grant can help.
func (r *Rights) Take(now Instant, n int64) (bool, time.Duration) {
	r.expire(now)
	ok, wait := r.bucket.take(now, n)
	if ok {
		r.used += max(n, 0)
	} else {
		r.denied++
	}
	return ok, wait
}

// Open takes a slot, if one is free.
func (r *Rights) Open(now Instant) bool {
	r.settle(now)
	if r.open >= r.now().Amount {
		r.denied++
		return false
	}
	r.open++
	r.used++
	return true
}

// Close gives a slot back.
func (r *Rights) Close() {
	if r.open > r.now().Amount {
		r.h.confirm = true // somebody else waits for it
	}
	r.open = max(0, r.open-1)
}

// Opened returns how many slots are taken.
func (r *Rights) Opened() int64 { return r.open }

// Excess returns how many slots must be given back: soon, idle ones at once and
// others after what they do now; and of those, at once whatever they do, for what
// allowed them ended a linger ago.
func (r *Rights) Excess(now Instant) (soon, atOnce int64) {
	r.settle(now)
	soon = max(0, r.open-r.now().Amount)
	if !r.leased && now >= r.until.Add(r.h.cfg.Linger) {
		allowed := r.floor.Amount
		if allowed == 0 && now < r.floorUntil.Add(r.h.cfg.Linger) {
			allowed = r.former.Amount
		}
		atOnce = max(0, r.open-allowed)
	}
	return soon, atOnce
}

// CloseBy returns the next instant after now at which Excess may have slots closed
// whatever they do, if nothing is granted before, or 0. The caller must be there
// in time, for the leader waits little longer.
func (r *Rights) CloseBy(now Instant) Instant {
	a, b := r.until.Add(r.h.cfg.Linger), r.floorUntil.Add(r.h.cfg.Linger)
	switch {
	case a > now && (b <= now || a <= b):
		return a
	case b > now:
		return b
	}
	return 0
}

// held is the largest amount that the relay may be using beyond its floor: of
// slots also those that are open although they were taken away. So a ceiling
// falls no lower than what is true.
func (r *Rights) held() int64 {
	held := int64(0)
	if r.leased {
		held = r.share.Amount
	}
	if r.kind == Slots {
		held = max(held, r.open-r.floor.Amount)
	}
	return held
}

// Limit returns the number of the limit.
func (r *Rights) Limit() LimitID { return r.limit }

// Lease returns what is leased beyond the floor and until when, and the floor.
func (r *Rights) Lease() (share Share, until Instant, floor Share) {
	if !r.leased {
		return Share{}, 0, r.floor
	}
	return r.share, r.until, r.floor
}

// Stamp returns the stamp of the last grant that counts.
func (r *Rights) Stamp() Stamp { return r.stamp }
