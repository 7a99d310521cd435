package throttle

import "time"

// Scope says who is counted together under a limit.
type Scope uint8

// The scopes, the smallest first: in this order limits are asked, so that who is
// refused hears of the limit next to it.
const (
	ScopeSource Scope = iota + 1
	ScopePool
	ScopeRelay
	ScopeDomain
	ScopeTenant
	ScopeProvider // across the cluster
)

var scopeNames = [...]string{"", "source", "pool", "relay", "domain", "tenant", "provider"}

// String returns the name used in policy and on the command line.
func (s Scope) String() string {
	if int(s) < len(scopeNames) {
		return scopeNames[s]
	}
	return "scope"
}

// Kind says which limit of a gate refused.
type Kind uint8

// The kinds of limits.
const (
	Connections Kind = iota + 1 // open or being opened
	Connects                    // opened per span
	Messages                    // begun per span
	SessionFull                 // one session carried all that it may
)

// Gate is every limit of one scope that a session or message passes. The zero Gate
// has no limit. It does not lock.
type Gate struct {
	Scope      Scope
	Slots      int // connections open or being opened at once; 0: no limit
	PerSession int // messages that one session may carry; 0: no limit
	Connects   Bucket
	Messages   Bucket

	open int
}

// Open returns how many connections are open or being opened.
func (g *Gate) Open() int { return g.open }

// Refusal says what refused, and when to ask again.
type Refusal struct {
	Scope Scope
	Kind  Kind
	// At is the earliest time at which every rate would let it pass, as things
	// are. OnClose says that a connection must be closed first: then At alone is
	// not enough, and it is zero if no rate refused.
	At      time.Time
	OnClose bool
}

// note takes up one limit's refusal. The first is the one that is named; the time
// is that of the last.
func (r *Refusal) note(g *Gate, k Kind, at time.Time) {
	if r.Kind == 0 {
		r.Scope, r.Kind = g.Scope, k
	}
	if at.After(r.At) {
		r.At = at
	}
}

// rate asks one rate for one event. A rate has a burst of one at least, so in time
// it always lets one through.
func (r *Refusal) rate(g *Gate, k Kind, b *Bucket, now time.Time, at int64) {
	if b.rate.interval == 0 {
		return
	}
	if early := b.rate.early(b.due(at), at, 1); early > 0 {
		r.note(g, k, now.Add(time.Duration(early)))
	}
}

// take takes an event that rate has allowed.
func (b *Bucket) take(at int64) {
	if b.rate.interval > 0 {
		b.next, b.last, b.set = b.due(at)+b.rate.interval, at, true
	}
}

// Connect asks every gate for a connection and takes it from all of them or from
// none. Gates come smallest scope first. A connection that was granted is open
// until Close.
func Connect(now time.Time, gates []*Gate) (ok bool, why Refusal) {
	at := now.UnixNano()
	for _, g := range gates {
		if g.Slots > 0 && g.open >= g.Slots {
			why.note(g, Connections, time.Time{})
			why.OnClose = true
		}
		why.rate(g, Connects, &g.Connects, now, at)
	}
	if why.Kind != 0 {
		return false, why
	}
	for _, g := range gates {
		g.open++
		g.Connects.take(at)
	}
	return true, Refusal{}
}

// Close gives a connection back to every gate that granted it.
func Close(gates []*Gate) {
	for _, g := range gates {
		g.open = max(0, g.open-1)
	}
}

// Begin asks every gate for one more message of a session that carried so many,
// and takes it from all of them or from none. SessionFull means that the message
// needs another session.
func Begin(now time.Time, gates []*Gate, carried int) (ok bool, why Refusal) {
	at := now.UnixNano()
	for _, g := range gates {
		if g.PerSession > 0 && carried >= g.PerSession {
			why.note(g, SessionFull, time.Time{})
		}
		why.rate(g, Messages, &g.Messages, now, at)
	}
	if why.Kind != 0 {
		return false, why
	}
	for _, g := range gates {
		g.Messages.take(at)
	}
	return true, Refusal{}
}

// Sooner returns the earlier of two times to wake up at, of which a zero one means
// that no time is known.
func Sooner(a, b time.Time) time.Time {
	if a.IsZero() || !b.IsZero() && b.Before(a) {
		return b
	}
	return a
}
