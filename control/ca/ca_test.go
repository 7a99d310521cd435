package ca

import (
	"crypto/x509"
	"net/netip"
	"strings"
	"testing"
	"time"

	"github.com/relais-mta/relais/shared/fault"
	"github.com/relais-mta/relais/shared/ids"
	"github.com/relais-mta/relais/shared/pki"
)

func newCluster(n byte) (id ids.Cluster) {
	id[0], id[15] = 1, n
	return id
}

func newNode(n byte) (id ids.Node) {
	id[0], id[15] = 2, n
	return id
}

func create(t *testing.T, now time.Time) (*Authority, Material, pki.Key, string) {
	t.Helper()
	material, kek, recovery, err := Create(newCluster(1), now)
	if err != nil {
		t.Fatal(err)
	}
	authority, err := Open(material, newCluster(1), pki.NewSealer(kek))
	if err != nil {
		t.Fatal(err)
	}
	return authority, material, kek, recovery
}

func csr(t *testing.T, request pki.Request) ([]byte, *pki.NodeKey) {
	t.Helper()
	key, err := pki.NewNodeKey()
	if err != nil {
		t.Fatal(err)
	}
	der, err := key.CSR(request)
	if err != nil {
		t.Fatal(err)
	}
	return der, key
}

func TestSign(t *testing.T) {
	now := time.Date(2026, 3, 1, 12, 0, 0, 0, time.UTC)
	authority, _, _, _ := create(t, now)
	der, key := csr(t, pki.Request{DNSNames: []string{"mx1.example.com"}, Addresses: []netip.Addr{netip.MustParseAddr("192.0.2.1"), netip.MustParseAddr("2001:db8::1")}})
	chain, err := authority.Sign(der, pki.RoleRelay, newNode(1), now)
	if err != nil {
		t.Fatal(err)
	}
	leaf := chain[0]
	identity, err := pki.CertIdentity(leaf)
	want := pki.Identity{Cluster: newCluster(1), Role: pki.RoleRelay, Node: newNode(1)}
	if err != nil || identity != want {
		t.Errorf("identity %v, %v; want %v", identity, err, want)
	}
	if !key.Owns(leaf) {
		t.Error("the leaf is for another key")
	}
	if got := now.Sub(leaf.NotBefore); got != Backdate {
		t.Errorf("begins %v before now, want %v", got, Backdate)
	}
	if got := leaf.NotAfter.Sub(now); got != LeafLife {
		t.Errorf("lives %v, want %v", got, LeafLife)
	}
	if leaf.IsCA || len(leaf.DNSNames) != 1 || len(leaf.IPAddresses) != 2 {
		t.Errorf("CA %t, names %v, addresses %v", leaf.IsCA, leaf.DNSNames, leaf.IPAddresses)
	}
	roots, intermediates := x509.NewCertPool(), x509.NewCertPool()
	roots.AddCert(authority.Root())
	intermediates.AddCert(chain[1])
	for _, usage := range []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth, x509.ExtKeyUsageClientAuth} {
		if _, err := leaf.Verify(x509.VerifyOptions{Roots: roots, Intermediates: intermediates, CurrentTime: now, KeyUsages: []x509.ExtKeyUsage{usage}}); err != nil {
			t.Errorf("usage %d: %v", usage, err)
		}
	}
}

func TestLeafNeverOutlivesItsCA(t *testing.T) {
	now := time.Date(2026, 3, 1, 12, 0, 0, 0, time.UTC)
	authority, _, _, _ := create(t, now)
	der, _ := csr(t, pki.Request{})
	late := now.Add(IssuingLife - time.Hour)
	chain, err := authority.Sign(der, pki.RoleControl, newNode(1), late)
	if err != nil {
		t.Fatal(err)
	}
	if !chain[0].NotAfter.Equal(authority.issuing.NotAfter) {
		t.Errorf("leaf ends %v, its CA %v", chain[0].NotAfter, authority.issuing.NotAfter)
	}
	if _, err := authority.Sign(der, pki.RoleControl, newNode(1), now.Add(IssuingLife)); err == nil || !strings.Contains(err.Error(), "rotate") {
		t.Errorf("after the CA's end: %v", err)
	}
}

func TestSignRefuses(t *testing.T) {
	now := time.Date(2026, 3, 1, 12, 0, 0, 0, time.UTC)
	authority, _, _, _ := create(t, now)
	good, _ := csr(t, pki.Request{})
	broken := append([]byte(nil), good...)
	broken[len(broken)-1] ^= 1
	wildcard, _ := csr(t, pki.Request{DNSNames: []string{"*.example.com"}})
	upper, _ := csr(t, pki.Request{DNSNames: []string{"MX.example.com"}})
	any4, _ := csr(t, pki.Request{Addresses: []netip.Addr{netip.MustParseAddr("0.0.0.0")}})
	many, _ := csr(t, pki.Request{DNSNames: strings.Split(strings.Repeat("a.example ", 65)[:649], " ")})
	cases := map[string]struct {
		csr  []byte
		role pki.Role
		node ids.Node
		want string
	}{
		"bad signature": {broken, pki.RoleRelay, newNode(1), "not signed by its own key"},
		"garbage":       {[]byte("x"), pki.RoleRelay, newNode(1), "damaged"},
		"wildcard":      {wildcard, pki.RoleRelay, newNode(1), "plain lower-case host name"},
		"upper case":    {upper, pki.RoleRelay, newNode(1), "plain lower-case host name"},
		"unspecified":   {any4, pki.RoleRelay, newNode(1), "not an address of one host"},
		"too many":      {many, pki.RoleRelay, newNode(1), "65 names"},
		"no role":       {good, "", newNode(1), "needs a role"},
		"no node":       {good, pki.RoleRelay, ids.Node{}, "needs a role"},
	}
	for name, c := range cases {
		t.Run(name, func(t *testing.T) {
			if _, err := authority.Sign(c.csr, c.role, c.node, now); err == nil || !strings.Contains(err.Error(), c.want) {
				t.Errorf("got %v, want it to say %q", err, c.want)
			}
		})
	}
}

func TestRecover(t *testing.T) {
	_, material, kek, recovery := create(t, time.Now())
	for _, text := range []string{recovery, strings.ToLower(recovery), " " + strings.ReplaceAll(recovery, "-", " ") + "\n"} {
		got, err := Recover(material, newCluster(1), text)
		if err != nil || got != kek {
			t.Errorf("%q: %v", text, err)
		}
	}
	_, _, _, other := create(t, time.Now())
	for name, text := range map[string]string{"another cluster's": other, "cut": recovery[:20], "empty": ""} {
		if _, err := Recover(material, newCluster(1), text); err == nil || !strings.Contains(err.Error(), "recovery-key") {
			t.Errorf("%s: %v", name, err)
		}
	}
	if _, err := Recover(material, newCluster(2), recovery); !fault.Is(err, fault.Denied) {
		t.Errorf("material of another cluster: %v", err)
	}
}

func TestOpenNeedsTheKEK(t *testing.T) {
	_, material, kek, _ := create(t, time.Now())
	if _, err := Open(material, newCluster(1), pki.NewSealer(pki.NewKey())); !fault.Is(err, fault.Denied) || !strings.Contains(err.Error(), material.KEKID) {
		t.Errorf("wrong KEK: %v", err)
	}
	if _, err := Open(material, newCluster(2), pki.NewSealer(kek)); err == nil {
		t.Error("the keys of one cluster opened for another")
	}
	if strings.Contains(string(material.Sealed), "PRIVATE") || strings.Contains(string(material.Sealed), "RELAIS ROOT KEY") {
		t.Error("the sealed keys are readable")
	}
}

func TestIssue(t *testing.T) {
	authority, _, _, _ := create(t, time.Now())
	key, err := pki.NewNodeKey()
	if err != nil {
		t.Fatal(err)
	}
	cert, err := authority.Issue(key, pki.RoleControl, newNode(9), pki.Request{DNSNames: []string{"control.example.com"}}, time.Now())
	if err != nil || cert.Leaf == nil || len(cert.Certificate) != 2 {
		t.Fatalf("%v, %v", cert, err)
	}
}
