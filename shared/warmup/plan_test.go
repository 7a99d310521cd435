package warmup

import (
	"strings"
	"testing"

	"github.com/relais-mta/relais/shared/fault"
)

func TestStandardPlan(t *testing.T) {
	p := Standard()
	if err := p.Validate(); err != nil {
		t.Fatal(err)
	}
	for _, tc := range []struct {
		class string
		stage int
		want  int64
	}{
		{"google", 0, 200}, {"google", 1, 200}, {"google", 14, 100_000}, {"google", 15, 125_000}, {"google", 16, 156_250},
		{"google", 500, 1_000_000}, {"orange", 8, 6000}, {"orange", 15, 48_000}, {"sfr", 15, 20_700},
		{"mx:example.net", 1, 50}, {"mx:example.net", 15, 30_000}, {"gmx", 22, 52_664},
	} {
		if got := p.Track(tc.class).Quota(tc.stage); got != tc.want {
			t.Errorf("%s at stage %d: %d, want %d", tc.class, tc.stage, got, tc.want)
		}
	}
	total := int64(0)
	for i := range p.Tracks {
		tr := &p.Tracks[i]
		total += tr.Target
		for stage := 2; stage <= tr.Last(); stage++ {
			if tr.Quota(stage) <= tr.Quota(stage-1) {
				t.Errorf("%s: stage %d does not raise %d", tr.Class, stage, tr.Quota(stage-1))
			}
		}
	}
	if total != 3_500_000 {
		t.Errorf("the targets add up to %d", total)
	}
}

func TestPlansThatAreRefused(t *testing.T) {
	for _, tc := range []struct {
		field, text string
		spoil       func(*Plan)
	}{
		{"name", "missing", func(p *Plan) { p.Name = "" }},
		{"track", "0 entries", func(p *Plan) { p.Tracks = nil }},
		{"track", "no entry for \"other\"", func(p *Plan) { p.Tracks = p.Tracks[:3] }},
		{"overflow", "bounce", func(p *Plan) { p.Overflow = "bounce" }},
		{"track[1].class", "already", func(p *Plan) { p.Tracks[1].Class = "google" }},
		{"track[1].class", "missing", func(p *Plan) { p.Tracks[1].Class = "" }},
		{"track[0].stages", "0 stages", func(p *Plan) { p.Tracks[0].Stages = nil }},
		{"track[0].stages[3]", "is 0", func(p *Plan) { p.Tracks[0].Stages[3] = 0 }},
		{"track[0].stages[2]", "is -5", func(p *Plan) { p.Tracks[0].Stages[2] = -5 }},
		{"track[0].stages[4]", "no smaller", func(p *Plan) { p.Tracks[0].Stages[4] = 10 }},
		{"track[0].stages[13]", "at most", func(p *Plan) { p.Tracks[0].Stages[13] = MaxQuota + 1 }},
		{"track[0].target", "is 5", func(p *Plan) { p.Tracks[0].Target = 5 }},
		{"track[0].growth", "missing", func(p *Plan) { p.Tracks[0].Growth = nil }},
		{"track[0].growth[0].from", "gap", func(p *Plan) { p.Tracks[0].Growth[0].From = 16 }},
		{"track[0].growth[1].from", "gap", func(p *Plan) { p.Tracks[0].Growth[1].From = 23 }},
		{"track[0].growth[1].from", "stated before", func(p *Plan) { p.Tracks[0].Growth[1].From = 21 }},
		{"track[0].growth[0].to", "before from", func(p *Plan) { p.Tracks[0].Growth[0].To = 14 }},
		{"track[0].growth[0].to", "never come", func(p *Plan) { p.Tracks[0].Growth[0].To = 0 }},
		{"track[0].growth[1].percent", "is 0", func(p *Plan) { p.Tracks[0].Growth[1].Percent = 0 }},
		{"track[0].growth[1].percent", "is -10", func(p *Plan) { p.Tracks[0].Growth[1].Percent = -10 }},
		{"track[0].growth", "below the target", func(p *Plan) { p.Tracks[0].Growth = p.Tracks[0].Growth[:1] }},
		{"gate.min_sample", "is 0", func(p *Plan) { p.Gate.MinSample = 0 }},
		{"gate.min_accepted", "is 1001", func(p *Plan) { p.Gate.MinAccepted = 1001 }},
		{"gate.bad_complaints", "is 0", func(p *Plan) { p.Gate.BadComplaints = 0 }},
		{"gate.restart_days", "is 5", func(p *Plan) { p.Gate.RestartDays = 5 }},
	} {
		p := Standard()
		tc.spoil(&p)
		f, ok := p.Validate().(*fault.Error)
		if !ok || f.Kind != fault.Invalid || f.Field != tc.field || !strings.Contains(f.Public, tc.text) {
			t.Errorf("%s: %v, want a refusal that says %q", tc.field, f, tc.text)
		}
	}
}

func TestDaysAreJudged(t *testing.T) {
	p := Standard()
	good := Results{Quota: 1000, Offered: 920, Tally: Tally{Attempts: 920, Accepted: 890, Deferred: 20, Hard: 10}, Feed: true}
	change := func(f func(*Results)) Results {
		r := good
		f(&r)
		return r
	}
	const day = Day(100)
	for _, tc := range []struct {
		name  string
		r     Results
		stage int
		pause bool
		why   string
	}{
		{"good", good, 4, false, "passed"},
		{"too little", change(func(r *Results) { r.Offered = 699 }), 3, false, "700 are needed"},
		{"accepted", change(func(r *Results) { r.Accepted = 809 }), 3, false, "accepted 89.8 % of 900"},
		{"deferred mail comes again", change(func(r *Results) { r.Deferred, r.Accepted = 183, 727 }), 4, false, "passed"},
		{"deferred", change(func(r *Results) { r.Deferred, r.Accepted = 184, 726 }), 3, false, "deferred 20.0 % of 920"},
		{"deferred all", change(func(r *Results) { r.Tally = Tally{Attempts: 920, Deferred: 920} }), 3, false, "deferred 100.0 %"},
		{"nothing is known", change(func(r *Results) { r.Tally = Tally{} }), 3, false, "0 of 920 offered were answered, 50 are needed"},
		{"little is known", change(func(r *Results) { r.Tally = Tally{Attempts: 49, Accepted: 49} }), 3, false, "49 of 920"},
		{"blocked", change(func(r *Results) { r.Blocked = 9 }), 3, false, "blocked 1.0 %"},
		{"hard", change(func(r *Results) { r.Hard = 18 }), 3, false, "failed for good 2.0 %"},
		{"complaint", change(func(r *Results) { r.Complaints = 1 }), 3, false, "complaints of 0.1 %"},
		{"complaints", change(func(r *Results) { r.Complaints = 3 }), 1, true, "pause"},
		{"complaints without a feed", change(func(r *Results) { r.Complaints, r.Feed = 3, false }), 4, false, "passed"},
		{"few signatures", change(func(r *Results) { r.Signatures = 9 }), 4, false, "passed"},
		{"signatures", change(func(r *Results) { r.Signatures = 10 }), 2, false, "blocked in 1.0 % of 920 attempts"},
		{"blocked before a recipient was named", Results{Quota: 1000, Tally: Tally{Attempts: 5, Deferred: 5, Signatures: 5}}, 2, false, "blocked in 100.0 % of 5 attempts"},
		{"listed", change(func(r *Results) { r.Listed = true }), 1, true, "blocklist"},
		{"listed without mail", Results{Quota: 1000, Listed: true}, 1, true, "blocklist"},
		{"no mail", Results{Quota: 1000}, 3, false, "nothing was offered"},
	} {
		j := p.Next("google", Progress{Stage: 3, LastActive: day - 1}, day, tc.r)
		if j.Stage != tc.stage || !strings.Contains(j.Why, tc.why) || (j.PausedUntil > 0) != tc.pause || j.Advanced != (tc.stage == 4) {
			t.Errorf("%s: %+v, want stage %d and %q", tc.name, j, tc.stage, tc.why)
		}
		if tc.pause && (p.Quota("google", j.Progress, day+1) != 0 || p.Quota("google", j.Progress, day+2) == 0) {
			t.Errorf("%s: the pause of a day is until %v, after %v", tc.name, j.PausedUntil, day)
		}
	}
	// A quota of 50 asks for 35, not for a sample of 50.
	if j := p.Next("apple", Progress{Stage: 1}, day, Results{Quota: 50, Offered: 35, Tally: Tally{Accepted: 35, Attempts: 35}}); j.Stage != 2 {
		t.Errorf("35 of 50: %+v", j)
	}
	strict := p
	strict.Gate.MaxBlocked, strict.Gate.MaxHard = 0, 0
	for name, r := range map[string]Results{"hard": good, "blocked": change(func(r *Results) { r.Hard, r.Blocked = 0, 1 }), "none": change(func(r *Results) { r.Hard = 0 })} {
		if j := strict.Next("google", Progress{Stage: 3}, day, r); j.Advanced != (name == "none") {
			t.Errorf("where none may be refused, %s: %+v", name, j)
		}
	}
	last := p.Track("google").Last()
	if j := p.Next("google", Progress{Stage: last + 50}, day, good); j.Stage != last || j.Why != "at the target" {
		t.Errorf("beyond the target: %+v", j)
	}
}

// TestSilenceStepsBack: once after ten days, and after thirty to a quarter.
func TestSilenceStepsBack(t *testing.T) {
	p := Standard()
	at := Progress{Stage: 10, LastActive: 100}
	stages := make(map[Day]int)
	for day := Day(101); day <= 150; day++ {
		at = p.Next("google", at, day, Results{Quota: 1000}).Progress
		stages[day] = at.Stage
	}
	for day, want := range map[Day]int{110: 10, 111: 7, 130: 7, 131: 4, 150: 4} {
		if stages[day] != want {
			t.Errorf("%d days after the last mail: stage %d, want %d", day-100, stages[day], want)
		}
	}
	if at := p.Next("google", Progress{Stage: 5}, 300, Results{}); at.Stage != 5 {
		t.Errorf("a subject that never sent stepped to %d", at.Stage)
	}
}

// TestProvenVolumeEnters: an address that is warm does not begin at stage 1.
func TestProvenVolumeEnters(t *testing.T) {
	p := Standard()
	for proven, want := range map[int64]int{0: 1, 199: 1, 200: 1, 499: 1, 500: 2, 22_000: 9, 100_000: 14, 10_000_000: p.Track("google").Last()} {
		if got := p.Track("google").Enter(proven); got != want {
			t.Errorf("%d a day enters at stage %d, want %d", proven, got, want)
		}
	}
}

func TestPreview(t *testing.T) {
	p := Standard()
	out, err := Preview(&p, []Volume{{Class: "google", PerDay: 20_000, Warm: 5000}, {Class: "sfr", PerDay: 60}}, 60)
	if err != nil {
		t.Fatal(err)
	}
	g := out[0]
	if g.Reached[8] != (Reached{Stage: 9, Day: 9, Quota: 20_000}) {
		t.Errorf("stage 9 is reached %+v", g.Reached[8])
	}
	if d := g.Days[0]; d != (ForecastDay{Volume: 20_000, Quota: 200, Offered: 200, Warm: 5000, Waiting: 14_800}) {
		t.Errorf("the first day: %+v", d)
	}
	sent, waiting := int64(0), g.Days[59].Waiting
	for _, d := range g.Days {
		sent += d.Offered + d.Warm
	}
	if sent+waiting != 60*20_000 || g.Carried == 0 || waiting != 0 {
		t.Errorf("%d sent and %d waiting of %d, carried on day %d", sent, waiting, 60*20_000, g.Carried)
	}
	// 60 a day, and 10 that waited, pass at 100; at 200 they are too few to go on.
	if s := out[1]; len(s.Reached) != 3 || s.Carried != 2 || s.Days[0].Waiting != 10 {
		t.Errorf("a small volume: %+v", s.Reached)
	}
	p.Overflow = OverflowWait
	out, err = Preview(&p, []Volume{{Class: "google", PerDay: 20_000, Warm: 5000}}, 1)
	if err != nil || out[0].Days[0].Waiting != 19_800 {
		t.Errorf("without overflow: %+v, %v", out, err)
	}
	out, err = Preview(&p, []Volume{{Class: "google", PerDay: 1000, Growth: 10}}, 22)
	if d := out[0].Days; err != nil || d[6].Volume != 1000 || d[7].Volume != 1100 || d[14].Volume != 1210 || d[21].Volume != 1331 {
		t.Errorf("a volume that grows: %+v, %v", out, err)
	}
	// The first week fits, and then the volume outgrows the target.
	top := p.Track("google")
	if out, err = Preview(&p, []Volume{{Class: "google", PerDay: top.Target, Growth: 10, Stage: top.Last()}}, 22); err != nil || out[0].Days[0].Waiting != 0 || out[0].Days[21].Waiting == 0 || out[0].Carried != 0 {
		t.Errorf("a volume that outgrows the quota: carried on day %d, %v", out[0].Carried, err)
	}
	for _, v := range []Volume{{Class: "google", PerDay: -1}, {Class: "google", Warm: -1}, {Class: "google", Stage: -1}, {Class: "google", Growth: -1}, {Class: "google", Growth: MaxWeeklyGrowth + 1}} {
		if _, err := Preview(&p, []Volume{v}, 10); !fault.Is(err, fault.Invalid) {
			t.Errorf("%+v: %v", v, err)
		}
	}
	if _, err := Preview(&p, nil, 0); !fault.Is(err, fault.Invalid) {
		t.Errorf("no days: %v", err)
	}
}

func TestHourQuota(t *testing.T) {
	for quota, want := range map[int64]int64{0: 0, 1: 1, 100: 15, 101: 16} {
		if got := HourQuota(quota); got != want {
			t.Errorf("of %d a day %d an hour, want %d", quota, got, want)
		}
	}
}
