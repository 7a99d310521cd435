package inbound

import (
	"context"

	"github.com/relais-mta/relais/relay/queue"
	"github.com/relais-mta/relais/relay/store"
	"github.com/relais-mta/relais/shared/fault"
)

// Body is a message on its way into the store.
type Body interface {
	Write(p []byte) (int, error)
	Seal(headerBytes int64, bodyHash [32]byte) error
	Discard()
}

// Spool keeps inbound mail until it is read.
type Spool interface {
	// Admit returns a fault, usually fault.NoSpace, if a message of so many
	// bytes cannot be taken now.
	Admit(bytes int64) error
	NewBody() Body
	// AcceptInbound returns nil only when the mail is on stable storage; it
	// fills in.Body and consumes body. fault.NoSpace and fault.Exhausted say
	// that too much is kept already.
	AcceptInbound(ctx context.Context, in *queue.Inbound, body Body) error
}

// NewSpool joins a relay's store and queue.
func NewSpool(st *store.Store, q *queue.Queue) Spool { return spool{st, q} }

type spool struct {
	store *store.Store
	queue *queue.Queue
}

func (s spool) Admit(bytes int64) error { return s.store.Admit(bytes) }

func (s spool) NewBody() Body { return s.store.NewBody() }

func (s spool) AcceptInbound(ctx context.Context, in *queue.Inbound, body Body) error {
	b, ok := body.(*store.Body)
	if !ok {
		return fault.New(fault.Internal, "inbound.AcceptInbound", "the body was not made by this spool")
	}
	return s.queue.AcceptInbound(ctx, in, b)
}
