package agent

import (
	"crypto/x509"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/relais-mta/relais/shared/pki"
	"github.com/relais-mta/relais/shared/pki/pkitest"
	"github.com/relais-mta/relais/shared/policy"
	"github.com/relais-mta/relais/shared/wire"
)

// soon lets a relay renew at once when the issuing key changes.
func soon(a *Agent) { a.spread = time.Millisecond }

// believing returns a control server whose first issuing CA signs, and another.
func believing(t *testing.T) (c *controlServer, old, next *pkitest.Issuing) {
	ca := pkitest.New(t)
	old, next = ca.Issuing(time.Now().Add(-20*day)), ca.Issuing(time.Now().Add(-time.Hour))
	c = startControl(t, ca)
	c.issuing, c.bundle = old, []*x509.Certificate{old.Cert, ca.Root}
	return c, old, next
}

func (s *relaySession) report(t *testing.T, what string, holds func(*wire.Report) bool) {
	t.Helper()
	deadline := time.After(patience)
	for {
		select {
		case r := <-s.reports:
			if holds(r) {
				return
			}
		case <-deadline:
			t.Fatalf("no report says %s", what)
		}
	}
}

// TestIssuingKeyChanges: a relay takes over the CAs of its view, says so, renews
// when another one signs, and stays linked meanwhile.
func TestIssuingKeyChanges(t *testing.T) {
	c, old, next := believing(t)
	dir, node := c.joined()
	a, stop := running(t, dir, soon)
	s := c.next()
	believes := func(bundle ...*x509.Certificate) func(*wire.Report) bool {
		sum := pki.BundleSum(bundle)
		return func(r *wire.Report) bool { return string(r.GetBundleSha256()) == string(sum[:]) }
	}
	send := func(revision uint64, bundle ...*x509.Certificate) {
		t.Helper()
		view := c.view(node, revision)
		view.Trust.CAs = pki.RawCertificates(bundle)
		answer, err := s.send(view)
		mustAck(t, answer, err, revision)
	}
	send(10, old.Cert, next.Cert, c.ca.Root)
	s.report(t, "that it believes both", believes(old.Cert, next.Cert, c.ca.Root))
	if got := pki.IssuerKeyID(a.Holder().Leaf()); got != pki.KeyID(old.Cert) {
		t.Errorf("it renewed before the new key signs, at %s", got)
	}
	c.mu.Lock()
	c.issuing = next // what it gives out as bundle lags behind
	c.mu.Unlock()
	send(11, next.Cert, old.Cert, c.ca.Root)
	s.report(t, "that it has a certificate of the new CA", func(r *wire.Report) bool {
		return r.GetLeafIssuer() == pki.KeyID(next.Cert) && believes(next.Cert, old.Cert, c.ca.Root)(r)
	})
	send(12, next.Cert, c.ca.Root)
	s.report(t, "that it dropped the old one", believes(next.Cert, c.ca.Root))
	c.mu.Lock()
	renewals := c.renewals
	c.mu.Unlock()
	if renewals != 1 || s.link.Err() != nil {
		t.Errorf("%d renewals, the session: %v", renewals, s.link.Err())
	}
	bundle, err := pki.LoadCertificates(filepath.Join(dir, identityDir, caFile))
	if err != nil || pki.BundleSum(bundle) != pki.BundleSum([]*x509.Certificate{next.Cert, c.ca.Root}) {
		t.Errorf("on disk are %d CAs, %v", len(bundle), err)
	}
	// A root does not change by a view.
	view := c.view(node, 13)
	view.Trust.CAs = pki.RawCertificates([]*x509.Certificate{next.Cert, pkitest.New(t).Root})
	answer, err := s.send(view)
	if nack, ok := answer.(*wire.Nack); err != nil || !ok || !strings.Contains(nack.GetError().GetText(), "another root") {
		t.Errorf("a view with another root: %v, %v", answer, err)
	}
	stop()
	b, _ := running(t, dir, soon)
	c.next()
	if b.outdated() || pki.BundleSum(b.Holder().Bundle()) != pki.BundleSum(bundle) {
		t.Error("after a restart it believes something else")
	}
}

// TestRelayThatMissedItAllComesBack: its certificate is of a CA that was dropped
// while it was off. The link refuses it, the renewal endpoint knows it.
func TestRelayThatMissedItAllComesBack(t *testing.T) {
	for _, transport := range []string{"quic", "tcp"} {
		t.Run(transport, func(t *testing.T) {
			c, _, next := believing(t)
			dir, _ := c.joined()
			c.stop()
			c.issuing, c.bundle = next, []*x509.Certificate{next.Cert, c.ca.Root}
			c.known = func(pki.Identity, *x509.Certificate) bool { return true }
			c.listen(c.address)
			if transport == "tcp" {
				address := withoutUDP(t, c)
				member, err := LoadMembership(dir)
				if err != nil {
					t.Fatal(err)
				}
				member.Servers, c.servers = []string{address}, []string{address}
				if err := member.save(dir); err != nil {
					t.Fatal(err)
				}
			}
			a, _ := running(t, dir)
			c.next()
			if got := pki.IssuerKeyID(a.Holder().Leaf()); got != pki.KeyID(next.Cert) {
				t.Errorf("linked with a certificate of %s", got)
			}
			waitFor(t, "linked over "+transport, func() bool { return a.Health().Transport == transport })
		})
	}
}

// TestRemovedServerIsLeft: a relay leaves a server whose certificate is revoked
// and does not come back, not even after a restart.
func TestRemovedServerIsLeft(t *testing.T) {
	c, old, _ := believing(t)
	dir, node := c.joined()
	a, stop := running(t, dir)
	s := c.next()
	view := c.view(node, 10)
	view.Trust = policy.Trust{CAs: pki.RawCertificates([]*x509.Certificate{old.Cert, c.ca.Root}), RevokedServers: []policy.RevokedServer{{Server: c.server}}}
	answer, err := s.send(view)
	if answer != nil {
		mustAck(t, answer, err, 10)
	}
	select {
	case <-s.link.Done():
	case <-time.After(patience):
		t.Fatal("the session with the removed server goes on")
	}
	refused := func(a *Agent) func() bool {
		return func() bool { h := a.Health(); return !h.Connected && strings.Contains(h.Problem, "was removed") }
	}
	waitFor(t, "the removed server is refused", refused(a))
	stop()
	b, _ := running(t, dir)
	waitFor(t, "the removed server is refused after a restart", refused(b))
	select {
	case <-c.sessions:
		t.Error("it linked to the removed server")
	default:
	}
}
