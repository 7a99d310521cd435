package dispatch

import (
	"testing"

	"github.com/relais-mta/relais/control"
	"github.com/relais-mta/relais/shared/ids"
	"github.com/relais-mta/relais/shared/pki/pkitest"
	"github.com/relais-mta/relais/shared/wire"
)

// TestQuotaPassesBothWays holds that what relays and the leader say about what is
// shared passes through the server that a relay is linked to, if both know how.
func TestQuotaPassesBothWays(t *testing.T) {
	w := newWorld(t)
	type said struct {
		node ids.Node
		up   *wire.QuotaUp
	}
	ups := make(chan said, 10)
	w.server.config.Quota = func(node ids.Node, up *wire.QuotaUp) { ups <- said{node, up} }
	connect := func(capabilities uint64) *relay {
		node := pkitest.NewNode()
		w.nodes.setState(node, control.NodeActive)
		r := w.dialAs(&wire.Preface{ProtocolMin: 1, ProtocolMax: 1, ClusterId: w.ca.Cluster[:], Incarnation: 1, Version: "test", Capabilities: capabilities}, node, &wire.Hello{})
		preface, err := wire.Expect[*wire.Preface](r.control)
		if err != nil || preface.GetCapabilities()&wire.CapabilityQuota == 0 {
			t.Fatalf("%v, %v", preface, err)
		}
		if _, err := wire.Expect[*wire.Welcome](r.control); err != nil {
			t.Fatal(err)
		}
		within(t, w.nodes.connected)
		return r
	}
	r := connect(wire.CapabilityQuota)
	if err := r.control.Send(&wire.QuotaUp{Kind: 7, Body: []byte("up")}); err != nil {
		t.Fatal(err)
	}
	if got := within(t, ups); got.node != r.node || got.up.GetKind() != 7 || string(got.up.GetBody()) != "up" {
		t.Errorf("the server took %+v", got)
	}
	// More than may wait: the newest are there.
	for i := range maxQuotaWaiting + 8 {
		if !w.server.SendQuota(r.node, &wire.QuotaDown{Kind: uint32(i)}) {
			t.Fatal("a relay that is linked was not told")
		}
	}
	last := uint32(0)
	for last != maxQuotaWaiting+7 {
		down, err := wire.Expect[*wire.QuotaDown](r.control)
		if err != nil {
			t.Fatal(err)
		}
		if down.GetKind() < last {
			t.Fatalf("%d came after %d", down.GetKind(), last)
		}
		last = down.GetKind()
	}
	old := connect(wire.CapabilityProbe)
	if w.server.SendQuota(old.node, &wire.QuotaDown{}) || w.server.SendQuota(pkitest.NewNode(), &wire.QuotaDown{}) {
		t.Error("a relay that does not know the message, or is not linked, was told")
	}
}
