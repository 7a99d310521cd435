package state

import (
	"fmt"
	"strings"

	"github.com/relais-mta/relais/control"
	"github.com/relais-mta/relais/control/command"
	"github.com/relais-mta/relais/shared/fault"
	"github.com/relais-mta/relais/shared/ids"
)

// quarantineVersion is the version of the commands that brought quarantine.
// Before it the addresses of an evicted relay stay assigned to it.
const quarantineVersion = 3

// maxAuditAddresses is how many addresses an audit entry names.
const maxAuditAddresses = 20

// quarantine puts the addresses of an evicted relay aside. Its machine may go on
// sending from them until it is told or switched off, and what it sent may have
// spoiled their name: an operator says when they are used again. The owner stays
// in the row, so that handing one on needs the word that the machine is off.
func (a *applier) quarantine(node *control.Node, reason string) (quarantined []string, err error) {
	for _, old := range all(a.txn, sourcesTable) {
		if old.Owner != node.ID || old.State != control.SourceAssigned && old.State != control.SourceReleasing {
			continue
		}
		row := *old
		row.State = control.SourceQuarantined
		row.Quarantine = strings.TrimSuffix("relay "+node.Name+" was evicted: "+reason, ": ")
		if err := put(a, sourcesTable, &row); err != nil {
			return nil, err
		}
		quarantined = append(quarantined, row.Bind.String())
	}
	return quarantined, nil
}

// evicted quarantines the addresses of a relay that was put out just now, and
// names them in the audit entry of that: there is one for each change.
func (a *applier) evicted(old, row *control.Node) error {
	cluster := get(a.txn, clusterTable, "id", singleton)
	if cluster == nil || cluster.FSMVersion < quarantineVersion {
		return nil
	}
	named, err := a.quarantine(row, a.reason)
	if err != nil || len(named) == 0 {
		return err
	}
	more := ""
	if len(named) > maxAuditAddresses {
		more = fmt.Sprintf(" and %d more", len(named)-maxAuditAddresses)
	}
	a.audit(row.ID.String(), old.Summary(), row.Summary()+" quarantined="+strings.Join(named[:min(len(named), maxAuditAddresses)], ",")+more)
	return nil
}

// quarantineEvicted does so for relays that were evicted before.
func (a *applier) quarantineEvicted() error {
	for _, n := range all(a.txn, nodesTable) {
		if n.State != control.NodeEvicted {
			continue
		}
		if _, err := a.quarantine(n, ""); err != nil {
			return err
		}
	}
	return nil
}

// sourceRelease ends the quarantine of an address.
func (a *applier) sourceRelease(c *command.IPRelease) (any, error) {
	old := get(a.txn, sourcesTable, "id", c.GetSource())
	switch {
	case old == nil:
		return nil, fault.New(fault.NotFound, op, "there is no such address")
	case old.State == control.SourceFree:
		return old, nil // repeated after an unknown outcome
	case old.State != control.SourceQuarantined:
		return nil, fault.New(fault.Conflict, op, "%s is %s: it is not in quarantine", old.Bind, old.State)
	case !c.GetOldOwnerIsOff() && !old.Owner.IsZero():
		e := fault.New(fault.Conflict, op, "%s may still be used by the machine that had it: switch that off and say so with --old-owner-is-off", old.Bind)
		e.Field = "old_owner_is_off"
		return nil, e
	}
	if err := a.recovering(); err != nil {
		return nil, err
	}
	row := *old
	row.Owner, row.State, row.Quarantine = ids.Node{}, control.SourceFree, ""
	return putRow(a, sourcesTable, &row, change[control.Source]{what: "address " + row.Bind.String(), object: row.Bind.String(), expect: revisionOr(c.GetExpect(), old.Revision)})
}
