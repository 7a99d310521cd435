package engine

import (
	"container/list"
	"sync"
	"time"

	"github.com/relais-mta/relais/shared/ids"
	"github.com/relais-mta/relais/shared/policy"
)

// maxNoticeSenders bounds the senders whose notifications are counted. When
// there are more, the one that was told least recently begins anew.
const maxNoticeSenders = 50_000

// noticeSender is who gets notifications.
type noticeSender struct {
	tenant ids.Tenant
	sender string
}

// noticeWindow counts what was sent since a time.
type noticeWindow struct {
	since time.Time
	sent  int
}

// room reports whether another one may be sent. A window begins with the first
// notification after the last window's end, and anew if the clock went back.
func (w *noticeWindow) room(now time.Time, length time.Duration, limit int) bool {
	if age := now.Sub(w.since); age >= length || age < 0 {
		*w = noticeWindow{since: now}
	}
	return limit == 0 || w.sent < limit
}

type noticeCount struct {
	noticeSender
	hour, day noticeWindow
	full      bool // the last one was kept back
}

// noticeLimiter keeps a flood of failures from becoming a flood of mail to one
// sender, who may not even have sent it (RFC 5321 section 6.2 warns of that).
type noticeLimiter struct {
	mu      sync.Mutex
	senders map[noticeSender]*list.Element
	recent  list.List // of *noticeCount, latest first
}

// allow counts one notification and reports whether it may be sent; begins
// tells of the first one that may not.
func (l *noticeLimiter) allow(s noticeSender, now time.Time, q *policy.Queue) (ok, begins bool) {
	l.mu.Lock()
	defer l.mu.Unlock()
	c := l.count(s)
	hour, day := c.hour.room(now, time.Hour, q.NoticesPerHour), c.day.room(now, 24*time.Hour, q.NoticesPerDay)
	if !hour || !day {
		begins, c.full = !c.full, true
		return false, begins
	}
	c.hour.sent++
	c.day.sent++
	c.full = false
	return true, false
}

// count finds or makes the record of a sender.
func (l *noticeLimiter) count(s noticeSender) *noticeCount {
	if at := l.senders[s]; at != nil {
		l.recent.MoveToFront(at)
		return at.Value.(*noticeCount)
	}
	if l.senders == nil {
		l.senders = make(map[noticeSender]*list.Element)
	}
	if len(l.senders) >= maxNoticeSenders {
		oldest := l.recent.Back()
		delete(l.senders, l.recent.Remove(oldest).(*noticeCount).noticeSender)
	}
	c := &noticeCount{noticeSender: s}
	l.senders[s] = l.recent.PushFront(c)
	return c
}
