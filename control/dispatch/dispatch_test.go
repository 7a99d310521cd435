package dispatch

import (
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"log/slog"
	"net/netip"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/testutil"

	"github.com/relais-mta/relais/control"
	"github.com/relais-mta/relais/shared/fault"
	"github.com/relais-mta/relais/shared/ids"
	"github.com/relais-mta/relais/shared/link"
	"github.com/relais-mta/relais/shared/pki"
	"github.com/relais-mta/relais/shared/pki/pkitest"
	"github.com/relais-mta/relais/shared/policy"
	"github.com/relais-mta/relais/shared/wire"
)

// patience is how long a test waits for what must come: so long that a machine on which
// everything takes ten times as long as it may is still in time.
const patience = time.Minute

// nodes is the state of a test cluster.
type nodes struct {
	mu        sync.Mutex
	rows      map[ids.Node]*control.Node
	cluster   ids.Cluster
	revision  uint64
	fill      func(*policy.View) // adds to the views; nil: nothing
	filled    *policy.View       // of the newest revision
	size      int                // of filler in the view, bytes
	buildErr  error
	builds    int
	built     uint64 // the newest revision that a view was built of
	changed   chan struct{}
	hellos    []Hello
	gone      []ids.Node
	acks      chan uint64
	nacks     chan string
	reports   chan Report
	connected chan ids.Node
	clones    chan Clone
	elsewhere map[ids.Node]Clone
}

func (n *nodes) NodeByID(_ context.Context, id ids.Node) (*control.Node, error) {
	n.mu.Lock()
	defer n.mu.Unlock()
	if row := n.rows[id]; row != nil {
		return row, nil
	}
	return nil, fault.New(fault.NotFound, "test", "no node")
}

func (n *nodes) ViewFor(_ context.Context, id ids.Node) (*policy.View, error) {
	n.mu.Lock()
	defer n.mu.Unlock()
	n.builds++
	n.built = n.revision
	if n.buildErr != nil {
		return nil, n.buildErr
	}
	view := &policy.View{Cluster: n.cluster, Generation: 1, Revision: n.revision, Node: id}
	if n.fill != nil { // once for each revision, as the service does
		if n.filled == nil || n.filled.Revision != n.revision {
			n.filled = &policy.View{Cluster: n.cluster, Generation: 1, Revision: n.revision}
			n.fill(n.filled)
		}
		*view = *n.filled
		view.Node = id
	}
	if n.size > 0 {
		view.Sections = map[string]string{"filler": strings.Repeat("#", n.size)}
	}
	return view, nil
}

func (n *nodes) WatchRevision() <-chan struct{} {
	n.mu.Lock()
	defer n.mu.Unlock()
	return n.changed
}

func (n *nodes) change(edit func()) uint64 {
	n.mu.Lock()
	defer n.mu.Unlock()
	n.revision++
	if edit != nil {
		edit()
	}
	close(n.changed)
	n.changed = make(chan struct{})
	return n.revision
}

func (n *nodes) setState(id ids.Node, state control.NodeState) {
	n.mu.Lock()
	defer n.mu.Unlock()
	n.rows[id] = &control.Node{ID: id, State: state}
}

func (n *nodes) LinkServers(context.Context) ([]string, error) {
	return []string{"192.0.2.1:7443", "192.0.2.2:7443"}, nil
}

func (n *nodes) Generation() uint64 { return 1 }

func (n *nodes) NodeConnected(id ids.Node, hello Hello) {
	n.mu.Lock()
	defer n.mu.Unlock()
	n.hellos = append(n.hellos, hello)
	n.connected <- id
}

func (n *nodes) NodeGone(id ids.Node) {
	n.mu.Lock()
	defer n.mu.Unlock()
	n.gone = append(n.gone, id)
}

func (n *nodes) NodeCloned(id ids.Node, c Clone) { n.clones <- c }

func (n *nodes) NodeReported(_ ids.Node, report Report) { n.reports <- report }
func (n *nodes) AckView(_ ids.Node, revision uint64)    { n.acks <- revision }
func (n *nodes) NackView(_ ids.Node, revision uint64, why string) {
	n.nacks <- fmt.Sprintf("%d %s", revision, why)
}

// world is a server and what its relays need to reach it.
type world struct {
	t       *testing.T
	ca      *pkitest.CA
	nodes   *nodes
	server  *Server
	address string
	stop    func()
	dialer  *link.Dialer
}

func newWorld(t *testing.T) *world {
	t.Helper()
	return newWorldOf(t, pkitest.New(t), ids.Node{}, nil)
}

// newWorldOf makes a server of a cluster.
func newWorldOf(t *testing.T, ca *pkitest.CA, self ids.Node, peers Peers) *world {
	t.Helper()
	w := &world{t: t, ca: ca, nodes: &nodes{
		rows: make(map[ids.Node]*control.Node), cluster: ca.Cluster, revision: 10, changed: make(chan struct{}),
		acks: make(chan uint64, 100), nacks: make(chan string, 100), reports: make(chan Report, 100), connected: make(chan ids.Node, 100), clones: make(chan Clone, 100),
	}}
	var err error
	if w.server, err = New(Config{
		Cluster: ca.Cluster, Nodes: w.nodes, Address: "192.0.2.1:7443", ReportInterval: 250 * time.Millisecond, Version: "test", Self: self, Peers: peers,
		Logger: slog.New(slog.DiscardHandler), Registerer: prometheus.NewRegistry(),
	}); err != nil {
		t.Fatal(err)
	}
	listener, err := link.Listen(link.ServerConfig{
		Address: netip.MustParseAddrPort("127.0.0.1:0"),
		TLS:     pki.ServerConfig(ca.Node(pki.RoleControl, pkitest.NewNode()), pki.Peer{Cluster: ca.Cluster, Role: pki.RoleRelay}, wire.ALPNLink),
	})
	if err != nil {
		t.Fatal(err)
	}
	w.address = listener.Addr().String()
	ctx, cancel := context.WithCancel(context.Background())
	ended := make(chan error, 1)
	go func() { ended <- listener.Serve(ctx, map[string]link.Handler{wire.ALPNLink: w.server.Link}) }()
	w.stop = sync.OnceFunc(func() {
		cancel()
		if err := <-ended; err != nil {
			t.Error(err)
		}
	})
	w.dialer = link.NewDialer(link.DialerConfig{Local: netip.MustParseAddr("127.0.0.1")})
	t.Cleanup(func() {
		w.dialer.Close()
		w.stop()
	})
	return w
}

func TestViewsFollowChanges(t *testing.T) {
	w := newWorld(t)
	node := pkitest.NewNode()
	r := w.welcomed(node, 1, &wire.Hello{})
	revision, encoded := r.receive()
	view, err := wire.DecodeView(encoded)
	if err != nil || view.Node != node || view.Revision != 10 || revision.GetIndex() != 10 {
		t.Fatalf("%v, %+v, %v", revision, view, err)
	}
	r.ack(revision)
	if got := within(t, w.nodes.acks); got != 10 {
		t.Errorf("acknowledged %d", got)
	}
	want := w.nodes.change(nil)
	revision, _ = r.receive()
	r.ack(revision)
	if got := within(t, w.nodes.acks); got != want {
		t.Errorf("acknowledged %d, want %d", got, want)
	}
	if got := testutil.ToFloat64(w.server.viewCount.WithLabelValues("ack")); got != 2 || w.server.Sessions() != 1 {
		t.Errorf("%v acks, %d sessions", got, w.server.Sessions())
	}
}

func TestNewestWins(t *testing.T) {
	w := newWorld(t)
	r := w.welcomed(pkitest.NewNode(), 1, &wire.Hello{})
	revision, _ := r.receive()
	var last uint64
	for range 50 { // while the first view is not answered yet
		last = w.nodes.change(nil)
	}
	r.ack(revision)
	within(t, w.nodes.acks)
	revision, _ = r.receive()
	if revision.GetIndex() != last {
		t.Errorf("after revision 10 came %d, want the newest, %d", revision.GetIndex(), last)
	}
	r.ack(revision)
	within(t, w.nodes.acks)
	if w.nodes.builds > 5 {
		t.Errorf("%d views were built for 51 revisions", w.nodes.builds)
	}
}

func TestHeldViewIsNotSentAgain(t *testing.T) {
	w := newWorld(t)
	node := pkitest.NewNode()
	view, err := w.nodes.ViewFor(context.Background(), node)
	if err != nil {
		t.Fatal(err)
	}
	encoded, err := wire.EncodeView(view)
	if err != nil {
		t.Fatal(err)
	}
	sum := sha256.Sum256(encoded)
	w.welcomed(node, 1, &wire.Hello{Held: &wire.Revision{Generation: 1, Index: 10}, HeldSha256: sum[:]})
	if got := within(t, w.nodes.acks); got != 10 {
		t.Errorf("acknowledged %d", got)
	}
	if got := testutil.ToFloat64(w.server.viewBytes); got != 0 {
		t.Errorf("%v bytes were sent to a relay that holds the view", got)
	}
	damaged := w.welcomed(node, 2, &wire.Hello{Held: &wire.Revision{Generation: 1, Index: 10}, HeldSha256: make([]byte, 32)})
	if revision, _ := damaged.receive(); revision.GetIndex() != 10 {
		t.Errorf("a relay with other content got %v", revision)
	}
}

func TestRelayAheadIsLeftAlone(t *testing.T) {
	w := newWorld(t)
	r := w.welcomed(pkitest.NewNode(), 1, &wire.Hello{Held: &wire.Revision{Generation: 1, Index: 12}})
	w.nodes.change(nil) // 11: still behind the relay
	eventually(t, "a view of revision 11 is built", func() bool {
		w.nodes.mu.Lock()
		defer w.nodes.mu.Unlock()
		return w.nodes.built == 11
	})
	w.nodes.change(func() { w.nodes.revision = 13 }) // a view of 12 could be sent: only its sum says what a relay holds
	if revision, _ := r.receive(); revision.GetIndex() < 13 {
		t.Errorf("a relay at 12 got revision %d", revision.GetIndex())
	}
}

func TestNackIsRecordedAndNotRepeated(t *testing.T) {
	w := newWorld(t)
	r := w.welcomed(pkitest.NewNode(), 1, &wire.Hello{})
	revision, _ := r.receive()
	if err := r.views.Send(&wire.Nack{Revision: revision, Error: wire.NewError(fault.Field("x", "queue.retry", "is bad"))}); err != nil {
		t.Fatal(err)
	}
	if got := within(t, w.nodes.nacks); got != "10 queue.retry: is bad" {
		t.Errorf("recorded %q", got)
	}
	want := w.nodes.change(nil)
	if revision, _ := r.receive(); revision.GetIndex() != want {
		t.Errorf("after the refusal came revision %d, want %d", revision.GetIndex(), want)
	}
}

func TestTenMegabyteView(t *testing.T) {
	w := newWorld(t)
	w.nodes.size = 10 << 20
	r := w.welcomed(pkitest.NewNode(), 1, &wire.Hello{})
	revision, encoded := r.receive()
	if len(encoded) < 10<<20 {
		t.Errorf("%d bytes arrived", len(encoded))
	}
	r.ack(revision)
	within(t, w.nodes.acks)
}

func TestViewThatCannotBeBuiltComesLater(t *testing.T) {
	w := newWorld(t)
	w.nodes.buildErr = errors.New("the sealer is away")
	r := w.welcomed(pkitest.NewNode(), 1, &wire.Hello{})
	w.nodes.change(func() { w.nodes.buildErr = nil })
	if revision, _ := r.receive(); revision.GetIndex() != 11 {
		t.Errorf("got %v", revision)
	}
}

func TestReports(t *testing.T) {
	w := newWorld(t)
	r := w.welcomed(pkitest.NewNode(), 1, &wire.Hello{LocalAddresses: [][]byte{{127, 0, 0, 1}}})
	source := ids.Source(ids.NewMessage(time.Now()))
	began := time.Now()
	sent := &wire.Report{
		Nonce: 4, SentTimeMs: began.Add(time.Minute).UnixMilli(), Applied: &wire.Revision{Generation: 1, Index: 10},
		WaitingRecipients: 7, Sources: []*wire.HeldSource{{SourceId: source[:], Epoch: 3, Present: true}}, Left: []*wire.LeavingSource{{SourceId: source[:], Epoch: 2}}, Problems: []string{"disk", strings.Repeat("x", 9999)},
	}
	if err := r.control.Send(sent); err != nil {
		t.Fatal(err)
	}
	pong, err := wire.Expect[*wire.Pong](r.control)
	if err != nil || pong.GetNonce() != 4 || pong.GetServerTimeMs() < began.UnixMilli() || pong.GetServerTimeMs() > time.Now().UnixMilli() {
		t.Errorf("pong %v, %v", pong, err)
	}
	got := within(t, w.nodes.reports)
	took := time.Since(began) + time.Millisecond // the time that was sent has no smaller parts
	if got.Revision != 10 || got.WaitingRecipients != 7 || !slices.Equal(got.Sources, []SourceReport{{Source: source, Epoch: 3, Present: true}}) || !slices.Equal(got.Left, []LeftSource{{Source: source, Epoch: 2}}) || got.ClockOffset > time.Minute || got.ClockOffset < time.Minute-took {
		t.Errorf("report %+v", got)
	}
	if len(got.Problems) != 2 || len(got.Problems[1]) != maxProblemBytes {
		t.Errorf("problems %v", got.Problems)
	}
	if hello := w.nodes.hellos[0]; hello.Version != "test" || hello.Incarnation != 1 || hello.Transport != "quic" || len(hello.Addresses) != 1 || hello.Remote.Addr() != netip.MustParseAddr("127.0.0.1") {
		t.Errorf("hello %+v", hello)
	}
}

func TestWhoMayConnect(t *testing.T) {
	w := newWorld(t)
	for name, c := range map[string]struct {
		row  *control.Node
		want string
		code link.Code
	}{
		"unknown":     {nil, "is not a node of this cluster", link.CodeDenied},
		"pending":     {&control.Node{State: control.NodePending}, "node approve", link.CodePending},
		"evicted":     {&control.Node{State: control.NodeEvicted}, "was evicted", link.CodeEvicted},
		"another key": {&control.Node{State: control.NodeActive, CertSPKI: make([]byte, 32)}, "has another key", link.CodeDenied},
	} {
		t.Run(name, func(t *testing.T) {
			node := pkitest.NewNode()
			if c.row != nil {
				w.nodes.mu.Lock()
				w.nodes.rows[node] = c.row
				w.nodes.mu.Unlock()
			}
			r := w.dial(node, 1, &wire.Hello{})
			_, err := wire.Expect[*wire.Preface](r.control)
			if c.code == link.CodeDenied {
				if err != nil {
					t.Fatal(err)
				}
				_, err = wire.Expect[*wire.Welcome](r.control)
			} else { // the close may overtake the preface
				if closed := r.closed(); closed.Code != c.code || !strings.Contains(closed.Text, c.want) {
					t.Errorf("closed with %v", closed)
				}
				return
			}
			if !fault.Is(err, fault.Denied) || !strings.Contains(fault.Public(err), c.want) {
				t.Errorf("got %v", err)
			}
			r.link.Close(link.CodeDone, "")
		})
	}
	if len(w.nodes.hellos) != 0 || w.server.Sessions() != 0 {
		t.Errorf("%d refused nodes were let in", len(w.nodes.hellos))
	}
}

func TestEvictionEndsTheSession(t *testing.T) {
	w := newWorld(t)
	node := pkitest.NewNode()
	r := w.welcomed(node, 1, &wire.Hello{})
	w.nodes.setState(node, control.NodeEvicted)
	closed := r.closed()
	if closed.Code != link.CodeEvicted || !strings.Contains(closed.Text, "evicted") {
		t.Errorf("closed with %v", closed)
	}
}

func TestOneSessionPerRelay(t *testing.T) {
	w := newWorld(t)
	node := pkitest.NewNode()
	first := w.welcomed(node, 5, &wire.Hello{})
	second := w.welcomed(node, 6, &wire.Hello{})
	if closed := first.closed(); closed.Code != link.CodeReplaced {
		t.Errorf("the first session closed with %v", closed)
	}
	older := w.dial(node, 5, &wire.Hello{})
	if _, err := wire.Expect[*wire.Preface](older.control); err != nil {
		t.Fatal(err)
	}
	if _, err := wire.Expect[*wire.Welcome](older.control); !fault.Is(err, fault.Conflict) {
		t.Errorf("an older process: %v", err)
	}
	if revision, _ := second.receive(); revision.GetIndex() != 10 {
		t.Errorf("the second session got %v", revision)
	}
	w.nodes.mu.Lock()
	defer w.nodes.mu.Unlock()
	if len(w.nodes.gone) != 0 || w.server.Sessions() != 1 {
		t.Errorf("gone: %v, %d sessions", w.nodes.gone, w.server.Sessions())
	}
}

func TestStopSendsRelaysElsewhere(t *testing.T) {
	w := newWorld(t)
	r := w.welcomed(pkitest.NewNode(), 1, &wire.Hello{})
	stopped := make(chan struct{})
	go func() {
		w.stop()
		close(stopped)
	}()
	redirect, err := wire.Expect[*wire.Redirect](r.control)
	if err != nil || !slices.Equal(redirect.GetServers(), []string{"192.0.2.2:7443"}) {
		t.Errorf("redirect %v, %v", redirect, err)
	}
	r.link.Close(link.CodeDone, "")
	within(t, stopped)
	if w.server.Sessions() != 0 || len(w.nodes.gone) != 1 {
		t.Errorf("%d sessions, gone %v", w.server.Sessions(), w.nodes.gone)
	}
}

func TestForeignClusterIsRefused(t *testing.T) {
	w := newWorld(t)
	r := w.dial(pkitest.NewNode(), 1, &wire.Hello{})
	r.link.Close(link.CodeDone, "")
	ctx := context.Background()
	session, err := w.dialer.Dial(ctx, w.address, pki.ClientConfig(w.ca.Node(pki.RoleRelay, pkitest.NewNode()), pki.Peer{Cluster: w.ca.Cluster, Role: pki.RoleControl}, wire.ALPNLink))
	if err != nil {
		t.Fatal(err)
	}
	stream, err := session.OpenStream(ctx)
	if err != nil {
		t.Fatal(err)
	}
	conn := wire.NewConn(stream, wire.MaxFrameBytes)
	other := pkitest.NewNode()
	if err := conn.Send(&wire.Preface{ProtocolMin: 1, ProtocolMax: 1, ClusterId: other[:]}); err != nil {
		t.Fatal(err)
	}
	if _, err := wire.Expect[*wire.Preface](conn); !fault.Is(err, fault.Denied) || !strings.Contains(fault.Public(err), w.ca.Cluster.String()) {
		t.Errorf("got %v", err)
	}
	session.Close(link.CodeDone, "")
}

func TestSessionLife(t *testing.T) {
	for range 100 {
		if life := sessionLife(time.Now().Add(48 * time.Hour)); life > maxSessionLife || life <= maxSessionLife-maxSessionLife/10-time.Second {
			t.Fatalf("a session lives %v", life)
		}
	}
	if life := sessionLife(time.Now().Add(time.Hour)); life > time.Hour || life < time.Hour-time.Minute {
		t.Errorf("with an hour left on the certificate a session lives %v", life)
	}
	if life := sessionLife(time.Now().Add(-time.Hour)); life != 0 {
		t.Errorf("with a certificate that has ended a session lives %v", life)
	}
}
