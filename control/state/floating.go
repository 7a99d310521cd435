package state

import (
	"github.com/relais-mta/relais/control"
	"github.com/relais-mta/relais/control/command"
	"github.com/relais-mta/relais/shared/fault"
	"github.com/relais-mta/relais/shared/ids"
)

// leasedKey finds the addresses that a relay uses by a lease.
func leasedKey(s *control.Source) []byte {
	if !s.Leased || s.Owner.IsZero() {
		return nil
	}
	return s.ID[:]
}

// leases reports whether an assignment of an address that begins now ends by itself
// when its relay is silent. One of before that never does: its relay was told of no
// lease, and may use the address for as long as it runs.
func (a *applier) leases(s *control.Source) bool {
	cluster := get(a.txn, clusterTable, "id", singleton)
	return !s.Pinned && cluster != nil && cluster.FSMVersion >= control.FloatingVersion
}

// sourceReclaim takes an address from a relay whose lease is over. The leader knows
// that it is; a reclaim that crossed another change of hands changes nothing.
func (a *applier) sourceReclaim(c *command.IPReclaim) (any, error) {
	old, err := a.source(c.GetSource())
	if err != nil {
		return nil, err
	}
	if !old.Leased {
		e := fault.New(fault.Conflict, op, "%s is used without a lease: that does not end by itself", old.Bind)
		e.Field = "ip"
		return nil, e
	}
	if old.Owner.IsZero() || old.Epoch != c.GetEpoch() {
		return old, nil
	}
	if err := a.recovering(); err != nil {
		return nil, err
	}
	row := *old
	if row.Owner = (ids.Node{}); row.State != control.SourceQuarantined {
		row.State = control.SourceFree
	}
	return a.putSource(&row, old.Revision)
}

// leaseProcesses notes to which processes addresses are leased. That is not audited:
// it is no change that anybody made.
func (a *applier) leaseProcesses(c *command.IPHeard) error {
	for _, p := range c.GetProcesses() {
		old := get(a.txn, nodesTable, "id", p.GetNode())
		if old == nil || !old.State.Connects() || old.LeaseProcess == p.GetIncarnation() {
			continue
		}
		row := *old
		row.LeaseProcess = p.GetIncarnation()
		if err := put(a, nodesTable, &row); err != nil {
			return err
		}
	}
	return nil
}

// LeasedSources returns the addresses that relays use by a lease, oldest first. Those
// that no view offers are left out: their relays do not report of them, which is no
// silence.
func (r *Reader) LeasedSources() []*control.Source {
	var out []*control.Source
	each(r.txn, sourcesTable, "leased", nil, func(s *control.Source) bool {
		if s.State != control.SourceAssigned || r.offered(s) {
			out = append(out, s)
		}
		return true
	})
	return out
}

// LeasesSources reports whether there is any.
func (r *Reader) LeasesSources() (found bool) {
	each(r.txn, sourcesTable, "leased", nil, func(*control.Source) bool { found = true; return false })
	return found
}
