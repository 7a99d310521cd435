package policy

import "github.com/relais-mta/relais/shared/ids"

// Share is what mail of a stream has where it waits for rates or connections
// together with other mail.
type Share struct {
	TenantWeight int // of the tenant among all tenants, 1 to 1000
	Weight       int // of the stream among the tenant's streams of equal priority, 1 to 1000
	Priority     int // 0 to 100 among the tenant's streams, the highest first
}

// shareKey finds what the policy says about streams of a name and kind: a zero
// tenant stands for "*".
type shareKey struct {
	tenant ids.Tenant
	name   string
	kind   StreamKind
}

// Share returns the share of a tenant's mail of a stream. Work of projects whose
// streams have one name, kind and pool waits together: the highest priority and
// weight of them counts for all.
func (d *Directory) Share(tenant ids.Tenant, stream string, kind StreamKind) Share {
	share, ok := d.shares[shareKey{tenant, stream, kind}]
	if !ok {
		share, ok = d.shares[shareKey{ids.Tenant{}, stream, kind}]
	}
	if !ok {
		share = Share{Weight: DefaultWeight, Priority: DefaultPriority}
	}
	if share.TenantWeight = d.weights[tenant]; share.TenantWeight == 0 {
		share.TenantWeight = DefaultWeight
	}
	return share
}

// compileShare notes what an entry says about the work of its name.
func (d *Directory) compileShare(tenant ids.Tenant, s *Stream) {
	share := Share{Weight: DefaultWeight, Priority: DefaultPriority}
	if s.Weight > 0 {
		share.Weight = s.Weight
	}
	if s.Priority != nil {
		share.Priority = *s.Priority
	}
	key := shareKey{tenant, s.Name, s.Kind}
	if other, ok := d.shares[key]; ok {
		share.Weight, share.Priority = max(share.Weight, other.Weight), max(share.Priority, other.Priority)
	}
	d.shares[key] = share
}
