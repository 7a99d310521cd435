package agent

import (
	"context"
	"crypto/hmac"
	"crypto/sha256"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"log/slog"
	"net/netip"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"google.golang.org/protobuf/proto"

	"github.com/relais-mta/relais/shared/fault"
	"github.com/relais-mta/relais/shared/ids"
	"github.com/relais-mta/relais/shared/link"
	"github.com/relais-mta/relais/shared/pki"
	"github.com/relais-mta/relais/shared/pki/pkitest"
	"github.com/relais-mta/relais/shared/policy"
	"github.com/relais-mta/relais/shared/wire"
)

// controlServer stands in for control: it speaks the protocol and does what a
// test tells it to.
type controlServer struct {
	t       *testing.T
	ca      *pkitest.CA
	token   pki.JoinToken
	address string
	stop    func()

	mu            sync.Mutex
	refusal       error // of joins, after the proof
	skew          time.Duration
	leafLife      time.Duration
	nodes         map[[32]byte]ids.Node // by request
	requests      int                   // join requests that arrived
	renewals      int
	refuseHello   error
	refuseRenewal error
	hellos        []*wire.Hello
	prefaces      []*wire.Preface
	servers       []string
	issuing       *pkitest.Issuing                           // signs; nil: the root does
	bundle        []*x509.Certificate                        // believed and given out; nil: the root
	known         func(pki.Identity, *x509.Certificate) bool // for renewals
	server        ids.Node
	capabilities  uint64 // announced to relays
	reportMs      uint32 // a report is due this often

	sessions chan *relaySession // welcomed ones
}

// relaySession is a welcomed relay, for the test to talk to.
type relaySession struct {
	link    link.Session
	control *wire.Conn
	views   *wire.Conn
	reports chan *wire.Report
	probes  atomic.Int64 // questions of the relay's
	quota   chan *wire.QuotaUp
	over    chan struct{} // closed by the test: the handler returns
	code    link.Code
	sending sync.Mutex // of control
}

// say sends a message on the control stream.
func (s *relaySession) say(message proto.Message) error {
	s.sending.Lock()
	defer s.sending.Unlock()
	return s.control.Send(message)
}

func startControl(t *testing.T, ca *pkitest.CA) *controlServer {
	t.Helper()
	c := &controlServer{t: t, ca: ca, nodes: make(map[[32]byte]ids.Node), leafLife: time.Hour, sessions: make(chan *relaySession, 16), capabilities: wire.CapabilityProbe, reportMs: 100}
	c.token = pki.NewJoinToken(pki.RoleRelay, ids.Token(ids.NewMessage(time.Now())), ca.Pin())
	c.listen("127.0.0.1:0")
	c.servers = []string{c.address}
	return c
}

func (c *controlServer) listen(address string) {
	c.t.Helper()
	c.server = pkitest.NewNode()
	holder := c.ca.Node(pki.RoleControl, c.server)
	if c.bundle != nil {
		holder.SetTrust(pki.Trust{Bundle: c.bundle})
	}
	listener, err := link.Listen(link.ServerConfig{Address: netip.MustParseAddrPort(address), TLS: pki.ByALPN(map[string]*tls.Config{
		wire.ALPNJoin:  pki.OpenServerConfig(holder, wire.ALPNJoin),
		wire.ALPNLink:  pki.ServerConfig(holder, pki.Peer{Cluster: c.ca.Cluster, Role: pki.RoleRelay}, wire.ALPNLink),
		wire.ALPNRenew: pki.ServerConfig(holder, pki.Peer{Cluster: c.ca.Cluster, Grace: pki.RenewGrace, Known: c.known}, wire.ALPNRenew),
	})})
	if err != nil {
		c.t.Fatal(err)
	}
	c.address = listener.Addr().String()
	ctx, cancel := context.WithCancel(context.Background())
	ended := make(chan error, 1)
	go func() {
		ended <- listener.Serve(ctx, map[string]link.Handler{wire.ALPNJoin: c.join, wire.ALPNLink: c.serve, wire.ALPNRenew: c.renew})
	}()
	c.stop = sync.OnceFunc(func() {
		cancel()
		if err := <-ended; err != nil {
			c.t.Error(err)
		}
	})
	c.t.Cleanup(c.stop)
}

func (c *controlServer) preface() *wire.Preface {
	c.mu.Lock()
	defer c.mu.Unlock()
	return &wire.Preface{ProtocolMin: 1, ProtocolMax: 1, ClusterId: c.ca.Cluster[:], Generation: 1, Version: "test", Capabilities: c.capabilities}
}

// exchange runs one request and answer on the first stream.
func (c *controlServer) exchange(ctx context.Context, session link.Session, answer func(*wire.Conn) (proto.Message, error)) (link.Code, string) {
	stream, err := session.AcceptStream(ctx)
	if err != nil {
		return link.CodeProtocol, err.Error()
	}
	conn := wire.NewConn(stream, wire.MaxJoinFrameBytes)
	if _, err := wire.Expect[*wire.Preface](conn); err != nil {
		return link.CodeProtocol, err.Error()
	}
	if err := conn.Send(c.preface()); err != nil {
		return link.CodeInternal, err.Error()
	}
	message, err := answer(conn)
	if err != nil {
		message = wire.NewError(err)
	}
	if err := conn.Send(message); err != nil {
		return link.CodeInternal, err.Error()
	}
	select {
	case <-session.Done():
	case <-ctx.Done():
	}
	return link.CodeDone, ""
}

func (c *controlServer) join(ctx context.Context, session link.Session) (link.Code, string) {
	return c.exchange(ctx, session, func(conn *wire.Conn) (proto.Message, error) {
		c.mu.Lock()
		serverTime := time.Now().Add(c.skew)
		c.mu.Unlock()
		if err := conn.Send(&wire.JoinChallenge{ClusterId: c.ca.Cluster[:], ServerTimeMs: serverTime.UnixMilli()}); err != nil {
			return nil, err
		}
		request, err := wire.Expect[*wire.JoinRequest](conn)
		if err != nil {
			return nil, err
		}
		c.mu.Lock()
		defer c.mu.Unlock()
		c.requests++
		exporter, err := session.Export(pki.ExporterLabel, pki.ExporterBytes)
		if err != nil {
			return nil, err
		}
		hash := sha256.Sum256(request.GetCsr())
		want := pki.Proof(c.token.SecretHash(), exporter, hash, pki.RoleRelay)
		if !hmac.Equal(want[:], request.GetProof()) {
			return nil, fault.New(fault.Unauthenticated, "test", "bad proof")
		}
		if c.refusal != nil {
			return nil, c.refusal
		}
		node, ok := c.nodes[hash]
		if !ok {
			node = pkitest.NewNode()
			c.nodes[hash] = node
		}
		return c.certify(request.GetCsr(), node)
	})
}

// certify answers with a certificate. The caller holds mu.
func (c *controlServer) certify(der []byte, node ids.Node) (proto.Message, error) {
	csr, err := pki.ParseCSR(der)
	if err != nil {
		return nil, err
	}
	sign, bundle := c.ca.Leaf, [][]byte{c.ca.Root.Raw}
	if c.issuing != nil {
		sign, bundle = c.issuing.Sign, pki.RawCertificates(c.bundle)
	}
	chain := [][]byte{sign(csr.PublicKey, pki.RoleRelay, node, time.Now().Add(-time.Minute), time.Now().Add(c.leafLife)).Raw}
	if c.issuing != nil {
		chain = append(chain, c.issuing.Cert.Raw)
	}
	return &wire.JoinReply{
		NodeId: node[:], State: "active", Chain: chain, Bundle: bundle,
		Servers: c.servers, ClusterId: c.ca.Cluster[:], Generation: 1,
	}, nil
}

func (c *controlServer) renew(ctx context.Context, session link.Session) (link.Code, string) {
	return c.exchange(ctx, session, func(conn *wire.Conn) (proto.Message, error) {
		request, err := wire.Expect[*wire.RenewRequest](conn)
		if err != nil {
			return nil, err
		}
		identity, err := link.PeerIdentity(session)
		if err != nil {
			return nil, err
		}
		c.mu.Lock()
		defer c.mu.Unlock()
		c.renewals++
		if c.refuseRenewal != nil {
			return nil, c.refuseRenewal
		}
		return c.certify(request.GetCsr(), identity.Node)
	})
}

// serve welcomes a relay and hands its session to the test.
func (c *controlServer) serve(ctx context.Context, session link.Session) (link.Code, string) {
	stream, err := session.AcceptStream(ctx)
	if err != nil {
		return link.CodeProtocol, err.Error()
	}
	s := &relaySession{link: session, control: wire.NewConn(stream, wire.MaxFrameBytes), reports: make(chan *wire.Report, 100), quota: make(chan *wire.QuotaUp, 100), over: make(chan struct{})}
	preface, err := wire.Expect[*wire.Preface](s.control)
	if err != nil {
		return link.CodeProtocol, err.Error()
	}
	if err := s.control.Send(c.preface()); err != nil {
		return link.CodeInternal, err.Error()
	}
	hello, err := wire.Expect[*wire.Hello](s.control)
	if err != nil {
		return link.CodeProtocol, err.Error()
	}
	c.mu.Lock()
	c.hellos, c.prefaces = append(c.hellos, hello), append(c.prefaces, preface)
	refusal, servers, reportMs := c.refuseHello, c.servers, c.reportMs
	c.mu.Unlock()
	if fault.Is(refusal, fault.Conflict) { // told in words first, as control does
		if err := s.control.Send(wire.NewError(refusal)); err != nil {
			return link.CodeInternal, err.Error()
		}
		<-session.Done()
		return link.CodeReplaced, fault.Public(refusal)
	}
	if refusal != nil {
		return link.CodeDenied, fault.Public(refusal)
	}
	if err := s.control.Send(&wire.Welcome{ServerTimeMs: time.Now().UnixMilli(), ReportIntervalMs: reportMs, Servers: servers, State: "active"}); err != nil {
		return link.CodeInternal, err.Error()
	}
	views, err := session.OpenStream(ctx)
	if err != nil {
		return link.CodeInternal, err.Error()
	}
	s.views = wire.NewConn(views, wire.MaxFrameBytes)
	if err := s.views.Send(&wire.StreamStart{Purpose: wire.Purpose_PURPOSE_VIEW}); err != nil {
		return link.CodeInternal, err.Error()
	}
	go s.answerReports()
	c.sessions <- s
	select {
	case <-ctx.Done():
		return link.CodeStopping, "stopping"
	case <-session.Done():
		return link.CodeDone, ""
	case <-s.over:
		return s.code, "the test says so"
	}
}

func (s *relaySession) answerReports() {
	for {
		message, err := s.control.Receive()
		if err != nil {
			return
		}
		if probe, ok := message.(*wire.Probe); ok {
			s.probes.Add(1)
			if s.say(&wire.ProbeReply{Nonce: probe.GetNonce()}) != nil {
				return
			}
		}
		if up, ok := message.(*wire.QuotaUp); ok {
			s.quota <- up
		}
		if report, ok := message.(*wire.Report); ok {
			if s.say(&wire.Pong{Nonce: report.GetNonce(), ServerTimeMs: time.Now().Add(time.Hour).UnixMilli()}) != nil {
				return
			}
			s.reports <- report
		}
	}
}

// send sends a view and returns the relay's answer.
func (s *relaySession) send(view *policy.View) (proto.Message, error) {
	encoded, err := wire.EncodeView(view)
	if err != nil {
		return nil, err
	}
	if err := wire.SendView(s.views, &wire.Revision{Generation: view.Generation, Index: view.Revision}, encoded); err != nil {
		return nil, err
	}
	return s.views.Receive()
}

// joined returns a directory that has joined the cluster of c.
func (c *controlServer) joined() (dir string, node ids.Node) {
	c.t.Helper()
	dir = c.t.TempDir()
	result, err := Join(context.Background(), c.joinOptions(dir))
	if err != nil {
		c.t.Fatal(err)
	}
	return dir, result.Node
}

func (c *controlServer) joinOptions(dir string) JoinOptions {
	return JoinOptions{
		Token: c.token.String(), Servers: []string{c.address}, Dir: dir, Name: "relay7", Version: "test",
		Local: netip.MustParseAddr("127.0.0.1"), DialTimeout: 2 * time.Second, Logger: slog.New(slog.DiscardHandler),
	}
}

// patience bounds the wait for what takes some seconds at the most on an idle
// machine: a dial of DialTimeout, and the back-offs after a few that failed.
const patience = time.Minute

// next waits for a session.
func (c *controlServer) next() *relaySession {
	c.t.Helper()
	select {
	case s := <-c.sessions:
		return s
	case <-time.After(patience):
		c.t.Fatal("no relay connected")
		return nil
	}
}

func options(dir string) Options {
	return Options{
		Dir: dir, Version: "test", Local: netip.MustParseAddr("127.0.0.1"),
		LocalAddresses: func() []netip.Addr { return []netip.Addr{netip.MustParseAddr("127.0.0.1")} },
		Load:           func() Load { return Load{WaitingRecipients: 7, Problems: []string{"the disk is full"}} },
		DialTimeout:    2 * time.Second, Logger: slog.New(slog.DiscardHandler), Registerer: prometheus.NewRegistry(),
	}
}

// running opens an agent and runs it until the returned function is called.
func running(t *testing.T, dir string, change ...func(*Agent)) (*Agent, func()) {
	t.Helper()
	a, err := Open(options(dir))
	if err != nil {
		t.Fatal(err)
	}
	for _, fn := range change {
		fn(a)
	}
	ctx, cancel := context.WithCancel(context.Background())
	ended := make(chan error, 1)
	go func() { ended <- a.Run(ctx) }()
	stop := sync.OnceFunc(func() {
		cancel()
		if err := errors.Join(<-ended, a.Close()); err != nil {
			t.Error(err)
		}
	})
	t.Cleanup(stop)
	return a, stop
}

// view returns a small view for a node at a revision.
func (c *controlServer) view(node ids.Node, revision uint64) *policy.View {
	pool := policy.Pool{ID: ids.Pool(ids.NewMessage(time.UnixMilli(1_700_000_000_000))), Name: "default", Kind: policy.PoolShared}
	return &policy.View{
		Cluster: c.ca.Cluster, Generation: 1, Revision: revision, Node: node, Pools: []policy.Pool{pool},
		Sources: []policy.Source{
			{ID: ids.Source(ids.NewMessage(time.UnixMilli(1_700_000_000_001))), Bind: netip.MustParseAddr("127.0.0.1"), Public: netip.MustParseAddr("127.0.0.1"), EHLO: "mx1.example", Pool: pool.ID, Owner: node, Epoch: 5},
			{ID: ids.Source(ids.NewMessage(time.UnixMilli(1_700_000_000_002))), Bind: netip.MustParseAddr("127.0.0.2"), Public: netip.MustParseAddr("127.0.0.2"), EHLO: "mx2.example", Pool: pool.ID, Owner: node, Epoch: 6},
		},
		CredentialKey: [32]byte{1},
	}
}

// waitFor waits until a condition holds.
func waitFor(t *testing.T, what string, condition func() bool) {
	t.Helper()
	ticker := time.NewTicker(5 * time.Millisecond)
	defer ticker.Stop()
	deadline := time.After(patience)
	for !condition() {
		select {
		case <-ticker.C:
		case <-deadline:
			t.Fatalf("waited in vain: %s", what)
		}
	}
}

// mustAck fails the test unless answer acknowledges the revision.
func mustAck(t *testing.T, answer proto.Message, err error, revision uint64) {
	t.Helper()
	ack, ok := answer.(*wire.Ack)
	if err != nil || !ok || ack.GetRevision().GetIndex() != revision {
		t.Fatalf("revision %d: answered %v, %v", revision, answer, err)
	}
}
