package engine

import (
	"bytes"
	"slices"
	"time"

	"github.com/relais-mta/relais/relay"
	"github.com/relais-mta/relais/relay/dsn"
	"github.com/relais-mta/relais/relay/outbox"
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

// report is one recipient to tell the sender about.
type report struct {
	failedRecipient
	action dsn.Action
}

// notices builds the notifications that settlements of one message owe the
// sender: what ends together is told together. It marks in the results what was
// told or kept back. A failure to build one is logged and costs the
// notification, never the settlement: the event tells what happened all the
// same.
func (e *Engine) notices(env *relay.Envelope, now time.Time, dir *policy.Directory, settlements ...*settlement) []queue.Mail {
	var told []report
	for _, s := range settlements {
		if len(s.failed)+len(s.delayed)+len(s.relayed) == 0 {
			continue // as it is for most mail
		}
		told = append(told, wanted(env, s.failed, dsn.Failed)...)
		told = append(told, wanted(env, s.delayed, dsn.Delayed)...)
		told = append(told, wanted(env, s.relayed, dsn.Relayed)...)
	}
	var mail []queue.Mail
	for part := range slices.Chunk(told, dsn.MaxRecipients) {
		action := leading(part)
		ok, begins := e.limiter.allow(noticeSender{env.Tenant, env.Sender.String()}, now, &dir.Document().Queue)
		if begins {
			e.log.Warn("a sender gets no more notifications for now, the events still tell of every recipient",
				"tenant", env.Tenant, "sender", env.Sender.String(), "message", env.ID)
		}
		mark(settlements, part, ok)
		if !ok {
			e.metrics.untold.WithLabelValues(string(action)).Inc()
			continue
		}
		m, err := e.notice(env, part, action, now, dir)
		if err != nil {
			e.log.Error("a notification to the sender could not be made", "message", env.ID, "error", err)
			continue
		}
		e.metrics.dsns.WithLabelValues(string(action)).Inc()
		mail = append(mail, m)
	}
	return mail
}

// Unconfirmed builds the notifications about recipients that a start ends as
// unknown: after a crash nobody else can tell their sender.
func (e *Engine) Unconfirmed(env *relay.Envelope, ended []queue.Result) []queue.Mail {
	dir := e.cfg.Directory()
	if dir == nil {
		return nil // the events tell
	}
	s := &settlement{results: ended}
	for i := range ended {
		s.failed = append(s.failed, failedRecipient{ended[i].Index, ended[i].State, ended[i].State.LastClass})
	}
	return e.notices(env, e.cfg.Now(), dir, s)
}

// leading is the action by which a notification is counted: the worst.
func leading(told []report) dsn.Action {
	action := dsn.Relayed
	for i := range told {
		switch told[i].action {
		case dsn.Failed:
			return dsn.Failed
		case dsn.Delayed:
			action = dsn.Delayed
		}
	}
	return action
}

// mark notes in the results of the recipients what the events say of telling
// the sender.
func mark(settlements []*settlement, told []report, sent bool) {
	for _, r := range told {
		what := outbox.None // an event of the notification itself says it
		switch {
		case !sent:
			what = outbox.Untold
		case r.action == dsn.Delayed:
			what = outbox.Delayed
		}
		for _, s := range settlements {
			if i, ok := slices.BinarySearchFunc(s.results, r.index, func(r queue.Result, i uint16) int { return int(r.Index) - int(i) }); ok {
				s.results[i].Told = what
			}
		}
	}
}

// bits are the NOTIFY values that ask for a report of an action.
var bits = map[dsn.Action]relay.Notify{dsn.Failed: relay.NotifyFailure, dsn.Delayed: relay.NotifyDelay, dsn.Relayed: relay.NotifySuccess}

// wanted returns the recipients of whom the sender is to be told: those whose
// NOTIFY asks for it (RFC 3461 section 4.1), and without NOTIFY those of
// transactional mail that failed or are late. A bounce is never bounced (RFC
// 5321 section 6.1), and what Relais wrote itself is not reported on.
func wanted(env *relay.Envelope, recipients []failedRecipient, action dsn.Action) []report {
	if len(recipients) == 0 || env.Sender.IsNull() || env.Internal {
		return nil
	}
	var out []report
	for _, r := range recipients {
		notify := env.Recipients[r.index].Notify
		byDefault := notify == 0 && env.Kind == policy.Transactional && action != dsn.Relayed
		if notify&relay.NotifyNever == 0 && notify&bits[action] != 0 || byDefault {
			out = append(out, report{r, action})
		}
	}
	return out
}

func (e *Engine) notice(env *relay.Envelope, told []report, leading dsn.Action, now time.Time, dir *policy.Directory) (queue.Mail, error) {
	// RFC 3461 section 4.3: without a failure only the header section goes back.
	// Binary content cannot stand in a report, which goes to any host.
	full := env.RetFull && leading == dsn.Failed && !env.BinaryMIME
	header, body, err := e.original(env, full)
	if err != nil {
		// The sender hears of the end all the same, without the text.
		e.log.Error("a notification goes without the message, which cannot be read", "message", env.ID, "error", err)
		header, body, full = nil, nil, false
	}
	in := dsn.Input{
		ID: ids.NewMessage(now), Now: now, ReportingMTA: e.cfg.Hostname, From: mailaddr.Address{Local: postmaster, Domain: env.From}, To: env.Sender,
		EnvelopeID: env.EnvID, Arrival: env.AcceptedAt, Header: header, Body: body, ReturnFull: full,
	}
	for i := range told {
		r := &told[i]
		rcpt := &env.Recipients[r.index]
		out := dsn.Recipient{
			Address: rcpt.Address, ORCPT: rcpt.ORCPT, Action: r.action, Reply: r.status.LastReply, LastAttempt: r.status.LastAttempt,
		}
		if r.status.LastReply.Code > 0 {
			out.RemoteMTA = r.status.LastMX // RFC 3464 section 2.3.5: of the one that reported
		}
		if r.action == dsn.Delayed {
			out.WillRetryUntil = env.ExpiresAt
		} else if r.status.State == relay.StateUnknown {
			// RFC 3464 section 2.3.3 knows no better action: nothing more will be done.
			out.Unknown, out.Status = true, "4.4.2" // RFC 3463 section 3.5: bad connection
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
	out := noticeEnvelope(env, in.ID, now, dir, text)
	out.SMTPUTF8 = in.UTF8()
	return queue.Mail{Env: out, Body: sealed}, nil
}

// original reads what is needed of the message: its header section and, if all
// of it is to go back and it is not too long, its body.
func (e *Engine) original(env *relay.Envelope, full bool) (header, body []byte, err error) {
	if full && env.Body.Length <= dsn.MaxReturnedBytes {
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
