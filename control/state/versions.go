package state

import (
	"encoding/binary"
	"slices"

	"google.golang.org/protobuf/proto"

	"github.com/relais-mta/relais/control"
	"github.com/relais-mta/relais/control/command"
)

// maxPolicyVersionBytes bounds all kept versions together; the newest stays
// however long it is.
const maxPolicyVersionBytes = 16 << 20

// policyVersionsTable holds former policies. It is not part of the state hash:
// servers of the release before this one apply the same changes and keep none.
var policyVersionsTable = &table[control.PolicyVersion]{
	name: "policy versions", section: sectionPolicyVersions, maxRows: command.MaxPolicyVersions + 2, unhashed: true,
	key:      func(v *control.PolicyVersion) []byte { return versionKey(v.Policy) },
	record:   func(v *control.PolicyVersion) proto.Message { return command.PolicyVersionRecord(v) },
	row:      unmarshalRow[command.PolicyVersion, control.PolicyVersion],
	revision: func(v *control.PolicyVersion) *uint64 { return &v.Revision },
}

func versionKey(revision uint64) []byte { return binary.BigEndian.AppendUint64(nil, revision) }

// keepVersions adds the new policy, and the old one if it was put by a release
// that kept none, and drops the oldest ones beyond keep.
func (a *applier) keepVersions(old, row *control.Policy, keep int) error {
	if old != nil && get(a.txn, policyVersionsTable, "id", versionKey(old.Revision)) == nil {
		if err := put(a, policyVersionsTable, &control.PolicyVersion{Policy: old.Revision, Sections: old.Sections}); err != nil {
			return err
		}
	}
	if err := put(a, policyVersionsTable, &control.PolicyVersion{Policy: row.Revision, Time: a.now, Actor: a.actor, Reason: a.reason, Sections: row.Sections}); err != nil {
		return err
	}
	kept := all(a.txn, policyVersionsTable)
	slices.Reverse(kept) // newest first
	bytes := 0
	for i, v := range kept {
		for _, s := range v.Sections {
			bytes += len(s.Text)
		}
		if i >= min(keep, command.MaxPolicyVersions) || i > 0 && bytes > maxPolicyVersionBytes {
			remove(a, policyVersionsTable, v)
		}
	}
	return nil
}

// PolicyVersion returns the policy as it was at a revision, or nil if it is
// not kept. Revision 0 is the shipped policy.
func (r *Reader) PolicyVersion(revision uint64) *control.PolicyVersion {
	if revision == 0 {
		return &control.PolicyVersion{}
	}
	return get(r.txn, policyVersionsTable, "id", versionKey(revision))
}

// PolicyVersions returns the kept policies, newest first.
func (r *Reader) PolicyVersions() []*control.PolicyVersion {
	out := all(r.txn, policyVersionsTable)
	slices.Reverse(out)
	return out
}
