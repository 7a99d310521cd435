package handover

import (
	"context"
	"crypto/tls"
	"errors"
	"io"
	"net"
	"sync"
	"time"

	"google.golang.org/protobuf/proto"

	"github.com/relais-mta/relais/relay"
	"github.com/relais-mta/relais/relay/queue"
	"github.com/relais-mta/relais/shared/fault"
	"github.com/relais-mta/relais/shared/ids"
	"github.com/relais-mta/relais/shared/pki"
	"github.com/relais-mta/relais/shared/wire"
)

// taker is the session of one relay that gives mail to this one. There is one at
// a time for each: a new one ends the one before and waits until nothing more
// can come of it, so that what it answers is the last word.
type taker struct {
	number uint64
	conn   net.Conn
	peer   ids.Node
	done   chan struct{}
}

// Serve takes mail of other relays that connect to l, until Shutdown.
func (s *Service) Serve(l net.Listener) error {
	config := pki.ServerConfig(s.cfg.Holder, pki.Peer{Cluster: s.cfg.Cluster, Role: pki.RoleRelay}, wire.ALPNHandover)
	for {
		raw, err := l.Accept()
		if err != nil {
			if errors.Is(err, net.ErrClosed) {
				return nil
			}
			return fault.Wrap(err, fault.Unavailable, "handover.Serve", "no more connections are accepted at %s", l.Addr())
		}
		if !s.admit(raw) {
			_ = raw.Close() // nothing was said yet
			continue
		}
		go func() {
			defer s.serving.Done()
			defer s.release(raw)
			err := s.serve(tls.Server(raw, config))
			if err != nil && !errors.Is(err, io.EOF) && !errors.Is(err, net.ErrClosed) {
				s.log.Warn("a session of a relay that hands over mail failed", "remote", raw.RemoteAddr().String(), "error", err)
			}
		}()
	}
}

func (s *Service) admit(conn net.Conn) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.closed || len(s.conns) >= maxTaking {
		return false
	}
	s.conns[conn] = struct{}{}
	s.serving.Add(1)
	return true
}

func (s *Service) release(conn net.Conn) {
	_ = conn.Close() // it may be closed already
	s.mu.Lock()
	defer s.mu.Unlock()
	delete(s.conns, conn)
}

// Shutdown ends the sessions of those who give to this relay, and returns when
// what they sent is either taken or not. Its listeners must be closed.
func (s *Service) Shutdown(ctx context.Context) error {
	s.mu.Lock()
	s.closed = true
	for conn := range s.conns {
		_ = conn.Close() // its goroutine ends by it
	}
	s.mu.Unlock()
	done := make(chan struct{})
	go func() {
		s.serving.Wait()
		close(done)
	}()
	select {
	case <-done:
		return nil
	case <-ctx.Done():
		return ctx.Err()
	}
}

// isPeer makes sure that the other side is a relay of the view, the one that is
// wanted unless that is zero.
func (s *Service) isPeer(conn *tls.Conn, want ids.Node) error {
	const op = "handover.isPeer"
	leaf := conn.ConnectionState().PeerCertificates[0]
	identity, err := pki.CertIdentity(leaf)
	if err != nil {
		return err
	}
	if !want.IsZero() && identity.Node != want {
		return fault.New(fault.Denied, op, "the machine there is relay %s", identity.Node)
	}
	dir := s.cfg.Directory()
	if dir == nil {
		return fault.New(fault.Unavailable, op, "this relay has no policy yet")
	}
	peer, known := dir.Peer(identity.Node)
	pin := pki.PinOf(leaf)
	switch {
	case !known:
		return fault.New(fault.Denied, op, "relay %s is not in the cluster, or was put out of it", identity.Node)
	case len(peer.KeyPin) > 0 && string(peer.KeyPin) != string(pin[:]):
		return fault.New(fault.Denied, op, "relay %s has another key by now", identity.Node)
	}
	return nil
}

// dropStrangers ends sessions with relays that were put out of the cluster.
func (s *Service) dropStrangers() {
	dir := s.cfg.Directory()
	if dir == nil {
		return
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	for node, t := range s.takers {
		if _, known := dir.Peer(node); !known {
			_ = t.conn.Close() // its goroutine ends by it
		}
	}
	for _, w := range s.workers {
		w.poke() // it looks by itself
	}
}

// serve is one session.
func (s *Service) serve(conn *tls.Conn) error {
	ctx, cancel := context.WithTimeout(context.Background(), handshakeTimeout)
	err := conn.HandshakeContext(ctx)
	cancel()
	if err != nil {
		return fault.Wrap(err, fault.Denied, "handover.serve", "no session with %s", conn.RemoteAddr())
	}
	w := wire.NewConn(timed{conn}, wire.MaxFrameBytes)
	t, err := s.open(conn, w)
	if err != nil {
		_ = w.Send(wire.NewError(err)) // it may be gone
		return err
	}
	s.log.Info("a relay hands over mail", "relay", t.peer, "remote", conn.RemoteAddr().String())
	answers := make(chan func() (proto.Message, error), maxBatches)
	sent := make(chan error, 1)
	go func() { sent <- reply(conn, w, answers) }()
	err = s.listen(conn, t, answers)
	close(answers)
	failed := <-sent // every message is stored or not by then
	s.mu.Lock()
	if s.takers[t.peer] == t {
		delete(s.takers, t.peer)
	}
	s.mu.Unlock()
	close(t.done)
	if failed != nil {
		return failed
	}
	return err
}

// open takes the giver's greeting, and the place of its session of before.
func (s *Service) open(conn *tls.Conn, w *wire.Conn) (*taker, error) {
	const op = "handover.open"
	if err := s.checkPreface(w); err != nil {
		return nil, err
	}
	open, err := wire.Expect[*wire.HandoverOpen](w)
	if err != nil {
		return nil, err
	}
	if err := s.isPeer(conn, ids.Node{}); err != nil {
		return nil, err
	}
	identity, err := pki.CertIdentity(conn.ConnectionState().PeerCertificates[0])
	if err != nil {
		return nil, err
	}
	t := &taker{number: open.GetSession(), conn: conn, peer: identity.Node, done: make(chan struct{})}
	s.mu.Lock()
	before := s.takers[t.peer]
	if t.number <= s.last[t.peer] {
		s.mu.Unlock()
		return nil, fault.New(fault.Conflict, op, "relay %s has opened a newer session", t.peer)
	}
	s.last[t.peer], s.takers[t.peer] = t.number, t
	s.mu.Unlock()
	if before != nil {
		_ = before.conn.Close() // its goroutine ends by it
		<-before.done
	}
	if err = w.Send(s.preface()); err == nil {
		err = w.Send(&wire.HandoverReady{MaxBatches: maxBatches})
	}
	if err != nil {
		s.mu.Lock()
		if s.takers[t.peer] == t {
			delete(s.takers, t.peer)
		}
		s.mu.Unlock()
		close(t.done)
	}
	return t, err
}

// reply sends the answers in the order of the questions.
func reply(conn net.Conn, w *wire.Conn, answers <-chan func() (proto.Message, error)) (failed error) {
	for answer := range answers {
		message, err := answer() // also after a failure: it waits for what was begun
		if failed != nil {
			continue
		}
		if failed = err; failed == nil {
			failed = w.Send(message)
		}
		if failed != nil {
			_ = conn.Close() // ends listen
		}
	}
	return failed
}

// listen reads what the giver says until it ends the session.
func (s *Service) listen(conn net.Conn, t *taker, answers chan<- func() (proto.Message, error)) error {
	in := wire.NewConn(readWriter{patient{conn}, conn}, wire.MaxFrameBytes)
	for {
		message, err := in.Receive()
		if err != nil {
			return err
		}
		switch m := message.(type) {
		case *wire.HandoverAsk:
			transfers, err := decodeTransfers(m.GetTransfers())
			if err != nil {
				return err
			}
			answers <- func() (proto.Message, error) {
				has, err := s.cfg.Queue.Has(t.peer, transfers)
				return &wire.HandoverHas{Has: has}, err
			}
		case *wire.HandoverForget:
			transfers, err := decodeTransfers(m.GetTransfers())
			if err != nil {
				return err
			}
			answers <- func() (proto.Message, error) {
				return &wire.HandoverForgotten{}, s.cfg.Queue.Forget(t.peer, transfers)
			}
		case *wire.HandoverBatch:
			batch, err := s.receive(in, t, m)
			if batch != nil {
				answers <- batch.answer
			}
			if err != nil {
				return err
			}
		default:
			return fault.New(fault.Invalid, "handover.listen", "the relay sent a %T", message)
		}
	}
}

// readWriter reads and writes different things.
type readWriter struct {
	io.Reader
	io.Writer
}

// patient waits longer than a giver is silent.
type patient struct{ net.Conn }

func (p patient) Read(b []byte) (int, error) {
	if err := p.SetReadDeadline(time.Now().Add(2*idleTime + frameTimeout)); err != nil {
		return 0, err
	}
	return p.Conn.Read(b)
}

// batch is on its way into the queue.
type batch struct {
	number  uint64
	left    sync.WaitGroup
	mu      sync.Mutex
	refused []*wire.HandoverRefusal
	failed  error
}

// answer waits for the disk.
func (b *batch) answer() (proto.Message, error) {
	b.left.Wait()
	return &wire.HandoverTaken{Number: b.number, Refused: b.refused}, b.failed
}

// receive reads the messages of a batch. The batch must be answered, or waited
// for, also when there is an error.
func (s *Service) receive(in *wire.Conn, t *taker, m *wire.HandoverBatch) (*batch, error) {
	const op = "handover.receive"
	if m.GetMessages() == 0 || m.GetMessages() > wire.MaxHandoverMessages {
		return nil, fault.New(fault.Invalid, op, "a batch of %d messages", m.GetMessages())
	}
	b := &batch{number: m.GetNumber()}
	data := &dataReader{conn: in}
	records := queue.NewParcelReader(data)
	giver := queue.Giver{Node: t.peer, Accept: s.accepts}
	if dir := s.cfg.Directory(); dir != nil {
		giver.Revision = dir.View().Revision
	}
	for i := range m.GetMessages() {
		b.left.Add(1)
		err := s.cfg.Queue.Receive(records, giver, func(_ queue.Transfer, err error) {
			b.ended(s, i, err)
			b.left.Done()
		})
		if err != nil {
			b.left.Done()
			b.mu.Lock()
			b.failed = err // the batch has no answer: the giver asks in its next session
			b.mu.Unlock()
			return b, err
		}
	}
	return b, data.end()
}

// ended books what became of one message.
func (b *batch) ended(s *Service, index uint32, err error) {
	if err == nil {
		s.metrics.taken.Inc()
		return
	}
	reason, ok := reasonOf(err)
	b.mu.Lock()
	defer b.mu.Unlock()
	if !ok {
		b.failed = err // nobody knows whether it is on disk: no answer says anything about it
		return
	}
	b.refused = append(b.refused, &wire.HandoverRefusal{Index: index, Reason: reason, Text: fault.Public(err)})
}

// reasonOf says what a refusal is about. False: it is none, the disk failed.
func reasonOf(err error) (wire.HandoverRefusal_Reason, bool) {
	switch {
	case errors.Is(err, errPool):
		return wire.HandoverRefusal_REASON_POOL, true
	case errors.Is(err, errRelay), fault.Is(err, fault.NoSpace), fault.Is(err, fault.Exhausted):
		return wire.HandoverRefusal_REASON_RELAY, true
	case fault.Is(err, fault.Conflict), fault.Is(err, fault.Denied), fault.Is(err, fault.Invalid), fault.Is(err, fault.TooLarge):
		return wire.HandoverRefusal_REASON_MESSAGE, true
	}
	return wire.HandoverRefusal_REASON_UNSPECIFIED, false
}

// Causes of refusals that are not about one message.
var (
	errPool  = errors.New("pool")
	errRelay = errors.New("relay")
)

// accepts says why a message is not taken from another relay; nil: it is.
func (s *Service) accepts(env *relay.Envelope) error {
	const op = "handover.accepts"
	if why := s.cfg.Closed(); why != "" {
		return fault.Wrap(errRelay, fault.Denied, op, "%s", why)
	}
	dir := s.cfg.Directory()
	if dir == nil {
		return fault.Wrap(errRelay, fault.Denied, op, "the relay has no policy yet")
	}
	if dir.View().Draining {
		return fault.Wrap(errRelay, fault.Denied, op, "the relay drains")
	}
	if !s.cfg.Usable(env.Pool) {
		name := env.Pool.String()
		if pool, known := dir.Pool(env.Pool); known {
			name = pool.Name
		}
		return fault.Wrap(errPool, fault.Denied, op, "the relay has no source address of pool %s that it may use", name)
	}
	return nil
}

// dataReader reads the HandoverData of a batch.
type dataReader struct {
	conn *wire.Conn
	rest []byte
	last bool
}

func (d *dataReader) Read(p []byte) (int, error) {
	for len(d.rest) == 0 {
		if d.last {
			return 0, io.EOF
		}
		data, err := wire.Expect[*wire.HandoverData](d.conn)
		if err != nil {
			return 0, err
		}
		d.rest, d.last = data.GetData(), data.GetLast()
	}
	n := copy(p, d.rest)
	d.rest = d.rest[n:]
	return n, nil
}

// end makes sure that nothing is left of the batch.
func (d *dataReader) end() error {
	var one [1]byte
	if n, err := d.Read(one[:]); n > 0 || !errors.Is(err, io.EOF) {
		return fault.Wrap(err, fault.Invalid, "handover.receive", "there is more behind the last message of a batch")
	}
	return nil
}
