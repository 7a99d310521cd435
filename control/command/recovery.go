package command

import "github.com/relais-mta/relais/control"

// MaxGeneration bounds the generation of a cluster, which is a time in seconds
// since 1970 or a small number.
const MaxGeneration = 1 << 40

// firstTypes to fifthTypes are the last type numbers of versions 1 to 5 of the
// commands. What was added later is logged only when every server of the cluster
// knows it.
const (
	firstTypes  = 20
	secondTypes = 59
	thirdTypes  = 80
	fourthTypes = 113
	fifthTypes  = 120
)

// Since returns the first version of the commands that has the type.
func Since(t Type) uint16 {
	if t&^IgnorableBit <= firstTypes {
		return 1
	}
	if t&^IgnorableBit <= secondTypes {
		return 2
	}
	if t&^IgnorableBit <= thirdTypes {
		return 3
	}
	if t&^IgnorableBit <= fourthTypes {
		return 4
	}
	if t&^IgnorableBit <= fifthTypes {
		return 5
	}
	return 6
}

// RecoveryRecord returns the record of the row.
func RecoveryRecord(r *control.Recovery) *Recovery {
	return &Recovery{Generation: r.Generation, SinceMs: millis(r.Since), Cause: string(r.Cause)}
}

// Row returns the row of the record.
func (r *Recovery) Row() (*control.Recovery, error) {
	return &control.Recovery{Generation: r.GetGeneration(), Since: fromMillis(r.GetSinceMs()), Cause: control.RecoveryCause(r.GetCause())}, nil
}

// Validate implements Command.
func (c *ClusterRecover) Validate() error {
	return first(checkMeta(c.GetMeta()), oneOf("cause", c.GetCause(), string(control.CauseRestore), string(control.CauseRecover)), (&ServerUpsert{Server: c.GetServer()}).Validate())
}

// Validate implements Command.
func (c *RecoveryEnd) Validate() error { return checkMeta(c.GetMeta()) }
