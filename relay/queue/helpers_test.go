package queue

import (
	"context"
	"fmt"
	"log/slog"
	"sync"
	"testing"
	"time"

	"github.com/relais-mta/relais/relay"
	"github.com/relais-mta/relais/relay/outbox"
	"github.com/relais-mta/relais/relay/store"
	"github.com/relais-mta/relais/shared/ids"
	"github.com/relais-mta/relais/shared/mailaddr"
	"github.com/relais-mta/relais/shared/policy"
)

var testStorage = policy.Storage{
	MinFreeBytes: 1 << 20, MinFreeInodes: 10, ReserveBytes: 1 << 20, SegmentBytes: 16 << 20, MaxOutboxBytes: 1 << 30,
}

var testPolicy = policy.Queue{
	Retry:        []policy.Duration{policy.Duration(5 * time.Minute), policy.Duration(10 * time.Minute)},
	RetryMax:     policy.Duration(4 * time.Hour),
	InDoubtRetry: policy.Duration(time.Hour), InDoubtRetries: 1, MaxMemoryRecipients: 100_000,
}

// clock is a wall clock that tests move by hand.
type clock struct {
	mu  sync.Mutex
	now time.Time
}

func newClock() *clock { return &clock{now: time.UnixMilli(1_800_000_000_000).UTC()} }

func (c *clock) Now() time.Time {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.now
}

func (c *clock) Add(d time.Duration) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.now = c.now.Add(d)
}

// tester is what *testing.T, *testing.B and *rapid.T share.
type tester interface {
	Helper()
	Logf(string, ...any)
	Error(...any)
	Errorf(string, ...any)
	Fatal(...any)
	Fatalf(string, ...any)
}

// fixture is a queue over a real store in a temporary directory.
type fixture struct {
	t       tester
	dir     string
	sizes   sizes
	clock   *clock
	policy  policy.Queue
	storage policy.Storage
	fs      store.FileSystem
	trusted func() bool
	told    func(Number) // called at each notification; nil: nobody
	tell    Unconfirmed

	undecided bool

	st *store.Store
	ob *outbox.Outbox
	q  *Queue

	mu      sync.Mutex
	changed chan struct{} // closed and replaced at each notification
}

func newFixture(t testing.TB) *fixture {
	f := newFixtureIn(t, t.TempDir())
	t.Cleanup(f.close)
	return f
}

func newFixtureIn(t tester, dir string) *fixture {
	return &fixture{t: t, dir: dir, sizes: defaultSizes, clock: newClock(), policy: testPolicy, storage: testStorage, changed: make(chan struct{})}
}

func (f *fixture) log() *slog.Logger {
	return slog.New(slog.NewTextHandler(testWriter{f.t}, &slog.HandlerOptions{Level: slog.LevelWarn}))
}

func (f *fixture) open() *fixture {
	f.t.Helper()
	st, err := store.Open(context.Background(), store.Config{Dir: f.dir, Storage: f.storage, Logger: f.log(), MemTableBytes: 8 << 20, FS: f.fs})
	if err != nil {
		f.t.Fatal(err)
	}
	return f.openOn(st)
}

func (f *fixture) openOn(st *store.Store) *fixture {
	f.t.Helper()
	log := f.log()
	f.st = st
	var err error
	if f.ob, err = outbox.Open(f.st, outbox.Config{MaxBytes: f.storage.MaxOutboxBytes, Logger: log}); err != nil {
		f.t.Fatal(err)
	}
	f.q, err = Open(context.Background(), f.st, f.ob, Config{
		Now: f.clock.Now, Policy: f.policy, MaxInbound: 1 << 20, Logger: log, Strict: true, ClockTrusted: f.trusted, Unconfirmed: f.tell, Undecided: f.undecided, sizes: f.sizes,
		Notify: func(n Number) {
			if f.told != nil {
				f.told(n)
			}
			f.mu.Lock()
			close(f.changed)
			f.changed = make(chan struct{})
			f.mu.Unlock()
		},
	})
	if err != nil {
		f.t.Fatal(err)
	}
	return f
}

type testWriter struct{ t tester }

func (w testWriter) Write(p []byte) (int, error) {
	w.t.Logf("%s", p)
	return len(p), nil
}

func (f *fixture) close() {
	if f.q == nil {
		return
	}
	_ = f.q.Close()
	f.ob.Close()
	if err := f.st.Close(); err != nil {
		f.t.Error(err)
	}
	f.q = nil
}

func (f *fixture) reopen() {
	f.t.Helper()
	f.close()
	f.open()
}

// patience bounds the wait for what the disk and other goroutines bring about.
const patience = 2 * time.Minute

// eventually waits for a condition that Notify does not announce, like a number
// of Summary.
func (f *fixture) eventually(what string, ok func() bool) {
	f.t.Helper()
	limit := time.After(patience)
	tick := time.NewTicker(2 * time.Millisecond)
	defer tick.Stop()
	for !ok() {
		select {
		case <-tick.C:
		case <-limit:
			f.t.Fatalf("waited too long for %s", what)
		}
	}
}

// until waits for a condition that notifications announce, and for nothing else:
// a caller of the queue does not look again by itself either.
func (f *fixture) until(what string, ok func() bool) {
	f.t.Helper()
	limit := time.After(patience)
	for {
		f.mu.Lock()
		changed := f.changed
		f.mu.Unlock()
		if ok() {
			return
		}
		select {
		case <-changed:
		case <-limit:
			f.t.Fatalf("waited too long for %s", what)
		}
	}
}

// takeLoaded takes work and reads from disk what memory lacks.
func takeLoaded(q *Queue, n Number, now time.Time, most int) (*Work, bool) {
	w, ok := q.Take(n, now, most)
	if !ok || !q.Load(w) {
		return nil, false
	}
	return w, true
}

// take waits for work of any queue that is due.
func (f *fixture) take(most int) *Work {
	f.t.Helper()
	var w *Work
	f.until("due work", func() bool {
		f.q.Queues(func(info QueueInfo) bool {
			var ok bool
			w, ok = takeLoaded(f.q, info.Number, f.clock.Now(), most)
			return !ok
		})
		return w != nil
	})
	return w
}

// counted waits until Summary knows what was there at the start; nothing announces that.
func (f *fixture) counted() {
	f.t.Helper()
	f.eventually("the count", func() bool { return f.q.Summary().Counted })
}

// loaded waits until the heads of all queues and deadlines are in memory.
func (f *fixture) loaded() {
	f.t.Helper()
	f.until("heads of queues", func() bool {
		f.q.mu.Lock()
		defer f.q.mu.Unlock()
		for _, wq := range f.q.byNumber {
			if wq.wanted {
				return false
			}
		}
		return !f.q.deadlines.wanted
	})
}

func (f *fixture) envelope(to ...string) *relay.Envelope {
	now := f.clock.Now()
	env := &relay.Envelope{
		ID: ids.NewMessage(now), Stream: "default", Kind: policy.Transactional, From: "example.com",
		Sender: mailaddr.Address{Local: "sender", Domain: "example.com"}, AcceptedAt: now, ExpiresAt: now.Add(24 * time.Hour), Revision: 7,
	}
	env.Tenant[15], env.Pool[15] = 1, 2
	for _, a := range to {
		env.Recipients = append(env.Recipients, relay.Recipient{Address: splitAddress(a)})
	}
	return env
}

func (f *fixture) body(text string) *store.Body {
	f.t.Helper()
	b := f.st.NewBody()
	if _, err := b.Write([]byte(text)); err != nil {
		f.t.Fatal(err)
	}
	if err := b.Seal(0, [32]byte{1}); err != nil {
		f.t.Fatal(err)
	}
	return b
}

func (f *fixture) accept(to ...string) *relay.Envelope {
	f.t.Helper()
	env := f.envelope(to...)
	if err := f.q.Accept(context.Background(), env, f.body("Subject: x\r\n\r\nbody of "+env.ID.String())); err != nil {
		f.t.Fatal(err)
	}
	return env
}

func (f *fixture) attempt(w *Work) *relay.Attempt {
	return &relay.Attempt{Message: w.Env.ID, Provider: "google", MX: "mx.example.net", StartedAt: f.clock.Now(), EndedAt: f.clock.Now()}
}

func (f *fixture) begin(w *Work) *relay.Attempt {
	f.t.Helper()
	a := f.attempt(w)
	wait := make(chan error, 1)
	f.q.Begin(w, a, func(err error) { wait <- err })
	if err := <-wait; err != nil {
		f.t.Fatal(err)
	}
	return a
}

func (f *fixture) finishErr(w *Work, a *relay.Attempt, results []Result, extra ...Mail) error {
	wait := make(chan error, 1)
	f.q.Finish(w, a, results, extra, func(err error) { wait <- err })
	return <-wait
}

func (f *fixture) finish(w *Work, a *relay.Attempt, results []Result, extra ...Mail) {
	f.t.Helper()
	if err := f.finishErr(w, a, results, extra...); err != nil {
		f.t.Fatal(err)
	}
}

// all makes one result for every recipient of the work.
func all(w *Work, state relay.State, event outbox.Type, next time.Time) []Result {
	var out []Result
	for _, r := range w.Recipients {
		s := r.State
		s.State, s.Next = state, next
		s.Attempts++
		out = append(out, Result{Index: r.Index, State: s, Event: event, Phase: relay.PhaseFinalDot})
	}
	return out
}

func (f *fixture) delivered(w *Work, a *relay.Attempt) {
	f.t.Helper()
	f.finish(w, a, all(w, relay.StateDelivered, outbox.Delivered, time.Time{}))
}

// empty checks that nothing is left on disk but the table of queues and events.
func (f *fixture) empty() {
	f.t.Helper()
	snap := f.st.Snapshot()
	defer snap.Close()
	for _, space := range []byte{store.SpaceAttempt, store.SpaceMessage, store.SpaceState, store.SpaceWaiting, store.SpaceDeadline} {
		err := snap.Iterate([]byte{space}, nil, true, func(k, _ []byte) bool {
			f.t.Errorf("left on disk: %c %x", k[0], k[1:])
			return true
		})
		if err != nil {
			f.t.Fatal(err)
		}
	}
}

func numbered(format string, n int) []string {
	out := make([]string, n)
	for i := range out {
		out[i] = fmt.Sprintf(format, i)
	}
	return out
}
