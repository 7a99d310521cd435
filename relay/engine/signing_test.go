package engine

import (
	"crypto/ed25519"
	"crypto/rand"
	"crypto/rsa"
	"crypto/x509"
	"strings"
	"testing"

	"github.com/relais-mta/relais/shared/lab"
	"github.com/relais-mta/relais/shared/policy"
)

// TestProviderGetsTheSignaturesItWants: mail of a domain with two keys carries
// two signatures, but one to a provider whose profile says so.
func TestProviderGetsTheSignaturesItWants(t *testing.T) {
	w := newWorld(t, nil, first)
	w.view(func(doc *policy.Document) {
		doc.Delivery.SignDKIM, doc.Delivery.DKIMCheckEvery = true, 0 // no key is in DNS
		for i := range doc.Providers.Provider {
			if p := &doc.Providers.Provider[i]; p.Name == lab.Google {
				p.SignAlgorithms = []string{policy.AlgorithmRSA}
			}
		}
	}, first)
	private, err := rsa.GenerateKey(rand.Reader, 2048)
	if err != nil {
		t.Fatal(err)
	}
	_, other, err := ed25519.GenerateKey(rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	view := *w.policy.Load().View()
	view.Domains = []policy.Domain{view.Domains[0]}
	for algorithm, key := range map[string]any{policy.AlgorithmRSA: private, policy.AlgorithmEd25519: other} {
		der, err := x509.MarshalPKCS8PrivateKey(key)
		if err != nil {
			t.Fatal(err)
		}
		view.Domains[0].DKIM = append(view.Domains[0].DKIM, policy.DKIMKey{Selector: algorithm[:1] + "1", Algorithm: algorithm, Private: der})
	}
	dir, err := policy.Compile(&view)
	if err != nil {
		t.Fatal(err)
	}
	w.policy.Store(dir)
	w.engine.Changed()
	for provider, want := range map[string]string{lab.Google: "rsa-sha256", lab.Free: "rsa-sha256 ed25519-sha256"} {
		env := w.accept(nil, w.at(provider, 0, lab.Accept))
		w.gone(env)
		m := w.arrived(provider)
		if len(m) != 1 {
			t.Fatalf("%d mails at %s", len(m), provider)
		}
		_, content, err := w.lab.Mail(provider, m[0].ID)
		if err != nil {
			t.Fatal(err)
		}
		var got []string
		for field := range strings.SplitSeq(string(content), "DKIM-Signature: v=1; a=") {
			if algorithm, _, ok := strings.Cut(field, ";"); ok && strings.HasSuffix(algorithm, "-sha256") {
				got = append(got, algorithm)
			}
		}
		if strings.Join(got, " ") != want {
			t.Errorf("mail to %s is signed with %v, want %s", provider, got, want)
		}
	}
}
