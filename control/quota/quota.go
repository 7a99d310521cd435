// Package quota is control's end of what relays share: the leader's loops that
// lend limits out and keep ledgers, and the way of messages between them and the
// relays. It exists because a relay may be linked to any server while one server
// alone, the leader, decides.
//
// Messages are datagrams: each hop has a bound, keeps the newest and drops the
// oldest, and nothing is sent twice by itself. The protocols above bear loss,
// delay and disorder.
package quota

import (
	"context"
	"fmt"
	"log/slog"
	"sync"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"google.golang.org/protobuf/proto"

	"github.com/relais-mta/relais/shared/fault"
	"github.com/relais-mta/relais/shared/ids"
	"github.com/relais-mta/relais/shared/lease"
	"github.com/relais-mta/relais/shared/wire"
)

const (
	maxInbox      = 4096 // messages that wait for one part
	maxRoutes     = 10_000
	restartPause  = 250 * time.Millisecond // before a part that failed leads again
	leadershipGap = 50 * time.Millisecond  // between two looks whether this server still leads
)

// Cluster is what quota needs of the raft cluster.
type Cluster interface {
	// Term returns the term in which this server leads and is up to date.
	Term() (term uint64, leads bool)
	// WaitReady waits until this server leads and is up to date.
	WaitReady(ctx context.Context) error
	// AskLeader asks the leader, which is another server.
	AskLeader(ctx context.Context, what string, in, out any) error
}

// Options configure a Quota. All but Clock are required.
type Options struct {
	Self       ids.Node
	Cluster    Cluster
	Deliver    func(ids.Node, *wire.QuotaDown) bool // hands a message to a relay linked here; false: it is not
	Logger     *slog.Logger
	Registerer prometheus.Registerer
	Clock      func() lease.Instant // nil: Now
}

// Message is something that a relay said.
type Message struct {
	Node    ids.Node
	Through ids.Node // the server that the relay is linked to
	Body    proto.Message
	At      lease.Instant // when this server, the leader, received it
}

// Part is what the leader does about one subject.
type Part interface {
	// Takes reports whether a message of a relay is for the part.
	Takes(proto.Message) bool
	// Lead does the leader's work: this server leads and has applied everything
	// that was committed before. It returns when ctx ends, which is when this
	// server leads no more, or with an error, after which it is called again
	// while this server leads.
	Lead(ctx context.Context, in <-chan Message) error
}

// Quota moves messages between relays and the leader, and runs the parts while
// this server leads. Use New, Add, Run.
type Quota struct {
	o       Options
	parts   []*part
	metrics *metrics
	up      *outbox

	mu     sync.Mutex
	routes map[ids.Node]ids.Node  // relay → the server that it spoke through last
	down   map[ids.Node]*outbox   // by server
	polled map[ids.Node]time.Time // when a server asked last
}

type part struct {
	Part
	name string
	in   chan Message
}

type metrics struct {
	received *prometheus.CounterVec
	dropped  *prometheus.CounterVec
}

// New returns a Quota without parts.
func New(o Options) (*Quota, error) {
	if o.Clock == nil {
		o.Clock = Now
	}
	q := &Quota{
		o: o, up: newOutbox(), routes: make(map[ids.Node]ids.Node), down: make(map[ids.Node]*outbox), polled: make(map[ids.Node]time.Time),
		metrics: &metrics{
			received: prometheus.NewCounterVec(prometheus.CounterOpts{Name: "relais_control_quota_messages_total", Help: "Messages of relays about what they share that this server, as the leader, received, by part."}, []string{"part"}),
			dropped:  prometheus.NewCounterVec(prometheus.CounterOpts{Name: "relais_control_quota_dropped_total", Help: "Messages about what relays share that were dropped, by place: inbox (the leader was busy), up and down (between servers), link (the relay is not linked), unknown (a damaged or unknown message)."}, []string{"place"}),
		},
	}
	for _, c := range []prometheus.Collector{q.metrics.received, q.metrics.dropped} {
		if err := o.Registerer.Register(c); err != nil {
			return nil, fault.Wrap(err, fault.Internal, "quota.New", "cannot register metrics")
		}
	}
	return q, nil
}

// Add adds a part, before Run.
func (q *Quota) Add(name string, p Part) {
	q.parts = append(q.parts, &part{Part: p, name: name, in: make(chan Message, maxInbox)})
}

// Up takes what a relay linked to this server said. It does not block.
func (q *Quota) Up(node ids.Node, up *wire.QuotaUp) {
	if len(up.GetBody()) > wire.MaxQuotaBytes {
		q.metrics.dropped.WithLabelValues("unknown").Inc()
		return
	}
	if _, leads := q.o.Cluster.Term(); leads {
		q.receive(q.o.Self, node, up)
		return
	}
	q.dropped("up", q.up.put(item{Node: node, Kind: up.GetKind(), Body: up.GetBody()}))
}

// receive takes a message as the leader, through the server that the relay is
// linked to.
func (q *Quota) receive(through, node ids.Node, up *wire.QuotaUp) {
	body, err := up.Message()
	if err != nil || body == nil {
		q.metrics.dropped.WithLabelValues("unknown").Inc()
		return
	}
	q.mu.Lock()
	if _, known := q.routes[node]; known || len(q.routes) < maxRoutes {
		q.routes[node] = through
	}
	q.mu.Unlock()
	m := Message{Node: node, Through: through, Body: body, At: q.o.Clock()}
	for _, p := range q.parts {
		if !p.Takes(body) {
			continue
		}
		q.metrics.received.WithLabelValues(p.name).Inc()
		for {
			select {
			case p.in <- m:
				return
			default:
			}
			select {
			case <-p.in: // the oldest: who sent it says it again
				q.metrics.dropped.WithLabelValues("inbox").Inc()
			default:
			}
		}
	}
}

// Send sends a message of a part to a relay, through the server that it spoke
// through last. It does not block; what cannot be sent is dropped.
func (q *Quota) Send(node ids.Node, message proto.Message) {
	down, err := wire.NewQuotaDown(message)
	if err != nil {
		q.o.Logger.Error("a message to a relay cannot be sent", "node", node.String(), "error", err)
		return
	}
	q.mu.Lock()
	through, known := q.routes[node]
	box := q.down[through]
	q.mu.Unlock()
	switch {
	case known && through == q.o.Self:
		q.deliver(node, down)
	case known && box != nil:
		q.dropped("down", box.put(item{Node: node, Kind: down.GetKind(), Body: down.GetBody()}))
	default:
		q.metrics.dropped.WithLabelValues("down").Inc()
	}
}

func (q *Quota) deliver(node ids.Node, down *wire.QuotaDown) {
	if !q.o.Deliver(node, down) {
		q.metrics.dropped.WithLabelValues("link").Inc()
	}
}

func (q *Quota) dropped(place string, n int) {
	if n > 0 {
		q.metrics.dropped.WithLabelValues(place).Add(float64(n))
	}
}

// Run moves messages, and leads while this server does, until ctx ends.
func (q *Quota) Run(ctx context.Context) {
	var running sync.WaitGroup
	running.Go(func() { q.pass(ctx) })
	running.Go(func() { q.poll(ctx) })
	for ctx.Err() == nil {
		if q.o.Cluster.WaitReady(ctx) != nil {
			break
		}
		q.lead(ctx)
	}
	running.Wait()
}

// lead runs the parts until this server leads no more, or leads again in another
// term.
func (q *Quota) lead(ctx context.Context) {
	term, leads := q.o.Cluster.Term()
	if !leads {
		return
	}
	inner, cancel := context.WithCancel(ctx)
	q.begin()
	var running sync.WaitGroup
	for _, p := range q.parts {
		running.Go(func() { q.leadPart(inner, p) })
	}
	look := time.NewTicker(leadershipGap)
	defer look.Stop()
	for still := true; still; {
		select {
		case <-look.C:
			now, leads := q.o.Cluster.Term()
			still = leads && now == term
		case <-ctx.Done():
			still = false
		}
	}
	cancel()
	running.Wait()
	q.begin()
}

// begin forgets what belongs to another term.
func (q *Quota) begin() {
	q.mu.Lock()
	defer q.mu.Unlock()
	clear(q.routes)
	for _, p := range q.parts {
		for len(p.in) > 0 {
			<-p.in
		}
	}
}

func (q *Quota) leadPart(ctx context.Context, p *part) {
	for ctx.Err() == nil {
		err := p.Lead(ctx, p.in)
		if ctx.Err() != nil {
			return
		}
		q.o.Logger.Warn("the leader's work begins anew", "part", p.name, "error", fmt.Sprint(err))
		if pause(ctx, restartPause) != nil {
			return
		}
	}
}

// pause waits for d or the end of ctx.
func pause(ctx context.Context, d time.Duration) error {
	timer := time.NewTimer(d)
	defer timer.Stop()
	select {
	case <-timer.C:
		return nil
	case <-ctx.Done():
		return ctx.Err()
	}
}
