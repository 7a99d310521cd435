package ca

import (
	"crypto/rand"
	"crypto/x509"
	"crypto/x509/pkix"
	"net/url"
	"time"

	"github.com/relais-mta/relais/shared/fault"
	"github.com/relais-mta/relais/shared/ids"
	"github.com/relais-mta/relais/shared/mailaddr"
	"github.com/relais-mta/relais/shared/pki"
)

// Sign makes the certificate of a node from its request (PKCS #10 in DER). The
// identity comes from the arguments alone; of the request only the key and the
// names for serving TLS are taken. It returns the leaf and the issuing CA.
func (a *Authority) Sign(csrDER []byte, role pki.Role, node ids.Node, now time.Time) ([]*x509.Certificate, error) {
	const op = "ca.Sign"
	if !role.Valid() || node.IsZero() {
		return nil, fault.New(fault.Internal, op, "a certificate needs a role and a node, got %q and %q", role, node)
	}
	csr, err := pki.ParseCSR(csrDER)
	if err != nil {
		return nil, err
	}
	if err := checkNames(csr); err != nil {
		return nil, err
	}
	notAfter := now.Add(LeafLife)
	if notAfter.After(a.issuing.NotAfter) {
		notAfter = a.issuing.NotAfter // a leaf that outlived its CA would fail for reasons hard to see
	}
	if !notAfter.After(now) {
		return nil, fault.New(fault.Unavailable, op, "the issuing CA ended at %s: rotate it", a.issuing.NotAfter.UTC().Format(time.RFC3339))
	}
	template := &x509.Certificate{
		SerialNumber: newSerial(),
		Subject:      pkix.Name{CommonName: node.String()},
		NotBefore:    now.Add(-Backdate),
		NotAfter:     notAfter,
		URIs:         []*url.URL{pki.Identity{Cluster: a.cluster, Role: role, Node: node}.URI()},
		DNSNames:     csr.DNSNames,
		IPAddresses:  csr.IPAddresses,
		KeyUsage:     x509.KeyUsageDigitalSignature,
		ExtKeyUsage:  []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth, x509.ExtKeyUsageClientAuth},
		// RFC 5280 section 4.2.1.9: not a CA.
		BasicConstraintsValid: true,
	}
	der, err := x509.CreateCertificate(rand.Reader, template, a.issuing, csr.PublicKey, a.key)
	if err != nil {
		return nil, fault.Wrap(err, fault.Internal, op, "cannot sign the certificate of %s", node)
	}
	leaf, err := x509.ParseCertificate(der)
	if err != nil {
		return nil, fault.Wrap(err, fault.Internal, op, "the certificate of %s came out damaged", node)
	}
	return []*x509.Certificate{leaf, a.issuing}, nil
}

// checkNames lets plain host names and unicast addresses pass: no wildcard, so
// that a relay's certificate never stands for a name it did not spell out.
func checkNames(csr *x509.CertificateRequest) error {
	const op = "ca.checkNames"
	for _, name := range csr.DNSNames {
		domain, err := mailaddr.ParseDomain(name)
		if err != nil || domain.IsLiteral() || string(domain) != name {
			return fault.Field(op, "csr", "%.80q is not a plain lower-case host name", name)
		}
	}
	for _, address := range csr.IPAddresses {
		if address.IsUnspecified() || address.IsMulticast() {
			return fault.Field(op, "csr", "%s is not an address of one host", address)
		}
	}
	return nil
}
