package pki

import (
	"crypto/ecdsa"
	"testing"

	"github.com/relais-mta/relais/shared/fault"
)

// FuzzParseCSR reads requests of machines that nobody knows yet.
func FuzzParseCSR(f *testing.F) {
	key, err := NewNodeKey()
	if err != nil {
		f.Fatal(err)
	}
	der, err := key.CSR(Request{})
	if err != nil {
		f.Fatal(err)
	}
	f.Add(der)
	f.Add(der[:len(der)/2])
	f.Fuzz(func(t *testing.T, b []byte) {
		csr, err := ParseCSR(b)
		switch {
		case err != nil && !fault.Is(err, fault.Invalid) && !fault.Is(err, fault.TooLarge):
			t.Fatalf("refused as %v", err)
		case err != nil:
		case len(csr.URIs) > 0 || len(csr.DNSNames)+len(csr.IPAddresses) > maxCSRNames:
			t.Fatalf("a request with %d names and %d identities was taken", len(csr.DNSNames), len(csr.URIs))
		default:
			if _, ok := csr.PublicKey.(*ecdsa.PublicKey); !ok {
				t.Fatalf("a request for a %T was taken", csr.PublicKey)
			}
		}
	})
}

// FuzzParseChain reads what the other side of a handshake calls its chain.
func FuzzParseChain(f *testing.F) {
	f.Add([]byte("-----BEGIN CERTIFICATE-----\nMA==\n-----END CERTIFICATE-----\n"))
	f.Add([]byte{0x30, 0})
	f.Fuzz(func(t *testing.T, b []byte) {
		if chain, err := ParseChain([][]byte{b}); err == nil && len(chain) != 1 {
			t.Fatalf("%d certificates of one", len(chain))
		}
		if chain, err := ParseCertificates(b); err == nil && len(chain) == 0 {
			t.Fatal("no certificate and no error")
		}
	})
}
