package cluster

import (
	"strings"
	"testing"

	"github.com/relais-mta/relais/control"
	"github.com/relais-mta/relais/control/command"
	"github.com/relais-mta/relais/shared/fault"
)

// TestNewCommandsWaitForTheVersion: a command that a server of the cluster may
// not know is not logged before the version was raised.
func TestNewCommandsWaitForTheVersion(t *testing.T) {
	t.Parallel()
	c := open(t, bootstrap(t))
	defer closeNow(t, c)
	initialise(t, c, 1)
	begin := &command.ClusterRecover{Generation: 2, Cause: "recover", Server: serverRecord(2)}
	if _, err := c.Propose(t.Context(), begin); !fault.Is(err, fault.Unavailable) || !strings.Contains(fault.Public(err), "upgrade every server") {
		t.Errorf("got %v", err)
	}
	if _, err := c.Propose(t.Context(), &command.FSMVersionSet{Version: 2}); err != nil {
		t.Fatal(err)
	}
	r, err := c.Propose(t.Context(), begin)
	if err != nil || r.Row.(*control.Cluster).Generation != 2 {
		t.Errorf("got %+v, %v", r, err)
	}
}
