package command

import (
	"github.com/relais-mta/relais/control"
	"github.com/relais-mta/relais/shared/fault"
	"github.com/relais-mta/relais/shared/mailaddr"
)

// The values of IPVerify.Override.
const (
	OverrideKeep uint32 = iota
	OverrideOn
	OverrideOff
)

// MaxPolicyVersions bounds how many former policies are kept.
const MaxPolicyVersions = 64

// PolicyVersionRecord returns the record of the row.
func PolicyVersionRecord(v *control.PolicyVersion) *PolicyVersion {
	r := &PolicyVersion{Revision: v.Policy, TimeMs: millis(v.Time), Actor: v.Actor, Reason: v.Reason}
	for _, sec := range v.Sections {
		r.Sections = append(r.Sections, &PolicySection{Name: sec.Name, Text: sec.Text})
	}
	return r
}

// Row returns the row of the record.
func (r *PolicyVersion) Row() (*control.PolicyVersion, error) {
	v := &control.PolicyVersion{Policy: r.GetRevision(), Time: fromMillis(r.GetTimeMs()), Actor: r.GetActor(), Reason: r.GetReason()}
	for _, sec := range r.GetSections() {
		v.Sections = append(v.Sections, control.PolicySection{Name: sec.GetName(), Text: sec.GetText()})
	}
	return v, nil
}

// Validate implements Command.
func (c *NodeDrain) Validate() error {
	return first(checkMeta(c.GetMeta()), checkBytes("node", c.GetNode(), 16, 16))
}

// Validate implements Command.
func (c *CredentialRotate) Validate() error {
	return first(checkMeta(c.GetMeta()), checkBytes("credential", c.GetCredential(), 16, 16), checkBytes("secret_hash", c.GetSecretHash(), 32, 32))
}

// Validate implements Command.
func (c *IPVerify) Validate() error {
	if c.GetOverride() > OverrideOff {
		return fault.Field(opValidate, "override", "%d is unknown", c.GetOverride())
	}
	if c.GetReverse() == "" && c.GetOverride() == OverrideKeep {
		return fault.Field(opValidate, "reverse", "is missing: give a verdict or an override")
	}
	if c.GetOverride() == OverrideOn && c.GetMeta().GetReason() == "" {
		return fault.Field(opValidate, "reason", "is missing: say why an address without confirmed reverse DNS is used")
	}
	return first(checkMeta(c.GetMeta()), checkBytes("ip", c.GetSource(), 16, 16), checkText("detail", c.GetDetail()),
		oneOf("reverse", c.GetReverse(), string(control.ReverseUnchecked), string(control.ReverseConfirmed), string(control.ReverseFailed)))
}

// Validate implements Command.
func (c *DomainVerify) Validate() error {
	if _, err := mailaddr.ParseDomain(c.GetDomain()); err != nil {
		return fault.Field(opValidate, "domain", "%s", fault.Public(err))
	}
	return checkMeta(c.GetMeta())
}

// Validate implements Command.
func (c *IPRelease) Validate() error {
	if c.GetMeta().GetReason() == "" {
		return fault.Field(opValidate, "reason", "is missing: say why the address may be used again")
	}
	return first(checkMeta(c.GetMeta()), checkBytes("ip", c.GetSource(), 16, 16))
}
