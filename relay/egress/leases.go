package egress

import (
	"context"
	"fmt"
	"log/slog"
	"math/rand/v2"
	"sync"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"google.golang.org/protobuf/proto"

	"github.com/relais-mta/relais/shared/fault"
	"github.com/relais-mta/relais/shared/ids"
	"github.com/relais-mta/relais/shared/lease"
	"github.com/relais-mta/relais/shared/ownership"
	"github.com/relais-mta/relais/shared/policy"
	"github.com/relais-mta/relais/shared/wire"
)

const (
	// renewals is how many reports there are in the time for which one earns a lease.
	renewals = 4
	// askAgain is when a report that was not answered is followed by another.
	askAgain = 3 * time.Second
	// maxAsked is how many reports may wait for an answer.
	maxAsked = 16
	// openLook is how often the loop looks around at least while a session is open
	// under a lease: its timer stands still while the machine is suspended.
	openLook  = time.Second
	leaseLook = time.Minute
)

// LeaseConfig is what Leases works with. All but Times are required.
type LeaseConfig struct {
	Node        ids.Node
	Incarnation uint64                    // of this process: higher than any before
	Send        func(proto.Message) error // to the leader; may block
	Clock       func() lease.Instant      // goes on in suspend
	Changed     func()                    // is called when a floating address may be used, or may not any more
	Times       ownership.Config          // zero: ownership.DefaultConfig
	Log         *slog.Logger
	Registerer  prometheus.Registerer
}

// Leases is the relay's half for floating addresses: it has the leader prolong them,
// says whether they may be used now, and ends what is open from them in time. The
// rules are those of shared/ownership. It is safe for concurrent use.
type Leases struct {
	cfg    LeaseConfig
	kick   chan struct{} // something for the loop, capacity 1
	speak  chan struct{} // a report is due, capacity 1
	closed prometheus.Counter

	mu       sync.Mutex
	revision uint64 // counts the views, which come in their order
	held     map[ids.Source]*held
	linked   bool
	nonce    uint64
	asked    map[uint64]lease.Instant // when reports that wait for an answer were made
	dueAt    lease.Instant            // of the next report; 0: now
}

// held is a floating address of this relay, or one from which something is open.
type held struct {
	source   policy.Source
	use      ownership.Use
	standing ownership.Standing // as who uses addresses was told
	conns    map[*leasedConn]struct{}
	lapsed   lease.Instant // when a lease ended last; 0: none did
}

// NewLeases returns the leases of a process that begins: it has none.
func NewLeases(cfg LeaseConfig) (*Leases, error) {
	const op = "egress.NewLeases"
	if cfg.Node.IsZero() || cfg.Incarnation == 0 || cfg.Send == nil || cfg.Clock == nil || cfg.Changed == nil || cfg.Log == nil || cfg.Registerer == nil {
		return nil, fault.New(fault.Internal, op, "node, incarnation, sender, clock, callback, logger and metrics registry are needed")
	}
	if cfg.Times == (ownership.Config{}) {
		cfg.Times = ownership.DefaultConfig()
	}
	l := &Leases{cfg: cfg, kick: make(chan struct{}, 1), speak: make(chan struct{}, 1), held: make(map[ids.Source]*held), asked: make(map[uint64]lease.Instant),
		closed: prometheus.NewCounter(prometheus.CounterOpts{Name: "relais_relay_lease_closed_connections_total", Help: "Connections that were closed because the lease of their floating address had ended."})}
	return l, fault.Wrap(cfg.Registerer.Register(l.closed), fault.Internal, op, "metrics could not be registered")
}

// SetView takes the sources of a view, of all relays, and those that their owners are
// to stop using. Views come in their order.
func (l *Leases) SetView(sources []policy.Source, leaving []policy.LeavingSource) {
	l.mu.Lock()
	l.revision++
	named := make(map[ids.Source]bool)
	for i := range sources {
		if s := &sources[i]; s.Leased && s.Owner == l.cfg.Node {
			named[s.ID] = true
			l.hear(s)
		}
	}
	for _, s := range leaving {
		if h := l.held[s.ID]; h != nil && s.Owner == l.cfg.Node && !named[s.ID] {
			named[s.ID] = true
			h.use.Hear(l.news(ownership.Releasing, s.Owner, s.Epoch))
		}
	}
	for id, h := range l.held {
		if !named[id] {
			h.use.Hear(l.news(ownership.Free, ids.Node{}, h.use.Epoch()))
		}
	}
	l.mu.Unlock()
	l.wake()
}

// hear takes news of an address that this relay has. l.mu is held.
func (l *Leases) hear(s *policy.Source) {
	h := l.held[s.ID]
	if h == nil {
		h = &held{use: ownership.NewUse(l.cfg.Times, l.cfg.Node, ownership.News{}), conns: make(map[*leasedConn]struct{})}
		l.held[s.ID] = h
	}
	if h.use.Epoch() != s.Epoch {
		h.lapsed = 0
		l.dueAt = 0 // an answer that names this assignment is wanted now
	}
	h.source = *s
	h.use.Hear(l.news(ownership.Assigned, s.Owner, s.Epoch))
}

func (l *Leases) news(state ownership.State, owner ids.Node, epoch uint64) ownership.News {
	return ownership.News{Revision: l.revision, Address: ownership.Address{State: state, Owner: owner, Epoch: epoch, Placed: true}}
}

// Linked tells whether there is a link to a server that passes messages on.
func (l *Leases) Linked(linked bool) {
	l.mu.Lock()
	l.linked, l.dueAt = linked, 0
	l.mu.Unlock()
	l.wake()
}

// Answer takes the leader's answer to a report of this process. What it earns counts
// from when the report was made.
func (l *Leases) Answer(m *wire.AddressAnswer) {
	l.mu.Lock()
	sent, known := l.asked[m.GetNonce()]
	if !known || m.GetIncarnation() != l.cfg.Incarnation {
		l.mu.Unlock()
		return
	}
	for nonce := range l.asked {
		if nonce <= m.GetNonce() {
			delete(l.asked, nonce)
		}
	}
	for _, s := range m.GetLeased() {
		var id ids.Source
		if err := wire.DecodeID(s.GetSourceId(), &id); err != nil {
			l.cfg.Log.Warn("an answer about floating addresses cannot be read", "error", err)
			continue
		}
		if h := l.held[id]; h != nil {
			h.use.Renew(sent, s.GetEpoch())
		}
	}
	// Else a newer report waits for its answer, or is due now: of what came meanwhile.
	if m.GetNonce() == l.nonce && l.dueAt != 0 {
		period := l.cfg.Times.TTL / renewals
		l.dueAt = sent.Add(period - rand.N(period/10))
	}
	l.mu.Unlock()
	l.wake()
}

// Run reports, and ends what is open in time, until ctx ends.
func (l *Leases) Run(ctx context.Context) {
	var speaking sync.WaitGroup
	speaking.Go(func() { l.report(ctx) }) // apart: a link that takes no bytes must not keep sessions open
	defer speaking.Wait()
	timer := time.NewTimer(0)
	defer timer.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case <-l.kick:
		case <-timer.C:
		}
		timer.Reset(l.round())
	}
}

// round does what is due and returns how long the loop may rest.
func (l *Leases) round() time.Duration {
	l.mu.Lock()
	now := l.cfg.Clock()
	next := now.Add(leaseLook)
	var over []*leasedConn
	changed := false
	for id, h := range l.held {
		standing := h.use.Standing(now)
		if standing != h.standing {
			changed = changed || (standing == ownership.Usable) != (h.standing == ownership.Usable)
			if h.standing = standing; standing == ownership.Gone && h.use.Until() > 0 {
				h.lapsed = h.use.Until()
			}
		}
		if standing == ownership.Gone {
			for c := range h.conns {
				over = append(over, c)
			}
			if len(h.conns) == 0 && h.use.Until() == 0 && !l.mine(h) {
				delete(l.held, id)
			}
			continue
		}
		end := h.use.Until()
		if standing == ownership.Usable {
			end = end.Add(-l.cfg.Times.Guard)
		}
		if next = min(next, end); len(h.conns) > 0 {
			next = min(next, now.Add(openLook))
		}
	}
	if due, speaks := l.due(now); speaks {
		next = min(next, due)
	}
	l.mu.Unlock()
	for _, c := range over {
		c.cut()
	}
	if changed {
		l.cfg.Changed()
	}
	return max(time.Millisecond, next.Sub(l.cfg.Clock()))
}

// mine reports whether the address is this relay's by the view. l.mu is held.
func (l *Leases) mine(h *held) bool { return h.use.Owner() == l.cfg.Node }

// due has a report sent if it is time, and returns when to look again. l.mu is held.
func (l *Leases) due(now lease.Instant) (at lease.Instant, speaks bool) {
	if !l.linked || len(l.held) == 0 {
		return 0, false
	}
	if now < l.dueAt {
		return l.dueAt, true
	}
	l.dueAt = now.Add(askAgain)
	select {
	case l.speak <- struct{}{}:
	default: // one is being written still
	}
	return l.dueAt, true
}

// report sends a report whenever one is due, until ctx ends.
func (l *Leases) report(ctx context.Context) {
	for {
		select {
		case <-ctx.Done():
			return
		case <-l.speak:
		}
		l.mu.Lock()
		l.nonce++
		m := &wire.AddressReport{Incarnation: l.cfg.Incarnation, Nonce: l.nonce}
		l.asked[l.nonce] = l.cfg.Clock() // before it is written
		delete(l.asked, l.nonce-maxAsked)
		l.mu.Unlock()
		if err := l.cfg.Send(m); err != nil {
			l.cfg.Log.Debug("the leader cannot be asked for floating addresses", "error", err)
		}
	}
}

func (l *Leases) wake() {
	select {
	case l.kick <- struct{}{}:
	default:
	}
}

// usable reports whether a session may be opened from a floating address now.
func (l *Leases) usable(id ids.Source) bool {
	if l == nil {
		return false
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	h := l.held[id]
	return h != nil && h.use.Standing(l.cfg.Clock()) == ownership.Usable
}

// Why says why a floating address of this relay is not used now; "" if it is, or if
// it is none.
func (l *Leases) Why(id ids.Source) string {
	if l == nil {
		return ""
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	h := l.held[id]
	if h == nil || !l.mine(h) {
		return ""
	}
	now, until := l.cfg.Clock(), h.use.Until()
	clock := func(at lease.Instant) string {
		return time.Now().Add(at.Sub(now)).UTC().Format(time.TimeOnly) + " UTC"
	}
	text := fmt.Sprintf("floating address %s: ", h.source.Bind)
	switch standing := h.use.Standing(now); {
	case standing == ownership.Usable:
		return ""
	case standing == ownership.Finishing:
		text += "its lease ends at " + clock(until)
	case until > 0 || h.lapsed > 0:
		text += "its lease ended at " + clock(max(until, h.lapsed))
	default:
		text += "this process has no lease of it yet"
	}
	if !l.linked {
		return text + ", control is not reached"
	}
	return text + ", the leader of the control servers has not answered"
}
