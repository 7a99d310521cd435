package submission

import (
	"container/list"
	"net/netip"
	"sync"
	"time"

	"github.com/relais-mta/relais/shared/ids"
)

// Whoever guesses secrets is made to wait, and nobody else. Failures are counted
// three ways: of a client's address; of a network, because addresses are cheap
// within one; and of an account from a network, because guesses at one account
// are worth more. An account is never locked for all networks: anybody could
// lock anybody out then. A lock that is earned again lasts twice as long.

// maxTracked bounds the memory of failed logins: about 200 octets each.
const maxTracked = 1 << 16

// maxForgotten bounds the work that one failure does for others.
const maxForgotten = 64

// lockScope is what a lock holds.
type lockScope uint8

const (
	lockAddress lockScope = iota
	lockNetwork
	lockAccount // from a network
	lockScopes
)

var lockNames = [lockScopes]string{"address", "network", "account"}

// lockKey is a client's address (of IPv6 the /64), its network (/24 or /56), or
// an account from a network (/24 or /64).
type lockKey struct {
	scope   lockScope
	network netip.Prefix
	account ids.Credential
}

// lockLimits is how many failures within window lock, by scope, and how long at
// most.
type lockLimits struct {
	failures [lockScopes]int
	window   time.Duration // the first lock lasts as long
	longest  time.Duration
}

// lockKeys returns the keys of a login: account may be zero.
func lockKeys(ip netip.Addr, account ids.Credential) []lockKey {
	host, wide := 32, 24
	if ip.Is6() {
		host, wide = 64, 56 // a host owns a /64 at least, a customer a /56
	}
	address, _ := ip.Prefix(host) // the bits are within the family's
	network, _ := ip.Prefix(wide)
	keys := []lockKey{{scope: lockAddress, network: address}, {scope: lockNetwork, network: network}}
	if !account.IsZero() {
		if ip.Is6() {
			network = address
		}
		keys = append(keys, lockKey{scope: lockAccount, network: network, account: account})
	}
	return keys
}

// lockEntry is what is known of a key.
type lockEntry struct {
	key    lockKey
	count  int       // failures in the window
	waits  uint32    // logins refused since it was locked last
	until  time.Time // end of the window
	locked time.Time // end of the lock; zero: never locked
	locks  uint8     // so many locks one after the other
}

// stale reports whether nothing of the entry counts any more: a lock is
// remembered for as long as the longest one after its end.
func (e *lockEntry) stale(l *lockLimits, now time.Time) bool {
	return !now.Before(e.until) && (e.locked.IsZero() || !now.Before(e.locked.Add(l.longest)))
}

// lockout counts failed logins. The zero value is ready.
type lockout struct {
	mu      sync.Mutex
	entries map[lockKey]*list.Element // of *lockEntry
	recent  list.List                 // the one that failed last stands in front
	most    int                       // entries; 0: maxTracked
}

// locked returns how long the login must wait, and for the lock of which scope;
// it counts there as refused.
func (o *lockout) locked(keys []lockKey, now time.Time) (wait time.Duration, scope lockScope) {
	o.mu.Lock()
	defer o.mu.Unlock()
	var longest *lockEntry
	for _, k := range keys {
		if at, ok := o.entries[k]; ok {
			e := at.Value.(*lockEntry)
			if w := e.locked.Sub(now); w > wait {
				wait, scope, longest = w, k.scope, e
			}
		}
	}
	if longest != nil {
		longest.waits++
	}
	return wait, scope
}

// refused returns how many logins a lock has refused since it began.
func (o *lockout) refused(k lockKey) uint32 {
	o.mu.Lock()
	defer o.mu.Unlock()
	if at, ok := o.entries[k]; ok {
		return at.Value.(*lockEntry).waits
	}
	return 0 // the table was full, and the lock was forgotten
}

// lock is one that a failure began.
type lock struct {
	lockKey
	failures int // that led to it
	until    time.Time
}

// failed counts a failure and returns the locks that it began.
func (o *lockout) failed(keys []lockKey, l *lockLimits, now time.Time) (locked []lock) {
	o.mu.Lock()
	defer o.mu.Unlock()
	for _, k := range keys {
		e := o.entry(k, l, now)
		if e.count++; e.count < l.failures[k.scope] {
			continue
		}
		length := l.window
		for range e.locks {
			if length *= 2; length >= l.longest {
				break
			}
		}
		failures := e.count
		e.locked, e.count, e.until, e.waits = now.Add(min(length, l.longest)), 0, now, 0
		if e.locks < 32 {
			e.locks++
		}
		locked = append(locked, lock{lockKey: k, failures: failures, until: e.locked})
	}
	return locked
}

// entry returns the entry of a key, with the window that is open now.
func (o *lockout) entry(k lockKey, l *lockLimits, now time.Time) *lockEntry {
	if o.entries == nil {
		o.entries = make(map[lockKey]*list.Element)
	}
	at, ok := o.entries[k]
	if !ok {
		o.makeRoom(l, now)
		at = o.recent.PushFront(&lockEntry{key: k})
		o.entries[k] = at
	}
	o.recent.MoveToFront(at)
	e := at.Value.(*lockEntry)
	if e.stale(l, now) {
		*e = lockEntry{key: k}
	}
	if !now.Before(e.until) {
		e.count, e.until = 0, now.Add(l.window)
	}
	return e
}

// makeRoom drops what is stale and, if all count and the table is full, the one
// that failed longest ago: a flood from this many places is for a firewall.
func (o *lockout) makeRoom(l *lockLimits, now time.Time) {
	most := o.most
	if most == 0 {
		most = maxTracked
	}
	for range maxForgotten {
		oldest := o.recent.Back()
		if oldest == nil {
			return
		}
		e := oldest.Value.(*lockEntry)
		if !e.stale(l, now) && len(o.entries) < most {
			return
		}
		o.recent.Remove(oldest)
		delete(o.entries, e.key)
	}
}

// succeeded forgets the failures of an account from a network: its user knows
// the secret after all. What the address and the network failed at otherwise
// stays.
func (o *lockout) succeeded(keys []lockKey) {
	o.mu.Lock()
	defer o.mu.Unlock()
	for _, k := range keys {
		if at, ok := o.entries[k]; ok && k.scope == lockAccount {
			o.recent.Remove(at)
			delete(o.entries, k)
		}
	}
}
