package engine

import (
	"context"
	"time"

	"github.com/relais-mta/relais/relay"
	"github.com/relais-mta/relais/relay/delivery"
	"github.com/relais-mta/relais/relay/queue"
	"github.com/relais-mta/relais/relay/resolve"
	"github.com/relais-mta/relais/relay/schedule"
	"github.com/relais-mta/relais/shared/ids"
	"github.com/relais-mta/relais/shared/mailaddr"
	"github.com/relais-mta/relais/shared/policy"
)

// worker is the goroutine of one SMTP session. Its buffers live as long as the
// session, so that a message costs no large allocation.
type worker struct {
	engine  *Engine
	id      schedule.Session
	lane    schedule.Lane
	first   schedule.Effect // what it was opened for
	orders  chan order
	source  policy.Source
	session *delivery.Session

	// Of the work in hand, or had last, for people who ask. e.mu guards it.
	carries ids.Message
	to      mailaddr.Domain
	since   time.Time

	place     Place
	connected bool // the admitters gave a session
	abort     context.CancelFunc

	tx        delivery.Transaction
	body      []byte
	signature []byte
	journal   chan error
	waited    bool // the journal's answer was read
	guard     *guard
	signer    signJob
}

// order tells a parked session what to do: carry the work, or end.
type order struct{ work *queue.Work }

// order hands over without blocking: a session has at most one order, because
// the scheduler gives one only to a parked session.
func (w *worker) order(o order) {
	select {
	case w.orders <- o:
	default: // it was told to end before
	}
}

// open starts a session with its first message. e.mu is held.
func (e *Engine) open(f schedule.Effect, now time.Time) {
	work := e.takeFor(f, now)
	if work == nil {
		e.sched.Ended(f.Session)
		return
	}
	w := &worker{engine: e, id: f.Session, lane: f.Lane, first: f, orders: make(chan order, 1), journal: make(chan error, 1)}
	ctx, cancel := context.WithCancel(e.sessionCtx)
	w.abort = cancel
	w.carry(work, now)
	e.sessions[w.id] = w
	route := e.routes[work.Key.Domain]
	var hosts []resolve.Host
	if route != nil {
		hosts = route.Order(e.rng, nil)
	}
	e.workers.Add(1)
	go w.run(ctx, work, hosts)
}

// takeFor gets work for a session that is to be opened. e.mu is held.
func (e *Engine) takeFor(f schedule.Effect, now time.Time) *queue.Work {
	for {
		work := e.take(f.Queue, f.Lane, now)
		if work == nil || e.begins(f.Session, f.Lane, work, now) {
			return work
		}
	}
}

// begins books work for a session, unless it belongs to another lane and was
// moved there; work that is not loaded is booked by ready. e.mu is held.
func (e *Engine) begins(id schedule.Session, lane schedule.Lane, work *queue.Work, now time.Time) bool {
	if !work.Loaded() {
		return true
	}
	if e.pin(work, lane, now) {
		return false
	}
	e.sched.Started(id)
	if w := e.sessions[id]; w != nil {
		w.carry(work, now)
	}
	return true
}

// carry notes the work in hand; what is not loaded yet is noted later. e.mu is held.
func (w *worker) carry(work *queue.Work, now time.Time) {
	if work.Loaded() {
		w.carries, w.to, w.since = work.Env.ID, work.Key.Domain, now
	}
}

// ready loads work that waited on disk, with no lock held, and reports whether
// the session may carry it: the message may not be readable, or belong to
// another lane.
func (w *worker) ready(work *queue.Work) bool {
	if work.Loaded() {
		return true
	}
	e := w.engine
	if !e.queue.Load(work) {
		return false // Notify was told
	}
	if e.held(work, w.lane) {
		return false
	}
	e.mu.Lock()
	ok := e.begins(w.id, w.lane, work, e.cfg.Now())
	e.mu.Unlock()
	if !ok {
		e.wake() // the other lane has work
	}
	return ok
}

// dispatch gives a parked session its next message. e.mu is held.
func (e *Engine) dispatch(f schedule.Effect, now time.Time) {
	w := e.sessions[f.Session]
	if w == nil {
		e.sched.Ended(f.Session)
		return
	}
	answer := schedule.Work
	work := e.take(f.Queue, f.Lane, now)
	if work == nil || !e.begins(w.id, f.Lane, work, now) {
		work, answer = e.next(w, now)
	}
	switch answer {
	case schedule.Work:
		w.order(order{work: work})
	case schedule.End:
		w.order(order{})
	}
}

// maxEmptyTakes bounds how often a session asks on when queues turn out empty.
const maxEmptyTakes = 16

// next finds the next work of a session that is free. e.mu is held.
func (e *Engine) next(w *worker, now time.Time) (*queue.Work, schedule.Answer) {
	if e.draining {
		return nil, schedule.End
	}
	for range maxEmptyTakes {
		n, answer := e.sched.NextFor(w.id, now)
		if answer != schedule.Work {
			return nil, answer
		}
		work := e.take(n, w.lane, now)
		if work != nil && e.begins(w.id, w.lane, work, now) {
			return work, schedule.Work
		}
	}
	return nil, schedule.End
}

func (w *worker) run(ctx context.Context, work *queue.Work, hosts []resolve.Host) {
	defer w.engine.workers.Done()
	defer w.abort()
	if work = w.begin(work); work == nil {
		w.end()
		return
	}
	if !w.dial(ctx, work, hosts) {
		return
	}
	stop := context.AfterFunc(ctx, w.session.Abort)
	defer stop()
	for work != nil {
		w.send(ctx, work)
		if w.session.Dead() {
			break
		}
		work = w.proceed(ctx)
	}
	w.session.Quit()
	w.disconnect()
	w.end()
}

// end tells the scheduler that the session is gone.
func (w *worker) end() {
	e := w.engine
	e.mu.Lock()
	delete(e.sessions, w.id)
	e.sched.Ended(w.id)
	e.pumpLocked(e.cfg.Now())
	e.mu.Unlock()
	e.wake()
}

// begin returns the first work of the session, ready to be sent; nil: the queue
// that it was opened for has none (any more).
func (w *worker) begin(work *queue.Work) *queue.Work {
	e := w.engine
	for work != nil && !w.ready(work) {
		e.mu.Lock()
		work = e.takeFor(w.first, e.cfg.Now())
		e.mu.Unlock()
	}
	return work
}

// proceed returns the next work, ready to be sent; nil ends the session.
func (w *worker) proceed(ctx context.Context) *queue.Work {
	for {
		if work := w.next(ctx); work == nil || w.ready(work) {
			return work
		}
	}
}

// next returns the next work, waiting for it if the session is parked; nil
// ends the session.
func (w *worker) next(ctx context.Context) *queue.Work {
	e := w.engine
	now := e.cfg.Now()
	e.mu.Lock()
	work, answer := e.next(w, now)
	e.mu.Unlock()
	if answer != schedule.Park {
		return work
	}
	e.wake() // what this session could not take may need another one
	idle := time.NewTimer(w.idleTime())
	defer idle.Stop()
	over := ctx.Done()
	for {
		ended := false
		select {
		case o := <-w.orders:
			if o.work != nil && !w.session.Alive() {
				// The host closed the idle session; the message was never offered.
				e.queue.Return(o.work)
				e.Notify(o.work.Queue)
				return nil
			}
			return o.work
		case <-idle.C:
			ended = true
		case <-over:
			over, ended = nil, true
		}
		if ended && w.retire() {
			return nil
		}
		// An order is on its way.
	}
}

// retire ends a session that has nothing to do; false: it was given something.
func (w *worker) retire() bool {
	e := w.engine
	e.mu.Lock()
	defer e.mu.Unlock()
	free := e.sched.Idle(w.id)
	if free {
		e.sched.Ended(w.id)
	}
	return free
}

func (w *worker) idleTime() time.Duration {
	if dir := w.engine.cfg.Directory(); dir != nil {
		return dir.Document().Delivery.IdleSession.D()
	}
	return time.Second
}

// dial opens the session. On failure it settles or returns the work and tells
// the scheduler when to try again.
func (w *worker) dial(ctx context.Context, work *queue.Work, hosts []resolve.Host) bool {
	e := w.engine
	started := e.cfg.Now()
	dir := e.cfg.Directory()
	source, ok := w.findSource(dir, work)
	if !ok || len(hosts) == 0 {
		w.abandon(work, started.Add(time.Second))
		e.Changed()
		return false
	}
	w.source = source
	w.place = Place{Lane: w.lane, Source: source, Abort: w.abort}
	w.describe(work)
	if h := w.connect(started); h.Reason != "" {
		w.refused(work, h)
		return false
	}
	mode := policy.TLSOpportunistic
	if p, ok := dir.Providers().Named(w.lane.Provider); ok {
		mode = p.TLS
	}
	dialing, over := e.dialContext(ctx, work.Env, started)
	session, failure := e.cfg.Dialer.Dial(dialing, &delivery.Target{Hosts: hosts, Source: source, TLS: mode, Provider: w.lane.Provider, Subject: subjectOf(work)})
	expired := over() && ctx.Err() == nil
	if failure == nil {
		w.session = session
		e.mu.Lock()
		delete(e.failures, siteKey{w.lane.Source, e.siteOf(work)})
		e.sched.Opened(w.id)
		e.pumpLocked(e.cfg.Now())
		e.mu.Unlock()
		return true
	}
	w.disconnect()
	now := e.cfg.Now()
	if failure.Status == relay.NotTried && !expired {
		until := failure.RetryAt
		if until.IsZero() || ctx.Err() != nil {
			until = now.Add(time.Second)
		}
		w.abandon(work, until)
		return false
	}
	a := &relay.Attempt{
		Message: work.Env.ID, Source: source.ID, SourceIP: source.Bind, Epoch: source.Epoch, Provider: w.lane.Provider,
		MX: failure.MX, RemoteIP: failure.RemoteIP, StartedAt: started, EndedAt: now,
	}
	for i := range work.Recipients {
		a.Outcomes = append(a.Outcomes, failure.Outcome(work.Recipients[i].Index))
	}
	if expired {
		// It was this message that could not wait, so nothing is held against
		// the host.
		late(a.Outcomes, relay.PhaseConnect)
		e.settleAndWait(work, a)
		w.end()
		return false
	}
	e.settleAndWait(work, a)
	e.fail(w, work, failure, now)
	return false
}

// refused ends a session that may not be opened.
func (w *worker) refused(work *queue.Work, h Hold) {
	e := w.engine
	e.mu.Lock()
	delete(e.sessions, w.id)
	e.sched.Ended(w.id)
	e.mu.Unlock()
	w.giveBack(work, h, false)
}

// siteOf names the site of work. e.mu is held.
func (e *Engine) siteOf(work *queue.Work) string {
	if r := e.routes[work.Key.Domain]; r != nil {
		return site(r)
	}
	return ""
}

// fail tells the scheduler that the lane could not reach the site and for how
// long to leave it alone: the policy's back-off, doubling with each failure.
func (e *Engine) fail(w *worker, work *queue.Work, failure *delivery.Failure, now time.Time) {
	base := time.Minute
	if dir := e.cfg.Directory(); dir != nil {
		base = dir.Document().Delivery.HostBackoff.D()
	}
	e.mu.Lock()
	key := siteKey{w.lane.Source, e.siteOf(work)}
	f := e.failures[key]
	f.until = now.Add(backoff(max(base, time.Second), f.count)) // zero must not make a busy loop
	f.count++
	f.why = failure.MX + ": " + replyText(&failure.Reply)
	e.failures[key] = f
	delete(e.sessions, w.id)
	e.sched.Failed(w.id, f.until)
	e.pumpLocked(now)
	e.mu.Unlock()
	e.wake()
}

// maxBackoffDoublings bounds the growth of the back-off of a dead site to 32
// times the policy's value.
const maxBackoffDoublings = 5

func backoff(base time.Duration, failures int) time.Duration {
	return base << min(failures, maxBackoffDoublings)
}

// abandon gives work back that was never offered.
func (w *worker) abandon(work *queue.Work, until time.Time) {
	e := w.engine
	e.queue.Return(work)
	e.mu.Lock()
	delete(e.sessions, w.id)
	e.sched.Failed(w.id, until)
	e.mu.Unlock()
	e.Notify(work.Queue)
	e.wake()
}

func (w *worker) findSource(dir *policy.Directory, work *queue.Work) (policy.Source, bool) {
	if dir == nil {
		return policy.Source{}, false
	}
	for _, s := range dir.LocalSources(work.Key.Pool) {
		if s.ID == w.lane.Source && w.engine.cfg.Egress.Usable(s.ID) {
			return *s.Source, true
		}
	}
	return policy.Source{}, false
}

func (e *Engine) sessionContext() context.Context {
	e.mu.Lock()
	defer e.mu.Unlock()
	return e.sessionCtx
}
