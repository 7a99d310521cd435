package submission

import (
	"context"

	"github.com/relais-mta/relais/relay"
	"github.com/relais-mta/relais/relay/queue"
	"github.com/relais-mta/relais/relay/store"
	"github.com/relais-mta/relais/shared/fault"
)

// Body is a message on its way into the store. After the last Write call Seal,
// then Accept or Discard.
type Body interface {
	Write(p []byte) (int, error)
	Seal(headerBytes int64, bodyHash [32]byte) error
	Discard()
}

// Spool is where accepted messages go.
type Spool interface {
	// Admit returns a fault, usually fault.NoSpace, if a message of so many
	// bytes cannot be taken now.
	Admit(bytes int64) error
	NewBody() Body
	// Accept returns nil only when the message is on stable storage. It fills
	// env.Body and consumes body. ctx bounds the wait for a place in line.
	Accept(ctx context.Context, env *relay.Envelope, body Body) error
}

// NewSpool joins a relay's store and queue.
func NewSpool(st *store.Store, q *queue.Queue) Spool { return spool{st, q} }

type spool struct {
	store *store.Store
	queue *queue.Queue
}

func (s spool) Admit(bytes int64) error { return s.store.Admit(bytes) }

func (s spool) NewBody() Body { return s.store.NewBody() }

func (s spool) Accept(ctx context.Context, env *relay.Envelope, body Body) error {
	b, ok := body.(*store.Body)
	if !ok {
		return fault.New(fault.Internal, "submission.Accept", "the body was not made by this spool")
	}
	return s.queue.Accept(ctx, env, b)
}
