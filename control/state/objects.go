package state

import (
	"time"

	"github.com/relais-mta/relais/control"
	"github.com/relais-mta/relais/control/command"
	"github.com/relais-mta/relais/shared/fault"
)

// revisionOr returns what a change expects: what it says, or the row's.
func revisionOr(expect, row uint64) uint64 {
	if expect != 0 {
		return expect
	}
	return row
}

// nodeDrain moves a node between active and draining. Relays hear of it in
// their view, so that one that restarts while control is away still drains.
func (a *applier) nodeDrain(c *command.NodeDrain) (any, error) {
	old := get(a.txn, nodesTable, "id", c.GetNode())
	if old == nil {
		return nil, fault.New(fault.NotFound, op, "there is no such node")
	}
	row := *old
	switch {
	case !old.State.Connects():
		return nil, fault.New(fault.Conflict, op, "node %q is %s: only an active node drains", old.Name, old.State)
	case !c.GetDraining():
		row.State = control.NodeActive
	case old.State == control.NodeActive:
		row.State = control.NodeDraining
	}
	out, err := putRow(a, nodesTable, &row, change[control.Node]{what: quoted("node", row.Name), object: row.ID.String(), expect: revisionOr(c.GetExpect(), old.Revision)})
	if err == nil && row.Revision == a.index {
		a.progress.viewIndex = a.index
	}
	return out, err
}

// credentialRotate replaces a credential's secret; the old one stays good until
// the given time.
func (a *applier) credentialRotate(c *command.CredentialRotate) (any, error) {
	old := get(a.txn, credentialsTable, "id", c.GetCredential())
	if old == nil {
		return nil, fault.New(fault.NotFound, op, "there is no such credential")
	}
	if old.Revoked {
		return nil, fault.New(fault.Conflict, op, "credential %s is revoked for good: create a new one", old.ID)
	}
	row := *old
	copy(row.SecretHash[:], c.GetSecretHash())
	if row.SecretHash == old.SecretHash {
		return old, nil // repeated after an unknown outcome
	}
	row.PreviousHash, row.PreviousUntil = [32]byte{}, time.Time{}
	if until := time.UnixMilli(c.GetPreviousUntilMs()).UTC(); until.After(a.now) {
		row.PreviousHash, row.PreviousUntil = old.SecretHash, until
	}
	return putRow(a, credentialsTable, &row, change[control.Credential]{what: "the credential", object: row.ID.String(), expect: revisionOr(c.GetExpect(), old.Revision)})
}

// sourceVerify records a verdict on an address's reverse DNS, or an override.
func (a *applier) sourceVerify(c *command.IPVerify) (any, error) {
	old := get(a.txn, sourcesTable, "id", c.GetSource())
	if old == nil {
		return nil, fault.New(fault.NotFound, op, "there is no such address")
	}
	row := *old
	if verdict := control.ReverseVerdict(c.GetReverse()); verdict != control.ReverseUnchecked && (verdict != old.Reverse || c.GetDetail() != old.ReverseDetail) {
		row.Reverse, row.ReverseDetail, row.ReverseAt = verdict, c.GetDetail(), a.now
	}
	switch c.GetOverride() {
	case command.OverrideOn:
		row.Overridden = true
	case command.OverrideOff:
		row.Overridden = false
	}
	return putRow(a, sourcesTable, &row, change[control.Source]{what: "address " + row.Bind.String(), object: row.Bind.String(), expect: revisionOr(c.GetExpect(), old.Revision)})
}

// domainVerify records that the ownership record was seen. It is a fact about
// the past, so it stays when the record goes.
func (a *applier) domainVerify(c *command.DomainVerify) (any, error) {
	old := get(a.txn, domainsTable, "id", text(c.GetDomain()))
	if old == nil {
		return nil, fault.New(fault.NotFound, op, "there is no such domain")
	}
	if !old.VerifiedAt.IsZero() {
		return old, nil
	}
	row := *old
	row.VerifiedAt = a.now
	return putRow(a, domainsTable, &row, change[control.Domain]{what: quoted("domain", string(row.Name)), object: string(row.Name), expect: revisionOr(c.GetExpect(), old.Revision)})
}

// reverseVersion is the version of the commands that brought verdicts on
// reverse DNS. Before it no verdict can be recorded, so every address is used.
const reverseVersion = 2

// trustAddresses gives the addresses that are in use when verdicts begin the
// benefit of the doubt: an upgrade stops no mail. The check looks at them next.
func (a *applier) trustAddresses() error {
	for _, old := range all(a.txn, sourcesTable) {
		if old.Reverse != control.ReverseUnchecked {
			continue
		}
		row := *old
		row.Reverse, row.ReverseDetail, row.ReverseAt = control.ReverseConfirmed, "in use before reverse DNS was checked", a.now
		if err := put(a, sourcesTable, &row); err != nil {
			return err
		}
	}
	return nil
}
