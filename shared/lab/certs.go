package lab

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"fmt"
	"math/big"
	"net"
	"net/netip"
	"time"
)

const certificateLife = 30 * 24 * time.Hour

// certificates is the lab's own authority. Its key lives in memory only and
// dies with the lab.
type certificates struct {
	cert   *x509.Certificate
	der    []byte
	key    *ecdsa.PrivateKey
	serial int64
}

func newCertificates() (*certificates, error) {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return nil, fmt.Errorf("lab: CA key: %w", err)
	}
	now := time.Now()
	template := &x509.Certificate{
		SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: "Relais lab CA"},
		NotBefore: now.Add(-time.Hour), NotAfter: now.Add(certificateLife),
		KeyUsage: x509.KeyUsageCertSign, BasicConstraintsValid: true, IsCA: true, MaxPathLenZero: true,
	}
	der, err := x509.CreateCertificate(rand.Reader, template, template, key.Public(), key)
	if err != nil {
		return nil, fmt.Errorf("lab: CA: %w", err)
	}
	cert, err := x509.ParseCertificate(der)
	if err != nil {
		return nil, fmt.Errorf("lab: CA: %w", err)
	}
	return &certificates{cert: cert, der: der, key: key, serial: 1}, nil
}

// leaf issues a server certificate for names and addresses.
func (c *certificates) leaf(names []string, addrs []netip.Addr) (*tls.Config, error) {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return nil, fmt.Errorf("lab: certificate key: %w", err)
	}
	c.serial++
	now := time.Now()
	template := &x509.Certificate{
		SerialNumber: big.NewInt(c.serial), DNSNames: names,
		NotBefore: now.Add(-time.Hour), NotAfter: now.Add(certificateLife),
		KeyUsage: x509.KeyUsageDigitalSignature, ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth},
	}
	for _, a := range addrs {
		template.IPAddresses = append(template.IPAddresses, net.IP(a.AsSlice()))
	}
	der, err := x509.CreateCertificate(rand.Reader, template, c.cert, key.Public(), c.key)
	if err != nil {
		return nil, fmt.Errorf("lab: certificate for %v: %w", names, err)
	}
	return &tls.Config{
		MinVersion:   tls.VersionTLS12, // RFC 8996
		Certificates: []tls.Certificate{{Certificate: [][]byte{der}, PrivateKey: key}},
	}, nil
}

func (c *certificates) pem() []byte {
	return pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: c.der})
}

// CAPEM returns the certificate of the authority that issued what the MX hosts
// present; Dir/ca.pem holds the same.
func (l *Lab) CAPEM() []byte { return l.farm.certs.pem() }

// CAPool returns a pool that trusts the lab's authority and no other.
func (l *Lab) CAPool() *x509.CertPool {
	pool := x509.NewCertPool()
	pool.AddCert(l.farm.certs.cert)
	return pool
}
