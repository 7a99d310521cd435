package wire

import (
	"net/netip"
	"reflect"
	"testing"

	"google.golang.org/protobuf/proto"

	"github.com/relais-mta/relais/shared/policy"
)

func TestViewNamesLeavingSources(t *testing.T) {
	view := &policy.View{Leaving: []policy.LeavingSource{{Epoch: 7}, {Epoch: 9}}}
	for i := range view.Leaving {
		view.Leaving[i].ID[0], view.Leaving[i].Owner[0] = byte(i+1), byte(i+11)
	}
	view.Cluster[0], view.Node[0] = 1, 2
	encoded, err := EncodeView(view)
	if err != nil {
		t.Fatal(err)
	}
	got, err := DecodeView(encoded)
	if err != nil || !reflect.DeepEqual(got.Leaving, view.Leaving) {
		t.Errorf("got %+v, %v, want %+v", got, err, view.Leaving)
	}
	damaged, err := EncodeView(&policy.View{Cluster: view.Cluster, Node: view.Node})
	if err != nil {
		t.Fatal(err)
	}
	// Field 51 with an address of one byte.
	if _, err := DecodeView(append(damaged, 0x9a, 0x03, 3, 0x0a, 1, 5)); err == nil {
		t.Error("a leaving source with a short id is read")
	}
}

// TestViewSetsLeasedSourcesApart: a reader that knows of no leases must not use
// such an address.
func TestViewSetsLeasedSourcesApart(t *testing.T) {
	view := &policy.View{Sources: []policy.Source{{Leased: true}, {Pinned: true}}}
	view.Cluster[0], view.Node[0] = 1, 2
	for i := range view.Sources {
		s := &view.Sources[i]
		s.ID[0], s.Owner[0], s.Bind, s.Public = byte(i+1), 2, netip.AddrFrom4([4]byte{192, 0, 2, byte(i)}), netip.AddrFrom4([4]byte{192, 0, 2, byte(i)})
	}
	encoded, err := EncodeView(view)
	if err != nil {
		t.Fatal(err)
	}
	got, err := DecodeView(encoded)
	if err != nil || len(got.Sources) != 2 || !reflect.DeepEqual(got.Sources, []policy.Source{view.Sources[1], view.Sources[0]}) {
		t.Errorf("got %+v, %v", got.Sources, err)
	}
	var known View
	if err := proto.Unmarshal(encoded, &known); err != nil || len(known.GetSources()) != 1 || !known.GetSources()[0].GetPinned() {
		t.Errorf("a reader without leases sees %v, %v", known.GetSources(), err)
	}
}
