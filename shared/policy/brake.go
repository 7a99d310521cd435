package policy

import (
	"time"

	"github.com/relais-mta/relais/shared/ids"
	"github.com/relais-mta/relais/shared/mailaddr"
)

// BrakeGrace is how long after its end a brake stays in force on a relay that
// hears nothing of control: cut off, a relay may tighten and never relax.
const BrakeGrace = time.Hour

// Brake is a restriction of mail that is in force. It is for the mail that
// matches all that is given of provider, pool, source, tenant and domain.
type Brake struct {
	ID        ids.Brake
	Provider  string
	Pool      ids.Pool
	Source    ids.Source
	Tenant    ids.Tenant
	Domain    mailaddr.Domain // of recipients
	Percent   int             // of what policy allows a lane; 0: nothing
	Cause     string
	Owner     string
	CreatedAt time.Time
	Until     time.Time // zero: until control says so

	// Released says that this is no brake but a person's word, at that time, that
	// a relay is to give up the reflex of a lane; Node is that relay.
	Released time.Time
	Node     ids.Node
}

// KnowsProvider reports whether a brake may name the provider: it is in the
// policy, or a name that hosts without a profile can have.
func (d *Document) KnowsProvider(name string) bool {
	for i := range d.Providers.Provider {
		if d.Providers.Provider[i].Name == name {
			return true
		}
	}
	return isUnlistedName(name)
}

// ByLane reports whether all mail of the lanes that match is meant.
func (b *Brake) ByLane() bool { return b.Tenant.IsZero() && b.Domain == "" }

// MatchesLane reports whether mail of a lane can be meant.
func (b *Brake) MatchesLane(provider string, pool ids.Pool, source ids.Source) bool {
	return (b.Provider == "" || b.Provider == provider) && (b.Pool.IsZero() || b.Pool == pool) && (b.Source.IsZero() || b.Source == source)
}

// MatchesMail reports whether mail of a tenant to a domain can be meant.
func (b *Brake) MatchesMail(tenant ids.Tenant, domain mailaddr.Domain) bool {
	return (b.Tenant.IsZero() || b.Tenant == tenant) && (b.Domain == "" || b.Domain == domain)
}

// InForce reports whether the brake restricts at a time, by a clock that is
// trusted.
func (b *Brake) InForce(now time.Time) bool {
	return b.Released.IsZero() && (b.Until.IsZero() || now.Before(b.Until.Add(BrakeGrace)))
}
