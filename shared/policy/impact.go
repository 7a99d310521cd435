package policy

import (
	"fmt"
	"net/netip"
	"slices"
	"strings"
)

// maxImpactNames is how many providers or streams Impact.String names.
const maxImpactNames = 6

// defaultProvider stands for all providers without a profile.
const defaultProvider = "default"

// Impact says what a change of the document touches in a cluster, so that
// nobody lowers a limit for the whole fleet by accident.
type Impact struct {
	Pools     int              // whose sources, weights or streams change
	Sources   int              // in those lanes
	Lanes     int              // source × provider pairs whose limits or share of work change
	Providers []ProviderImpact // by name
	Streams   []string         // tenant/project/name of entries that change
	Settings  []string         // sections whose settings change on every relay
	Limits    []string         // limits across the cluster that change, by name
}

// ProviderImpact is a provider whose profile changes.
type ProviderImpact struct {
	Name    string // "default": all providers without a profile
	Lowers  bool   // a limit becomes tighter
	Raises  bool   // a limit becomes wider or goes away
	Sources int    // that may send to it
}

// lane is a source towards a provider.
type lane struct {
	source   netip.Addr
	owner    [16]byte
	provider string
}

// ImpactOf compares two valid documents for the objects of a view.
func ImpactOf(from, to *Document, v *View) Impact {
	var p problems
	oldTable, newTable := newProviderTable(&from.Providers, &p), newProviderTable(&to.Providers, &p)
	names := providerNames(oldTable, newTable)
	pools := make(map[[16]byte]string, len(v.Pools))
	for i := range v.Pools {
		pools[v.Pools[i].ID] = v.Pools[i].Name
	}
	oldWeights, newWeights := weightsByPool(&from.Pools), weightsByPool(&to.Pools)
	touchedPools, touchedSources, lanes := map[string]bool{}, map[lane]bool{}, map[lane]bool{}
	touch := func(s *Source, provider string) {
		touchedPools[pools[s.Pool]] = true
		touchedSources[lane{source: s.Bind, owner: s.Owner}] = true
		lanes[lane{s.Bind, s.Owner, provider}] = true
	}
	var placed []*Source
	for i := range v.Sources {
		s := &v.Sources[i]
		at := poolAddress{pools[s.Pool], s.Bind.Unmap()}
		before, after := weightOf(oldWeights, at), weightOf(newWeights, at)
		if s.Owner.IsZero() || s.Pool.IsZero() || before == 0 && after == 0 {
			continue
		}
		placed = append(placed, s)
		if before != after {
			for _, name := range names {
				touch(s, name)
			}
		}
	}
	var out Impact
	for _, name := range names {
		before, after := oldTable.profile(name), newTable.profile(name)
		if before.sameAs(after) {
			continue
		}
		change := ProviderImpact{Name: name, Sources: len(placed)}
		change.Lowers, change.Raises = before.compare(after)
		out.Providers = append(out.Providers, change)
		for _, s := range placed {
			touch(s, name)
		}
	}
	out.entries(Diff(from, to), from, to, touchedPools)
	out.Pools, out.Sources, out.Lanes = len(touchedPools), len(touchedSources), len(lanes)
	return out
}

// entries fills in streams and settings.
func (i *Impact) entries(changes []Change, from, to *Document, pools map[string]bool) {
	touched, limits := map[string]bool{}, map[string]bool{}
	for _, c := range changes {
		switch c.Section {
		case "providers", "pools":
		case "limits":
			if name, ok := strings.CutPrefix(c.Key, "limit["); ok {
				name, _, _ = strings.Cut(name, "]")
				limits[strings.Trim(name, `"`)] = true
				continue
			}
			i.setting(c.Section)
		case "streams":
			if name, ok := strings.CutPrefix(c.Key, "stream["); ok {
				name, _, _ = strings.Cut(name, "]")
				touched[strings.Trim(name, `"`)] = true
				continue
			}
			i.setting(c.Section)
		default:
			i.setting(c.Section)
		}
	}
	i.Streams, i.Limits = sortedKeys(touched), sortedKeys(limits)
	for _, doc := range []*Document{from, to} {
		for _, s := range doc.Streams.Stream {
			if touched[entryName(s)] {
				pools[s.Pool] = true
			}
		}
	}
}

// setting notes a section whose settings change on every relay.
func (i *Impact) setting(section string) {
	if !slices.Contains(i.Settings, section) {
		i.Settings = append(i.Settings, section)
	}
}

func weightOf(weights map[poolAddress]int, at poolAddress) int {
	if w, ok := weights[at]; ok {
		return w
	}
	return 1
}

func providerNames(tables ...*ProviderTable) []string {
	all := map[string]bool{defaultProvider: true}
	for _, t := range tables {
		for name := range t.byName {
			all[name] = true
		}
		for name := range t.unlisted {
			all[name] = true
		}
	}
	return sortedKeys(all)
}

// profile returns what holds for a name, listed or not.
func (t *ProviderTable) profile(name string) *Profile {
	if p, ok := t.byName[name]; ok {
		return p
	}
	if p, ok := t.unlisted[name]; ok {
		return p
	}
	return t.fallback
}

func (p *Profile) sameAs(o *Profile) bool {
	a, b := *p, *o
	a.Name, b.Name = "", ""
	return a == b
}

// compare reports whether a limit of o is tighter or wider than that of p.
func (p *Profile) compare(o *Profile) (lowers, raises bool) {
	note := func(before, after float64) { // 0 is no limit
		switch {
		case before == after:
		case before == 0 || after != 0 && after < before:
			lowers = true
		default:
			raises = true
		}
	}
	perSecond := func(r Rate) float64 {
		if !r.Limited() {
			return 0
		}
		return float64(r.Max) / r.Per.Seconds()
	}
	for i := range scopes {
		note(float64(p.connections[i]), float64(o.connections[i]))
		note(perSecond(p.messageRate[i]), perSecond(o.messageRate[i]))
		note(perSecond(p.connectionRate[i]), perSecond(o.connectionRate[i]))
		note(float64(p.messageRate[i].Burst), float64(o.messageRate[i].Burst))
		note(float64(p.connectionRate[i].Burst), float64(o.connectionRate[i].Burst))
	}
	note(float64(p.messagesPerConnection), float64(o.messagesPerConnection))
	note(float64(p.recipientsPerTransaction), float64(o.recipientsPerTransaction))
	return lowers, raises
}

// String is the impact in a sentence: "3 pools, 41 lanes; lowers orange on 12
// sources".
func (i Impact) String() string {
	var parts []string
	if i.Pools > 0 || i.Lanes > 0 {
		parts = append(parts, count(i.Pools, "pool")+", "+count(i.Lanes, "lane"))
	}
	for n, p := range i.Providers {
		if n == maxImpactNames {
			parts = append(parts, fmt.Sprintf("and %d more providers", len(i.Providers)-n))
			break
		}
		verb := "changes"
		switch {
		case p.Lowers && p.Raises:
			verb = "lowers and raises limits of"
		case p.Lowers:
			verb = "lowers"
		case p.Raises:
			verb = "raises"
		}
		parts = append(parts, fmt.Sprintf("%s %s on %s", verb, p.Name, count(p.Sources, "source")))
	}
	if n := len(i.Streams); n > maxImpactNames {
		parts = append(parts, fmt.Sprintf("changes %d streams", n))
	} else if n > 0 {
		parts = append(parts, "changes stream "+strings.Join(i.Streams, ", "))
	}
	if n := len(i.Limits); n > maxImpactNames {
		parts = append(parts, fmt.Sprintf("changes %d limits across the cluster", n))
	} else if n > 0 {
		parts = append(parts, "changes limit "+strings.Join(i.Limits, ", ")+" across the cluster")
	}
	if len(i.Settings) > 0 {
		parts = append(parts, "settings of every relay: "+strings.Join(i.Settings, ", "))
	}
	if len(parts) == 0 {
		return "nothing changes"
	}
	return strings.Join(parts, "; ")
}

func count(n int, what string) string {
	if n == 1 {
		return "1 " + what
	}
	return fmt.Sprintf("%d %ss", n, what)
}
