package command

import (
	"github.com/relais-mta/relais/control"
	"github.com/relais-mta/relais/shared/fault"
	"github.com/relais-mta/relais/shared/mailaddr"
)

// The commands about brakes.
const (
	TypeBrakeSet    Type = 110
	TypeBrakeCancel Type = 111
	TypeBrakePin    Type = 112
	TypeBrakeSweep  Type = 113
)

// MaxEvidenceBytes bounds what is told of a brake's evidence.
const MaxEvidenceBytes = 1 << 10

func brakesType(c Command) Type {
	switch c.(type) {
	case *BrakeSet:
		return TypeBrakeSet
	case *BrakeCancel:
		return TypeBrakeCancel
	case *BrakePin:
		return TypeBrakePin
	case *BrakeSweep:
		return TypeBrakeSweep
	}
	return 0
}

// BrakeRecord returns the record of the row.
func BrakeRecord(b *control.Brake) *Brake {
	return &Brake{Id: optionalID(b.ID), Provider: b.Scope.Provider, Pool: optionalID(b.Scope.Pool), Source: optionalID(b.Scope.Source),
		Tenant: optionalID(b.Scope.Tenant), Domain: string(b.Scope.Domain), Percent: uint32(b.Percent), Cause: b.Cause, Evidence: b.Evidence, EvidenceMs: millis(b.EvidenceAt),
		Owner: b.Owner, Automatic: b.Automatic, Node: optionalID(b.Node), CreatedMs: millis(b.CreatedAt), UntilMs: millis(b.Until), Pinned: b.Pinned,
		EndedMs: millis(b.EndedAt), EndedBy: b.EndedBy, EndReason: b.EndReason}
}

// Row returns the row of the record.
func (r *Brake) Row() (*control.Brake, error) {
	var s scan
	b := &control.Brake{Scope: control.BrakeScope{Provider: r.GetProvider(), Domain: mailaddr.Domain(r.GetDomain())}, Percent: int(r.GetPercent()), Cause: r.GetCause(),
		Evidence: r.GetEvidence(), EvidenceAt: fromMillis(r.GetEvidenceMs()), Owner: r.GetOwner(), Automatic: r.GetAutomatic(), CreatedAt: fromMillis(r.GetCreatedMs()),
		Until: fromMillis(r.GetUntilMs()), Pinned: r.GetPinned(), EndedAt: fromMillis(r.GetEndedMs()), EndedBy: r.GetEndedBy(), EndReason: r.GetEndReason()}
	setID(&s, "brake", &b.ID, r.GetId())
	setOptionalID(&s, "pool", &b.Scope.Pool, r.GetPool())
	setOptionalID(&s, "source", &b.Scope.Source, r.GetSource())
	setOptionalID(&s, "tenant", &b.Scope.Tenant, r.GetTenant())
	setOptionalID(&s, "node", &b.Node, r.GetNode())
	return b, s.err
}

// Validate implements Command.
func (c *BrakeSet) Validate() error {
	r := c.GetBrake()
	if r == nil {
		return missing("brake")
	}
	b, err := r.Row()
	switch {
	case err != nil:
		return err
	case b.Scope.IsZero():
		return fault.Field(opValidate, "scope", "is missing: name a provider, pool, source, tenant or domain")
	case b.Percent < 0 || b.Percent > 99:
		return fault.Field(opValidate, "percent", "%d is out of range: 1 to 99, or 0 to hold", b.Percent)
	case b.Cause == "":
		return fault.Field(opValidate, "cause", "is missing: say why the mail is restricted")
	case b.Owner == "" || b.CreatedAt.IsZero() || !b.EndedAt.IsZero():
		return fault.Field(opValidate, "brake", "a new brake has an owner and a time, and has not ended")
	case !b.Until.IsZero() && !b.Until.After(b.CreatedAt):
		return fault.Field(opValidate, "ttl", "the brake would be over before it begins")
	case len(b.Evidence) > MaxEvidenceBytes:
		return fault.Field(opValidate, "evidence", "has %d bytes, allowed are %d", len(b.Evidence), MaxEvidenceBytes)
	}
	if b.Scope.Domain != "" {
		d, err := mailaddr.ParseDomain(string(b.Scope.Domain))
		if err != nil || d != b.Scope.Domain {
			return fault.Field(opValidate, "domain", "%q is not a domain in its normal form", b.Scope.Domain)
		}
	}
	// The reason of a brake is its cause where none is given: the cause is what was written.
	return first(checkText("cause", b.Cause), checkMeta(c.GetMeta()), checkText("provider", b.Scope.Provider), checkText("owner", b.Owner))
}

// Validate implements Command.
func (c *BrakeCancel) Validate() error {
	return first(checkMeta(c.GetMeta()), checkBytes("brake", c.GetBrake(), 16, 16), checkText("rule", c.GetRule()))
}

// Validate implements Command.
func (c *BrakePin) Validate() error {
	return first(checkMeta(c.GetMeta()), checkBytes("brake", c.GetBrake(), 16, 16))
}

// Validate implements Command.
func (c *BrakeSweep) Validate() error { return checkMeta(c.GetMeta()) }
