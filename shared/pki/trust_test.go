package pki_test

import (
	"crypto/x509"
	"strings"
	"testing"
	"time"

	"github.com/relais-mta/relais/shared/ids"
	"github.com/relais-mta/relais/shared/pki"
	"github.com/relais-mta/relais/shared/pki/pkitest"
)

// TestIssuingCAsAreBelieved: an issuing CA may sign while it is in the bundle,
// or before a node has heard of it; not when it was dropped or given up. A node
// that is otherwise known may still come with what a dropped one signed.
func TestIssuingCAsAreBelieved(t *testing.T) {
	const day = 24 * time.Hour
	ca := pkitest.New(t)
	now := time.Now()
	old, next, newest := ca.Issuing(now.Add(-60*day)), ca.Issuing(now.Add(-2*day)), ca.Issuing(now.Add(-day))
	key, err := pki.NewNodeKey()
	if err != nil {
		t.Fatal(err)
	}
	relay := pkitest.NewNode()
	anyone := func(pki.Identity, *x509.Certificate) bool { return true }
	nobody := func(pki.Identity, *x509.Certificate) bool { return false }
	self := func(i pki.Identity, leaf *x509.Certificate) bool { return i.Node == relay && key.Owns(leaf) }
	for name, c := range map[string]struct {
		bundle  []*x509.Certificate
		refused []string
		known   func(pki.Identity, *x509.Certificate) bool
		from    *pkitest.Issuing
		good    bool
	}{
		"the only one":                    {[]*x509.Certificate{old.Cert, ca.Root}, nil, nil, old, true},
		"one of two, which signs":         {[]*x509.Certificate{next.Cert, old.Cert, ca.Root}, nil, nil, next, true},
		"one of two, which signs no more": {[]*x509.Certificate{next.Cert, old.Cert, ca.Root}, nil, nil, old, true},
		"newer than what is known":        {[]*x509.Certificate{old.Cert, ca.Root}, nil, nil, newest, true},
		"newer, but given up":             {[]*x509.Certificate{old.Cert, ca.Root}, []string{pki.KeyID(newest.Cert)}, nil, newest, false},
		"dropped":                         {[]*x509.Certificate{next.Cert, ca.Root}, nil, nil, old, false},
		"dropped, the peer is known":      {[]*x509.Certificate{next.Cert, ca.Root}, nil, self, old, true},
		"dropped, anybody may renew":      {[]*x509.Certificate{next.Cert, ca.Root}, nil, anyone, old, true},
		"dropped, the peer is unknown":    {[]*x509.Certificate{next.Cert, ca.Root}, nil, nobody, old, false},
		"given up, the peer is known":     {[]*x509.Certificate{old.Cert, ca.Root}, []string{pki.KeyID(newest.Cert)}, self, newest, true},
		"a root alone believes them all":  {[]*x509.Certificate{ca.Root}, nil, nil, old, true},
	} {
		t.Run(name, func(t *testing.T) {
			server := ca.Node(pki.RoleControl, pkitest.NewNode())
			server.SetTrust(pki.Trust{Bundle: c.bundle, Refused: c.refused})
			client := pki.NewHolder(c.from.Certify(key, pki.RoleRelay, relay, now.Add(-time.Hour), now.Add(time.Hour)), []*x509.Certificate{ca.Root})
			serverErr, clientErr := handshake(t, pki.ServerConfig(server, pki.Peer{Cluster: ca.Cluster, Role: pki.RoleRelay, Known: c.known}, "x/1"),
				pki.ClientConfig(client, pki.Peer{Cluster: ca.Cluster}, "x/1"))
			if (serverErr == nil) != c.good {
				t.Errorf("server: %v, client: %v", serverErr, clientErr)
			}
			if !c.good && !strings.Contains(serverErr.Error(), "dropped") {
				t.Errorf("the refusal does not say why: %v", serverErr)
			}
		})
	}
}

// TestForeignRootIsNotNewer: being newer helps no CA that the root did not sign.
func TestForeignRootIsNotNewer(t *testing.T) {
	ca, other := pkitest.New(t), pkitest.New(t)
	now := time.Now()
	key, err := pki.NewNodeKey()
	if err != nil {
		t.Fatal(err)
	}
	server := ca.Node(pki.RoleControl, pkitest.NewNode())
	server.SetTrust(pki.Trust{Bundle: []*x509.Certificate{ca.Issuing(now.Add(-time.Hour)).Cert, ca.Root}})
	forged := other.Issuing(now.Add(-time.Minute)).Certify(key, pki.RoleRelay, pkitest.NewNode(), now.Add(-time.Hour), now.Add(time.Hour))
	known := func(pki.Identity, *x509.Certificate) bool { return true }
	serverErr, _ := handshake(t, pki.ServerConfig(server, pki.Peer{Cluster: ca.Cluster, Known: known}, "x/1"),
		pki.ClientConfig(pki.NewHolder(forged, []*x509.Certificate{ca.Root}), pki.Peer{Cluster: ca.Cluster}, "x/1"))
	if serverErr == nil {
		t.Error("a CA of another root is believed")
	}
}

// TestRevokedServers: a removed server is refused by its id and by the serials
// of its certificates, and the trust outlives a renewal of one's own.
func TestRevokedServers(t *testing.T) {
	ca := pkitest.New(t)
	removed, other := pkitest.NewNode(), pkitest.NewNode()
	relay := ca.Node(pki.RoleRelay, pkitest.NewNode())
	for name, c := range map[string]struct {
		list []pki.RevokedServer
		good bool
	}{
		"not listed": {[]pki.RevokedServer{{Server: other, Serials: []string{"ab"}}}, true},
		"by its id":  {[]pki.RevokedServer{{Server: removed}}, false},
	} {
		t.Run(name, func(t *testing.T) {
			server := ca.Node(pki.RoleControl, removed)
			relay.SetTrust(pki.Trust{Bundle: relay.Bundle(), Revoked: c.list})
			relay.Set(relay.Certificate(), relay.Bundle())
			config := pki.ClientConfig(relay, pki.Peer{Cluster: ca.Cluster, Role: pki.RoleControl}, "x/1")
			_, clientErr := handshake(t, pki.ServerConfig(server, pki.Peer{Cluster: ca.Cluster}, "x/1"), config)
			if (clientErr == nil) != c.good || !c.good && !strings.Contains(clientErr.Error(), "removed") {
				t.Errorf("got %v", clientErr)
			}
			if err := relay.Revoked(server.Leaf()); (err == nil) != c.good {
				t.Errorf("asked about an open session: %v", err)
			}
			relay.SetTrust(pki.Trust{Bundle: relay.Bundle(), Revoked: []pki.RevokedServer{{Server: ids.Node{1}, Serials: []string{pki.Serial(server.Leaf())}}}})
			if relay.Revoked(server.Leaf()) == nil {
				t.Error("a listed serial is not refused")
			}
		})
	}
}

// TestDropped: a certificate of a CA that left the bundle is known as such, one
// of a CA that came back is not.
func TestDropped(t *testing.T) {
	ca := pkitest.New(t)
	now := time.Now()
	old, next := ca.Issuing(now.Add(-time.Hour)), ca.Issuing(now)
	key, err := pki.NewNodeKey()
	if err != nil {
		t.Fatal(err)
	}
	leaf := old.Certify(key, pki.RoleRelay, pkitest.NewNode(), now, now.Add(time.Hour)).Leaf
	h := pki.NewHolder(ca.Node(pki.RoleControl, pkitest.NewNode()).Certificate(), []*x509.Certificate{old.Cert, ca.Root})
	for _, step := range []struct {
		bundle  []*x509.Certificate
		dropped bool
	}{
		{[]*x509.Certificate{old.Cert, next.Cert, ca.Root}, false},
		{[]*x509.Certificate{next.Cert, old.Cert, ca.Root}, false},
		{[]*x509.Certificate{next.Cert, ca.Root}, true},
		{[]*x509.Certificate{next.Cert, ca.Root}, true},
		{[]*x509.Certificate{old.Cert, next.Cert, ca.Root}, false},
	} {
		h.SetTrust(pki.Trust{Bundle: step.bundle})
		if got := h.Dropped(leaf); got != step.dropped {
			t.Errorf("with %d CAs: dropped is %t", len(step.bundle), got)
		}
	}
	if pki.Root(h.Bundle()) != ca.Root || pki.BundleSum(h.Bundle()) == pki.BundleSum([]*x509.Certificate{next.Cert, old.Cert, ca.Root}) {
		t.Error("the bundle is not told apart by its order, or has no root")
	}
}
