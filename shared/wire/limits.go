package wire

import (
	"time"

	"github.com/relais-mta/relais/shared/lease"
	"github.com/relais-mta/relais/shared/mailaddr"
	"github.com/relais-mta/relais/shared/policy"
)

// encodeShared encodes the limits that relays share.
func encodeShared(out *View, v *policy.View) {
	for i := range v.SharedLimits {
		l := &v.SharedLimits[i]
		out.SharedLimits = append(out.SharedLimits, &SharedLimit{Id: uint64(l.ID), Name: l.Name, Kind: uint32(l.Kind), Max: l.Max, PerMs: l.Per.Milliseconds(), Burst: l.Burst,
			FloorPercent: uint32(l.FloorPercent), ReservePercent: uint32(l.ReservePercent), SoftFloor: l.SoftFloor,
			Provider: l.Provider, TenantId: EncodeID(l.Tenant), Domain: string(l.Domain), PoolId: EncodeID(l.Pool)})
	}
	if c := v.Lease; c != (lease.Config{}) {
		out.Lease = &LeaseConfig{TtlMs: c.TTL.Milliseconds(), FloorTtlMs: c.FloorTTL.Milliseconds(), GuardMs: c.Guard.Milliseconds(), LingerMs: c.Linger.Milliseconds(), HoldMs: c.Hold.Milliseconds(), FloorGapMs: c.FloorGap.Milliseconds()}
	}
}

// shared reads the limits that relays share. Whether they can be kept is checked
// by policy.Compile.
func (d *viewDecoder) shared(in *View) {
	v := d.view
	v.SharedLimits = sized[policy.SharedLimit](len(in.GetSharedLimits()))
	for i, l := range in.GetSharedLimits() {
		out := &v.SharedLimits[i]
		out.Limit = lease.Limit{ID: lease.LimitID(l.GetId()), Kind: lease.Kind(min(l.GetKind(), 255)), Max: l.GetMax(), Per: span(l.GetPerMs()), Burst: l.GetBurst(),
			FloorPercent: int(int32(l.GetFloorPercent())), ReservePercent: int(int32(l.GetReservePercent())), SoftFloor: l.GetSoftFloor()}
		out.Name, out.Provider, out.Domain = l.GetName(), l.GetProvider(), mailaddr.Domain(l.GetDomain())
		d.note(DecodeID(l.GetTenantId(), &out.Tenant))
		d.note(DecodeID(l.GetPoolId(), &out.Pool))
	}
	if c := in.GetLease(); c != nil {
		v.Lease = lease.Config{TTL: span(c.GetTtlMs()), FloorTTL: span(c.GetFloorTtlMs()), Guard: span(c.GetGuardMs()), Linger: span(c.GetLingerMs()), Hold: span(c.GetHoldMs()), FloorGap: span(c.GetFloorGapMs())}
	}
}

// span turns milliseconds into a duration; what would overflow becomes 0, which
// no use of it allows.
func span(ms int64) time.Duration {
	const most = int64(1<<63-1) / int64(time.Millisecond)
	if ms < 0 || ms > most {
		return 0
	}
	return time.Duration(ms) * time.Millisecond
}
