package wire

import (
	"reflect"
	"testing"
	"time"

	"github.com/relais-mta/relais/shared/ids"
	"github.com/relais-mta/relais/shared/policy"
)

func TestBrakesTravelInViews(t *testing.T) {
	at := time.UnixMilli(1_767_225_600_123).UTC()
	want := []policy.Brake{
		{ID: ids.Brake{1}, Provider: "google", Pool: ids.Pool{2}, Source: ids.Source{3}, Tenant: ids.Tenant{4}, Domain: "gmail.example", Percent: 25,
			Cause: "complaints", Owner: "anna", CreatedAt: at, Until: at.Add(time.Hour)},
		{ID: ids.Brake{5}, Provider: "yahoo", Source: ids.Source{3}, Owner: "reflex", CreatedAt: at, Released: at.Add(time.Minute), Node: ids.Node{6}},
	}
	encoded, err := EncodeView(&policy.View{Cluster: ids.Cluster{1}, Node: ids.Node{6}, Brakes: want})
	if err != nil {
		t.Fatal(err)
	}
	v, err := DecodeView(encoded)
	if err != nil {
		t.Fatal(err)
	}
	if !reflect.DeepEqual(v.Brakes, want) {
		t.Errorf("%+v\nwant %+v", v.Brakes, want)
	}
	want[0].Percent = 100
	if encoded, err = EncodeView(&policy.View{Cluster: ids.Cluster{1}, Node: ids.Node{6}, Brakes: want}); err != nil {
		t.Fatal(err)
	}
	if _, err := DecodeView(encoded); err == nil {
		t.Error("a brake that leaves everything was taken")
	}
}
