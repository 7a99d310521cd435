package service

import (
	"fmt"
	"testing"
	"time"

	"github.com/relais-mta/relais/control"
	"github.com/relais-mta/relais/control/command"
	"github.com/relais-mta/relais/control/quota"
	"github.com/relais-mta/relais/shared/lease"
)

// The leader is asked about so many limits at once; of the others it is said that
// nothing is known, for relays that wait for them would be missing in silence.
func TestMoreLimitsThanTheLeaderIsAskedAbout(t *testing.T) {
	f := newFixture(t)
	set := &command.LimitsSet{}
	for n := range quota.MaxStatusLimits + 1 {
		set.Put = append(set.Put, command.SharedLimitRecord(&control.SharedLimit{Name: fmt.Sprintf("a%03d", quota.MaxStatusLimits-n),
			Limit: lease.Limit{Kind: lease.Rate, Max: lease.Milli, Per: time.Minute, Burst: 1}}))
	}
	must[*control.Lease](t)(propose[control.Lease](ctx, f.Service, set))
	f.SetLender(&lender{})
	why, err := f.PolicyWhy(ctx, viewer, Mail{})
	if err != nil || len(why.Shared) != quota.MaxStatusLimits+1 {
		t.Fatalf("%d limits, %v", len(why.Shared), err)
	}
	for i, v := range why.Shared {
		if known := v.Problem == ""; known != (i < quota.MaxStatusLimits) {
			t.Errorf("limit %d, %s: %q", i, v.Name, v.Problem)
		}
	}
	if one, err := f.Limit(ctx, viewer, "a200"); err != nil || one[0].Problem != "" {
		t.Errorf("the last alone: %+v, %v", one, err)
	}
}
