package submission

import (
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/sha256"
	"crypto/tls"
	"crypto/x509"
	"encoding/pem"
	"math/big"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/relais-mta/relais/shared/ids"
	"github.com/relais-mta/relais/shared/mailaddr"
	"github.com/relais-mta/relais/shared/policy"
)

// scoped narrows the credential that worlds log in with.
func scoped(scope policy.CredentialScope) func(*policy.View) {
	return func(v *policy.View) { v.Credentials[0].Scope = scope }
}

func TestScopeOfDomains(t *testing.T) {
	w := newWorld(t, scoped(policy.CredentialScope{Domains: []mailaddr.Domain{"shop.acme.example"}}))
	p := w.login(t)
	for from, want := range map[string]string{
		"joe@shop.acme.example": "250", "joe@a.shop.acme.example": "250", "joe@acme.example": "550 5.7.1 acme.example is not among the domains", "joe@xshop.acme.example": "550 5.7.1", "joe@other.example": "550 5.7.1",
	} {
		p.mail("From: "+from+"\n\nx\n", want)
	}
	p.mail("From: joe@shop.acme.example\nSender: ann@acme.example\n\nx\n", "550 5.7.1")
}

func TestScopeOfNetworks(t *testing.T) {
	w := newWorld(t, scoped(policy.CredentialScope{Networks: []netip.Prefix{netip.MustParsePrefix("192.0.2.0/24"), netip.MustParsePrefix("127.0.0.0/8")}}))
	p := w.login(t)
	p.mail(goodMessage, "250")
	w.setView(scoped(policy.CredentialScope{Networks: []netip.Prefix{netip.MustParsePrefix("192.0.2.0/24")}}))
	p.do("MAIL FROM:<a@acme.example>", "550 5.7.1 This credential is not good from your address 127.0.0.1")
	p = w.dial(t)
	p.do("AUTH PLAIN "+plain(w.user, "wrong"), "535 5.7.8 The user name or the secret is wrong") // a scope is nothing to tell strangers
	p.do("AUTH PLAIN "+plain(w.user, testSecret), "535 5.7.8 This credential is not good from your address 127.0.0.1")
}

func TestScopeOfRate(t *testing.T) {
	w := newWorld(t, scoped(policy.CredentialScope{MessagesPerHour: 2}))
	p, q := w.login(t), w.login(t)
	q.do("MAIL FROM:<a@acme.example>", "250")
	p.mail("From: x@foreign.example\n\nx\n", "550") // refused messages do not count
	w.spool.mu.Lock()
	w.spool.accept = os.ErrClosed
	w.spool.mu.Unlock()
	p.mail(goodMessage, "451 4.3.0")
	w.spool.mu.Lock()
	w.spool.accept = nil
	w.spool.mu.Unlock()
	p.mail(goodMessage, "250")
	p.mail(goodMessage, "250")
	p.do("MAIL FROM:<a@acme.example>", "450 4.7.1 This credential sends at most 2 messages an hour")
	q.do("RCPT TO:<b@example.net>", "250") // it began before the last was counted
	q.do("DATA", "354")
	q.send(strings.ReplaceAll(goodMessage, "\n", "\r\n") + ".\r\n")
	q.expect("450 4.7.1")
	if n := w.spool.count(); n != 2 {
		t.Errorf("%d messages were accepted, want 2", n)
	}
	w.setView(nil)
	p.mail(goodMessage, "250")
}

func TestRatesForgetAfterAnHour(t *testing.T) {
	var r rates
	now := time.Unix(1_800_000_000, 0)
	who := id[ids.Credential](1)
	for i := range 3 {
		if _, ok := r.allow(who, 3, now.Add(time.Duration(i)*10*time.Minute), true); !ok {
			t.Fatalf("message %d is refused", i)
		}
	}
	for _, tt := range []struct {
		after time.Duration
		ok    bool
	}{{20 * time.Minute, false}, {59 * time.Minute, false}, {10 * time.Minute, false}, {61 * time.Minute, true}} {
		wait, ok := r.allow(who, 3, now.Add(tt.after), false)
		if ok != tt.ok {
			t.Errorf("after %v: %v, wait %v", tt.after, ok, wait)
		}
		if !ok {
			if _, then := r.allow(who, 3, now.Add(tt.after+wait), false); !then && tt.after >= 20*time.Minute {
				t.Errorf("after %v the wait of %v is too short", tt.after, wait)
			}
			r = rates{}
			for i := range 3 {
				r.allow(who, 3, now.Add(time.Duration(i)*10*time.Minute), true)
			}
		}
	}
	if _, ok := r.allow(who, 3, now.Add(48*time.Hour), true); !ok || r.entries[who].total != 1 {
		t.Errorf("after two days the total is %d", r.entries[who].total)
	}
	// In no hour, taken at any speed, does more than the limit and one slot's get through.
	r = rates{}
	var taken []time.Time
	for at := now; at.Before(now.Add(4 * time.Hour)); at = at.Add(37 * time.Second) {
		if _, ok := r.allow(who, 20, at, true); ok {
			taken = append(taken, at)
		}
	}
	for i := range taken {
		if j := i + 20; j < len(taken) && taken[j].Sub(taken[i]) < 59*time.Minute {
			t.Errorf("21 messages within %v", taken[j].Sub(taken[i]))
		}
	}
}

func TestRatesAreBounded(t *testing.T) {
	var r rates
	now := time.Unix(1_800_000_000, 0)
	for i := range maxRatedEntries {
		var who ids.Credential
		who[0], who[1], who[2] = byte(i), byte(i>>8), 1
		r.allow(who, 1, now, true)
	}
	if _, ok := r.allow(id[ids.Credential](9), 1, now, true); ok || len(r.entries) != maxRatedEntries {
		t.Errorf("%d credentials are counted", len(r.entries))
	}
	if _, ok := r.allow(id[ids.Credential](9), 1, now.Add(2*time.Hour), true); !ok || len(r.entries) != 1 {
		t.Errorf("later %d credentials are counted", len(r.entries))
	}
}

func clientCertificate(t *testing.T) tls.Certificate {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	template := &x509.Certificate{SerialNumber: big.NewInt(7), NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(time.Hour)}
	der, err := x509.CreateCertificate(rand.Reader, template, template, &key.PublicKey, key)
	if err != nil {
		t.Fatal(err)
	}
	return tls.Certificate{Certificate: [][]byte{der}, PrivateKey: key}
}

func TestClientCertificateAsSecondFactor(t *testing.T) {
	right, wrong := clientCertificate(t), clientCertificate(t)
	need := scoped(policy.CredentialScope{Certificates: [][32]byte{{1}, sha256.Sum256(right.Certificate[0])}})
	w := newWorld(t, nil)
	_, base := testTLS()
	dial := func(certificates ...tls.Certificate) *peer {
		cfg := base.Clone()
		cfg.Certificates = certificates
		conn, err := tls.Dial("tcp", w.implicit, cfg)
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { _ = conn.Close() })
		p := newPeerOn(t, conn)
		p.expect("220 ")
		p.do("EHLO client.example", "250-")
		return p
	}
	before := dial(right) // nobody asks for the certificate yet
	before.do("AUTH PLAIN "+plain(w.user, testSecret), "235")
	w.setView(need)
	before.do("MAIL FROM:<a@acme.example>", "550 5.7.1 This credential needs a client certificate")
	for range 2 { // also when the client would resume its session
		p := dial(right)
		p.do("AUTH PLAIN "+plain(w.user, testSecret), "235")
		p.mail(goodMessage, "250")
	}
	dial().do("AUTH PLAIN "+plain(w.user, testSecret), "535 5.7.8 This credential needs a client certificate")
	dial(wrong).do("AUTH PLAIN "+plain(w.user, testSecret), "535 5.7.8 This credential needs another client certificate")
	dial(right).do("AUTH PLAIN "+plain(w.user, "wrong"), "535 5.7.8 The user name or the secret is wrong") // the certificate alone is nothing
	dial().do("AUTH PLAIN "+plain(w.onlyRemote, testSecret), "235")                                        // other credentials need none
}

func TestSwaksShowsItsCertificate(t *testing.T) {
	swaks := lookPath(t, "swaks")
	certificate := clientCertificate(t)
	dir := t.TempDir()
	key, err := x509.MarshalPKCS8PrivateKey(certificate.PrivateKey)
	if err != nil {
		t.Fatal(err)
	}
	for name, block := range map[string]*pem.Block{"cert.pem": {Type: "CERTIFICATE", Bytes: certificate.Certificate[0]}, "key.pem": {Type: "PRIVATE KEY", Bytes: key}} {
		if err := os.WriteFile(filepath.Join(dir, name), pem.EncodeToMemory(block), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	w := newWorld(t, scoped(policy.CredentialScope{Certificates: [][32]byte{sha256.Sum256(certificate.Certificate[0])}}))
	host, port, err := net.SplitHostPort(w.explicit)
	if err != nil {
		t.Fatal(err)
	}
	for _, tt := range []struct {
		args []string
		want string
	}{
		{[]string{"--tls-cert", filepath.Join(dir, "cert.pem"), "--tls-key", filepath.Join(dir, "key.pem")}, "250 2.0.0 OK queued as msg_"},
		{nil, "535 5.7.8 This credential needs a client certificate"},
	} {
		args := append([]string{"--server", host, "--port", port, "--tls", "--auth", "PLAIN", "--auth-user", w.user, "--auth-password", testSecret,
			"--from", "joe@acme.example", "--to", "ann@example.net", "--ehlo", "client.example", "--timeout", "10"}, tt.args...)
		out, err := exec.CommandContext(t.Context(), swaks, args...).CombinedOutput()
		if !strings.Contains(string(out), tt.want) {
			t.Errorf("swaks %v: error %v, want %q in\n%s", tt.args, err, tt.want, out)
		}
	}
}

// issued makes a certificate with a serial number that an issuer signs, or that
// signs itself.
func issued(t *testing.T, issuer *tls.Certificate, change func(*x509.Certificate)) tls.Certificate {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	template := &x509.Certificate{SerialNumber: big.NewInt(time.Now().UnixNano()), NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(time.Hour),
		BasicConstraintsValid: true, ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth}}
	if change != nil {
		change(template)
	}
	template.Subject.CommonName = template.SerialNumber.String()
	parent, signer, chain := template, crypto.PrivateKey(key), [][]byte(nil)
	if issuer != nil {
		if parent, err = x509.ParseCertificate(issuer.Certificate[0]); err != nil {
			t.Fatal(err)
		}
		signer, chain = issuer.PrivateKey, issuer.Certificate
	}
	der, err := x509.CreateCertificate(rand.Reader, template, parent, &key.PublicKey, signer)
	if err != nil {
		t.Fatal(err)
	}
	return tls.Certificate{Certificate: append([][]byte{der}, chain...), PrivateKey: key}
}

// A credential that names a CA takes what that CA issued for clients and what is
// valid now.
func TestClientCertificateByCA(t *testing.T) {
	authority := func(c *x509.Certificate) { c.IsCA, c.KeyUsage, c.ExtKeyUsage = true, x509.KeyUsageCertSign, nil }
	ca, other := issued(t, nil, authority), issued(t, nil, authority)
	between := issued(t, &ca, authority)
	expired := func(c *x509.Certificate) { c.NotAfter = time.Now().Add(-time.Minute) }
	noCA := issued(t, nil, nil)
	forged := issued(t, &other, nil)
	forged.Certificate = append(forged.Certificate[:1:1], ca.Certificate[0]) // shows a CA that did not issue it
	alone := issued(t, &ca, nil)
	alone.Certificate = alone.Certificate[:1]
	named := scoped(policy.CredentialScope{Certificates: [][32]byte{sha256.Sum256(ca.Certificate[0]), sha256.Sum256(noCA.Certificate[0])}})
	w := newWorld(t, func(v *policy.View) {
		named(v)
		v.Document.Submission.AuthFailuresPerAccount, v.Document.Submission.AuthFailuresPerIP = 100, 100
	})
	_, base := testTLS()
	const another, notIssued = "535 5.7.8 This credential needs another client certificate", "535 5.7.8 The client certificate that was shown was not issued"
	for _, tt := range []struct {
		name string
		cert tls.Certificate
		want string
	}{
		{"issued", issued(t, &ca, nil), "235"},
		{"by an intermediate", issued(t, &between, nil), "235"},
		{"the CA itself", ca, "235"},
		{"for servers", issued(t, &ca, func(c *x509.Certificate) { c.ExtKeyUsage = []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth} }), notIssued},
		{"expired", issued(t, &ca, expired), "535 5.7.8 The client certificate that was shown, or its CA, has expired"},
		{"of another CA", issued(t, &other, nil), another},
		{"that shows a CA which is not its own", forged, notIssued},
		{"without the CA", alone, another},
		{"by one that is no CA", issued(t, &noCA, nil), notIssued},
	} {
		cfg := base.Clone()
		cfg.Certificates = []tls.Certificate{tt.cert}
		conn, err := tls.Dial("tcp", w.implicit, cfg)
		if err != nil {
			t.Fatal(err)
		}
		p := newPeerOn(t, conn)
		p.expect("220 ")
		p.do("EHLO client.example", "250-")
		if p.do("AUTH PLAIN "+plain(w.user, testSecret), tt.want); t.Failed() {
			t.Fatal(tt.name)
		}
		if tt.want == "235" {
			p.mail(goodMessage, "250")
			p.mail(goodMessage, "250")
		}
		_ = conn.Close()
	}
}
