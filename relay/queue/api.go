// Package queue holds what waits to be delivered: every recipient of every
// accepted message, each with exactly one owner and one next time. It exists
// so that the engine can think in due work while memory stays bounded and the
// disk stays the truth.
package queue

import (
	"context"
	"log/slog"
	"net/netip"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/relais-mta/relais/relay"
	"github.com/relais-mta/relais/relay/outbox"
	"github.com/relais-mta/relais/relay/store"
	"github.com/relais-mta/relais/shared/fault"
	"github.com/relais-mta/relais/shared/ids"
	"github.com/relais-mta/relais/shared/mailaddr"
	"github.com/relais-mta/relais/shared/policy"
)

// Number is the short name of a work queue. It keeps its meaning across
// restarts for as long as the queue holds work.
type Number uint32

// Key says which work waits together. Source and provider are not in it: they
// are found at the moment of delivery.
type Key struct {
	Tenant ids.Tenant
	Stream string
	Pool   ids.Pool
	Domain mailaddr.Domain
	Kind   policy.StreamKind
}

// Config gives the queue its clock, its policy and its listeners.
type Config struct {
	Now          func() time.Time      // required
	ClockTrusted func() bool           // while it returns false nothing expires; nil: always trusted
	Notify       func(Number)          // called, from any goroutine and holding no lock, when a queue may have got earlier work; must not block
	Dropped      func(Number)          // called when an empty queue's number ceases to exist; nil: nobody cares
	Policy       policy.Queue          // SetPolicy changes it later
	MaxInbound   int64                 // bytes of inbound mail kept (policy.Inbound.MaxStoredBytes)
	Logger       *slog.Logger          // required
	Registerer   prometheus.Registerer // nil: metrics are not exported
}

// Queue is the open queue.
type Queue struct{ cfg Config }

// WorkRecipient is one recipient of a piece of work.
type WorkRecipient struct {
	Index uint16 // in Env.Recipients
	State relay.RecipientState
}

// Work is a message with those of its recipients that are the caller's now.
// Finish or Return gives each of them back exactly once.
type Work struct {
	Queue      Number
	Key        Key
	Env        *relay.Envelope // shared: never change it
	Recipients []WorkRecipient
}

// Result is what Finish records about one recipient.
type Result struct {
	Index uint16
	State relay.RecipientState // the whole new state; Waiting needs Next
	Event outbox.Type          // event to write; None for none
	Phase relay.Phase
}

// Mail is a message with its sealed body, ready to be accepted.
type Mail struct {
	Env  *relay.Envelope
	Body *store.Body
}

// Inbound is mail that came to one of our signed return paths.
type Inbound struct {
	ID           ids.Message // of the inbound mail itself
	Tenant       ids.Tenant
	Original     ids.Message // the message that the return path belongs to
	Index        uint16      // of its recipient, if PerRecipient
	PerRecipient bool
	To           mailaddr.Address // the return path as it was addressed
	Sender       mailaddr.Address // its envelope sender, usually null
	RemoteIP     netip.Addr
	ReceivedAt   time.Time
	Body         relay.BodyRef
}

// QueueInfo describes one work queue.
type QueueInfo struct {
	Number   Number
	Key      Key
	InMemory int       // recipients in the window
	InFlight int       // recipients owned by callers
	More     bool      // others wait on disk
	Next     time.Time // earliest due time, a lower bound when More and InMemory is 0; zero: nothing waits
}

// Summary counts what the queue holds.
type Summary struct {
	Queues               int
	InMemory             int64         // waiting recipients in memory
	InFlight             int64         // recipients owned by callers
	OldestDeadlinePassed time.Duration // how long the longest overdue recipient outlived its deadline
}

// MessageInfo is a message with the state of each recipient.
type MessageInfo struct {
	Env    *relay.Envelope
	States []relay.RecipientState // by index
}

// Filter selects messages; zero fields match all.
type Filter struct {
	Tenant ids.Tenant
	Stream string
	Domain mailaddr.Domain
	State  relay.State
	After  ids.Message // continue behind this message
}

var errClosed = fault.New(fault.Unavailable, "queue", "the queue is not open")

// Open reads the table of work queues and begins to load their heads.
func Open(ctx context.Context, st *store.Store, ob *outbox.Outbox, cfg Config) (*Queue, error) {
	return &Queue{cfg: cfg}, nil
}

// Close waits for what was submitted.
func (q *Queue) Close() error { return nil }

// SetPolicy changes schedule and bounds while the queue runs.
func (q *Queue) SetPolicy(p policy.Queue, maxInbound int64) {}

// Accept stores a message and returns nil only when it is on stable storage.
// It consumes body and fills env.Body. ctx bounds the wait for a place in the
// commit queue only: once submitted, the outcome is awaited.
func (q *Queue) Accept(ctx context.Context, env *relay.Envelope, body *store.Body) error {
	return errClosed
}

// AcceptInbound stores mail to a signed return path.
func (q *Queue) AcceptInbound(ctx context.Context, in *Inbound, body *store.Body) error {
	return errClosed
}

// Queues calls f for every work queue until it returns false.
func (q *Queue) Queues(f func(QueueInfo) bool) {}

// NextDue returns when the queue's earliest waiting recipient is due.
func (q *Queue) NextDue(n Number) (time.Time, bool) { return time.Time{}, false }

// Take returns the due head message of a queue with at most maxRecipients of
// its recipients; they are the caller's until Finish or Return. False: nothing
// is due, or the head is being read from disk and Notify will tell.
func (q *Queue) Take(n Number, now time.Time, maxRecipients int) (*Work, bool) { return nil, false }

// Begin journals an attempt for the work's recipients; the final dot must not
// be sent before done was called with nil. done runs on the commit goroutine:
// it must not block.
func (q *Queue) Begin(w *Work, a *relay.Attempt, done func(error)) { done(errClosed) }

// Finish records, in one transaction, the new states, their events, the end of
// the journalled attempt and any mail that follows from it (DSNs). Recipients
// of w without a result go back unchanged. On error nothing was recorded and
// w is still the caller's. a may be nil when nothing was attempted. done runs
// on the commit goroutine: it must not block.
func (q *Queue) Finish(w *Work, a *relay.Attempt, results []Result, extra []Mail, done func(error)) {
	done(errClosed)
}

// Return gives work back untouched, to be due as before.
func (q *Queue) Return(w *Work) {}

// NextDeadline returns the earliest deadline of any message.
func (q *Queue) NextDeadline() (time.Time, bool) { return time.Time{}, false }

// PopExpired returns work for up to max messages past their deadline, whatever
// their state; recipients in flight are left out and come back later. The
// caller ends them with Finish and StateExpired.
func (q *Queue) PopExpired(now time.Time, max int) []*Work { return nil }

// RetryAt returns when a recipient of message is tried again after its
// attempts-th failed attempt ended at now. False: no attempt can start before
// the deadline.
func RetryAt(p policy.Queue, message ids.Message, attempts uint32, now, deadline time.Time) (time.Time, bool) {
	return time.Time{}, false
}

// Summary counts what the queue holds.
func (q *Queue) Summary() Summary { return Summary{} }

// Show returns a message with the state of each recipient.
func (q *Queue) Show(id ids.Message) (*MessageInfo, error) { return nil, errClosed }

// List returns up to limit messages in the order of their ids.
func (q *Queue) List(f Filter, limit int) ([]MessageInfo, error) { return nil, errClosed }
