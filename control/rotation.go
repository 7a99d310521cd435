package control

import (
	"bytes"
	"fmt"
	"slices"
	"time"

	"github.com/relais-mta/relais/shared/ids"
)

// RotationVersion is the version of the commands that brought the change of
// the issuing key, and lists of removed servers in the relays' view.
const RotationVersion = 3

// RotationPhase is where the change of the issuing key stands.
type RotationPhase string

// The phases. Distribute, sign and return wait for members; the other two are
// ends.
const (
	PhaseDistribute RotationPhase = "distribute"  // everybody learns of the new CA; the old one signs
	PhaseSign       RotationPhase = "sign"        // the new one signs; everybody renews
	PhaseReturn     RotationPhase = "return"      // rolled back while the new one signed: the old one signs, everybody renews
	PhaseDone       RotationPhase = "done"        // the old one is dropped
	PhaseRolledBack RotationPhase = "rolled-back" // the new one is given up
)

// Running reports whether the phase waits for members.
func (p RotationPhase) Running() bool {
	return p == PhaseDistribute || p == PhaseSign || p == PhaseReturn
}

// Next returns the phase that follows when every member has acknowledged p, p
// itself for an end.
func (p RotationPhase) Next() RotationPhase {
	switch p {
	case PhaseDistribute:
		return PhaseSign
	case PhaseSign:
		return PhaseDone
	case PhaseReturn:
		return PhaseRolledBack
	}
	return p
}

// Back returns the phase that a rollback leads to, and whether there is a way
// back: not from an end, and not twice.
func (p RotationPhase) Back() (RotationPhase, bool) {
	switch p {
	case PhaseDistribute:
		return PhaseRolledBack, true // nothing was signed with the new key
	case PhaseSign:
		return PhaseReturn, true
	}
	return p, false
}

// IssuingCA is an issuing CA with its keys.
type IssuingCA struct {
	KeyID       string // subject key identifier, hexadecimal
	Certificate []byte // PEM
	Sealed      []byte // the keys of root and issuing CA, under the KEK; empty: given up
	NotAfter    time.Time
}

// Rotation is the one row about the change of the issuing key: the one that
// runs, or the last one.
type Rotation struct {
	Phase     RotationPhase
	StartedAt time.Time
	Since     time.Time // of the phase
	Old, New  IssuingCA
	Root      []byte         // PEM
	Acked     []ids.Node     // in order; members that did what the phase asks
	Skips     []RotationSkip // in order of their members
	Revision  uint64
}

// RotationSkip is a member that the rotation does not wait for.
type RotationSkip struct {
	Member ids.Node
	Actor  string
	Reason string
}

// Bundle returns the CAs that everybody believes in this phase, in PEM: the
// issuing CA that signs, the other one while it is believed, the root.
func (r *Rotation) Bundle() []byte {
	switch r.Phase {
	case PhaseDistribute, PhaseReturn:
		return slices.Concat(r.Old.Certificate, r.New.Certificate, r.Root)
	case PhaseSign:
		return slices.Concat(r.New.Certificate, r.Old.Certificate, r.Root)
	case PhaseDone:
		return slices.Concat(r.New.Certificate, r.Root)
	}
	return slices.Concat(r.Old.Certificate, r.Root)
}

// Signer returns the issuing CA that signs in this phase.
func (r *Rotation) Signer() *IssuingCA {
	if r.Phase == PhaseSign || r.Phase == PhaseDone {
		return &r.New
	}
	return &r.Old
}

// RotationMember is a node or server that holds a certificate.
type RotationMember struct {
	ID     ids.Node
	Name   string
	Server bool
	State  NodeState
	Ended  time.Time // end of its certificate; zero: not known
}

// RenewGrace is how long after its end a certificate is still renewed; it is
// pki.RenewGrace, which rules about the state may not import.
const RenewGrace = 30 * 24 * time.Hour

// Gates reports whether a rotation waits for the member: it belongs to the
// cluster, and its certificate opens something or can be renewed at the time.
func (m *RotationMember) Gates(now time.Time) bool {
	switch {
	case m.Server:
		return m.State != NodeEvicted
	case !m.State.Connects():
		return false
	}
	return m.Ended.IsZero() || !now.After(m.Ended.Add(RenewGrace))
}

// Waits returns the members that the running phase waits for.
func (r *Rotation) Waits(members []RotationMember, now time.Time) (out []RotationMember) {
	for _, m := range members {
		if r.Phase.Running() && m.Gates(now) && !r.HasAcked(m.ID) && r.Skip(m.ID) == nil {
			out = append(out, m)
		}
	}
	return out
}

func byID(a, b ids.Node) int { return bytes.Compare(a[:], b[:]) }

// HasAcked reports whether a member has acknowledged the phase.
func (r *Rotation) HasAcked(member ids.Node) bool {
	_, ok := slices.BinarySearchFunc(r.Acked, member, byID)
	return ok
}

// Skip returns who let the rotation go on without a member, and why; nil if it
// waits for it.
func (r *Rotation) Skip(member ids.Node) *RotationSkip {
	i, ok := slices.BinarySearchFunc(r.Skips, member, func(s RotationSkip, id ids.Node) int { return byID(s.Member, id) })
	if !ok {
		return nil
	}
	return &r.Skips[i]
}

// Ack returns the rotation with a member that has acknowledged.
func (r Rotation) Ack(member ids.Node) Rotation {
	if i, ok := slices.BinarySearchFunc(r.Acked, member, byID); !ok {
		r.Acked = slices.Insert(slices.Clone(r.Acked), i, member)
	}
	return r
}

// WithSkip returns the rotation without a member to wait for.
func (r Rotation) WithSkip(s RotationSkip) Rotation {
	i, ok := slices.BinarySearchFunc(r.Skips, s.Member, func(s RotationSkip, id ids.Node) int { return byID(s.Member, id) })
	if !ok {
		r.Skips = slices.Insert(slices.Clone(r.Skips), i, s)
	}
	return r
}

// Enter returns the rotation in another phase. Keys that are not needed any
// more are left out of it: after an end nobody can sign with them again.
func (r Rotation) Enter(phase RotationPhase, now time.Time) Rotation {
	r.Phase, r.Since, r.Acked = phase, now, nil
	switch phase {
	case PhaseDone:
		r.Old.Sealed, r.New.Sealed = nil, nil // the new one is in the cluster's row
	case PhaseRolledBack:
		r.Old.Sealed, r.New.Sealed = nil, nil
	}
	return r
}

// Summary renders the row for the audit tail, without secrets.
func (r *Rotation) Summary() string {
	return fmt.Sprintf("phase=%s old=%s new=%s acked=%d skipped=%d", r.Phase, r.Old.KeyID, r.New.KeyID, len(r.Acked), len(r.Skips))
}

// RefusedCA is an issuing CA that was given up before its time.
type RefusedCA struct {
	KeyID    string
	Until    time.Time // its own end
	Revision uint64
}

// ServerCertificate is a certificate that a control server was given.
type ServerCertificate struct {
	Serial   string // hexadecimal
	NotAfter time.Time
}

// RevokedServer is a control server that was removed; relays refuse whoever
// presents its certificates.
type RevokedServer struct {
	Server   ids.Node
	Serials  []string
	Since    time.Time
	Until    time.Time // its last certificate is over for good
	Revision uint64
}
