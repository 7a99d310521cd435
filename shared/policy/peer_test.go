package policy

import (
	"net/netip"
	"testing"

	"github.com/relais-mta/relais/shared/ids"
)

func peersView() *View {
	doc, err := Parse(map[string]string{"pools": "[[pool]]\nname = \"main\"\nweights = { \"192.0.2.4\" = 0 }\n"})
	if err != nil {
		panic(err)
	}
	pool := ids.Pool{9}
	source := func(n byte, owner ids.Node) Source {
		a := netip.AddrFrom4([4]byte{192, 0, 2, n})
		return Source{ID: ids.Source{n}, Bind: a, Public: a, EHLO: "mx.example", Pool: pool, Owner: owner, Epoch: 1}
	}
	return &View{Document: doc, Node: ids.Node{1}, Pools: []Pool{{ID: pool, Name: "main", Kind: PoolShared}},
		Sources: []Source{source(1, ids.Node{1}), source(2, ids.Node{2}), source(3, ids.Node{2}), source(4, ids.Node{3}), source(5, ids.Node{4}), source(6, ids.Node{5})},
		Peers: []Peer{{Node: ids.Node{1}, Name: "self", Address: "a:1"}, {Node: ids.Node{2}, Name: "two", Address: "b:1"},
			{Node: ids.Node{3}, Name: "weightless", Address: "c:1"}, {Node: ids.Node{4}, Name: "deaf"}}}
}

// TestOwnersOfAPool names the other relays that mail of a pool can go to: those
// in the cluster with a source that has a weight.
func TestOwnersOfAPool(t *testing.T) {
	view := peersView()
	d, err := Compile(view)
	if err != nil {
		t.Fatal(err)
	}
	var names []string
	for _, p := range d.Owners(ids.Pool{9}) {
		names = append(names, p.Name)
	}
	if len(names) != 2 || names[0] != "two" || names[1] != "deaf" {
		t.Errorf("owners %v, want two and deaf, once each", names)
	}
	if !d.Elsewhere(ids.Pool{9}) || d.Elsewhere(ids.Pool{8}) {
		t.Error("a pool is elsewhere if a relay that takes mail has a source of it")
	}
	if p, ok := d.Peer(ids.Node{5}); ok {
		t.Errorf("%+v is a peer without being in the view", p)
	}
	view.Peers[1].Draining = true
	if d, err = Compile(view); err != nil || d.Elsewhere(ids.Pool{9}) {
		t.Errorf("a draining relay takes mail: %v", err)
	}
	view.Peers[1].Node = view.Peers[0].Node
	if _, err = Compile(view); err == nil {
		t.Error("a relay that is there twice was taken")
	}
}
