package dispatch

import (
	"context"
	"crypto/sha256"
	"time"

	"github.com/relais-mta/relais/shared/fault"
	"github.com/relais-mta/relais/shared/link"
	"github.com/relais-mta/relais/shared/wire"
)

// offer is a view that is ready to be sent.
type offer struct {
	generation uint64
	revision   uint64
	shared     *encoding
	sum        [sha256.Size]byte // of the encoding for this relay
	cost       time.Duration     // of making it
}

func (o offer) named() *wire.Revision {
	return &wire.Revision{Generation: o.generation, Index: o.revision}
}

// sendViews keeps the relay's view at the newest revision: one view is on its
// way at a time, and changes meanwhile are made up for by the next one, which
// is the newest. Between two views it pauses twice as long as the last one took
// to make, so that a burst of changes costs a bounded share of the CPU.
func (n *session) sendViews(ctx context.Context) error {
	nodes := n.server.config.Nodes
	generation, revision := n.hello.Generation, n.hello.Revision
	var stream link.Stream
	var conn *wire.Conn
	offered := false // in this session
	for {
		changed := nodes.WatchRevision()
		noticed := time.Now()
		next, err := n.build(ctx)
		if err != nil {
			if ctx.Err() != nil {
				return ctx.Err()
			}
			n.log.Error("cannot build the view", "error", err)
			if err := pause(ctx, viewRetry); err != nil {
				return err
			}
			continue
		}
		switch {
		case next.generation < generation, next.generation == generation && next.revision < revision:
			// This server is behind what the relay has seen; it will catch up.
		case next.generation == generation && next.revision == revision && (offered || string(n.held.GetHeldSha256()) == string(next.sum[:])):
			if !offered {
				nodes.AckView(n.node, revision)
			}
		default:
			if stream == nil {
				if stream, conn, err = n.openViewStream(ctx); err != nil {
					return err
				}
				defer stream.Close()
			}
			if err := n.offer(stream, conn, next, noticed); err != nil {
				return err
			}
			generation, revision, offered = next.generation, next.revision, true
		}
		if err := pause(ctx, min(2*next.cost, maxViewPause)); err != nil {
			return err
		}
		select {
		case <-changed:
		case <-ctx.Done():
			return ctx.Err()
		}
	}
}

// build makes and encodes the newest view, few at a time in the whole server.
func (n *session) build(ctx context.Context) (offer, error) {
	select {
	case n.server.builds <- struct{}{}:
		defer func() { <-n.server.builds }()
	case <-ctx.Done():
		return offer{}, ctx.Err()
	}
	start := time.Now()
	view, err := n.server.config.Nodes.ViewFor(ctx, n.node)
	if err != nil {
		return offer{}, err
	}
	shared, err := n.server.encodings.of(view)
	if err != nil {
		return offer{}, err
	}
	next := offer{generation: view.Generation, revision: view.Revision, shared: shared, sum: shared.sum(n.node)}
	next.cost = time.Since(start)
	return next, nil
}

func (n *session) openViewStream(ctx context.Context) (link.Stream, *wire.Conn, error) {
	stream, err := n.link.OpenStream(ctx)
	if err != nil {
		return nil, nil, err
	}
	stream.SetPriority(link.PriorityView)
	conn := wire.NewConn(stream, wire.MaxFrameBytes)
	err = stream.SetDeadline(time.Now().Add(writeTimeout))
	if err == nil {
		err = conn.Send(&wire.StreamStart{Purpose: wire.Purpose_PURPOSE_VIEW})
	}
	if err != nil {
		_ = stream.Close() // the first error is the one worth telling
		return nil, nil, err
	}
	return stream, conn, nil
}

// offer sends one view and takes the answer.
func (n *session) offer(stream link.Stream, conn *wire.Conn, view offer, noticed time.Time) error {
	const op = "dispatch.offer"
	server := n.server
	if err := stream.SetDeadline(time.Now().Add(ackTimeout)); err != nil {
		return err
	}
	answer, sent, err := n.exchange(stream, conn, view)
	server.viewBytes.Add(float64(sent))
	if err != nil {
		server.viewCount.WithLabelValues("none").Inc()
		return fault.Wrap(err, fault.Unavailable, op, "%s gave no answer to revision %d", n.node, view.revision)
	}
	took := time.Since(noticed)
	log := n.log.With("generation", view.generation, "revision", view.revision, "bytes", sent, "took", took.String())
	switch m := answer.(type) {
	case *wire.Ack:
		if got := m.GetRevision(); got.GetIndex() != view.revision || got.GetGeneration() != view.generation {
			return fault.New(fault.Invalid, op, "the relay acknowledged revision %d where %d was sent", got.GetIndex(), view.revision)
		}
		n.base = held{generation: view.generation, revision: view.revision, sum: string(view.sum[:]), ours: true, draining: view.shared.draining}
		server.viewCount.WithLabelValues("ack").Inc()
		server.ackSeconds.Observe(took.Seconds())
		server.config.Nodes.AckView(n.node, view.revision)
		log.Info("view acknowledged")
	case *wire.Nack:
		why := fault.Public(m.GetError().Fault())
		server.viewCount.WithLabelValues("nack").Inc()
		server.config.Nodes.NackView(n.node, view.revision, why)
		log.Warn("view refused by the relay", "why", why)
	default:
		return fault.New(fault.Invalid, op, "the relay answered a view with a %T", answer)
	}
	return nil
}

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
