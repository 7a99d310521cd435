package agent

import (
	"crypto/x509"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/relais-mta/relais/shared/fault"
	"github.com/relais-mta/relais/shared/ids"
	"github.com/relais-mta/relais/shared/pki"
	"github.com/relais-mta/relais/shared/pki/pkitest"
)

const day = 24 * time.Hour

// endLeaf gives a directory that has joined a certificate that ended a while ago.
func (c *controlServer) endLeaf(dir string, node ids.Node, ago time.Duration) {
	c.t.Helper()
	key, err := pki.LoadNodeKey(filepath.Join(dir, identityDir, keyFile))
	if err != nil {
		c.t.Fatal(err)
	}
	end := time.Now().Add(-ago)
	leaf := c.ca.Leaf(&key.Private().PublicKey, pki.RoleRelay, node, end.Add(-7*day), end)
	if err := pki.WriteFile(filepath.Join(dir, identityDir, leafFile), pki.EncodeCertificates([]*x509.Certificate{leaf}), 0o644); err != nil {
		c.t.Fatal(err)
	}
}

// TestRelayComesBackAfterWeeks starts a relay whose certificate ended 20 days
// ago: it renews and links without anybody's help.
func TestRelayComesBackAfterWeeks(t *testing.T) {
	c := startControl(t, pkitest.New(t))
	dir, node := c.joined()
	c.endLeaf(dir, node, 20*day)
	a, _ := running(t, dir)
	c.next()
	if ends := a.Health().LeafEnds; time.Until(ends) < time.Minute {
		t.Errorf("linked with a certificate that ended at %v", ends)
	}
}

// TestRelayThatWasAwayTooLongSaysWhy starts one that control does not renew any
// more: its health shows the words of control, not the failed handshake.
func TestRelayThatWasAwayTooLongSaysWhy(t *testing.T) {
	c := startControl(t, pkitest.New(t))
	dir, node := c.joined()
	c.endLeaf(dir, node, 29*day)
	c.mu.Lock()
	c.refuseRenewal = fault.New(fault.Denied, "test", "the certificate ended 40 days ago: join again with a new token")
	c.mu.Unlock()
	a, stop := running(t, dir)
	waitFor(t, "the refusal in health", func() bool { return strings.Contains(a.Health().Problem, "join again with a new token") })
	if a.Evicted() != nil {
		t.Error("taken for an eviction")
	}
	stop()
	result, err := Join(t.Context(), c.joinOptions(dir))
	if err != nil || result.Already {
		t.Errorf("joining again: %+v, %v", result, err)
	}
}
