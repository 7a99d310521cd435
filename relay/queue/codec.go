package queue

import (
	"net/netip"
	"time"

	"google.golang.org/protobuf/encoding/protowire"

	"github.com/relais-mta/relais/relay"
	"github.com/relais-mta/relais/relay/store"
	"github.com/relais-mta/relais/shared/fault"
	"github.com/relais-mta/relais/shared/ids"
	"github.com/relais-mta/relais/shared/mailaddr"
	"github.com/relais-mta/relais/shared/policy"
)

// Stored records begin with their codec's version; behind it (and behind the
// body reference, in envelopes and inbound mail) come fields in protobuf's wire
// encoding. Field numbers are append only, readers skip what they do not know.
const (
	envelopeVersion = 1
	stateVersion    = 1
	attemptVersion  = 1
	queueVersion    = 1
	inboundVersion  = 1
)

// Fields of an envelope.
const (
	envTenant     protowire.Number = 1
	envProject    protowire.Number = 2
	envCredential protowire.Number = 3
	envStream     protowire.Number = 4
	envKind       protowire.Number = 5
	envPool       protowire.Number = 6
	envSender     protowire.Number = 7
	envFrom       protowire.Number = 8
	envRecipient  protowire.Number = 9
	envFlags      protowire.Number = 10
	envClientIP   protowire.Number = 11
	envEnvID      protowire.Number = 12
	envAcceptedAt protowire.Number = 13
	envNotBefore  protowire.Number = 14
	envExpiresAt  protowire.Number = 15
	envRevision   protowire.Number = 16
	envFirstDue   protowire.Number = 17
	envTag        protowire.Number = 18
	envHops       protowire.Number = 19
	envHandedFrom protowire.Number = 20
	envHandedAt   protowire.Number = 21
)

// Fields of a recipient in an envelope.
const (
	rcptLocal  protowire.Number = 1
	rcptDomain protowire.Number = 2
	rcptNotify protowire.Number = 3
	rcptORCPT  protowire.Number = 4
)

const (
	flagEightBit = 1 << iota
	flagClientDKIM
	flagInternal
	flagRetFull
	flagSMTPUTF8
	flagBinaryMIME
)

func putUint(b []byte, n protowire.Number, v uint64) []byte {
	if v == 0 {
		return b
	}
	return protowire.AppendVarint(protowire.AppendTag(b, n, protowire.VarintType), v)
}

func putTime(b []byte, n protowire.Number, t time.Time) []byte {
	if t.IsZero() {
		return b
	}
	return putUint(b, n, uint64(t.UnixMilli()))
}

func putString(b []byte, n protowire.Number, s string) []byte {
	if s == "" {
		return b
	}
	return protowire.AppendString(protowire.AppendTag(b, n, protowire.BytesType), s)
}

func putID[K ids.Kind](b []byte, n protowire.Number, id ids.ID[K]) []byte {
	if id.IsZero() {
		return b
	}
	return protowire.AppendBytes(protowire.AppendTag(b, n, protowire.BytesType), id[:])
}

func putAddr(b []byte, n protowire.Number, a netip.Addr) []byte {
	if !a.IsValid() {
		return b
	}
	b = protowire.AppendTag(b, n, protowire.BytesType)
	if a.Is4() {
		four := a.As4()
		return protowire.AppendBytes(b, four[:])
	}
	sixteen := a.As16()
	return protowire.AppendBytes(b, sixteen[:])
}

// fields calls f for each field of a record; number and bytes are by kind.
func fields(b []byte, f func(n protowire.Number, number uint64, bytes []byte)) error {
	for len(b) > 0 {
		n, kind, size := protowire.ConsumeTag(b)
		if size < 0 {
			return protowire.ParseError(size)
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
			return protowire.ParseError(size)
		}
		b = b[size:]
		if kind == protowire.VarintType || kind == protowire.BytesType {
			f(n, number, text)
		}
	}
	return nil
}

func fromMS(v uint64) time.Time { return time.UnixMilli(int64(v)).UTC() }

func toAddr(b []byte) netip.Addr {
	a, _ := netip.AddrFromSlice(b) // a wrong length becomes "unknown"
	return a
}

// appendEnvelope appends the record of an envelope whose recipients are first
// due at firstDue.
func appendEnvelope(b []byte, e *relay.Envelope, body relay.BodyRef, firstDueMS int64) []byte {
	b = append(b, envelopeVersion)
	b = store.AppendRef(b, body)
	b = putID(b, envTenant, e.Tenant)
	b = putID(b, envProject, e.Project)
	b = putID(b, envCredential, e.Credential)
	b = putStream(b, envStream, e.Stream, e.Priority)
	b = putString(b, envKind, string(e.Kind))
	b = putID(b, envPool, e.Pool)
	b = putString(b, envSender, e.Sender.String())
	b = putString(b, envFrom, string(e.From))
	for i := range e.Recipients {
		r := &e.Recipients[i]
		b = protowire.AppendTag(b, envRecipient, protowire.BytesType)
		b = protowire.AppendVarint(b, uint64(recipientBytes(r)))
		b = putString(b, rcptLocal, r.Address.Local)
		b = putString(b, rcptDomain, string(r.Address.Domain))
		b = putUint(b, rcptNotify, uint64(r.Notify))
		b = putString(b, rcptORCPT, r.ORCPT)
	}
	b = putUint(b, envFlags, envelopeFlags(e))
	b = putAddr(b, envClientIP, e.ClientIP)
	b = putString(b, envEnvID, e.EnvID)
	b = putString(b, envTag, e.Tag)
	b = putTime(b, envAcceptedAt, e.AcceptedAt)
	b = putTime(b, envNotBefore, e.NotBefore)
	b = putTime(b, envExpiresAt, e.ExpiresAt)
	b = putUint(b, envRevision, e.Revision)
	b = putUint(b, envHops, uint64(e.Hops))
	b = putID(b, envHandedFrom, e.HandedFrom)
	b = putUint(b, envHandedAt, e.HandedAt)
	return putUint(b, envFirstDue, uint64(firstDueMS))
}

// recipientBytes is the length of a recipient's fields.
func recipientBytes(r *relay.Recipient) int {
	n := 0
	for _, text := range [...]string{r.Address.Local, string(r.Address.Domain), r.ORCPT} {
		if text != "" {
			n += 1 + protowire.SizeBytes(len(text))
		}
	}
	if r.Notify != 0 {
		n += 1 + protowire.SizeVarint(uint64(r.Notify))
	}
	return n
}

func envelopeFlags(e *relay.Envelope) (flags uint64) {
	for _, f := range [...]struct {
		set bool
		bit uint64
	}{{e.EightBit, flagEightBit}, {e.ClientDKIM, flagClientDKIM}, {e.Internal, flagInternal}, {e.RetFull, flagRetFull},
		{e.SMTPUTF8, flagSMTPUTF8}, {e.BinaryMIME, flagBinaryMIME}} {
		if f.set {
			flags |= f.bit
		}
	}
	return flags
}

// parseEnvelope reads the record of the message id.
func parseEnvelope(id ids.Message, b []byte) (e *relay.Envelope, firstDueMS int64, err error) {
	const op = "queue.parseEnvelope"
	if len(b) < 1+store.RefBytes || b[0] != envelopeVersion {
		return nil, 0, fault.New(fault.Invalid, op, "the envelope of %s is damaged or of a newer version", id)
	}
	e = &relay.Envelope{ID: id}
	var ok bool
	if e.Body, ok = store.ParseRef(b[1:]); !ok {
		return nil, 0, fault.New(fault.Invalid, op, "the body reference of %s is damaged", id)
	}
	var inner error
	err = fields(b[1+store.RefBytes:], func(n protowire.Number, v uint64, text []byte) {
		switch n {
		case envRecipient:
			r, err := parseRecipient(text)
			e.Recipients = append(e.Recipients, r)
			if err != nil {
				inner = err
			}
		case envFirstDue:
			firstDueMS = int64(v)
		default:
			setEnvelopeField(e, n, v, text)
		}
	})
	if err == nil {
		err = inner
	}
	switch {
	case err != nil:
	case len(e.Recipients) == 0:
		err = fault.New(fault.Invalid, op, "it has no recipient")
	case e.ExpiresAt.IsZero() || firstDueMS <= 0: // the last of its fields
		err = fault.New(fault.Invalid, op, "it is cut short")
	}
	if err != nil {
		return nil, 0, fault.Wrap(err, fault.Invalid, op, "the envelope of %s is damaged", id)
	}
	return e, firstDueMS, nil
}

func setEnvelopeField(e *relay.Envelope, n protowire.Number, v uint64, text []byte) {
	switch n {
	case envTenant:
		copy(e.Tenant[:], text)
	case envProject:
		copy(e.Project[:], text)
	case envCredential:
		copy(e.Credential[:], text)
	case envStream:
		e.Stream, e.Priority = parseStream(text)
	case envKind:
		e.Kind = policy.StreamKind(text)
	case envPool:
		copy(e.Pool[:], text)
	case envSender:
		e.Sender = splitAddress(string(text))
	case envFrom:
		e.From = mailaddr.Domain(text)
	case envFlags:
		e.EightBit, e.ClientDKIM = v&flagEightBit != 0, v&flagClientDKIM != 0
		e.Internal, e.RetFull = v&flagInternal != 0, v&flagRetFull != 0
		e.SMTPUTF8, e.BinaryMIME = v&flagSMTPUTF8 != 0, v&flagBinaryMIME != 0
	case envClientIP:
		e.ClientIP = toAddr(text)
	case envEnvID:
		e.EnvID = string(text)
	case envTag:
		e.Tag = string(text)
	case envAcceptedAt:
		e.AcceptedAt = fromMS(v)
	case envNotBefore:
		e.NotBefore = fromMS(v)
	case envExpiresAt:
		e.ExpiresAt = fromMS(v)
	case envRevision:
		e.Revision = v
	case envHops:
		e.Hops = uint8(min(v, 255))
	case envHandedFrom:
		copy(e.HandedFrom[:], text)
	case envHandedAt:
		e.HandedAt = v
	}
}

func parseRecipient(b []byte) (r relay.Recipient, err error) {
	err = fields(b, func(n protowire.Number, v uint64, text []byte) {
		switch n {
		case rcptLocal:
			r.Address.Local = string(text)
		case rcptDomain:
			r.Address.Domain = mailaddr.Domain(text)
		case rcptNotify:
			r.Notify = relay.Notify(v)
		case rcptORCPT:
			r.ORCPT = string(text)
		}
	})
	return r, err
}

// splitAddress takes a stored address apart. It was checked when it came in.
func splitAddress(s string) mailaddr.Address {
	for i := len(s) - 1; i >= 0; i-- {
		if s[i] == '@' {
			return mailaddr.Address{Local: s[:i], Domain: mailaddr.Domain(s[i+1:])}
		}
	}
	return mailaddr.Address{}
}

// Fields of a recipient's state.
const (
	stState     protowire.Number = 1
	stAttempts  protowire.Number = 2
	stNext      protowire.Number = 3
	stLast      protowire.Number = 4
	stInDoubt   protowire.Number = 5
	stReplyCode protowire.Number = 6
	stReplyEnh  protowire.Number = 7
	stReplyText protowire.Number = 8
	stClass     protowire.Number = 9
	stMX        protowire.Number = 10
	stSticky    protowire.Number = 11
	stDelayTold protowire.Number = 12
	stSource    protowire.Number = 13
	stProvider  protowire.Number = 14
	stHeldRule  protowire.Number = 15
	stHeldBy    protowire.Number = 16
	stHeldWhy   protowire.Number = 17
	stHeldSince protowire.Number = 18
	stPurged    protowire.Number = 19
	stMoved     protowire.Number = 20
)

func appendState(b []byte, s *relay.RecipientState) []byte {
	b = append(b, stateVersion)
	state := s.State
	if state == relay.StatePurged || state == relay.StateMoved {
		// Releases that do not know the state read one that they know.
		state = relay.StateBounced
	}
	b = putUint(b, stState, uint64(state))
	b = putUint(b, stAttempts, uint64(s.Attempts))
	b = putTime(b, stNext, s.Next)
	b = putTime(b, stLast, s.LastAttempt)
	b = putUint(b, stInDoubt, uint64(s.InDoubt))
	b = putUint(b, stReplyCode, uint64(s.LastReply.Code))
	b = putString(b, stReplyEnh, s.LastReply.Enhanced)
	b = putString(b, stReplyText, s.LastReply.Text)
	b = putString(b, stClass, s.LastClass)
	b = putString(b, stMX, s.LastMX)
	b = putAddr(b, stSticky, s.Sticky)
	if s.DelayTold {
		b = putUint(b, stDelayTold, 1)
	}
	b = putAddr(b, stSource, s.Source)
	b = putString(b, stProvider, s.Provider)
	if h := s.Held; h != nil && s.State == relay.StateHeld {
		b = putID(b, stHeldRule, h.Rule)
		b = putString(b, stHeldBy, h.By)
		b = putString(b, stHeldWhy, h.Why)
		b = putTime(b, stHeldSince, h.Since)
	}
	if s.State == relay.StatePurged {
		b = putUint(b, stPurged, 1)
	}
	if s.State == relay.StateMoved {
		b = putUint(b, stMoved, 1)
	}
	return b
}

func parseState(b []byte) (s relay.RecipientState, err error) {
	const op = "queue.parseState"
	if len(b) < 1 || b[0] != stateVersion {
		return s, fault.New(fault.Invalid, op, "a recipient's state is damaged or of a newer version")
	}
	var held relay.Held
	purged, moved := false, false
	err = fields(b[1:], func(n protowire.Number, v uint64, text []byte) {
		switch n {
		case stState:
			s.State = relay.State(v)
		case stAttempts:
			s.Attempts = uint32(v)
		case stNext:
			s.Next = fromMS(v)
		case stLast:
			s.LastAttempt = fromMS(v)
		case stInDoubt:
			s.InDoubt = uint8(v)
		case stReplyCode:
			s.LastReply.Code = uint16(v)
		case stReplyEnh:
			s.LastReply.Enhanced = string(text)
		case stReplyText:
			s.LastReply.Text = string(text)
		case stClass:
			s.LastClass = string(text)
		case stMX:
			s.LastMX = string(text)
		case stSticky:
			s.Sticky = toAddr(text)
		case stDelayTold:
			s.DelayTold = v != 0
		case stSource:
			s.Source = toAddr(text)
		case stProvider:
			s.Provider = string(text)
		case stHeldRule:
			copy(held.Rule[:], text)
		case stHeldBy:
			held.By = string(text)
		case stHeldWhy:
			held.Why = string(text)
		case stHeldSince:
			held.Since = fromMS(v)
		case stPurged:
			purged = v != 0
		case stMoved:
			moved = v != 0
		}
	})
	switch {
	case s.State == relay.StateHeld:
		s.Held = &held
	case s.State == relay.StateBounced && purged:
		s.State = relay.StatePurged
	case s.State == relay.StateBounced && moved:
		s.State = relay.StateMoved
	}
	if err == nil && (s.State < relay.StateWaiting || s.State > relay.StatePurged) {
		err = fault.New(fault.Invalid, op, "state %d does not exist", s.State)
	}
	if err == nil && s.State == relay.StateWaiting && s.Next.IsZero() {
		err = fault.New(fault.Invalid, op, "it waits and has no next time")
	}
	return s, fault.Wrap(err, fault.Invalid, op, "a recipient's state is damaged")
}
