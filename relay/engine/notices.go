package engine

import (
	"bytes"
	"time"

	"github.com/relais-mta/relais/relay"
	"github.com/relais-mta/relais/relay/dsn"
	"github.com/relais-mta/relais/relay/queue"
	"github.com/relais-mta/relais/relay/sign"
	"github.com/relais-mta/relais/relay/store"
	"github.com/relais-mta/relais/shared/fault"
	"github.com/relais-mta/relais/shared/ids"
	"github.com/relais-mta/relais/shared/mailaddr"
	"github.com/relais-mta/relais/shared/policy"
)

// postmaster is the local part in the From of our notifications; the address
// is at the sending domain, so that the notification can be signed for it.
const postmaster = "postmaster"

// notices builds the notifications that a settlement owes the sender. A
// failure to build one is logged and costs the notification, never the
// settlement: the event tells what happened all the same.
func (e *Engine) notices(w *queue.Work, s *settlement, now time.Time, dir *policy.Directory) []queue.Mail {
	var mail []queue.Mail
	for _, n := range []struct {
		action     dsn.Action
		recipients []failedRecipient
		wanted     relay.Notify
	}{{dsn.Failed, s.failed, relay.NotifyFailure}, {dsn.Delayed, s.delayed, relay.NotifyDelay}} {
		told := wanted(w.Env, n.recipients, n.wanted)
		if len(told) == 0 {
			continue
		}
		m, err := e.notice(w.Env, told, n.action, now, dir)
		if err != nil {
			e.log.Error("a notification to the sender could not be made", "message", w.Env.ID, "error", err)
			continue
		}
		e.metrics.dsns.WithLabelValues(string(n.action)).Inc()
		mail = append(mail, m)
	}
	return mail
}

// wanted returns the recipients of whom the sender is to be told: those of
// transactional mail unless NOTIFY says otherwise, and those whose NOTIFY asks
// for it (RFC 3461 section 4.1). A bounce is never bounced (RFC 5321 section
// 6.1), and what Relais wrote itself is not reported on.
func wanted(env *relay.Envelope, recipients []failedRecipient, bit relay.Notify) []failedRecipient {
	if env.Sender.IsNull() || env.Internal {
		return nil
	}
	var out []failedRecipient
	for _, r := range recipients {
		notify := env.Recipients[r.index].Notify
		if notify&bit != 0 || notify == 0 && env.Kind == policy.Transactional {
			out = append(out, r)
		}
	}
	return out
}

func (e *Engine) notice(env *relay.Envelope, recipients []failedRecipient, action dsn.Action, now time.Time, dir *policy.Directory) (queue.Mail, error) {
	header, body, err := e.original(env)
	if err != nil {
		return queue.Mail{}, err
	}
	in := dsn.Input{
		ID: ids.NewMessage(now), Now: now, ReportingMTA: e.cfg.Hostname, From: mailaddr.Address{Local: postmaster, Domain: env.From}, To: env.Sender,
		EnvelopeID: env.EnvID, Arrival: env.AcceptedAt, Header: header, Body: body, ReturnFull: env.RetFull && body != nil,
	}
	for _, r := range recipients {
		rcpt := &env.Recipients[r.index]
		out := dsn.Recipient{
			Address: rcpt.Address, ORCPT: rcpt.ORCPT, Action: action, Reply: r.status.LastReply,
			RemoteMTA: r.status.LastMX, LastAttempt: r.status.LastAttempt,
		}
		if action == dsn.Delayed {
			out.WillRetryUntil = env.ExpiresAt
		} else if r.class == classExpired {
			out.Status = "4.4.7" // RFC 3463 section 3.5
		}
		in.Recipients = append(in.Recipients, out)
	}
	text, err := dsn.Build(in)
	if err != nil {
		return queue.Mail{}, err
	}
	sealed, err := seal(e.cfg.Store, text)
	if err != nil {
		return queue.Mail{}, err
	}
	return queue.Mail{Env: noticeEnvelope(env, in.ID, now, dir, text), Body: sealed}, nil
}

// original reads what is needed of the message: its header section and, if the
// sender asked for it and it is not too long, its body.
func (e *Engine) original(env *relay.Envelope) (header, body []byte, err error) {
	if env.Body.Length <= dsn.MaxReturnedBytes && env.RetFull {
		whole, err := e.cfg.Store.ReadBody(env.Body, nil)
		if err != nil {
			return nil, nil, err
		}
		return whole[:env.Body.HeaderBytes], whole[env.Body.HeaderBytes:], nil
	}
	r, err := e.cfg.Store.OpenBody(env.Body)
	if err != nil {
		return nil, nil, err
	}
	header, err = readHeader(r, env.Body.HeaderBytes, nil)
	if closeErr := r.Close(); err == nil {
		err = closeErr
	}
	return header, nil, err
}

var lineEnd = []byte("\r\n\r\n")

// seal stores the text of a message that we wrote.
func seal(st *store.Store, text []byte) (*store.Body, error) {
	i := bytes.Index(text, lineEnd)
	if i < 0 {
		return nil, fault.New(fault.Internal, "engine.seal", "a notification without a header section")
	}
	split := i + len(lineEnd)
	h := sign.NewBodyHasher()
	if _, err := h.Write(text[split:]); err != nil {
		return nil, err
	}
	b := st.NewBody()
	if _, err := b.Write(text); err != nil {
		b.Discard()
		return nil, err
	}
	if err := b.Seal(int64(split), h.Sum()); err != nil {
		b.Discard()
		return nil, err
	}
	return b, nil
}

// noticeEnvelope addresses a notification: from nobody, to the sender, through
// the tenant's transactional pool if there is one with a source here, else
// through the pool of the message itself.
func noticeEnvelope(env *relay.Envelope, id ids.Message, now time.Time, dir *policy.Directory, text []byte) *relay.Envelope {
	out := &relay.Envelope{
		ID: id, Tenant: env.Tenant, Project: env.Project, Stream: env.Stream, Kind: policy.Transactional, Pool: env.Pool,
		From: env.From, Recipients: []relay.Recipient{{Address: env.Sender}}, Internal: true,
		EightBit: has8Bit(text), AcceptedAt: now, ExpiresAt: now.Add(dir.Document().Queue.ExpireTransactional.D()), Revision: dir.View().Revision,
	}
	if s, err := dir.Stream(env.Tenant, env.Project, string(policy.Transactional)); err == nil && s.HasLocalSource {
		out.Stream, out.Pool, out.ExpiresAt = s.Name, s.Pool, now.Add(s.Expire.D())
	}
	return out
}

func has8Bit(text []byte) bool {
	for _, c := range text {
		if c >= 0x80 {
			return true
		}
	}
	return false
}
