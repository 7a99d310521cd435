package handover

import (
	"context"
	"log/slog"
	"net"
	"sync"
	"sync/atomic"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/relais-mta/relais/relay/queue"
	"github.com/relais-mta/relais/shared/fault"
	"github.com/relais-mta/relais/shared/ids"
	"github.com/relais-mta/relais/shared/pki"
	"github.com/relais-mta/relais/shared/policy"
)

// Bounds. What is on its way to one relay at most is maxBatches times
// batchMessages messages, of which memory holds the envelopes, and one piece of
// one body.
const (
	batchMessages    = 256     // in one batch
	batchBodyBytes   = 8 << 20 // of bodies in one batch, unless a single one is larger
	maxBatches       = 4       // unanswered in one session
	maxGiving        = 16      // relays given to at once
	maxTaking        = 64      // sessions of relays that give to this one
	maxQueuesAtOnce  = 64      // work queues looked at for one batch
	maxBacklog       = 1 << 20 // work queues known to hold mail for others
	maxPassedOver    = 16_384  // messages that are left alone for a while
	maxSessionTime   = time.Hour
	idleTime         = 30 * time.Second // a session without mail lives on
	handshakeTimeout = 10 * time.Second
	frameTimeout     = time.Minute // for one frame, and for an answer
	scanInterval     = 5 * time.Second
	forgetInterval   = time.Hour
	minBackoff       = 500 * time.Millisecond
	maxBackoff       = 30 * time.Second
	poolBackoff      = 5 * time.Second  // a relay that takes no mail of a pool is not asked again
	messageBackoff   = 30 * time.Second // a message that was refused stays
	rateWindow       = 10 * time.Second
)

// Config says what a Service works with. All but Dial are required.
type Config struct {
	Cluster     ids.Cluster
	Node        ids.Node                 // this relay
	Incarnation uint64                   // counts its starts
	Queue       *queue.Queue             // mail is given from and taken into
	Directory   func() *policy.Directory // nil before the first view
	Usable      func(ids.Pool) bool      // whether mail of the pool can leave from here now
	Closed      func() string            // why the relay takes and gives no mail at all; empty: it does
	Holder      *pki.Holder              // certificate of the node, and whom it believes
	Dial        func(ctx context.Context, address string) (net.Conn, error)
	Now         func() time.Time
	Logger      *slog.Logger
	Registerer  prometheus.Registerer
}

// Service gives mail to other relays and takes theirs. It is safe for
// concurrent use.
type Service struct {
	cfg     Config
	log     *slog.Logger
	metrics *metrics
	counter atomic.Uint64 // of sessions
	wake    chan struct{}
	active  atomic.Bool // there are pools to be given away
	moved   atomic.Bool // the plan may have changed
	plan    atomic.Pointer[plan]
	backlog backlog
	given   rate

	claiming sync.Mutex // one worker looks for mail at a time

	mu      sync.Mutex
	workers map[ids.Node]*worker
	takers  map[ids.Node]*taker
	last    map[ids.Node]uint64   // number of each giver's newest session
	conns   map[net.Conn]struct{} // of takers, handshake included
	closed  bool
	serving sync.WaitGroup
}

// New returns a service. Run gives, Serve takes.
func New(cfg Config) (*Service, error) {
	const op = "handover.New"
	if cfg.Queue == nil || cfg.Directory == nil || cfg.Usable == nil || cfg.Closed == nil || cfg.Holder == nil || cfg.Now == nil || cfg.Logger == nil || cfg.Registerer == nil {
		return nil, fault.New(fault.Internal, op, "the configuration is incomplete")
	}
	if cfg.Dial == nil {
		d := &net.Dialer{Timeout: handshakeTimeout}
		cfg.Dial = func(ctx context.Context, address string) (net.Conn, error) { return d.DialContext(ctx, "tcp", address) }
	}
	s := &Service{cfg: cfg, log: cfg.Logger, wake: make(chan struct{}, 1), workers: make(map[ids.Node]*worker), takers: make(map[ids.Node]*taker), conns: make(map[net.Conn]struct{}), last: make(map[ids.Node]uint64)}
	s.backlog.init()
	s.plan.Store(&plan{})
	s.metrics = newMetrics(s)
	for _, c := range s.metrics.all() {
		if err := cfg.Registerer.Register(c); err != nil {
			return nil, fault.Wrap(err, fault.Internal, op, "metrics are registered twice")
		}
	}
	return s, nil
}

// Changed tells that the view, or what can be used here, may have changed. It
// does not block.
func (s *Service) Changed() {
	s.replan()
	s.dropStrangers()
	s.moved.Store(true)
	s.poke()
}

func (s *Service) poke() {
	select {
	case s.wake <- struct{}{}:
	default:
	}
}

// Notify tells that a work queue may have got mail. It costs nothing while there
// is nothing to be given away, and does not block.
func (s *Service) Notify(n queue.Number) {
	if !s.active.Load() || n == 0 {
		return
	}
	s.backlog.fresh(n)
	s.poke()
}

// Run gives mail to other relays until ctx ends.
func (s *Service) Run(ctx context.Context) error {
	var running sync.WaitGroup
	defer running.Wait()
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	for peer, parcels := range s.cfg.Queue.Resumed() {
		w := s.worker(peer)
		w.open, w.flying = parcels, len(parcels)
		s.log.Info("messages were on their way to another relay when the last run ended", "relay", peer, "messages", len(parcels))
	}
	scan, forget := time.NewTicker(scanInterval), time.NewTicker(forgetInterval)
	defer scan.Stop()
	defer forget.Stop()
	for full := true; ; {
		s.replan()
		s.sort(full)
		full = false
		s.start(ctx, &running)
		select {
		case <-ctx.Done():
			return nil
		case <-s.wake:
			full = s.moved.Swap(false)
		case <-scan.C:
			full = true
		case <-forget.C:
			if err := s.cfg.Queue.ForgetOverdue(s.cfg.Now()); err != nil {
				s.log.Warn("the memory of messages that other relays handed over could not be cleared", "error", err)
			}
		}
	}
}

// start lets workers run that have something to do.
func (s *Service) start(ctx context.Context, running *sync.WaitGroup) {
	if s.cfg.Closed() != "" {
		return
	}
	for _, peer := range s.cfg.Queue.Owing() {
		s.worker(peer)
	}
	p := s.plan.Load()
	for pool, peers := range p.wanted {
		if s.backlog.has(pool) || p.draining && s.backlog.heldDue() {
			for _, peer := range peers {
				s.worker(peer.Node)
			}
		}
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	n := 0
	for _, w := range s.workers {
		if w.running {
			n++
		}
	}
	for node, w := range s.workers {
		if w.running || n >= maxGiving {
			w.poke()
			continue
		}
		if p.peers != nil && p.peers[node] == nil && len(w.open) == 0 {
			delete(s.workers, node) // out of the cluster, and nothing is owed that it could take
			continue
		}
		w.running = true
		n++
		running.Add(1)
		go func() {
			defer running.Done()
			w.run(ctx)
		}()
	}
}

// worker returns the worker for a relay, new if needed.
func (s *Service) worker(peer ids.Node) *worker {
	s.mu.Lock()
	defer s.mu.Unlock()
	w := s.workers[peer]
	if w == nil {
		w = &worker{s: s, peer: peer, wake: make(chan struct{}, 1), refused: make(map[ids.Pool]time.Time)}
		s.workers[peer] = w
	}
	return w
}

// plan says which pools' mail goes to other relays, and to whom it may go.
type plan struct {
	revision uint64
	draining bool
	wanted   map[ids.Pool][]*policy.Peer
	since    map[ids.Pool]time.Time
	peers    map[ids.Node]*policy.Peer // nil: the view says nothing of relays
}

// replan makes the plan that view and sources ask for.
func (s *Service) replan() {
	dir := s.cfg.Directory()
	if dir == nil {
		return
	}
	view, old, now := dir.View(), s.plan.Load(), s.cfg.Now()
	p := &plan{revision: view.Revision, draining: view.Draining, wanted: make(map[ids.Pool][]*policy.Peer), since: make(map[ids.Pool]time.Time)}
	for i := range view.Peers {
		if p.peers == nil {
			p.peers = make(map[ids.Node]*policy.Peer, len(view.Peers))
		}
		p.peers[view.Peers[i].Node] = &view.Peers[i]
	}
	for i := range view.Pools {
		pool := view.Pools[i].ID
		if !view.Draining && s.cfg.Usable(pool) {
			continue
		}
		for _, peer := range dir.Owners(pool) {
			if peer.Takes() {
				p.wanted[pool] = append(p.wanted[pool], peer)
			}
		}
		if len(p.wanted[pool]) > 0 {
			if p.since[pool] = old.since[pool]; p.since[pool].IsZero() {
				p.since[pool] = now
			}
		}
	}
	s.plan.Store(p)
	s.active.Store(len(p.wanted) > 0)
}

// may reports whether a relay may be given a pool's mail.
func (p *plan) may(pool ids.Pool, peer ids.Node) bool {
	for _, candidate := range p.wanted[pool] {
		if candidate.Node == peer {
			return true
		}
	}
	return false
}

// sort puts the work queues that may hold mail for others into the backlog: all
// of them, or those that were notified.
func (s *Service) sort(full bool) {
	p := s.plan.Load()
	if len(p.wanted) == 0 {
		s.backlog.clear()
		return
	}
	if full {
		s.cfg.Queue.Queues(func(info queue.QueueInfo) bool {
			if len(p.wanted[info.Key.Pool]) > 0 && (info.Waiting > 0 || info.InMemory > 0 || info.More) {
				s.backlog.add(info.Key.Pool, info.Number)
			}
			return true
		})
		if p.draining {
			s.backlog.lookAtHeld()
		}
	}
	for _, n := range s.backlog.takeFresh() {
		if key, ok := s.cfg.Queue.Key(n); ok && len(p.wanted[key.Pool]) > 0 {
			s.backlog.add(key.Pool, n)
		}
	}
}
