package ca

import (
	"crypto/x509"
	"strings"
	"testing"
	"time"

	"github.com/relais-mta/relais/shared/pki"
)

// TestNextIssuing: the new CA signs below the same root with another key, is
// newer than the old one however fast it follows, and opens with the same KEK.
func TestNextIssuing(t *testing.T) {
	now := time.Date(2026, 3, 1, 12, 0, 0, 0, time.UTC)
	old, material, kek, _ := create(t, now)
	sealer := pki.NewSealer(kek)
	at := now
	for range 5 { // as fast as that
		before, err := Open(material, newCluster(1), sealer)
		if err != nil {
			t.Fatal(err)
		}
		next, err := NextIssuing(material, newCluster(1), sealer, at)
		if err != nil {
			t.Fatal(err)
		}
		if !next.Certificate.NotBefore.After(before.issuing.NotBefore) || next.Certificate.NotBefore.After(at) || next.Certificate.NotAfter.Before(at.Add(IssuingLife-2*Backdate)) {
			t.Fatalf("from %s to %s, the old one from %s", next.Certificate.NotBefore, next.Certificate.NotAfter, before.issuing.NotBefore)
		}
		if strings.Contains(string(next.Sealed), "PRIVATE") || pki.KeyID(next.Certificate) == pki.KeyID(before.issuing) {
			t.Fatal("the keys are readable, or the old ones")
		}
		material.Bundle = pki.EncodeCertificates([]*x509.Certificate{next.Certificate, before.issuing, before.root})
		material.Sealed = next.Sealed
	}
	authority, err := Open(material, newCluster(1), sealer)
	if err != nil {
		t.Fatal(err)
	}
	if authority.Pin() != old.Pin() || len(authority.Bundle()) != 3 {
		t.Error("the root changed, or the other CA is not believed")
	}
	der, _ := csr(t, pki.Request{})
	chain, err := authority.Sign(der, pki.RoleRelay, newNode(1), now)
	if err != nil {
		t.Fatal(err)
	}
	roots, between := x509.NewCertPool(), x509.NewCertPool()
	roots.AddCert(old.Root())
	between.AddCert(chain[1])
	if _, err := chain[0].Verify(x509.VerifyOptions{Roots: roots, Intermediates: between, CurrentTime: now}); err != nil {
		t.Error(err)
	}
	if pki.IssuerKeyID(chain[0]) != pki.KeyID(authority.Issuing()) {
		t.Error("a certificate does not name its issuing CA")
	}
}

// TestNextIssuingRefuses what would make certificates that nobody believes.
func TestNextIssuingRefuses(t *testing.T) {
	now := time.Date(2026, 3, 1, 12, 0, 0, 0, time.UTC)
	_, material, kek, _ := create(t, now)
	if _, err := NextIssuing(material, newCluster(1), pki.NewSealer(pki.NewKey()), now); err == nil {
		t.Error("made without the key-encryption key")
	}
	sealer := pki.NewSealer(kek)
	if _, err := NextIssuing(material, newCluster(1), sealer, now.Add(RootLife-IssuingLife+time.Hour)); err == nil || !strings.Contains(err.Error(), "root") {
		t.Errorf("near the end of the root: %v", err)
	}
	if _, err := NextIssuing(material, newCluster(1), sealer, now.Add(-time.Hour)); err == nil || !strings.Contains(err.Error(), "clock") {
		t.Errorf("with a clock that went back: %v", err)
	}
}
