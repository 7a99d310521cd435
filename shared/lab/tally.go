package lab

import (
	"net/netip"
	"sync"
	"time"
)

const (
	maxRateMessages     = 1 << 20   // largest Limits.Messages: one timestamp each
	maxSourcesPerFarm   = 4096      // source addresses one provider keeps count of
	maxHistogramSeconds = 24 * 3600 // seconds of arrivals kept; later ones count in the last
	maxBreachesKept     = 1000      // breaches described per provider; all are counted
	maxHeloNames        = 8         // EHLO names kept per lane
	connectionGrace     = 250 * time.Millisecond
	graceSteps          = 10 // in which it is waited for
)

// LimitName names one of Limits.
type LimitName string

// The limits a source can breach.
const (
	LimitConnections LimitName = "connections"
	LimitPerConn     LimitName = "messages_per_connection"
	LimitRate        LimitName = "messages_per_window"
	LimitRecipients  LimitName = "recipients_per_transaction"
)

// Breach is one time a source went past a limit its receiver states.
type Breach struct {
	At       time.Time  `json:"at"`
	Provider string     `json:"provider"`
	Source   netip.Addr `json:"source"`
	Limit    LimitName  `json:"limit"`
	Allowed  int        `json:"allowed"`
	Seen     int        `json:"seen"`
	Window   string     `json:"window,omitempty"` // for messages_per_window
}

// lane counts what one source address does at one provider.
type lane struct {
	source netip.Addr
	start  time.Time // second 0 of arrivals

	mu          sync.Mutex
	open        int           // connections now
	left        chan struct{} // closed and replaced when a connection ends while someone waits
	waiting     int
	connections int64
	maxOpen     int
	maxPerConn  int
	accepted    int64 // messages
	recipients  int64 // recipients of accepted messages
	rejected    int64 // 5xx: recipients, or the transaction or connection refused
	deferred    int64 // 4xx, counted the same way
	dropped     int64 // connections closed by the provider without a reply
	overTLS     int64 // accepted messages that came over TLS
	begun       timeRing
	arrivals    []uint32 // accepted messages per second since start
	helo        []string
	breaches    int64
}

// timeRing holds when the last transactions were begun, as time since the
// lane's start.
type timeRing struct {
	at []time.Duration
	n  int // added so far, bounded below by what at holds
}

// last returns the n-th most recent entry (1 = newest).
func (r *timeRing) last(n int) (time.Duration, bool) {
	if n > min(r.n, len(r.at)) {
		return 0, false
	}
	return r.at[(r.n-n)%len(r.at)], true
}

// add enters a time into a ring that holds size of them. Another size than
// before keeps the most recent entries that fit.
func (r *timeRing) add(t time.Duration, size int) {
	if len(r.at) != size {
		fresh := make([]time.Duration, size)
		keep := min(size, r.n, len(r.at))
		for i := range keep {
			fresh[i], _ = r.last(keep - i)
		}
		r.at, r.n = fresh, keep
	}
	r.at[r.n%size] = t
	r.n++
}

// connect counts a connection. A client may close one connection and open the
// next before the end of the first was noticed here, so a source over its
// limit gets a moment for that before it counts as a breach.
func (l *lane) connect(limit int, done <-chan struct{}) (seen int, over bool) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.open++
	l.connections++
	if limit > 0 && l.open > limit {
		l.waitBelow(limit, done)
	}
	l.maxOpen = max(l.maxOpen, l.open)
	return l.open, limit > 0 && l.open > limit
}

// waitBelow waits, with l.mu held on entry and exit, until no more than limit
// connections are open or the grace has passed. It passes in steps: a process that
// did not run for a while finds its timers due before it sees which connections
// ended meanwhile, and a ticker counts what it slept through as one step.
func (l *lane) waitBelow(limit int, done <-chan struct{}) {
	step := time.NewTicker(connectionGrace / graceSteps)
	defer step.Stop()
	l.waiting++
	defer func() { l.waiting-- }()
	for passed := 0; l.open > limit && passed < graceSteps; {
		if l.left == nil {
			l.left = make(chan struct{})
		}
		left := l.left
		l.mu.Unlock()
		select {
		case <-left:
			l.mu.Lock()
		case <-step.C:
			l.mu.Lock()
			passed++
		case <-done:
			l.mu.Lock()
			return
		}
	}
}

func (l *lane) disconnect() {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.open--
	if l.waiting > 0 && l.left != nil {
		close(l.left)
		l.left = nil
	}
}

// begin counts a transaction and tells whether it went past the rate. A
// refused transaction does not count towards the window: a source that was
// told to wait is not punished for the asking.
func (l *lane) begin(now time.Time, lim Limits, onConnection int) (seen int, over LimitName) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if lim.MessagesPerConnection > 0 && onConnection > lim.MessagesPerConnection {
		return onConnection, LimitPerConn
	}
	if lim.Messages <= 0 {
		return 0, ""
	}
	// The Messages-th last one inside the window means this is one too many.
	at := now.Sub(l.start)
	if t, full := l.begun.last(lim.Messages); full && at-t < lim.RateWindow {
		return lim.Messages + 1, LimitRate
	}
	l.begun.add(at, lim.Messages)
	return 0, ""
}

// refuse counts recipients (or a transaction, or a connection) answered with
// a code.
func (l *lane) refuse(code byte, n int) {
	l.mu.Lock()
	defer l.mu.Unlock()
	switch code {
	case '4':
		l.deferred += int64(n)
	case '5':
		l.rejected += int64(n)
	}
}

// carried notes how many messages a connection has brought so far.
func (l *lane) carried(messages int) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.maxPerConn = max(l.maxPerConn, messages)
}

func (l *lane) drop() {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.dropped++
}

func (l *lane) greet(name string) {
	l.mu.Lock()
	defer l.mu.Unlock()
	for _, h := range l.helo {
		if h == name {
			return
		}
	}
	if len(l.helo) < maxHeloNames {
		l.helo = append(l.helo, name)
	}
}

func (l *lane) arrive(now time.Time, recipients int, tls bool) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.accepted++
	l.recipients += int64(recipients)
	if tls {
		l.overTLS++
	}
	second := min(max(int(now.Sub(l.start)/time.Second), 0), maxHistogramSeconds-1)
	for len(l.arrivals) <= second {
		l.arrivals = append(l.arrivals, 0)
	}
	l.arrivals[second]++
}

func (l *lane) countBreach() {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.breaches++
}
