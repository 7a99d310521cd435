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
	encoded    []byte
	sum        [sha256.Size]byte
}

// sendViews keeps the relay's view at the newest revision: one view is on its
// way at a time, and changes meanwhile are made up for by the next one, which
// is the newest. Between two views it pauses twice as long as the last one
// took, so that a burst of changes costs a bounded share of the CPU.
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
		if err := pause(ctx, min(2*time.Since(noticed), maxViewPause)); err != nil {
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
	view, err := n.server.config.Nodes.ViewFor(ctx, n.node)
	if err != nil {
		return offer{}, err
	}
	encoded, err := wire.EncodeView(view)
	if err != nil {
		return offer{}, err
	}
	return offer{generation: view.Generation, revision: view.Revision, encoded: encoded, sum: sha256.Sum256(encoded)}, nil
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
	if err := wire.SendView(conn, &wire.Revision{Generation: view.generation, Index: view.revision}, view.encoded); err != nil {
		return err
	}
	server.viewBytes.Add(float64(len(view.encoded)))
	answer, err := conn.Receive()
	if err != nil {
		server.viewCount.WithLabelValues("none").Inc()
		return fault.Wrap(err, fault.Unavailable, op, "%s gave no answer to revision %d", n.node, view.revision)
	}
	took := time.Since(noticed)
	log := n.log.With("generation", view.generation, "revision", view.revision, "bytes", len(view.encoded), "took", took.String())
	switch m := answer.(type) {
	case *wire.Ack:
		if got := m.GetRevision(); got.GetIndex() != view.revision || got.GetGeneration() != view.generation {
			return fault.New(fault.Invalid, op, "the relay acknowledged revision %d where %d was sent", got.GetIndex(), view.revision)
		}
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
