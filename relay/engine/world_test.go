package engine

import (
	"context"
	"fmt"
	"log/slog"
	"net/netip"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"google.golang.org/protobuf/proto"

	"github.com/relais-mta/relais/relay"
	"github.com/relais-mta/relais/relay/delivery"
	"github.com/relais-mta/relais/relay/egress"
	"github.com/relais-mta/relais/relay/outbox"
	"github.com/relais-mta/relais/relay/queue"
	"github.com/relais-mta/relais/relay/resolve"
	"github.com/relais-mta/relais/relay/store"
	"github.com/relais-mta/relais/relay/tlspolicy"
	"github.com/relais-mta/relais/shared/fault"
	"github.com/relais-mta/relais/shared/ids"
	"github.com/relais-mta/relais/shared/lab"
	"github.com/relais-mta/relais/shared/lease"
	"github.com/relais-mta/relais/shared/mailaddr"
	"github.com/relais-mta/relais/shared/policy"
)

var (
	here   = ids.Node{15: 1}
	acme   = ids.Tenant{15: 2}
	pool   = ids.Pool{15: 3}
	first  = policy.Source{ID: ids.Source{15: 1}, Bind: netip.MustParseAddr("127.0.0.21"), Public: netip.MustParseAddr("127.0.0.21"), EHLO: "mx1.brand.test", Pool: pool, Owner: here, Epoch: 1}
	second = policy.Source{ID: ids.Source{15: 2}, Bind: netip.MustParseAddr("127.0.0.22"), Public: netip.MustParseAddr("127.0.0.22"), EHLO: "mx2.brand.test", Pool: pool, Owner: here, Epoch: 1}
)

// world is an engine with everything below it real, and the lab as the rest of
// the internet.
type world struct {
	t       *testing.T
	dir     string
	lab     *lab.Lab
	policy  atomic.Pointer[policy.Directory]
	leaving []policy.LeavingSource // in views made from now on
	trusted atomic.Bool
	skew    atomic.Int64 // nanoseconds by which the relay's clock is ahead
	leases  *egress.Leases
	egress  *egress.Manager
	fs      store.FileSystem // nil: the operating system's
	store   *store.Store
	outbox  *outbox.Outbox
	queue   *queue.Queue
	engine  *Engine
	metrics *prometheus.Registry
	admit   []Admitter
	stop    func() // nil: not running
}

// newWorld starts a lab and an engine; tune changes how the lab's providers behave.
func newWorld(t *testing.T, tune func(*lab.Profile), sources ...policy.Source) *world {
	t.Helper()
	return newWorldOf(t, func(c *lab.Config) { c.Tune = tune }, sources...)
}

// newWorldOf starts a lab made as change says, and an engine.
func newWorldOf(t *testing.T, change func(*lab.Config), sources ...policy.Source) *world {
	t.Helper()
	t.Parallel() // each has its own lab, and mostly waits
	w := &world{t: t, dir: t.TempDir()}
	w.trusted.Store(true)
	var err error
	cfg := lab.Config{
		Seed: 1, Mode: lab.Open, Dir: t.TempDir(), SkipDKIM: true, SlowDelay: 200 * time.Millisecond, Logger: slog.New(slog.DiscardHandler),
	}
	change(&cfg)
	w.lab, err = lab.Start(t.Context(), cfg)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := w.lab.Close(); err != nil {
			t.Error(err)
		}
	})
	w.view(nil, sources...)
	w.open()
	t.Cleanup(w.close)
	w.run(time.Second)
	return w
}

// view makes a policy view with the sources the one in force.
func (w *world) view(change func(*policy.Document), sources ...policy.Source) {
	w.t.Helper()
	doc, err := policy.Parse(nil)
	if err != nil {
		w.t.Fatal(err)
	}
	doc.Queue.Retry = []policy.Duration{policy.Duration(time.Second)}
	doc.Queue.GreylistRetry = policy.Duration(time.Second)
	doc.Queue.InDoubtRetry = policy.Duration(time.Second)
	doc.Delivery.HostBackoff = policy.Duration(time.Second)
	doc.Delivery.SignDKIM = false
	if change != nil {
		change(&doc)
	}
	dir, err := policy.Compile(&policy.View{
		Leaving: w.leaving,
		Node:    here, Revision: 7, Document: doc,
		Tenants:        []policy.Tenant{{ID: acme, Name: "acme"}},
		Domains:        []policy.Domain{{Name: "brand.test", Tenant: acme, ReturnPath: "rp.brand.test"}},
		Pools:          []policy.Pool{{ID: pool, Name: "default", Kind: policy.PoolShared}},
		Sources:        sources,
		ReturnPathKeys: []policy.ReturnPathKey{{ID: 1, Key: [32]byte{1}}},
	})
	if err != nil {
		w.t.Fatal(err)
	}
	w.policy.Store(dir)
	if w.engine != nil {
		w.egress.SetSources(dir.Sources())
		w.engine.Changed()
	}
}

// open opens the queue on disk and runs an engine over it.
func (w *world) open() {
	w.t.Helper()
	log := slog.New(slog.DiscardHandler)
	dir, reg := w.policy.Load(), prometheus.NewRegistry()
	w.metrics = reg
	delivering := func() *policy.Delivery { return &w.policy.Load().Document().Delivery }
	var err error
	check := func() {
		w.t.Helper()
		if err != nil {
			w.t.Fatal(err)
		}
	}
	storage := policy.Storage{MinFreeBytes: 1 << 20, MinFreeInodes: 10, ReserveBytes: 1 << 20, SegmentBytes: 16 << 20, MaxOutboxBytes: 1 << 30}
	w.store, err = store.Open(context.Background(), store.Config{Dir: w.dir, Storage: storage, Logger: log, MemTableBytes: 8 << 20, FS: w.fs})
	check()
	w.outbox, err = outbox.Open(w.store, outbox.Config{MaxBytes: storage.MaxOutboxBytes, Logger: log})
	check()
	w.leases, err = egress.NewLeases(egress.LeaseConfig{Node: here, Incarnation: 1, Send: func(proto.Message) error { return nil }, Clock: func() lease.Instant { return 1 }, Changed: func() {}, Log: log, Registerer: reg})
	check()
	w.egress, err = egress.New(egress.Config{Node: here, Leases: w.leases, Log: log, Registerer: reg})
	check()
	w.leases.SetView(dir.Sources(), nil)
	w.egress.SetSources(dir.Sources())
	resolver, err := resolve.New(resolve.Config{Servers: []netip.AddrPort{w.lab.DNSAddr()}, Policy: delivering, AllowPrivate: true, Log: log, Registerer: reg})
	check()
	dialer, err := delivery.New(delivery.Config{Egress: w.egress, Broken: tlspolicy.NewMemory(), Port: w.lab.SMTPPort(), Policy: delivering, Log: log, Registerer: reg})
	check()
	w.engine, err = New(Config{
		Store: w.store, Directory: w.policy.Load, Resolver: resolver, Egress: w.egress, Dialer: dialer, Admit: w.admit, Hostname: "relay.brand.test",
		Now: w.now, Outbox: w.outbox, ClockTrusted: w.trusted.Load, Seed: 1, Logger: log, Registerer: reg,
	})
	check()
	w.queue, err = queue.Open(context.Background(), w.store, w.outbox, queue.Config{
		Now: w.now, ClockTrusted: w.trusted.Load, Notify: w.engine.Notify, Policy: dir.Document().Queue, Logger: log, Strict: true,
	})
	check()
	w.engine.Attach(w.queue)
}

// now is the relay's clock.
func (w *world) now() time.Time { return time.Now().Add(time.Duration(w.skew.Load())) }

// run starts the engine; sessions get grace to finish when it is stopped.
func (w *world) run(grace time.Duration) {
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan struct{})
	go func() {
		defer close(done)
		w.engine.Run(ctx, grace)
	}()
	w.stop = func() {
		cancel()
		<-done
		w.stop = nil
	}
}

// close ends engine, queue and store.
func (w *world) close() {
	if w.stop != nil {
		w.stop()
	}
	if w.queue == nil {
		return
	}
	if err := w.queue.Close(); err != nil {
		w.t.Error(err)
	}
	w.outbox.Close()
	if err := w.store.Close(); err != nil {
		w.t.Error(err)
	}
	w.queue = nil
}

// restart closes everything and runs it again from the disk.
func (w *world) restart(grace time.Duration) {
	w.t.Helper()
	w.close()
	w.open()
	w.run(grace)
}

// holdAt makes a provider wait before it answers at a phase; what is returned
// waits until a session got there.
func (w *world) holdAt(provider string, phase lab.Phase, delay time.Duration) (reached func()) {
	w.t.Helper()
	there := w.held(provider, phase, delay)
	return func() {
		w.t.Helper()
		select {
		case <-there:
		case <-time.After(patience):
			w.t.Fatal("in vain: a session at the held phase")
		}
	}
}

// held makes a provider wait before it answers at a phase; the channel closes when
// a session got there.
func (w *world) held(provider string, phase lab.Phase, delay time.Duration) <-chan struct{} {
	w.t.Helper()
	there := make(chan struct{})
	var once sync.Once
	err := w.lab.SetBehaviour(provider, lab.Behaviour{Answer: func(e lab.Event) lab.Answer {
		if e.Phase != phase {
			return lab.Answer{}
		}
		once.Do(func() { close(there) })
		return lab.Answer{Delay: delay}
	}})
	if err != nil {
		w.t.Fatal(err)
	}
	return there
}

// at returns the i-th address of a provider that gets an outcome.
func (w *world) at(provider string, i int, o lab.Outcome) string {
	w.t.Helper()
	to, err := w.lab.Recipient(provider, i, o)
	if err != nil {
		w.t.Fatal(err)
	}
	return to
}

// accept stores a message; change may alter its envelope before.
func (w *world) accept(change func(*relay.Envelope), to ...string) *relay.Envelope {
	w.t.Helper()
	now := w.now()
	env := &relay.Envelope{
		ID: ids.NewMessage(now), Tenant: acme, Stream: "default", Kind: policy.Transactional, Pool: pool, From: "brand.test",
		Sender: mailaddr.Address{Local: "me", Domain: "brand.test"}, AcceptedAt: now, ExpiresAt: now.Add(time.Hour), Revision: 7,
	}
	for _, a := range to {
		address, err := mailaddr.Parse(a)
		if err != nil {
			w.t.Fatal(err)
		}
		env.Recipients = append(env.Recipients, relay.Recipient{Address: address})
	}
	if change != nil {
		change(env)
	}
	text := fmt.Sprintf("From: me@brand.test\r\nMessage-ID: <%s@brand.test>\r\n\r\nHello\r\n", env.ID)
	body, err := seal(w.store, []byte(text))
	if err != nil {
		w.t.Fatal(err)
	}
	if err := w.queue.Accept(context.Background(), env, body); err != nil {
		w.t.Fatal(err)
	}
	return env
}

// patience bounds the wait for a condition. What it waits for takes a few seconds
// at the most on an idle machine; on one that stands still meanwhile a site may be
// left alone for 32 s, the longest back-off from the second that view names.
const patience = 2 * time.Minute

// until waits for a condition.
func (w *world) until(what string, ok func() bool) {
	w.t.Helper()
	tick := time.NewTicker(5 * time.Millisecond)
	defer tick.Stop()
	end := time.After(patience)
	for !ok() {
		select {
		case <-tick.C:
		case <-end:
			w.t.Fatalf("in vain: %s", what)
		}
	}
}

// event waits for an event about a message.
func (w *world) event(env *relay.Envelope, kind outbox.Type) outbox.Event {
	w.t.Helper()
	var found outbox.Event
	w.until(fmt.Sprintf("event %v of %s", kind, env.ID), func() bool {
		for _, e := range w.events() {
			if e.Message == env.ID && e.Type == kind {
				found = e
				return true
			}
		}
		return false
	})
	return found
}

func (w *world) events() []outbox.Event {
	w.t.Helper()
	all, err := w.outbox.Read(0, 8<<20)
	if err != nil {
		w.t.Fatal(err)
	}
	return all
}

// gone waits until a message is out of the queue.
func (w *world) gone(env *relay.Envelope) {
	w.t.Helper()
	w.until("the end of "+env.ID.String(), func() bool {
		_, err := w.queue.Show(env.ID)
		return fault.Is(err, fault.NotFound)
	})
}

func (w *world) empty() bool {
	s := w.queue.Summary()
	return s.Waiting == 0 && s.InFlight == 0
}

// arrived returns the mails a provider accepted.
func (w *world) arrived(provider string) []lab.Mail {
	w.t.Helper()
	var all []lab.Mail
	for m, err := range w.lab.Mails(provider) {
		if err != nil {
			w.t.Fatal(err)
		}
		all = append(all, m)
	}
	return all
}
