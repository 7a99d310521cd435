package outbox

import (
	"encoding/binary"
	"net/netip"
	"time"

	"google.golang.org/protobuf/encoding/protowire"

	"github.com/relais-mta/relais/relay"
	"github.com/relais-mta/relais/shared/fault"
	"github.com/relais-mta/relais/shared/ids"
)

// Schema is the version of the event encoding.
const Schema = 1

// Type says what happened.
type Type uint8

// The event types. Numbers are stored and travel to control: append only.
const (
	None      Type = 0  // no event
	Accepted  Type = 1  // a recipient was taken over from a client
	Deferred  Type = 2  // an attempt ended, the recipient waits again
	Delivered Type = 3  // final
	Bounced   Type = 4  // final
	Expired   Type = 5  // final
	InDoubt   Type = 6  // a crash or a broken connection hid the end of an attempt
	Unknown   Type = 7  // final: in doubt twice
	Inbound   Type = 8  // mail came to a signed return path
	DSN       Type = 9  // a notification was queued to the sender
	Held      Type = 10 // waits for a person
	Released  Type = 11 // a held recipient waits for its next attempt again
	Delayed   Type = 12 // the sender was told about a delay
	Gap       Type = 13 // made by Read: the Count events up to and including Seq were dropped
	Untold    Type = 14 // a notification about the recipient was kept back: its sender had as many as policy allows
	Purged    Type = 15 // final: an operator removed it, nobody was told
	Hastened  Type = 16 // an operator made its next attempt due at once
	Locked    Type = 17 // logins are refused for a time after Attempts failures: from the network Address, of Credential if one is named; Next is the end
	Unlocked  Type = 18 // that time is over; Attempts logins were refused meanwhile
	Alert     Type = 19 // an automatic check of a sending domain began to fail: Class names it, Reply says how
	AlertOver Type = 20 // it does not any more
	Moved     Type = 21 // final here: the relay that Reply names has the recipient now
	Slowed    Type = 22 // mail from Source to Provider is slowed down by its reflex, to PerHour and Connections; Class and Reply say after what, Next is the next step
	Stopped   Type = 23 // likewise, and none is sent before Next
	Probed    Type = 24 // likewise, and one connection looks whether the host takes mail again
	Restored  Type = 25 // policy's limits hold for it again
	Braked    Type = 26 // Brake began to hold (Class) or slow mail down here: that of Source, Provider, Pool, Tenant and of recipients at Address, as far as they are given; Reply says why, Actor whose it is
	Unbraked  Type = 27 // it is over
	types          = 28
)

var typeNames = [types]string{"none", "accepted", "deferred", "delivered", "bounced", "expired", "in-doubt",
	"unknown", "inbound", "dsn", "held", "released", "delayed", "gap", "untold", "purged", "hastened", "locked", "unlocked", "alert", "alert-over", "handed-over",
	"slowed", "stopped", "probed", "restored", "braked", "unbraked"}

// String returns the name that metrics and reports use.
func (t Type) String() string {
	if int(t) < len(typeNames) {
		return typeNames[t]
	}
	return "?"
}

// Event is one thing that happened. Zero fields are unknown or do not apply.
// Times are kept to the millisecond.
type Event struct {
	Seq     uint64 // assigned at commit, strictly consecutive within a stream generation
	Type    Type
	At      time.Time // when it was written
	Message ids.Message
	Index   uint16 // of the recipient
	Tenant  ids.Tenant
	Project ids.Project
	Stream  string
	Tag     string // of the client
	Pool    ids.Pool

	Address string // of the recipient; of a lock, the network; of a brake, the recipients' domain
	Size    int64  // bytes of the message

	Source   ids.Source
	SourceIP netip.Addr
	Epoch    uint64
	Provider string
	MX       string
	RemoteIP netip.Addr
	TLS      string

	Phase relay.Phase
	Class string
	Reply relay.Reply

	AcceptedAt time.Time
	StartedAt  time.Time // of the attempt
	EndedAt    time.Time
	Next       time.Time // of the next attempt
	Attempts   uint32
	Revision   uint64         // policy revision
	Actor      string         // who asked for it; empty: the relay by itself
	Credential ids.Credential // of a lock; zero: the lock is the network's
	Domain     string         // sending domain, of an event about one
	Brake      ids.Brake
	PerHour    int64 // messages that a reflex allows; 0: as policy says
	Conns      int   // connections likewise

	Count uint64 // of a Gap: events dropped
}

// Field numbers of the encoding. Append only; a reader skips what it does not
// know.
const (
	fieldAt         protowire.Number = 1
	fieldMessage    protowire.Number = 2
	fieldIndex      protowire.Number = 3
	fieldTenant     protowire.Number = 4
	fieldProject    protowire.Number = 5
	fieldStream     protowire.Number = 6
	fieldPool       protowire.Number = 7
	fieldAddress    protowire.Number = 8
	fieldSize       protowire.Number = 9
	fieldSource     protowire.Number = 10
	fieldSourceIP   protowire.Number = 11
	fieldEpoch      protowire.Number = 12
	fieldProvider   protowire.Number = 13
	fieldMX         protowire.Number = 14
	fieldRemoteIP   protowire.Number = 15
	fieldTLS        protowire.Number = 16
	fieldPhase      protowire.Number = 17
	fieldClass      protowire.Number = 18
	fieldReplyCode  protowire.Number = 19
	fieldReplyEnh   protowire.Number = 20
	fieldReplyText  protowire.Number = 21
	fieldAcceptedAt protowire.Number = 22
	fieldStartedAt  protowire.Number = 23
	fieldEndedAt    protowire.Number = 24
	fieldNext       protowire.Number = 25
	fieldAttempts   protowire.Number = 26
	fieldRevision   protowire.Number = 27
	fieldTag        protowire.Number = 28
	fieldActor      protowire.Number = 29
	fieldCredential protowire.Number = 30
	fieldDomain     protowire.Number = 31
	fieldBrake      protowire.Number = 32
	fieldPerHour    protowire.Number = 33
	fieldConns      protowire.Number = 34
)

// eventHeaderBytes are in front of the fields: schema and type.
const eventHeaderBytes = 2

// Append appends the encoding of e, without its sequence number, to b.
func (e *Event) Append(b []byte) []byte {
	b = append(b, Schema, byte(e.Type))
	b = appendTime(b, fieldAt, e.At)
	b = appendID(b, fieldMessage, e.Message)
	b = appendUint(b, fieldIndex, uint64(e.Index))
	b = appendID(b, fieldTenant, e.Tenant)
	b = appendID(b, fieldProject, e.Project)
	b = appendString(b, fieldStream, e.Stream)
	b = appendID(b, fieldPool, e.Pool)
	b = appendString(b, fieldAddress, e.Address)
	b = appendUint(b, fieldSize, uint64(e.Size))
	b = appendID(b, fieldSource, e.Source)
	b = appendAddr(b, fieldSourceIP, e.SourceIP)
	b = appendUint(b, fieldEpoch, e.Epoch)
	b = appendString(b, fieldProvider, e.Provider)
	b = appendString(b, fieldMX, e.MX)
	b = appendAddr(b, fieldRemoteIP, e.RemoteIP)
	b = appendString(b, fieldTLS, e.TLS)
	b = appendUint(b, fieldPhase, uint64(e.Phase))
	b = appendString(b, fieldClass, e.Class)
	b = appendUint(b, fieldReplyCode, uint64(e.Reply.Code))
	b = appendString(b, fieldReplyEnh, e.Reply.Enhanced)
	b = appendString(b, fieldReplyText, e.Reply.Text)
	b = appendTime(b, fieldAcceptedAt, e.AcceptedAt)
	b = appendTime(b, fieldStartedAt, e.StartedAt)
	b = appendTime(b, fieldEndedAt, e.EndedAt)
	b = appendTime(b, fieldNext, e.Next)
	b = appendUint(b, fieldAttempts, uint64(e.Attempts))
	b = appendUint(b, fieldRevision, e.Revision)
	b = appendString(b, fieldTag, e.Tag)
	b = appendString(b, fieldActor, e.Actor)
	b = appendID(b, fieldCredential, e.Credential)
	b = appendString(b, fieldDomain, e.Domain)
	b = appendID(b, fieldBrake, e.Brake)
	b = appendUint(b, fieldPerHour, uint64(e.PerHour))
	return appendUint(b, fieldConns, uint64(e.Conns))
}

func appendUint(b []byte, n protowire.Number, v uint64) []byte {
	if v == 0 {
		return b
	}
	return protowire.AppendVarint(protowire.AppendTag(b, n, protowire.VarintType), v)
}

func appendTime(b []byte, n protowire.Number, t time.Time) []byte {
	if t.IsZero() {
		return b
	}
	return appendUint(b, n, uint64(t.UnixMilli()))
}

func appendString(b []byte, n protowire.Number, s string) []byte {
	if s == "" {
		return b
	}
	return protowire.AppendString(protowire.AppendTag(b, n, protowire.BytesType), s)
}

func appendID[K ids.Kind](b []byte, n protowire.Number, id ids.ID[K]) []byte {
	if id.IsZero() {
		return b
	}
	return protowire.AppendBytes(protowire.AppendTag(b, n, protowire.BytesType), id[:])
}

func appendAddr(b []byte, n protowire.Number, a netip.Addr) []byte {
	if !a.IsValid() {
		return b
	}
	if a.Is4() {
		four := a.As4()
		return protowire.AppendBytes(protowire.AppendTag(b, n, protowire.BytesType), four[:])
	}
	sixteen := a.As16()
	return protowire.AppendBytes(protowire.AppendTag(b, n, protowire.BytesType), sixteen[:])
}

// Parse reads what Append wrote. A newer schema and damaged bytes are Invalid
// faults.
func (e *Event) Parse(b []byte) error {
	const op = "outbox.Parse"
	*e = Event{}
	if len(b) < eventHeaderBytes {
		return fault.New(fault.Invalid, op, "an event of %d bytes is damaged", len(b))
	}
	if b[0] > Schema {
		return fault.New(fault.Invalid, op, "the event has schema %d, this binary reads up to %d", b[0], Schema)
	}
	e.Type = Type(b[1])
	for b = b[eventHeaderBytes:]; len(b) > 0; {
		n, kind, size := protowire.ConsumeTag(b)
		if size < 0 {
			return fault.Wrap(protowire.ParseError(size), fault.Invalid, op, "an event is damaged")
		}
		b = b[size:]
		var number uint64
		var text []byte
		switch kind {
		case protowire.VarintType:
			number, size = protowire.ConsumeVarint(b)
		case protowire.BytesType:
			text, size = protowire.ConsumeBytes(b)
		default:
			size = protowire.ConsumeFieldValue(n, kind, b)
		}
		if size < 0 {
			return fault.Wrap(protowire.ParseError(size), fault.Invalid, op, "an event is damaged")
		}
		b = b[size:]
		if kind == protowire.VarintType {
			e.setNumber(n, number)
		} else if kind == protowire.BytesType {
			e.setBytes(n, text)
		}
	}
	return nil
}

func (e *Event) setNumber(n protowire.Number, v uint64) {
	at := func() time.Time { return time.UnixMilli(int64(v)).UTC() }
	switch n {
	case fieldAt:
		e.At = at()
	case fieldIndex:
		e.Index = uint16(v)
	case fieldSize:
		e.Size = int64(v)
	case fieldEpoch:
		e.Epoch = v
	case fieldPhase:
		e.Phase = relay.Phase(v)
	case fieldReplyCode:
		e.Reply.Code = uint16(v)
	case fieldAcceptedAt:
		e.AcceptedAt = at()
	case fieldStartedAt:
		e.StartedAt = at()
	case fieldEndedAt:
		e.EndedAt = at()
	case fieldNext:
		e.Next = at()
	case fieldAttempts:
		e.Attempts = uint32(v)
	case fieldRevision:
		e.Revision = v
	case fieldPerHour:
		e.PerHour = int64(v)
	case fieldConns:
		e.Conns = int(v)
	}
}

func (e *Event) setBytes(n protowire.Number, v []byte) {
	switch n {
	case fieldMessage:
		copy(e.Message[:], v)
	case fieldTenant:
		copy(e.Tenant[:], v)
	case fieldProject:
		copy(e.Project[:], v)
	case fieldPool:
		copy(e.Pool[:], v)
	case fieldSource:
		copy(e.Source[:], v)
	case fieldCredential:
		copy(e.Credential[:], v)
	case fieldBrake:
		copy(e.Brake[:], v)
	case fieldStream:
		e.Stream = string(v)
	case fieldTag:
		e.Tag = string(v)
	case fieldActor:
		e.Actor = string(v)
	case fieldDomain:
		e.Domain = string(v)
	case fieldAddress:
		e.Address = string(v)
	case fieldSourceIP:
		e.SourceIP, _ = netip.AddrFromSlice(v) // wrong lengths become "unknown"
	case fieldRemoteIP:
		e.RemoteIP, _ = netip.AddrFromSlice(v)
	case fieldProvider:
		e.Provider = string(v)
	case fieldMX:
		e.MX = string(v)
	case fieldTLS:
		e.TLS = string(v)
	case fieldClass:
		e.Class = string(v)
	case fieldReplyEnh:
		e.Reply.Enhanced = string(v)
	case fieldReplyText:
		e.Reply.Text = string(v)
	}
}

// nextEvent cuts the first length-prefixed event off a run.
func nextEvent(run []byte) (event, rest []byte, ok bool) {
	n, size := binary.Uvarint(run)
	if size <= 0 || n > uint64(len(run)-size) {
		return nil, nil, false
	}
	return run[size : size+int(n)], run[size+int(n):], true
}
