package sign

import (
	"bytes"
	"sync"

	"github.com/relais-mta/relais/shared/mailaddr"
	"github.com/relais-mta/relais/shared/policy"
)

// maxCachedSigners bounds the domains whose parsed keys are kept; an RSA key
// with its precomputed values takes about 4 KiB.
const maxCachedSigners = 8192

// Cache keeps the parsed keys of sending domains, because parsing one costs as
// much as a signature. The zero value is ready, for many goroutines.
type Cache struct {
	mu      sync.RWMutex
	entries map[mailaddr.Domain]cacheEntry
}

type cacheEntry struct {
	keys   []policy.DKIMKey
	signer *Signer
}

// Signer returns the signer of d with the keys that d has now: a domain whose
// keys were changed by a new policy view gets a new signer. Errors are those of
// NewSigner, and are not kept.
func (c *Cache) Signer(d *policy.Domain) (*Signer, error) {
	c.mu.RLock()
	e, ok := c.entries[d.Name]
	c.mu.RUnlock()
	if ok && sameKeys(e.keys, d.DKIM) {
		return e.signer, nil
	}
	signer, err := NewSigner(d.Name, d.DKIM)
	if err != nil {
		return nil, err
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.entries == nil {
		c.entries = make(map[mailaddr.Domain]cacheEntry)
	}
	if _, ok := c.entries[d.Name]; !ok && len(c.entries) >= maxCachedSigners {
		// Any victim will do: with this many domains in use a better choice
		// would cost more than it saves.
		for victim := range c.entries {
			delete(c.entries, victim)
			break
		}
	}
	c.entries[d.Name] = cacheEntry{keys: d.DKIM, signer: signer}
	return signer, nil
}

// sameKeys reports whether two key lists are equal. Views that did not change a
// domain usually share its slice, which makes this one comparison.
func sameKeys(a, b []policy.DKIMKey) bool {
	if len(a) != len(b) {
		return false
	}
	if len(a) == 0 || &a[0] == &b[0] {
		return true
	}
	for i := range a {
		if a[i].Selector != b[i].Selector || a[i].Algorithm != b[i].Algorithm || !bytes.Equal(a[i].Private, b[i].Private) {
			return false
		}
	}
	return true
}
