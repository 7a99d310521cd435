package service

import "testing"

// TestRefusalOfAnEarlierView: a relay that refused a view of before a policy has not
// answered about that policy, until it refuses that as well or works with it.
func TestRefusalOfAnEarlierView(t *testing.T) {
	t.Parallel()
	f := newFixture(t)
	id := f.join(t, "edge-1")
	put := func(text string) uint64 {
		return must[PolicyView](t)(f.PutPolicy(ctx, operator, map[string]string{"queue": text}, nil, Change{})).Revision
	}
	stands := func() RelayStatus {
		t.Helper()
		return must[PolicyStatus](t)(f.PolicyStatus(viewer)).Relays[0]
	}
	first := put("retry_max = \"6h\"\n")
	f.AckView(id, first-1)
	f.NackView(id, first, "its disk is read-only")
	if r := stands(); !r.Refused || r.RefusedRevision != first || r.Why != "its disk is read-only" {
		t.Errorf("of the policy that it refused: %+v", r)
	}
	second := put("retry_max = \"7h\"\n")
	if r := stands(); r.Refused || r.RefusedRevision != 0 || r.Why != "" {
		t.Errorf("of a policy that it has not answered yet: %+v", r)
	}
	f.NackView(id, second+1, "its disk is read-only")
	if r := stands(); !r.Refused || r.RefusedRevision != second+1 {
		t.Errorf("of the policy with a later change: %+v", r)
	}
}
