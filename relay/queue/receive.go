package queue

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"hash/crc32"
	"io"

	"github.com/relais-mta/relais/relay"
	"github.com/relais-mta/relais/relay/store"
	"github.com/relais-mta/relais/shared/fault"
	"github.com/relais-mta/relais/shared/ids"
)

// ParcelReader reads what a ParcelWriter wrote.
type ParcelReader struct{ e exportReader }

// NewParcelReader reads from r.
func NewParcelReader(r io.Reader) *ParcelReader {
	return &ParcelReader{e: exportReader{r: bufio.NewReaderSize(r, exportPieceBytes)}}
}

// Giver is another relay that hands over mail, and what this one makes of it.
type Giver struct {
	Node     ids.Node
	Revision uint64                      // of this relay's view
	Accept   func(*relay.Envelope) error // whether the mail may be taken here
}

// Receive reads the next parcel and takes the message into the queue, under its
// own id, with the states of its recipients. done is called once: with nil when
// the message is on stable storage here, whether by this call or one before; or
// with the reason why it is not taken, which is a Conflict while it is not known
// whether this relay has it already. It may be called from the commit goroutine
// and must not block. An error of Receive is one of the stream, which cannot be
// read on; done is not called then.
func (q *Queue) Receive(r *ParcelReader, from Giver, done func(Transfer, error)) error {
	m, err := r.e.message(0)
	if err != nil {
		return err
	}
	if m == nil {
		return exportDamaged(errors.New("an end where a message belongs"))
	}
	tr := Transfer{m.env.ID, m.env.Hops + 1}
	known, refused := q.mayTake(m.env, tr, from)
	if refused != nil || known {
		_, err := r.skip(m.env.Body)
		if err == nil {
			done(tr, refused)
		}
		return err
	}
	var body *store.Body
	if m.env.Body.Kind != relay.BodyNone {
		if body, refused, err = r.body(q, m.env.Body); err != nil {
			return err
		}
		if refused != nil {
			done(tr, refused)
			return nil
		}
	}
	m.env.Hops, m.env.HandedFrom, m.env.HandedAt = tr.Hop, from.Node, from.Revision
	m.class = classMoved
	q.take(m, body, from.Node, tr, done)
	return nil
}

// mayTake says whether a message was taken before, or why it is not taken.
func (q *Queue) mayTake(env *relay.Envelope, tr Transfer, from Giver) (known bool, refused error) {
	const op = "queue.Receive"
	have, err := q.Has(from.Node, []Transfer{tr})
	if err != nil || have[0] {
		return err == nil, err
	}
	if _, giving := q.Giving(env.ID); giving {
		return false, fault.New(fault.Conflict, op, "the message is on its way from this relay, which has not heard of its end yet")
	}
	here, err := q.has(env)
	if err != nil {
		return false, err
	}
	switch {
	case here: // by an import, or a way of which nothing is remembered
		return true, q.rememberTaken(env, tr, from.Node)
	case env.Hops >= MaxHops:
		return false, fault.New(fault.Denied, op, "the message went from relay to relay %d times, more is not done", env.Hops)
	case !env.ExpiresAt.After(q.cfg.Now()):
		return false, fault.New(fault.Denied, op, "the message is past its deadline")
	}
	q.transfers.mu.Lock()
	full := q.transfers.taken[from.Node] >= maxTaken
	q.transfers.mu.Unlock()
	if full {
		return false, fault.New(fault.Exhausted, op, "%d messages of that relay are remembered here, of which it has not said that it knows", maxTaken)
	}
	if err := from.Accept(env); err != nil {
		return false, err
	}
	return false, q.st.Admit(env.Body.Length)
}

// rememberTaken records that a message need not be handed over again.
func (q *Queue) rememberTaken(env *relay.Envelope, tr Transfer, from ids.Node) error {
	b := q.st.NewBatch()
	b.Set(store.AppendTransferKey(nil, store.SpaceTaken, from, tr.Message, tr.Hop), appendTaken(nil, env.ExpiresAt))
	err := q.commit(b)
	if err == nil {
		q.transfers.count(from, 1)
	}
	return err
}

func (t *transfers) count(from ids.Node, n int) {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.taken[from] += n
}

// skip reads over a body, and returns its checksum.
func (r *ParcelReader) skip(ref relay.BodyRef) (sum uint32, err error) {
	return r.pieces(ref, func(p []byte) {})
}

func (r *ParcelReader) pieces(ref relay.BodyRef, each func([]byte)) (sum uint32, err error) {
	for left := ref.Length; left > 0; {
		kind, p, err := r.e.next()
		if err != nil {
			return 0, err
		}
		if kind != exportBody || len(p) == 0 || int64(len(p)) > left {
			return 0, exportDamaged(fmt.Errorf("record %d where a body belongs", kind))
		}
		sum = crc32.Update(sum, castagnoli, p)
		left -= int64(len(p))
		each(p)
	}
	return sum, nil
}

// body reads a body into the store. What the store cannot take, and a body that
// is not what its giver accepted, is refused; the stream goes on behind it.
func (r *ParcelReader) body(q *Queue, ref relay.BodyRef) (_ *store.Body, refused, err error) {
	body := q.st.NewBody()
	sum, err := r.pieces(ref, func(p []byte) {
		if refused == nil {
			_, refused = body.Write(p)
		}
	})
	switch {
	case err != nil:
	case refused != nil:
	case sum != ref.CRC32C:
		refused = fault.New(fault.Invalid, "queue.Receive", "the message's body is damaged on the relay that has it")
	default:
		refused = body.Seal(ref.HeaderBytes, ref.BodyHash)
	}
	if err != nil || refused != nil {
		body.Discard()
		return nil, refused, err
	}
	return body, nil, nil
}

// take commits a message with the memory of where it came from.
func (q *Queue) take(m *exported, body *store.Body, from ids.Node, tr Transfer, done func(Transfer, error)) {
	b := q.st.NewBatch()
	b.Refusable()
	mail, err := q.placeImported(b, m, body)
	if err != nil {
		b.Abandon()
		if mail != nil {
			q.imported(mail, err)
			q.pending.Done()
		}
		discard(body)
		done(tr, err)
		return
	}
	b.Set(store.AppendTransferKey(nil, store.SpaceTaken, from, tr.Message, tr.Hop), appendTaken(nil, m.env.ExpiresAt))
	q.transfers.count(from, 1)
	q.st.Submit(context.Background(), b, func(err error) {
		if err != nil {
			q.transfers.count(from, -1)
		}
		q.imported(mail, err)
		q.pending.Done()
		if err != nil {
			discard(body)
		}
		done(tr, err)
	})
}
