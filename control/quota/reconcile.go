package quota

import (
	"bytes"
	"context"
	"slices"

	"github.com/relais-mta/relais/control"
	"github.com/relais-mta/relais/control/command"
	"github.com/relais-mta/relais/control/state"
	"github.com/relais-mta/relais/shared/fault"
	"github.com/relais-mta/relais/shared/ids"
	"github.com/relais-mta/relais/shared/lease"
	"github.com/relais-mta/relais/shared/policy"
	"github.com/relais-mta/relais/shared/wire"
)

// follow brings the grantor up to date with what was changed beside it: the
// policy, relays that came, and relays that were put out.
func (t *term) follow(ctx context.Context) error {
	if err := t.reconcile(ctx); err != nil {
		return err
	}
	if err := t.numberNew(ctx); err != nil {
		return err
	}
	r := t.l.o.State.Read()
	row := r.Lease()
	switch {
	case r.Recovery() != nil:
		return errRecovery
	case row.Epoch != t.epoch:
		return fault.New(fault.Conflict, "quota.follow", "another leader has begun to lend: entry %d", row.Epoch)
	case row.Reclaim != t.config:
		return fault.New(fault.Conflict, "quota.follow", "leases are of another length from now on")
	case row.Changed == t.changed:
		return nil
	}
	t.changed = row.Changed
	seen := make(map[lease.LimitID]bool, len(t.limits))
	for _, l := range r.SharedLimits() {
		seen[l.ID] = true
		if t.limits[l.ID] != l.Limit {
			t.limits[l.ID] = l.Limit
			t.grantor.PutLimit(l.Limit)
		}
	}
	for id := range t.limits {
		if !seen[id] {
			delete(t.limits, id)
			t.grantor.DropLimit(id)
		}
	}
	for _, n := range r.LeaseNodes() {
		if n.Gone && !t.gone[n.Number] {
			t.gone[n.Number] = true
			t.grantor.Evict(n.Number)
		}
	}
	return nil
}

// numberNew gives relays that greeted their numbers, and takes their greetings.
func (t *term) numberNew(ctx context.Context) error {
	if len(t.hellos) == 0 {
		return nil
	}
	c := &command.LeaseNumber{}
	for node := range t.hellos {
		if len(c.Nodes) < command.MaxLeaseNumbers {
			c.Nodes = append(c.Nodes, append([]byte(nil), node[:]...))
		}
	}
	slices.SortFunc(c.Nodes, bytes.Compare)
	if _, err := t.propose(ctx, c); err != nil {
		return err
	}
	t.number(t.l.o.State.Read())
	for _, id := range c.Nodes {
		node := ids.Node(id)
		m := t.hellos[node]
		delete(t.hellos, node)
		if n, known := t.numbers[node]; known { // else it was put out
			if h, _, err := wire.DecodeLeaseHello(n, m.Body.(*wire.LeaseHello)); err == nil {
				t.grantor.Hello(m.At, h)
			}
		}
	}
	return nil
}

// reconcile makes the replicated limits what the policy says, whenever the policy
// was changed.
func (t *term) reconcile(ctx context.Context) error {
	r := t.l.o.State.Read()
	row := r.Policy()
	if t.looked && row.Revision == t.policy {
		return nil
	}
	commands, err := limitCommands(r)
	if err != nil {
		// The policy was checked when it was put; what some other release let
		// through must not end the lending of what there is.
		t.l.o.Logger.Error("the limits of the policy cannot be read: those of before stay", "error", err)
	}
	for _, c := range commands {
		if _, err := t.propose(ctx, c); err != nil {
			return err
		}
	}
	t.looked, t.policy = true, row.Revision
	return nil
}

// limitKey finds a limit: an entry of the policy gives one of each kind.
type limitKey struct {
	name string
	kind lease.Kind
}

// limitCommands returns the commands that make the limits what the policy says.
func limitCommands(r *state.Reader) ([]*command.LimitsSet, error) {
	sections := map[string]string{}
	for _, s := range r.Policy().Sections {
		sections[s.Name] = s.Text
	}
	doc, err := policy.Parse(sections)
	if err != nil {
		return nil, err
	}
	wanted := make(map[limitKey]bool)
	present := make(map[limitKey]*control.SharedLimit)
	for _, l := range r.SharedLimits() {
		present[limitKey{l.Name, l.Kind}] = l
	}
	var changes, drops []limitChange
	for i := range doc.Limits.Limit {
		e := &doc.Limits.Limit[i]
		limits, err := e.Leases()
		if err != nil {
			return nil, err
		}
		for _, limit := range limits {
			key := limitKey{e.Name, limit.Kind}
			wanted[key] = true
			next := control.SharedLimit{Limit: limit, Name: e.Name, Provider: e.Provider, Tenant: e.Tenant, Domain: e.Domain, Pool: e.Pool}
			change := limitChange{put: command.SharedLimitRecord(&next)}
			if old := present[key]; old != nil {
				if old.Per != limit.Per {
					change.drop = old.ID // what is held of it means nothing under the new one
				} else {
					same := next
					same.ID, same.Revision = old.ID, old.Revision
					if same == *old {
						continue
					}
				}
			}
			changes = append(changes, change)
		}
	}
	for _, l := range r.SharedLimits() {
		if !wanted[limitKey{l.Name, l.Kind}] {
			drops = append(drops, limitChange{drop: l.ID})
		}
	}
	return limitSets(append(changes, drops...), r.Lease().Config, doc.Limits.Lease.Config()), nil
}

// limitChange is a limit that goes, one that comes or changes, or one that comes in
// the place of another.
type limitChange struct {
	drop lease.LimitID        // 0: none
	put  *command.SharedLimit // nil: none
}

// limitSets divides a change among commands, after each of which relays may have a
// view: mail that is limited before and after it is limited in between. So a limit
// goes in the command of the one that comes in its place, and for good at last.
func limitSets(changes []limitChange, before, after lease.Config) []*command.LimitsSet {
	meta := &command.Meta{Actor: "system", Reason: "section limits of the policy"}
	var out []*command.LimitsSet
	if before != after {
		out = append(out, &command.LimitsSet{Meta: meta, Config: command.LeaseConfigRecord(after)})
	}
	named := command.MaxLimitsInSet
	for _, change := range changes {
		if named+2 > command.MaxLimitsInSet {
			out, named = append(out, &command.LimitsSet{Meta: meta}), 0
		}
		c := out[len(out)-1]
		if change.drop != 0 {
			c.Drop, named = append(c.Drop, uint64(change.drop)), named+1
		}
		if change.put != nil {
			c.Put, named = append(c.Put, change.put), named+1
		}
	}
	return out
}
