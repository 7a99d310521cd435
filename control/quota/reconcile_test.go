package quota

import (
	"testing"
	"time"

	"github.com/relais-mta/relais/control/command"
	"github.com/relais-mta/relais/shared/lease"
)

// A change of more limits than one command may name is several, and relays may have
// a view after each: none of them lacks a limit that there is before and after, nor
// has a former one gone before what comes in its place.
func TestALargeChangeLimitsMailInBetween(t *testing.T) {
	const replaced, renamed = 700, 800
	var changes []limitChange
	for n := range replaced {
		changes = append(changes, limitChange{drop: lease.LimitID(n + 1), put: &command.SharedLimit{}})
	}
	for range renamed {
		changes = append(changes, limitChange{put: &command.SharedLimit{}})
	}
	for n := range renamed {
		changes = append(changes, limitChange{drop: lease.LimitID(replaced + n + 1)})
	}
	longer := lease.DefaultConfig()
	longer.TTL *= 2
	sets := limitSets(changes, lease.DefaultConfig(), longer)
	if sets[0].GetConfig() == nil || len(sets[0].GetPut())+len(sets[0].GetDrop()) > 0 || sets[0].GetConfig().Config().TTL != time.Minute {
		t.Errorf("the first command: %v", sets[0])
	}
	put, dropped := 0, 0
	for i, c := range sets[1:] {
		if n := len(c.GetPut()) + len(c.GetDrop()); n == 0 || n > command.MaxLimitsInSet {
			t.Errorf("command %d names %d limits", i, n)
		}
		put, dropped = put+len(c.GetPut()), dropped+len(c.GetDrop())
		if dropped > put {
			t.Errorf("after command %d %d limits are gone and %d are there in their place", i, dropped, put)
		}
	}
	if put != replaced+renamed || dropped != replaced+renamed {
		t.Errorf("%d limits put and %d dropped, want %d", put, dropped, replaced+renamed)
	}
	if got := limitSets(nil, longer, longer); len(got) > 0 {
		t.Errorf("nothing changes, by %d commands", len(got))
	}
}
