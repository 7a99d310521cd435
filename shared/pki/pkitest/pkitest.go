// Package pkitest makes certificate authorities and node certificates for
// tests. It is here because control/ca, the real one, is out of reach for the
// tests of relay and shared packages.
package pkitest

import (
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"math/big"
	"net/url"
	"testing"
	"time"

	"github.com/relais-mta/relais/shared/ids"
	"github.com/relais-mta/relais/shared/pki"
)

// CA is the root of one cluster.
type CA struct {
	t       testing.TB
	Cluster ids.Cluster
	Root    *x509.Certificate
	key     *pki.NodeKey
}

// New makes the CA of a new cluster, valid from 90 days ago to 90 days ahead.
func New(t testing.TB) *CA {
	t.Helper()
	ca := &CA{t: t, Cluster: ids.Cluster(ids.NewMessage(time.Now()))}
	ca.key = ca.newKey()
	template := &x509.Certificate{
		SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: "test root " + ca.Cluster.String()},
		NotBefore: time.Now().Add(-90 * 24 * time.Hour), NotAfter: time.Now().Add(90 * 24 * time.Hour),
		IsCA: true, BasicConstraintsValid: true, KeyUsage: x509.KeyUsageCertSign,
	}
	ca.Root = ca.create(template, template, ca.key, ca.key)
	return ca
}

// Pin returns the pin of the root.
func (c *CA) Pin() pki.Pin { return pki.PinOf(c.Root) }

// NewNode returns a fresh node id.
func NewNode() ids.Node { return ids.Node(ids.NewMessage(time.Now())) }

// Leaf signs a certificate of a node for a key, valid from notBefore to notAfter.
func (c *CA) Leaf(public any, role pki.Role, node ids.Node, notBefore, notAfter time.Time) *x509.Certificate {
	c.t.Helper()
	var serial [8]byte
	_, _ = rand.Read(serial[:])
	template := &x509.Certificate{
		SerialNumber: new(big.Int).SetBytes(serial[:]), Subject: pkix.Name{CommonName: node.String()},
		NotBefore: notBefore, NotAfter: notAfter,
		URIs:        []*url.URL{pki.Identity{Cluster: c.Cluster, Role: role, Node: node}.URI()},
		KeyUsage:    x509.KeyUsageDigitalSignature,
		ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth, x509.ExtKeyUsageClientAuth},
	}
	der, err := x509.CreateCertificate(rand.Reader, template, c.Root, public, c.key.Private())
	if err != nil {
		c.t.Fatal(err)
	}
	return c.parse(der)
}

// Node returns a holder of a fresh node's certificate, good for an hour.
func (c *CA) Node(role pki.Role, node ids.Node) *pki.Holder {
	c.t.Helper()
	return c.NodeWith(c.newKey(), role, node, time.Now().Add(-time.Minute), time.Now().Add(time.Hour))
}

// NodeWith returns a holder of a certificate for a given key and time.
func (c *CA) NodeWith(key *pki.NodeKey, role pki.Role, node ids.Node, notBefore, notAfter time.Time) *pki.Holder {
	c.t.Helper()
	leaf := c.Leaf(&key.Private().PublicKey, role, node, notBefore, notAfter)
	cert := &tls.Certificate{Certificate: [][]byte{leaf.Raw}, PrivateKey: key.Private(), Leaf: leaf}
	return pki.NewHolder(cert, []*x509.Certificate{c.Root})
}

func (c *CA) newKey() *pki.NodeKey {
	c.t.Helper()
	key, err := pki.NewNodeKey()
	if err != nil {
		c.t.Fatal(err)
	}
	return key
}

func (c *CA) create(template, parent *x509.Certificate, key, parentKey *pki.NodeKey) *x509.Certificate {
	c.t.Helper()
	der, err := x509.CreateCertificate(rand.Reader, template, parent, &key.Private().PublicKey, parentKey.Private())
	if err != nil {
		c.t.Fatal(err)
	}
	return c.parse(der)
}

func (c *CA) parse(der []byte) *x509.Certificate {
	c.t.Helper()
	cert, err := x509.ParseCertificate(der)
	if err != nil {
		c.t.Fatal(err)
	}
	return cert
}
