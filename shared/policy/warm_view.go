package policy

import (
	"slices"

	"github.com/relais-mta/relais/shared/ids"
	"github.com/relais-mta/relais/shared/mailaddr"
)

// Warm is what warms up in a cluster, as relays know it. Quotas and stages are not
// in it: relays learn them when they reserve.
type Warm struct {
	Today    int32    // the day that the cluster began last, since 1 January 1970
	Classes  []string // of providers, by number
	Subjects []WarmSubject
}

// WarmSubject is an address, a pool or a sending domain that warms up: one of the
// three is set. What has no reservation for it must not be sent.
type WarmSubject struct {
	Number uint64
	Source ids.Source
	Pool   ids.Pool
	Domain mailaddr.Domain // sending domain
	Plan   string
	Hold   string // why it stays at its stages; empty: it goes on
}

// warmTable finds what limits mail.
type warmTable struct {
	sources map[ids.Source]*WarmSubject
	pools   map[ids.Pool]*WarmSubject
	domains map[mailaddr.Domain]*WarmSubject
	classes map[string]uint8
}

func (d *Directory) compileWarm(p *problems) {
	w := &d.view.Warm
	d.warm = warmTable{sources: make(map[ids.Source]*WarmSubject), pools: make(map[ids.Pool]*WarmSubject), domains: make(map[mailaddr.Domain]*WarmSubject), classes: make(map[string]uint8, len(w.Classes))}
	if len(w.Classes) > maxWarmupClasses {
		p.add("view.warm", "has %d classes, allowed are %d", len(w.Classes), maxWarmupClasses)
		return
	}
	for i, name := range w.Classes {
		d.warm.classes[name] = uint8(i)
	}
	for i := range w.Subjects {
		s := &w.Subjects[i]
		switch {
		case !s.Source.IsZero():
			d.warm.sources[s.Source] = s
		case !s.Pool.IsZero():
			d.warm.pools[s.Pool] = s
		case s.Domain != "":
			d.warm.domains[s.Domain] = s
		default:
			p.add("view.warm", "subject %d is nothing that can warm up", s.Number)
		}
	}
}

// Warming reports whether anything warms up.
func (d *Directory) Warming() bool { return len(d.view.Warm.Subjects) > 0 }

// WarmToday returns the day that the cluster began last.
func (d *Directory) WarmToday() int32 { return d.view.Warm.Today }

// WarmSubjects appends what limits mail of a sending domain that leaves from a
// source of a pool, the smallest first. An empty domain leaves that out. Pools and
// domains are counted by all relays together.
func (d *Directory) WarmSubjects(dst []*WarmSubject, source ids.Source, pool ids.Pool, from mailaddr.Domain) []*WarmSubject {
	if s := d.warm.sources[source]; s != nil {
		dst = append(dst, s)
	}
	if len(d.warm.domains) > 0 && from != "" {
		if dom, ok := d.DomainFor(from); ok {
			if s := d.warm.domains[dom.Name]; s != nil {
				dst = append(dst, s)
			}
		}
	}
	if s := d.warm.pools[pool]; s != nil {
		dst = append(dst, s)
	}
	return dst
}

// WarmClass returns the class of a provider for a subject, by number and name;
// false: it has no quota, for the plan is gone from the policy or the cluster has
// given the class no number yet.
func (d *Directory) WarmClass(s *WarmSubject, provider string) (class uint8, name string, ok bool) {
	plan, known := d.view.Document.Warmup.PlanNamed(s.Plan)
	if !known {
		return 0, "", false
	}
	name = d.view.Document.Warmup.ClassOf(plan, provider)
	class, ok = d.warm.classes[name]
	return class, name, ok
}

// WarmHere returns the subjects that this relay may need reservations of: its own
// addresses that warm up, and pools and domains.
func (d *Directory) WarmHere() []*WarmSubject {
	var out []*WarmSubject
	for i := range d.view.Warm.Subjects {
		s := &d.view.Warm.Subjects[i]
		if s.Source.IsZero() || slices.ContainsFunc(d.view.Sources, func(src Source) bool { return src.ID == s.Source && src.Owner == d.view.Node }) {
			out = append(out, s)
		}
	}
	return out
}
