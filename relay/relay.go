// Package relay holds the words of the sending side: what a message, a
// recipient, an attempt and its outcome are. Everything below relay/ speaks in
// these types, so that the queue, the engine and the delivery code agree on
// them without importing each other.
//
// DESIGN.md beside this file tells how a message moves through the packages.
package relay

import (
	"net/netip"
	"strconv"
	"time"

	"github.com/relais-mta/relais/shared/ids"
	"github.com/relais-mta/relais/shared/mailaddr"
	"github.com/relais-mta/relais/shared/policy"
)

// BodyKind says where the bytes of a message live.
type BodyKind uint8

// The body kinds. Numbers are stored: append only.
const (
	BodyNone    BodyKind = 0 // no body
	BodySegment BodyKind = 1 // a range of a shared append-only segment file
	BodyFile    BodyKind = 2 // a file of its own, for bodies too large to gather in memory
)

// BodyRef points at the bytes of an accepted message: its header section and
// body as they will go on the wire, before dot-stuffing and signing.
type BodyRef struct {
	Kind        BodyKind
	Segment     uint64   // number of the segment or body file
	Offset      int64    // bytes from the start of the file
	Length      int64    // bytes, header section included
	HeaderBytes int64    // bytes of the header section with its empty line
	CRC32C      uint32   // Castagnoli checksum over the Length bytes
	BodyHash    [32]byte // SHA-256 of the relaxed-canonical body (RFC 6376 section 3.4.4), computed once at acceptance
}

// Notify holds the NOTIFY parameter of RFC 3461 section 4.1 as bits.
type Notify uint8

// The NOTIFY values. Zero means that the client said nothing.
const (
	NotifyNever   Notify = 1 << 0
	NotifySuccess Notify = 1 << 1
	NotifyFailure Notify = 1 << 2
	NotifyDelay   Notify = 1 << 3
)

// Recipient is one recipient as the client gave it. It never changes after
// acceptance; what happens to it is in RecipientState.
type Recipient struct {
	Address mailaddr.Address
	Notify  Notify
	ORCPT   string // RFC 3461 section 4.2, "type;text" still xtext-encoded; may be empty
}

// Envelope is a message as accepted: who, under which rules, and where its
// bytes are. It never changes after acceptance.
type Envelope struct {
	ID         ids.Message
	Tenant     ids.Tenant
	Project    ids.Project
	Credential ids.Credential // zero for messages that Relais made itself
	Stream     string         // stream name inside the project
	Kind       policy.StreamKind
	Priority   policy.Priority // among the mail of its tenant and stream
	Pool       ids.Pool
	Sender     mailaddr.Address // the client's envelope sender; null for bounces
	From       mailaddr.Domain  // domain of the From header: signing and return-path domain are found by it
	Recipients []Recipient
	Body       BodyRef
	EightBit   bool // holds octets above 127 (RFC 6152)
	SMTPUTF8   bool // its header section, or that of a MIME part, holds UTF-8, so that it cannot go without SMTPUTF8 (RFC 6531 section 3.4); addresses are judged by themselves
	BinaryMIME bool // has lines that are not text lines (RFC 3030): too long, or with a bare CR, LF or NUL
	ClientDKIM bool // the client had signed it already
	Internal   bool // made by Relais (DSN): never bounced, never counted as the tenant's own volume
	ClientIP   netip.Addr
	EnvID      string // RFC 3461 section 4.4 ENVID, xtext-encoded
	RetFull    bool   // RET=FULL was asked for
	Tag        string // the client's own mark, such as a campaign; printable ASCII
	AcceptedAt time.Time
	NotBefore  time.Time // zero: at once
	ExpiresAt  time.Time // no attempt starts at or after it
	Revision   uint64    // policy revision under which it was accepted

	// Of mail that another relay handed over; all zero for mail accepted here.
	Hops       uint8    // how often it went from relay to relay
	HandedFrom ids.Node // the relay that had it last
	HandedAt   uint64   // revision of this relay's view then: while it has not changed the mail does not go back
}

// State is where a recipient stands.
type State uint8

// The states. Numbers are stored: append only.
const (
	StateWaiting   State = 1 // has a next time
	StateHeld      State = 2 // waits for a person; its deadline still counts
	StateDelivered State = 3 // final: the remote side took it
	StateBounced   State = 4 // final: refused for good
	StateExpired   State = 5 // final: its deadline passed
	StateUnknown   State = 6 // final: may or may not have arrived, asked twice
	StatePurged    State = 7 // final: an operator removed it, nobody was told
	StateMoved     State = 8 // final here: another relay has it now
)

// Final reports whether nothing more will happen to the recipient.
func (s State) Final() bool { return s >= StateDelivered }

var stateNames = [...]string{"", "waiting", "held", "delivered", "bounced", "expired", "unknown", "purged", "handed-over"}

// String returns the name that commands and events use.
func (s State) String() string {
	if int(s) < len(stateNames) {
		return stateNames[s]
	}
	return "?"
}

// RecipientState is what changes about a recipient.
type RecipientState struct {
	State       State
	Attempts    uint32     // attempts that reached a remote server or tried to
	Next        time.Time  // of a waiting recipient: not before this
	LastAttempt time.Time  // zero: never tried
	InDoubt     uint8      // attempts whose end a crash hid
	LastReply   Reply      // of the last attempt
	LastClass   string     // class of the last attempt's verdict, "" before the first
	LastMX      string     // host name of the last attempt
	Sticky      netip.Addr // source address to keep for a greylisting peer; zero otherwise
	DelayTold   bool       // its delay was due to be told to the sender, which happens once
	Source      netip.Addr // source address of the last attempt
	Provider    string     // provider of the last attempt
	Held        *Held      // of a held recipient: who holds it; nil otherwise
}

// Held says who holds a recipient and why. It is never changed, so recipients
// share it.
type Held struct {
	Rule  ids.Hold // the rule that holds it; zero: held by hand
	By    string   // who asked for it
	Why   string   // words for people
	Since time.Time
}

// Phase is the point in an SMTP transaction at which something happened.
type Phase uint8

// The phases in the order in which they happen. Numbers are stored: append only.
const (
	PhaseNone     Phase = 0
	PhaseResolve  Phase = 1 // DNS
	PhaseConnect  Phase = 2 // TCP connection and greeting
	PhaseEHLO     Phase = 3
	PhaseSTARTTLS Phase = 4
	PhaseMAIL     Phase = 5
	PhaseRCPT     Phase = 6
	PhaseDATA     Phase = 7 // the DATA command's own reply
	PhaseFinalDot Phase = 8 // the reply to the end of data
	PhaseLocal    Phase = 9 // decided here, nothing was sent
)

var phaseNames = [...]string{"", "resolve", "connect", "ehlo", "starttls", "mail", "rcpt", "data", "final-dot", "local"}

// String returns the name that events use.
func (p Phase) String() string {
	if int(p) < len(phaseNames) {
		return phaseNames[p]
	}
	return "?"
}

// Reply is a remote server's answer, or our own words for a failure without one.
type Reply struct {
	Code     uint16 // three digits; 0: there was no reply (connection failed, DNS, local)
	Enhanced string // "5.1.1" (RFC 3463), empty if none was given
	Text     string // lines joined by a space, enhanced code removed, at most MaxReplyTextBytes
}

// String is the reply as it was said. What the relay decided itself has no code
// of SMTP's, but it may have an enhanced one.
func (r *Reply) String() string {
	text := r.Text
	if r.Enhanced != "" {
		text = r.Enhanced + " " + text
	}
	if r.Code != 0 {
		text = strconv.Itoa(int(r.Code)) + " " + text
	}
	return text
}

// MaxReplyTextBytes bounds the text kept of a remote reply.
const MaxReplyTextBytes = 1024

// Status is the coarse result of an attempt for one recipient.
type Status uint8

// The statuses.
const (
	Delivered Status = 1 // 2xx at the final dot
	Deferred  Status = 2 // try again later
	Failed    Status = 3 // refused for good
	InDoubt   Status = 4 // the connection broke between the final dot and its reply
	NotTried  Status = 5 // the session ended before this recipient was offered; costs no attempt
)

// Outcome is what one attempt did for one recipient.
type Outcome struct {
	Index  uint16 // of the recipient in the envelope
	Status Status
	Phase  Phase
	Reply  Reply
}

// Attempt is one transaction towards one host, for one or more recipients of
// one message.
type Attempt struct {
	Message   ids.Message
	Source    ids.Source
	SourceIP  netip.Addr // bind address
	Epoch     uint64     // of the source's assignment
	Provider  string
	MX        string
	RemoteIP  netip.Addr
	TLS       string // "" for clear text, else "TLS1.3" and the like
	StartedAt time.Time
	EndedAt   time.Time
	Outcomes  []Outcome
}
