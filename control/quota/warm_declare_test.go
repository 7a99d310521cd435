package quota

import (
	"testing"

	"github.com/relais-mta/relais/control/command"
	"github.com/relais-mta/relais/shared/ids"
	"github.com/relais-mta/relais/shared/wire"
)

// TestRelaysAreHeardThatAllIsSettled: what a relay says of that is answered at once as
// a rule, and in recovery mode when it is committed.
func TestRelaysAreHeardThatAllIsSettled(t *testing.T) {
	w := newWarmLeader(t)
	says := func(node ids.Node, generation uint64) (answered bool) {
		t.Helper()
		w.sent = nil
		w.part.take(Message{Node: node, Body: &wire.WarmUp{Items: []*wire.WarmItem{{Kind: command.WarmDeclare, Epoch: generation}}}})
		if err := w.part.declare(t.Context()); err != nil {
			t.Fatal(err)
		}
		for _, down := range w.sent {
			for _, r := range down.Replies {
				answered = answered || r.Kind == command.WarmDeclare && r.Epoch == generation
			}
		}
		return answered
	}
	before := w.index
	if !says(relayID(0), 1) || w.index != before {
		t.Errorf("without a recovery it is not answered, or needs %d entries", w.index-before)
	}
	w.look() // a day begins
	w.put(1, 1, 100, "")
	w.must(&command.ClusterRecover{Generation: 2, Cause: "restore", Server: &command.Server{Id: bytesOf(9), Name: "c1", RaftAddress: "10.0.0.1:7444", State: "active", MaxFsmVersion: uint32(command.FSMVersion)}})
	if says(relayID(0), 1) {
		t.Error("a relay that has not heard of the restore is answered")
	}
	before = w.index
	for range 2 {
		if !says(relayID(0), 2) || w.index != before+1 {
			t.Errorf("it is not answered, or needs %d entries", w.index-before)
		}
	}
	if n := w.state.Read().LeaseNode(relayID(0)); n == nil || n.WarmDeclared != 2 {
		t.Errorf("the relay is %+v", n)
	}
}
