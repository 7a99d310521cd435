// Package outbox keeps the events that tell control what happened to mail. An
// event is written in the very transaction that changed the queue, so the two
// can never disagree, and waits here, bounded, until it was uploaded.
package outbox

import (
	"net/netip"
	"time"

	"github.com/relais-mta/relais/relay"
	"github.com/relais-mta/relais/relay/store"
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
	Gap       Type = 13 // made by Read: events up to Seq were dropped, Count says how many
)

// Event is one thing that happened. Zero fields are unknown or do not apply.
type Event struct {
	Seq     uint64 // assigned at commit, strictly consecutive within a stream generation
	Type    Type
	At      time.Time // when it was written
	Message ids.Message
	Index   uint16 // of the recipient
	Tenant  ids.Tenant
	Project ids.Project
	Stream  string
	Pool    ids.Pool

	Address string // of the recipient
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
	Revision   uint64 // policy revision

	Count uint64 // of a Gap: events dropped
}

// Config bounds the outbox.
type Config struct {
	MaxBytes int64 // of stored events; the oldest are dropped as a counted gap
}

// Outbox is the stream of events of one data directory.
type Outbox struct{ st *store.Store }

// Open reads where the stream stands.
func Open(st *store.Store, cfg Config) (*Outbox, error) { return &Outbox{st: st}, nil }

var errClosed = fault.New(fault.Unavailable, "outbox", "the outbox is not open")

// Generation names the stream: it is random per data directory, so a wiped
// disk begins a new stream instead of using numbers again.
func (o *Outbox) Generation() [16]byte { return [16]byte{} }

// Read returns the events after seq, in order, up to about maxBytes of stored
// size and at least one if there is one. A first event of type Gap stands for
// events that were dropped.
func (o *Outbox) Read(after uint64, maxBytes int) ([]Event, error) { return nil, errClosed }

// Trim forgets the events up to and including seq: control has them.
func (o *Outbox) Trim(seq uint64) error { return errClosed }

// SetMaxBytes changes the bound while the outbox runs.
func (o *Outbox) SetMaxBytes(n int64) {}

// Last is the sequence number of the newest committed event, 0 before the first.
func (o *Outbox) Last() uint64 { return 0 }
