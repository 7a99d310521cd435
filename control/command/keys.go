package command

import (
	"github.com/relais-mta/relais/control"
	"github.com/relais-mta/relais/shared/fault"
	"github.com/relais-mta/relais/shared/mailaddr"
	"github.com/relais-mta/relais/shared/policy"
)

func keysType(c Command) Type {
	switch c.(type) {
	case *DomainKeysAdd:
		return TypeDomainKeysAdd
	case *DomainKeyStep:
		return TypeDomainKeyStep
	case *DomainKeysRollback:
		return TypeDomainKeysRollback
	}
	return 0
}

func checkSelector(selector string) error {
	d, err := mailaddr.ParseDomain(selector)
	if err != nil || len(d) > maxSelectorBytes || string(d) != selector {
		return fault.Field(opValidate, "selector", "%q is not a DKIM selector: use lower-case letters, digits and inner hyphens", selector)
	}
	return nil
}

// checkKeys checks signing keys as they are proposed.
func checkKeys(keys []control.DKIMKey, most int) error {
	if len(keys) > most {
		return fault.Field(opValidate, "dkim", "%d signing keys are too many, allowed are %d", len(keys), most)
	}
	for _, k := range keys {
		if err := checkSelector(k.Selector); err != nil {
			return err
		}
		if err := first(oneOf("algorithm", k.Algorithm, policy.AlgorithmRSA, policy.AlgorithmEd25519), checkBytes("public", k.Public, 1, MaxSealedBytes), checkBytes("private_sealed", k.PrivateSealed, 1, MaxSealedBytes)); err != nil {
			return err
		}
	}
	return nil
}

func checkSendingDomain(name string) error {
	d, err := mailaddr.ParseDomain(name)
	if err != nil || string(d) != name {
		return fault.Field(opValidate, "domain", "%q is not a domain name", name)
	}
	return nil
}

// Validate implements Command.
func (c *DomainKeysAdd) Validate() error {
	keys := make([]control.DKIMKey, 0, len(c.GetKeys()))
	for _, k := range c.GetKeys() {
		keys = append(keys, k.Row())
	}
	if len(keys) == 0 {
		return missing("keys")
	}
	return first(checkMeta(c.GetMeta()), checkSendingDomain(c.GetDomain()), checkKeys(keys, MaxDKIMKeys))
}

// Validate implements Command.
func (c *DomainKeyStep) Validate() error {
	return first(checkMeta(c.GetMeta()), checkSendingDomain(c.GetDomain()), checkSelector(c.GetSelector()), oneOf("step", c.GetStep(), control.KeySteps...))
}

// Validate implements Command.
func (c *DomainKeysRollback) Validate() error {
	return first(checkMeta(c.GetMeta()), checkSendingDomain(c.GetDomain()))
}

// DKIMKeyRecord returns the record of a signing key.
func DKIMKeyRecord(k *control.DKIMKey) *DKIMKey {
	return &DKIMKey{Selector: k.Selector, Algorithm: k.Algorithm, Public: k.Public, PrivateSealed: k.PrivateSealed,
		State: string(k.State), CreatedMs: millis(k.CreatedAt), SeenMs: millis(k.SeenAt), SinceMs: millis(k.Since)}
}

// Row returns the signing key of the record.
func (r *DKIMKey) Row() control.DKIMKey {
	return control.DKIMKey{Selector: r.GetSelector(), Algorithm: r.GetAlgorithm(), Public: r.GetPublic(), PrivateSealed: r.GetPrivateSealed(),
		State: control.KeyState(r.GetState()), CreatedAt: fromMillis(r.GetCreatedMs()), SeenAt: fromMillis(r.GetSeenMs()), Since: fromMillis(r.GetSinceMs())}
}
