package engine

import (
	"testing"
	"time"

	"github.com/relais-mta/relais/relay"
	"github.com/relais-mta/relais/shared/lab"
	"github.com/relais-mta/relais/shared/policy"
)

// TestLanesTellSinceWhenMailIsDue: what was served meanwhile makes nothing younger
// that is still due.
func TestLanesTellSinceWhenMailIsDue(t *testing.T) {
	w := newWorld(t, nil) // no source: all of it stays
	var last *relay.Envelope
	for i := range 3 {
		last = w.accept(nil, w.at(lab.Google, i, lab.Accept))
	}
	w.view(func(d *policy.Document) { // one may go
		d.Providers.Limit = append(d.Providers.Limit, policy.Override{Provider: lab.Google, Limit: policy.Limit{
			Kind: policy.MessageRate, Scope: policy.ScopeSource, Max: 1, Per: policy.Duration(time.Hour), Burst: 1,
		}})
	}, first)
	var lane LaneInfo
	w.until("two mails that wait behind one that was delivered", func() bool {
		for _, lane = range w.engine.Lanes() {
			if lane.Provider == lab.Google && lane.Delivered == 1 && lane.Waiting == 2 {
				return true
			}
		}
		return false
	})
	if lane.WaitingSince.IsZero() || lane.WaitingSince.After(last.AcceptedAt) {
		t.Errorf("due since %v, want %v at the latest: %+v", lane.WaitingSince, last.AcceptedAt, lane)
	}
}
