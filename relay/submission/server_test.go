package submission

import (
	"bufio"
	"bytes"
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/hmac"
	"crypto/rand"
	"crypto/sha256"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/base64"
	"io"
	"log/slog"
	"math/big"
	"net"
	"net/netip"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/relais-mta/relais/relay"
	"github.com/relais-mta/relais/shared/fault"
	"github.com/relais-mta/relais/shared/ids"
	"github.com/relais-mta/relais/shared/policy"
)

var testTLS = sync.OnceValues(func() (server, client *tls.Config) {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		panic(err)
	}
	template := &x509.Certificate{
		SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: "mx.example"}, DNSNames: []string{"mx.example"},
		NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(time.Hour),
	}
	der, err := x509.CreateCertificate(rand.Reader, template, template, &key.PublicKey, key)
	if err != nil {
		panic(err)
	}
	leaf, err := x509.ParseCertificate(der)
	if err != nil {
		panic(err)
	}
	roots := x509.NewCertPool()
	roots.AddCert(leaf)
	return &tls.Config{Certificates: []tls.Certificate{{Certificate: [][]byte{der}, PrivateKey: key}}},
		&tls.Config{RootCAs: roots, ServerName: "mx.example"}
})

// fakeSpool keeps what was accepted in memory.
type fakeSpool struct {
	mu       sync.Mutex
	accepted []accepted
	open     int // bodies neither accepted nor discarded

	admit, write, accept error
}

type accepted struct {
	env         *relay.Envelope
	text        string
	headerBytes int64
	hash        [32]byte
}

type fakeBody struct {
	spool *fakeSpool
	bytes.Buffer
	headerBytes int64
	hash        [32]byte
	sealed      bool
	over        bool
}

func (s *fakeSpool) Admit(int64) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.admit
}

func (s *fakeSpool) NewBody() Body {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.open++
	return &fakeBody{spool: s}
}

func (s *fakeSpool) Accept(_ context.Context, env *relay.Envelope, body Body) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.accept != nil {
		return s.accept
	}
	b := body.(*fakeBody)
	if !b.sealed || b.over {
		return fault.New(fault.Internal, "test", "the body is not sealed, or was used before")
	}
	b.over = true
	s.open--
	s.accepted = append(s.accepted, accepted{env, b.String(), b.headerBytes, b.hash})
	return nil
}

func (b *fakeBody) Write(p []byte) (int, error) {
	if b.spool.write != nil {
		return 0, b.spool.write
	}
	return b.Buffer.Write(p)
}

func (b *fakeBody) Seal(headerBytes int64, hash [32]byte) error {
	b.headerBytes, b.hash, b.sealed = headerBytes, hash, true
	return nil
}

func (b *fakeBody) Discard() {
	b.spool.mu.Lock()
	defer b.spool.mu.Unlock()
	if !b.over {
		b.over = true
		b.spool.open--
	}
}

func (s *fakeSpool) last(t testing.TB) accepted {
	t.Helper()
	s.mu.Lock()
	defer s.mu.Unlock()
	if len(s.accepted) == 0 {
		t.Fatal("nothing was accepted")
	}
	return s.accepted[len(s.accepted)-1]
}

func (s *fakeSpool) count() int {
	s.mu.Lock()
	defer s.mu.Unlock()
	return len(s.accepted)
}

// id makes the n-th id of a kind.
func id[T ~[ids.Size]byte](n byte) T {
	var x T
	x[0], x[ids.Size-1] = 1, n
	return x
}

const testSecret = "tCmfxa9vTm4cVQAFPpVhbZ3EBVWnT7vD"

// world is a server with a small cluster behind it: tenant acme with stream
// pools here and elsewhere, and another tenant.
type world struct {
	t          testing.TB
	policy     atomic.Pointer[policy.Directory]
	away       atomic.Bool // control is away
	spool      *fakeSpool
	server     *Server
	registry   *prometheus.Registry
	log        lockedBuffer
	implicit   string
	explicit   string
	user       string
	expired    string
	suspended  string
	onlyRemote string
}

type lockedBuffer struct {
	mu sync.Mutex
	b  bytes.Buffer
}

func (l *lockedBuffer) Write(p []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.Write(p)
}

func (l *lockedBuffer) String() string {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.String()
}

const testPolicy = `
[[stream]]
tenant = "*"
project = "*"
name = "transactional"
kind = "transactional"
pool = "default"
[[stream]]
tenant = "*"
project = "*"
name = "bulk"
kind = "bulk"
pool = "default"
[[stream]]
tenant = "*"
project = "*"
name = "far"
kind = "bulk"
pool = "far"
[[stream]]
tenant = "*"
project = "*"
name = "foreign"
kind = "bulk"
pool = "other-own"
`

func buildView(t testing.TB, change func(*policy.View)) policy.View {
	t.Helper()
	doc, err := policy.Parse(map[string]string{"streams": testPolicy})
	if err != nil {
		t.Fatal(err)
	}
	acme, other, gone := id[ids.Tenant](1), id[ids.Tenant](2), id[ids.Tenant](3)
	shop, theirs, old := id[ids.Project](4), id[ids.Project](5), id[ids.Project](6)
	near, far, own := id[ids.Pool](7), id[ids.Pool](8), id[ids.Pool](9)
	here, there := id[ids.Node](10), id[ids.Node](11)
	v := policy.View{
		Node: here, Revision: 7, Document: doc,
		Tenants:  []policy.Tenant{{ID: acme, Name: "acme"}, {ID: other, Name: "other"}, {ID: gone, Name: "gone", Suspended: true}},
		Projects: []policy.Project{{ID: shop, Tenant: acme, Name: "shop"}, {ID: theirs, Tenant: other, Name: "shop"}, {ID: old, Tenant: gone, Name: "shop"}},
		Domains: []policy.Domain{
			{Name: "acme.example", Tenant: acme, ReturnPath: "rp.acme.example"},
			{Name: "other.example", Tenant: other, ReturnPath: "rp.other.example"},
		},
		Pools: []policy.Pool{{ID: near, Name: "default", Kind: policy.PoolShared}, {ID: far, Name: "far", Kind: policy.PoolShared}, {ID: own, Name: "other-own", Kind: policy.PoolDedicated, Tenant: other}},
	}
	for i := range v.CredentialKey {
		v.CredentialKey[i] = byte(i)
	}
	mac := hmac.New(sha256.New, v.CredentialKey[:])
	_, _ = mac.Write([]byte(testSecret))
	hash := [32]byte(mac.Sum(nil))
	v.Credentials = []policy.Credential{
		{ID: id[ids.Credential](1), Tenant: acme, Project: shop, SecretHash: hash},
		{ID: id[ids.Credential](2), Tenant: acme, Project: shop, SecretHash: hash, NotAfter: time.Now().Add(-time.Hour)},
		{ID: id[ids.Credential](3), Tenant: gone, Project: old, SecretHash: hash},
		{ID: id[ids.Credential](4), Tenant: acme, Project: shop, SecretHash: hash, Stream: "far"},
	}
	ip, remote := netip.MustParseAddr("127.0.0.9"), netip.MustParseAddr("127.0.0.10")
	v.Sources = []policy.Source{
		{ID: id[ids.Source](1), Bind: ip, Public: ip, EHLO: "out.example", Pool: near, Owner: here, Epoch: 1},
		{ID: id[ids.Source](2), Bind: remote, Public: remote, EHLO: "out2.example", Pool: far, Owner: there, Epoch: 1},
	}
	if change != nil {
		change(&v)
	}
	return v
}

func (w *world) setView(change func(*policy.View)) {
	w.t.Helper()
	v := buildView(w.t, change)
	dir, err := policy.Compile(&v)
	if err != nil {
		w.t.Fatal(err)
	}
	w.policy.Store(dir)
}

func newWorld(t testing.TB, change func(*policy.View)) *world {
	t.Helper()
	return newWorldWith(t, change, func(*Options) {})
}

func newWorldWith(t testing.TB, change func(*policy.View), set func(*Options)) *world {
	t.Helper()
	w := &world{t: t, spool: &fakeSpool{}, registry: prometheus.NewRegistry(), user: id[ids.Credential](1).String(), expired: id[ids.Credential](2).String(),
		suspended: id[ids.Credential](3).String(), onlyRemote: id[ids.Credential](4).String()}
	w.setView(change)
	serverTLS, _ := testTLS()
	var err error
	opt := Options{
		Hostname: "mx.example", TLS: serverTLS, Policy: w.policy.Load, Connected: func() bool { return !w.away.Load() },
		Spool: w.spool, BinaryMIME: true, Registerer: w.registry, Logger: slog.New(slog.NewJSONHandler(&w.log, &slog.HandlerOptions{Level: slog.LevelDebug})),
	}
	set(&opt)
	w.server, err = New(opt)
	if err != nil {
		t.Fatal(err)
	}
	serve := func(f func(net.Listener) error) string {
		l, err := net.Listen("tcp", "127.0.0.1:0")
		if err != nil {
			t.Fatal(err)
		}
		served := make(chan error, 1)
		go func() { served <- f(l) }()
		t.Cleanup(func() {
			if err := <-served; err != nil {
				t.Errorf("Serve: %v", err)
			}
		})
		return l.Addr().String()
	}
	w.implicit, w.explicit = serve(w.server.ServeTLS), serve(w.server.ServeSTARTTLS)
	t.Cleanup(func() {
		ctx, cancel := context.WithTimeout(context.Background(), 20*time.Second) // no client is left
		defer cancel()
		_ = w.server.Shutdown(ctx)
		if w.spool.open != 0 {
			t.Errorf("%d bodies were neither accepted nor discarded", w.spool.open)
		}
		if strings.Contains(w.log.String(), testSecret) {
			t.Error("the log shows a secret")
		}
	})
	return w
}

// peer is a client that says exactly what it is told.
type peer struct {
	t testing.TB
	net.Conn
	r *bufio.Reader
}

// dial connects with implicit TLS and says EHLO.
func (w *world) dial(t testing.TB) *peer {
	t.Helper()
	_, clientTLS := testTLS()
	conn, err := tls.Dial("tcp", w.implicit, clientTLS)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = conn.Close() })
	p := newPeerOn(t, conn)
	p.expect("220 ")
	p.do("EHLO client.example", "250-")
	return p
}

func newPeerOn(t testing.TB, conn net.Conn) *peer {
	_ = conn.SetDeadline(time.Now().Add(20 * time.Second))
	return &peer{t, conn, bufio.NewReader(conn)}
}

// login connects and authenticates.
func (w *world) login(t testing.TB) *peer {
	t.Helper()
	p := w.dial(t)
	p.do("AUTH PLAIN "+plain(w.user, testSecret), "235 2.7.0")
	return p
}

func plain(user, secret string) string {
	return base64.StdEncoding.EncodeToString([]byte("\x00" + user + "\x00" + secret))
}

func b64(s string) string { return base64.StdEncoding.EncodeToString([]byte(s)) }

func (p *peer) send(text string) {
	p.t.Helper()
	if _, err := io.WriteString(p.Conn, text); err != nil {
		p.t.Fatalf("sending %q: %v", text, err)
	}
}

func (p *peer) expect(prefix string) string {
	p.t.Helper()
	var all strings.Builder
	for {
		line, err := p.r.ReadString('\n')
		if err != nil {
			p.t.Fatalf("reading a reply after %q: %v", all.String(), err)
		}
		all.WriteString(line)
		if len(line) < 4 || line[3] == ' ' {
			break
		}
	}
	if got := all.String(); !strings.HasPrefix(got, prefix) {
		p.t.Fatalf("reply %q, want %q", got, prefix)
	}
	return all.String()
}

func (p *peer) do(command, prefix string) string {
	p.t.Helper()
	p.send(command + "\r\n")
	return p.expect(prefix)
}

// mail sends a message to one recipient and wants the reply to the final dot.
func (p *peer) mail(message, prefix string) string {
	p.t.Helper()
	p.do("MAIL FROM:<bounce@acme.example>", "250")
	p.do("RCPT TO:<ann@example.net>", "250")
	p.do("DATA", "354")
	p.send(strings.ReplaceAll(message, "\n", "\r\n") + ".\r\n")
	return p.expect(prefix)
}
