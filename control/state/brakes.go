package state

import (
	"slices"
	"time"

	"google.golang.org/protobuf/proto"

	"github.com/relais-mta/relais/control"
	"github.com/relais-mta/relais/control/command"
	"github.com/relais-mta/relais/shared/fault"
	"github.com/relais-mta/relais/shared/ids"
	"github.com/relais-mta/relais/shared/policy"
)

// Bounds of brakes.
const (
	sectionBrakes = 60

	maxBrakes          = 10_000
	maxBrakesInForce   = 1_000              // each is in every relay's view
	maxReflexBrakes    = 500                // of those
	brakeMemory        = 7 * 24 * time.Hour // ended brakes are kept so long, for people and so that old evidence sets none again
	maxBrakesPerSweep  = 500
	maxEndedBrakesKept = 5_000
)

var brakesTable = &table[control.Brake]{
	name: "brakes", section: sectionBrakes, maxRows: maxBrakes, inViews: true,
	key:      func(b *control.Brake) []byte { return b.ID[:] },
	record:   func(b *control.Brake) proto.Message { return command.BrakeRecord(b) },
	row:      unmarshalRow[command.Brake, control.Brake],
	revision: func(b *control.Brake) *uint64 { return &b.Revision },
}

// applyBrakes dispatches the commands about brakes; known is false for any other
// command.
func (a *applier) applyBrakes(body command.Command) (row any, known bool, err error) {
	switch c := body.(type) {
	case *command.BrakeSet:
		row, err = a.brakeSet(c)
	case *command.BrakeCancel:
		row, err = a.brakeCancel(c)
	case *command.BrakePin:
		row, err = a.brakePin(c)
	case *command.BrakeSweep:
		row, err = a.brakeSweep()
	default:
		return nil, false, nil
	}
	return row, true, err
}

func (a *applier) brakeSet(c *command.BrakeSet) (any, error) {
	row, err := c.GetBrake().Row()
	if err != nil {
		return nil, err
	}
	if err := a.scopeExists(&row.Scope); err != nil {
		return nil, err
	}
	if row.Automatic {
		old, err := a.ruled(row)
		if err != nil {
			return nil, err
		}
		if old != nil { // it goes on
			next := *row
			next.ID, next.CreatedAt, next.Pinned = old.ID, old.CreatedAt, old.Pinned
			return a.putBrake(&next, old.Revision)
		}
	}
	if get(a.txn, brakesTable, "id", row.ID[:]) == nil {
		if err := a.brakeRoom(row); err != nil {
			return nil, err
		}
	}
	return a.putBrake(row, 0)
}

// ruled looks at what a rule, or people after it, did about the same mail before.
// It returns the brake of the rule that is in force, if there is one, and refuses
// to set one again by evidence that a person has already answered.
func (a *applier) ruled(row *control.Brake) (inForce *control.Brake, err error) {
	for _, b := range all(a.txn, brakesTable) {
		if !b.Automatic || b.Owner != row.Owner || b.Scope != row.Scope || b.Node != row.Node {
			continue
		}
		if b.InForce() {
			inForce = b
			continue
		}
		if b.EndedBy != "" && b.EndedBy != b.Owner && !row.EvidenceAt.After(later(b.EvidenceAt, b.EndedAt)) {
			return nil, fault.New(fault.Conflict, op, "%s cancelled such a brake at %s: a rule does not set it again by evidence from before", b.EndedBy, b.EndedAt.Format(time.RFC3339))
		}
	}
	return inForce, nil
}

func later(a, b time.Time) time.Time {
	if a.After(b) {
		return a
	}
	return b
}

func (a *applier) scopeExists(s *control.BrakeScope) error {
	switch {
	case !s.Pool.IsZero() && get(a.txn, poolsTable, "id", s.Pool[:]) == nil:
		return fault.Field(op, "pool", "%s does not exist", s.Pool)
	case !s.Source.IsZero() && get(a.txn, sourcesTable, "id", s.Source[:]) == nil:
		return fault.Field(op, "source", "%s does not exist", s.Source)
	case !s.Tenant.IsZero() && get(a.txn, tenantsTable, "id", s.Tenant[:]) == nil:
		return fault.Field(op, "tenant", "%s does not exist", s.Tenant)
	}
	return nil
}

// brakeRoom refuses one more brake when there are too many.
func (a *applier) brakeRoom(row *control.Brake) error {
	inForce, reflexes := 0, 0
	for _, b := range all(a.txn, brakesTable) {
		if b.InForce() {
			inForce++
			if b.Automatic && b.Owner == control.BrakeReflex {
				reflexes++
			}
		}
	}
	reflex := row.Automatic && row.Owner == control.BrakeReflex
	switch {
	case reflex && reflexes >= maxReflexBrakes:
		return fault.New(fault.Exhausted, op, "%d brakes of relays' reflexes are shown already, as many as may be", reflexes)
	case inForce >= maxBrakesInForce:
		return fault.New(fault.Exhausted, op, "%d brakes are in force, as many as may be: cancel some, or set one of a wider scope", inForce)
	}
	return nil
}

func (a *applier) putBrake(row *control.Brake, expect uint64) (any, error) {
	return putRow(a, brakesTable, row, change[control.Brake]{what: "brake " + row.ID.String(), object: row.ID.String(), expect: expect})
}

func (a *applier) brakeOf(id []byte) (*control.Brake, error) {
	if b := get(a.txn, brakesTable, "id", id); b != nil {
		return b, nil
	}
	return nil, fault.New(fault.NotFound, op, "there is no such brake")
}

func (a *applier) brakeCancel(c *command.BrakeCancel) (any, error) {
	old, err := a.brakeOf(c.GetBrake())
	switch {
	case err != nil:
		return nil, err
	case !old.InForce():
		return old, nil // repeated after an unknown outcome
	case c.GetRule() != "" && old.Pinned:
		return nil, fault.New(fault.Conflict, op, "brake %s is pinned: a person ends it with `relais-control brake cancel`", old.ID)
	case c.GetRule() != "" && (!old.Automatic || old.Owner != c.GetRule()):
		return nil, fault.New(fault.Denied, op, "brake %s is not one of the rule %s", old.ID, c.GetRule())
	}
	row := *old
	row.EndedAt, row.EndedBy, row.EndReason = a.now, a.actor, a.reason
	if c.GetRule() != "" {
		row.EndedBy = c.GetRule()
	}
	return a.putBrake(&row, revisionOr(c.GetExpect(), old.Revision))
}

func (a *applier) brakePin(c *command.BrakePin) (any, error) {
	old, err := a.brakeOf(c.GetBrake())
	switch {
	case err != nil:
		return nil, err
	case !old.InForce():
		return nil, fault.New(fault.Conflict, op, "brake %s has ended: set another one", old.ID)
	}
	row := *old
	row.Pinned = c.GetPinned()
	return a.putBrake(&row, revisionOr(c.GetExpect(), old.Revision))
}

// brakeSweep ends the brakes whose time is over by the log's time, and forgets
// those that ended long ago.
func (a *applier) brakeSweep() (any, error) {
	swept := 0
	var ended []*control.Brake
	for _, b := range all(a.txn, brakesTable) {
		if swept >= maxBrakesPerSweep {
			break
		}
		switch {
		case b.InForce() && !b.Pinned && !b.Until.IsZero() && !b.Until.After(a.now):
			row := *b
			row.EndedAt = a.now
			if _, err := a.putBrake(&row, b.Revision); err != nil {
				return nil, err
			}
			swept++
		case !b.InForce() && b.EndedAt.Before(a.now.Add(-brakeMemory)):
			remove(a, brakesTable, b)
			swept++
		case !b.InForce():
			ended = append(ended, b)
		}
	}
	slices.SortStableFunc(ended, func(x, y *control.Brake) int { return x.EndedAt.Compare(y.EndedAt) })
	for i := 0; i < len(ended)-maxEndedBrakesKept && swept < maxBrakesPerSweep; i++ {
		remove(a, brakesTable, ended[i])
		swept++
	}
	return nil, nil
}

// Brakes returns the brakes, oldest first.
func (r *Reader) Brakes() []*control.Brake { return all(r.txn, brakesTable) }

// Brake returns the brake, or nil.
func (r *Reader) Brake(id ids.Brake) *control.Brake { return get(r.txn, brakesTable, "id", id[:]) }

// BrakesDue reports whether a sweep has something to do at a time.
func (r *Reader) BrakesDue(now time.Time) bool {
	due, ended := false, 0
	each(r.txn, brakesTable, "id", nil, func(b *control.Brake) bool {
		if b.InForce() {
			due = !b.Pinned && !b.Until.IsZero() && !b.Until.After(now)
		} else {
			ended++
			due = b.EndedAt.Before(now.Add(-brakeMemory)) || ended > maxEndedBrakesKept
		}
		return !due
	})
	return due
}

// viewBrakes tells relays what to restrict. Of the brakes that tell of a relay's
// own reflex it says only which ones a person has ended.
func (r *Reader) viewBrakes(v *policy.View) {
	each(r.txn, brakesTable, "id", nil, func(b *control.Brake) bool {
		reflex := b.Automatic && b.Owner == control.BrakeReflex
		if b.InForce() == reflex || reflex && b.EndedBy == control.BrakeReflex || reflex && b.EndedBy == "" {
			return true
		}
		row := policy.Brake{ID: b.ID, Provider: b.Scope.Provider, Pool: b.Scope.Pool, Source: b.Scope.Source, Tenant: b.Scope.Tenant, Domain: b.Scope.Domain,
			Percent: b.Percent, Cause: b.Cause, Owner: b.Owner, CreatedAt: b.CreatedAt, Until: b.Until}
		if b.Pinned {
			row.Until = time.Time{}
		}
		if reflex {
			row.Released, row.Node = b.EndedAt, b.Node
		}
		v.Brakes = append(v.Brakes, row)
		return true
	})
}
