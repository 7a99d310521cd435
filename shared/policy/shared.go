package policy

import (
	"github.com/relais-mta/relais/shared/ids"
	"github.com/relais-mta/relais/shared/lease"
	"github.com/relais-mta/relais/shared/mailaddr"
)

// SharedLimit is a limit that all relays share, as the cluster lends it out. A
// limit of section limits gives one for messages (a rate), one for connections
// (slots), or both. Its number is never used again: a relay that has no right
// under the number must not start work under it.
type SharedLimit struct {
	lease.Limit
	Name     string          // of the limit in section limits
	Provider string          // what it counts; empty: all
	Tenant   ids.Tenant      // zero: all
	Domain   mailaddr.Domain // of recipients; empty: all
	Pool     ids.Pool        // zero: all
}

// What a SharedLimit counts, in the words of section limits.
const (
	CountsMessages    = "messages"    // transactions begun
	CountsConnections = "connections" // open or opening
)

// Counts returns CountsMessages or CountsConnections.
func (l *SharedLimit) Counts() string {
	if l.Kind == lease.Slots {
		return CountsConnections
	}
	return CountsMessages
}

// Matches reports whether the limit counts mail of a tenant to a domain behind a
// provider that leaves through a pool.
func (l *SharedLimit) Matches(provider string, tenant ids.Tenant, domain mailaddr.Domain, pool ids.Pool) bool {
	return (l.Provider == "" || l.Provider == provider) && (l.Tenant.IsZero() || l.Tenant == tenant) &&
		(l.Domain == "" || l.Domain == domain) && (l.Pool.IsZero() || l.Pool == pool)
}

// SharedLimits returns the limits that this relay shares with others, by number.
// The caller must not change the result.
func (d *Directory) SharedLimits() []SharedLimit { return d.view.SharedLimits }

// Lease returns the lengths of time that relays and the leader agree on for
// shared limits. Without any limit, they are the defaults.
func (d *Directory) Lease() lease.Config {
	if d.view.Lease == (lease.Config{}) {
		return lease.DefaultConfig()
	}
	return d.view.Lease
}

// compileShared checks the shared limits of the view.
func (d *Directory) compileShared(p *problems) {
	last := lease.LimitID(0)
	for i := range d.view.SharedLimits {
		l := &d.view.SharedLimits[i]
		if err := l.Validate(); err != nil {
			p.add("view.shared_limits", "limit %q cannot be kept: %v", clip(l.Name), err)
		}
		if l.ID <= last {
			p.add("view.shared_limits", "limit %d is not in its place, or is there twice", l.ID)
		}
		last = l.ID
	}
	if c := d.view.Lease; c != (lease.Config{}) {
		if err := c.Validate(); err != nil {
			p.add("view.lease", "cannot be worked with: %v", err)
		}
	} else if len(d.view.SharedLimits) > 0 {
		p.add("view.lease", "is missing, though there are shared limits")
	}
}
