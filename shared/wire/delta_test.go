package wire

import (
	"bytes"
	"fmt"
	"testing"

	"pgregory.net/rapid"

	"github.com/relais-mta/relais/shared/fault"
	"github.com/relais-mta/relais/shared/ids"
	"github.com/relais-mta/relais/shared/mailaddr"
	"github.com/relais-mta/relais/shared/policy"
)

// genView draws a view whose lists overlap with those of other draws: few ids,
// few names, any order.
func genView(t *rapid.T) []byte {
	id := func(label string) (b [16]byte) {
		b[0], b[15] = 1, byte(rapid.IntRange(0, 6).Draw(t, label))
		return b
	}
	v := &policy.View{Cluster: ids.Cluster{1}, Generation: uint64(rapid.IntRange(1, 2).Draw(t, "generation")), Revision: uint64(rapid.IntRange(1, 9).Draw(t, "revision")), Node: ids.Node{2}}
	v.Sections = rapid.MapOf(rapid.SampledFrom([]string{"queue", "limits", "streams"}), rapid.SampledFrom([]string{"", "a = 1\n", "b = 2\n"})).Draw(t, "sections")
	for range rapid.IntRange(0, 6).Draw(t, "tenants") {
		v.Tenants = append(v.Tenants, policy.Tenant{ID: ids.Tenant(id("tenant")), Name: "t", Suspended: rapid.Bool().Draw(t, "suspended")})
	}
	for range rapid.IntRange(0, 6).Draw(t, "domains") {
		v.Domains = append(v.Domains, policy.Domain{Name: mailaddr.Domain(fmt.Sprintf("d%d.example", rapid.IntRange(0, 4).Draw(t, "domain"))), Tenant: ids.Tenant(id("owner"))})
	}
	for range rapid.IntRange(0, 6).Draw(t, "sources") {
		v.Sources = append(v.Sources, policy.Source{ID: ids.Source(id("source")), EHLO: "mx.example", Epoch: uint64(rapid.IntRange(0, 3).Draw(t, "epoch"))})
	}
	for range rapid.IntRange(0, 3).Draw(t, "keys") {
		v.ReturnPathKeys = append(v.ReturnPathKeys, policy.ReturnPathKey{ID: uint8(rapid.IntRange(0, 2).Draw(t, "key"))})
	}
	encoded, err := EncodeView(v)
	if err != nil {
		t.Fatal(err)
	}
	return encoded
}

// TestDeltaLeadsToTheView is the promise of deltas: apply(diff(a, b), a) = b,
// byte for byte.
func TestDeltaLeadsToTheView(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		a, b := genView(t), genView(t)
		delta, err := DiffViews(a, b)
		if err != nil {
			t.Fatal(err)
		}
		got, err := ApplyDelta(a, delta)
		if err != nil || !bytes.Equal(got, b) {
			t.Fatalf("%v\n got %x\nwant %x", err, got, b)
		}
	})
}

// TestDeltaIsSmall changes one source among thousands.
func TestDeltaIsSmall(t *testing.T) {
	v := &policy.View{Generation: 1, Revision: 1}
	for i := range 5000 {
		v.Sources = append(v.Sources, policy.Source{ID: ids.Source{1, byte(i >> 8), byte(i)}, EHLO: "mx.example"})
	}
	a, err := EncodeView(v)
	if err != nil {
		t.Fatal(err)
	}
	v.Revision, v.Sources[2500].EHLO = 2, "other.example"
	b, err := EncodeView(v)
	if err != nil {
		t.Fatal(err)
	}
	delta, err := DiffViews(a, b)
	if err != nil || len(delta) > 200 {
		t.Errorf("a change of one source among %d bytes is %d bytes long: %v", len(a), len(delta), err)
	}
}

func TestDeltaRefuses(t *testing.T) {
	a, err := EncodeView(sampleView())
	if err != nil {
		t.Fatal(err)
	}
	for name, delta := range map[string][]byte{
		"garbage":            {0xff},
		"beyond the end":     {0x0a, 4, 0x08, 100, 0x10, 1},
		"far beyond the end": {0x0a, 12, 0x08, 0xff, 0xff, 0xff, 0xff, 0x0f, 0x10, 0xff, 0xff, 0xff, 0xff, 0x0f},
	} {
		if _, err := ApplyDelta(a, delta); !fault.Is(err, fault.Invalid) {
			t.Errorf("%s: %v", name, err)
		}
	}
	if _, err := ApplyDelta([]byte{0xff}, nil); !fault.Is(err, fault.Invalid) {
		t.Errorf("a damaged base: %v", err)
	}
}

// FuzzApplyDelta looks for deltas that break the bounds or the process.
func FuzzApplyDelta(f *testing.F) {
	a, err := EncodeView(sampleView())
	if err != nil {
		f.Fatal(err)
	}
	f.Add(a, []byte{0x0a, 4, 0x08, 1, 0x10, 1})
	f.Fuzz(func(t *testing.T, base, delta []byte) {
		if out, err := ApplyDelta(base, delta); err == nil && len(out) > MaxViewBytes {
			t.Errorf("%d bytes came out", len(out))
		}
	})
}
