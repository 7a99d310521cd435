package wire

import (
	"github.com/relais-mta/relais/shared/fault"
	"github.com/relais-mta/relais/shared/mailaddr"
	"github.com/relais-mta/relais/shared/policy"
)

// MaxLaneReflexes bounds the lanes that one Report names.
const MaxLaneReflexes = 32

// encodeBrakes encodes the brakes in force.
func encodeBrakes(out *View, v *policy.View) {
	for i := range v.Brakes {
		b := &v.Brakes[i]
		out.Brakes = append(out.Brakes, &Brake{Id: EncodeID(b.ID), Provider: b.Provider, PoolId: EncodeID(b.Pool), SourceId: EncodeID(b.Source), TenantId: EncodeID(b.Tenant),
			Domain: string(b.Domain), Percent: uint32(b.Percent), Cause: b.Cause, Owner: b.Owner,
			CreatedMs: encodeTime(b.CreatedAt), UntilMs: encodeTime(b.Until), ReleasedMs: encodeTime(b.Released), NodeId: EncodeID(b.Node)})
	}
}

func (d *viewDecoder) brakes(in *View) {
	v := d.view
	v.Brakes = sized[policy.Brake](len(in.GetBrakes()))
	for i, b := range in.GetBrakes() {
		out := &v.Brakes[i]
		if b.GetPercent() > 99 {
			d.note(fault.New(fault.Invalid, "wire.DecodeView", "a brake leaves %d percent, at most 99", b.GetPercent()))
		}
		*out = policy.Brake{Provider: b.GetProvider(), Domain: mailaddr.Domain(b.GetDomain()), Percent: int(b.GetPercent() % 100), Cause: b.GetCause(), Owner: b.GetOwner(),
			CreatedAt: decodeTime(b.GetCreatedMs()), Until: decodeTime(b.GetUntilMs()), Released: decodeTime(b.GetReleasedMs())}
		d.note(DecodeID(b.GetId(), &out.ID))
		d.note(DecodeID(b.GetPoolId(), &out.Pool))
		d.note(DecodeID(b.GetSourceId(), &out.Source))
		d.note(DecodeID(b.GetTenantId(), &out.Tenant))
		d.note(DecodeID(b.GetNodeId(), &out.Node))
	}
}
