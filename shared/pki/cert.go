package pki

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/sha256"
	"crypto/x509"
	"encoding/hex"
	"encoding/pem"

	"github.com/relais-mta/relais/shared/fault"
)

// maxCertificates bounds a chain or bundle.
const maxCertificates = 16

// Pin is the SHA-256 of a certificate's SubjectPublicKeyInfo in DER. It stays
// the same when a CA certificate is renewed with its key, and there is one way
// to compute it, which hashes of PEM files lack.
type Pin [sha256.Size]byte

// PinOf returns the pin of a certificate.
func PinOf(cert *x509.Certificate) Pin { return sha256.Sum256(cert.RawSubjectPublicKeyInfo) }

// String returns the pin in lower-case hexadecimal, 64 digits.
func (p Pin) String() string { return hex.EncodeToString(p[:]) }

// EncodeCertificates returns certificates in PEM, in order.
func EncodeCertificates(certs []*x509.Certificate) []byte {
	var out []byte
	for _, cert := range certs {
		out = append(out, pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: cert.Raw})...)
	}
	return out
}

// ParseCertificates reads one or more certificates in PEM.
func ParseCertificates(data []byte) ([]*x509.Certificate, error) {
	const op = "pki.ParseCertificates"
	var ders [][]byte
	for len(data) > 0 {
		var block *pem.Block
		if block, data = pem.Decode(data); block == nil {
			break
		}
		if block.Type == "CERTIFICATE" {
			ders = append(ders, block.Bytes)
		}
	}
	if len(ders) == 0 {
		return nil, fault.New(fault.Invalid, op, "no CERTIFICATE block")
	}
	return ParseChain(ders)
}

// ParseChain reads certificates in DER, at least one and at most 16.
func ParseChain(ders [][]byte) ([]*x509.Certificate, error) {
	const op = "pki.ParseChain"
	if len(ders) == 0 || len(ders) > maxCertificates {
		return nil, fault.New(fault.Invalid, op, "%d certificates, want 1 to %d", len(ders), maxCertificates)
	}
	certs := make([]*x509.Certificate, 0, len(ders))
	for i, der := range ders {
		cert, err := x509.ParseCertificate(der)
		if err != nil {
			return nil, fault.Wrap(err, fault.Invalid, op, "certificate %d is damaged", i+1)
		}
		certs = append(certs, cert)
	}
	return certs, nil
}

// LoadCertificates reads a PEM file of certificates. A missing file is
// fault.NotFound.
func LoadCertificates(path string) ([]*x509.Certificate, error) {
	const op = "pki.LoadCertificates"
	data, err := readFile(path, op)
	if err != nil {
		return nil, err
	}
	certs, err := ParseCertificates(data)
	return certs, fault.Wrap(err, fault.Invalid, op, "%s holds no usable certificates", path)
}

// RawCertificates returns the DER of each certificate.
func RawCertificates(certs []*x509.Certificate) [][]byte {
	ders := make([][]byte, 0, len(certs))
	for _, cert := range certs {
		ders = append(ders, cert.Raw)
	}
	return ders
}

// maxCSRBytes bounds a certificate request; one with many names has 2 KiB.
const maxCSRBytes = 16 << 10

// maxCSRNames bounds the DNS names and addresses of a request.
const maxCSRNames = 64

// ParseCSR reads and checks a certificate request: its signature, a P-256 key,
// and nothing asked for but DNS names and addresses.
func ParseCSR(der []byte) (*x509.CertificateRequest, error) {
	const op = "pki.ParseCSR"
	if len(der) > maxCSRBytes {
		return nil, fault.New(fault.TooLarge, op, "the certificate request has %d bytes, more than %d", len(der), maxCSRBytes)
	}
	csr, err := x509.ParseCertificateRequest(der)
	if err != nil {
		return nil, fault.Wrap(err, fault.Invalid, op, "the certificate request is damaged")
	}
	if err := csr.CheckSignature(); err != nil {
		return nil, fault.Wrap(err, fault.Invalid, op, "the certificate request is not signed by its own key")
	}
	public, ok := csr.PublicKey.(*ecdsa.PublicKey)
	if !ok || public.Curve != elliptic.P256() {
		return nil, fault.New(fault.Invalid, op, "the certificate request is not for an ECDSA key on P-256")
	}
	if len(csr.URIs) != 0 || len(csr.EmailAddresses) != 0 {
		return nil, fault.New(fault.Invalid, op, "the certificate request asks for an identity; control decides it")
	}
	if n := len(csr.DNSNames) + len(csr.IPAddresses); n > maxCSRNames {
		return nil, fault.New(fault.Invalid, op, "the certificate request asks for %d names, more than %d", n, maxCSRNames)
	}
	return csr, nil
}
