package engine

import (
	"bytes"
	"context"
	"io"
	"time"

	"github.com/relais-mta/relais/relay"
	"github.com/relais-mta/relais/relay/delivery"
	"github.com/relais-mta/relais/relay/queue"
	"github.com/relais-mta/relais/relay/sign"
	"github.com/relais-mta/relais/relay/store"
	"github.com/relais-mta/relais/relay/trace"
	"github.com/relais-mta/relais/shared/fault"
	"github.com/relais-mta/relais/shared/mailaddr"
	"github.com/relais-mta/relais/shared/policy"
)

// maxWholeBodyBytes is the size up to which a message is read into the
// session's buffer; larger ones are streamed.
const maxWholeBodyBytes = 64 << 10

// signatureBytes is about how long a DKIM-Signature field with an RSA-2048
// signature is, for SIZE (RFC 1870).
const signatureBytes = 900

// send carries one message and settles what came of it.
func (w *worker) send(ctx context.Context, work *queue.Work) {
	e := w.engine
	now := e.cfg.Now()
	dir := e.cfg.Directory()
	if !now.Before(work.Env.ExpiresAt) && e.cfg.ClockTrusted() {
		// No attempt starts at or after the deadline, whoever was slow.
		done := make(chan error, 1)
		e.expireThen([]*queue.Work{work}, now, dir, func(err error) { done <- err })
		<-done
		return
	}
	w.attempt(ctx, work, dir, now)
}

// singleRecipient reports whether mail of a work queue goes one recipient at a
// time, because its return path names the recipient. Stream names are per
// project and work queues are not: if one project of the name wants it, all of
// that name go singly, which costs round trips but nothing else.
func singleRecipient(dir *policy.Directory, stream string, kind policy.StreamKind) bool {
	found := false
	for i := range dir.Document().Streams.Stream {
		s := &dir.Document().Streams.Stream[i]
		if s.Name != stream {
			continue
		}
		if s.ReturnPath == policy.ReturnPathRecipient || s.ReturnPath == "" && s.Kind == policy.Bulk {
			return true
		}
		found = true
	}
	return !found && kind == policy.Bulk
}

func (w *worker) attempt(ctx context.Context, work *queue.Work, dir *policy.Directory, now time.Time) {
	e := w.engine
	peer := w.session.Peer()
	a := &relay.Attempt{
		Message: work.Env.ID, Source: w.source.ID, SourceIP: w.source.Bind, Epoch: w.source.Epoch, Provider: w.lane.Provider,
		MX: peer.MX, RemoteIP: peer.RemoteIP, TLS: peer.TLS, StartedAt: now,
	}
	closer, err := w.prepare(work, dir)
	if err != nil {
		e.log.Error("a message could not be prepared for sending", "message", work.Env.ID, "error", err)
		a.EndedAt = e.cfg.Now()
		a.Outcomes = localFailure(work, err)
		e.settleAndWait(work, a)
		return
	}
	if h := w.admit(ctx, work); h.Reason != "" {
		closeBody(e, work, closer)
		w.giveBack(work, h, true)
		return
	}
	w.waited, w.guard = false, e.watch(work.Env, now, w.session.Abort)
	e.queue.Begin(work, a, func(err error) { w.journal <- err })
	e.metrics.lanes.begin(w.lane, len(w.tx.Recipients), now)
	a.Outcomes = w.session.Send(&w.tx)
	e.metrics.lanes.end(w.lane, len(w.tx.Recipients))
	w.admitted(a.Outcomes)
	if !w.waited {
		<-w.journal // refused before the data: the record is on its way all the same
	}
	closeBody(e, work, closer)
	a.EndedAt = e.cfg.Now()
	// The slice is reused for the next message, while the queue may still
	// read the outcomes of this one.
	a.Outcomes = append([]relay.Outcome(nil), a.Outcomes...)
	if w.guard != nil && w.guard.end() {
		late(a.Outcomes, relay.PhaseDATA)
	}
	e.settle(work, a, nil)
}

// closeBody lets go of a body that was streamed; nil: there was none.
func closeBody(e *Engine, work *queue.Work, closer io.Closer) {
	if closer == nil {
		return
	}
	if err := closer.Close(); err != nil {
		e.log.Warn("a body file could not be closed", "message", work.Env.ID, "error", err)
	}
}

// localFailure defers every recipient for a fault of our own.
func localFailure(work *queue.Work, err error) []relay.Outcome {
	out := make([]relay.Outcome, 0, len(work.Recipients))
	for i := range work.Recipients {
		out = append(out, relay.Outcome{
			Index: work.Recipients[i].Index, Status: relay.Deferred, Phase: relay.PhaseLocal,
			Reply: relay.Reply{Enhanced: "4.3.0", Text: fault.Public(err)},
		})
	}
	return out
}

// subjectOf says what a dialogue about the work is about.
func subjectOf(work *queue.Work) trace.Subject {
	return trace.Subject{Message: work.Env.ID, Tenant: work.Env.Tenant, Domain: work.Key.Domain}
}

// prepare fills the transaction. The closer, if any, lets go of the body.
func (w *worker) prepare(work *queue.Work, dir *policy.Directory) (io.Closer, error) {
	env := work.Env
	if !dir.MayUse(env.Tenant, env.Pool) {
		// A dedicated address never carries
		// another tenant's mail, whatever the pool was at acceptance.
		return nil, fault.New(fault.Unavailable, "engine.prepare", "the pool of this message is dedicated to another tenant now")
	}
	tx := &w.tx
	tx.Recipients = tx.Recipients[:0]
	for i := range work.Recipients {
		index := work.Recipients[i].Index
		tx.Recipients = append(tx.Recipients, delivery.Recipient{Index: index, Address: env.Recipients[index].Address})
	}
	domain, known := dir.DomainFor(env.From)
	var err error
	if tx.Sender, err = w.returnPath(work, dir, domain); err != nil {
		return nil, err
	}
	tx.EightBit, tx.ClientDKIM = env.EightBit, env.ClientDKIM
	tx.UTF8, tx.Binary = env.SMTPUTF8, env.BinaryMIME
	tx.Commit = w.commit
	tx.Sign, tx.SignatureBytes = nil, 0
	w.signer = signJob{env: env, added: w.signer.added[:0]}
	if known && dir.Document().Delivery.SignDKIM && len(domain.DKIM) > 0 {
		if w.signer.signer, err = w.engine.signers.Signer(domain); err != nil {
			return nil, err
		}
		tx.Sign, tx.SignatureBytes = w.sign, signatureBytes*len(domain.DKIM)
	}
	tx.Subject = subjectOf(work)
	tx.Chunking = ""
	if p, ok := dir.Providers().Named(w.lane.Provider); ok {
		w.signer.want, tx.Chunking = sign.OnlyAlgorithm(p.OnlySignature()), p.Chunking()
	}
	closer, err := w.content(env)
	if err == nil && tx.Sign != nil {
		w.feedback(work, dir, domain)
	}
	return closer, err
}

// content points the transaction at the message's bytes.
func (w *worker) content(env *relay.Envelope) (io.Closer, error) {
	st := w.engine.cfg.Store
	if env.Body.Length <= maxWholeBodyBytes {
		var err error
		if w.body, err = st.ReadBody(env.Body, w.body); err != nil {
			return nil, err
		}
		w.tx.Content = delivery.Content{Bytes: w.body}
		w.signer.header = w.body[:env.Body.HeaderBytes]
		return nil, nil
	}
	r, err := st.OpenBody(env.Body)
	if err != nil {
		return nil, err
	}
	if err := r.Verify(); err != nil { // once on its way, no part of it can be taken back
		_ = r.Close()
		return nil, err
	}
	if w.tx.Sign != nil {
		if w.signer.header, err = readHeader(r, env.Body.HeaderBytes, w.body); err != nil {
			_ = r.Close()
			return nil, err
		}
		w.body = w.signer.header
	}
	w.tx.Content = delivery.Content{Reader: r, Length: env.Body.Length}
	return r, nil
}

func readHeader(r *store.BodyReader, n int64, dst []byte) ([]byte, error) {
	if int64(cap(dst)) < n {
		dst = make([]byte, n)
	}
	dst = dst[:n]
	if _, err := r.ReadAt(dst, 0); err != nil {
		return nil, fault.Wrap(err, fault.Internal, "engine.readHeader", "the stored message cannot be read")
	}
	return dst, nil
}

// returnPath makes the sender on the wire: a signed token at the return-path
// domain of the From domain, or null for mail that must not be bounced.
func (w *worker) returnPath(work *queue.Work, dir *policy.Directory, domain *policy.Domain) (mailaddr.Address, error) {
	env := work.Env
	if env.Sender.IsNull() {
		return mailaddr.Address{}, nil // RFC 5321 section 4.5.5
	}
	if domain == nil || domain.ReturnPath == "" {
		return mailaddr.Address{}, fault.New(fault.Unavailable, "engine.returnPath",
			"the sending domain %s is no longer in the view of this relay", env.From)
	}
	local, err := w.token(work, dir)
	if err != nil {
		return mailaddr.Address{}, err
	}
	return mailaddr.Address{Local: local, Domain: domain.ReturnPath}, nil
}

// commit waits for the journal record of the attempt, and refuses to go on
// when the message has expired meanwhile.
func (w *worker) commit() error {
	w.waited = true
	if err := <-w.journal; err != nil || w.guard == nil {
		return err
	}
	return w.guard.pass(w.engine.cfg.Now())
}

// signJob is what sign needs of the message in hand.
type signJob struct {
	env    *relay.Envelope
	signer *sign.Signer
	want   sign.Algorithms // of the provider
	header []byte
	added  []byte // fields in front of the message; the buffer is kept
}

// sign makes the DKIM signatures, after the last change to the message, and
// returns them with the fields that were added to it.
func (w *worker) sign(converted []byte) ([]byte, error) {
	header, hash := w.signer.header, w.signer.env.Body.BodyHash
	if converted != nil {
		n := len(converted)
		if i := bytes.Index(converted, lineEnd); i >= 0 {
			n = i + len(lineEnd)
		}
		h := sign.NewBodyHasher()
		if _, err := h.Write(converted[n:]); err != nil {
			return nil, err
		}
		header, hash = converted[:n], h.Sum()
	}
	var err error
	now := w.engine.cfg.Now()
	w.signature, err = w.signer.signer.Sign(w.signature[:0], w.signer.added, header, hash, w.signer.want, now)
	if err == nil {
		w.signature = append(w.signature, w.signer.added...)
		w.engine.checks.offer(w, converted, header, now)
	}
	return w.signature, err
}
