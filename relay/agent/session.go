package agent

import (
	"context"
	"errors"
	"io"
	"math/rand/v2"
	"slices"
	"sync"
	"time"

	"golang.org/x/sync/errgroup"
	"google.golang.org/protobuf/proto"

	"github.com/relais-mta/relais/shared/fault"
	"github.com/relais-mta/relais/shared/ids"
	"github.com/relais-mta/relais/shared/link"
	"github.com/relais-mta/relais/shared/pki"
	"github.com/relais-mta/relais/shared/wire"
)

const (
	minBackoff        = 250 * time.Millisecond
	maxBackoff        = 30 * time.Second
	pendingBackoff    = 2 * time.Second  // of a relay that an operator has to accept
	helloTimeout      = 10 * time.Second // for the exchange that opens a session
	viewTimeout       = 2 * time.Minute  // for one view, 64 MiB at most
	ackTimeout        = 10 * time.Second
	minReportInterval = 100 * time.Millisecond
	maxReportInterval = time.Minute
	missedReports     = 3 // unanswered in a row: the session is dead
	maxLocalAddresses = 4096
)

// errRedirected ends a session whose server named others.
var errRedirected = errors.New("redirected")

// linkLoop holds one session at a time, whatever happens, until ctx ends.
func (a *Agent) linkLoop(ctx context.Context) {
	var preferred []string
	backoff := minBackoff
	for turn := rand.IntN(maxServers); ctx.Err() == nil; turn++ {
		servers := a.servers()
		address := servers[turn%len(servers)]
		if len(preferred) > 0 {
			address, preferred = preferred[0], preferred[1:]
		}
		select {
		case <-a.renewed: // before this try: it says nothing about the next
		default:
		}
		s := &session{agent: a, address: address}
		err := s.run(ctx)
		if a.noteEviction(err) {
			return
		}
		a.renewRefused(err)
		a.lost(err)
		if ctx.Err() != nil {
			return
		}
		if s.welcomed {
			backoff = minBackoff
		}
		if errors.Is(err, errRedirected) {
			preferred = s.redirect
		}
		if closed, ok := link.ClosedByPeer(err); fault.Is(err, fault.Denied) || ok && closed.Code == link.CodeDenied {
			backoff = maxBackoff // nothing changes until an operator acts
		} else if ok && closed.Code == link.CodePending {
			backoff = pendingBackoff // an operator is about to act
		}
		wait := jitter(backoff)
		a.options.Logger.Warn("no link to control", "server", address, "error", err, "retry_in", wait.String())
		pause := time.NewTimer(wait)
		select {
		case <-pause.C:
		case <-a.renewed: // what was refused may be accepted now
			pause.Stop()
		case <-ctx.Done():
			pause.Stop()
		}
		backoff = min(2*backoff, maxBackoff)
	}
}

// jitter spreads d over half to one and a half of it, so that relays that lost
// one server do not come back in step.
func jitter(d time.Duration) time.Duration { return d/2 + rand.N(d) }

// servers returns the addresses to try.
func (a *Agent) servers() []string {
	if len(a.options.Servers) > 0 {
		return a.options.Servers
	}
	return a.Membership().Servers
}

func (a *Agent) lost(err error) {
	a.mu.Lock()
	defer a.mu.Unlock()
	a.connected = false
	// A server refuses with a conflict for this reason alone. Other failures after
	// it, such as a server that is down, say nothing about the copy.
	a.copied = a.copied || fault.Is(err, fault.Conflict)
	if err != nil {
		a.linkProblem = "no link to control: " + describe(err)
	}
}

// describe returns the words of err for people, without its inner causes.
func describe(err error) string {
	var closed *link.CloseError
	if errors.As(err, &closed) {
		return closed.Error()
	}
	if errors.Is(err, errRedirected) {
		return "the server named others"
	}
	return fault.Public(err)
}

func (a *Agent) heard() {
	a.mu.Lock()
	defer a.mu.Unlock()
	a.lastContact = time.Now()
}

// session is one connection to one server.
type session struct {
	agent    *Agent
	address  string
	link     link.Session
	stream   link.Stream // of control
	control  *wire.Conn
	interval time.Duration // between reports
	welcomed bool
	redirect []string
	pongs    chan *wire.Pong
	sending  sync.Mutex // of control
	pulse    pulse
	probes   bool          // the server answers probes
	quota    bool          // the server passes messages to the leader
	answered time.Duration // how long its first answer took
}

// send sends on the control stream, where reports and answers meet.
func (s *session) send(message proto.Message) error {
	s.sending.Lock()
	defer s.sending.Unlock()
	return s.control.Send(message)
}

// run opens the session and works on it until it ends; the error says why.
func (s *session) run(ctx context.Context) error {
	a := s.agent
	peer := pki.Peer{Cluster: a.Membership().Cluster, Role: pki.RoleControl}
	var err error
	if s.link, err = a.dialer.Dial(ctx, s.address, pki.ClientConfig(a.holder, peer, wire.ALPNLink)); err != nil {
		return err
	}
	err = s.work(ctx)
	if errors.Is(err, errSilent) {
		a.dialer.NoteSilence()
	}
	code := link.CodeDone
	if ctx.Err() != nil {
		code = link.CodeStopping
	}
	if reason := s.link.Err(); reason != nil {
		err = preferReason(err, reason)
	}
	s.link.Close(code, "")
	return err
}

// preferReason keeps a refusal that the server put in a frame, and otherwise
// tells why the session ended instead of which stream noticed first.
func preferReason(err, reason error) error {
	var refused *fault.Error
	var closed *link.CloseError
	switch {
	case errors.Is(err, errRedirected), errors.As(err, &refused) && refused.Op == wire.PeerOp:
		return err
	case errors.As(reason, &closed) && !closed.Remote: // that was us, because of err
		return err
	}
	return reason
}

func (s *session) work(ctx context.Context) error {
	stream, err := s.link.OpenStream(ctx)
	if err != nil {
		return err
	}
	defer stream.Close()
	stream.SetPriority(link.PriorityControl)
	s.stream = stream
	s.control = wire.NewConn(listening{stream, &s.pulse}, wire.MaxFrameBytes)
	if err := stream.SetDeadline(time.Now().Add(helloTimeout)); err != nil {
		return err
	}
	if err := s.hello(); err != nil {
		return err
	}
	if err := stream.SetDeadline(time.Time{}); err != nil {
		return err
	}
	s.pongs = make(chan *wire.Pong, 1)
	group, ctx := errgroup.WithContext(ctx)
	group.Go(func() error { return s.receive() })
	group.Go(func() error { return s.report(ctx, stream) })
	group.Go(func() error { return s.acceptStreams(ctx) })
	group.Go(func() error { return s.watchTrust(ctx) })
	if s.quota {
		s.agent.quotaLink(s)
		defer s.agent.quotaLink(nil)
	}
	if s.probes { // a server of a release before does not, and is judged by the reports alone
		s.pulse.begin(s.agent.lookPeriod, s.answered, func() error { return s.probe(stream) })
		group.Go(func() error { return s.pulse.watch(ctx) })
		group.Go(func() error { return s.pulse.speak(ctx) })
	}
	group.Go(func() error {
		select {
		case <-ctx.Done():
		case <-s.link.Done():
		}
		err := s.link.Err()
		s.link.Close(link.CodeDone, "") // frees the others from their reads
		if err == nil {
			err = ctx.Err()
		}
		return err
	})
	return group.Wait()
}

// probe asks the server whether it is there. Any byte of its is an answer.
func (s *session) probe(stream link.Stream) error {
	if err := stream.SetWriteDeadline(time.Now().Add(maxReportInterval)); err != nil {
		return err
	}
	return s.send(&wire.Probe{Nonce: rand.Uint64()})
}

// hello introduces the relay and learns whether the server takes it.
func (s *session) hello() error {
	a := s.agent
	member := a.Membership()
	begun := time.Now()
	if err := s.control.Send(&wire.Preface{
		ProtocolMin: wire.ProtocolMin, ProtocolMax: wire.ProtocolMax, ClusterId: member.Cluster[:], Generation: member.Generation,
		Capabilities: wire.CapabilityProbe | wire.CapabilityDelta | wire.CapabilityQuota, Incarnation: a.incarnation, BootNonce: a.bootNonce[:], Version: a.options.Version,
	}); err != nil {
		return err
	}
	theirs, err := wire.Expect[*wire.Preface](s.control)
	if err != nil {
		return err
	}
	s.answered, s.probes = time.Since(begun), theirs.GetCapabilities()&wire.CapabilityProbe != 0
	s.quota = theirs.GetCapabilities()&wire.CapabilityQuota != 0
	if err := s.checkPreface(theirs, member); err != nil {
		return err
	}
	addresses := a.options.LocalAddresses()
	greeting := &wire.Hello{LocalAddresses: wire.EncodeAddresses(addresses[:min(len(addresses), maxLocalAddresses)])}
	if a.options.Handover != nil {
		greeting.HandoverAddress = a.options.Handover()
	}
	if held := a.current.Load(); held != nil {
		greeting.Held = &wire.Revision{Generation: held.generation, Index: held.revision}
		greeting.HeldSha256 = held.sum[:]
	}
	if err := s.control.Send(greeting); err != nil {
		return err
	}
	answer, err := s.control.Receive()
	if err != nil {
		return err
	}
	switch m := answer.(type) {
	case *wire.Welcome:
		s.welcome(m)
		return nil
	case *wire.Redirect:
		return s.redirected(m)
	case *wire.Error:
		return m.Fault()
	}
	return fault.New(fault.Invalid, "agent.hello", "the server answered with a %T", answer)
}

func (s *session) checkPreface(theirs *wire.Preface, member Membership) error {
	const op = "agent.checkPreface"
	if _, err := wire.Negotiate(theirs); err != nil {
		return err
	}
	var cluster ids.Cluster
	if err := wire.DecodeID(theirs.GetClusterId(), &cluster); err != nil || cluster != member.Cluster {
		return fault.New(fault.Denied, op, "the server at %s serves cluster %s, this relay belongs to %s", s.address, cluster, member.Cluster)
	}
	if theirs.GetGeneration() < member.Generation {
		return fault.New(fault.Denied, op, "the server at %s is of generation %d, the cluster has reached %d: it is a leftover of before a restore", s.address, theirs.GetGeneration(), member.Generation)
	}
	return nil
}

func (s *session) welcome(m *wire.Welcome) {
	a := s.agent
	s.welcomed = true
	s.interval = min(max(time.Duration(m.GetReportIntervalMs())*time.Millisecond, minReportInterval), maxReportInterval)
	a.noteServers(m.GetServers())
	a.mu.Lock()
	a.connected, a.server, a.transport, a.lastContact, a.linkProblem = true, s.address, s.link.Transport(), time.Now(), ""
	a.copied = false
	a.mu.Unlock()
	a.metrics.sessions.Inc()
	a.options.Logger.Info("linked to control", "server", s.address, "transport", s.link.Transport(), "state", m.GetState())
}

func (s *session) redirected(m *wire.Redirect) error {
	for _, address := range m.GetServers()[:min(len(m.GetServers()), maxServers)] {
		if link.CheckAddress(address) == nil {
			s.redirect = append(s.redirect, address)
		}
	}
	return errRedirected
}

// receive reads the control stream.
func (s *session) receive() error {
	for {
		message, err := s.control.Receive()
		if errors.Is(err, io.EOF) {
			return fault.Wrap(io.ErrUnexpectedEOF, fault.Unavailable, "agent.receive", "the server at %s closed the control stream", s.address)
		}
		if err != nil {
			return err
		}
		switch m := message.(type) {
		case *wire.Pong:
			select {
			case s.pongs <- m:
			default: // an answer that nobody waits for
			}
		case *wire.Probe:
			if err := s.send(&wire.ProbeReply{Nonce: m.GetNonce()}); err != nil {
				return err
			}
		case *wire.ProbeReply: // its bytes have said that the server lives
		case *wire.QuotaDown:
			if err := s.agent.quotaDown(m); err != nil {
				return err
			}
		case *wire.Welcome: // other servers than before
			s.agent.noteServers(m.GetServers())
		case *wire.Redirect:
			return s.redirected(m)
		case *wire.Error:
			return m.Fault()
		default:
			return fault.New(fault.Invalid, "agent.receive", "the server sent a %T on the control stream", message)
		}
		s.agent.heard()
	}
}

// report sends a report at each interval and watches that answers come.
func (s *session) report(ctx context.Context, stream link.Stream) error {
	ticker := time.NewTicker(s.interval)
	defer ticker.Stop()
	var nonce uint64
	var sent time.Time
	news := false // to be told before the interval is over
	for unanswered := 0; ; {
		changed := s.agent.trustChange()
		if unanswered == missedReports {
			return fault.New(fault.Timeout, "agent.report", "the server at %s left %d reports unanswered", s.address, missedReports)
		}
		nonce, sent = nonce+1, time.Now()
		if err := stream.SetWriteDeadline(sent.Add(maxReportInterval)); err != nil {
			return err
		}
		if err := s.send(s.newReport(nonce, sent)); err != nil {
			return err
		}
		unanswered++
		for waiting := true; waiting; waiting = waiting && !(news && unanswered == 0) {
			select {
			case <-changed:
				news, changed = true, nil
			case pong := <-s.pongs:
				if pong.GetNonce() == nonce {
					unanswered = 0
					s.measure(pong, sent)
				}
			case <-ticker.C:
				waiting = false
			case <-ctx.Done():
				return ctx.Err()
			}
		}
		news = false
	}
}

// measure compares the clocks; the answer was made about half a round trip ago.
func (s *session) measure(pong *wire.Pong, sent time.Time) {
	now := time.Now()
	middle := sent.Add(now.Sub(sent) / 2)
	a := s.agent
	a.mu.Lock()
	defer a.mu.Unlock()
	a.offset, a.offsetKnown = time.UnixMilli(pong.GetServerTimeMs()).Sub(middle), true
}

func (s *session) newReport(nonce uint64, now time.Time) *wire.Report {
	a := s.agent
	load := a.options.Load()
	report := &wire.Report{
		Nonce: nonce, SentTimeMs: now.UnixMilli(),
		WaitingRecipients: load.WaitingRecipients, InFlightRecipients: load.InFlightRecipients, HeldRecipients: load.HeldRecipients,
		QueueBytes: load.QueueBytes, FreeBytes: load.FreeBytes, Problems: load.Problems, Handover: load.Handover,
		LeafIssuer: pki.IssuerKeyID(a.holder.Leaf()), Reflexes: load.Reflexes, Left: load.Left,
	}
	sum := pki.BundleSum(a.holder.Bundle())
	report.BundleSha256 = sum[:]
	held := a.current.Load()
	if held == nil {
		return report
	}
	report.Applied = &wire.Revision{Generation: held.generation, Index: held.revision}
	present := a.options.LocalAddresses()
	view := held.directory.View()
	for i := range view.Sources {
		source := &view.Sources[i]
		if source.Owner == view.Node {
			report.Sources = append(report.Sources, &wire.HeldSource{SourceId: source.ID[:], Epoch: source.Epoch, Present: slices.Contains(present, source.Bind)})
		}
	}
	return report
}

// acceptStreams runs the streams that the server opens.
func (s *session) acceptStreams(ctx context.Context) error {
	for {
		stream, err := s.link.AcceptStream(ctx)
		if err != nil {
			return err
		}
		if err := s.serveStream(stream); err != nil {
			return err
		}
	}
}

// serveStream receives views until the stream ends. Views come one after the
// other on one stream, so streams are served one after the other too.
func (s *session) serveStream(stream link.Stream) error {
	defer stream.Close()
	conn := wire.NewConn(listening{stream, &s.pulse}, wire.MaxFrameBytes)
	start, err := wire.Expect[*wire.StreamStart](conn)
	if err != nil {
		return err
	}
	if start.GetPurpose() != wire.Purpose_PURPOSE_VIEW {
		return nil // of a newer server; closing the stream says that we do not know it
	}
	for {
		if err := stream.SetReadDeadline(time.Time{}); err != nil {
			return err
		}
		message, err := conn.Receive()
		if errors.Is(err, io.EOF) {
			return nil
		}
		if err != nil {
			return err
		}
		if err := stream.SetReadDeadline(time.Now().Add(viewTimeout)); err != nil {
			return err
		}
		switch begin := message.(type) {
		case *wire.ViewBegin:
			err = s.receiveView(stream, conn, begin)
		case *wire.DeltaBegin:
			err = s.receiveDelta(stream, conn, begin)
		default:
			err = fault.New(fault.Invalid, "agent.serveStream", "the server sent a %T where a view was due", message)
		}
		if err != nil {
			return err
		}
	}
}

// receiveView takes one view and answers with Ack or Nack.
func (s *session) receiveView(stream link.Stream, conn *wire.Conn, begin *wire.ViewBegin) error {
	encoded, err := wire.ReceiveView(conn, begin)
	if err != nil {
		return err
	}
	return s.useView(stream, conn, begin.GetRevision(), encoded)
}

// useView puts a view in use, if it is good, and answers.
func (s *session) useView(stream link.Stream, conn *wire.Conn, revision *wire.Revision, encoded []byte) error {
	a := s.agent
	a.heard()
	err := a.apply(encoded, revision)
	// Not before: a large view on a slow disk may take longer than its answer may.
	if err := stream.SetWriteDeadline(time.Now().Add(ackTimeout)); err != nil {
		return err
	}
	a.mu.Lock()
	a.viewProblem = ""
	if err != nil {
		a.viewProblem = "the newest policy is refused: " + fault.Public(err)
	}
	a.mu.Unlock()
	log := a.options.Logger.With("generation", revision.GetGeneration(), "revision", revision.GetIndex(), "bytes", len(encoded))
	if err != nil {
		log.Error("policy refused, the last good one stays in use", "error", err)
		a.metrics.views.WithLabelValues("refused").Inc()
		return conn.Send(&wire.Nack{Revision: revision, Error: wire.NewError(err)})
	}
	log.Info("policy in use")
	a.metrics.views.WithLabelValues("applied").Inc()
	return conn.Send(&wire.Ack{Revision: revision})
}
