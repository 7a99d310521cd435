package schedule

import (
	"cmp"
	"maps"
	"slices"
	"strings"
	"time"
)

// Reshape takes over the limits of all providers, for when policy changed them.
// It is not enough to tell them with the routes of domains: a provider's counters
// outlive its mail, and the next mail must find the limits in force whether or not
// any was there when they changed. Of a provider that is unknown to of nothing
// changes; its domains are told to Reroute.
func (s *Scheduler) Reshape(of func(provider string) (Shape, bool), now time.Time) {
	for _, d := range s.domains {
		if !d.routed {
			continue
		}
		if shape, ok := of(d.route.Provider); ok {
			d.route.Shape = shape
		}
	}
	groups := slices.SortedFunc(maps.Values(s.groups), func(a, b *group) int {
		return cmp.Or(strings.Compare(a.key.provider, b.key.provider), strings.Compare(a.key.pool.String(), b.key.pool.String()))
	})
	for _, g := range groups {
		if shape, ok := of(g.key.provider); ok {
			g.shape(s, shape, now)
		}
	}
}
