package handover

import (
	"context"
	"net"
	"sync/atomic"
	"time"

	"google.golang.org/protobuf/proto"

	"github.com/relais-mta/relais/relay/queue"
	"github.com/relais-mta/relais/shared/fault"
	"github.com/relais-mta/relais/shared/ids"
	"github.com/relais-mta/relais/shared/policy"
	"github.com/relais-mta/relais/shared/wire"
)

// giving is one session in which mail is given to a relay.
type giving struct {
	w          *worker
	conn       net.Conn
	wire       *wire.Conn
	pending    chan *request // sent, in order, and not answered
	dead       chan struct{} // closed when no answers are read any more
	broken     chan struct{} // closed when an answer did not come
	forgetting atomic.Bool
	number     uint64
}

// request is what the relay has to answer.
type request struct {
	parcels []*queue.Parcel  // of a batch
	number  uint64           // of a batch
	forget  []queue.Transfer // otherwise
}

// session links to the relay and gives it mail until there was none for a while.
// What was offered and not answered when it ends is in w.open.
func (w *worker) session(ctx context.Context, peer *policy.Peer) error {
	conn, err := w.dial(ctx, peer)
	if err != nil {
		return err
	}
	defer conn.Close()
	defer context.AfterFunc(ctx, func() { _ = conn.Close() })()
	g := &giving{w: w, conn: conn, wire: wire.NewConn(timed{conn}, wire.MaxFrameBytes), dead: make(chan struct{}), broken: make(chan struct{})}
	batches, err := g.greet()
	if err == nil {
		err = g.settle()
	}
	if err != nil {
		return err
	}
	w.mu.Lock()
	w.linked, w.problem = true, ""
	w.mu.Unlock()
	w.s.log.Info("linked to a relay to hand over mail", "relay", w.peer, "name", peer.Name, "address", peer.Address)
	g.pending = make(chan *request, batches)
	var unanswered error
	go func() {
		defer close(g.dead)
		unanswered = g.answers()
	}()
	err = g.feed(ctx)
	close(g.pending)
	if err != nil {
		_ = conn.Close() // ends the wait for answers
	}
	<-g.dead
	w.mu.Lock()
	w.linked = false
	w.mu.Unlock()
	if unanswered != nil {
		return unanswered
	}
	return err
}

// timed gives every read and write its own deadline.
type timed struct{ net.Conn }

func (t timed) Read(p []byte) (int, error) {
	if err := t.SetReadDeadline(time.Now().Add(frameTimeout)); err != nil {
		return 0, err
	}
	return t.Conn.Read(p)
}

func (t timed) Write(p []byte) (int, error) {
	if err := t.SetWriteDeadline(time.Now().Add(frameTimeout)); err != nil {
		return 0, err
	}
	return t.Conn.Write(p)
}

// greet opens the session and returns how many batches may be unanswered.
func (g *giving) greet() (int, error) {
	s := g.w.s
	if err := g.wire.Send(s.preface()); err != nil {
		return 0, err
	}
	if err := g.wire.Send(&wire.HandoverOpen{Session: s.cfg.Incarnation<<32 | s.counter.Add(1)}); err != nil {
		return 0, err
	}
	if err := s.checkPreface(g.wire); err != nil {
		return 0, err
	}
	ready, err := wire.Expect[*wire.HandoverReady](g.wire)
	if err != nil {
		return 0, err
	}
	return int(min(max(ready.GetMaxBatches(), 1), maxBatches)), nil
}

// settle asks what became of messages that were offered in sessions of before,
// and ends them accordingly. The relay has ended those sessions, so what it has
// not now it will not have.
func (g *giving) settle() error {
	w := g.w
	for len(w.open) > 0 {
		n := min(len(w.open), wire.MaxTransfers)
		ask := &wire.HandoverAsk{}
		for _, p := range w.open[:n] {
			ask.Transfers = append(ask.Transfers, encodeTransfer(p.Transfer()))
		}
		if err := g.wire.Send(ask); err != nil {
			return err
		}
		answer, err := wire.Expect[*wire.HandoverHas](g.wire)
		if err != nil {
			return err
		}
		if len(answer.GetHas()) != n {
			return fault.New(fault.Invalid, "handover.settle", "the relay answered for %d messages where %d were asked for", len(answer.GetHas()), n)
		}
		var taken, back []*queue.Parcel
		for i, has := range answer.GetHas() {
			if p := w.open[i]; has || p.Gone() {
				taken = append(taken, p)
			} else {
				back = append(back, p)
			}
		}
		if err := w.moved(taken); err != nil {
			return err
		}
		w.open = append(back, w.open[n:]...) // in case the next fails
		if err := w.takeBack(back, "settled"); err != nil {
			return err
		}
		w.open = w.open[len(back):]
	}
	return nil
}

// moved ends messages that the relay has.
func (w *worker) moved(parcels []*queue.Parcel) error {
	if err := w.s.cfg.Queue.Moved(parcels); err != nil {
		return err
	}
	recipients, bytes := 0, int64(0)
	for _, p := range parcels {
		recipients += p.Recipients()
		bytes += p.Env.Body.Length
	}
	w.landed(len(parcels))
	w.s.given.add(w.s.cfg.Now(), recipients)
	w.s.metrics.given.Add(float64(len(parcels)))
	w.s.metrics.givenBytes.Add(float64(bytes))
	return nil
}

func (w *worker) takeBack(parcels []*queue.Parcel, why string) error {
	if len(parcels) == 0 {
		return nil
	}
	if err := w.s.cfg.Queue.TakeBack(parcels); err != nil {
		return err
	}
	w.landed(len(parcels))
	w.s.metrics.returned.WithLabelValues(why).Add(float64(len(parcels)))
	return nil
}

// feed sends what there is to send. It returns nil when there was nothing for a
// while, or the session is old enough.
func (g *giving) feed(ctx context.Context) error {
	end := time.Now().Add(maxSessionTime)
	idle := time.NewTimer(idleTime)
	defer idle.Stop()
	for time.Now().Before(end) {
		if peer := g.w.s.plan.Load().peers[g.w.peer]; peer == nil {
			return fault.New(fault.Denied, "handover.feed", "relay %s was put out of the cluster", g.w.peer)
		}
		gave, err := g.give()
		if err == nil {
			err = g.tell()
		}
		if err != nil {
			return err
		}
		if gave {
			idle.Reset(idleTime)
			continue
		}
		select {
		case <-g.w.wake:
		case <-g.broken:
			return nil // answers has the reason
		case <-idle.C:
			return nil
		case <-ctx.Done():
			return ctx.Err()
		}
	}
	return nil
}

// give offers one claim's messages and sends them, and reports whether there
// were any.
func (g *giving) give() (bool, error) {
	w := g.w
	parcels, err := w.claim()
	if err != nil || len(parcels) == 0 {
		return false, err
	}
	parcels = w.readable(parcels)
	for _, batch := range cut(parcels) {
		if err == nil {
			err = g.send(batch)
			continue
		}
		if back := w.s.cfg.Queue.TakeBack(batch); back != nil { // not offered: nothing is on disk
			w.s.log.Error("messages could not be given back to the queue", "error", back)
		}
	}
	return true, err
}

// send offers a batch and sends it. From the moment in which it is offered the
// answers' side answers for it.
func (g *giving) send(batch []*queue.Parcel) error {
	w := g.w
	if err := w.s.cfg.Queue.Offer(w.peer, batch); err != nil {
		if back := w.s.cfg.Queue.TakeBack(batch); back != nil {
			w.s.log.Error("messages could not be given back to the queue", "error", back)
		}
		return err
	}
	w.tookOff(len(batch))
	g.number++
	g.pending <- &request{parcels: batch, number: g.number}
	if err := g.wire.Send(&wire.HandoverBatch{Number: g.number, Messages: uint32(len(batch))}); err != nil {
		return err
	}
	out := &dataWriter{conn: g.wire}
	records := w.s.cfg.Queue.NewParcelWriter(out)
	for _, p := range batch {
		if err := records.Write(p); err != nil {
			return err
		}
	}
	if err := records.Flush(); err != nil {
		return err
	}
	return g.wire.Send(&wire.HandoverData{Last: true})
}

// dataWriter sends what is written to it as HandoverData.
type dataWriter struct{ conn *wire.Conn }

func (d *dataWriter) Write(p []byte) (n int, err error) {
	for len(p) > 0 {
		piece := p[:min(len(p), wire.MaxHandoverDataBytes)]
		if err := d.conn.Send(&wire.HandoverData{Data: piece}); err != nil {
			return n, err
		}
		n += len(piece)
		p = p[len(piece):]
	}
	return n, nil
}

// tell sends the relay what it may forget.
func (g *giving) tell() error {
	if g.forgetting.Load() {
		return nil
	}
	owed := g.w.s.cfg.Queue.Owed(g.w.peer, wire.MaxTransfers)
	if len(owed) == 0 {
		return nil
	}
	g.forgetting.Store(true)
	message := &wire.HandoverForget{Transfers: make([]*wire.HandoverTransfer, 0, len(owed))}
	for _, tr := range owed {
		message.Transfers = append(message.Transfers, encodeTransfer(tr))
	}
	g.pending <- &request{forget: owed}
	return g.wire.Send(message)
}

// answers takes the relay's answers. After a failure it gathers what stays
// without one.
func (g *giving) answers() (failed error) {
	for r := range g.pending {
		if failed == nil {
			if failed = g.answer(r); failed != nil {
				_ = g.conn.Close() // ends feed
				close(g.broken)
			}
		}
		g.w.open = append(g.w.open, r.parcels...) // none, of what was answered
	}
	return failed
}

func (g *giving) answer(r *request) error {
	const op = "handover.answer"
	defer g.w.poke()
	if r.forget != nil {
		if _, err := wire.Expect[*wire.HandoverForgotten](g.wire); err != nil {
			return err
		}
		g.w.s.cfg.Queue.Settled(g.w.peer, r.forget)
		g.forgetting.Store(false)
		return nil
	}
	answer, err := wire.Expect[*wire.HandoverTaken](g.wire)
	if err != nil {
		return err
	}
	if answer.GetNumber() != r.number {
		return fault.New(fault.Invalid, op, "the relay answered batch %d where %d is due", answer.GetNumber(), r.number)
	}
	refusals := make(map[uint32]*wire.HandoverRefusal, len(answer.GetRefused()))
	for _, refusal := range answer.GetRefused() {
		refusals[refusal.GetIndex()] = refusal
	}
	var taken, back []*queue.Parcel
	for i, p := range r.parcels {
		if refusal := refusals[uint32(i)]; refusal != nil {
			g.w.refusedBy(p, refusal)
			back = append(back, p)
		} else {
			taken = append(taken, p)
		}
	}
	if err := g.w.moved(taken); err != nil {
		return err
	}
	r.parcels = back
	if err := g.w.takeBack(back, "refused"); err != nil {
		return err
	}
	r.parcels = nil
	return nil
}

// refusedBy remembers not to offer the same again at once.
func (w *worker) refusedBy(p *queue.Parcel, refusal *wire.HandoverRefusal) {
	now := w.s.cfg.Now()
	w.s.metrics.refused.WithLabelValues(reasonName(refusal.GetReason())).Inc()
	w.mu.Lock()
	first := w.problem == ""
	w.problem = "it refuses: " + refusal.GetText()
	switch refusal.GetReason() {
	case wire.HandoverRefusal_REASON_POOL:
		w.refused[p.Env.Pool] = now.Add(poolBackoff)
	case wire.HandoverRefusal_REASON_RELAY:
		w.shut = now.Add(poolBackoff)
	}
	w.mu.Unlock()
	if refusal.GetReason() != wire.HandoverRefusal_REASON_POOL && refusal.GetReason() != wire.HandoverRefusal_REASON_RELAY {
		w.s.backlog.pass(p.Env.ID, now.Add(messageBackoff))
	}
	if first {
		w.s.log.Warn("a relay refuses mail that is handed over", "relay", w.peer, "message", p.Env.ID, "reason", reasonName(refusal.GetReason()), "why", refusal.GetText())
	}
}

func reasonName(r wire.HandoverRefusal_Reason) string {
	switch r {
	case wire.HandoverRefusal_REASON_POOL:
		return "pool"
	case wire.HandoverRefusal_REASON_RELAY:
		return "relay"
	}
	return "message"
}

func encodeTransfer(tr queue.Transfer) *wire.HandoverTransfer {
	return &wire.HandoverTransfer{MessageId: wire.EncodeID(tr.Message), Hop: uint32(tr.Hop)}
}

func decodeTransfers(in []*wire.HandoverTransfer) ([]queue.Transfer, error) {
	const op = "handover.decodeTransfers"
	if len(in) > wire.MaxTransfers {
		return nil, fault.New(fault.TooLarge, op, "%d messages in one question, at most %d", len(in), wire.MaxTransfers)
	}
	out := make([]queue.Transfer, len(in))
	for i, tr := range in {
		if err := wire.DecodeID(tr.GetMessageId(), &out[i].Message); err != nil {
			return nil, err
		}
		if tr.GetHop() > 255 || tr.GetHop() == 0 {
			return nil, fault.New(fault.Invalid, op, "hop %d does not exist", tr.GetHop())
		}
		out[i].Hop = uint8(tr.GetHop())
	}
	return out, nil
}

// preface is what each side says first.
func (s *Service) preface() proto.Message {
	cluster := s.cfg.Cluster
	generation := uint64(0)
	if dir := s.cfg.Directory(); dir != nil {
		generation = dir.View().Generation
	}
	return &wire.Preface{ProtocolMin: wire.ProtocolMin, ProtocolMax: wire.ProtocolMax, ClusterId: cluster[:], Generation: generation, Incarnation: s.cfg.Incarnation}
}

func (s *Service) checkPreface(conn *wire.Conn) error {
	theirs, err := wire.Expect[*wire.Preface](conn)
	if err != nil {
		return err
	}
	if _, err := wire.Negotiate(theirs); err != nil {
		return err
	}
	var cluster ids.Cluster
	if err := wire.DecodeID(theirs.GetClusterId(), &cluster); err != nil || cluster != s.cfg.Cluster {
		return fault.New(fault.Denied, "handover.checkPreface", "the relay belongs to cluster %s, this one to %s", cluster, s.cfg.Cluster)
	}
	return nil
}
