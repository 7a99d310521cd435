package engine

import (
	"strings"
	"testing"

	"github.com/relais-mta/relais/relay/outbox"
	"github.com/relais-mta/relais/shared/lab"
)

// TestMailWaitsForALease: the one address of the pool floats and has no lease. What
// waits says so; from another address the mail goes out.
func TestMailWaitsForALease(t *testing.T) {
	floating := first
	floating.Leased = true
	w := newWorld(t, nil, floating)
	env := w.accept(nil, w.at(lab.Google, 0, lab.Accept))
	info, err := w.queue.Show(env.ID)
	if err != nil {
		t.Fatal(err)
	}
	w.until("the lease to be missed", func() bool {
		x := w.engine.Explain(env, 0, info.States[0])
		return x.Reason == "source" && strings.Contains(x.Text, "; floating address "+first.Bind.String()+": this process has no lease of it yet, control is not reached")
	})
	w.view(nil, floating, second)
	if got := w.event(env, outbox.Delivered); got.Source != second.ID {
		t.Errorf("delivered from %s", got.Source)
	}
}
