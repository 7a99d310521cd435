package warmup

import (
	"fmt"

	"github.com/relais-mta/relais/shared/fault"
)

// Bounds of a plan.
const (
	maxTracks = MaxClasses
	maxStages = 100  // that a plan lists
	lastStage = 2000 // that growth may lead to
)

// OtherClass is the track of providers without one of their own.
const OtherClass = "other"

// Overflow says what becomes of mail that a day's quota has no room for. It is
// never bounced because of the quota.
type Overflow string

// The ways of overflow.
const (
	OverflowWarm Overflow = "warm" // to warm sources of the pool, if there are any, and else it waits
	OverflowWait Overflow = "wait"
)

// Plan raises the daily volume of a subject, for each class of providers by
// itself.
type Plan struct {
	Name     string
	Tracks   []Track
	Gate     Gate
	Overflow Overflow
}

// Track is what one class of providers is offered in a day, by stage. Stages are
// counted from 1.
type Track struct {
	Class  string // a provider's name, or OtherClass
	Stages []int64
	Growth []Growth // of the stages after those
	Target int64    // the quota does not grow beyond it
}

// Growth raises the quota by so many percent a stage, from a stage to another, both
// included; To 0 is for ever.
type Growth struct {
	From, To int
	Percent  int64
}

// Gate says what a day must have shown for the next stage, in thousandths, and
// what sets a subject back.
type Gate struct {
	MinSample     int64 // attempts that were answered, or as many as the quota asks for
	MinUsed       int64 // of the quota
	MinAccepted   int64 // of the recipients accepted or refused for good
	MaxDeferred   int64 // of the attempts
	MaxBlocked    int64 // of the recipients accepted or refused for good; so many signatures of the attempts are a set-back
	MaxHard       int64
	MaxComplaints int64 // of the recipients accepted, where complaints are reported
	BadComplaints int64 // this many are a set-back; in thousandths
	BlockStages   int   // back on a block signature
	BadStages     int   // back on a listing or bad complaints
	PauseDays     int   // after those
	SilentDays    int   // more days without mail than this: back by SilentStages
	SilentStages  int
	RestartDays   int // more than this: back to RestartPart of the last stage's quota
	RestartPart   int64
}

// Validate refuses a plan that cannot be followed. The error is fault.Invalid and
// names the track and what is wrong in it.
func (p *Plan) Validate() error {
	const op = "warmup.Plan"
	if p.Name == "" {
		return fault.Field(op, "name", "is missing")
	}
	if n := len(p.Tracks); n < 1 || n > maxTracks {
		return fault.Field(op, "track", "has %d entries, write 1 to %d", n, maxTracks)
	}
	if p.Overflow != OverflowWarm && p.Overflow != OverflowWait {
		return fault.Field(op, "overflow", "is %q, write %q or %q", p.Overflow, OverflowWarm, OverflowWait)
	}
	seen := make(map[string]bool, len(p.Tracks))
	for i := range p.Tracks {
		t := &p.Tracks[i]
		at := fmt.Sprintf("track[%d]", i)
		switch {
		case t.Class == "":
			return fault.Field(op, at+".class", "is missing: write a provider's name or %q", OtherClass)
		case seen[t.Class]:
			return fault.Field(op, at+".class", "%q has a track already: join the two", t.Class)
		}
		seen[t.Class] = true
		if err := t.validate(op, at); err != nil {
			return err
		}
	}
	if !seen[OtherClass] {
		return fault.Field(op, "track", "has no entry for %q: providers without a track of their own would have no quota", OtherClass)
	}
	return p.Gate.validate(op)
}

func (t *Track) validate(op, at string) error {
	if n := len(t.Stages); n < 1 || n > maxStages {
		return fault.Field(op, at+".stages", "has %d stages, write 1 to %d", n, maxStages)
	}
	for i, q := range t.Stages {
		field := fmt.Sprintf("%s.stages[%d]", at, i)
		switch {
		case q == 0:
			return fault.Field(op, field, "is 0: a stage without mail proves nothing; remove it")
		case q < 0:
			return fault.Field(op, field, "is %d: write how many recipients a day", q)
		case q > MaxQuota:
			return fault.Field(op, field, "is %d, write at most %d", q, MaxQuota)
		case i > 0 && q < t.Stages[i-1]:
			return fault.Field(op, field, "is %d after %d: a stage is no smaller than the one before", q, t.Stages[i-1])
		}
	}
	last := t.Stages[len(t.Stages)-1]
	if t.Target < last || t.Target > MaxQuota {
		return fault.Field(op, at+".target", "is %d, write %d (the last stage) to %d", t.Target, last, MaxQuota)
	}
	return t.validateGrowth(op, at, last)
}

func (t *Track) validateGrowth(op, at string, last int64) error {
	if len(t.Growth) == 0 && t.Target > last {
		return fault.Field(op, at+".growth", "is missing: nothing leads from stage %d, %d a day, to the target of %d", len(t.Stages), last, t.Target)
	}
	next := len(t.Stages) + 1
	for i, g := range t.Growth {
		field := fmt.Sprintf("%s.growth[%d]", at, i)
		switch {
		case g.From > next:
			return fault.Field(op, field+".from", "is %d: there is a gap, nothing says what stage %d is", g.From, next)
		case g.From < next:
			return fault.Field(op, field+".from", "is %d: stage %d is stated before", g.From, g.From)
		case g.To != 0 && g.To < g.From:
			return fault.Field(op, field+".to", "is %d, before from, %d", g.To, g.From)
		case g.To > lastStage:
			return fault.Field(op, field+".to", "is %d, write at most %d, or 0 for ever", g.To, lastStage)
		case g.To == 0 && i < len(t.Growth)-1:
			return fault.Field(op, field+".to", "is 0, for ever: the entries after it never come")
		case g.Percent < 1 || g.Percent > 100:
			return fault.Field(op, field+".percent", "is %d, write 1 to 100", g.Percent)
		}
		next = g.To + 1
	}
	if n := len(t.Growth); n > 0 && t.Growth[n-1].To != 0 && t.Quota(t.Growth[n-1].To) < t.Target {
		return fault.Field(op, at+".growth", "ends at stage %d with %d a day, below the target of %d", t.Growth[n-1].To, t.Quota(t.Growth[n-1].To), t.Target)
	}
	if q := t.Quota(lastStage); q < t.Target {
		return fault.Field(op, at+".growth", "reaches %d a day in %d stages, not the target of %d: grow faster", q, lastStage, t.Target)
	}
	return nil
}

func (g *Gate) validate(op string) error {
	for _, f := range []struct {
		name  string
		value int64
		least int64
		most  int64
	}{
		{"min_sample", g.MinSample, 1, 1_000_000},
		{"min_used", g.MinUsed, 0, 1000},
		{"min_accepted", g.MinAccepted, 0, 1000},
		{"max_deferred", g.MaxDeferred, 0, 1000},
		{"max_blocked", g.MaxBlocked, 0, 1000},
		{"max_hard", g.MaxHard, 0, 1000},
		{"max_complaints", g.MaxComplaints, 0, 1000},
		{"bad_complaints", g.BadComplaints, g.MaxComplaints, 1000},
		{"block_stages", int64(g.BlockStages), 0, maxStages},
		{"bad_stages", int64(g.BadStages), 0, maxStages},
		{"pause_days", int64(g.PauseDays), 0, 30},
		{"silent_days", int64(g.SilentDays), 1, 365},
		{"silent_stages", int64(g.SilentStages), 0, maxStages},
		{"restart_days", int64(g.RestartDays), int64(g.SilentDays), 365},
		{"restart_part", g.RestartPart, 0, 1000},
	} {
		if f.value < f.least || f.value > f.most {
			return fault.Field(op, "gate."+f.name, "is %d, write %d to %d", f.value, f.least, f.most)
		}
	}
	return nil
}

// Track returns the track of a class: its own or that of the others.
func (p *Plan) Track(class string) *Track {
	var other *Track
	for i := range p.Tracks {
		switch p.Tracks[i].Class {
		case class:
			return &p.Tracks[i]
		case OtherClass:
			other = &p.Tracks[i]
		}
	}
	return other
}

// Quota returns how many recipients a day a stage allows. Stages below 1 are 1.
func (t *Track) Quota(stage int) int64 {
	if stage <= len(t.Stages) {
		return min(t.Stages[max(stage, 1)-1], t.Target)
	}
	q := t.Stages[len(t.Stages)-1]
	for _, g := range t.Growth {
		for s := g.From; s <= stage && (g.To == 0 || s <= g.To); s++ {
			if q = min(q+max(q*g.Percent/100, 1), t.Target); q == t.Target {
				return q
			}
		}
	}
	return min(q, t.Target)
}

// Last returns the first stage that allows the target.
func (t *Track) Last() int {
	stage := 1
	for stage < lastStage && t.Quota(stage) < t.Target {
		stage++
	}
	return stage
}

// Enter returns the stage at which a subject begins that has proved so many
// recipients a day to be welcome: the highest that allows no more, 1 at least.
func (t *Track) Enter(proven int64) int {
	stage := 1
	for stage < lastStage && t.Quota(stage) < t.Target && t.Quota(stage+1) <= proven {
		stage++
	}
	return stage
}

// maxHourPercent of a day's quota may go out within one hour.
const maxHourPercent = 15

// HourQuota returns how much of a day's quota may go out within one hour, so that
// it is spread over the day.
func HourQuota(quota int64) int64 { return (quota*maxHourPercent + 99) / 100 }
