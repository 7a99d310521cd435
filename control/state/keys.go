package state

import (
	"fmt"
	"slices"

	"github.com/relais-mta/relais/control"
	"github.com/relais-mta/relais/control/command"
	"github.com/relais-mta/relais/shared/fault"
)

// applyKeys dispatches the commands about the signing keys of domains; known
// is false for any other command. The rules are those of control.Domain.
func (a *applier) applyKeys(body command.Command) (row any, known bool, err error) {
	switch c := body.(type) {
	case *command.DomainKeysAdd:
		row, err = a.domainKeysAdd(c)
	case *command.DomainKeyStep:
		row, err = a.domainKeyStep(c)
	case *command.DomainKeysRollback:
		row, err = a.domainKeysRollback(c)
	default:
		return nil, false, nil
	}
	return row, true, err
}

// keysOf returns the domain of a command about its keys.
func (a *applier) keysOf(name string) (*control.Domain, error) {
	if d := get(a.txn, domainsTable, "id", text(name)); d != nil {
		return d, nil
	}
	return nil, fault.New(fault.NotFound, op, "there is no domain %q", name)
}

func (a *applier) putKeys(old, row *control.Domain, expect uint64) (any, error) {
	if old == row {
		return old, nil
	}
	return putRow(a, domainsTable, row, change[control.Domain]{what: quoted("domain", string(row.Name)), object: string(row.Name), expect: revisionOr(expect, old.Revision)})
}

func (a *applier) domainKeysAdd(c *command.DomainKeysAdd) (any, error) {
	old, err := a.keysOf(c.GetDomain())
	if err != nil {
		return nil, err
	}
	keys := make([]control.DKIMKey, 0, len(c.GetKeys()))
	for _, r := range c.GetKeys() {
		keys = append(keys, r.Row())
	}
	if !slices.ContainsFunc(keys, func(k control.DKIMKey) bool {
		have := old.Key(k.Selector)
		return have == nil || string(have.Public) != string(k.Public)
	}) {
		return old, nil // repeated after an unknown outcome
	}
	row, err := old.WithNewKeys(keys, a.now)
	if err != nil {
		return nil, err
	}
	return a.putKeys(old, row, c.GetExpect())
}

func (a *applier) domainKeyStep(c *command.DomainKeyStep) (any, error) {
	old, err := a.keysOf(c.GetDomain())
	if err != nil {
		return nil, err
	}
	row, err := old.WithStep(c.GetSelector(), control.KeyStep(c.GetStep()), a.now)
	if err != nil {
		return nil, err
	}
	return a.putKeys(old, row, 0)
}

// domainKeysRollback needs the revision it was decided from: two of them would
// lead to where the first began.
func (a *applier) domainKeysRollback(c *command.DomainKeysRollback) (any, error) {
	old, err := a.keysOf(c.GetDomain())
	if err != nil {
		return nil, err
	}
	if c.GetExpect() != old.Revision {
		return nil, checkRevision(domainsTable, fmt.Sprintf("domain %q", old.Name), old, max(c.GetExpect(), 1))
	}
	row, err := old.WithRollback(a.now)
	if err != nil {
		return nil, err
	}
	return a.putKeys(old, row, c.GetExpect())
}
