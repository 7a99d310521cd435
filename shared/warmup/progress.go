package warmup

import "fmt"

// Progress is where a subject stands in one track.
type Progress struct {
	Stage       int
	PausedUntil Day // nothing is offered before this day
	LastActive  Day // with mail; 0 if there was none yet
}

// Results are what one day showed, from settled numbers. All counts are of
// recipients but Attempts and Deferred.
type Results struct {
	Quota      int64
	Offered    int64
	Accepted   int64
	Attempts   int64
	Deferred   int64 // attempts
	Blocked    int64
	Hard       int64
	Complaints int64
	Feed       bool // the provider reports complaints
	Listed     bool // the address or domain came onto a blocklist that counts
	Signature  bool // a reply said that the source is blocked
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
	if r.Offered == 0 && !r.Listed {
		return p.silent(t, at, day)
	}
	if r.Offered > 0 {
		at.LastActive = day
	}
	bad := r.Feed && over(r.Complaints, r.Accepted, g.BadComplaints) && r.Complaints > 0
	switch {
	case r.Listed, bad:
		why := "complaints of " + share(r.Complaints, r.Accepted)
		if r.Listed {
			why = "listed on a blocklist"
		}
		at.PausedUntil = day + 1 + Day(g.PauseDays)
		return t.back(at, g.BadStages, fmt.Sprintf("%s: back and a pause until %s", why, at.PausedUntil))
	case r.Signature:
		return t.back(at, g.BlockStages, "the provider blocked the source")
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
	case r.Offered < sample:
		return fmt.Sprintf("held: %d offered, %d are needed to judge", r.Offered, sample)
	case r.Accepted*1000 < r.Offered*g.MinAccepted:
		return "held: accepted " + share(r.Accepted, r.Offered)
	case over(r.Deferred, r.Attempts, g.MaxDeferred):
		return "held: deferred " + share(r.Deferred, r.Attempts)
	case over(r.Blocked, r.Offered, g.MaxBlocked):
		return "held: blocked " + share(r.Blocked, r.Offered)
	case over(r.Hard, r.Offered, g.MaxHard):
		return "held: failed for good " + share(r.Hard, r.Offered)
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

// over reports whether a part of a whole is at or above a number of thousandths.
// Of nothing it never is.
func over(part, whole, thousandths int64) bool {
	return whole > 0 && part*1000 >= whole*thousandths
}

func share(part, whole int64) string {
	if whole == 0 {
		return "none"
	}
	tenths := part * 1000 / whole
	return fmt.Sprintf("%d.%d %% of %d", tenths/10, tenths%10, whole)
}
