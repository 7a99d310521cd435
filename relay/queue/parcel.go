package queue

import (
	"bufio"
	"bytes"
	"context"
	"encoding/binary"
	"io"
	"slices"

	"github.com/relais-mta/relais/relay"
	"github.com/relais-mta/relais/relay/outbox"
	"github.com/relais-mta/relais/relay/store"
	"github.com/relais-mta/relais/shared/fault"
	"github.com/relais-mta/relais/shared/ids"
)

// classMoved is the class of the events of mail that goes from relay to relay.
const classMoved = "handover"

// A Parcel is a message on its way to another relay: all that is left of it is
// in the caller's hands, until Moved, TakeBack or TakeBackInDoubt ends that.
type Parcel struct {
	Env      *relay.Envelope
	states   map[uint16]relay.RecipientState // that are stored, final ones included
	firstDue int64
	works    []*Work
	to       ids.Node // zero: not offered yet
	gone     bool     // the other relay has it for certain
}

// Transfer names the way that the parcel goes.
func (p *Parcel) Transfer() Transfer { return Transfer{p.Env.ID, p.Env.Hops + 1} }

// Gone reports whether it is known already that the other relay has it.
func (p *Parcel) Gone() bool { return p.gone }

// Recipients counts those that are not final.
func (p *Parcel) Recipients() int {
	n := 0
	for _, w := range p.works {
		n += len(w.Recipients)
	}
	return n
}

// Claim takes up to most messages from the work queues named, with everything
// that is left of each, waiting or held, due or not. Those that fit refuses,
// and those of which a recipient is being tried, stay. held also looks for
// messages of which nothing waits. drained reports that the queues hold nothing
// else that fits.
func (q *Queue) Claim(numbers []Number, held bool, most int, fit func(*relay.Envelope) bool) (parcels []*Parcel, drained bool, err error) {
	snap, err := q.settledSnapshot()
	if err != nil {
		return nil, false, err
	}
	defer snap.Close()
	c := claim{q: q, snap: snap, most: most, fit: fit, seen: make(map[ids.Message]struct{})}
	for _, n := range numbers {
		if err := c.waiting(n); err != nil {
			return nil, false, err
		}
	}
	if held && len(c.targets) < most {
		if err := c.held(); err != nil {
			return nil, false, err
		}
	}
	drained = len(c.targets) < most
	slices.SortFunc(c.targets, func(a, b *target) int { return bytes.Compare(a.env.ID[:], b.env.ID[:]) })
	f := Filter{Chosen: []Chosen{}}
	works, _, err := q.seize(&f, c.targets)
	if err != nil {
		return nil, false, err
	}
	return q.parcels(c.targets, works), drained, nil
}

// claim looks for messages to take.
type claim struct {
	q       *Queue
	snap    *store.Snapshot
	most    int
	fit     func(*relay.Envelope) bool
	seen    map[ids.Message]struct{}
	targets []*target
}

// consider adds a message, if it may be taken, and reports whether there is
// room for another.
func (c *claim) consider(id ids.Message) (more bool, err error) {
	if _, again := c.seen[id]; again {
		return true, nil
	}
	c.q.mu.Lock()
	m := c.q.live[id]
	aloft := m != nil && m.flying > 0
	c.q.mu.Unlock()
	if aloft {
		return true, nil
	}
	c.seen[id] = struct{}{}
	t := &target{}
	found, err := c.q.readTarget(c.snap, t, id)
	if err != nil || !found || !c.fit(t.env) {
		return true, err
	}
	c.targets = append(c.targets, t)
	return len(c.targets) < c.most, nil
}

// waiting looks at what waits in one work queue.
func (c *claim) waiting(n Number) error {
	if len(c.targets) >= c.most {
		return nil
	}
	c.q.mu.Lock()
	wq := c.q.byNumber[n]
	var floor int64
	if wq != nil {
		floor = wq.floor
	}
	c.q.mu.Unlock()
	if wq == nil {
		return nil
	}
	var inner error
	err := c.snap.Iterate(store.AppendWaitingPrefix(nil, uint32(n)), store.AppendWaitingKey(nil, uint32(n), floor, ids.Message{}, 0), true, func(k, _ []byte) bool {
		_, _, id, _, ok := store.ParseWaitingKey(k)
		if !ok {
			return true
		}
		var more bool
		more, inner = c.consider(id)
		return more && inner == nil
	})
	if err == nil {
		err = inner
	}
	return err
}

// held looks at what is held, by hand or by a rule.
func (c *claim) held() error {
	var inner error
	err := c.snap.Iterate([]byte{store.SpaceHeld}, nil, true, func(k, _ []byte) bool {
		_, id, _, ok := store.ParseHeldKey(k)
		if !ok {
			return true
		}
		var more bool
		more, inner = c.consider(id)
		return more && inner == nil
	})
	if err == nil {
		err = inner
	}
	return err
}

// parcels makes parcels of works, which stand by message; what is not all of
// its message goes back.
func (q *Queue) parcels(targets []*target, works []*Work) []*Parcel {
	byID := make(map[ids.Message]*Parcel, len(targets))
	for _, t := range targets {
		byID[t.env.ID] = &Parcel{Env: t.env, states: t.states, firstDue: t.firstDue}
	}
	for _, w := range works {
		p := byID[w.msg.id]
		p.works = append(p.works, w)
	}
	var out []*Parcel
	var back []*Work
	q.mu.Lock()
	for _, t := range targets {
		p := byID[t.env.ID]
		switch {
		case len(p.works) == 0:
		case p.works[0].msg.open() == p.Recipients():
			out = append(out, p)
		default: // others of its recipients are being tried
			back = append(back, p.works...)
		}
	}
	q.mu.Unlock()
	q.returnAll(back)
	return out
}

// Offer records that parcels are about to be offered to a relay. Only when it
// has returned nil may any of them be sent: from then on nobody else may have
// them until that relay has said whether it took them.
func (q *Queue) Offer(peer ids.Node, parcels []*Parcel) error {
	b := q.st.NewBatch()
	now := q.cfg.Now()
	for _, p := range parcels {
		tr := p.Transfer()
		b.Set(store.AppendTransferKey(nil, store.SpaceGiven, peer, tr.Message, tr.Hop), appendGiven(nil, phaseOffered, now))
	}
	t := &q.transfers
	t.mu.Lock()
	for _, p := range parcels {
		t.giving[p.Env.ID] = peer // before it is durable: a message that comes back waits
	}
	t.mu.Unlock()
	if err := q.commit(b); err != nil {
		q.keep(parcels)
		return err
	}
	for _, p := range parcels {
		p.to = peer
	}
	return nil
}

// keep ends the way of parcels in memory.
func (q *Queue) keep(parcels []*Parcel) {
	t := &q.transfers
	t.mu.Lock()
	defer t.mu.Unlock()
	for _, p := range parcels {
		delete(t.giving, p.Env.ID)
	}
}

// Moved ends parcels that the relay they were offered to has on stable
// storage: nothing of them stays here but the memory that the other relay may
// forget where it has them from. On error they are still the caller's.
func (q *Queue) Moved(parcels []*Parcel) error {
	if len(parcels) == 0 {
		return nil
	}
	var ends []*ending
	now := q.cfg.Now()
	for _, p := range parcels {
		note := &Note{Class: classMoved, Text: "handed over to " + p.to.String()}
		for _, w := range p.works {
			ends = append(ends, &ending{w: w, results: movedResults(w, note)})
		}
	}
	wait := make(chan error, 1)
	q.commitEndingsWith(context.Background(), ends, func(b *store.Batch) {
		for _, p := range parcels {
			tr := p.Transfer()
			b.Set(store.AppendTransferKey(nil, store.SpaceGiven, p.to, tr.Message, tr.Hop), appendGiven(nil, phaseGone, now))
		}
	}, func(err error) { wait <- err })
	err := <-wait
	if fault.Is(err, fault.TooLarge) && len(parcels) > 1 {
		half := len(parcels) / 2
		if err = q.Moved(parcels[:half]); err == nil {
			err = q.Moved(parcels[half:])
		}
		return err
	}
	if err != nil {
		return err
	}
	t := &q.transfers
	t.mu.Lock()
	defer t.mu.Unlock()
	for _, p := range parcels {
		delete(t.giving, p.Env.ID)
		t.owe(p.to, p.Transfer())
	}
	return nil
}

func movedResults(w *Work, note *Note) []Result {
	out := make([]Result, 0, len(w.Recipients))
	for i := range w.Recipients {
		out = append(out, Result{Index: w.Recipients[i].Index, State: moved, Event: outbox.Moved, Phase: relay.PhaseLocal, Note: note})
	}
	return out
}

// TakeBack ends parcels that the other relay has not, by its own word: they
// wait here as before. On error they are still the caller's.
func (q *Queue) TakeBack(parcels []*Parcel) error {
	if err := q.unmark(parcels); err != nil {
		return err
	}
	for _, p := range parcels {
		q.returnAll(p.works)
	}
	return nil
}

func (q *Queue) unmark(parcels []*Parcel) error {
	b := q.st.NewBatch()
	for _, p := range parcels {
		if !p.to.IsZero() {
			tr := p.Transfer()
			b.Delete(store.AppendTransferKey(nil, store.SpaceGiven, p.to, tr.Message, tr.Hop))
		}
	}
	if b.Empty() {
		b.Abandon()
	} else if err := q.commit(b); err != nil {
		return err
	}
	q.keep(parcels)
	return nil
}

// EndOffers ends, before an export, what was offered to other relays when the last
// run ended: what is known to be there is gone from here, what may be there is in
// doubt. The relays are not asked. It must be called before Resumed.
func (q *Queue) EndOffers() error {
	for _, parcels := range q.Resumed() {
		var gone, open []*Parcel
		for _, p := range parcels {
			if p.gone {
				gone = append(gone, p)
			} else {
				open = append(open, p)
			}
		}
		if err := q.Moved(gone); err != nil {
			return err
		}
		if err := q.TakeBackInDoubt(open, "the queue was exported before it was asked"); err != nil {
			return err
		}
	}
	return nil
}

// TakeBackInDoubt ends parcels of which nobody will ever say whether the other
// relay has them; why is for people. What waits is in doubt as after a crash, tried
// again as policy says and counted.
func (q *Queue) TakeBackInDoubt(parcels []*Parcel, why string) error {
	for _, p := range parcels {
		for len(p.works) > 0 {
			if err := q.doubtWork(p.works[0], "it was offered to relay "+p.to.String()+", which may have it: "+why); err != nil {
				return err
			}
			p.works = p.works[1:]
		}
	}
	// Last: a crash before it makes them doubtful once more, none after it is lost.
	return q.unmark(parcels)
}

func (q *Queue) doubtWork(w *Work, why string) error {
	q.mu.Lock()
	pol := q.policy
	q.mu.Unlock()
	now := q.cfg.Now()
	var results, ended []Result
	for i := range w.Recipients {
		s := w.Recipients[i].State
		if s.State != relay.StateWaiting {
			continue
		}
		doubt(&s, &pol, now, w.Env.ExpiresAt, q.cfg.Undecided)
		s.LastReply = relay.Reply{Text: why}
		r := Result{Index: w.Recipients[i].Index, State: s, Event: outbox.InDoubt, Phase: relay.PhaseLocal}
		if s.State.Final() {
			r.Event = outbox.Unknown
			ended = append(ended, r)
		}
		results = append(results, r)
	}
	if len(results) == 0 {
		q.Return(w)
		return nil
	}
	var reports []Mail
	if len(ended) > 0 && q.cfg.Unconfirmed != nil {
		reports = q.cfg.Unconfirmed(w.Env, ended)
		for i := range results { // Unconfirmed may have named what the events say of telling
			at := slices.IndexFunc(ended, func(r Result) bool { return r.Index == results[i].Index })
			if at >= 0 {
				results[i] = ended[at]
			}
		}
	}
	wait := make(chan error, 1)
	q.Finish(w, nil, results, reports, func(err error) { wait <- err })
	err := <-wait
	if err == nil {
		q.metrics.inDoubt.Add(float64(len(results)))
	}
	return err
}

// ParcelWriter writes parcels as a stream of records, those of an export.
type ParcelWriter struct{ e exporter }

// NewParcelWriter writes to w.
func (q *Queue) NewParcelWriter(w io.Writer) *ParcelWriter {
	return &ParcelWriter{e: exporter{w: bufio.NewWriterSize(w, exportPieceBytes), q: q}}
}

// Check reads a parcel's body once and reports whether it can be sent.
func (q *Queue) Check(p *Parcel) error {
	if p.Env.Body.Kind == relay.BodyNone {
		return nil
	}
	body, err := q.st.OpenBody(p.Env.Body)
	if err != nil {
		return err
	}
	defer body.Close()
	return body.Verify()
}

// Write writes one parcel. After an error the stream is of no use.
func (w *ParcelWriter) Write(p *Parcel) error {
	e := &w.e
	value := appendEnvelope(nil, p.Env, p.Env.Body, p.firstDue)
	b := append(append(make([]byte, 0, len(value)+64), p.Env.ID[:]...), binary.BigEndian.AppendUint32(nil, uint32(len(value)))...)
	e.record(exportMessage, appendStates(append(b, value...), p.Env, p.states))
	if p.Env.Body.Kind == relay.BodyNone || e.err != nil {
		return e.err
	}
	body, err := e.q.st.OpenBody(p.Env.Body)
	if err != nil {
		return err
	}
	defer body.Close()
	e.body(body, p.Env.Body.Length)
	return e.err
}

// Flush sends what is still in the buffer.
func (w *ParcelWriter) Flush() error {
	if w.e.err == nil {
		w.e.err = w.e.w.Flush()
	}
	return w.e.err
}
