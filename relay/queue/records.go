package queue

import (
	"encoding/binary"

	"google.golang.org/protobuf/encoding/protowire"

	"github.com/relais-mta/relais/relay"
	"github.com/relais-mta/relais/relay/store"
	"github.com/relais-mta/relais/shared/fault"
	"github.com/relais-mta/relais/shared/ids"
	"github.com/relais-mta/relais/shared/mailaddr"
	"github.com/relais-mta/relais/shared/policy"
)

// Fields of a journalled attempt.
const (
	atQueue    protowire.Number = 1
	atIndex    protowire.Number = 2
	atStarted  protowire.Number = 3
	atSource   protowire.Number = 4
	atSourceIP protowire.Number = 5
	atEpoch    protowire.Number = 6
	atProvider protowire.Number = 7
	atMX       protowire.Number = 8
	atRemoteIP protowire.Number = 9
	atTLS      protowire.Number = 10
)

// journalEntry is an attempt whose end is not known yet.
type journalEntry struct {
	queue   Number
	indexes []uint16
	attempt relay.Attempt
}

func appendAttempt(b []byte, n Number, recipients []WorkRecipient, a *relay.Attempt) []byte {
	b = append(b, attemptVersion)
	b = putUint(b, atQueue, uint64(n))
	for i := range recipients {
		// Index 0 is written too, so that the list is complete.
		b = protowire.AppendVarint(protowire.AppendTag(b, atIndex, protowire.VarintType), uint64(recipients[i].Index))
	}
	b = putTime(b, atStarted, a.StartedAt)
	b = putID(b, atSource, a.Source)
	b = putAddr(b, atSourceIP, a.SourceIP)
	b = putUint(b, atEpoch, a.Epoch)
	b = putString(b, atProvider, a.Provider)
	b = putString(b, atMX, a.MX)
	b = putAddr(b, atRemoteIP, a.RemoteIP)
	return putString(b, atTLS, a.TLS)
}

func parseAttempt(id ids.Message, b []byte) (j journalEntry, err error) {
	const op = "queue.parseAttempt"
	if len(b) < 1 || b[0] != attemptVersion {
		return j, fault.New(fault.Invalid, op, "a journalled attempt of %s is damaged or of a newer version", id)
	}
	j.attempt.Message = id
	err = fields(b[1:], func(n protowire.Number, v uint64, text []byte) {
		a := &j.attempt
		switch n {
		case atQueue:
			j.queue = Number(v)
		case atIndex:
			j.indexes = append(j.indexes, uint16(v))
		case atStarted:
			a.StartedAt = fromMS(v)
		case atSource:
			copy(a.Source[:], text)
		case atSourceIP:
			a.SourceIP = toAddr(text)
		case atEpoch:
			a.Epoch = v
		case atProvider:
			a.Provider = string(text)
		case atMX:
			a.MX = string(text)
		case atRemoteIP:
			a.RemoteIP = toAddr(text)
		case atTLS:
			a.TLS = string(text)
		}
	})
	if err == nil && (j.queue == 0 || len(j.indexes) == 0 || j.attempt.StartedAt.IsZero()) {
		err = fault.New(fault.Invalid, op, "it is cut short")
	}
	return j, fault.Wrap(err, fault.Invalid, op, "a journalled attempt of %s is damaged", id)
}

// Fields of a work queue's record.
const (
	qTenant protowire.Number = 1
	qStream protowire.Number = 2
	qPool   protowire.Number = 3
	qDomain protowire.Number = 4
	qKind   protowire.Number = 5
	qFloor  protowire.Number = 6
)

func appendQueue(b []byte, k *Key, floorMS int64) []byte {
	b = append(b, queueVersion)
	b = putID(b, qTenant, k.Tenant)
	b = putStream(b, qStream, k.Stream, k.Priority)
	b = putID(b, qPool, k.Pool)
	b = putString(b, qDomain, string(k.Domain))
	b = putString(b, qKind, string(k.Kind))
	return putUint(b, qFloor, uint64(floorMS))
}

func parseQueue(b []byte) (k Key, floorMS int64, err error) {
	const op = "queue.parseQueue"
	if len(b) < 1 || b[0] != queueVersion {
		return k, 0, fault.New(fault.Invalid, op, "the record of a work queue is damaged or of a newer version")
	}
	err = fields(b[1:], func(n protowire.Number, v uint64, text []byte) {
		switch n {
		case qTenant:
			copy(k.Tenant[:], text)
		case qStream:
			k.Stream, k.Priority = parseStream(text)
		case qPool:
			copy(k.Pool[:], text)
		case qDomain:
			k.Domain = mailaddr.Domain(text)
		case qKind:
			k.Kind = policy.StreamKind(text)
		case qFloor:
			floorMS = int64(v)
		}
	})
	if err == nil && k.Domain == "" {
		err = fault.New(fault.Invalid, op, "it names no domain")
	}
	return k, floorMS, fault.Wrap(err, fault.Invalid, op, "the record of a work queue is damaged")
}

// Fields of an inbound mail.
const (
	inTenant   protowire.Number = 1
	inOriginal protowire.Number = 2
	inIndex    protowire.Number = 3 // index plus one; absent: for the whole message
	inTo       protowire.Number = 4
	inSender   protowire.Number = 5
	inRemoteIP protowire.Number = 6
	inReceived protowire.Number = 7
)

func appendInbound(b []byte, in *Inbound, body relay.BodyRef) []byte {
	b = append(b, inboundVersion)
	b = store.AppendRef(b, body)
	b = putID(b, inTenant, in.Tenant)
	b = putID(b, inOriginal, in.Original)
	if in.PerRecipient {
		b = putUint(b, inIndex, uint64(in.Index)+1)
	}
	b = putString(b, inTo, in.To.String())
	b = putString(b, inSender, in.Sender.String())
	b = putAddr(b, inRemoteIP, in.RemoteIP)
	return putTime(b, inReceived, in.ReceivedAt)
}

func parseInbound(id ids.Message, b []byte) (in Inbound, err error) {
	const op = "queue.parseInbound"
	if len(b) < 1+store.RefBytes || b[0] != inboundVersion {
		return in, fault.New(fault.Invalid, op, "the inbound mail %s is damaged or of a newer version", id)
	}
	in.ID = id
	var ok bool
	if in.Body, ok = store.ParseRef(b[1:]); !ok {
		return in, fault.New(fault.Invalid, op, "the body reference of the inbound mail %s is damaged", id)
	}
	err = fields(b[1+store.RefBytes:], func(n protowire.Number, v uint64, text []byte) {
		switch n {
		case inTenant:
			copy(in.Tenant[:], text)
		case inOriginal:
			copy(in.Original[:], text)
		case inIndex:
			in.Index, in.PerRecipient = uint16(v-1), true
		case inTo:
			in.To = splitAddress(string(text))
		case inSender:
			in.Sender = splitAddress(string(text))
		case inRemoteIP:
			in.RemoteIP = toAddr(text)
		case inReceived:
			in.ReceivedAt = fromMS(v)
		}
	})
	return in, fault.Wrap(err, fault.Invalid, op, "the inbound mail %s is damaged", id)
}

// appendFloor and parseFloor are the record of the deadline index: no deadline
// is earlier.
func appendFloor(b []byte, floorMS int64) []byte {
	return binary.BigEndian.AppendUint64(b, uint64(floorMS))
}

func parseFloor(b []byte) int64 {
	if len(b) != 8 {
		return 0 // only a hint where to begin: reading from the start is always right
	}
	return int64(binary.BigEndian.Uint64(b))
}
