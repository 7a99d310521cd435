package state

import (
	"fmt"

	"google.golang.org/protobuf/proto"

	"github.com/relais-mta/relais/control"
	"github.com/relais-mta/relais/control/command"
	"github.com/relais-mta/relais/shared/fault"
)

var recoveryTable = &table[control.Recovery]{
	name: "recovery", section: sectionRecovery, maxRows: 1,
	key:      func(*control.Recovery) []byte { return singleton },
	record:   func(r *control.Recovery) proto.Message { return command.RecoveryRecord(r) },
	row:      unmarshalRow[command.Recovery, control.Recovery],
	revision: func(r *control.Recovery) *uint64 { return &r.Revision },
}

// recoveryNamesVersion is the version of the commands since which the audit
// entry of a recovery names the servers and tokens that it ended.
const recoveryNamesVersion = 3

// generationTimeVersion is the version of the commands since which a generation
// may be any number above the last. When it was the next one, a cluster that was
// recovered and then restored from an older backup came to the same number
// twice, and relays of the first held the second for its past.
const generationTimeVersion = 3

// clusterRecover begins a new generation with one server. Join tokens from
// before are void: their uses may be spent already, in what was lost.
func (a *applier) clusterRecover(c *command.ClusterRecover) (any, error) {
	old := get(a.txn, clusterTable, "id", singleton)
	if old == nil {
		return nil, fault.New(fault.NotFound, op, "the cluster is not initialised")
	}
	server, err := c.GetServer().Row()
	if err != nil {
		return nil, err
	}
	running := get(a.txn, recoveryTable, "id", singleton)
	if running != nil && running.Generation == c.GetGeneration() && old.Generation == c.GetGeneration() {
		return old, nil // repeated after an unknown outcome
	}
	switch next := old.Generation + 1; {
	case c.GetGeneration() < next, old.FSMVersion < generationTimeVersion && c.GetGeneration() != next:
		return nil, fault.New(fault.Conflict, op, "the cluster is at generation %d: the next one is %d, not %d", old.Generation, next, c.GetGeneration())
	case c.GetGeneration() > command.MaxGeneration:
		return nil, fault.Field(op, "generation", "%d lies beyond %d, the end of time as the cluster counts it", c.GetGeneration(), uint64(command.MaxGeneration))
	}
	var gone, void []string
	for _, s := range all(a.txn, serversTable) {
		if s.ID != server.ID {
			remove(a, serversTable, s)
			gone = append(gone, s.Name+"/"+s.ID.String())
			if err := a.revokeServer(s); err != nil {
				return nil, err
			}
		}
	}
	if err := put(a, serversTable, server); err != nil {
		return nil, err
	}
	for _, t := range all(a.txn, tokensTable) {
		if t.Revoked {
			continue
		}
		row := *t
		row.Revoked = true
		if err := put(a, tokensTable, &row); err != nil {
			return nil, err
		}
		void = append(void, row.ID.String())
	}
	recovery := &control.Recovery{Generation: c.GetGeneration(), Since: a.now, Cause: control.RecoveryCause(c.GetCause())}
	if err := put(a, recoveryTable, recovery); err != nil {
		return nil, err
	}
	row := *old
	row.Generation = c.GetGeneration()
	out, err := putRow(a, clusterTable, &row, change[control.Cluster]{what: "the cluster", object: row.ID.String(), expect: old.Revision})
	if err == nil && old.FSMVersion >= recoveryNamesVersion {
		// One entry of the log makes one of the tail: it names all that went.
		a.audit(row.ID.String(), old.Summary(), fmt.Sprintf("%s recovery: %s servers_removed=[%s] tokens_revoked=[%s]", row.Summary(), recovery.Summary(), clipNames(gone), clipNames(void)))
	}
	return out, err
}

// recoveryEnd ends recovery mode. Ending it again does nothing.
func (a *applier) recoveryEnd(c *command.RecoveryEnd) (any, error) {
	cluster := get(a.txn, clusterTable, "id", singleton)
	if cluster == nil {
		return nil, fault.New(fault.NotFound, op, "the cluster is not initialised")
	}
	old := get(a.txn, recoveryTable, "id", singleton)
	if old == nil {
		return cluster, nil
	}
	if old.Generation != c.GetGeneration() {
		return nil, fault.New(fault.Conflict, op, "the recovery that runs began with generation %d, not %d: look again", old.Generation, c.GetGeneration())
	}
	remove(a, recoveryTable, old)
	if err := a.settleLeases(); err != nil {
		return nil, err
	}
	a.audit("recovery", old.Summary(), "")
	return cluster, nil
}

// recovering refuses to hand an address to a node while relays may hold what
// this state does not know of.
func (a *applier) recovering() error {
	if r := get(a.txn, recoveryTable, "id", singleton); r != nil {
		e := fault.New(fault.Unavailable, op, "the cluster is in recovery mode since its %s: addresses change hands when every relay was heard; see `relais-control recovery show`", r.Cause)
		e.Field = "node"
		return e
	}
	return nil
}

// Recovery returns the row about recovery mode, or nil outside of it.
func (r *Reader) Recovery() *control.Recovery { return get(r.txn, recoveryTable, "id", singleton) }
