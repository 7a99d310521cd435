package wire

import (
	"reflect"
	"testing"

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
