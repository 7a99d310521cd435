package state

import (
	"encoding/pem"
	"fmt"
	"slices"
	"strings"
	"time"

	"google.golang.org/protobuf/proto"

	"github.com/relais-mta/relais/control"
	"github.com/relais-mta/relais/control/command"
	"github.com/relais-mta/relais/shared/fault"
	"github.com/relais-mta/relais/shared/ids"
)

var rotationTable = &table[control.Rotation]{
	name: "rotation", section: sectionRotation, maxRows: 1,
	key:      func(*control.Rotation) []byte { return singleton },
	record:   func(r *control.Rotation) proto.Message { return command.RotationRecord(r) },
	row:      unmarshalRow[command.Rotation, control.Rotation],
	revision: func(r *control.Rotation) *uint64 { return &r.Revision },
}

var refusedCAsTable = &table[control.RefusedCA]{
	name: "refused CAs", section: sectionRefusedCAs, maxRows: maxRefusedCAs, inViews: true,
	key:      func(r *control.RefusedCA) []byte { return text(r.KeyID) },
	record:   func(r *control.RefusedCA) proto.Message { return command.RefusedCARecord(r) },
	row:      unmarshalRow[command.RefusedCA, control.RefusedCA],
	revision: func(r *control.RefusedCA) *uint64 { return &r.Revision },
}

// splitBundle returns the issuing CA that signs and the root of a bundle, each
// as PEM.
func splitBundle(bundle []byte) (signer, root []byte, err error) {
	for block, rest := pem.Decode(bundle); block != nil; block, rest = pem.Decode(rest) {
		one := pem.EncodeToMemory(&pem.Block{Type: block.Type, Bytes: block.Bytes})
		if signer == nil {
			signer = one
		} else {
			root = one
		}
	}
	if signer == nil || root == nil {
		return nil, nil, fault.New(fault.Invalid, op, "the cluster's CA bundle is not an issuing CA and a root")
	}
	return signer, root, nil
}

// running returns the rotation that a command is about, if it runs.
func (a *applier) running(id string) (*control.Rotation, error) {
	r := get(a.txn, rotationTable, "id", singleton)
	if r == nil || !r.Phase.Running() {
		return nil, fault.New(fault.Conflict, op, "the issuing key is not being changed now: see `relais-control ca status`")
	}
	if r.New.KeyID != id {
		return nil, fault.New(fault.Conflict, op, "another change of the issuing key runs by now, to %s: look again", r.New.KeyID)
	}
	return r, nil
}

// saveRotation writes the row, and in the cluster's row who signs and who is
// believed.
func (a *applier) saveRotation(old *control.Rotation, row control.Rotation, sealed []byte) (*control.Rotation, error) {
	before := ""
	if old != nil {
		before = old.Summary()
	}
	if err := put(a, rotationTable, &row); err != nil {
		return nil, err
	}
	cluster := *get(a.txn, clusterTable, "id", singleton)
	bundle := row.Bundle()
	if sealed == nil {
		sealed = cluster.CASealed
	}
	if string(bundle) != string(cluster.CABundle) || string(sealed) != string(cluster.CASealed) {
		cluster.CABundle, cluster.CASealed = bundle, sealed
		if err := put(a, clusterTable, &cluster); err != nil {
			return nil, err
		}
	}
	a.audit("issuing key", before, row.Summary())
	return &row, nil
}

func (a *applier) caRotate(c *command.CARotate) (any, error) {
	cluster := get(a.txn, clusterTable, "id", singleton)
	if cluster == nil {
		return nil, fault.New(fault.NotFound, op, "the cluster is not initialised")
	}
	old := get(a.txn, rotationTable, "id", singleton)
	next := c.GetNext().Row()
	if old != nil && old.New.KeyID == next.KeyID {
		return old, nil // repeated after an unknown outcome
	}
	if old != nil && old.Phase.Running() && !c.GetAtOnce() {
		return nil, fault.New(fault.Conflict, op, "the issuing key is being changed already, phase %s: see `relais-control ca status`", old.Phase)
	}
	signer, root, err := splitBundle(cluster.CABundle)
	if err != nil {
		return nil, err
	}
	row := control.Rotation{Phase: control.PhaseDistribute, StartedAt: a.now, Since: a.now, New: next, Root: root,
		Old: control.IssuingCA{KeyID: c.GetOldKeyId(), Certificate: signer, Sealed: cluster.CASealed, NotAfter: fromMillis(c.GetOldNotAfterMs())}}
	var sealed []byte
	if c.GetAtOnce() {
		row.Phase, row.Old.Sealed, sealed = control.PhaseSign, nil, next.Sealed
	}
	return a.saveRotation(old, row, sealed)
}

func (a *applier) caAck(c *command.CAAck) (any, error) {
	old, err := a.running(c.GetRotation())
	if err != nil {
		return nil, err
	}
	if string(old.Phase) != c.GetPhase() {
		return nil, fault.New(fault.Conflict, op, "the phase %s is over, it is %s now", c.GetPhase(), old.Phase)
	}
	row, names := *old, []string{}
	members := a.members()
	for _, b := range c.GetMembers() {
		i := slices.IndexFunc(members, func(m control.RotationMember) bool { return string(m.ID[:]) == string(b) })
		if i >= 0 && members[i].Gates(a.now) && !row.HasAcked(members[i].ID) {
			row, names = row.Ack(members[i].ID), append(names, members[i].Name)
		}
	}
	if len(names) == 0 {
		return old, nil
	}
	if err := put(a, rotationTable, &row); err != nil {
		return nil, err
	}
	a.audit("issuing key", "", fmt.Sprintf("phase=%s acked by %s", row.Phase, clipNames(names)))
	return &row, nil
}

// maxAuditNames bounds how many names an audit entry spells out.
const maxAuditNames = 16

func clipNames(names []string) string {
	if n := len(names); n > maxAuditNames {
		return fmt.Sprintf("%s and %d others", strings.Join(names[:maxAuditNames], ", "), n-maxAuditNames)
	}
	return strings.Join(names, ", ")
}

func (a *applier) caAdvance(c *command.CAAdvance) (any, error) {
	old, err := a.running(c.GetRotation())
	if err != nil {
		return nil, err
	}
	if string(old.Phase) != c.GetPhase() {
		return nil, fault.New(fault.Conflict, op, "the phase %s is over already, it is %s now: look again", c.GetPhase(), old.Phase)
	}
	row := *old
	if waits := old.Waits(a.members(), a.now); len(waits) > 0 {
		names := make([]string, 0, len(waits))
		for _, m := range waits {
			names = append(names, m.Name)
			row = row.WithSkip(control.RotationSkip{Member: m.ID, Actor: a.actor, Reason: a.reason})
		}
		if !c.GetForce() {
			return nil, fault.New(fault.Conflict, op, "the phase %s still waits for %s", old.Phase, clipNames(names))
		}
	}
	return a.enterPhase(old, row, old.Phase.Next())
}

// enterPhase goes to another phase, which decides who signs.
func (a *applier) enterPhase(old *control.Rotation, row control.Rotation, phase control.RotationPhase) (any, error) {
	var sealed []byte
	switch phase {
	case control.PhaseSign:
		sealed = row.New.Sealed
	case control.PhaseReturn:
		sealed = row.Old.Sealed
	case control.PhaseRolledBack:
		if err := a.refuseCA(row.New); err != nil {
			return nil, err
		}
	}
	out, err := a.saveRotation(old, row.Enter(phase, a.now), sealed)
	if err != nil {
		return nil, err
	}
	return out, nil
}

// refuseCA remembers an issuing CA that was given up: it is newer than what
// nodes know, so only this list keeps them from believing it. In a full list
// the one that ends first makes room.
func (a *applier) refuseCA(ca control.IssuingCA) error {
	if a.progress.counts[sectionRefusedCAs] >= maxRefusedCAs {
		remove(a, refusedCAsTable, slices.MinFunc(all(a.txn, refusedCAsTable), func(x, y *control.RefusedCA) int { return x.Until.Compare(y.Until) }))
	}
	return put(a, refusedCAsTable, &control.RefusedCA{KeyID: ca.KeyID, Until: ca.NotAfter})
}

func (a *applier) caSkip(c *command.CASkip) (any, error) {
	old, err := a.running(c.GetRotation())
	if err != nil {
		return nil, err
	}
	var id ids.Node
	if err := readID(&id, c.GetMember()); err != nil {
		return nil, err
	}
	members := a.members()
	i := slices.IndexFunc(members, func(m control.RotationMember) bool { return m.ID == id })
	if i < 0 {
		return nil, fault.New(fault.NotFound, op, "there is no member %s", id)
	}
	if old.Skip(id) != nil {
		return old, nil
	}
	row := old.WithSkip(control.RotationSkip{Member: id, Actor: a.actor, Reason: a.reason})
	if err := put(a, rotationTable, &row); err != nil {
		return nil, err
	}
	a.audit("issuing key", "", "not waiting for "+members[i].Name)
	return &row, nil
}

func (a *applier) caRollback(c *command.CARollback) (any, error) {
	latest := get(a.txn, rotationTable, "id", singleton)
	if latest != nil && latest.New.KeyID == c.GetRotation() && (latest.Phase == control.PhaseReturn || latest.Phase == control.PhaseRolledBack) {
		return latest, nil // repeated after an unknown outcome
	}
	old, err := a.running(c.GetRotation())
	if err != nil {
		return nil, err
	}
	phase, ok := old.Phase.Back()
	if !ok || len(old.Old.Sealed) == 0 {
		return nil, fault.New(fault.Conflict, op, "there is no way back from this change: the old key is gone")
	}
	return a.enterPhase(old, *old, phase)
}

// caPrune forgets refused CAs and removed servers whose certificates are over.
func (a *applier) caPrune(*command.CAPrune) (any, error) {
	var gone []string
	for _, r := range all(a.txn, refusedCAsTable) {
		if a.now.After(r.Until) {
			remove(a, refusedCAsTable, r)
			gone = append(gone, "issuing CA "+r.KeyID)
		}
	}
	for _, r := range all(a.txn, revokedTable) {
		if a.now.After(r.Until) {
			remove(a, revokedTable, r)
			gone = append(gone, "server "+r.Server.String())
		}
	}
	if len(gone) > 0 {
		a.audit("revocations", clipNames(gone), "")
	}
	return nil, nil
}

// members returns everybody who holds a certificate of the cluster.
func (a *applier) members() []control.RotationMember { return (&Reader{a.txn}).RotationMembers() }

// RotationMembers returns everybody who holds a certificate of the cluster,
// servers first.
func (r *Reader) RotationMembers() (out []control.RotationMember) {
	for _, s := range r.Servers() {
		out = append(out, control.RotationMember{ID: s.ID, Name: s.Name, Server: true, State: s.State})
	}
	for _, n := range r.Nodes() {
		out = append(out, control.RotationMember{ID: n.ID, Name: n.Name, State: n.State, Ended: n.CertNotAfter})
	}
	return out
}

// Rotation returns the change of the issuing key that runs, or the last one; nil
// if there never was one.
func (r *Reader) Rotation() *control.Rotation { return get(r.txn, rotationTable, "id", singleton) }

// RefusedCAs returns the issuing CAs that were given up.
func (r *Reader) RefusedCAs() []*control.RefusedCA { return all(r.txn, refusedCAsTable) }

func fromMillis(ms int64) time.Time {
	if ms == 0 {
		return time.Time{}
	}
	return time.UnixMilli(ms).UTC()
}
