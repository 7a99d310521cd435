package agent

import (
	"testing"
	"time"

	"github.com/relais-mta/relais/shared/fault"
	"github.com/relais-mta/relais/shared/pki/pkitest"
)

// TestCopiedMachineSaysSo has control refuse the relay as a copy, and then take
// it.
func TestCopiedMachineSaysSo(t *testing.T) {
	c := startControl(t, pkitest.New(t))
	dir, _ := c.joined()
	c.mu.Lock()
	c.refuseHello = fault.New(fault.Conflict, "test", "another machine is linked")
	c.mu.Unlock()
	a, _ := running(t, dir)
	deadline := time.After(patience)
	tick := time.NewTicker(5 * time.Millisecond)
	defer tick.Stop()
	for !a.Health().Copied {
		select {
		case <-tick.C:
		case <-deadline:
			t.Fatalf("refused as a copy, health says %+v", a.Health())
		}
	}
	c.mu.Lock()
	c.refuseHello = nil
	c.mu.Unlock()
	c.next()
	for a.Health().Copied || !a.Health().Connected {
		select {
		case <-tick.C:
		case <-deadline:
			t.Fatalf("linked, health says %+v", a.Health())
		}
	}
}
