// Package command holds the numbered commands that change the replicated state
// and the envelope they travel in. It is pure: a command carries every id, time
// and random value it needs, stamped by who proposes it, so that each server
// that applies it comes to the same state.
//
// The envelope is
//
//	type u8 | fsm_version u16 | ts_ms i64 | term u64 | protobuf body
//
// in big-endian order. The high bit of the type says that a server which does
// not know the type may skip the entry. Type numbers and field numbers are only
// ever added.
package command

import (
	"encoding/binary"
	"errors"
	"fmt"
	"time"

	"google.golang.org/protobuf/proto"

	"github.com/relais-mta/relais/shared/fault"
)

// FSMVersion is the newest command version this program can apply.
const FSMVersion uint16 = 6

// headerBytes is the length of the envelope in front of the body.
const headerBytes = 1 + 2 + 8 + 8

// MaxBytes bounds an encoded command: the policy's 256 KiB and some room.
const MaxBytes = 320 << 10

// Envelope is a decoded log entry.
type Envelope struct {
	Type       Type
	FSMVersion uint16
	Time       time.Time // stamped by the leader, millisecond precision
	Term       uint64    // of the proposer
	Body       Command   // nil for a type that may be skipped and is not known
}

// ErrUnknown is in the chain of a Decode error about a command that this
// program cannot apply and must not skip.
var ErrUnknown = errors.New("unknown command")

var marshal = proto.MarshalOptions{Deterministic: true}

// Encode returns the bytes of c as proposed at now in the given raft term.
func Encode(c Command, now time.Time, term uint64) ([]byte, error) {
	const op = "command.Encode"
	typ := TypeOf(c)
	if typ == 0 {
		return nil, fault.New(fault.Internal, op, "%T is not a registered command", c)
	}
	b := make([]byte, headerBytes, headerBytes+proto.Size(c))
	b[0] = byte(typ)
	binary.BigEndian.PutUint16(b[1:], Since(typ)) // so that older servers apply what they know
	binary.BigEndian.PutUint64(b[3:], uint64(now.UnixMilli()))
	binary.BigEndian.PutUint64(b[11:], term)
	b, err := marshal.MarshalAppend(b, c)
	if err != nil {
		return nil, fault.Wrap(err, fault.Invalid, op, "a %s command holds text that is not UTF-8", typ)
	}
	if len(b) > MaxBytes {
		return nil, fault.New(fault.TooLarge, op, "a %s command has %d bytes, allowed are %d: split the change", typ, len(b), MaxBytes)
	}
	return b, nil
}

// Decode reads a log entry. An unknown type that may be skipped yields an
// envelope without a body; any other entry this program cannot apply yields an
// error that wraps ErrUnknown.
func Decode(b []byte) (Envelope, error) {
	const op = "command.Decode"
	if len(b) < headerBytes {
		return Envelope{}, fault.Wrap(ErrUnknown, fault.Internal, op, "a log entry has %d bytes, fewer than its header's %d", len(b), headerBytes)
	}
	e := Envelope{
		Type:       Type(b[0]),
		FSMVersion: binary.BigEndian.Uint16(b[1:]),
		Time:       time.UnixMilli(int64(binary.BigEndian.Uint64(b[3:]))).UTC(),
		Term:       binary.BigEndian.Uint64(b[11:]),
	}
	reg := byType[e.Type]
	if reg == nil || e.FSMVersion > FSMVersion {
		if e.Type&IgnorableBit != 0 {
			return e, nil
		}
		return e, fault.Wrap(ErrUnknown, fault.Internal, op,
			"the log holds a command of type %d version %d, this program knows types up to version %d: install a newer release", e.Type, e.FSMVersion, FSMVersion)
	}
	e.Body = reg.make()
	if err := proto.Unmarshal(b[headerBytes:], e.Body); err != nil {
		return e, fault.Wrap(fmt.Errorf("%w: %w", ErrUnknown, err), fault.Internal, op, "the body of a %s command cannot be read", e.Type)
	}
	if set, ok := e.Body.(*FSMVersionSet); ok && set.GetVersion() > uint32(FSMVersion) {
		return e, fault.Wrap(ErrUnknown, fault.Internal, op,
			"the cluster works at version %d of the commands, this program knows %d: this directory was written by a newer release, install that or a newer one", set.GetVersion(), FSMVersion)
	}
	return e, nil
}

// IsCheckpoint reports whether an encoded command is a StateHash, without
// decoding it.
func IsCheckpoint(b []byte) bool { return len(b) >= headerBytes && Type(b[0]) == TypeStateHash }
