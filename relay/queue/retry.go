package queue

import (
	"encoding/binary"
	"time"

	"github.com/relais-mta/relais/shared/ids"
	"github.com/relais-mta/relais/shared/policy"
)

// lastTryMargin is how long before the deadline the last try is placed when
// the schedule would put it behind: long enough for one attempt to end.
const lastTryMargin = 2 * time.Minute

// minRetryWait is the shortest wait: no schedule may spin.
const minRetryWait = time.Second

// RetryAt returns when a message's recipients are tried again after their
// attempts-th failed attempt ended at now.
//
// The wait is policy.Retry[attempts-1], or beyond the list the last entry
// doubled once for each further attempt, at most RetryMax, moved by up to
// ± RetryJitterPercent. The jitter is a hash of message and attempt number, so
// that a batch of mail spreads out, the recipients of one message stay
// together and may share a transaction again, and a restart changes nothing.
//
// A try that would fall on or behind the deadline is moved to lastTryMargin
// before it, so that the time up to the deadline is used (RFC 5321 section
// 4.5.4.1). False: not even that
// leaves the shortest wait; nothing is tried any more.
func RetryAt(p policy.Queue, message ids.Message, attempts uint32, now, deadline time.Time) (time.Time, bool) {
	wait := retryWait(p, max(attempts, 1))
	if j := min(max(p.RetryJitterPercent, 0), 100); j > 0 {
		unit := float64(mix(message, attempts)>>11) / (1 << 53) // 0 to 1
		wait += time.Duration((2*unit - 1) * float64(j) / 100 * float64(wait))
	}
	wait = max(wait, minRetryWait)
	if at := now.Add(wait); at.Before(deadline) {
		return at, true
	}
	if last := deadline.Add(-lastTryMargin); !last.Before(now.Add(minRetryWait)) {
		return last, true
	}
	return time.Time{}, false
}

// retryWait is the wait after the attempts-th failed attempt without jitter.
func retryWait(p policy.Queue, attempts uint32) time.Duration {
	limit := p.RetryMax.D()
	if limit <= 0 {
		limit = 4 * time.Hour
	}
	if len(p.Retry) == 0 {
		return limit
	}
	if int64(attempts) <= int64(len(p.Retry)) {
		return min(p.Retry[attempts-1].D(), limit)
	}
	wait := p.Retry[len(p.Retry)-1].D()
	for range attempts - uint32(len(p.Retry)) {
		if wait >= limit/2 {
			return limit
		}
		wait = max(2*wait, minRetryWait)
	}
	return wait
}

// mix spreads message id and attempt over 64 bits (the finalizer of
// splitmix64).
func mix(id ids.Message, attempts uint32) uint64 {
	x := binary.BigEndian.Uint64(id[0:8]) ^ binary.BigEndian.Uint64(id[8:16]) + uint64(attempts)*0x9e3779b97f4a7c15
	x = (x ^ x>>30) * 0xbf58476d1ce4e5b9
	x = (x ^ x>>27) * 0x94d049bb133111eb
	return x ^ x>>31
}
