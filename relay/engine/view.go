package engine

import (
	"time"

	"github.com/relais-mta/relais/relay/egress"
	"github.com/relais-mta/relais/relay/queue"
	"github.com/relais-mta/relais/relay/schedule"
	"github.com/relais-mta/relais/shared/ids"
	"github.com/relais-mta/relais/shared/policy"
)

type sourceID = ids.Source

// applyView takes over limits, sources and shapes of the view in force.
func (e *Engine) applyView(now time.Time) {
	dir := e.cfg.Directory()
	if dir == nil {
		return
	}
	doc := dir.Document()
	e.checks.changed(doc)
	e.mu.Lock()
	e.sched.SetLimits(schedule.Limits{
		MaxSessions:          doc.Delivery.MaxSessions,
		MaxConnectsInFlight:  doc.Delivery.MaxConnectsInFlight,
		MaxResolvesInFlight:  doc.Delivery.MaxResolvesInFlight,
		ProviderShare:        doc.Delivery.ProviderPercent,
		UnprovenShare:        doc.Delivery.UnprovenPercent,
		TransactionalReserve: doc.Delivery.ReservePercent,
	})
	e.sched.SetShares(func(tenant ids.Tenant, stream string, kind policy.StreamKind) schedule.Share {
		share := dir.Share(tenant, stream, kind)
		return schedule.Share{TenantWeight: share.TenantWeight, StreamWeight: share.Weight, Priority: share.Priority}
	})
	pools := make(map[ids.Pool]bool)
	for i := range dir.View().Pools {
		pools[dir.View().Pools[i].ID] = true
	}
	for _, id := range e.sched.Pools() { // pools that were deleted lose their sources
		pools[id] = true
	}
	for id := range pools {
		e.sched.SetPool(id, e.usable(dir, id))
	}
	e.sched.Reshape(func(provider string) (schedule.Shape, bool) {
		profile, ok := dir.Providers().Named(provider)
		if !ok {
			return schedule.Shape{}, false
		}
		return shape(profile), true
	}, now)
	// The same MX set may belong to another provider now.
	for domain, route := range e.routes {
		if route.Failure == nil {
			e.sched.Reroute(domain, toSchedule(route, dir), now)
		}
	}
	// What goes over an address that is not here any more gets no answer, and QUIT
	// none either.
	for _, w := range e.sessions {
		if e.cfg.Egress.State(w.lane.Source) == egress.NotPresent {
			w.abort()
		}
	}
	e.leaving = e.leaving[:0]
	for _, l := range dir.View().Leaving {
		if l.Owner == dir.View().Node {
			e.leaving = append(e.leaving, l)
		}
	}
	back := e.unpinAll(now)
	e.mu.Unlock()
	for _, w := range back {
		e.queue.Return(w)
	}
}

// Left lists the addresses that this relay was told to stop using and from which
// it has nothing open: by the view that it works with it opens nothing either.
func (e *Engine) Left() []policy.LeavingSource {
	e.mu.Lock()
	defer e.mu.Unlock()
	if len(e.leaving) == 0 {
		return nil
	}
	open := make(map[sourceID]bool)
	for _, w := range e.sessions {
		open[w.lane.Source] = true
	}
	var out []policy.LeavingSource
	for _, l := range e.leaving {
		if !open[l.ID] {
			out = append(out, l)
		}
	}
	return out
}

// usable lists the sources of a pool that are assigned here and present.
func (e *Engine) usable(dir *policy.Directory, pool ids.Pool) []schedule.Source {
	var out []schedule.Source
	for _, s := range dir.LocalSources(pool) {
		if e.cfg.Egress.Usable(s.ID) {
			out = append(out, schedule.Source{ID: s.ID, Weight: s.Weight, IPv6: !s.Bind.Is4()})
		}
	}
	return out
}

// unleased says which floating addresses of a pool wait for their lease, for the
// explanation of why no source can be used.
func (e *Engine) unleased(pool ids.Pool) (text string) {
	dir := e.cfg.Directory()
	if dir == nil {
		return ""
	}
	for _, s := range dir.LocalSources(pool) {
		if s.Leased {
			if why := e.cfg.Egress.Why(s.ID); why != "" {
				text += "; " + why
			}
		}
	}
	return text
}

// scheduleKey is what the scheduler needs to know of a work queue.
func scheduleKey(k *queue.Key) schedule.Key {
	return schedule.Key{Tenant: k.Tenant, Stream: k.Stream, Kind: k.Kind, Pool: k.Pool, Domain: k.Domain, Priority: k.Priority}
}
