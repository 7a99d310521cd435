package link

import (
	"context"
	"crypto/tls"
	"errors"
	"io"
	"net"
	"net/netip"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/relais-mta/relais/shared/fault"
	"github.com/relais-mta/relais/shared/pki"
	"github.com/relais-mta/relais/shared/pki/pkitest"
)

const (
	alpnNode = "test-node/1"
	alpnOpen = "test-open/1"

	patience = time.Minute // for what must come, on a machine that is busy with other things
)

// alone is an address that no other test uses: what is closed there stays closed, and
// can be opened again.
var alone = netip.MustParseAddr("127.0.77.1")

// server runs a listener with an echoing handler for two protocols.
type server struct {
	ca      *pkitest.CA
	address string
	stop    context.CancelFunc
	ended   chan error
	served  atomic.Int64
}

func echo(ctx context.Context, session Session) (Code, string) {
	for {
		stream, err := session.AcceptStream(ctx)
		if err != nil {
			return CodeStopping, "stopping"
		}
		buffer := make([]byte, 64)
		n, err := stream.Read(buffer)
		if err != nil && !errors.Is(err, io.EOF) {
			return CodeProtocol, "bad stream"
		}
		if string(buffer[:n]) == "bye" {
			return CodeDenied, "you asked for it"
		}
		if _, err := stream.Write(buffer[:n]); err != nil {
			return CodeInternal, "cannot write"
		}
		_ = stream.Close()
	}
}

func startServer(t *testing.T, ca *pkitest.CA, maxSessions int) *server {
	t.Helper()
	holder := ca.Node(pki.RoleControl, pkitest.NewNode())
	listener, err := Listen(ServerConfig{
		Address: netip.MustParseAddrPort("127.0.0.1:0"), MaxSessions: maxSessions,
		TLS: pki.ByALPN(map[string]*tls.Config{
			alpnNode: pki.ServerConfig(holder, pki.Peer{Cluster: ca.Cluster, Role: pki.RoleRelay}, alpnNode),
			alpnOpen: pki.OpenServerConfig(holder, alpnOpen),
		}),
	})
	if err != nil {
		t.Fatal(err)
	}
	ctx, stop := context.WithCancel(context.Background())
	s := &server{ca: ca, address: listener.Addr().String(), stop: stop, ended: make(chan error, 1)}
	handler := func(ctx context.Context, session Session) (Code, string) {
		s.served.Add(1)
		return echo(ctx, session)
	}
	go func() { s.ended <- listener.Serve(ctx, map[string]Handler{alpnNode: handler, alpnOpen: handler}) }()
	t.Cleanup(func() {
		stop()
		if err := <-s.ended; err != nil {
			t.Errorf("Serve: %v", err)
		}
		s.ended <- nil
	})
	return s
}

func dialer(t *testing.T, timeout time.Duration) *Dialer {
	t.Helper()
	d := NewDialer(DialerConfig{Local: netip.MustParseAddr("127.0.0.1"), Timeout: timeout})
	t.Cleanup(d.Close)
	return d
}

func say(t *testing.T, session Session, text string) (string, error) {
	t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), patience)
	defer cancel()
	stream, err := session.OpenStream(ctx)
	if err != nil {
		return "", err
	}
	defer stream.Close()
	if _, err := io.WriteString(stream, text); err != nil {
		return "", err
	}
	answer, err := io.ReadAll(stream)
	return string(answer), err
}

func TestMutualSession(t *testing.T) {
	ca := pkitest.New(t)
	s := startServer(t, ca, 0)
	node := pkitest.NewNode()
	session, err := dialer(t, 0).Dial(context.Background(), s.address,
		pki.ClientConfig(ca.Node(pki.RoleRelay, node), pki.Peer{Cluster: ca.Cluster, Role: pki.RoleControl}, alpnNode))
	if err != nil {
		t.Fatal(err)
	}
	if session.Protocol() != alpnNode || session.Transport() != "quic" || session.RemoteAddr().String() != s.address {
		t.Errorf("%s over %s to %s", session.Protocol(), session.Transport(), session.RemoteAddr())
	}
	identity, err := PeerIdentity(session)
	if err != nil || identity.Role != pki.RoleControl || identity.Cluster != ca.Cluster {
		t.Errorf("peer %v, %v", identity, err)
	}
	// More streams than may be open at once: closed ones must not count.
	for i := range 3 * maxStreams {
		if answer, err := say(t, session, "hello"); err != nil || answer != "hello" {
			t.Fatalf("stream %d: %q, %v", i, answer, err)
		}
	}
	if session.Err() != nil {
		t.Errorf("a living session has the error %v", session.Err())
	}
	if _, err := say(t, session, "bye"); err == nil {
		t.Error("the server closed, but the stream ended well")
	}
	<-session.Done()
	closed, ok := ClosedByPeer(session.Err())
	if !ok || closed.Code != CodeDenied || closed.Text != "you asked for it" {
		t.Errorf("closed with %v", session.Err())
	}
}

func TestExporterIsTheSameAtBothEnds(t *testing.T) {
	ca := pkitest.New(t)
	holder := ca.Node(pki.RoleControl, pkitest.NewNode())
	listener, err := Listen(ServerConfig{Address: netip.MustParseAddrPort("127.0.0.1:0"), TLS: pki.OpenServerConfig(holder, alpnOpen)})
	if err != nil {
		t.Fatal(err)
	}
	ctx, stop := context.WithCancel(context.Background())
	values, ended := make(chan string, 2), make(chan error, 1)
	go func() {
		ended <- listener.Serve(ctx, map[string]Handler{alpnOpen: func(_ context.Context, session Session) (Code, string) {
			value, err := session.Export(pki.ExporterLabel, pki.ExporterBytes)
			if err != nil {
				t.Error(err)
			}
			values <- string(value)
			return CodeDone, ""
		}})
	}()
	d := dialer(t, 0)
	var mine []string
	for range 2 {
		session, err := d.Dial(ctx, listener.Addr().String(), pki.PinnedClientConfig([]pki.Pin{ca.Pin()}, alpnOpen))
		if err != nil {
			t.Fatal(err)
		}
		value, err := session.Export(pki.ExporterLabel, pki.ExporterBytes)
		if err != nil || len(value) != pki.ExporterBytes {
			t.Fatalf("%x, %v", value, err)
		}
		if theirs := <-values; theirs != string(value) {
			t.Errorf("server has %x, client %x", theirs, value)
		}
		mine = append(mine, string(value))
	}
	if mine[0] == mine[1] {
		t.Error("two connections have the same exporter value")
	}
	stop()
	if err := <-ended; err != nil {
		t.Error(err)
	}
}

func TestServerChecksClients(t *testing.T) {
	ca, other := pkitest.New(t), pkitest.New(t)
	s := startServer(t, ca, 0)
	key, err := pki.NewNodeKey()
	if err != nil {
		t.Fatal(err)
	}
	past := time.Now().Add(-time.Hour)
	cases := map[string]*pki.Holder{
		"wrong role":       ca.Node(pki.RoleControl, pkitest.NewNode()),
		"ended":            ca.NodeWith(key, pki.RoleRelay, pkitest.NewNode(), past.Add(-time.Hour), past),
		"another's CA":     pki.NewHolder(other.Node(pki.RoleRelay, pkitest.NewNode()).Certificate(), ca.Node(pki.RoleRelay, pkitest.NewNode()).Bundle()),
		"of later":         ca.NodeWith(key, pki.RoleRelay, pkitest.NewNode(), time.Now().Add(time.Hour), time.Now().Add(2*time.Hour)),
		"without an error": ca.Node(pki.RoleRelay, pkitest.NewNode()),
	}
	for name, holder := range cases {
		t.Run(name, func(t *testing.T) {
			session, err := dialer(t, 0).Dial(context.Background(), s.address,
				pki.ClientConfig(holder, pki.Peer{Cluster: ca.Cluster, Role: pki.RoleControl}, alpnNode))
			if err == nil {
				_, err = say(t, session, "hello")
			}
			if good := name == "without an error"; (err == nil) != good {
				t.Errorf("got %v", err)
			}
		})
	}
	if got := s.served.Load(); got != 1 {
		t.Errorf("%d sessions were served, want the good one alone", got)
	}
}

func TestClientChecksServers(t *testing.T) {
	ca, other := pkitest.New(t), pkitest.New(t)
	s := startServer(t, other, 0)
	mine := ca.Node(pki.RoleRelay, pkitest.NewNode())
	d := dialer(t, 0)
	_, err := d.Dial(context.Background(), s.address, pki.ClientConfig(mine, pki.Peer{Cluster: ca.Cluster, Role: pki.RoleControl}, alpnNode))
	if !fault.Is(err, fault.Denied) || !strings.Contains(fault.Public(err), "not of a CA we believe") {
		t.Errorf("foreign CA: %v", err)
	}
	_, err = d.Dial(context.Background(), s.address, pki.PinnedClientConfig([]pki.Pin{ca.Pin()}, alpnOpen))
	var pin *pki.PinError
	if !errors.As(err, &pin) || pin.Presented != other.Pin() || pin.Wanted[0] != ca.Pin() {
		t.Errorf("wrong pin: %v", err)
	}
	if !strings.Contains(fault.Public(err), other.Pin().String()) || !strings.Contains(fault.Public(err), ca.Pin().String()) {
		t.Errorf("the message does not name both pins: %v", err)
	}
	if got := s.served.Load(); got != 0 {
		t.Errorf("%d sessions reached a server that the client refuses", got)
	}
}

func TestUnknownProtocolIsRefused(t *testing.T) {
	ca := pkitest.New(t)
	s := startServer(t, ca, 0)
	_, err := dialer(t, 0).Dial(context.Background(), s.address, pki.PinnedClientConfig([]pki.Pin{ca.Pin()}, "test-none/1"))
	if !fault.Is(err, fault.Denied) {
		t.Errorf("got %v", err)
	}
}

func TestDialTimeout(t *testing.T) {
	silent, err := net.ListenPacket("udp", netip.AddrPortFrom(alone, 0).String()) // and nothing on TCP
	if err != nil {
		t.Fatal(err)
	}
	defer silent.Close()
	_, err = dialer(t, 200*time.Millisecond).Dial(context.Background(), silent.LocalAddr().String(), pki.PinnedClientConfig(nil, alpnOpen))
	if !fault.Is(err, fault.Timeout) || !strings.Contains(fault.Public(err), "UDP within 200ms") {
		t.Errorf("got %v", err)
	}
}

func TestTooManySessions(t *testing.T) {
	ca := pkitest.New(t)
	s := startServer(t, ca, 1)
	config := pki.PinnedClientConfig([]pki.Pin{ca.Pin()}, alpnOpen)
	d := dialer(t, 0)
	first, err := d.Dial(context.Background(), s.address, config)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := say(t, first, "hello"); err != nil {
		t.Fatal(err)
	}
	second, err := d.Dial(context.Background(), s.address, config)
	if err != nil {
		t.Fatal(err)
	}
	<-second.Done()
	if closed, ok := ClosedByPeer(second.Err()); !ok || closed.Code != CodeBusy {
		t.Errorf("got %v", second.Err())
	}
	if _, err := say(t, first, "hello"); err != nil {
		t.Errorf("the first session suffered: %v", err)
	}
}

func TestStopTellsPeers(t *testing.T) {
	ca := pkitest.New(t)
	s := startServer(t, ca, 0)
	session, err := dialer(t, 0).Dial(context.Background(), s.address, pki.PinnedClientConfig([]pki.Pin{ca.Pin()}, alpnOpen))
	if err != nil {
		t.Fatal(err)
	}
	if _, err := say(t, session, "hello"); err != nil {
		t.Fatal(err)
	}
	s.stop()
	<-session.Done()
	if closed, ok := ClosedByPeer(session.Err()); !ok || closed.Code != CodeStopping {
		t.Errorf("got %v", session.Err())
	}
}

func TestCheckAddress(t *testing.T) {
	for address, good := range map[string]bool{
		"192.0.2.1:7443": true, "[2001:db8::1]:7443": true, "control.example.com:7443": true,
		"192.0.2.1": false, ":7443": false, "host:0": false, "host:http": false, "": false,
	} {
		if err := CheckAddress(address); (err == nil) != good {
			t.Errorf("%q: %v", address, err)
		}
	}
}

func TestHandshakeGate(t *testing.T) {
	var gate handshakeGate
	now := time.Unix(100, 0)
	for i := range handshakesPerSecond {
		if gate.over(now) {
			t.Fatalf("handshake %d of a second is asked for proof", i+1)
		}
	}
	if !gate.over(now) {
		t.Error("the flood is not asked for proof")
	}
	if gate.over(now.Add(time.Second)) {
		t.Error("the next second starts full")
	}
}

func TestRestartedServerResetsOldSessions(t *testing.T) {
	ca := pkitest.New(t)
	config := ServerConfig{Address: netip.AddrPortFrom(alone, 0), ResetKey: [32]byte{7}, TLS: pki.OpenServerConfig(ca.Node(pki.RoleControl, pkitest.NewNode()), alpnOpen)}
	listener, err := Listen(config)
	if err != nil {
		t.Fatal(err)
	}
	ctx, stop := context.WithCancel(context.Background())
	defer stop()
	ended := make(chan error, 2)
	serve := func(l *Listener) { ended <- l.Serve(ctx, map[string]Handler{alpnOpen: echo}) }
	go serve(listener)
	session, err := dialer(t, 0).Dial(ctx, listener.Addr().String(), pki.PinnedClientConfig([]pki.Pin{ca.Pin()}, alpnOpen))
	if err != nil {
		t.Fatal(err)
	}
	if _, err := say(t, session, "hello"); err != nil {
		t.Fatal(err)
	}
	config.Address = listener.Addr()
	if err := listener.socket.Close(); err != nil { // as kill -9 would, without a goodbye
		t.Fatal(err)
	}
	<-ended
	if listener, err = Listen(config); err != nil {
		t.Fatal(err)
	}
	go serve(listener)
	_, _ = say(t, session, strings.Repeat("x", 64)) // any packet that is large enough
	<-session.Done()
	if !strings.Contains(fault.Public(session.Err()), "was restarted") { // a session that nobody resets is silent for maxIdleTime
		t.Errorf("ended by %v", session.Err())
	}
	stop()
	if err := <-ended; err != nil {
		t.Error(err)
	}
}
