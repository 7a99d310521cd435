package agent

import (
	"context"
	"os"
	"path/filepath"
	"testing"

	"github.com/relais-mta/relais/shared/link"
	"github.com/relais-mta/relais/shared/pki/pkitest"
)

// TestEvictionIsKept has control close a session with the code of an eviction:
// the relay says so, stops trying, still knows after a restart, and joins again
// as a new node with a new key.
func TestEvictionIsKept(t *testing.T) {
	c := startControl(t, pkitest.New(t))
	dir, node := c.joined()
	a, stop := running(t, dir)
	told := a.Subscribe()
	s := c.next()
	s.code = link.CodeEvicted
	close(s.over)
	<-told
	if e := a.Evicted(); e == nil || e.Why != "the test says so" {
		t.Fatalf("eviction %+v", e)
	}
	if h := a.Health(); !h.Evicted || h.Connected || h.Problem == "" {
		t.Errorf("health %+v", h)
	}
	if _, err := Join(context.Background(), c.joinOptions(dir)); err == nil {
		t.Error("joined again while the evicted process runs")
	}
	stop()

	again, stop := running(t, dir)
	if again.Evicted() == nil {
		t.Error("the eviction is forgotten after a restart")
	}
	stop()
	c.mu.Lock()
	hellos := len(c.hellos)
	c.mu.Unlock()
	if hellos != 1 {
		t.Errorf("%d sessions, want none after the eviction", hellos)
	}

	result, err := Join(context.Background(), c.joinOptions(dir))
	if err != nil {
		t.Fatal(err)
	}
	if result.Node == node || result.Already {
		t.Errorf("joined as %v, want a new node", result.Node)
	}
	if _, err := os.Stat(filepath.Join(dir, identityDir+"-evicted-"+node.String(), keyFile)); err != nil {
		t.Errorf("the old identity is not set aside: %v", err)
	}
	back, _ := running(t, dir)
	c.next()
	if back.Evicted() != nil {
		t.Error("still evicted after joining again")
	}
}
