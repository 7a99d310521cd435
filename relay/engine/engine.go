// Package engine makes the scheduler's decisions happen. It owns every
// goroutine that works on outgoing mail: one loop that feeds the scheduler and
// carries out its effects, one goroutine per SMTP session, and a bounded number
// of look-ups. Nothing in it decides what a limit means or what a reply means;
// those decisions are pure and live in schedule and verdict.
package engine

import (
	"context"
	"log/slog"
	"math/rand/v2"
	"sync"
	"sync/atomic"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/relais-mta/relais/relay/delivery"
	"github.com/relais-mta/relais/relay/egress"
	"github.com/relais-mta/relais/relay/outbox"
	"github.com/relais-mta/relais/relay/queue"
	"github.com/relais-mta/relais/relay/resolve"
	"github.com/relais-mta/relais/relay/schedule"
	"github.com/relais-mta/relais/relay/sign"
	"github.com/relais-mta/relais/relay/store"
	"github.com/relais-mta/relais/shared/fault"
	"github.com/relais-mta/relais/shared/ids"
	"github.com/relais-mta/relais/shared/mailaddr"
	"github.com/relais-mta/relais/shared/policy"
)

// Bounds of the engine's own memory and work.
const (
	sweepInterval       = 10 * time.Minute
	maxIdleWait         = time.Minute // the loop looks around at least this often
	maxExpirePerRound   = 256         // messages ended in one go
	maxExpireUnderWay   = 1024        // messages whose end at their deadline is not stored yet
	maxRefusePerRound   = 256         // messages refused in one go
	minDeadlineInterval = 100 * time.Millisecond
	defaultRecipients   = 100 // per transaction, when the profile sets no limit (RFC 5321 section 4.5.3.1.8)
)

// Config is what the engine works with.
type Config struct {
	Store        *store.Store
	Directory    func() *policy.Directory // the view in force; nil before the first
	Resolver     *resolve.Resolver
	Egress       *egress.Manager
	Dialer       *delivery.Dialer
	Admit        []Admitter     // asked before work starts, the smallest scope first
	Outbox       *outbox.Outbox // takes the alerts about sending domains; nil: they are logged and shown only
	Hostname     string         // Reporting-MTA of our DSNs
	Now          func() time.Time
	ClockTrusted func() bool // while it returns false nothing expires
	Seed         uint64      // of the shuffle of equal MX preferences; 0: random
	Logger       *slog.Logger
	Registerer   prometheus.Registerer
}

// Engine delivers what waits in the queue.
type Engine struct {
	cfg     Config
	queue   *queue.Queue
	signers sign.Cache
	metrics *metrics
	limiter noticeLimiter
	checks  *selfCheck
	log     *slog.Logger

	notify  notifier
	kick    chan struct{} // something for the loop, capacity 1
	overdue chan struct{} // the earliest deadline may have changed, capacity 1

	pinnedWork atomic.Int64 // pieces in pinned; changed under mu

	workers sync.WaitGroup
	lookups sync.WaitGroup

	mu         sync.Mutex // guards all below
	sched      *schedule.Scheduler
	sessions   map[schedule.Session]*worker
	leaving    []policy.LeavingSource // of this relay, by the view in force
	routes     map[mailaddr.Domain]*resolve.Route
	pinned     map[schedule.Queue]*pinnedQueue
	pinnedBy   map[pinnedKey]schedule.Queue
	lastPin    schedule.Queue
	failures   map[siteKey]siteFailure
	refusing   map[schedule.Queue]bool // a goroutine is at it
	rng        *rand.Rand
	draining   bool
	stopped    bool
	sessionCtx context.Context
}

// siteFailure is why a site could not be reached last, for the reports of mail
// that expires without an attempt of its own.
type siteFailure struct {
	count int
	until time.Time
	why   string // words of the host, or ours about the connection
}

type siteKey struct {
	source ids.Source
	site   string
}

// New returns an engine; Attach gives it the queue, Run starts it.
func New(cfg Config) (*Engine, error) {
	if cfg.Store == nil || cfg.Directory == nil || cfg.Resolver == nil || cfg.Egress == nil || cfg.Dialer == nil || cfg.Now == nil || cfg.Logger == nil {
		return nil, fault.New(fault.Internal, "engine.New", "store, directory, resolver, egress, dialer, clock and logger are needed")
	}
	seed := cfg.Seed
	if seed == 0 {
		seed = rand.Uint64()
	}
	e := &Engine{
		cfg:      cfg,
		log:      cfg.Logger,
		kick:     make(chan struct{}, 1),
		overdue:  make(chan struct{}, 1),
		sched:    schedule.New(schedule.Limits{}),
		sessions: make(map[schedule.Session]*worker),
		routes:   make(map[mailaddr.Domain]*resolve.Route),
		pinned:   make(map[schedule.Queue]*pinnedQueue),
		pinnedBy: make(map[pinnedKey]schedule.Queue),
		failures: make(map[siteKey]siteFailure),
		refusing: make(map[schedule.Queue]bool),
		rng:      rand.New(rand.NewPCG(seed, 1)),
	}
	e.checks = newSelfCheck(e)
	if err := e.checks.register(cfg.Registerer); err != nil {
		return nil, err
	}
	var err error
	e.metrics, err = newMetrics(cfg.Registerer, e)
	return e, err
}

// Notify tells that a queue may have earlier work; it never blocks, so it can
// be the queue's callback before the queue itself is attached.
func (e *Engine) Notify(n queue.Number) {
	if n == 0 {
		e.lookAtDeadlines()
		return
	}
	if e.notify.add(n) {
		e.wake()
	}
}

// Changed tells that the view or the presence of sources changed.
func (e *Engine) Changed() {
	e.notify.changed.Store(true)
	e.wake()
	e.lookAtDeadlines() // the clock may be trusted again
}

func (e *Engine) wake() {
	select {
	case e.kick <- struct{}{}:
	default:
	}
}

// Attach gives the engine its queue. It must be called before Run.
func (e *Engine) Attach(q *queue.Queue) { e.queue = q }

// Run delivers until ctx ends, then lets sessions finish the message in hand
// for at most grace, and returns.
func (e *Engine) Run(ctx context.Context, grace time.Duration) {
	sessionCtx, cancel := context.WithCancel(context.WithoutCancel(ctx))
	defer cancel()
	e.mu.Lock()
	e.sessionCtx = sessionCtx
	e.mu.Unlock()
	e.queue.Queues(func(info queue.QueueInfo) bool {
		e.notify.add(info.Number)
		return true
	})
	e.Changed()
	e.lookups.Go(func() { e.checks.run(ctx) })
	expiring := make(chan struct{})
	go func() {
		defer close(expiring)
		e.expireLoop(ctx)
	}()
	e.loop(ctx)
	<-expiring
	e.drain(cancel, grace)
}

func (e *Engine) loop(ctx context.Context) {
	timer := time.NewTimer(0)
	defer timer.Stop()
	sweep := e.cfg.Now().Add(sweepInterval)
	for {
		select {
		case <-ctx.Done():
			return
		case <-e.kick:
		case <-timer.C:
		}
		now := e.cfg.Now()
		if e.notify.changed.CompareAndSwap(true, false) {
			e.applyView(now)
		}
		e.absorb(now)
		if now.After(sweep) {
			e.sweep(now)
			sweep = now.Add(sweepInterval)
		}
		wake := e.pump(now)
		timer.Reset(idle(wake, now))
	}
}

// idle returns how long the loop may sleep.
func idle(wake, now time.Time) time.Duration {
	if wake.IsZero() {
		return maxIdleWait
	}
	return min(maxIdleWait, max(0, wake.Sub(now)))
}

// absorb hands what the queue announced to the scheduler.
func (e *Engine) absorb(now time.Time) {
	numbers := e.notify.take()
	if len(numbers) == 0 {
		return
	}
	e.mu.Lock()
	defer e.mu.Unlock()
	for _, n := range numbers {
		e.setHead(n, now)
	}
}

// setHead reports the state of a queue to the scheduler. e.mu is held.
func (e *Engine) setHead(n queue.Number, now time.Time) {
	h, _ := e.queue.Head(n)
	e.sched.SetHead(schedule.Queue(n), scheduleKey(&h.Key), h.Due, h.Waiting, now)
}

// pump carries out what the scheduler wants now and returns its next wake time.
func (e *Engine) pump(now time.Time) time.Time {
	e.mu.Lock()
	defer e.mu.Unlock()
	return e.pumpLocked(now)
}

func (e *Engine) pumpLocked(now time.Time) time.Time {
	if e.draining || e.stopped {
		return time.Time{}
	}
	for range maxPumpRounds {
		effects := e.sched.Next(now)
		if len(effects) == 0 {
			break
		}
		for _, f := range effects {
			e.act(f, now)
		}
	}
	return e.sched.Wake()
}

// maxPumpRounds bounds one pump: effects that found an empty queue make the
// scheduler think again, which must not hold the lock for long.
const maxPumpRounds = 8

func (e *Engine) act(f schedule.Effect, now time.Time) {
	switch f.Kind {
	case schedule.Resolve:
		e.lookups.Add(1)
		go e.lookup(f.Domain)
	case schedule.Refuse:
		if !e.refusing[f.Queue] {
			e.refusing[f.Queue] = true
			e.lookups.Add(1)
			go e.refuse(f.Queue)
		}
	case schedule.Open:
		e.open(f, now)
	case schedule.Dispatch:
		e.dispatch(f, now)
	case schedule.Close:
		if w := e.sessions[f.Session]; w != nil {
			w.order(order{})
		}
	}
}

// take gets the next work of a queue, which may still have to be loaded, and
// tells the scheduler what is left. e.mu is held.
func (e *Engine) take(n schedule.Queue, lane schedule.Lane, now time.Time) *queue.Work {
	for range maxHeldPerTake {
		w := e.takeNext(n, lane, now)
		if w == nil || !w.Loaded() || !e.held(w, lane) {
			return w
		}
	}
	return nil // the head was reported: the scheduler asks again
}

// takeNext is take without regard to the rules that hold mail.
func (e *Engine) takeNext(n schedule.Queue, lane schedule.Lane, now time.Time) *queue.Work {
	if p := e.pinned[n]; p != nil {
		return e.takePinned(n, p, now)
	}
	key, ok := e.queue.Key(queue.Number(n))
	if !ok {
		e.setHead(queue.Number(n), now)
		return nil
	}
	w, ok := e.queue.Take(queue.Number(n), now, e.recipientLimit(lane.Provider, &key))
	e.setHead(queue.Number(n), now)
	if !ok {
		return nil
	}
	return w
}

// recipientLimit is how many recipients one transaction may have.
func (e *Engine) recipientLimit(provider string, key *queue.Key) int {
	dir := e.cfg.Directory()
	if dir == nil || singleRecipient(dir, key.Stream, key.Kind) {
		return 1
	}
	if p, ok := dir.Providers().Named(provider); ok && p.RecipientsPerTransaction() > 0 {
		return min(p.RecipientsPerTransaction(), delivery.MaxRecipients)
	}
	return defaultRecipients
}

func (e *Engine) sweep(now time.Time) {
	e.mu.Lock()
	defer e.mu.Unlock()
	e.sched.Sweep(now)
	for domain, r := range e.routes {
		if now.Sub(r.Expires) > sweepInterval {
			delete(e.routes, domain)
		}
	}
	for key, f := range e.failures {
		if now.Sub(f.until) > sweepInterval {
			delete(e.failures, key)
		}
	}
}

// drain ends the sessions: idle ones at once, busy ones after their message or
// when grace is over.
func (e *Engine) drain(cancel context.CancelFunc, grace time.Duration) {
	e.mu.Lock()
	e.draining = true
	for _, w := range e.sessions {
		w.order(order{})
	}
	e.mu.Unlock()
	done := make(chan struct{})
	go func() {
		e.workers.Wait()
		close(done)
	}()
	timer := time.NewTimer(grace)
	defer timer.Stop()
	select {
	case <-done:
	case <-timer.C:
		cancel()
		<-done
	}
	cancel()
	e.lookups.Wait()
	e.mu.Lock()
	e.stopped = true
	e.mu.Unlock()
}
