package warmup

import "github.com/relais-mta/relais/shared/fault"

// MaxPreviewDays bounds a preview.
const MaxPreviewDays = 730

// MaxWeeklyGrowth bounds how fast a previewed volume grows.
const MaxWeeklyGrowth = 100

// Volume is what is to be sent to one class of providers.
type Volume struct {
	Class  string
	PerDay int64 // recipients, on the first day
	Growth int   // percent a week, 0 to MaxWeeklyGrowth; the volume is the same within a week
	Stage  int   // where it begins; 0 is 1
	Warm   int64 // recipients a day that warm sources of the pool can take
}

// Forecast is a plan played against a volume in which every day passes.
type Forecast struct {
	Class   string
	Reached []Reached // the stages in their order
	Carried int       // first day from which on nothing waits or overflows, from 1; 0: not within the preview
	Days    []ForecastDay
}

// Reached is the day on which a stage begins, from 1.
type Reached struct {
	Stage int
	Day   int
	Quota int64
}

// ForecastDay is one day of a forecast, in recipients.
type ForecastDay struct {
	Volume  int64 // that comes new
	Quota   int64
	Offered int64 // by the subject
	Warm    int64 // by warm sources of the pool
	Waiting int64 // carried over to the next day
}

// Preview plays a plan for so many days: when each stage is reached, and what of
// the volume goes where. The error is fault.Invalid.
func Preview(p *Plan, volumes []Volume, days int) ([]Forecast, error) {
	const op = "warmup.Preview"
	if err := p.Validate(); err != nil {
		return nil, err
	}
	if days < 1 || days > MaxPreviewDays {
		return nil, fault.Field(op, "days", "is %d, write 1 to %d", days, MaxPreviewDays)
	}
	out := make([]Forecast, 0, len(volumes))
	for _, v := range volumes {
		switch {
		case v.PerDay < 0 || v.PerDay > MaxQuota:
			return nil, fault.Field(op, "volume", "of %s is %d, write 0 to %d", v.Class, v.PerDay, MaxQuota)
		case v.Growth < 0 || v.Growth > MaxWeeklyGrowth:
			return nil, fault.Field(op, "growth", "of %s is %d, write 0 to %d percent a week", v.Class, v.Growth, MaxWeeklyGrowth)
		case v.Warm < 0 || v.Warm > MaxQuota:
			return nil, fault.Field(op, "warm", "of %s is %d, write 0 to %d", v.Class, v.Warm, MaxQuota)
		case v.Stage < 0 || v.Stage > lastStage:
			return nil, fault.Field(op, "stage", "of %s is %d, write 1 to %d", v.Class, v.Stage, lastStage)
		}
		out = append(out, p.forecast(v, days))
	}
	return out, nil
}

func (p *Plan) forecast(v Volume, days int) Forecast {
	f := Forecast{Class: v.Class, Days: make([]ForecastDay, 0, days)}
	at, waiting, volume := Progress{Stage: max(v.Stage, 1)}, int64(0), v.PerDay
	for day := 1; day <= days; day++ {
		d := ForecastDay{Quota: p.Quota(v.Class, at, Day(day))}
		if n := len(f.Reached); n == 0 || f.Reached[n-1].Stage < at.Stage {
			f.Reached = append(f.Reached, Reached{at.Stage, day, d.Quota})
		}
		if day%7 == 1 && day > 1 {
			volume = min(volume+volume*int64(v.Growth)/100, MaxQuota)
		}
		due := min(waiting+volume, MaxQuota*int64(days))
		d.Volume = volume
		d.Offered = min(due, d.Quota)
		if p.Overflow == OverflowWarm {
			d.Warm = min(due-d.Offered, v.Warm)
		}
		waiting = due - d.Offered - d.Warm
		d.Waiting = waiting
		switch {
		case waiting > 0 || d.Warm > 0:
			f.Carried = 0 // a volume that grows may outgrow the quota again
		case f.Carried == 0:
			f.Carried = day
		}
		f.Days = append(f.Days, d)
		at = p.Next(v.Class, at, Day(day), Results{
			Quota: d.Quota, Offered: d.Offered, Tally: Tally{Attempts: d.Offered, Accepted: d.Offered},
		}).Progress
	}
	return f
}
