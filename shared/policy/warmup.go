package policy

import (
	"errors"
	"fmt"
	"slices"

	"github.com/relais-mta/relais/shared/fault"
	"github.com/relais-mta/relais/shared/warmup"
)

// Bounds of section warmup.
const (
	maxWarmupPlans   = 100
	maxWarmupClasses = warmup.MaxClasses
	maxClassMembers  = 100 // providers of one class
)

// StandardPlan is the plan that is shipped. It is always there; an operator's
// plan of that name takes its place.
const StandardPlan = "standard"

// Warmup holds the plans by which new addresses, pools and domains gain volume.
type Warmup struct {
	Class []WarmupClass `toml:"class"`
	Plan  []WarmupPlan  `toml:"plan"`
}

// WarmupClass counts several providers as one.
type WarmupClass struct {
	Name      string   `toml:"name"`
	Providers []string `toml:"providers"`
}

// WarmupPlan is warmup.Plan as operators write it.
type WarmupPlan struct {
	Name        string        `toml:"name"`
	Overflow    string        `toml:"overflow"`
	HourPercent int           `toml:"hour_percent"` // of a day's quota, that may go within one hour; 0: 15
	Track       []WarmupTrack `toml:"track"`
	Gate        WarmupGate    `toml:"gate"`
}

// WarmupTrack is warmup.Track as operators write it.
type WarmupTrack struct {
	Class  string         `toml:"class"`
	Stages []int64        `toml:"stages"`
	Growth []WarmupGrowth `toml:"growth"`
	Target int64          `toml:"target"`
}

// WarmupGrowth is warmup.Growth as operators write it.
type WarmupGrowth struct {
	From    int   `toml:"from"`
	To      int   `toml:"to"`
	Percent int64 `toml:"percent"`
}

// WarmupGate is warmup.Gate as operators write it; what is left out is as in the
// shipped plan, what is 0 is 0.
type WarmupGate struct {
	MinSample     *int64 `toml:"min_sample"`
	MinUsed       *int64 `toml:"min_used"`
	MinAccepted   *int64 `toml:"min_accepted"`
	MaxDeferred   *int64 `toml:"max_deferred"`
	MaxBlocked    *int64 `toml:"max_blocked"`
	MaxHard       *int64 `toml:"max_hard"`
	MaxComplaints *int64 `toml:"max_complaints"`
	BadComplaints *int64 `toml:"bad_complaints"`
	BlockStages   *int   `toml:"block_stages"`
	BadStages     *int   `toml:"bad_stages"`
	PauseDays     *int   `toml:"pause_days"`
	SilentDays    *int   `toml:"silent_days"`
	SilentStages  *int   `toml:"silent_stages"`
	RestartDays   *int   `toml:"restart_days"`
	RestartPart   *int64 `toml:"restart_part"`
}

// defaultHourPercent of a day's quota may go within one hour.
const defaultHourPercent = 15

// Hour returns the percentage of a day's quota that may go within one hour.
func (p *WarmupPlan) Hour() int {
	if p.HourPercent == 0 {
		return defaultHourPercent
	}
	return p.HourPercent
}

// Plan returns the plan in the form of the kernel.
func (p *WarmupPlan) Plan() warmup.Plan {
	out := warmup.Plan{Name: p.Name, Overflow: warmup.Overflow(p.Overflow), Gate: p.Gate.gate()}
	if p.Overflow == "" {
		out.Overflow = warmup.OverflowWarm
	}
	for i := range p.Track {
		t := &p.Track[i]
		track := warmup.Track{Class: t.Class, Stages: t.Stages, Target: t.Target}
		for _, g := range t.Growth {
			track.Growth = append(track.Growth, warmup.Growth{From: g.From, To: g.To, Percent: g.Percent})
		}
		out.Tracks = append(out.Tracks, track)
	}
	return out
}

func (g *WarmupGate) gate() warmup.Gate {
	out := warmup.Standard().Gate
	for _, f := range []struct {
		from *int64
		to   *int64
	}{
		{g.MinSample, &out.MinSample}, {g.MinUsed, &out.MinUsed}, {g.MinAccepted, &out.MinAccepted},
		{g.MaxDeferred, &out.MaxDeferred}, {g.MaxBlocked, &out.MaxBlocked}, {g.MaxHard, &out.MaxHard},
		{g.MaxComplaints, &out.MaxComplaints}, {g.BadComplaints, &out.BadComplaints}, {g.RestartPart, &out.RestartPart},
	} {
		if f.from != nil {
			*f.to = *f.from
		}
	}
	for _, f := range []struct {
		from *int
		to   *int
	}{
		{g.BlockStages, &out.BlockStages}, {g.BadStages, &out.BadStages}, {g.PauseDays, &out.PauseDays},
		{g.SilentDays, &out.SilentDays}, {g.SilentStages, &out.SilentStages}, {g.RestartDays, &out.RestartDays},
	} {
		if f.from != nil {
			*f.to = *f.from
		}
	}
	return out
}

// PlanNamed returns a plan.
func (s *Warmup) PlanNamed(name string) (*WarmupPlan, bool) {
	for i := range s.Plan {
		if s.Plan[i].Name == name {
			return &s.Plan[i], true
		}
	}
	return nil, false
}

// ClassOf returns the class of a provider in a plan: that of its class or its own
// track, or warmup.OtherClass.
func (s *Warmup) ClassOf(p *WarmupPlan, provider string) string {
	for i := range s.Class {
		if slices.Contains(s.Class[i].Providers, provider) {
			provider = s.Class[i].Name
			break
		}
	}
	for i := range p.Track {
		if p.Track[i].Class == provider {
			return provider
		}
	}
	return warmup.OtherClass
}

// keepShipped puts the shipped plan behind those of operators who stated none of
// its name, so that what warms up by it goes on.
func (s *Warmup) keepShipped(shipped []WarmupPlan) {
	for i := range shipped {
		if _, ok := s.PlanNamed(shipped[i].Name); !ok {
			s.Plan = append(s.Plan, shipped[i])
		}
	}
}

// validate needs the names of the profiles.
func (s *Warmup) validate(p *problems, providers *ProviderTable) {
	if len(s.Class) > maxWarmupClasses {
		p.add("warmup.class", "has %d entries, write at most %d", len(s.Class), maxWarmupClasses)
		return
	}
	if len(s.Plan) > maxWarmupPlans {
		p.add("warmup.plan", "has %d entries, write at most %d", len(s.Plan), maxWarmupPlans)
		return
	}
	classes := s.validateClasses(p, providers)
	standard := warmup.Standard()
	for i := range standard.Tracks {
		classes[standard.Tracks[i].Class] = true // a list of providers without them has merely no use for the track
	}
	seen := make(map[string]int, len(s.Plan))
	for i := range s.Plan {
		plan := &s.Plan[i]
		at := fmt.Sprintf("warmup.plan[%d].", i)
		if first, dup := seen[plan.Name]; dup {
			p.add(at+"name", "%q is the name of plan[%d] already: choose another", clip(plan.Name), first)
		}
		seen[plan.Name] = i
		if plan.Name != "" && !isProviderName(plan.Name) {
			p.add(at+"name", "%q is not a plan's name, write 1 to %d lower-case letters, digits and inner hyphens", clip(plan.Name), maxNameBytes)
		}
		if plan.HourPercent != 0 {
			p.between(at+"hour_percent", int64(plan.HourPercent), 1, 100)
		}
		for n := range plan.Track {
			c := plan.Track[n].Class
			if _, known := providers.Named(c); c == "" || known || classes[c] {
				continue
			}
			p.add(fmt.Sprintf("%strack[%d].class", at, n), "there is no provider and no class %q: correct the name, add the class, or write %q", clip(c), warmup.OtherClass)
		}
		kernel := plan.Plan()
		var e *fault.Error
		if err := kernel.Validate(); errors.As(err, &e) {
			p.add(at+e.Field, "%s", e.Public)
		}
	}
}

func (s *Warmup) validateClasses(p *problems, providers *ProviderTable) map[string]bool {
	names := make(map[string]bool, len(s.Class))
	member := make(map[string]string)
	for i := range s.Class {
		c := &s.Class[i]
		at := fmt.Sprintf("warmup.class[%d].", i)
		_, provider := providers.Named(c.Name)
		switch {
		case !isProviderName(c.Name) || c.Name == warmup.OtherClass:
			p.add(at+"name", "%q is not a class's name, write lower-case letters, digits and inner hyphens, and not %q", clip(c.Name), warmup.OtherClass)
		case names[c.Name] || provider:
			p.add(at+"name", "%q is the name of a provider or of an earlier class: choose another", c.Name)
		}
		names[c.Name] = true
		p.between(at+"providers", int64(len(c.Providers)), 1, maxClassMembers)
		for _, name := range c.Providers {
			if _, known := providers.Named(name); !known {
				p.add(at+"providers", "there is no provider %q: correct the name, or add it to section providers", clip(name))
			}
			if other, dup := member[name]; dup {
				p.add(at+"providers", "%q is in class %q already: a provider is in one class", clip(name), other)
			}
			member[name] = c.Name
		}
	}
	return names
}
