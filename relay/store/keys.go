package store

import (
	"encoding/binary"
	"time"

	"github.com/relais-mta/relais/relay"
	"github.com/relais-mta/relais/shared/ids"
)

// Key spaces: the first octet of every key.
const (
	SpaceMeta     = 0x00
	SpaceRule     = 'H' // rules that hold mail
	SpaceAttempt  = 'a'
	SpaceHeld     = 'h' // held recipients by rule
	SpaceInbound  = 'i'
	SpaceMessage  = 'm'
	SpaceOutbox   = 'o'
	SpaceQueue    = 'q'
	SpaceState    = 'r'
	SpaceWaiting  = 'w'
	SpaceDeadline = 'x'
	SpaceGiven    = 'g' // messages on their way to another relay, or gone there
	SpaceTaken    = 't' // messages that another relay handed over
)

var keyFormat = []byte("\x00format")

// KeyOutbox is the key of the outbox's own record.
var KeyOutbox = []byte("\x00outbox")

// KeyDeadlines is the key of the deadline index's own record.
var KeyDeadlines = []byte("\x00deadlines")

// Lengths of keys in bytes.
const (
	MessageKeyBytes  = 1 + ids.Size
	StateKeyBytes    = 1 + ids.Size + 2
	WaitingKeyBytes  = 1 + 4 + 8 + ids.Size + 2
	DeadlineKeyBytes = 1 + 8 + ids.Size
	QueueKeyBytes    = 1 + 4
	OutboxKeyBytes   = 1 + 8
	RuleKeyBytes     = 1 + ids.Size
	HeldKeyBytes     = 1 + 2*ids.Size + 2
	TransferKeyBytes = 1 + 2*ids.Size + 1
)

// AppendMessageKey appends the key of an envelope.
func AppendMessageKey(b []byte, id ids.Message) []byte {
	return append(append(b, SpaceMessage), id[:]...)
}

// AppendInboundKey appends the key of an inbound mail.
func AppendInboundKey(b []byte, id ids.Message) []byte {
	return append(append(b, SpaceInbound), id[:]...)
}

// AppendStatePrefix appends what the keys of all recipients' states of a
// message begin with.
func AppendStatePrefix(b []byte, id ids.Message) []byte {
	return append(append(b, SpaceState), id[:]...)
}

// AppendStateKey appends the key of a recipient's state.
func AppendStateKey(b []byte, id ids.Message, index uint16) []byte {
	return binary.BigEndian.AppendUint16(AppendStatePrefix(b, id), index)
}

// AppendAttemptPrefix appends what the keys of all journalled attempts of a
// message begin with.
func AppendAttemptPrefix(b []byte, id ids.Message) []byte {
	return append(append(b, SpaceAttempt), id[:]...)
}

// AppendAttemptKey appends the key of a journalled attempt whose first
// recipient is index.
func AppendAttemptKey(b []byte, id ids.Message, index uint16) []byte {
	return binary.BigEndian.AppendUint16(AppendAttemptPrefix(b, id), index)
}

// AppendWaitingPrefix appends what the keys of a work queue's waiting
// recipients begin with.
func AppendWaitingPrefix(b []byte, queue uint32) []byte {
	return binary.BigEndian.AppendUint32(append(b, SpaceWaiting), queue)
}

// AppendWaitingKey appends the key of a waiting recipient.
func AppendWaitingKey(b []byte, queue uint32, dueMS int64, id ids.Message, index uint16) []byte {
	b = binary.BigEndian.AppendUint64(AppendWaitingPrefix(b, queue), uint64(dueMS))
	return binary.BigEndian.AppendUint16(append(b, id[:]...), index)
}

// AppendDeadlineKey appends the key of a message's deadline.
func AppendDeadlineKey(b []byte, deadlineMS int64, id ids.Message) []byte {
	b = binary.BigEndian.AppendUint64(append(b, SpaceDeadline), uint64(deadlineMS))
	return append(b, id[:]...)
}

// AppendQueueKey appends the key of a work queue's record.
func AppendQueueKey(b []byte, queue uint32) []byte {
	return binary.BigEndian.AppendUint32(append(b, SpaceQueue), queue)
}

// AppendOutboxKey appends the key of a run of events.
func AppendOutboxKey(b []byte, seq uint64) []byte {
	return binary.BigEndian.AppendUint64(append(b, SpaceOutbox), seq)
}

// AppendRuleKey appends the key of a rule that holds mail.
func AppendRuleKey(b []byte, rule ids.Hold) []byte {
	return append(append(b, SpaceRule), rule[:]...)
}

// AppendHeldPrefix appends what the keys of the recipients that a rule holds
// begin with; the zero rule stands for those held by hand.
func AppendHeldPrefix(b []byte, rule ids.Hold) []byte {
	return append(append(b, SpaceHeld), rule[:]...)
}

// AppendHeldKey appends the key of a recipient that a rule holds.
func AppendHeldKey(b []byte, rule ids.Hold, id ids.Message, index uint16) []byte {
	return binary.BigEndian.AppendUint16(append(AppendHeldPrefix(b, rule), id[:]...), index)
}

// AppendTransferKey appends the key of a message's way to or from another
// relay: space is SpaceGiven or SpaceTaken, hop counts the ways it went.
func AppendTransferKey(b []byte, space byte, peer ids.Node, id ids.Message, hop uint8) []byte {
	b = append(append(b, space), peer[:]...)
	return append(append(b, id[:]...), hop)
}

// ParseTransferKey takes the key of a message's way apart.
func ParseTransferKey(k []byte) (peer ids.Node, id ids.Message, hop uint8, ok bool) {
	if len(k) != TransferKeyBytes || k[0] != SpaceGiven && k[0] != SpaceTaken {
		return peer, id, 0, false
	}
	copy(peer[:], k[1:])
	copy(id[:], k[1+ids.Size:])
	return peer, id, k[1+2*ids.Size], true
}

// ParseRuleKey takes the key of a rule apart.
func ParseRuleKey(k []byte) (rule ids.Hold, ok bool) {
	if len(k) != RuleKeyBytes || k[0] != SpaceRule {
		return rule, false
	}
	copy(rule[:], k[1:])
	return rule, true
}

// ParseHeldKey takes the key of a held recipient apart.
func ParseHeldKey(k []byte) (rule ids.Hold, id ids.Message, index uint16, ok bool) {
	if len(k) != HeldKeyBytes || k[0] != SpaceHeld {
		return rule, id, 0, false
	}
	copy(rule[:], k[1:])
	copy(id[:], k[1+ids.Size:])
	return rule, id, binary.BigEndian.Uint16(k[1+2*ids.Size:]), true
}

// ParseWaitingKey takes a waiting recipient's key apart.
func ParseWaitingKey(k []byte) (queue uint32, dueMS int64, id ids.Message, index uint16, ok bool) {
	if len(k) != WaitingKeyBytes || k[0] != SpaceWaiting {
		return 0, 0, id, 0, false
	}
	copy(id[:], k[13:29])
	return binary.BigEndian.Uint32(k[1:]), int64(binary.BigEndian.Uint64(k[5:])), id, binary.BigEndian.Uint16(k[29:]), true
}

// ParseDeadlineKey takes a deadline's key apart.
func ParseDeadlineKey(k []byte) (deadlineMS int64, id ids.Message, ok bool) {
	if len(k) != DeadlineKeyBytes || k[0] != SpaceDeadline {
		return 0, id, false
	}
	copy(id[:], k[9:])
	return int64(binary.BigEndian.Uint64(k[1:])), id, true
}

// ParseStateKey takes a recipient state's or journalled attempt's key apart.
func ParseStateKey(k []byte) (id ids.Message, index uint16, ok bool) {
	if len(k) != StateKeyBytes || k[0] != SpaceState && k[0] != SpaceAttempt {
		return id, 0, false
	}
	copy(id[:], k[1:])
	return id, binary.BigEndian.Uint16(k[1+ids.Size:]), true
}

// ParseMessageKey takes an envelope's or inbound mail's key apart.
func ParseMessageKey(k []byte) (id ids.Message, ok bool) {
	if len(k) != MessageKeyBytes || k[0] != SpaceMessage && k[0] != SpaceInbound {
		return id, false
	}
	copy(id[:], k[1:])
	return id, true
}

// ParseQueueKey takes a work queue's key apart.
func ParseQueueKey(k []byte) (queue uint32, ok bool) {
	if len(k) != QueueKeyBytes || k[0] != SpaceQueue {
		return 0, false
	}
	return binary.BigEndian.Uint32(k[1:]), true
}

// ParseOutboxKey takes the key of a run of events apart.
func ParseOutboxKey(k []byte) (seq uint64, ok bool) {
	if len(k) != OutboxKeyBytes || k[0] != SpaceOutbox {
		return 0, false
	}
	return binary.BigEndian.Uint64(k[1:]), true
}

// Milliseconds returns the form in which keys hold times; times before 1970
// become 0, so that they sort first.
func Milliseconds(t time.Time) int64 {
	return max(t.UnixMilli(), 0)
}

// RefBytes is the length of a body reference as AppendRef writes it.
const RefBytes = 1 + 8 + 8 + 8 + 8 + 4 + 32

// refPlace is where the committer writes segment and offset into a reference.
const refPlace = 1

// AppendRef appends the stored form of a body reference.
func AppendRef(b []byte, ref relay.BodyRef) []byte {
	b = append(b, byte(ref.Kind))
	b = binary.BigEndian.AppendUint64(b, ref.Segment)
	b = binary.BigEndian.AppendUint64(b, uint64(ref.Offset))
	b = binary.BigEndian.AppendUint64(b, uint64(ref.Length))
	b = binary.BigEndian.AppendUint64(b, uint64(ref.HeaderBytes))
	b = binary.BigEndian.AppendUint32(b, ref.CRC32C)
	return append(b, ref.BodyHash[:]...)
}

// ParseRef reads what AppendRef wrote.
func ParseRef(b []byte) (ref relay.BodyRef, ok bool) {
	if len(b) < RefBytes {
		return ref, false
	}
	ref.Kind = relay.BodyKind(b[0])
	ref.Segment = binary.BigEndian.Uint64(b[1:])
	ref.Offset = int64(binary.BigEndian.Uint64(b[9:]))
	ref.Length = int64(binary.BigEndian.Uint64(b[17:]))
	ref.HeaderBytes = int64(binary.BigEndian.Uint64(b[25:]))
	ref.CRC32C = binary.BigEndian.Uint32(b[33:])
	copy(ref.BodyHash[:], b[37:])
	return ref, ref.Kind <= relay.BodyFile && ref.Offset >= 0 && ref.Length >= 0 && ref.HeaderBytes >= 0
}
