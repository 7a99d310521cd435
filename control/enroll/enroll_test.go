package enroll

import (
	"context"
	"crypto/x509"
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
	"github.com/relais-mta/relais/control/ca"
	"github.com/relais-mta/relais/shared/fault"
	"github.com/relais-mta/relais/shared/ids"
	"github.com/relais-mta/relais/shared/link"
	"github.com/relais-mta/relais/shared/pki"
	"github.com/relais-mta/relais/shared/wire"
)

// members is the replicated state of a test cluster.
type members struct {
	mu      sync.Mutex
	tokens  map[ids.Token]*token
	nodes   map[ids.Node]Member
	certs   []Certificate
	lookups int // of token secrets: how often a join request was read
}

type token struct {
	secret  [32]byte
	uses    int
	ended   bool
	cidr    netip.Prefix
	made    map[[32]byte]ids.Node
	pending bool
}

func (m *members) TokenSecretHash(_ context.Context, id ids.Token) ([32]byte, error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.lookups++
	if t := m.tokens[id]; t != nil {
		return t.secret, nil
	}
	return [32]byte{}, fault.New(fault.NotFound, "test", "no such token")
}

func (m *members) Redeem(_ context.Context, r Redemption) (Member, error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	t := m.tokens[r.Token]
	if id, ok := t.made[r.CSRHash]; ok {
		return m.nodes[id], nil
	}
	switch {
	case t.ended:
		return Member{}, fault.Field("test", "token", "it expired: create another")
	case t.uses == 0:
		return Member{}, fault.Field("test", "token", "it is used up: create another")
	case t.cidr.IsValid() && !t.cidr.Contains(r.Remote):
		return Member{}, fault.Field("test", "token", "%s is outside %s", r.Remote, t.cidr)
	}
	t.uses--
	member := Member{Node: ids.Node(ids.NewMessage(time.Now())), State: control.NodeActive}
	if t.pending {
		member.State = control.NodePending
	}
	t.made[r.CSRHash] = member.Node
	m.nodes[member.Node] = member
	return member, nil
}

func (m *members) Member(_ context.Context, node ids.Node) (Member, error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	member, ok := m.nodes[node]
	if !ok {
		return Member{}, fault.New(fault.NotFound, "test", "no node %s", node)
	}
	return member, nil
}

func (m *members) SetCertificate(_ context.Context, c Certificate) error {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.certs = append(m.certs, c)
	member := m.nodes[c.Node]
	member.SPKI = c.SPKI[:]
	m.nodes[c.Node] = member
	return nil
}

func (m *members) LinkServers(context.Context) ([]string, error) {
	return []string{"192.0.2.1:7443"}, nil
}

func (m *members) Generation() uint64 { return 3 }

func (m *members) setState(node ids.Node, state control.NodeState) {
	m.mu.Lock()
	defer m.mu.Unlock()
	member := m.nodes[node]
	member.State = state
	m.nodes[node] = member
}

// recorded returns the certificates recorded so far and the number of nodes.
func (m *members) recorded() (certs []Certificate, nodes int) {
	m.mu.Lock()
	defer m.mu.Unlock()
	return slices.Clone(m.certs), len(m.nodes)
}

// world is a cluster with one enrolling server and a client side.
type world struct {
	t         *testing.T
	cluster   ids.Cluster
	authority *ca.Authority
	members   *members
	server    *Server
	address   string
	dialer    *link.Dialer
	holder    *pki.Holder
	material  ca.Material
	sealer    *pki.Sealer
}

// known says whether a certificate has the key that is on record.
func (w *world) known(identity pki.Identity, leaf *x509.Certificate) bool {
	w.members.mu.Lock()
	defer w.members.mu.Unlock()
	pin := pki.PinOf(leaf)
	return string(w.members.nodes[identity.Node].SPKI) == string(pin[:])
}

func newWorld(t *testing.T) *world {
	t.Helper()
	w := &world{t: t, cluster: ids.Cluster(ids.NewMessage(time.Now())), members: &members{tokens: make(map[ids.Token]*token), nodes: make(map[ids.Node]Member)}}
	material, kek, _, err := ca.Create(w.cluster, time.Now().Add(-60*24*time.Hour)) // old enough to have signed what has ended
	if err != nil {
		t.Fatal(err)
	}
	w.material, w.sealer = material, pki.NewSealer(kek)
	if w.authority, err = ca.Open(material, w.cluster, w.sealer); err != nil {
		t.Fatal(err)
	}
	key := w.newKey()
	cert, err := w.authority.Issue(key, pki.RoleControl, ids.Node(ids.NewMessage(time.Now())), pki.Request{}, time.Now())
	if err != nil {
		t.Fatal(err)
	}
	w.holder = pki.NewHolder(cert, w.authority.Bundle())
	if w.server, err = New(Config{
		Cluster: w.cluster, Members: w.members, Signer: w.authority, Version: "test",
		Logger: slog.New(slog.DiscardHandler), Registerer: prometheus.NewRegistry(),
	}); err != nil {
		t.Fatal(err)
	}
	listener, err := link.Listen(link.ServerConfig{Address: netip.MustParseAddrPort("127.0.0.1:0"), TLS: TLSConfig(w.holder, w.cluster, w.known)})
	if err != nil {
		t.Fatal(err)
	}
	w.address = listener.Addr().String()
	ctx, stop := context.WithCancel(context.Background())
	ended := make(chan error, 1)
	go func() {
		ended <- listener.Serve(ctx, map[string]link.Handler{wire.ALPNJoin: w.server.Join, wire.ALPNRenew: w.server.Renew})
	}()
	w.dialer = link.NewDialer(link.DialerConfig{Local: netip.MustParseAddr("127.0.0.1")})
	t.Cleanup(func() {
		w.dialer.Close()
		stop()
		if err := <-ended; err != nil {
			t.Error(err)
		}
	})
	return w
}

func (w *world) newKey() *pki.NodeKey {
	w.t.Helper()
	key, err := pki.NewNodeKey()
	if err != nil {
		w.t.Fatal(err)
	}
	return key
}

func (w *world) newToken(change func(*token)) pki.JoinToken {
	id := ids.Token(ids.NewMessage(time.Now()))
	text := pki.NewJoinToken(pki.RoleRelay, id, w.authority.Pin())
	t := &token{secret: text.SecretHash(), uses: 1, made: make(map[[32]byte]ids.Node)}
	if change != nil {
		change(t)
	}
	w.members.mu.Lock()
	defer w.members.mu.Unlock()
	w.members.tokens[id] = t
	return text
}

func (w *world) csr() []byte {
	w.t.Helper()
	csr, err := w.newKey().CSR(pki.Request{DNSNames: []string{"relay7.example.com"}})
	if err != nil {
		w.t.Fatal(err)
	}
	return csr
}

func (w *world) join(token pki.JoinToken, csr []byte) (*wire.JoinReply, error) {
	ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second)
	defer cancel()
	session, err := w.dialer.Dial(ctx, w.address, pki.PinnedClientConfig(token.Pins, wire.ALPNJoin))
	if err != nil {
		return nil, err
	}
	return link.Join(ctx, session, link.JoinRequest{
		Token: token, CSR: csr, Name: "relay7", Version: "test", Labels: map[string]string{"rack": "4"},
		Addresses: []netip.Addr{netip.MustParseAddr("192.0.2.7")},
		Accept: func(cluster ids.Cluster, at time.Time) error {
			if cluster != w.cluster || time.Since(at).Abs() > time.Minute {
				return fmt.Errorf("challenge of %s at %s", cluster, at)
			}
			return nil
		},
	})
}

func TestJoin(t *testing.T) {
	w := newWorld(t)
	reply, err := w.join(w.newToken(nil), w.csr())
	if err != nil {
		t.Fatal(err)
	}
	chain, err := pki.ParseChain(reply.GetChain())
	if err != nil {
		t.Fatal(err)
	}
	identity, err := pki.CertIdentity(chain[0])
	if err != nil || identity.Cluster != w.cluster || identity.Role != pki.RoleRelay || string(identity.Node[:]) != string(reply.GetNodeId()) {
		t.Errorf("identity %v, %v", identity, err)
	}
	if reply.GetState() != "active" || reply.GetGeneration() != 3 || !slices.Equal(reply.GetServers(), []string{"192.0.2.1:7443"}) || len(reply.GetBundle()) != 2 {
		t.Errorf("reply %v", reply)
	}
	certs, _ := w.members.recorded()
	if len(certs) != 1 || certs[0].Node != identity.Node || certs[0].Serial != chain[0].SerialNumber.Text(16) || certs[0].SPKI != pki.PinOf(chain[0]) {
		t.Errorf("recorded %+v", certs)
	}
	if got := testutil.ToFloat64(w.server.outcomes.WithLabelValues("join", "ok")); got != 1 {
		t.Errorf("counted %v joins", got)
	}
}

func TestJoinRefusals(t *testing.T) {
	w := newWorld(t)
	forged := w.newToken(nil)
	forged.Secret = "aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa"
	unknown := pki.NewJoinToken(pki.RoleRelay, ids.Token(ids.NewMessage(time.Now())), w.authority.Pin())
	otherRole := w.newToken(nil)
	otherRole.Role = "gateway"
	cases := map[string]struct {
		token pki.JoinToken
		kind  fault.Kind
		want  string
	}{
		"expired":      {w.newToken(func(t *token) { t.ended = true }), fault.Invalid, "token: it expired"},
		"used up":      {w.newToken(func(t *token) { t.uses = 0 }), fault.Invalid, "token: it is used up"},
		"CIDR":         {w.newToken(func(t *token) { t.cidr = netip.MustParsePrefix("198.51.100.0/24") }), fault.Invalid, "127.0.0.1 is outside 198.51.100.0/24"},
		"unknown role": {otherRole, fault.Invalid, "neither relay nor control"},
		"forged":       {forged, fault.Unauthenticated, "not known here or its secret is wrong"},
		"unknown":      {unknown, fault.Unauthenticated, "not known here or its secret is wrong"},
	}
	texts := make(map[string]string)
	for name, c := range cases {
		_, err := w.join(c.token, w.csr())
		if !fault.Is(err, c.kind) || !strings.Contains(fault.Public(err), c.want) {
			t.Errorf("%s: got %v", name, err)
		}
		texts[name] = fault.Public(err)
	}
	if texts["forged"] != texts["unknown"] {
		t.Errorf("a forged and an unknown token differ: %q, %q", texts["forged"], texts["unknown"])
	}
	if certs, nodes := w.members.recorded(); nodes != 0 || len(certs) != 0 {
		t.Errorf("a refused join left %d nodes and %d certificates", nodes, len(certs))
	}
}

func TestWrongPinSendsNothing(t *testing.T) {
	w, other := newWorld(t), newWorld(t)
	token := w.newToken(nil)
	w.address = other.address
	_, err := w.join(token, w.csr())
	if !fault.Is(err, fault.Denied) || !strings.Contains(fault.Public(err), other.authority.Pin().String()) || !strings.Contains(fault.Public(err), token.Pins[0].String()) {
		t.Errorf("got %v", err)
	}
	other.members.mu.Lock()
	defer other.members.mu.Unlock()
	if other.members.lookups != 0 {
		t.Error("a server with the wrong pin got a join request")
	}
	for _, exchange := range []string{"ok", "invalid", "unauthenticated", "unavailable", "internal", "timeout"} {
		if got := testutil.ToFloat64(other.server.outcomes.WithLabelValues("join", exchange)); got != 0 {
			t.Errorf("a server with the wrong pin ran an exchange (%s)", exchange)
		}
	}
}

func TestSameRequestSameNode(t *testing.T) {
	w := newWorld(t)
	token, csr := w.newToken(nil), w.csr()
	first, err := w.join(token, csr)
	if err != nil {
		t.Fatal(err)
	}
	again, err := w.join(token, csr)
	if err != nil {
		t.Fatal(err)
	}
	if string(first.GetNodeId()) != string(again.GetNodeId()) {
		t.Error("a repeated request became another node")
	}
	if _, err := w.join(token, w.csr()); err == nil || !strings.Contains(err.Error(), "used up") {
		t.Errorf("another request with the same token: %v", err)
	}
}

func TestParallelJoins(t *testing.T) {
	w := newWorld(t)
	const nodes, uses = 12, 8
	token := w.newToken(func(t *token) { t.uses = uses })
	csrs := make([][]byte, nodes)
	for i := range csrs {
		csrs[i] = w.csr()
	}
	var wg sync.WaitGroup
	results := make([]error, nodes)
	for i := range nodes {
		wg.Go(func() { _, results[i] = w.join(token, csrs[i]) })
	}
	wg.Wait()
	good := 0
	for _, err := range results {
		if err == nil {
			good++
		} else if !strings.Contains(err.Error(), "used up") {
			t.Error(err)
		}
	}
	if _, nodes := w.members.recorded(); good != uses || nodes != uses {
		t.Errorf("%d joins and %d nodes with %d uses", good, nodes, uses)
	}
}

func TestPendingAndEvicted(t *testing.T) {
	w := newWorld(t)
	token, csr := w.newToken(func(t *token) { t.pending = true }), w.csr()
	reply, err := w.join(token, csr)
	if err != nil || reply.GetState() != "pending" {
		t.Fatalf("%v, %v", reply, err)
	}
	w.members.setState(ids.Node(reply.GetNodeId()), control.NodeEvicted)
	if _, err := w.join(token, csr); !fault.Is(err, fault.Denied) || !strings.Contains(err.Error(), "evicted") {
		t.Errorf("an evicted node joined again: %v", err)
	}
}

func TestFailuresAreLimited(t *testing.T) {
	w := newWorld(t)
	good, bad := w.newToken(nil), w.newToken(nil)
	bad.Secret = "aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa"
	csr := w.csr()
	for range maxFailures {
		if _, err := w.join(bad, csr); !fault.Is(err, fault.Unauthenticated) {
			t.Fatal(err)
		}
	}
	if _, err := w.join(good, csr); !fault.Is(err, fault.Exhausted) || !strings.Contains(err.Error(), "wait") {
		t.Errorf("after %d failures: %v", maxFailures, err)
	}
}

// renewal dials with a node's certificate and asks for a new one.
func (w *world) renewal(key *pki.NodeKey, chain []*x509.Certificate, csr []byte) (*wire.JoinReply, error) {
	cert, err := pki.TLSCertificate(key, chain)
	if err != nil {
		w.t.Fatal(err)
	}
	ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second)
	defer cancel()
	session, err := w.dialer.Dial(ctx, w.address, pki.ClientConfig(pki.NewHolder(cert, w.authority.Bundle()), pki.Peer{Cluster: w.cluster, Role: pki.RoleControl}, wire.ALPNRenew))
	if err != nil {
		return nil, err
	}
	return link.Renew(ctx, session, csr, "test")
}

func TestRenew(t *testing.T) {
	w := newWorld(t)
	key := w.newKey()
	csr, err := key.CSR(pki.Request{})
	if err != nil {
		t.Fatal(err)
	}
	joined, err := w.join(w.newToken(nil), csr)
	if err != nil {
		t.Fatal(err)
	}
	node := ids.Node(joined.GetNodeId())
	signedAt := func(age time.Duration) []*x509.Certificate {
		chain, err := w.authority.Sign(csr, pki.RoleRelay, node, time.Now().Add(-age))
		if err != nil {
			t.Fatal(err)
		}
		return chain
	}
	const day = 24 * time.Hour
	for name, age := range map[string]time.Duration{"good": 0, "ended 3 days ago": 10 * day, "ended 20 days ago": ca.LeafLife + 20*day} {
		reply, err := w.renewal(key, signedAt(age), csr)
		if err != nil || string(reply.GetNodeId()) != string(node[:]) {
			t.Fatalf("a certificate that is %s: %v, %v", name, reply, err)
		}
	}
	for _, days := range []time.Duration{31, 40} {
		_, err := w.renewal(key, signedAt(ca.LeafLife+days*day), csr)
		if !fault.Is(err, fault.Denied) || !strings.Contains(err.Error(), fmt.Sprintf("ended %d days ago", days)) || !strings.Contains(err.Error(), "token create") {
			t.Errorf("a certificate that ended %d days ago: %v", days, err)
		}
	}
	otherCSR := w.csr()
	if _, err := w.renewal(key, signedAt(0), otherCSR); !fault.Is(err, fault.Denied) || !strings.Contains(err.Error(), "another key") {
		t.Errorf("a request for another key: %v", err)
	}
	w.members.setState(node, control.NodeEvicted)
	_, err = w.renewal(key, signedAt(0), csr)
	if closed, ok := link.ClosedByPeer(err); !ok || closed.Code != link.CodeEvicted || !strings.Contains(closed.Text, "evicted") {
		t.Errorf("an evicted node: %v", err)
	}
}

// TestRenewUnderADroppedCA: a node that was off while the issuing key changed
// comes with what the dropped one signed. Its key is on record, so it renews;
// whoever holds the dropped key alone gets nothing.
func TestRenewUnderADroppedCA(t *testing.T) {
	w := newWorld(t)
	key := w.newKey()
	csr, err := key.CSR(pki.Request{})
	if err != nil {
		t.Fatal(err)
	}
	joined, err := w.join(w.newToken(nil), csr)
	if err != nil {
		t.Fatal(err)
	}
	node := ids.Node(joined.GetNodeId())
	signed := func(csr []byte, age time.Duration) []*x509.Certificate {
		chain, err := w.authority.Sign(csr, pki.RoleRelay, node, time.Now().Add(-age))
		if err != nil {
			t.Fatal(err)
		}
		return chain
	}
	next, err := ca.NextIssuing(w.material, w.cluster, w.sealer, time.Now())
	if err != nil {
		t.Fatal(err)
	}
	w.holder.SetTrust(pki.Trust{Bundle: []*x509.Certificate{next.Certificate, w.authority.Root()}})
	for name, age := range map[string]time.Duration{"good": 0, "ended 20 days ago": ca.LeafLife + 20*24*time.Hour} {
		if reply, err := w.renewal(key, signed(csr, age), csr); err != nil || string(reply.GetNodeId()) != string(node[:]) {
			t.Errorf("a certificate of the dropped CA that is %s: %v", name, err)
		}
	}
	if _, err := w.renewal(key, signed(csr, ca.LeafLife+31*24*time.Hour), csr); !fault.Is(err, fault.Denied) || !strings.Contains(err.Error(), "31 days ago") {
		t.Errorf("one that ended 31 days ago: %v", err)
	}
	thief := w.newKey()
	stolen, err := thief.CSR(pki.Request{})
	if err != nil {
		t.Fatal(err)
	}
	if _, err := w.renewal(thief, signed(stolen, 0), stolen); !link.HandshakeRefused(err) {
		t.Errorf("a key that is on nobody's record: %v", err)
	}
}

func TestFailureLimit(t *testing.T) {
	l, now := newFailureLimit(), time.Unix(1000, 0)
	one, sameNet, other := netip.MustParseAddr("2001:db8::1"), netip.MustParseAddr("2001:db8::2"), netip.MustParseAddr("2001:db8:1::1")
	for range maxFailures {
		if l.blocked(one, now) != 0 {
			t.Fatal("blocked too early")
		}
		l.failed(one, now)
	}
	if l.blocked(sameNet, now) != failureWindow || l.blocked(other, now) != 0 {
		t.Errorf("same network waits %v, another %v", l.blocked(sameNet, now), l.blocked(other, now))
	}
	if l.blocked(one, now.Add(failureWindow)) != 0 {
		t.Error("blocked after the window")
	}
	for i := range maxFailureEntries + 100 {
		l.failed(netip.AddrFrom4([4]byte{10, byte(i >> 16), byte(i >> 8), byte(i)}), now)
	}
	if len(l.entries) > maxFailureEntries+1 {
		t.Errorf("the table has %d entries", len(l.entries))
	}
}
