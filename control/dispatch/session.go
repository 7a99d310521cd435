package dispatch

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"math/rand/v2"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"google.golang.org/protobuf/proto"

	"github.com/relais-mta/relais/control"
	"github.com/relais-mta/relais/shared/fault"
	"github.com/relais-mta/relais/shared/ids"
	"github.com/relais-mta/relais/shared/link"
	"github.com/relais-mta/relais/shared/pki"
	"github.com/relais-mta/relais/shared/wire"
)

// session is the link with one relay.
type session struct {
	server   *Server
	link     link.Session
	node     ids.Node
	hello    Hello
	held     *wire.Hello
	log      *slog.Logger
	servers  []string      // link addresses the relay was told
	replaced chan struct{} // closed when the node has opened another session
	nonce    string        // of the relay's process, random at each start; empty: an old relay
	probes   bool          // the relay answers probes
	deltas   bool          // the relay takes deltas
	quota    bool          // the relay passes messages about what relays share
	downs    chan *wire.QuotaDown
	dropped  bool         // its certificate is of a CA that was dropped; of the loop that waits
	base     held         // the view that the relay holds; of the view loop
	heard    atomic.Int64 // when the relay said something, Unix nanoseconds
	replies  chan uint64  // nonces of answered probes
	probing  sync.Mutex   // one probe at a time
	began    time.Time
	ended    chan ending // gets the word that ends the session

	stream  link.Stream
	sending sync.Mutex // of control
	control *wire.Conn
}

// ending is why a session ends by the word of another part.
type ending struct {
	code link.Code
	text string
}

// finish ends the session; the first word counts.
func (n *session) finish(code link.Code, text string) {
	select {
	case n.ended <- ending{code, text}:
	default:
	}
}

// Link serves one relay's session until it ends.
func (s *Server) Link(ctx context.Context, conn link.Session) (link.Code, string) {
	n := &session{server: s, link: conn, replaced: make(chan struct{}), replies: make(chan uint64, 1), began: time.Now(), ended: make(chan ending, 1), downs: make(chan *wire.QuotaDown, maxQuotaWaiting)}
	if err := n.open(ctx); err != nil {
		s.config.Logger.Warn("link refused", "node", n.node.String(), "remote", conn.RemoteAddr().String(), "error", err)
		return n.refuse(err)
	}
	n.log.Info("relay linked", "version", n.hello.Version, "incarnation", n.hello.Incarnation, "held_revision", n.hello.Revision)
	code, text := n.work(ctx)
	s.leave(n)
	n.log.Info("relay unlinked", "code", code.String(), "reason", text)
	return code, text
}

// open runs the exchange that opens a session.
func (n *session) open(ctx context.Context) error {
	identity, err := link.PeerIdentity(n.link)
	if err != nil {
		return err
	}
	n.node = identity.Node
	n.log = n.server.config.Logger.With("node", n.node.String(), "remote", n.link.RemoteAddr().String())
	ctx, cancel := context.WithTimeout(ctx, helloTimeout)
	defer cancel()
	if n.stream, err = n.link.AcceptStream(ctx); err != nil {
		return err
	}
	if err := n.stream.SetDeadline(time.Now().Add(helloTimeout)); err != nil {
		return err
	}
	n.stream.SetPriority(link.PriorityControl)
	n.control = wire.NewConn(n.stream, wire.MaxFrameBytes)
	if err := n.readHello(); err != nil {
		return err
	}
	row, err := n.authorise(ctx)
	if err != nil {
		return err
	}
	servers, err := n.server.config.Nodes.LinkServers(ctx)
	if err != nil {
		return err
	}
	n.servers = servers
	if err := n.server.admit(ctx, n); err != nil {
		return err
	}
	if err := n.server.enter(ctx, n); err != nil {
		return err
	}
	err = n.send(&wire.Welcome{
		ServerTimeMs: time.Now().UnixMilli(), ReportIntervalMs: uint32(n.server.config.ReportInterval.Milliseconds()),
		Servers: servers, State: string(row.State),
	})
	if err == nil {
		err = n.stream.SetReadDeadline(time.Time{})
	}
	if err != nil {
		n.server.leave(n)
	}
	return err
}

// readHello receives preface and hello and answers the preface.
func (n *session) readHello() error {
	const op = "dispatch.readHello"
	config := &n.server.config
	preface, err := wire.Expect[*wire.Preface](n.control)
	if err != nil {
		return err
	}
	if _, err := wire.Negotiate(preface); err != nil {
		return err
	}
	var cluster ids.Cluster
	if err := wire.DecodeID(preface.GetClusterId(), &cluster); err != nil || cluster != config.Cluster {
		return fault.New(fault.Denied, op, "the relay belongs to cluster %s, this is %s", cluster, config.Cluster)
	}
	if err := n.send(&wire.Preface{
		ProtocolMin: wire.ProtocolMin, ProtocolMax: wire.ProtocolMax,
		ClusterId: config.Cluster[:], Generation: config.Nodes.Generation(), Version: config.Version,
		Capabilities: n.server.capabilities(),
	}); err != nil {
		return err
	}
	if n.held, err = wire.Expect[*wire.Hello](n.control); err != nil {
		return err
	}
	addresses, err := wire.DecodeAddresses(n.held.GetLocalAddresses(), maxLocalAddresses)
	if err != nil {
		return err
	}
	n.nonce, n.probes = string(preface.GetBootNonce()), preface.GetCapabilities()&wire.CapabilityProbe != 0
	n.heard.Store(time.Now().UnixNano())
	n.deltas = preface.GetCapabilities()&wire.CapabilityDelta != 0
	n.quota = preface.GetCapabilities()&wire.CapabilityQuota != 0
	version := preface.GetVersion()
	n.hello = Hello{
		Version: version[:min(len(version), maxVersionBytes)], Incarnation: preface.GetIncarnation(),
		Remote: n.link.RemoteAddr(), Transport: n.link.Transport(), Addresses: addresses,
		Generation: n.held.GetHeld().GetGeneration(), Revision: n.held.GetHeld().GetIndex(), Quota: n.quota,
	}
	if address := n.held.GetHandoverAddress(); len(address) <= maxHandoverBytes {
		n.hello.Handover = address
	}
	n.base = held{generation: n.hello.Generation, revision: n.hello.Revision, sum: string(n.held.GetHeldSha256())}
	return nil
}

// authorise looks at the node's row. A relay that may not connect gets a
// fault.Denied that says why.
func (n *session) authorise(ctx context.Context) (*control.Node, error) {
	const op = "dispatch.authorise"
	row, err := n.server.config.Nodes.NodeByID(ctx, n.node)
	pin := pki.PinOf(n.link.PeerCertificate())
	switch {
	case fault.Is(err, fault.NotFound):
		return nil, fault.New(fault.Denied, op, "%s is not a node of this cluster", n.node)
	case err != nil:
		return nil, err
	case row.State == control.NodePending:
		return nil, fault.Wrap(errPending, fault.Denied, op, "%s is pending: an operator accepts it with relais-control node approve %s", n.node, n.node)
	case row.State == control.NodeEvicted:
		return nil, fault.Wrap(errEvicted, fault.Denied, op, "%s was evicted from the cluster: stop it and join again with a new token", n.node)
	case !row.State.Connects():
		return nil, fault.New(fault.Denied, op, "%s is %s", n.node, row.State)
	case len(row.CertSPKI) > 0 && string(row.CertSPKI) != string(pin[:]):
		return nil, fault.New(fault.Denied, op, "%s has another key by now", n.node)
	}
	return row, nil
}

// Causes that have a close code of their own, because relays act on them.
var (
	errEvicted = errors.New("evicted")
	errPending = errors.New("pending")
)

// denial returns the close code of a relay that may not connect.
func denial(err error) link.Code {
	switch {
	case errors.Is(err, errEvicted):
		return link.CodeEvicted
	case errors.Is(err, errPending):
		return link.CodePending
	}
	return link.CodeDenied
}

// refuse tells the relay why there is no session. What has a close code of its
// own is told by the code alone, so that no relay takes a text for it.
func (n *session) refuse(err error) (link.Code, string) {
	if code := denial(err); code != link.CodeDenied {
		return code, fault.Public(err)
	}
	if n.control != nil && n.link.Err() == nil {
		if n.send(wire.NewError(err)) == nil {
			n.linger()
		}
	}
	switch fault.KindOf(err) {
	case fault.Denied, fault.Unauthenticated:
		return link.CodeDenied, fault.Public(err)
	case fault.Conflict:
		return link.CodeReplaced, fault.Public(err)
	case fault.Invalid, fault.TooLarge:
		return link.CodeProtocol, fault.Public(err)
	}
	return link.CodeInternal, fault.Public(err)
}

// linger lets the relay read what was sent and close the session itself: a
// close of ours could overtake the message.
func (n *session) linger() {
	timer := time.NewTimer(redirectLinger)
	defer timer.Stop()
	select {
	case <-n.link.Done():
	case <-timer.C:
	}
}

// send sends on the control stream; views go over their own.
func (n *session) send(message proto.Message) error {
	n.sending.Lock()
	defer n.sending.Unlock()
	if err := n.stream.SetWriteDeadline(time.Now().Add(writeTimeout)); err != nil {
		return err
	}
	return n.control.Send(message)
}

// work serves the session and returns why it is over.
func (n *session) work(ctx context.Context) (link.Code, string) {
	inner, cancel := context.WithCancel(ctx)
	failed := make(chan error, 3)
	var running sync.WaitGroup
	running.Go(func() { failed <- n.receive() })
	running.Go(func() { failed <- n.sendViews(inner) })
	running.Go(func() { failed <- n.sendQuota(inner) })
	code, text := n.wait(ctx, failed)
	cancel()
	n.link.Close(code, text) // frees both from their streams
	running.Wait()
	return code, text
}

// wait watches for whatever ends the session.
func (n *session) wait(ctx context.Context, failed <-chan error) (link.Code, string) {
	check := time.NewTicker(checkInterval)
	defer check.Stop()
	refresh := time.NewTimer(sessionLife(n.link.PeerCertificate().NotAfter))
	defer refresh.Stop()
	for {
		select {
		case <-ctx.Done():
			n.sendAway()
			return link.CodeStopping, "the server is stopping"
		case <-n.link.Done():
			return link.CodeDone, fmt.Sprint(n.link.Err())
		case <-n.replaced:
			return link.CodeReplaced, "the relay opened another session"
		case e := <-n.ended:
			return e.code, e.text
		case <-refresh.C:
			return link.CodeRefresh, "the certificates are due to be checked"
		case err := <-failed:
			return n.verdict(err)
		case <-check.C:
			if _, err := n.authorise(ctx); fault.Is(err, fault.Denied) {
				return denial(err), fault.Public(err)
			}
			n.expireDropped(refresh)
			if err := n.tellServers(ctx); err != nil {
				return n.verdict(err)
			}
		}
	}
}

// tellServers tells the relay which servers there are, if that has changed, so
// that it can link to any of them when this one is gone.
func (n *session) tellServers(ctx context.Context) error {
	servers, err := n.server.config.Nodes.LinkServers(ctx)
	if err != nil || slices.Equal(servers, n.servers) {
		return nil // what cannot be read now is told later
	}
	n.servers = servers
	return n.send(&wire.Welcome{ServerTimeMs: time.Now().UnixMilli(), Servers: servers})
}

func (n *session) verdict(err error) (link.Code, string) {
	switch {
	case n.link.Err() != nil:
		return link.CodeDone, fmt.Sprint(n.link.Err())
	case errors.Is(err, io.EOF):
		return link.CodeDone, "the relay closed the control stream"
	case fault.Is(err, fault.Invalid), fault.Is(err, fault.TooLarge):
		return link.CodeProtocol, fault.Public(err)
	}
	n.log.Warn("link failed", "error", err)
	return link.CodeInternal, fault.Public(err)
}

// sessionLife is a day, less up to a tenth so that relays do not come back
// together, and never longer than the relay's certificate.
func sessionLife(leafEnds time.Time) time.Duration {
	life := maxSessionLife - rand.N(maxSessionLife/10)
	return max(0, min(life, time.Until(leafEnds)))
}

// sendAway names the other servers to a relay when this one stops.
func (n *session) sendAway() {
	ctx, cancel := context.WithTimeout(context.Background(), redirectLinger)
	defer cancel()
	servers, err := n.server.config.Nodes.LinkServers(ctx)
	if err != nil {
		n.log.Warn("cannot name other servers", "error", err)
	}
	servers = slices.DeleteFunc(slices.Clone(servers), func(s string) bool { return s == n.server.config.Address })
	if n.send(&wire.Redirect{Servers: servers, Reason: "the server is stopping"}) == nil {
		n.linger()
	}
}

// receive reads the control stream: reports and probes, each answered at once.
func (n *session) receive() error {
	for {
		message, err := n.control.Receive()
		if err != nil {
			return err
		}
		n.heard.Store(time.Now().UnixNano())
		if reply, ok := message.(*wire.ProbeReply); ok {
			select {
			case n.replies <- reply.GetNonce():
			default: // an answer that nobody waits for
			}
			continue
		}
		if probe, ok := message.(*wire.Probe); ok {
			if err := n.send(&wire.ProbeReply{Nonce: probe.GetNonce()}); err != nil {
				return err
			}
			continue
		}
		if up, ok := message.(*wire.QuotaUp); ok && n.server.config.Quota != nil {
			n.server.config.Quota(n.node, up)
			continue
		}
		report, ok := message.(*wire.Report)
		if !ok {
			return fault.New(fault.Invalid, "dispatch.receive", "the relay sent a %T on the control stream", message)
		}
		now := time.Now()
		if err := n.send(&wire.Pong{Nonce: report.GetNonce(), ServerTimeMs: now.UnixMilli()}); err != nil {
			return err
		}
		decoded, err := decodeReport(report, now)
		if err != nil {
			return err
		}
		n.server.config.Nodes.NodeReported(n.node, decoded)
	}
}

func decodeReport(in *wire.Report, now time.Time) (Report, error) {
	const op = "dispatch.decodeReport"
	out := Report{
		At: now, Generation: in.GetApplied().GetGeneration(), Revision: in.GetApplied().GetIndex(),
		ClockOffset:       time.UnixMilli(in.GetSentTimeMs()).Sub(now),
		WaitingRecipients: in.GetWaitingRecipients(), InFlightRecipients: in.GetInFlightRecipients(), HeldRecipients: in.GetHeldRecipients(),
		QueueBytes: in.GetQueueBytes(), FreeBytes: in.GetFreeBytes(), Handover: in.GetHandover(),
	}
	out.decodeCertificate(in)
	if n := len(in.GetSources()); n > maxReportSources {
		return out, fault.New(fault.TooLarge, op, "a report names %d sources, at most %d", n, maxReportSources)
	}
	for _, source := range in.GetSources() {
		held := SourceReport{Epoch: source.GetEpoch(), Present: source.GetPresent()}
		if err := wire.DecodeID(source.GetSourceId(), &held.Source); err != nil {
			return out, err
		}
		out.Sources = append(out.Sources, held)
	}
	if n := len(in.GetLeft()); n > maxReportSources {
		return out, fault.New(fault.TooLarge, op, "a report names %d sources that were left, at most %d", n, maxReportSources)
	}
	for _, source := range in.GetLeft() {
		left := LeftSource{Epoch: source.GetEpoch()}
		if err := wire.DecodeID(source.GetSourceId(), &left.Source); err != nil {
			return out, err
		}
		out.Left = append(out.Left, left)
	}
	if err := out.decodeReflexes(in); err != nil {
		return out, err
	}
	for _, problem := range in.GetProblems()[:min(len(in.GetProblems()), maxProblems)] {
		out.Problems = append(out.Problems, problem[:min(len(problem), maxProblemBytes)])
	}
	return out, nil
}
