package main

import (
	"testing"

	"github.com/relais-mta/relais/control/api"
)

// TestMergedRefusal: what a relay refused by the word of a server that is behind is
// not the policy that another server knows of.
func TestMergedRefusal(t *testing.T) {
	refusing := func(at uint64) api.RelayStatus {
		return api.RelayStatus{ID: "nod_1", Connected: true, AckedRevision: 40, Refused: true, RefusedRevision: at, RefusedWhy: "its disk is read-only"}
	}
	answer := func(policy uint64, relays ...api.RelayStatus) api.PolicyStatus {
		return api.PolicyStatus{Revision: policy, Total: len(relays), Relays: relays}
	}
	unlinked := api.RelayStatus{ID: "nod_1"}
	for name, tc := range map[string]struct {
		answers []api.PolicyStatus
		refused bool
	}{
		"the policy in force":                     {[]api.PolicyStatus{answer(47, unlinked), answer(47, refusing(47))}, true},
		"the policy in force with a later change": {[]api.PolicyStatus{answer(47, unlinked), answer(47, refusing(51))}, true},
		"the policy before":                       {[]api.PolicyStatus{answer(55, unlinked), answer(47, refusing(51))}, false},
		"a server that does not tell what":        {[]api.PolicyStatus{answer(55, unlinked), answer(47, refusing(0))}, true},
	} {
		s := mergeStatus(tc.answers)
		if r := s.Relays[0]; len(s.Relays) != 1 || r.Refused != tc.refused || (r.RefusedWhy != "") != tc.refused || (refusalOf(s) != nil) != tc.refused {
			t.Errorf("%s: %+v", name, s)
		}
	}
}
