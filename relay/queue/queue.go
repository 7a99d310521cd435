// Package queue holds what waits to be delivered: every recipient of every
// accepted message, each with exactly one owner and one next time. It exists
// so that the engine can think in due work while memory stays bounded and the
// disk stays the truth.
//
// A recipient that waits is on disk, under its work queue and due time. The
// head of each work queue is also in memory, in its window; what the window
// does not cover is read from disk, page by page, when the window runs low.
// Work that was taken is owned by the caller until Finish or Return. DESIGN.md
// tells how window and disk are kept from disagreeing.
package queue

import (
	"context"
	"log/slog"
	"net/netip"
	"sync"
	"sync/atomic"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/relais-mta/relais/relay"
	"github.com/relais-mta/relais/relay/outbox"
	"github.com/relais-mta/relais/relay/store"
	"github.com/relais-mta/relais/shared/fault"
	"github.com/relais-mta/relais/shared/ids"
	"github.com/relais-mta/relais/shared/mailaddr"
	"github.com/relais-mta/relais/shared/policy"
)

// Number is the short name of a work queue. It keeps its meaning across
// restarts for as long as the queue holds work.
type Number uint32

// Key says which work waits together. Source and provider are not in it: they
// are found at the moment of delivery.
type Key struct {
	Tenant ids.Tenant
	Stream string
	Pool   ids.Pool
	Domain mailaddr.Domain
	Kind   policy.StreamKind

	Priority policy.Priority
}

// Config gives the queue its clock, its policy and its listeners.
type Config struct {
	Now          func() time.Time             // required
	ClockTrusted func() bool                  // while it returns false nothing expires; nil: always trusted
	Notify       func(Number)                 // called, from any goroutine and holding no lock, when a queue may have got earlier work, and with 0 when the earliest deadline may have changed; must not block; nil: nobody cares
	Dropped      func(Number)                 // called when an empty queue's number ceases to exist; nil: nobody cares
	Provider     func(mailaddr.Domain) string // names the provider of a recipient domain, "" if it is not known; called without a lock held; nil: none is known
	Unconfirmed  Unconfirmed                  // reports on mail that a start ends as unknown; nil: nobody is told
	Undecided    bool                         // nothing ends as unknown: for a queue that nobody delivers from now
	Policy       policy.Queue                 // SetPolicy changes it later
	MaxInbound   int64                        // bytes of inbound mail kept (policy.Inbound.MaxStoredBytes); 0: none
	Logger       *slog.Logger                 // required
	Registerer   prometheus.Registerer        // nil: metrics are not exported
	Strict       bool                         // panic on a broken invariant instead of refusing that work (tests)

	sizes sizes // zero: defaultSizes
}

// WorkRecipient is one recipient of a piece of work.
type WorkRecipient struct {
	Index uint16 // in Env.Recipients
	State relay.RecipientState
}

// Work is a message with those of its recipients that are the caller's now.
// Finish or Return gives each of them back exactly once. Work from Take must be
// loaded before anything but Return is done with it.
type Work struct {
	Queue      Number
	Key        Key
	Env        *relay.Envelope // shared: never change it; nil until loaded
	Recipients []WorkRecipient // their states are right once loaded

	msg       *message
	wq        *workQueue
	held      []heldItem // of Recipients, by position
	state     workState
	journaled bool // an attempt was handed to the journal
}

// Loaded reports whether the work is complete, so that Load will not read from
// disk. It is, for mail that is in memory.
func (w *Work) Loaded() bool { return w.Env != nil }

type heldItem struct {
	due    int64       // of its waiting key
	waits  bool        // it has a waiting key
	stored bool        // it has a stored state
	hold   *relay.Held // it is held, and stands in the index of held recipients
}

type workState uint8

const (
	workTaken workState = iota
	workEnding
	workEnded
)

// Result is what Finish records about one recipient.
type Result struct {
	Index uint16
	State relay.RecipientState // the whole new state; Waiting needs Next
	Event outbox.Type          // event to write; None for none
	Told  outbox.Type          // event about telling the sender, behind Event; None for none
	Phase relay.Phase
	Note  *Note // what the event says of an action that an operator or a rule asked for; nil otherwise
}

// Note is what the events of an action say about it.
type Note struct {
	Actor string // who asked for it
	Class string
	Text  string // stands in the place of the reply; empty: the last reply does
}

// Mail is a message with its sealed body, ready to be accepted.
type Mail struct {
	Env  *relay.Envelope
	Body *store.Body
}

// Inbound is mail that came to one of our signed return paths.
type Inbound struct {
	ID           ids.Message // of the inbound mail itself
	Tenant       ids.Tenant
	Original     ids.Message      // the message that the return path belongs to
	Index        uint16           // of its recipient, if PerRecipient
	PerRecipient bool             // the return path names a recipient
	To           mailaddr.Address // the return path as it was addressed
	Sender       mailaddr.Address // its envelope sender, usually null
	RemoteIP     netip.Addr
	ReceivedAt   time.Time
	Body         relay.BodyRef
}

// message is what is known in memory about a message that has recipients in
// flight, or fresh ones in a window.
type message struct {
	id       ids.Message
	env      *relay.Envelope // nil until it is read
	firstDue int64
	refs     int      // recipients in memory that point here, and readers
	flying   int      // recipients owned by callers
	aloft    []uint16 // which; few at a time
	pending  int      // commits under way that end recipients
	version  uint64   // counts changes of ownership, for readers without the lock
	total    int
	final    []uint64 // recipients that are final and durable, as bits; nil with a single one
	known    bool     // final is complete
	removing bool     // a commit under way removes the message
	gone     bool     // removed

	freshAt      int64 // since when it is in the list of fresh messages
	freshBytes   int64 // what it counts there; 0: it is not in the list
	older, newer *message
}

// workQueue is one work queue in memory.
type workQueue struct {
	number   Number
	key      Key
	win      window
	complete bool // the window holds all that waits
	end      pos  // otherwise: what lies at or behind it is on disk only

	wanted  bool // a page was asked for
	paging  bool // a page is being read, from pageEnd on
	pageEnd pos
	late    []item           // became waiting behind pageEnd since the page's snapshot
	gone    map[pos]struct{} // stopped waiting since then

	stored    bool  // its record is durable
	pins      int   // commits under way that write under its number
	waits     int64 // waiting keys written minus deleted, since start or, once that is counted, ever
	inFlight  int   // recipients owned by callers
	removed   int   // waiting keys deleted since the floor was stored
	floor     int64 // no waiting key has an earlier due time
	blockedTo int64 // after a failed read: nothing is taken before
	aside     int64 // earliest due time of damaged mail, which is in no window; 0: there is none
	emptyAt   int64 // since when it was found empty
}

// Queue is the open queue. Its methods may be called concurrently.
type Queue struct {
	st      *store.Store
	ob      *outbox.Outbox
	cfg     Config
	log     *slog.Logger
	metrics *queueMetrics
	sizes   sizes

	workLimit  int // see takeOpen
	operations operations

	mu         sync.Mutex
	policy     policy.Queue
	maxInbound int64
	byKey      map[Key]*workQueue
	byNumber   map[Number]*workQueue
	nextNumber Number
	deadlines  *workQueue // the deadline index, handled like a work queue
	live       map[ids.Message]*message
	flights    map[*Work]struct{}
	leaving    map[ids.Message]int64 // deadlines that are on disk and in no window, of messages without flight
	inMemory   int                   // items in the windows of work queues
	trimAbove  int                   // windows are cut again when they hold more; 0: when policy says so
	fresh      freshList
	inFlight   int // recipients owned by callers
	inbound    int64
	waiting    int64 // waiting keys written minus deleted since start
	base       int64 // waiting keys at start
	counted    bool
	rules      map[ids.Hold]*activeRule // rules that hold mail, those being undone included
	heldBy     map[ids.Hold]int64       // recipients by the rule that holds them; the zero rule: by hand

	active   atomic.Pointer[ruleSet] // what matches; nil: no rule
	ruleWake chan struct{}

	transfers transfers // from and to other relays
	damaged   damageBook

	ruleChange sync.Mutex // one change of a rule's record at a time; taken before mu

	pageWake    chan struct{}
	pageList    []*workQueue
	urgentPages []*workQueue // of transactional mail and deadlines: read before pageList
	stop        chan struct{}
	done        sync.WaitGroup
	pending     sync.WaitGroup // commits under way
	closed      bool
	overdue     atomic.Bool // a message came back after its deadline: notify has to tell
	checking    atomic.Bool // FsckOnline is under way
	broken      atomic.Bool // a panic left the lock held
}

// SetPolicy changes schedule and bounds while the queue runs.
func (q *Queue) SetPolicy(p policy.Queue, maxInbound int64) {
	q.mu.Lock()
	defer q.mu.Unlock()
	q.policy, q.maxInbound = p, maxInbound
	q.trim()
}

// Close refuses new mail, waits for the commits under way and stops reading.
// Work still in flight is found again at the next start.
func (q *Queue) Close() error {
	if q.broken.Load() {
		return nil
	}
	q.mu.Lock()
	if q.closed {
		q.mu.Unlock()
		return nil
	}
	q.closed = true
	q.mu.Unlock()
	close(q.stop)
	q.done.Wait()
	q.pending.Wait()
	return nil
}

var errClosing = fault.New(fault.Unavailable, "queue", "the relay is shutting down")

// begin counts a commit under way, unless the queue is closing. Call with the
// lock held.
func (q *Queue) begin() error {
	if q.closed {
		return errClosing
	}
	q.pending.Add(1)
	return nil
}

func (q *Queue) nowMS() int64 { return store.Milliseconds(q.cfg.Now()) }

// notify tells the listener about queues that changed. Call without the lock.
func (q *Queue) notify(numbers ...Number) {
	if q.cfg.Notify == nil {
		return
	}
	for _, n := range numbers {
		q.cfg.Notify(n)
	}
	if q.overdue.Load() && q.overdue.CompareAndSwap(true, false) {
		q.cfg.Notify(0)
	}
}

// violation reports a broken invariant: work that has no owner or two.
func (q *Queue) violation(text string, args ...any) error {
	q.metrics.violations.Inc()
	q.log.Error("queue invariant broken: "+text, args...)
	if q.cfg.Strict {
		q.broken.Store(true)
		panic("queue invariant broken: " + text)
	}
	return fault.New(fault.Internal, "queue", "%s", text)
}

// messageFor returns the message in memory, making it if needed, with one more
// reference. Call with the lock held.
func (q *Queue) messageFor(id ids.Message) *message {
	m := q.live[id]
	if m != nil && m.gone {
		// Somebody still looks at what is gone from disk, and it came anew:
		// another relay had it and handed it back.
		q.fresh.remove(m)
		m = nil
	}
	if m == nil {
		m = &message{id: id}
		q.live[id] = m
	}
	m.refs++
	return m
}

// unref gives references back. Call with the lock held.
func (q *Queue) unref(m *message, n int) {
	m.refs -= n
	if m.refs <= 0 && m.pending == 0 && !m.removing && q.live[m.id] == m {
		delete(q.live, m.id)
		q.fresh.remove(m)
	}
}

func (m *message) isFinal(index uint16) bool {
	return m.final != nil && m.final[index/64]&(1<<(index%64)) != 0
}

func (m *message) setFinal(index uint16) {
	if m.total == 1 {
		return
	}
	if m.final == nil {
		m.final = make([]uint64, (m.total+63)/64)
	}
	m.final[index/64] |= 1 << (index % 64)
}

// setEnvelope fills in what was read or accepted.
func (m *message) setEnvelope(env *relay.Envelope, firstDue int64) {
	m.env, m.firstDue, m.total = env, firstDue, len(env.Recipients)
}

// keyOf is the work queue of one recipient.
func keyOf(env *relay.Envelope, index int) Key {
	return Key{Tenant: env.Tenant, Stream: env.Stream, Pool: env.Pool, Domain: env.Recipients[index].Address.Domain, Kind: env.Kind, Priority: env.Priority}
}

// Open reads the table of work queues, resolves the attempts that a crash cut
// short, and begins to load the heads of the queues; Notify tells about each.
func Open(ctx context.Context, st *store.Store, ob *outbox.Outbox, cfg Config) (*Queue, error) {
	if cfg.Now == nil || cfg.Logger == nil {
		return nil, fault.New(fault.Internal, "queue.Open", "Now and Logger are required")
	}
	q := &Queue{
		st: st, ob: ob, cfg: cfg, log: cfg.Logger, metrics: newMetrics(), sizes: cfg.sizes, workLimit: workLimit(st),
		policy: cfg.Policy, maxInbound: cfg.MaxInbound,
		byKey: make(map[Key]*workQueue), byNumber: make(map[Number]*workQueue), nextNumber: 1,
		deadlines: &workQueue{}, live: make(map[ids.Message]*message), flights: make(map[*Work]struct{}), leaving: make(map[ids.Message]int64),
		rules: make(map[ids.Hold]*activeRule), heldBy: make(map[ids.Hold]int64), ruleWake: make(chan struct{}, 1),
		pageWake: make(chan struct{}, 1), stop: make(chan struct{}),
	}
	if q.sizes == (sizes{}) {
		q.sizes = defaultSizes
	}
	snap := st.Snapshot()
	err := q.loadTable(snap)
	if err == nil {
		err = q.loadInbound(snap)
	}
	if err == nil {
		err = q.loadRules(snap)
	}
	snap.Close()
	if err == nil {
		err = q.recover(ctx)
	}
	if err == nil {
		err = q.resumeTransfers()
	}
	if err == nil && cfg.Registerer != nil {
		err = q.register(cfg.Registerer)
	}
	if err != nil {
		return nil, err
	}
	q.mu.Lock()
	for _, wq := range q.byNumber {
		q.wantPage(wq)
	}
	q.wantPage(q.deadlines)
	count := q.beginCount()
	q.mu.Unlock()
	q.done.Add(3)
	go q.pageLoop()
	go q.ruleLoop()
	go q.countWaiting(count)
	return q, nil
}
