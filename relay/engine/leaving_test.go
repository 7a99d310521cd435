package engine

import (
	"testing"
	"time"

	"github.com/relais-mta/relais/relay/outbox"
	"github.com/relais-mta/relais/shared/ids"
	"github.com/relais-mta/relais/shared/lab"
	"github.com/relais-mta/relais/shared/policy"
)

// TestARelayLetsGoOfAnAddress: idle sessions of an address that the relay is to stop
// using end at once, a busy one after its message, and then it says that it has
// stopped. Addresses that others are to stop using are not its affair.
func TestARelayLetsGoOfAnAddress(t *testing.T) {
	w := newWorld(t, nil, first)
	long := func(d *policy.Document) { d.Delivery.IdleSession = policy.Duration(5 * time.Minute) }
	w.view(long, first)
	w.event(w.accept(nil, w.at(lab.Yahoo, 0, lab.Accept)), outbox.Delivered) // its session is idle now
	reached := w.holdAt(lab.Google, lab.PhaseMail, 2*time.Second)
	env := w.accept(nil, w.at(lab.Google, 0, lab.Accept))
	reached()
	sessions := func() int {
		w.engine.mu.Lock()
		defer w.engine.mu.Unlock()
		return len(w.engine.sessions)
	}
	if n := sessions(); n != 2 {
		t.Fatalf("%d sessions, want an idle and a busy one", n)
	}
	mine := policy.LeavingSource{ID: first.ID, Owner: here, Epoch: 7}
	w.leaving = []policy.LeavingSource{mine, {ID: second.ID, Owner: ids.Node{9}, Epoch: 8}}
	w.view(long)
	w.until("the idle session to end", func() bool { return sessions() < 2 })
	if left := w.engine.Left(); len(left) > 0 && sessions() > 0 {
		t.Errorf("with a session open it says that it left %+v", left)
	}
	w.event(env, outbox.Delivered) // in one piece
	w.until("it to say that it has stopped", func() bool {
		left := w.engine.Left()
		return len(left) == 1 && left[0] == mine && sessions() == 0
	})
	later := w.accept(nil, w.at(lab.Yahoo, 1, lab.Accept))
	w.leaving = nil
	w.view(long, first) // it has it again
	w.event(later, outbox.Delivered)
	if left := w.engine.Left(); left != nil {
		t.Errorf("it says that it left %+v", left)
	}
}
