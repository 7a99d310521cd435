package resolve

import (
	"sync"
	"time"
)

// evictionSample is how many entries are looked at to find one to drop: a
// bounded price for a choice that is close enough to the oldest.
const evictionSample = 16

type entry[V any] struct {
	value   V
	expires time.Time // stale from then on
	drop    time.Time // useless from then on
	bytes   int       // set by put
}

// cache is a map bounded in entries and in bytes, whose entries go stale and
// then useless.
type cache[K comparable, V any] struct {
	mu       sync.RWMutex
	m        map[K]entry[V]
	max      int // entries
	bytes    int // of all entries
	maxBytes int
	size     func(V) int // bytes of a value
}

func newCache[K comparable, V any](max, maxBytes int, size func(V) int) *cache[K, V] {
	return &cache[K, V]{m: make(map[K]entry[V]), max: max, maxBytes: maxBytes, size: size}
}

// get returns the entry of the key; the caller compares its times.
func (c *cache[K, V]) get(key K) (entry[V], bool) {
	c.mu.RLock()
	e, ok := c.m[key]
	c.mu.RUnlock()
	return e, ok
}

// put keeps an entry and makes room for it. What is larger than the whole
// cache is not kept.
func (c *cache[K, V]) put(key K, e entry[V], now time.Time) {
	e.bytes = c.size(e.value)
	c.mu.Lock()
	defer c.mu.Unlock()
	c.remove(key)
	if e.bytes > c.maxBytes {
		return
	}
	for len(c.m) >= c.max || c.bytes+e.bytes > c.maxBytes {
		c.evict(now)
	}
	c.m[key] = e
	c.bytes += e.bytes
}

func (c *cache[K, V]) remove(key K) {
	if e, ok := c.m[key]; ok {
		c.bytes -= e.bytes
		delete(c.m, key)
	}
}

// evict drops the useless ones of a sample, or of a useful sample the one that
// goes stale first.
func (c *cache[K, V]) evict(now time.Time) {
	var victim K
	var at time.Time
	seen, dropped := 0, 0
	for key, e := range c.m {
		if !now.Before(e.drop) {
			c.remove(key)
			dropped++
		} else if at.IsZero() || e.expires.Before(at) {
			victim, at = key, e.expires
		}
		if seen++; seen >= evictionSample {
			break
		}
	}
	if dropped == 0 {
		c.remove(victim)
	}
}

func (c *cache[K, V]) len() int {
	c.mu.RLock()
	defer c.mu.RUnlock()
	return len(c.m)
}

// entryBytes is about what an entry costs beside its names and addresses: the
// map's slot with key and times, the struct behind it.
const entryBytes = 256

// routeBytes estimates the memory of a route. Names are shared with Names.
func routeBytes(r *Route) int {
	n := entryBytes + len(r.Domain)
	for i := range r.Hosts {
		n += hostStructBytes + len(r.Hosts[i].Name) + addrBytes*len(r.Hosts[i].Addrs)
	}
	if r.Failure != nil {
		n += entryBytes + len(r.Failure.Reply.Text)
	}
	return n
}

const (
	hostStructBytes = 80 // a Host and its place in Names
	addrBytes       = 24 // netip.Addr
)

// hostBytes estimates the memory of a host's addresses.
func hostBytes(a hostAnswer) int { return entryBytes + maxNameBytes + addrBytes*len(a.addrs) }

// maxNameBytes is the longest name of DNS (RFC 1035 section 2.3.4).
const maxNameBytes = 255
