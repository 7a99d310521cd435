package handover

import (
	"context"
	"crypto/tls"
	"math/rand/v2"
	"net"
	"sync"
	"time"

	"github.com/relais-mta/relais/relay"
	"github.com/relais-mta/relais/relay/queue"
	"github.com/relais-mta/relais/shared/fault"
	"github.com/relais-mta/relais/shared/ids"
	"github.com/relais-mta/relais/shared/pki"
	"github.com/relais-mta/relais/shared/policy"
	"github.com/relais-mta/relais/shared/wire"
)

// worker gives mail to one relay. It lives while there is something to be said
// to that relay.
type worker struct {
	s       *Service
	peer    ids.Node
	wake    chan struct{}
	running bool            // under s.mu
	open    []*queue.Parcel // offered, and not known to be taken or not; of run

	mu      sync.Mutex
	linked  bool
	flying  int    // messages offered and not ended
	problem string // why the last session ended or a message was refused; empty: nothing is wrong
	again   time.Time
	refused map[ids.Pool]time.Time // pools of which it takes no mail until then
	shut    time.Time              // it takes no mail at all until then
}

func (w *worker) poke() {
	select {
	case w.wake <- struct{}{}:
	default:
	}
}

// run keeps sessions going until there is nothing left to say.
func (w *worker) run(ctx context.Context) {
	s := w.s
	defer func() {
		s.mu.Lock()
		defer s.mu.Unlock()
		w.running = false
		if len(w.open) == 0 {
			delete(s.workers, w.peer)
		}
	}()
	backoff := minBackoff
	for ctx.Err() == nil && s.cfg.Closed() == "" {
		p := s.plan.Load()
		peer := p.peers[w.peer]
		if peer == nil && p.peers != nil {
			open := w.open
			w.open = nil
			w.abandon(open, "the relay was put out of the cluster")
			return
		}
		began := time.Now()
		err := w.session(ctx, peer)
		if err == nil && len(w.open) == 0 {
			return
		}
		w.abandonExpired()
		if !w.needed() {
			return
		}
		if time.Since(began) > maxBackoff {
			backoff = minBackoff
		}
		wait := backoff/2 + rand.N(backoff)
		backoff = min(2*backoff, maxBackoff)
		w.note(err, s.cfg.Now().Add(wait))
		if ctx.Err() == nil {
			s.log.Warn("no mail can be handed over to a relay for now", "relay", w.peer, "error", err, "again_in", wait.String())
		}
		timer := time.NewTimer(wait)
		select {
		case <-timer.C:
		case <-ctx.Done():
			timer.Stop()
		}
	}
}

// needed reports whether there is anything to be said to the relay.
func (w *worker) needed() bool {
	if len(w.open) > 0 || len(w.s.cfg.Queue.Owed(w.peer, 1)) > 0 {
		return true
	}
	p := w.s.plan.Load()
	for pool := range p.wanted {
		if p.may(pool, w.peer) && (w.s.backlog.has(pool) || p.draining && w.s.backlog.heldDue()) {
			return true
		}
	}
	return false
}

func (w *worker) note(err error, again time.Time) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.linked, w.again = false, again
	w.problem = "the session ended"
	if err != nil {
		w.problem = fault.Public(err)
	}
}

// abandon ends messages of which nobody will say any more where they are. What
// cannot be ended now stays open.
func (w *worker) abandon(parcels []*queue.Parcel, why string) {
	if len(parcels) == 0 {
		return
	}
	if err := w.s.cfg.Queue.TakeBackInDoubt(parcels, why); err != nil {
		w.s.log.Error("messages that may be with another relay could not be taken back", "relay", w.peer, "messages", len(parcels), "error", err)
		w.open = append(w.open, parcels...)
		return
	}
	w.s.log.Warn("messages that may be with another relay are taken back: they are in doubt", "relay", w.peer, "messages", len(parcels), "why", why)
	w.s.metrics.returned.WithLabelValues("in-doubt").Add(float64(len(parcels)))
	w.landed(len(parcels))
}

// abandonExpired does so for what is past its deadline while its relay cannot be
// asked: its sender is told that its end is unknown.
func (w *worker) abandonExpired() {
	now := w.s.cfg.Now()
	var over, left []*queue.Parcel
	for _, p := range w.open {
		if p.Env.ExpiresAt.After(now) || p.Gone() {
			left = append(left, p)
		} else {
			over = append(over, p)
		}
	}
	w.open = left
	w.abandon(over, "their deadline is over and the relay cannot be asked")
}

func (w *worker) landed(n int) {
	w.mu.Lock()
	w.flying -= n
	w.mu.Unlock()
}

func (w *worker) tookOff(n int) {
	w.mu.Lock()
	w.flying += n
	w.mu.Unlock()
}

// may reports whether mail of a pool may be offered now.
func (w *worker) may(p *plan, pool ids.Pool, now time.Time) bool {
	w.mu.Lock()
	defer w.mu.Unlock()
	return p.may(pool, w.peer) && !w.shut.After(now) && !w.refused[pool].After(now)
}

// claim looks for messages for the relay.
func (w *worker) claim() ([]*queue.Parcel, error) {
	s := w.s
	p, now := s.plan.Load(), s.cfg.Now()
	if s.cfg.Closed() != "" || !s.cfg.Queue.MayOffer(w.peer) {
		return nil, nil
	}
	s.claiming.Lock()
	defer s.claiming.Unlock()
	entries, held := s.backlog.take(func(pool ids.Pool) bool { return w.may(p, pool, now) })
	if len(entries) == 0 && !held {
		return nil, nil
	}
	numbers := make([]queue.Number, len(entries))
	for i, e := range entries {
		numbers[i] = e.number
	}
	s.backlog.prune(now)
	parcels, drained, err := s.cfg.Queue.Claim(numbers, held, batchMessages, func(env *relay.Envelope) bool {
		back := env.HandedFrom == w.peer && env.HandedAt == p.revision
		return !back && env.Hops < queue.MaxHops && env.ExpiresAt.After(now.Add(time.Second)) && w.may(p, env.Pool, now) && !s.backlog.passes(env.ID, now)
	})
	if err != nil || !drained {
		for _, e := range entries {
			s.backlog.add(e.pool, e.number)
		}
		if held {
			s.backlog.lookAtHeld()
		}
	}
	return parcels, err
}

// readable keeps those whose bodies can be read. The others stay here, where
// the check of the queue finds them.
func (w *worker) readable(parcels []*queue.Parcel) (good []*queue.Parcel) {
	var bad []*queue.Parcel
	for _, p := range parcels {
		if err := w.s.cfg.Queue.Check(p); err != nil {
			w.s.log.Error("a message cannot be handed over because its body cannot be read", "message", p.Env.ID, "error", err)
			w.s.backlog.pass(p.Env.ID, w.s.cfg.Now().Add(forgetInterval))
			bad = append(bad, p)
			continue
		}
		good = append(good, p)
	}
	if len(bad) > 0 {
		_ = w.s.cfg.Queue.TakeBack(bad) // nothing of them is on disk: it cannot fail
	}
	return good
}

// cut divides parcels into batches by the size of their bodies.
func cut(parcels []*queue.Parcel) (out [][]*queue.Parcel) {
	first, size := 0, int64(0)
	for i, p := range parcels {
		n := p.Env.Body.Length
		if i > first && size+n > batchBodyBytes {
			out = append(out, parcels[first:i])
			first, size = i, 0
		}
		size += n
	}
	if first < len(parcels) {
		out = append(out, parcels[first:])
	}
	return out
}

// dial connects to the relay and makes sure that it is the one of the view.
func (w *worker) dial(ctx context.Context, peer *policy.Peer) (net.Conn, error) {
	const op = "handover.dial"
	if peer == nil || peer.Address == "" {
		return nil, fault.New(fault.Unavailable, op, "relay %s takes no mail of others: it has no hand-over address", w.peer)
	}
	raw, err := w.s.cfg.Dial(ctx, peer.Address)
	if err != nil {
		return nil, fault.Wrap(err, fault.Unavailable, op, "relay %s cannot be reached at %s", peer.Name, peer.Address)
	}
	conn := tls.Client(raw, pki.ClientConfig(w.s.cfg.Holder, pki.Peer{Cluster: w.s.cfg.Cluster, Role: pki.RoleRelay}, wire.ALPNHandover))
	ctx, cancel := context.WithTimeout(ctx, handshakeTimeout)
	defer cancel()
	if err = conn.HandshakeContext(ctx); err == nil {
		err = w.s.isPeer(conn, w.peer)
	}
	if err != nil {
		_ = raw.Close() // the first error is the one worth telling
		return nil, fault.Wrap(err, fault.KindOf(err), op, "relay %s at %s is not who it should be, or refuses this one", peer.Name, peer.Address)
	}
	return conn, nil
}
