package policy

import (
	"fmt"
	"time"
)

// Reflex says how a relay slows a lane down by itself when its provider defers
// mail, blocks it or cannot be reached. What policy allows is always the most.
type Reflex struct {
	Off          bool     `toml:"off"`           // lanes are never slowed down
	MinPerHour   int      `toml:"min_per_hour"`  // messages; a lane is never slower, but held
	KeepPercent  int      `toml:"keep_percent"`  // what a decrease leaves of rate and connections
	After        int      `toml:"after"`         // signals that make a decrease
	SharePercent int      `toml:"share_percent"` // and what part of the results they must be
	Spacing      Duration `toml:"spacing"`       // between two decreases
	Step         Duration `toml:"step"`          // between two increases
	Hold         Duration `toml:"hold"`          // of a lane whose host takes nothing, at first
	MaxHold      Duration `toml:"max_hold"`      // it doubles up to that
	Probe        int      `toml:"probe"`         // messages that must go well before a held lane is brought back
}

// ReflexOf changes some of it for one provider; what is left out stays.
type ReflexOf struct {
	Provider string `toml:"provider"`
	Reflex
}

// Reflex returns how lanes to the provider are slowed down.
func (p *Profile) Reflex() *Reflex { return &p.reflex }

// PerHour returns the rate in messages an hour, 0 for none.
func (r Rate) PerHour() int64 {
	if !r.Limited() || r.Per <= 0 {
		return 0
	}
	return max(1, int64(float64(r.Max)*float64(time.Hour)/float64(r.Per)))
}

// over returns r with what o states.
func (r Reflex) over(o *Reflex) Reflex {
	r.Off = r.Off || o.Off
	for _, v := range []struct{ to, from *int }{
		{&r.MinPerHour, &o.MinPerHour}, {&r.KeepPercent, &o.KeepPercent}, {&r.After, &o.After}, {&r.SharePercent, &o.SharePercent}, {&r.Probe, &o.Probe},
	} {
		if *v.from != 0 {
			*v.to = *v.from
		}
	}
	for _, v := range []struct{ to, from *Duration }{{&r.Spacing, &o.Spacing}, {&r.Step, &o.Step}, {&r.Hold, &o.Hold}, {&r.MaxHold, &o.MaxHold}} {
		if *v.from != 0 {
			*v.to = *v.from
		}
	}
	return r
}

func (r *Reflex) validate(at string, p *problems) {
	p.between(at+".min_per_hour", int64(r.MinPerHour), 1, 1_000_000)
	p.between(at+".keep_percent", int64(r.KeepPercent), 10, 95)
	p.between(at+".after", int64(r.After), 1, 1000)
	p.between(at+".share_percent", int64(r.SharePercent), 1, 100)
	p.between(at+".probe", int64(r.Probe), 1, 1000)
	p.lasts(at+".spacing", r.Spacing, second, hour)
	p.lasts(at+".step", r.Step, second, hour)
	p.lasts(at+".hold", r.Hold, second, day)
	p.lasts(at+".max_hold", r.MaxHold, second, 7*day)
	if r.MaxHold < r.Hold {
		p.add(at+".max_hold", "is %q, less than hold, %q", r.MaxHold, r.Hold)
	}
}

// reflexes checks and applies the changes for single providers.
func (t *ProviderTable) reflexes(s *Providers, p *problems) {
	if len(s.ReflexOf) > maxOverrides {
		p.add("providers.reflex_of", "has %d entries, write at most %d", len(s.ReflexOf), maxOverrides)
		return
	}
	s.Reflex.validate("providers.reflex", p)
	for i := range s.ReflexOf {
		o := &s.ReflexOf[i]
		at := fmt.Sprintf("providers.reflex_of[%d]", i)
		profile := t.named(o.Provider)
		if profile == nil {
			p.add(at+".provider", "%q is not a known provider: write the name of a [[provider]], or \"mx:\" and a registrable domain or an address", clip(o.Provider))
			continue
		}
		profile.reflex = profile.reflex.over(&o.Reflex)
		profile.reflex.validate(at, p)
	}
}

// named returns the profile that changes for a provider go to; nil: there is no
// such provider.
func (t *ProviderTable) named(name string) *Profile {
	if profile := t.byName[name]; profile != nil {
		return profile
	}
	if !isUnlistedName(name) {
		return nil
	}
	profile := t.unlisted[name]
	if profile == nil {
		own := *t.fallback
		own.Name, profile = name, &own
		t.unlisted[name] = profile
	}
	return profile
}
