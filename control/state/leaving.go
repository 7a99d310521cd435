package state

import (
	"bytes"

	"github.com/relais-mta/relais/control"
	"github.com/relais-mta/relais/control/command"
	"github.com/relais-mta/relais/shared/fault"
	"github.com/relais-mta/relais/shared/ids"
	"github.com/relais-mta/relais/shared/policy"
)

// The rules of addresses that change hands are those of shared/ownership, which
// says why they keep two relays from sending from one address.

func (a *applier) source(id []byte) (*control.Source, error) {
	if row := get(a.txn, sourcesTable, "id", id); row != nil {
		return row, nil
	}
	return nil, fault.New(fault.NotFound, op, "there is no such address")
}

func (a *applier) putSource(row *control.Source, expect uint64) (any, error) {
	return putRow(a, sourcesTable, row, change[control.Source]{what: "address " + row.Bind.String(), object: row.Bind.String(), expect: expect})
}

// sourceRetire asks the owner of an address to stop.
func (a *applier) sourceRetire(c *command.IPRetire) (any, error) {
	old, err := a.source(c.GetSource())
	switch {
	case err != nil:
		return nil, err
	case old.State == control.SourceFree || old.State == control.SourceReleasing:
		return old, nil // repeated
	case old.State == control.SourceQuarantined:
		return nil, fault.New(fault.Conflict, op, "%s is in quarantine: end that with `relais-control ip unquarantine`", old.Bind)
	}
	row := *old
	row.State = control.SourceReleasing
	return a.putSource(&row, revisionOr(c.GetExpect(), old.Revision))
}

// sourceLeft takes an owner's word that it has stopped. That of a former owner,
// or of a former assignment to the same relay, changes nothing.
func (a *applier) sourceLeft(c *command.IPLeft) (any, error) {
	old, err := a.source(c.GetSource())
	if err != nil {
		return nil, err
	}
	if !leaving(old) || !bytes.Equal(old.Owner[:], c.GetNode()) || old.Epoch != c.GetEpoch() {
		return old, nil
	}
	if err := a.recovering(); err != nil {
		return nil, err
	}
	row := *old
	if row.Owner = (ids.Node{}); row.State == control.SourceReleasing {
		row.State = control.SourceFree
	}
	return a.putSource(&row, old.Revision)
}

// sourceQuarantine has nobody send from an address.
func (a *applier) sourceQuarantine(c *command.IPQuarantine) (any, error) {
	old, err := a.source(c.GetSource())
	if err != nil {
		return nil, err
	}
	if old.State == control.SourceQuarantined {
		return old, nil // repeated: it stays known why it was at first
	}
	row := *old
	row.State, row.Quarantine = control.SourceQuarantined, a.reason
	return a.putSource(&row, revisionOr(c.GetExpect(), old.Revision))
}

// leaving reports whether an address has an owner that is to stop using it.
func leaving(s *control.Source) bool {
	return !s.Owner.IsZero() && (s.State == control.SourceReleasing || s.State == control.SourceQuarantined)
}

// viewLeaving names the addresses that relays are to stop using. They are not
// among the view's sources, so that relays of any release stop; those that know
// of this list say when they have.
func (r *Reader) viewLeaving(v *policy.View) {
	if r.Cluster().FSMVersion < PeersVersion {
		return
	}
	for _, s := range r.Sources() {
		if owner := r.Node(s.Owner); leaving(s) && owner != nil && owner.State.Connects() {
			v.Leaving = append(v.Leaving, policy.LeavingSource{ID: s.ID, Owner: s.Owner, Epoch: s.Epoch})
		}
	}
}
