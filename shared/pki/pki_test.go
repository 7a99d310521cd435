package pki_test

import (
	"bytes"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"net"
	"net/netip"
	"net/url"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/relais-mta/relais/shared/fault"
	"github.com/relais-mta/relais/shared/ids"
	"github.com/relais-mta/relais/shared/pki"
	"github.com/relais-mta/relais/shared/pki/pkitest"
)

func newToken(t *testing.T) pki.JoinToken {
	t.Helper()
	return pki.NewJoinToken(pki.RoleRelay, ids.Token(ids.NewMessage(time.Now())), pki.Pin{1, 2, 3})
}

func TestTokenBothWays(t *testing.T) {
	for _, token := range []pki.JoinToken{
		newToken(t),
		pki.NewJoinToken(pki.RoleControl, ids.Token(ids.NewMessage(time.Now())), pki.Pin{1}, pki.Pin{2}),
	} {
		got, err := pki.ParseJoinToken(" " + token.String() + "\n")
		if err != nil {
			t.Fatal(err)
		}
		if got.String() != token.String() || got.Role != token.Role || len(got.Pins) != len(token.Pins) || got.SecretHash() != token.SecretHash() {
			t.Errorf("%s became %s", token, got)
		}
	}
	if one, two := newToken(t), newToken(t); one.Secret == two.Secret {
		t.Error("two tokens have one secret")
	}
}

func TestTokenErrorsKeepTheSecret(t *testing.T) {
	token := newToken(t)
	parts := strings.Split(token.String(), ".")
	cases := map[string]string{
		"prefix":      strings.Replace(token.String(), "rl1.", "xx1.", 1),
		"no prefix":   strings.Join(parts[1:], "."),
		"three parts": strings.Join(parts[:3], "."),
		"five parts":  token.String() + ".x",
		"pin":         strings.Replace(token.String(), parts[1], "zz", 1),
		"three pins":  strings.Replace(token.String(), parts[1], parts[1]+"-"+parts[1]+"-"+parts[1], 1),
		"id":          strings.Replace(token.String(), "tok_", "msg_", 1),
		"short":       token.String()[:len(token.String())-10],
		"long":        token.String() + strings.Repeat("a", 500),
		"empty":       "",
	}
	for name, text := range cases {
		_, err := pki.ParseJoinToken(text)
		if !fault.Is(err, fault.Invalid) || !strings.HasPrefix(fault.Public(err), "token: ") {
			t.Errorf("%s: %v", name, err)
			continue
		}
		if strings.Contains(err.Error(), token.Secret[:8]) {
			t.Errorf("%s: the error tells the secret: %v", name, err)
		}
	}
}

func TestProofDependsOnEverything(t *testing.T) {
	secret, exporter, csr := [32]byte{1}, bytes.Repeat([]byte{2}, 32), [32]byte{3}
	base := pki.Proof(secret, exporter, csr, pki.RoleRelay)
	others := [][32]byte{
		pki.Proof([32]byte{9}, exporter, csr, pki.RoleRelay),
		pki.Proof(secret, bytes.Repeat([]byte{9}, 32), csr, pki.RoleRelay),
		pki.Proof(secret, exporter, [32]byte{9}, pki.RoleRelay),
		pki.Proof(secret, exporter, csr, pki.RoleControl),
	}
	for i, other := range others {
		if other == base {
			t.Errorf("proof %d is the same", i)
		}
	}
}

func TestSealer(t *testing.T) {
	key := pki.NewKey()
	sealer, plain, aad := pki.NewSealer(key), []byte("a private key"), []byte("dkim acme.example")
	sealed, err := sealer.Seal(plain, aad)
	if err != nil {
		t.Fatal(err)
	}
	if len(sealed) != len(plain)+pki.SealOverheadBytes || bytes.Contains(sealed, plain) {
		t.Errorf("sealed as %x", sealed)
	}
	if got, err := pki.NewSealer(key).Open(sealed, aad); err != nil || !bytes.Equal(got, plain) {
		t.Errorf("opened as %q, %v", got, err)
	}
	again, err := sealer.Seal(plain, aad)
	if err != nil || bytes.Equal(again, sealed) {
		t.Errorf("two sealings are equal, or %v", err)
	}
	for i := range sealed {
		flipped := bytes.Clone(sealed)
		flipped[i] ^= 1
		if _, err := sealer.Open(flipped, aad); err == nil {
			t.Errorf("byte %d may be changed", i)
		}
	}
	if _, err := sealer.Open(sealed, []byte("dkim other.example")); !fault.Is(err, fault.Invalid) {
		t.Errorf("opened in another place: %v", err)
	}
	if _, err := sealer.Open(sealed[:10], aad); !fault.Is(err, fault.Invalid) {
		t.Errorf("cut: %v", err)
	}
	other := pki.NewSealer(pki.NewKey())
	if _, err := other.Open(sealed, aad); !fault.Is(err, fault.Denied) || !strings.Contains(err.Error(), sealer.KeyID()) || !strings.Contains(err.Error(), other.KeyID()) {
		t.Errorf("another key: %v", err)
	}
}

func TestKeyFiles(t *testing.T) {
	dir := t.TempDir()
	path := filepath.Join(dir, "kek")
	if _, err := pki.LoadKey(path); !fault.Is(err, fault.NotFound) {
		t.Errorf("no file: %v", err)
	}
	key := pki.NewKey()
	if err := pki.WriteKey(path, key); err != nil {
		t.Fatal(err)
	}
	if info, err := os.Stat(path); err != nil || info.Mode().Perm() != 0o600 {
		t.Errorf("mode %v, %v", info.Mode(), err)
	}
	if got, err := pki.LoadKey(path); err != nil || got != key {
		t.Errorf("read back: %v", err)
	}
	if err := os.WriteFile(path, []byte("rubbish"), 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := pki.LoadKey(path); !fault.Is(err, fault.Invalid) {
		t.Errorf("rubbish: %v", err)
	}
	if entries, err := os.ReadDir(dir); err != nil || len(entries) != 1 {
		t.Errorf("files left behind: %v, %v", entries, err)
	}
}

func TestNodeKey(t *testing.T) {
	path := filepath.Join(t.TempDir(), "node.key")
	key, err := pki.LoadOrCreateNodeKey(path)
	if err != nil {
		t.Fatal(err)
	}
	if info, err := os.Stat(path); err != nil || info.Mode().Perm() != 0o600 {
		t.Errorf("mode %v, %v", info.Mode(), err)
	}
	again, err := pki.LoadOrCreateNodeKey(path)
	if err != nil || !again.Private().Equal(key.Private()) {
		t.Errorf("the key changed: %v", err)
	}
	if again.Derive("a") != key.Derive("a") || key.Derive("a") == key.Derive("b") {
		t.Error("derived values are wrong")
	}
	p384, err := ecdsa.GenerateKey(elliptic.P384(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	der, err := x509.MarshalPKCS8PrivateKey(p384)
	if err != nil {
		t.Fatal(err)
	}
	for name, data := range map[string][]byte{
		"rubbish": []byte("x"),
		"P-384":   pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: der}),
	} {
		if err := os.WriteFile(path, data, 0o600); err != nil {
			t.Fatal(err)
		}
		if _, err := pki.LoadOrCreateNodeKey(path); !fault.Is(err, fault.Invalid) || !strings.Contains(err.Error(), path) {
			t.Errorf("%s: %v", name, err)
		}
		if kept, err := os.ReadFile(path); err != nil || !bytes.Equal(kept, data) {
			t.Errorf("%s: the file was replaced", name)
		}
	}
}

func TestIdentity(t *testing.T) {
	want := pki.Identity{Cluster: ids.Cluster(ids.NewMessage(time.Now())), Role: pki.RoleRelay, Node: pkitest.NewNode()}
	got, err := pki.ParseIdentity(want.URI())
	if err != nil || got != want {
		t.Errorf("%s: %v, %v", want, got, err)
	}
	text := want.String()
	for name, bad := range map[string]string{
		"scheme":       strings.Replace(text, "spiffe:", "https:", 1),
		"role":         strings.Replace(text, "/relay/", "/admin/", 1),
		"no node":      text[:strings.LastIndex(text, "/")+1],
		"longer":       text + "/x",
		"query":        text + "?x",
		"user":         strings.Replace(text, "spiffe://", "spiffe://u@", 1),
		"no cluster":   "spiffe:///relay/" + want.Node.String(),
		"cluster kind": strings.Replace(text, "cls_", "nod_", 1),
	} {
		uri, err := url.Parse(bad)
		if err != nil {
			t.Fatal(err)
		}
		if _, err := pki.ParseIdentity(uri); !fault.Is(err, fault.Denied) {
			t.Errorf("%s: %s was taken: %v", name, bad, err)
		}
	}
}

// handshake connects a client and a server over a pipe of memory.
func handshake(t *testing.T, server, client *tls.Config) (serverErr, clientErr error) {
	t.Helper()
	a, b := net.Pipe()
	done := make(chan error, 1)
	go func() {
		conn := tls.Server(a, server)
		done <- conn.Handshake()
		_ = conn.Close()
	}()
	conn := tls.Client(b, client)
	clientErr = conn.Handshake()
	if clientErr == nil { // the server's refusal arrives after our handshake
		_, _ = conn.Read(make([]byte, 1))
	}
	_ = conn.Close()
	return <-done, clientErr
}

func TestPeersAreChecked(t *testing.T) {
	ca, other := pkitest.New(t), pkitest.New(t)
	server := ca.Node(pki.RoleControl, pkitest.NewNode())
	key, err := pki.NewNodeKey()
	if err != nil {
		t.Fatal(err)
	}
	ended := func(ago time.Duration) *pki.Holder {
		return ca.NodeWith(key, pki.RoleRelay, pkitest.NewNode(), time.Now().Add(-ago-time.Hour), time.Now().Add(-ago))
	}
	peer := pki.Peer{Cluster: ca.Cluster, Role: pki.RoleRelay}
	lax := pki.Peer{Cluster: ca.Cluster, Grace: pki.RenewGrace}
	const day = 24 * time.Hour
	cases := map[string]struct {
		client *pki.Holder
		peer   pki.Peer
		good   bool
	}{
		"relay":                   {ca.Node(pki.RoleRelay, pkitest.NewNode()), peer, true},
		"control server":          {ca.Node(pki.RoleControl, pkitest.NewNode()), peer, false},
		"other cluster":           {other.Node(pki.RoleRelay, pkitest.NewNode()), peer, false},
		"ended":                   {ended(time.Minute), peer, false},
		"ended, renewing":         {ended(time.Minute), lax, true},
		"ended 29 days, renewing": {ended(29 * day), lax, true},
		"ended 31 days, renewing": {ended(31 * day), lax, false},
		"wrong cluster wanted":    {ca.Node(pki.RoleRelay, pkitest.NewNode()), pki.Peer{Cluster: other.Cluster}, false},
	}
	for name, c := range cases {
		t.Run(name, func(t *testing.T) {
			clientConfig := pki.ClientConfig(c.client, pki.Peer{Cluster: ca.Cluster, Role: pki.RoleControl}, "x/1")
			if c.client.Bundle()[0] != ca.Root { // believes our server, is not believed by it
				clientConfig = pki.ClientConfig(pki.NewHolder(c.client.Certificate(), server.Bundle()), pki.Peer{Cluster: ca.Cluster, Role: pki.RoleControl}, "x/1")
			}
			serverErr, clientErr := handshake(t, pki.ServerConfig(server, c.peer, "x/1"), clientConfig)
			if (serverErr == nil) != c.good {
				t.Errorf("server: %v, client: %v", serverErr, clientErr)
			}
		})
	}
}

func TestNoCertificateNoSession(t *testing.T) {
	ca := pkitest.New(t)
	server := pki.ServerConfig(ca.Node(pki.RoleControl, pkitest.NewNode()), pki.Peer{Cluster: ca.Cluster}, "x/1")
	if err, _ := handshake(t, server, pki.PinnedClientConfig([]pki.Pin{ca.Pin()}, "x/1")); err == nil {
		t.Error("a client without a certificate was let in")
	}
}

func TestPinning(t *testing.T) {
	ca, other := pkitest.New(t), pkitest.New(t)
	open := pki.OpenServerConfig(ca.Node(pki.RoleControl, pkitest.NewNode()), "x/1")
	if _, err := handshake(t, open, pki.PinnedClientConfig([]pki.Pin{other.Pin(), ca.Pin()}, "x/1")); err != nil {
		t.Errorf("one of two pins: %v", err)
	}
	_, err := handshake(t, open, pki.PinnedClientConfig([]pki.Pin{other.Pin()}, "x/1"))
	var pin *pki.PinError
	if !errors.As(err, &pin) || pin.Presented != ca.Pin() {
		t.Errorf("wrong pin: %v", err)
	}
	relay := pki.OpenServerConfig(ca.Node(pki.RoleRelay, pkitest.NewNode()), "x/1")
	if _, err := handshake(t, relay, pki.PinnedClientConfig([]pki.Pin{ca.Pin()}, "x/1")); !fault.Is(err, fault.Denied) || !strings.Contains(err.Error(), "want a control server") {
		t.Errorf("a relay posing as a control server: %v", err)
	}
	// The right CA in the chain, but a leaf of another: the pin alone must not do.
	forged := other.Node(pki.RoleControl, pkitest.NewNode())
	cert := *forged.Certificate()
	cert.Certificate = append(cert.Certificate, ca.Root.Raw)
	if _, err := handshake(t, &tls.Config{Certificates: []tls.Certificate{cert}, NextProtos: []string{"x/1"}}, pki.PinnedClientConfig([]pki.Pin{ca.Pin()}, "x/1")); !fault.Is(err, fault.Denied) {
		t.Errorf("a leaf of another CA: %v", err)
	}
	key, keyErr := pki.NewNodeKey()
	if keyErr != nil {
		t.Fatal(keyErr)
	}
	later := ca.NodeWith(key, pki.RoleControl, pkitest.NewNode(), time.Now().Add(time.Hour), time.Now().Add(2*time.Hour))
	if _, err := handshake(t, pki.OpenServerConfig(later, "x/1"), pki.PinnedClientConfig([]pki.Pin{ca.Pin()}, "x/1")); err == nil || !strings.Contains(err.Error(), "set the clock") {
		t.Errorf("a certificate of later: %v", err)
	}
}

func TestHolderReload(t *testing.T) {
	ca, dir := pkitest.New(t), t.TempDir()
	files := pki.Files{Cert: filepath.Join(dir, "cert.pem"), Key: filepath.Join(dir, "key.pem"), CA: filepath.Join(dir, "ca.pem")}
	write := func() *x509.Certificate {
		t.Helper()
		key, err := pki.NewNodeKey()
		if err != nil {
			t.Fatal(err)
		}
		leaf := ca.NodeWith(key, pki.RoleRelay, pkitest.NewNode(), time.Now().Add(-time.Hour), time.Now().Add(time.Hour)).Leaf()
		encoded, err := key.PEM()
		if err != nil {
			t.Fatal(err)
		}
		for path, data := range map[string][]byte{files.Key: encoded, files.Cert: pki.EncodeCertificates([]*x509.Certificate{leaf}), files.CA: pki.EncodeCertificates([]*x509.Certificate{ca.Root})} {
			if err := pki.WriteFile(path, data, 0o600); err != nil {
				t.Fatal(err)
			}
		}
		return leaf
	}
	first := write()
	holder, err := pki.LoadHolder(files)
	if err != nil || !holder.Leaf().Equal(first) {
		t.Fatalf("loaded %v", err)
	}
	second := write()
	if err := holder.Reload(); err != nil || !holder.Leaf().Equal(second) {
		t.Errorf("not reloaded: %v", err)
	}
	if err := os.WriteFile(files.Cert, []byte("half a fi"), 0o600); err != nil {
		t.Fatal(err)
	}
	if err := holder.Reload(); !fault.Is(err, fault.Invalid) || !holder.Leaf().Equal(second) {
		t.Errorf("a damaged file: %v", err)
	}
}

func TestRenewAt(t *testing.T) {
	start := time.Date(2026, 1, 1, 0, 0, 0, 0, time.UTC)
	leaf := &x509.Certificate{NotBefore: start, NotAfter: start.Add(30 * time.Hour)}
	if got := pki.RenewAt(leaf, 0); !got.Equal(start.Add(10 * time.Hour)) {
		t.Errorf("without spread at %v", got)
	}
	if got := pki.RenewAt(leaf, 1); !got.Equal(start.Add(13 * time.Hour)) {
		t.Errorf("with all spread at %v", got)
	}
}

func TestCSRNames(t *testing.T) {
	key, err := pki.NewNodeKey()
	if err != nil {
		t.Fatal(err)
	}
	der, err := key.CSR(pki.Request{DNSNames: []string{"a.example"}, Addresses: []netip.Addr{netip.MustParseAddr("::ffff:192.0.2.1")}})
	if err != nil {
		t.Fatal(err)
	}
	csr, err := pki.ParseCSR(der)
	if err != nil || len(csr.DNSNames) != 1 || csr.IPAddresses[0].String() != "192.0.2.1" {
		t.Errorf("%v, %v", csr, err)
	}
}

// FuzzParseJoinToken holds that what is taken as a token says the same again.
func FuzzParseJoinToken(f *testing.F) {
	token := pki.NewJoinToken(pki.RoleRelay, ids.Token(ids.NewMessage(time.UnixMilli(1_700_000_000_000))), pki.Pin{1}, pki.Pin{2})
	f.Add(token.String())
	f.Add("ct1." + strings.Repeat("a", 52) + ".tok_x.y")
	f.Fuzz(func(t *testing.T, text string) {
		token, err := pki.ParseJoinToken(text)
		if err != nil {
			return
		}
		again, err := pki.ParseJoinToken(token.String())
		if err != nil || again.String() != token.String() {
			t.Errorf("%q became %q, %v", text, token, err)
		}
	})
}
