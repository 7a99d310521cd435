package pkitest

import (
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"math/big"
	"time"

	"github.com/relais-mta/relais/shared/ids"
	"github.com/relais-mta/relais/shared/pki"
)

// Issuing makes an issuing CA below the root, as control has them. What it
// returns signs where c signed, and its nodes present it in their chains.
func (c *CA) Issuing(notBefore time.Time) *Issuing {
	c.t.Helper()
	key := c.newKey()
	var serial [8]byte
	_, _ = rand.Read(serial[:])
	template := &x509.Certificate{
		SerialNumber: new(big.Int).SetBytes(serial[:]), Subject: pkix.Name{CommonName: "test issuing " + c.Cluster.String()},
		NotBefore: notBefore, NotAfter: notBefore.Add(365 * 24 * time.Hour),
		IsCA: true, BasicConstraintsValid: true, MaxPathLenZero: true, KeyUsage: x509.KeyUsageCertSign,
	}
	cert := c.create(template, c.Root, key, c.key)
	return &Issuing{Cert: cert, signer: &CA{t: c.t, Cluster: c.Cluster, Root: cert, key: key}}
}

// Issuing is an issuing CA.
type Issuing struct {
	Cert   *x509.Certificate
	signer *CA
}

// Certify returns the certificate of a node for a key, with its chain.
func (i *Issuing) Certify(key *pki.NodeKey, role pki.Role, node ids.Node, notBefore, notAfter time.Time) *tls.Certificate {
	leaf := i.signer.Leaf(&key.Private().PublicKey, role, node, notBefore, notAfter)
	return &tls.Certificate{Certificate: [][]byte{leaf.Raw, i.Cert.Raw}, PrivateKey: key.Private(), Leaf: leaf}
}

// Sign returns the leaf of a node for a public key.
func (i *Issuing) Sign(public any, role pki.Role, node ids.Node, notBefore, notAfter time.Time) *x509.Certificate {
	return i.signer.Leaf(public, role, node, notBefore, notAfter)
}
