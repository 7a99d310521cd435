package state

import (
	"slices"
	"strings"

	"google.golang.org/protobuf/proto"

	"github.com/relais-mta/relais/control"
	"github.com/relais-mta/relais/control/command"
	"github.com/relais-mta/relais/shared/fault"
)

var policyTable = &table[control.Policy]{
	name: "policy", section: sectionPolicy, maxRows: 1, inViews: true,
	key:      func(*control.Policy) []byte { return singleton },
	record:   func(p *control.Policy) proto.Message { return command.PolicyRecord(p) },
	row:      unmarshalRow[command.Policy, control.Policy],
	revision: func(p *control.Policy) *uint64 { return &p.Revision },
}

var returnPathKeysTable = &table[control.ReturnPathKey]{
	name: "return-path keys", section: sectionReturnPathKeys, maxRows: maxReturnPathKeys, inViews: true,
	key:      func(k *control.ReturnPathKey) []byte { return []byte{k.ID} },
	record:   func(k *control.ReturnPathKey) proto.Message { return command.ReturnPathKeyRecord(k) },
	row:      unmarshalRow[command.ReturnPathKey, control.ReturnPathKey],
	revision: func(k *control.ReturnPathKey) *uint64 { return &k.Revision },
}

// policyPut overlays the named sections on those put before. Whether the texts
// make sense was checked before the proposal, by the release that made it.
func (a *applier) policyPut(c *command.PolicyPut) (any, error) {
	old := get(a.txn, policyTable, "id", singleton)
	merged := map[string]string{}
	if old != nil {
		for _, s := range old.Sections {
			merged[s.Name] = s.Text
		}
	}
	for _, s := range c.GetSections() {
		if len(s.GetText()) > command.MaxPolicyBytes {
			return nil, fault.New(fault.TooLarge, op, "section %s has %d bytes, allowed are %d", s.GetName(), len(s.GetText()), command.MaxPolicyBytes)
		}
		if merged[s.GetName()] = s.GetText(); s.GetText() == "" {
			delete(merged, s.GetName())
		}
	}
	if len(merged) > command.MaxPolicySections {
		return nil, fault.New(fault.Exhausted, op, "the policy has %d sections, allowed are %d", len(merged), command.MaxPolicySections)
	}
	row := &control.Policy{}
	for name, text := range merged {
		row.Sections = append(row.Sections, control.PolicySection{Name: name, Text: text})
	}
	slices.SortFunc(row.Sections, func(x, y control.PolicySection) int { return strings.Compare(x.Name, y.Name) })
	out, err := putRow(a, policyTable, row, change[control.Policy]{what: "the policy", object: "policy", expect: c.GetExpect()})
	if err == nil && row.Revision == a.index && c.GetKeepVersions() > 0 {
		err = a.keepVersions(old, row, int(c.GetKeepVersions()))
	}
	return out, err
}

func (a *applier) returnPathKeyPut(c *command.ReturnPathKeyPut) (any, error) {
	row, err := c.GetKey().Row()
	if err != nil {
		return nil, err
	}
	return putRow(a, returnPathKeysTable, row, change[control.ReturnPathKey]{what: "the return-path key", object: row.Summary(), expect: c.GetExpect(), check: func(old *control.ReturnPathKey) error {
		if old != nil {
			return fault.New(fault.Exists, op, "return-path key %d exists already: addresses in use are signed with it; take another number", row.ID)
		}
		return nil
	}})
}

// Policy returns the policy as the operators put it; it is empty before.
func (r *Reader) Policy() *control.Policy {
	if p := get(r.txn, policyTable, "id", singleton); p != nil {
		return p
	}
	return &control.Policy{}
}

// ReturnPathKeys returns the keys, newest first: the first one signs.
func (r *Reader) ReturnPathKeys() []*control.ReturnPathKey {
	keys := all(r.txn, returnPathKeysTable)
	slices.SortFunc(keys, func(x, y *control.ReturnPathKey) int {
		switch {
		case x.Revision > y.Revision:
			return -1
		case x.Revision < y.Revision:
			return 1
		}
		return 0
	})
	return keys
}
