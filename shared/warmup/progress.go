package warmup

import "fmt"

// Progress is where a subject stands in one track.
type Progress struct {
	Stage       int
	PausedUntil Day // nothing is offered before this day
	LastActive  Day // with mail; 0 if there was none yet
}

// Results are what one day showed, from settled numbers, in recipients.
type Results struct {
	Quota   int64
	Offered int64
	Tally
	Complaints int64
	Feed       bool // the provider reports complaints
	Listed     bool // the address or domain came onto a blocklist that counts
}

// Judgement says what becomes of a subject after a day, and why in words for
// people.
type Judgement struct {
	Progress
	Advanced bool
	Back     int // stages
	Why      string
}

// Quota returns what a subject may be offered on a day.
func (p *Plan) Quota(class string, at Progress, day Day) int64 {
	if day < at.PausedUntil {
		return 0
	}
	return p.Track(class).Quota(at.Stage)
}

// Next judges a day that is over. It is to be called once for each day, in order,
// with the day's results.
func (p *Plan) Next(class string, at Progress, day Day, r Results) Judgement {
	t, g := p.Track(class), &p.Gate
	at.Stage = min(max(at.Stage, 1), t.Last())
	// What was refused before a recipient was named was not offered, but answered.
	blocked := over(r.Signatures, r.Attempts, g.MaxBlocked)
	if r.Offered == 0 && !r.Listed && !blocked {
		return p.silent(t, at, day)
	}
	if r.Offered > 0 {
		at.LastActive = day
	}
	bad := r.Feed && over(r.Complaints, r.Accepted, g.BadComplaints)
	switch {
	case r.Listed, bad:
		why := "complaints of " + share(r.Complaints, r.Accepted)
		if r.Listed {
			why = "listed on a blocklist"
		}
		at.PausedUntil = day + 1 + Day(g.PauseDays)
		return t.back(at, g.BadStages, fmt.Sprintf("%s: back and a pause until %s", why, at.PausedUntil))
	case blocked:
		return t.back(at, g.BlockStages, "the source was said to be blocked in "+share(r.Signatures, r.Attempts)+" attempts")
	}
	if why := p.holds(r); why != "" {
		return Judgement{Progress: at, Why: why}
	}
	if at.Stage == t.Last() {
		return Judgement{Progress: at, Why: "at the target"}
	}
	at.Stage++
	return Judgement{Progress: at, Advanced: true, Why: "passed"}
}

// holds returns why a day without harm is not enough for the next stage.
func (p *Plan) holds(r Results) string {
	g := &p.Gate
	asked := (r.Quota*g.MinUsed + 999) / 1000
	// A quota below the sample cannot be asked for more than itself.
	sample := min(g.MinSample, max(asked, 1))
	switch {
	case r.Offered < asked:
		return fmt.Sprintf("held: %d of %d offered, %d are needed", r.Offered, r.Quota, asked)
	case r.Attempts < sample:
		return fmt.Sprintf("held: %d of %d offered were answered, %d are needed to judge", r.Attempts, r.Offered, sample)
	case over(r.Deferred, r.Attempts, g.MaxDeferred):
		return "held: deferred " + share(r.Deferred, r.Attempts)
	case r.Accepted*1000 < r.Settled()*g.MinAccepted:
		return "held: accepted " + share(r.Accepted, r.Settled())
	case over(r.Blocked, r.Settled(), g.MaxBlocked):
		return "held: blocked " + share(r.Blocked, r.Settled())
	case over(r.Hard, r.Settled(), g.MaxHard):
		return "held: failed for good " + share(r.Hard, r.Settled())
	case r.Feed && over(r.Complaints, r.Accepted, g.MaxComplaints):
		return "held: complaints of " + share(r.Complaints, r.Accepted)
	}
	return ""
}

// silent judges a day without mail.
func (p *Plan) silent(t *Track, at Progress, day Day) Judgement {
	g := &p.Gate
	if at.LastActive == 0 {
		return Judgement{Progress: at, Why: "held: nothing was offered"}
	}
	// Each set-back comes once: on the day after its last silent one.
	switch quiet := int(day - at.LastActive); quiet {
	case g.RestartDays + 1:
		stage := t.Enter(t.Quota(at.Stage) * g.RestartPart / 1000)
		return t.back(at, at.Stage-min(stage, at.Stage), fmt.Sprintf("no mail for %d days: begins again", quiet))
	case g.SilentDays + 1:
		return t.back(at, g.SilentStages, fmt.Sprintf("no mail for %d days", quiet))
	}
	return Judgement{Progress: at, Why: "held: nothing was offered"}
}

func (t *Track) back(at Progress, stages int, why string) Judgement {
	to := max(1, at.Stage-stages)
	s := Judgement{Progress: at, Back: at.Stage - to, Why: why}
	s.Stage = to
	return s
}

// over reports whether there is a part of a whole, at or above a number of
// thousandths.
func over(part, whole, thousandths int64) bool {
	return part > 0 && part*1000 >= whole*thousandths
}

func share(part, whole int64) string {
	if whole == 0 {
		return "none"
	}
	tenths := part * 1000 / whole
	return fmt.Sprintf("%d.%d %% of %d", tenths/10, tenths%10, whole)
}
