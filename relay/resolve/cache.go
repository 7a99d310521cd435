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
}

// cache is a bounded map whose entries go stale and then useless.
type cache[K comparable, V any] struct {
	mu  sync.RWMutex
	m   map[K]entry[V]
	max int // entries
}

func newCache[K comparable, V any](max int) *cache[K, V] {
	return &cache[K, V]{m: make(map[K]entry[V]), max: max}
}

// get returns the entry of the key; the caller compares its times.
func (c *cache[K, V]) get(key K) (entry[V], bool) {
	c.mu.RLock()
	e, ok := c.m[key]
	c.mu.RUnlock()
	return e, ok
}

func (c *cache[K, V]) put(key K, e entry[V], now time.Time) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if _, known := c.m[key]; !known && len(c.m) >= c.max {
		c.evict(now)
	}
	c.m[key] = e
}

// evict drops the useless ones of a sample, or of a useful sample the one that
// goes stale first.
func (c *cache[K, V]) evict(now time.Time) {
	var victim K
	var at time.Time
	seen, dropped := 0, 0
	for key, e := range c.m {
		if !now.Before(e.drop) {
			delete(c.m, key)
			dropped++
		} else if at.IsZero() || e.expires.Before(at) {
			victim, at = key, e.expires
		}
		if seen++; seen >= evictionSample {
			break
		}
	}
	if dropped == 0 {
		delete(c.m, victim)
	}
}

func (c *cache[K, V]) len() int {
	c.mu.RLock()
	defer c.mu.RUnlock()
	return len(c.m)
}
