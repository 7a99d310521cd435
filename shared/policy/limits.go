package policy

import (
	"errors"
	"fmt"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/relais-mta/relais/shared/fault"
	"github.com/relais-mta/relais/shared/lease"
	"github.com/relais-mta/relais/shared/mailaddr"
)

// maxSharedLimits bounds section limits. Each entry gives two limits at most, and
// a relay speaks of all of them in one report.
const maxSharedLimits = 5_000

// The default parts of a limit of section limits.
const (
	DefaultFloorPercent   = 20
	DefaultReservePercent = 5
	leastDefaultBurst     = 20
)

// Limits holds the limits that all relays share. Only control reads the section:
// relays get what it comes to with their view.
type Limits struct {
	Limit []LimitEntry `toml:"limit"`
	Lease Lease        `toml:"lease"`
}

// LimitEntry is one limit across the cluster. It counts the mail that matches
// every selector that is stated; without one, all mail.
type LimitEntry struct {
	Name     string `toml:"name"`
	Provider string `toml:"provider"`
	Tenant   string `toml:"tenant"`
	Domain   string `toml:"domain"` // of recipients
	Pool     string `toml:"pool"`

	Messages    string `toml:"messages"`    // transactions begun, such as "600/1m"; empty: no limit
	Burst       *int   `toml:"burst"`       // of messages, after a pause, all relays together; nil: a second's worth, 20 at least
	Connections *int   `toml:"connections"` // open or opening at once; nil: no limit

	FloorPercent   *int `toml:"floor_percent"`   // set aside for relays that are cut off; nil: 20
	ReservePercent *int `toml:"reserve_percent"` // left free so that a new demand is met at once; nil: 5
	SoftFloor      bool `toml:"soft_floor"`      // a relay that is cut off keeps its floor for ever
}

// Lease holds the lengths of time by which limits are lent out.
type Lease struct {
	TTL      Duration `toml:"ttl"`       // a relay that hears nothing keeps its share this long
	FloorTTL Duration `toml:"floor_ttl"` // and its floor this long
	Linger   Duration `toml:"linger"`    // a connection in use may stay so long after its right ended
	Hold     Duration `toml:"hold"`      // where there are fewer rights than relays that want one, each keeps it this long at most
}

// Config returns the lengths of time as package lease knows them.
func (l Lease) Config() lease.Config {
	c := lease.DefaultConfig()
	c.TTL, c.FloorTTL, c.Linger, c.Hold = l.TTL.D(), l.FloorTTL.D(), l.Linger.D(), l.Hold.D()
	return c
}

// ParseMessages reads a rate such as "600/1m".
func ParseMessages(text string) (Rate, error) {
	const op, form = "policy.ParseMessages", "write a number of messages and a time, such as \"600/1m\""
	count, per, ok := strings.Cut(text, "/")
	n, err := strconv.ParseInt(strings.TrimSpace(count), 10, 64)
	if !ok || err != nil {
		return Rate{}, fault.New(fault.Invalid, op, "%q is not a rate: %s", clip(text), form)
	}
	var d Duration
	if err := d.UnmarshalText([]byte(strings.TrimSpace(per))); err != nil {
		return Rate{}, fault.New(fault.Invalid, op, "%q is not a rate: %s", clip(text), form)
	}
	if n < 1 || n > lease.MaxEvents {
		return Rate{}, fault.New(fault.Invalid, op, "is %d messages, write 1 to %d: a limit of nothing would stop all mail that it counts, which `relais-control tenant suspend` and brakes do", n, lease.MaxEvents)
	}
	if d.D() < time.Second || d.D() > lease.MaxPer {
		return Rate{}, fault.New(fault.Invalid, op, "counts within %v, write 1s to 24h", d)
	}
	return Rate{Max: int(n), Per: d.D(), Burst: 1}, nil
}

// Leases returns the limits that the entry comes to, without their numbers: a
// rate, slots, or both.
func (e *LimitEntry) Leases() ([]lease.Limit, error) {
	common := lease.Limit{ID: 1, FloorPercent: DefaultFloorPercent, ReservePercent: DefaultReservePercent, SoftFloor: e.SoftFloor}
	if e.FloorPercent != nil {
		common.FloorPercent = *e.FloorPercent
	}
	if e.ReservePercent != nil {
		common.ReservePercent = *e.ReservePercent
	}
	var out []lease.Limit
	if e.Messages != "" {
		rate, err := ParseMessages(e.Messages)
		if err != nil {
			return nil, named("messages", err)
		}
		l := common
		l.Kind, l.Max, l.Per = lease.Rate, int64(rate.Max)*lease.Milli, rate.Per
		l.Burst = min(max(int64(float64(rate.Max)/rate.Per.Seconds()), leastDefaultBurst), int64(rate.Max), lease.MaxBurst)
		if e.Burst != nil {
			l.Burst = int64(*e.Burst)
		}
		out = append(out, l)
	} else if e.Burst != nil {
		return nil, fault.Field("policy.Limits", "burst", "belongs to messages: remove it, or state messages")
	}
	if e.Connections != nil {
		l := common
		l.Kind, l.Max = lease.Slots, int64(*e.Connections)
		if l.Max < 1 || l.Max > lease.MaxSlots {
			return nil, fault.Field("policy.Limits", "connections", "is %d, write 1 to %d", l.Max, lease.MaxSlots)
		}
		out = append(out, l)
	}
	if len(out) == 0 {
		return nil, fault.Field("policy.Limits", "messages", "and connections are both missing: the limit limits nothing; state one of them")
	}
	for i := range out {
		if err := out[i].Validate(); err != nil {
			return nil, err
		}
		out[i].ID = 0
	}
	return out, nil
}

// named puts a field's name to an error.
func named(field string, err error) error {
	var f *fault.Error
	if errors.As(err, &f) && f.Field == "" {
		g := *f
		g.Field = field
		return &g
	}
	return err
}

// addFault notes an error of another package about a field below at.
func (p *problems) addFault(at string, err error) {
	var f *fault.Error
	if errors.As(err, &f) {
		p.add(at+f.Field, "%s", f.Public)
		return
	}
	p.add(strings.TrimSuffix(at, "."), "%s", fault.Public(err))
}

func (s *Limits) validate(providers *ProviderTable, p *problems) {
	if err := s.Lease.Config().Validate(); err != nil {
		p.addFault("limits.lease.", err)
	}
	if len(s.Limit) > maxSharedLimits {
		p.add("limits.limit", "has %d entries, write at most %d", len(s.Limit), maxSharedLimits)
		return
	}
	seen := make(map[string]int, len(s.Limit))
	for i := range s.Limit {
		e := &s.Limit[i]
		at := fmt.Sprintf("limits.limit[%d].", i)
		if !isProviderName(e.Name) {
			p.add(at+"name", "%q is not a limit's name, write 1 to %d lower-case letters, digits and inner hyphens", clip(e.Name), maxNameBytes)
		} else if first, dup := seen[e.Name]; dup {
			p.add(at+"name", "%q is limit[%d] already: choose another name", e.Name, first)
		}
		seen[e.Name] = i
		e.validateSelectors(at, providers, p)
		if _, err := e.Leases(); err != nil {
			p.addFault(at, err)
		}
	}
}

func (e *LimitEntry) validateSelectors(at string, providers *ProviderTable, p *problems) {
	if e.Provider != "" && !isUnlistedName(e.Provider) && providers.byName[e.Provider] == nil {
		p.add(at+"provider", "%q is not a known provider: write the name of a [[provider]] of section providers, or \"mx:\" and a registrable domain or an address", clip(e.Provider))
	}
	if e.Tenant != "" {
		p.name(at+"tenant", e.Tenant)
	}
	if e.Pool != "" {
		p.name(at+"pool", e.Pool)
	}
	if e.Domain != "" {
		if d, err := mailaddr.ParseDomain(e.Domain); err != nil || string(d) != e.Domain || d.IsLiteral() {
			p.add(at+"domain", "%q is not a recipient domain in lower case, write one such as \"example.com\"", clip(e.Domain))
		}
	}
}

// checkLimits checks the tenants and pools that section limits names.
func checkLimits(doc *Document, refs References, p *problems) {
	for i := range doc.Limits.Limit {
		e := &doc.Limits.Limit[i]
		at := fmt.Sprintf("limits.limit[%d].", i)
		if e.Tenant != "" && refs.Projects[e.Tenant] == nil {
			p.add(at+"tenant", "there is no tenant %q: correct the name or add the tenant first", clip(e.Tenant))
		}
		if e.Pool == "" {
			continue
		}
		switch pool, ok := refs.Pools[e.Pool]; {
		case !ok:
			p.add(at+"pool", "there is no pool %q: correct the name or add the pool first", clip(e.Pool))
		case e.Tenant != "" && pool.Owner != "" && pool.Owner != e.Tenant:
			p.add(at+"pool", "pool %q is dedicated to tenant %q, so no mail of %q leaves through it: correct one of the two", clip(e.Pool), clip(pool.Owner), clip(e.Tenant))
		}
	}
}

// controlSections are the sections that relays do not get: an older relay would
// refuse the whole view for a section that it does not know.
var controlSections = []string{"limits"}

// ForRelays reports whether relays read a section.
func ForRelays(section string) bool { return !slices.Contains(controlSections, section) }
