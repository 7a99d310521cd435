package policy

import (
	"fmt"
	"net/netip"

	"github.com/relais-mta/relais/shared/ids"
)

// References are the objects of the cluster that a document may name.
type References struct {
	Projects map[string]map[string]bool // tenant's name → names of its projects
	Pools    map[string]PoolReference   // by the pool's name
	Domains  map[string]bool            // sending domains
}

// PoolReference is what the checks need to know of a pool.
type PoolReference struct {
	Owner   string // name of the tenant it is dedicated to; empty: shared
	Sources map[netip.Addr]bool
}

// ReferencesOf returns the objects that a view holds.
func ReferencesOf(v *View) References {
	refs := References{Projects: make(map[string]map[string]bool), Pools: make(map[string]PoolReference), Domains: make(map[string]bool)}
	for _, d := range v.Domains {
		refs.Domains[string(d.Name)] = true
	}
	tenants := make(map[ids.Tenant]string, len(v.Tenants))
	for _, t := range v.Tenants {
		tenants[t.ID] = t.Name
		refs.Projects[t.Name] = make(map[string]bool)
	}
	for _, p := range v.Projects {
		if names := refs.Projects[tenants[p.Tenant]]; names != nil {
			names[p.Name] = true
		}
	}
	pools := make(map[ids.Pool]PoolReference, len(v.Pools))
	for _, p := range v.Pools {
		r := PoolReference{Owner: tenants[p.Tenant], Sources: make(map[netip.Addr]bool)}
		pools[p.ID], refs.Pools[p.Name] = r, r
	}
	for _, s := range v.Sources {
		if r, ok := pools[s.Pool]; ok {
			r.Sources[s.Bind.Unmap()] = true
		}
	}
	return refs
}

// CheckReferences checks that the tenants, projects, pools, source addresses and
// sending domains that a valid document names exist, and that no stream sends mail
// through a pool dedicated to another tenant. The error is fault.Invalid; it
// names each field and its fix, up to 20 of them.
func CheckReferences(doc *Document, refs References) error {
	var p problems
	for i := range doc.Streams.Stream {
		s := &doc.Streams.Stream[i]
		at := fmt.Sprintf("streams.stream[%d].", i)
		if s.Tenant != everyone {
			projects, ok := refs.Projects[s.Tenant]
			if !ok {
				p.add(at+"tenant", "there is no tenant %q: correct the name or add the tenant first", clip(s.Tenant))
			} else if s.Project != everyone && !projects[s.Project] {
				p.add(at+"project", "tenant %q has no project %q: correct the name or add the project first", clip(s.Tenant), clip(s.Project))
			}
		}
		pool, ok := refs.Pools[s.Pool]
		switch {
		case !ok:
			p.add(at+"pool", "there is no pool %q: correct the name or add the pool first", clip(s.Pool))
		case pool.Owner != "" && s.Tenant != pool.Owner:
			p.add(at+"pool", "pool %q is dedicated to tenant %q: name that tenant in the stream or a shared pool", clip(s.Pool), clip(pool.Owner))
		}
	}
	for i := range doc.Streams.Tenant {
		if name := doc.Streams.Tenant[i].Name; refs.Projects[name] == nil {
			p.add(fmt.Sprintf("streams.tenant[%d].name", i), "there is no tenant %q: correct the name or add the tenant first", clip(name))
		}
	}
	for i := range doc.Pools.Pool {
		w := &doc.Pools.Pool[i]
		at := fmt.Sprintf("pools.pool[%d].", i)
		pool, ok := refs.Pools[w.Name]
		if !ok {
			p.add(at+"name", "there is no pool %q: correct the name or add the pool first", clip(w.Name))
			continue
		}
		for _, text := range sortedKeys(w.Weights) {
			if ip, err := netip.ParseAddr(text); err != nil || !pool.Sources[ip.Unmap()] {
				p.add(at+"weights.\""+clip(text)+"\"", "is no source address of pool %q: correct it, or assign the address to the pool first", clip(w.Name))
			}
		}
	}
	for i := range doc.Feedback.Rule {
		if name := doc.Feedback.Rule[i].Domain; name != everyone && !refs.Domains[name] {
			p.add(fmt.Sprintf("feedback.rule[%d].domain", i), "there is no sending domain %q: correct the name or add the domain first", clip(name))
		}
	}
	checkLimits(doc, refs, &p)
	return p.err("policy.CheckReferences")
}
