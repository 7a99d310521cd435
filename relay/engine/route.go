package engine

import (
	"time"

	"github.com/relais-mta/relais/relay"
	"github.com/relais-mta/relais/relay/queue"
	"github.com/relais-mta/relais/relay/resolve"
	"github.com/relais-mta/relais/relay/schedule"
	"github.com/relais-mta/relais/shared/mailaddr"
	"github.com/relais-mta/relais/shared/policy"
)

// lookup finds the route of a domain and tells the scheduler.
func (e *Engine) lookup(domain mailaddr.Domain) {
	defer e.lookups.Done()
	route := e.cfg.Resolver.Route(e.sessionContext(), domain, e.families())
	now := e.cfg.Now()
	e.mu.Lock()
	switch f := route.Failure; {
	case f == nil:
		if dir := e.cfg.Directory(); dir != nil {
			e.routes[domain] = route
			e.sched.Routed(domain, toSchedule(route, dir), now)
			break
		}
		e.sched.Unroutable(domain, now.Add(time.Second))
	case f.Status == relay.Failed:
		e.routes[domain] = route
		e.sched.Undeliverable(domain, later(route.Expires, now))
	default:
		e.routes[domain] = route
		e.sched.Unroutable(domain, later(route.Expires, now))
	}
	e.pumpLocked(now)
	e.mu.Unlock()
	e.wake()
	if f := route.Failure; f != nil && f.Status != relay.Failed {
		e.deferDomain(domain, route)
	}
}

// later returns t, but at least a second from now, so that a failing look-up
// can never become a busy loop.
func later(t, now time.Time) time.Time {
	if soon := now.Add(time.Second); t.Before(soon) {
		return soon
	}
	return t
}

// toSchedule says what the scheduler needs to know of a route.
func toSchedule(route *resolve.Route, dir *policy.Directory) schedule.Route {
	name, profile := dir.Providers().Match(route.Names, route.FirstAddr())
	return schedule.Route{
		Provider: name,
		Site:     site(route),
		Shape:    shape(profile),
		Families: familiesOf(route, profile.Family),
		Expires:  route.Expires,
	}
}

// site names a set of MX hosts; sessions are shared between domains whose sets
// are equal.
func site(route *resolve.Route) string {
	if len(route.Names) == 1 {
		return route.Names[0]
	}
	n := 0
	for _, h := range route.Names {
		n += len(h) + 1
	}
	b := make([]byte, 0, n)
	for i := range route.Hosts {
		if i > 0 {
			sep := byte('=')
			if route.Hosts[i].Pref != route.Hosts[i-1].Pref {
				sep = '<'
			}
			b = append(b, sep)
		}
		b = append(b, route.Hosts[i].Name...)
	}
	return string(b)
}

// familiesOf says which address families lead to a route's hosts, and in which
// order the provider's profile wants them.
func familiesOf(route *resolve.Route, profile string) schedule.Families {
	f := schedule.Families{NoIPv4: true, NoIPv6: true}
	for i := range route.Hosts {
		for _, a := range route.Hosts[i].Addrs {
			if a.Is4() {
				f.NoIPv4 = false
			} else {
				f.NoIPv6 = false
			}
		}
	}
	switch profile {
	case policy.FamilyIPv4:
		f.NoIPv6, f.Refused = true, true
	case policy.FamilyIPv4First:
		f.First = schedule.IPv4First
	case policy.FamilyIPv6First:
		f.First = schedule.IPv6First
	}
	return f
}

func shape(p *policy.Profile) schedule.Shape {
	return schedule.Shape{
		SourceConnections:     p.Connections(policy.ScopeSource),
		RelayConnections:      p.Connections(policy.ScopeRelay),
		MessagesPerConnection: p.MessagesPerConnection(),
		SourceMessageRate:     schedule.Rate(p.MessageRate(policy.ScopeSource)),
		RelayMessageRate:      schedule.Rate(p.MessageRate(policy.ScopeRelay)),
		SourceConnectionRate:  schedule.Rate(p.ConnectionRate(policy.ScopeSource)),
		RelayConnectionRate:   schedule.Rate(p.ConnectionRate(policy.ScopeRelay)),
	}
}

// families are the address families for which this relay has sources: AAAA is
// asked only if IPv6 can be used.
func (e *Engine) families() resolve.Families {
	var f resolve.Families
	for _, s := range e.cfg.Egress.Sources() {
		if s.Source.Bind.Is4() {
			f |= resolve.IPv4
		} else {
			f |= resolve.IPv6
		}
	}
	if f == 0 {
		f = resolve.IPv4
	}
	return f
}

// refuse fails everything that is due in a queue whose domain takes no mail.
func (e *Engine) refuse(n schedule.Queue) {
	defer e.lookups.Done()
	defer func() {
		e.mu.Lock()
		delete(e.refusing, n)
		e.mu.Unlock()
		// More may wait, or the route has changed under us: look again.
		e.Notify(queue.Number(n))
	}()
	for range maxRefusePerRound {
		now := e.cfg.Now()
		e.mu.Lock()
		w := e.take(n, schedule.Lane{}, now)
		var route *resolve.Route
		if w != nil {
			route = e.routes[w.Key.Domain]
		}
		e.mu.Unlock()
		if w == nil || !e.queue.Load(w) {
			return
		}
		if e.held(w, schedule.Lane{}) {
			continue
		}
		if route == nil || route.Failure == nil || route.Failure.Status != relay.Failed {
			e.queue.Return(w)
			break
		}
		e.settleWithout(w, route.Failure, now)
	}
}

// deferDomain records the failed look-up on the mail that was due for it, so
// that every recipient knows why it waits; the rest waits with the domain.
func (e *Engine) deferDomain(domain mailaddr.Domain, route *resolve.Route) {
	e.mu.Lock()
	numbers := e.sched.Parked(domain)
	e.mu.Unlock()
	for _, n := range numbers {
		for range maxRefusePerRound {
			now := e.cfg.Now()
			e.mu.Lock()
			w := e.take(n, schedule.Lane{}, now)
			e.mu.Unlock()
			if w == nil || !e.queue.Load(w) {
				break
			}
			if e.held(w, schedule.Lane{}) {
				continue
			}
			e.settleWithout(w, route.Failure, now)
		}
	}
}
