package queue

import (
	"context"

	"github.com/relais-mta/relais/relay"
	"github.com/relais-mta/relais/relay/outbox"
	"github.com/relais-mta/relais/relay/store"
	"github.com/relais-mta/relais/shared/fault"
)

// inboundOverhead is what one inbound mail counts on top of its body, in bytes.
const inboundOverhead = 512

func inboundSize(ref relay.BodyRef) int64 { return ref.Length + inboundOverhead }

// loadInbound sums up the inbound mail that is kept.
func (q *Queue) loadInbound(snap *store.Snapshot) error {
	return snap.Iterate([]byte{store.SpaceInbound}, nil, false, func(k, v []byte) bool {
		if id, ok := store.ParseMessageKey(k); ok {
			if in, err := parseInbound(id, v); err == nil {
				q.inbound += inboundSize(in.Body)
			}
		}
		return true
	})
}

// AcceptInbound stores mail to a signed return path, with what its token said.
// It returns nil only when the mail is on stable storage,
// and a NoSpace fault when as much is kept already as policy allows. It
// consumes body.
func (q *Queue) AcceptInbound(ctx context.Context, in *Inbound, body *store.Body) error {
	const op = "queue.AcceptInbound"
	size := body.Len() + inboundOverhead
	q.mu.Lock()
	err := q.begin()
	if err == nil && q.inbound+size > q.maxInbound {
		q.pending.Done()
		err = fault.New(fault.NoSpace, op, "%d bytes of inbound mail are kept already, inbound.max_stored_bytes is %d", q.inbound, q.maxInbound)
	}
	if err != nil {
		q.mu.Unlock()
		body.Discard()
		return err
	}
	q.inbound += size
	q.mu.Unlock()
	defer q.pending.Done()
	b := q.st.NewBatch()
	b.Refusable()
	key := store.AppendInboundKey(nil, in.ID)
	if err = b.SetWithBody(key, appendInbound(nil, in, body.Ref()), 1, in.ID, body); err == nil {
		e := outbox.Event{
			Type: outbox.Inbound, At: q.cfg.Now(), Message: in.Original, Index: in.Index, Tenant: in.Tenant,
			Address: in.To.String(), Size: body.Len(), RemoteIP: in.RemoteIP, AcceptedAt: in.ReceivedAt,
		}
		q.ob.Add(b, &e, nil)
		err = q.st.Commit(ctx, b)
	} else {
		b.Abandon()
	}
	if err != nil {
		q.mu.Lock()
		q.inbound -= size
		q.mu.Unlock()
		body.Discard()
		return err
	}
	in.Body = body.Ref()
	return nil
}
