package state

import (
	"encoding/binary"

	"google.golang.org/protobuf/proto"

	"github.com/relais-mta/relais/control"
	"github.com/relais-mta/relais/control/command"
	"github.com/relais-mta/relais/shared/fault"
	"github.com/relais-mta/relais/shared/ids"
)

var operatorsTable = &table[control.Operator]{
	name: "operators", section: sectionOperators, maxRows: maxOperators,
	key:      func(o *control.Operator) []byte { return o.ID[:] },
	record:   func(o *control.Operator) proto.Message { return command.OperatorRecord(o) },
	row:      unmarshalRow[command.Operator, control.Operator],
	revision: func(o *control.Operator) *uint64 { return &o.Revision },
	indexes:  []index[control.Operator]{{name: "name", unique: true, key: func(o *control.Operator) []byte { return text(o.Name) }}},
}

var apiKeysTable = &table[control.APIKey]{
	name: "API keys", section: sectionAPIKeys, maxRows: maxAPIKeys,
	key:      func(k *control.APIKey) []byte { return k.ID[:] },
	record:   func(k *control.APIKey) proto.Message { return command.APIKeyRecord(k) },
	row:      unmarshalRow[command.APIKey, control.APIKey],
	revision: func(k *control.APIKey) *uint64 { return &k.Revision },
}

// The audit tail is told, not compared: its summaries may be worded otherwise
// by another release, so its rows are no part of the state hash.
var auditTable = &table[control.AuditEntry]{
	name: "audit entries", section: sectionAudit, maxRows: maxAuditEntries, unhashed: true,
	key:      func(e *control.AuditEntry) []byte { return binary.BigEndian.AppendUint64(nil, e.Index) },
	record:   func(e *control.AuditEntry) proto.Message { return command.AuditRecord(e) },
	row:      unmarshalRow[command.AuditEntry, control.AuditEntry],
	revision: func(e *control.AuditEntry) *uint64 { return &e.Index },
}

func (a *applier) operatorPut(c *command.OperatorPut) (any, error) {
	row, err := c.GetOperator().Row()
	if err != nil {
		return nil, err
	}
	return putRow(a, operatorsTable, row, change[control.Operator]{what: quoted("operator", row.Name), object: row.ID.String(), expect: c.GetExpect(), check: func(*control.Operator) error {
		if other := get(a.txn, operatorsTable, "name", text(row.Name)); other != nil && other.ID != row.ID {
			return taken("name", "operator", row.Name)
		}
		return nil
	}})
}

func (a *applier) apiKeyPut(c *command.APIKeyPut) (any, error) {
	row, err := c.GetKey().Row()
	if err != nil {
		return nil, err
	}
	return putRow(a, apiKeysTable, row, change[control.APIKey]{what: quoted("API key", row.Name), object: row.ID.String(), expect: c.GetExpect(), check: func(old *control.APIKey) error {
		if get(a.txn, operatorsTable, "id", row.Operator[:]) == nil {
			return fault.Field(op, "operator", "%s does not exist", row.Operator)
		}
		if old != nil && old.Revoked && !row.Revoked {
			return fault.New(fault.Conflict, op, "API key %s is revoked for good: create a new one", row.ID)
		}
		return nil
	}})
}

// audit appends to the tail and drops its oldest entry when it is full. One
// entry of the log makes at most one.
func (a *applier) audit(object, before, after string) {
	if a.progress.counts[sectionAudit] >= maxAuditEntries {
		if raw, err := a.txn.First(auditTable.name, "id_prefix", []byte(nil)); err == nil && raw != nil {
			remove(a, auditTable, raw.(*control.AuditEntry))
		}
	}
	e := &control.AuditEntry{Index: a.index, Time: a.now, Actor: a.actor, Reason: a.reason, Action: a.action, Object: object, Before: before, After: after}
	if err := put(a, auditTable, e); err != nil {
		panic("state: audit: " + err.Error()) // room was made above
	}
}

// Operator returns the operator, or nil.
func (r *Reader) Operator(id ids.Operator) *control.Operator {
	return get(r.txn, operatorsTable, "id", id[:])
}

// OperatorByName returns the operator of that name, or nil.
func (r *Reader) OperatorByName(name string) *control.Operator {
	return get(r.txn, operatorsTable, "name", text(name))
}

// Operators returns the operators, oldest first.
func (r *Reader) Operators() []*control.Operator { return all(r.txn, operatorsTable) }

// APIKey returns the key, or nil.
func (r *Reader) APIKey(id ids.Key) *control.APIKey { return get(r.txn, apiKeysTable, "id", id[:]) }

// Audit returns the newest entries, at most limit of them, newest first.
func (r *Reader) Audit(limit int) (out []*control.AuditEntry) {
	it, err := r.txn.GetReverse(auditTable.name, "id_prefix", []byte(nil))
	if err != nil {
		panic("state: audit: " + err.Error())
	}
	for raw := it.Next(); raw != nil && len(out) < limit; raw = it.Next() {
		out = append(out, raw.(*control.AuditEntry))
	}
	return out
}
