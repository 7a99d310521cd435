package dispatch

import (
	"crypto/sha256"
	"testing"

	"github.com/relais-mta/relais/shared/ids"
	"github.com/relais-mta/relais/shared/policy"
	"github.com/relais-mta/relais/shared/wire"
)

// TestOnlyTheDrainingRelayIsTold encodes the views of two relays of which one
// drains, in either order, and goes there by deltas: neither gets the other's word.
func TestOnlyTheDrainingRelayIsTold(t *testing.T) {
	drains, works := ids.Node{1}, ids.Node{2}
	for _, first := range []ids.Node{drains, works} {
		var c encodings
		view := func(node ids.Node, revision uint64, draining bool) offer {
			t.Helper()
			e, err := c.of(&policy.View{Generation: 1, Revision: revision, Node: node, Draining: draining, Tenants: []policy.Tenant{{ID: ids.Tenant{7}, Name: "a tenant with a name of some length, so that a delta saves something"}}})
			if err != nil {
				t.Fatal(err)
			}
			return offer{generation: 1, revision: revision, shared: e, sum: e.sum(node)}
		}
		order := []ids.Node{first, works}
		if first == works {
			order[1] = drains
		}
		before := view(drains, 1, false)
		for _, node := range order {
			next := view(node, 2, node == drains)
			sum := before.shared.sum(node)
			for _, from := range []held{{generation: 1, revision: 1, ours: true}, {generation: 1, revision: 1, sum: string(sum[:])}} {
				encoded := next.shared.of(node)
				change, err := c.between(node, from, next)
				if err != nil {
					t.Fatal(err)
				}
				if change != nil {
					if encoded, err = wire.ApplyDelta(before.shared.of(node), change); err != nil {
						t.Fatal(err)
					}
				}
				got, err := wire.DecodeView(encoded)
				if err != nil {
					t.Fatal(err)
				}
				if got.Node != node || got.Draining != (node == drains) || sha256.Sum256(encoded) != next.sum {
					t.Errorf("%s was told that it drains: %t", got.Node, got.Draining)
				}
			}
		}
	}
}
