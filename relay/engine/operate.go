package engine

import (
	"time"

	"github.com/relais-mta/relais/relay"
	"github.com/relais-mta/relais/relay/outbox"
	"github.com/relais-mta/relais/relay/queue"
	"github.com/relais-mta/relais/shared/fault"
)

// classOperator is the class of what an operator bounced.
const classOperator = "operator"

// Bounce returns what ends the works of one message as refused for an
// operator's reason, for queue.Operation. The sender gets one notification for
// all of them, if policy has one sent.
func (e *Engine) Bounce(actor, reason string) func(works []*queue.Work, done func(error)) {
	note := &queue.Note{Actor: actor, Class: classOperator, Text: reason}
	return func(works []*queue.Work, done func(error)) {
		dir := e.cfg.Directory()
		if dir == nil {
			for _, w := range works {
				e.queue.Return(w)
			}
			done(fault.New(fault.Unavailable, "engine.Bounce", "the relay has no policy yet, so it cannot say who is to be told"))
			return
		}
		now := e.cfg.Now()
		settlements := make([]*settlement, len(works))
		for i, w := range works {
			settlements[i] = e.bounced(w, note, now)
		}
		e.finishEnds(works, settlements, e.notices(works[0].Env, now, dir, settlements...), done)
	}
}

func (e *Engine) bounced(w *queue.Work, note *queue.Note, now time.Time) *settlement {
	s := &settlement{}
	for _, wr := range w.Recipients {
		st := wr.State
		st.State, st.Next, st.Held, st.LastClass = relay.StateBounced, time.Time{}, nil, classOperator
		st.LastReply = relay.Reply{Enhanced: "5.0.0", Text: note.Text} // RFC 3463 section 3.1: nothing closer is known
		s.results = append(s.results, queue.Result{Index: wr.Index, State: st, Event: outbox.Bounced, Phase: relay.PhaseLocal, Note: note})
		s.failed = append(s.failed, failedRecipient{wr.Index, st, classOperator})
	}
	a := &relay.Attempt{Message: w.Env.ID, StartedAt: now, EndedAt: now}
	e.metrics.count(a, s)
	e.logResults(w, a, s)
	return s
}
