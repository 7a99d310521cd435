package engine

import (
	"net/netip"
	"time"

	"github.com/relais-mta/relais/relay"
	"github.com/relais-mta/relais/relay/outbox"
	"github.com/relais-mta/relais/relay/queue"
	"github.com/relais-mta/relais/relay/resolve"
	"github.com/relais-mta/relais/relay/verdict"
	"github.com/relais-mta/relais/shared/policy"
)

// settlement is what the outcomes of one attempt mean for the queue.
type settlement struct {
	results []queue.Result
	failed  []failedRecipient // senders may have to be told
	delayed []failedRecipient
	relayed []failedRecipient // whose sender asked to be told
	further bool              // the attempt got some recipients of the message further
}

// further reports whether an attempt got any recipient out of the way.
func further(a *relay.Attempt) bool {
	for i := range a.Outcomes {
		if s := a.Outcomes[i].Status; s == relay.Delivered || s == relay.InDoubt {
			return true
		}
	}
	return false
}

// failedRecipient is one recipient to report in a DSN, of which that may also
// tell that it did not fail.
type failedRecipient struct {
	index  uint16
	status relay.RecipientState
	class  string
}

// decide turns outcomes into new states. It is a function of its arguments
// alone: work, attempt, policy and the end of the attempt.
func decide(w *queue.Work, a *relay.Attempt, q *policy.Queue) settlement {
	s := settlement{further: further(a)}
	for i := range a.Outcomes {
		o := &a.Outcomes[i]
		wr := find(w, o.Index)
		if wr == nil || o.Status == relay.NotTried {
			continue // goes back as it was
		}
		s.add(w.Env, a, wr.State, o, q)
	}
	return s
}

func find(w *queue.Work, index uint16) *queue.WorkRecipient {
	for i := range w.Recipients {
		if w.Recipients[i].Index == index {
			return &w.Recipients[i]
		}
	}
	return nil
}

func (s *settlement) add(env *relay.Envelope, a *relay.Attempt, st relay.RecipientState, o *relay.Outcome, q *policy.Queue) {
	st.Attempts++
	st.LastAttempt = a.EndedAt
	st.LastReply = o.Reply
	st.LastMX = a.MX
	st.Source, st.Provider = a.SourceIP, a.Provider
	st.Sticky = netip.Addr{}
	r := queue.Result{Index: o.Index, Phase: o.Phase}
	switch o.Status {
	case relay.Delivered:
		st.State, st.LastClass = relay.StateDelivered, ""
		r.Event = outbox.Delivered
		if env.Recipients[o.Index].Notify&relay.NotifySuccess != 0 {
			// RFC 3461 section 5.2.2: NOTIFY is not passed on, so the peer is one
			// that will not tell.
			s.relayed = append(s.relayed, failedRecipient{o.Index, st, ""})
		}
	case relay.InDoubt:
		st.LastClass = classBadConnection
		if st.InDoubt++; int(st.InDoubt) > q.InDoubtRetries {
			st.State, r.Event = relay.StateUnknown, outbox.Unknown
			s.failed = append(s.failed, failedRecipient{o.Index, st, st.LastClass})
			break
		}
		st.State, r.Event = relay.StateWaiting, outbox.InDoubt
		st.Next = notAfter(a.EndedAt.Add(q.InDoubtRetry.D()), env.ExpiresAt)
	default:
		v := verdict.Of(a.Provider, o)
		st.LastClass = string(v.Class)
		if v.Action == verdict.Fail {
			st.State, r.Event = relay.StateBounced, outbox.Bounced
			s.failed = append(s.failed, failedRecipient{o.Index, st, st.LastClass})
			break
		}
		st.State, r.Event = relay.StateWaiting, outbox.Deferred
		if v.Action == verdict.RetryNow && s.further {
			// RFC 5321 section 4.5.3.1.10: the host takes the others in another
			// transaction. Each one is smaller by those it took, so this ends.
			st.Attempts--
			st.Next = notAfter(a.EndedAt, env.ExpiresAt)
			break
		}
		st.Next = retryAt(env, &st, v, a, q)
		if v.Class == verdict.Greylist {
			st.Sticky = a.SourceIP
		}
	}
	if st.State == relay.StateWaiting && st.Next.After(a.EndedAt) && overdue(env, &st, a.EndedAt, q) {
		st.DelayTold = true
		s.delayed = append(s.delayed, failedRecipient{o.Index, st, st.LastClass})
	}
	r.State = st
	s.results = append(s.results, r)
}

// retryAt returns when a deferred recipient is tried again. One that no
// attempt can reach any more waits for its deadline, which ends it.
func retryAt(env *relay.Envelope, st *relay.RecipientState, v verdict.Verdict, a *relay.Attempt, q *policy.Queue) time.Time {
	next, ok := queue.RetryAt(*q, env.ID, st.Attempts, a.EndedAt, env.ExpiresAt)
	if !ok {
		return env.ExpiresAt
	}
	switch {
	case v.Class == verdict.Greylist && st.Attempts == 1:
		// Mail that does not live that long has the schedule's last try.
		if at := a.EndedAt.Add(q.GreylistRetry.D()); at.Before(env.ExpiresAt) {
			next = at
		}
	case v.After > 0:
		// Never longer than the schedule's own longest wait.
		if ask := a.EndedAt.Add(min(v.After, q.RetryMax.D())); ask.After(next) {
			next = ask
		}
	}
	return notAfter(next, env.ExpiresAt)
}

func notAfter(t, limit time.Time) time.Time {
	if t.After(limit) {
		return limit
	}
	return t
}

// overdue reports whether the sender is to be told about a delay now: once, at
// the end of the first attempt after the time that policy names. It counts from
// when the message might go out.
func overdue(env *relay.Envelope, st *relay.RecipientState, now time.Time, q *policy.Queue) bool {
	if q.DelayNotice == 0 || st.DelayTold {
		return false
	}
	start := env.AcceptedAt
	if env.NotBefore.After(start) {
		start = env.NotBefore
	}
	return !now.Before(start.Add(q.DelayNotice.D()))
}

// localAttempt describes work that ended without a remote server.
func localAttempt(w *queue.Work, f *resolve.Failure, now time.Time) *relay.Attempt {
	a := &relay.Attempt{Message: w.Env.ID, StartedAt: now, EndedAt: now}
	for i := range w.Recipients {
		a.Outcomes = append(a.Outcomes, relay.Outcome{
			Index: w.Recipients[i].Index, Status: f.Status, Phase: relay.PhaseResolve, Reply: f.Reply,
		})
	}
	return a
}

// settleWithout records a failed look-up on work that is in hand.
func (e *Engine) settleWithout(w *queue.Work, f *resolve.Failure, now time.Time) {
	e.settleAndWait(w, localAttempt(w, f, now))
}

// settleAndWait is settle for who would go on to other work at once: hosts may
// refuse sessions, and mail turn out not to be sendable, faster than the disk takes
// down that they did.
func (e *Engine) settleAndWait(w *queue.Work, a *relay.Attempt) {
	done := make(chan error, 1)
	e.settle(w, a, func(err error) { done <- err })
	<-done
}

// settle writes what an attempt did. done is called on the commit goroutine.
// Work whose states could not be written goes back as it was, unless something
// of it was delivered.
func (e *Engine) settle(w *queue.Work, a *relay.Attempt, done func(error)) {
	dir := e.cfg.Directory()
	if dir == nil {
		e.queue.Return(w)
		done(nil)
		return
	}
	s := decide(w, a, &dir.Document().Queue)
	e.observe(a)
	e.metrics.count(a, &s)
	e.logResults(w, a, &s)
	e.record(w, a, &s, dir, done)
}

// record stores what decide decided.
func (e *Engine) record(w *queue.Work, a *relay.Attempt, s *settlement, dir *policy.Directory, done func(error)) {
	mail := e.notices(w.Env, a.EndedAt, dir, s)
	e.queue.Finish(w, a, s.results, mail, func(err error) {
		if err != nil {
			e.log.Error("the end of an attempt could not be stored", "message", w.Env.ID, "error", err)
			for _, m := range mail {
				m.Body.Discard()
			}
			if s.further {
				e.recordLater(w, a, s, dir)
			} else {
				e.queue.Return(w)
			}
		}
		if done != nil {
			done(err)
		}
	})
}

// recordRetry is the wait before the end of an attempt is stored again.
const recordRetry = 2 * time.Second

// recordLater stores the end of an attempt that got mail delivered when the
// disk did not take it: another attempt would be a second copy. Until then the
// work stays in hand; if the relay ends before, the journal knows.
func (e *Engine) recordLater(w *queue.Work, a *relay.Attempt, s *settlement, dir *policy.Directory) {
	ctx := e.sessionContext()
	go func() {
		wait := time.NewTimer(recordRetry)
		defer wait.Stop()
		select {
		case <-wait.C:
			e.record(w, a, s, dir, nil)
		case <-ctx.Done():
		}
	}()
}

// expire ends the messages whose deadline has passed.
func (e *Engine) expire(now time.Time) {
	dir := e.cfg.Directory()
	if dir == nil {
		return
	}
	e.unpinOverdue(now)
	under := make(chan struct{}, maxExpireUnderWay)
	for {
		works := e.queue.PopExpired(now, maxExpirePerRound)
		full := len(works) >= maxExpirePerRound
		for len(works) > 0 {
			n := 1
			for n < len(works) && works[n].Env.ID == works[0].Env.ID {
				n++
			}
			under <- struct{}{} // as many may expire at once as there are
			e.expireThen(works[:n], now, dir, func(error) { <-under })
			works = works[n:]
		}
		if !full {
			return
		}
	}
}

// expireThen ends work of one message for good, with the last remote reply as
// the reason if there is one, else with what kept it from being tried. The
// sender gets one notification for all of it. done is told when the ends are
// stored, or are not.
func (e *Engine) expireThen(works []*queue.Work, now time.Time, dir *policy.Directory, done func(error)) {
	settlements := make([]*settlement, len(works))
	for i, w := range works {
		s := &settlement{}
		for _, wr := range w.Recipients {
			st := wr.State
			if st.LastReply.Text == "" && st.LastReply.Code == 0 {
				st.LastReply = e.whyNotTried(w, &wr.State, now)
			}
			st.State = relay.StateExpired
			s.results = append(s.results, queue.Result{Index: wr.Index, State: st, Event: outbox.Expired, Phase: relay.PhaseLocal})
			s.failed = append(s.failed, failedRecipient{wr.Index, st, classExpired})
		}
		a := &relay.Attempt{Message: w.Env.ID, StartedAt: now, EndedAt: now}
		e.metrics.count(a, s)
		e.logResults(w, a, s)
		settlements[i] = s
	}
	e.finishEnds(works, settlements, e.notices(works[0].Env, now, dir, settlements...), done)
}

// finishEnds stores the ends of one message's works one after the other. The notification goes with
// the first, so that a crash can have it sent twice but never lost.
func (e *Engine) finishEnds(works []*queue.Work, settlements []*settlement, mail []queue.Mail, done func(error)) {
	e.queue.Finish(works[0], nil, settlements[0].results, mail, func(err error) {
		if err != nil {
			e.log.Error("the end of a message could not be stored", "message", works[0].Env.ID, "error", err)
			for _, m := range mail {
				m.Body.Discard()
			}
			for _, w := range works {
				e.queue.Return(w)
			}
		}
		switch {
		case err == nil && len(works) > 1:
			e.finishEnds(works[1:], settlements[1:], nil, done)
		case done != nil:
			done(err)
		}
	})
}

// whyNotTried words the reason for mail that expired before any attempt.
func (e *Engine) whyNotTried(w *queue.Work, st *relay.RecipientState, now time.Time) relay.Reply {
	if st.State == relay.StateHeld {
		return relay.Reply{Enhanced: "4.4.7", Text: "the message was held here until it expired"}
	}
	text := "no attempt was possible before the message expired"
	e.mu.Lock()
	if route := e.routes[w.Key.Domain]; route != nil && route.Failure != nil {
		text = route.Failure.Reply.Text
	} else if why := e.sched.DomainWaits(w.Key.Domain, now); why != "" {
		text += ": waited for " + why
	}
	e.mu.Unlock()
	return relay.Reply{Enhanced: "4.4.7", Text: text} // RFC 3463 section 3.5: delivery time expired
}

// The two classes that the engine itself gives.
const (
	classBadConnection = "bad-connection"
	classExpired       = "expired"
)
