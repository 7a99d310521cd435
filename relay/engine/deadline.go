package engine

import (
	"context"
	"sync/atomic"
	"time"

	"github.com/relais-mta/relais/relay"
	"github.com/relais-mta/relais/shared/fault"
)

// expireLoop ends what is past its deadline. It is a loop of its own, because
// deadlines must not wait for the scheduler, however much that has to do.
func (e *Engine) expireLoop(ctx context.Context) {
	timer := time.NewTimer(0)
	defer timer.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case <-e.overdue:
		case <-timer.C:
		}
		now := e.cfg.Now()
		e.expire(now)
		timer.Reset(e.untilDeadline(now))
	}
}

// untilDeadline returns how long the loop may sleep.
func (e *Engine) untilDeadline(now time.Time) time.Duration {
	at, ok := e.queue.NextDeadline()
	if !ok {
		return maxIdleWait
	}
	return min(maxIdleWait, max(minDeadlineInterval, at.Sub(now)))
}

func (e *Engine) lookAtDeadlines() {
	select {
	case e.overdue <- struct{}{}:
	default:
	}
}

// guardWithin is how close a deadline must be for an attempt to be watched:
// longer than any attempt should take, so that most mail costs no timer.
const guardWithin = time.Hour

// The states of a guard: the final dot may be sent once, or the deadline came
// first.
const (
	guardOpen int32 = iota
	guardPassed
	guardLate
)

// guard makes sure that a message is not delivered after its deadline, and that
// a slow host does not hold it beyond: at the deadline the connection is given
// up, unless the final dot was sent. From then on only the host's answer tells
// what became of the message, and is waited for.
type guard struct {
	state    atomic.Int32
	deadline time.Time
	timer    *time.Timer
}

// pass asks for leave to send the final dot.
func (g *guard) pass(now time.Time) error {
	to := guardPassed
	if !now.Before(g.deadline) {
		to = guardLate // the timer is late itself
	}
	if g.state.CompareAndSwap(guardOpen, to) && to == guardPassed {
		return nil
	}
	return fault.New(fault.Unavailable, "engine.pass", lateText)
}

// end stops watching and reports whether the deadline came first.
func (g *guard) end() bool {
	g.timer.Stop()
	g.state.CompareAndSwap(guardOpen, guardPassed) // it may have begun to fire
	return g.state.Load() == guardLate
}

const lateText = "the message expired before the mail host had taken it"

// lateReply is the reason given for recipients whose attempt the deadline
// ended, if the host said none.
var lateReply = relay.Reply{Enhanced: "4.4.7", Text: lateText} // RFC 3463 section 3.5: delivery time expired

// late words the outcomes of an attempt that its deadline ended at a phase. All
// of them count as attempts, so that the sender is told what the mail waited
// for; none is final, because the end of the message is not theirs to record.
func late(outcomes []relay.Outcome, phase relay.Phase) {
	for i := range outcomes {
		if o := &outcomes[i]; (o.Status == relay.Deferred || o.Status == relay.NotTried) && o.Reply.Code == 0 {
			o.Status, o.Reply = relay.Deferred, lateReply
			if o.Phase == relay.PhaseLocal || o.Phase == relay.PhaseNone {
				o.Phase = phase
			}
		}
	}
}

// watch returns a guard for a message that is to be carried now, which calls
// abort at the deadline; nil if that is far, and while nothing expires because
// the clock is not trusted.
func (e *Engine) watch(env *relay.Envelope, now time.Time, abort func()) *guard {
	if env.ExpiresAt.Sub(now) > guardWithin || !e.cfg.ClockTrusted() {
		return nil
	}
	g := &guard{deadline: env.ExpiresAt}
	g.timer = time.AfterFunc(env.ExpiresAt.Sub(now), func() {
		if g.state.CompareAndSwap(guardOpen, guardLate) {
			abort()
		}
	})
	return g
}

// dialContext is a context for opening a session for a message: it ends at the
// message's deadline. over ends it and reports whether that was what ended it.
func (e *Engine) dialContext(ctx context.Context, env *relay.Envelope, now time.Time) (_ context.Context, over func() bool) {
	ctx, cancel := context.WithCancel(ctx)
	g := e.watch(env, now, cancel)
	return ctx, func() bool {
		defer cancel()
		return g != nil && g.end()
	}
}
