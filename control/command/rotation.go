package command

import (
	"github.com/relais-mta/relais/control"
	"github.com/relais-mta/relais/shared/fault"
	"github.com/relais-mta/relais/shared/ids"
)

// Bounds of what commands about the issuing key carry.
const (
	MaxRotationAcks       = 1_000 // members in one command
	MaxServerCertificates = 32    // remembered of one server
	maxKeyIDBytes         = 128
	maxSerialBytes        = 64
)

func rotationType(c Command) Type {
	switch c.(type) {
	case *CARotate:
		return TypeCARotate
	case *CAAck:
		return TypeCAAck
	case *CAAdvance:
		return TypeCAAdvance
	case *CASkip:
		return TypeCASkip
	case *CARollback:
		return TypeCARollback
	case *CAPrune:
		return TypeCAPrune
	}
	return 0
}

func checkHex(field, text string, most int) error {
	if text == "" || len(text) > most {
		return fault.Field(opValidate, field, "has %d digits, allowed are 1 to %d", len(text), most)
	}
	for i := 0; i < len(text); i++ {
		if c := text[i]; (c < '0' || c > '9') && (c < 'a' || c > 'f') {
			return fault.Field(opValidate, field, "%q is not hexadecimal in lower case", text)
		}
	}
	return nil
}

func checkCertificates(in []*ServerCertificate) error {
	if len(in) > MaxServerCertificates {
		return fault.Field(opValidate, "certificates", "%d are too many, allowed are %d", len(in), MaxServerCertificates)
	}
	for _, c := range in {
		if err := checkHex("serial", c.GetSerial(), maxSerialBytes); err != nil {
			return err
		}
	}
	return nil
}

var runningPhases = []string{string(control.PhaseDistribute), string(control.PhaseSign), string(control.PhaseReturn)}

// Validate implements Command.
func (c *CARotate) Validate() error {
	n := c.GetNext()
	if n == nil {
		return missing("next")
	}
	if n.GetNotAfterMs() <= 0 {
		return missing("not_after")
	}
	return first(checkMeta(c.GetMeta()), checkHex("key_id", n.GetKeyId(), maxKeyIDBytes), checkHex("old_key_id", c.GetOldKeyId(), maxKeyIDBytes), checkBytes("certificate", n.GetCertificate(), 1, MaxCABytes), checkBytes("sealed", n.GetSealed(), 1, MaxCABytes))
}

// Validate implements Command.
func (c *CAAck) Validate() error {
	if n := len(c.GetMembers()); n < 1 || n > MaxRotationAcks {
		return fault.Field(opValidate, "members", "%d are out of range, allowed are 1 to %d", n, MaxRotationAcks)
	}
	for _, m := range c.GetMembers() {
		if err := checkBytes("member", m, ids.Size, ids.Size); err != nil {
			return err
		}
	}
	return first(checkMeta(c.GetMeta()), checkHex("rotation", c.GetRotation(), maxKeyIDBytes), oneOf("phase", c.GetPhase(), runningPhases...))
}

// Validate implements Command.
func (c *CAAdvance) Validate() error {
	return first(checkMeta(c.GetMeta()), checkHex("rotation", c.GetRotation(), maxKeyIDBytes), oneOf("phase", c.GetPhase(), runningPhases...))
}

// Validate implements Command.
func (c *CASkip) Validate() error {
	return first(checkMeta(c.GetMeta()), checkHex("rotation", c.GetRotation(), maxKeyIDBytes), checkBytes("member", c.GetMember(), ids.Size, ids.Size))
}

// Validate implements Command.
func (c *CARollback) Validate() error {
	return first(checkMeta(c.GetMeta()), checkHex("rotation", c.GetRotation(), maxKeyIDBytes))
}

// Validate implements Command.
func (c *CAPrune) Validate() error { return checkMeta(c.GetMeta()) }

// IssuingCARecord returns the record of an issuing CA.
func IssuingCARecord(ca *control.IssuingCA) *IssuingCA {
	return &IssuingCA{KeyId: ca.KeyID, Certificate: ca.Certificate, Sealed: ca.Sealed, NotAfterMs: millis(ca.NotAfter)}
}

// Row returns the issuing CA of the record.
func (r *IssuingCA) Row() control.IssuingCA {
	return control.IssuingCA{KeyID: r.GetKeyId(), Certificate: r.GetCertificate(), Sealed: r.GetSealed(), NotAfter: fromMillis(r.GetNotAfterMs())}
}

// RotationRecord returns the record of the row.
func RotationRecord(r *control.Rotation) *Rotation {
	out := &Rotation{Phase: string(r.Phase), StartedMs: millis(r.StartedAt), SinceMs: millis(r.Since), Old: IssuingCARecord(&r.Old), Next: IssuingCARecord(&r.New), Root: r.Root}
	for i := range r.Acked {
		out.Acked = append(out.Acked, optionalID(r.Acked[i]))
	}
	for _, s := range r.Skips {
		out.Skips = append(out.Skips, &RotationSkip{Member: optionalID(s.Member), Actor: s.Actor, Reason: s.Reason})
	}
	return out
}

// Row returns the row of the record.
func (r *Rotation) Row() (*control.Rotation, error) {
	var s scan
	out := &control.Rotation{Phase: control.RotationPhase(r.GetPhase()), StartedAt: fromMillis(r.GetStartedMs()), Since: fromMillis(r.GetSinceMs()), Old: r.GetOld().Row(), New: r.GetNext().Row(), Root: r.GetRoot()}
	for _, b := range r.GetAcked() {
		var id ids.Node
		setID(&s, "acked", &id, b)
		out.Acked = append(out.Acked, id)
	}
	for _, skip := range r.GetSkips() {
		row := control.RotationSkip{Actor: skip.GetActor(), Reason: skip.GetReason()}
		setID(&s, "member", &row.Member, skip.GetMember())
		out.Skips = append(out.Skips, row)
	}
	return out, s.err
}

// RefusedCARecord returns the record of the row.
func RefusedCARecord(r *control.RefusedCA) *RefusedCA {
	return &RefusedCA{KeyId: r.KeyID, UntilMs: millis(r.Until)}
}

// Row returns the row of the record.
func (r *RefusedCA) Row() (*control.RefusedCA, error) {
	return &control.RefusedCA{KeyID: r.GetKeyId(), Until: fromMillis(r.GetUntilMs())}, nil
}

// RevokedServerRecord returns the record of the row.
func RevokedServerRecord(r *control.RevokedServer) *RevokedServer {
	return &RevokedServer{Server: optionalID(r.Server), Serials: r.Serials, SinceMs: millis(r.Since), UntilMs: millis(r.Until)}
}

// Row returns the row of the record.
func (r *RevokedServer) Row() (*control.RevokedServer, error) {
	var s scan
	out := &control.RevokedServer{Serials: r.GetSerials(), Since: fromMillis(r.GetSinceMs()), Until: fromMillis(r.GetUntilMs())}
	setID(&s, "server", &out.Server, r.GetServer())
	return out, s.err
}
