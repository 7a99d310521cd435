package engine

import (
	"context"
	"time"

	"github.com/relais-mta/relais/relay"
	"github.com/relais-mta/relais/relay/queue"
	"github.com/relais-mta/relais/relay/schedule"
	"github.com/relais-mta/relais/shared/mailaddr"
	"github.com/relais-mta/relais/shared/policy"
)

// Hold says why work may not start; the zero Hold says that it may.
type Hold = schedule.Hold

// Place is what an Admitter is asked about. It belongs to one session, stays the
// same while the session lasts and may be kept until Closed.
type Place struct {
	Lane   schedule.Lane
	Source policy.Source
	Abort  func() // ends the session at once, whatever it does; may be called at any time, by anybody

	// Of the mail that is to be carried: for Connect what the session is opened
	// for, afterwards what Begin is asked about.
	Key        schedule.Key
	From       mailaddr.Domain // of the From header
	Recipients int             // of this transaction
	Message    *relay.Envelope
}

// Admitter is somebody outside who decides whether work may start: the limits
// that relays share, warm-up, brakes. It is asked by the session's goroutine, with
// no lock of the engine held, and must not block; it is told the end of all that
// it admitted. It may call the engine's methods, but not from within these.
//
// Who refuses says until when. A time within maxBeginWait is waited for by the
// session itself, and the question put again; otherwise the mail goes back to its
// queue, which is left alone until then, or for refusalPause if no time is known
// or until Recall names the hold. So that sessions are not opened in vain an
// Admitter also tells the scheduler what it knows beforehand, with SetGates.
type Admitter interface {
	// Connect asks for a session; Closed gives it back, once.
	Connect(now time.Time, p *Place) Hold
	Closed(now time.Time, p *Place)
	// Begin asks for a transaction, right before it is offered. Done tells what
	// became of it, once: no outcomes if it was not offered at all, for another
	// Admitter refused it or it could not be prepared.
	Begin(now time.Time, p *Place) Hold
	Done(now time.Time, p *Place, outcomes []relay.Outcome)
}

// Times of work that an Admitter refused.
const (
	maxBeginWait = 500 * time.Millisecond // a session that waits for less keeps the message in hand
	refusalPause = time.Second            // a queue is left alone for that long if no time is known
	maxRefusal   = time.Minute            // and no longer than that: what holds it may have changed
)

// connect asks all admitters for a session. On refusal none has admitted it.
func (w *worker) connect(now time.Time) Hold {
	admit := w.engine.cfg.Admit
	for i, a := range admit {
		if h := a.Connect(now, &w.place); h.Reason != "" {
			for _, b := range admit[:i] {
				b.Closed(now, &w.place)
			}
			return h
		}
	}
	w.connected = true
	return Hold{}
}

// disconnect tells the admitters that the session is gone.
func (w *worker) disconnect() {
	if !w.connected {
		return
	}
	w.connected = false
	now := w.engine.cfg.Now()
	for _, a := range w.engine.cfg.Admit {
		a.Closed(now, &w.place)
	}
}

// admit asks all admitters whether the message in hand may begin, and waits a
// little if that is all it takes. On refusal none has admitted it.
func (w *worker) admit(ctx context.Context, work *queue.Work) Hold {
	if len(w.engine.cfg.Admit) == 0 {
		return Hold{}
	}
	w.describe(work)
	asked := w.engine.cfg.Now()
	for now := asked; ; now = w.engine.cfg.Now() {
		h := w.ask(now)
		wait := h.Until.Sub(now)
		if h.Reason == "" || h.Until.IsZero() || now.Add(max(wait, 0)).Sub(asked) > maxBeginWait || w.session.Dead() {
			return h
		}
		pause := time.NewTimer(max(wait, time.Millisecond))
		select {
		case <-pause.C:
		case <-ctx.Done():
			pause.Stop()
			return h
		}
	}
}

func (w *worker) ask(now time.Time) Hold {
	admit := w.engine.cfg.Admit
	for i, a := range admit {
		if h := a.Begin(now, &w.place); h.Reason != "" {
			for _, b := range admit[:i] {
				b.Done(now, &w.place, nil)
			}
			return h
		}
	}
	return Hold{}
}

// admitted tells the admitters what became of the message; nil: it was not
// offered.
func (w *worker) admitted(outcomes []relay.Outcome) {
	if len(w.engine.cfg.Admit) == 0 {
		return
	}
	now := w.engine.cfg.Now()
	for _, a := range w.engine.cfg.Admit {
		a.Done(now, &w.place, outcomes)
	}
}

// describe puts the work into the session's place.
func (w *worker) describe(work *queue.Work) {
	p := &w.place
	p.Key, p.From, p.Recipients, p.Message = scheduleKey(&work.Key), work.Env.From, len(work.Recipients), work.Env
}

// giveBack returns work that was refused to its queue, which is left alone until
// it may be asked again. started says that the scheduler counts it as begun.
func (w *worker) giveBack(work *queue.Work, h Hold, started bool) {
	e := w.engine
	e.queue.Return(work)
	now := e.cfg.Now()
	until := h.Until
	switch {
	case !h.Look.IsZero():
		until = h.Look
	case until.IsZero():
		until = now.Add(refusalPause)
	}
	if most := now.Add(maxRefusal); until.After(most) {
		until = most
	}
	e.mu.Lock()
	if started {
		e.sched.NotStarted(w.id)
	}
	e.setHead(work.Queue, now)
	e.sched.PutOff(schedule.Queue(work.Queue), h, until, now)
	e.mu.Unlock()
	e.wake()
}

// Explainer is an Admitter that has gates in the scheduler: it words what one of
// them lets pass.
type Explainer interface {
	Explain(gate schedule.GateID) (Hold, bool)
}

// explainGate asks who owns a gate for words.
func (e *Engine) explainGate(id schedule.GateID) (Hold, bool) {
	if id == (schedule.GateID{}) {
		return Hold{}, false
	}
	for _, a := range e.cfg.Admit {
		if x, ok := a.(Explainer); ok {
			if h, ok := x.Explain(id); ok {
				return h, true
			}
		}
	}
	return Hold{}, false
}

// SetGates adds gates to the scheduler, or changes those of the same number. An
// owner calls it from one goroutine, so that the last word is the last.
func (e *Engine) SetGates(gates ...schedule.Gate) {
	now := e.cfg.Now()
	e.mu.Lock()
	for _, g := range gates {
		e.sched.SetGate(g, now)
	}
	e.mu.Unlock()
	e.wake()
}

// KeepGates drops the gates of an owner that it does not name.
func (e *Engine) KeepGates(owner string, numbers map[uint64]bool) {
	now := e.cfg.Now()
	e.mu.Lock()
	for _, n := range e.sched.Gates(owner) {
		if !numbers[n] {
			e.sched.DropGate(schedule.GateID{Owner: owner, Number: n}, now)
		}
	}
	e.mu.Unlock()
	e.wake()
}

// GateStates returns what there is for an owner's gates to let pass, appended to
// dst: of those that have work or sessions.
func (e *Engine) GateStates(owner string, dst []schedule.GateState) []schedule.GateState {
	e.mu.Lock()
	defer e.mu.Unlock()
	return e.sched.GateStates(owner, dst)
}

// Recall has mail looked at again that was refused by a hold of the name.
func (e *Engine) Recall(name string) {
	e.mu.Lock()
	e.sched.Recall(name, e.cfg.Now())
	e.mu.Unlock()
	e.wake()
}
