package policy

import (
	"reflect"
	"strings"
	"testing"

	"github.com/relais-mta/relais/shared/fault"
	"github.com/relais-mta/relais/shared/warmup"
)

const ownPlan = `
[[class]]
name = "french"
providers = ["orange", "sfr"]

[[plan]]
name = "slow"
overflow = "wait"
hour_percent = 100
[[plan.track]]
class = "french"
stages = [10, 20]
target = 20
[[plan.track]]
class = "other"
stages = [5, 10]
growth = [{ from = 3, percent = 50 }]
target = 100
[plan.gate]
min_used = 0
`

func TestShippedPlanIsTheStandardOne(t *testing.T) {
	doc, err := Parse(nil)
	if err != nil {
		t.Fatal(err)
	}
	p, ok := doc.Warmup.PlanNamed(StandardPlan)
	if !ok || len(doc.Warmup.Plan) != 1 {
		t.Fatalf("plans: %+v", doc.Warmup.Plan)
	}
	if got, want := p.Plan(), warmup.Standard(); !reflect.DeepEqual(got, want) {
		t.Errorf("the shipped plan is\n%+v, the standard one\n%+v", got, want)
	}
	if p.Hour() != 15 {
		t.Errorf("hour: %d", p.Hour())
	}
}

func TestOwnPlanStandsBesideTheShippedOne(t *testing.T) {
	doc, err := Parse(map[string]string{"warmup": ownPlan})
	if err != nil {
		t.Fatal(err)
	}
	if _, ok := doc.Warmup.PlanNamed(StandardPlan); !ok {
		t.Error("the shipped plan is gone")
	}
	p, ok := doc.Warmup.PlanNamed("slow")
	if !ok {
		t.Fatal("the own plan is not there")
	}
	plan := p.Plan()
	if plan.Overflow != warmup.OverflowWait || plan.Gate.MinUsed != 0 || plan.Gate.MinAccepted != 900 || p.Hour() != 100 {
		t.Errorf("%+v, hour %d", plan, p.Hour())
	}
	for provider, want := range map[string]string{"orange": "french", "sfr": "french", "google": "other", "mx:example.net": "other"} {
		if got := doc.Warmup.ClassOf(p, provider); got != want {
			t.Errorf("%s is of class %s, want %s", provider, got, want)
		}
	}
	if standard, _ := doc.Warmup.PlanNamed(StandardPlan); doc.Warmup.ClassOf(standard, "google") != "google" {
		t.Error("google has a track in the standard plan")
	}
	shipped, err := Parse(nil)
	if err != nil {
		t.Fatal(err)
	}
	if changes := Diff(&shipped, &doc); len(changes) == 0 || changes[0].Section != "warmup" || !strings.Contains(changes[0].Key, `"french"`) {
		t.Errorf("diff: %+v", changes)
	}
}

func TestPlansAreRefusedByName(t *testing.T) {
	for _, tc := range []struct{ name, old, new, field, text string }{
		{"gap", "from = 3", "from = 4", "warmup.plan[0].track[1].growth[0].from", "gap"},
		{"zero stage", "stages = [5, 10]", "stages = [5, 0]", "warmup.plan[0].track[1].stages[1]", "is 0"},
		{"target never reached", "growth = [{ from = 3, percent = 50 }]", "growth = [{ from = 3, to = 4, percent = 50 }]", "warmup.plan[0].track[1].growth", "below the target"},
		{"no growth", "growth = [{ from = 3, percent = 50 }]", "", "warmup.plan[0].track[1].growth", "missing"},
		{"unknown class", `class = "french"`, `class = "francais"`, "warmup.plan[0].track[0].class", "francais"},
		{"unknown provider", `["orange", "sfr"]`, `["orange", "srf"]`, "warmup.class[0].providers", "srf"},
		{"name of a provider", `name = "french"`, `name = "orange"`, "warmup.class[0].name", "name of a provider"},
		{"no others", `class = "other"`, `class = "google"`, "warmup.plan[0].track", "other"},
		{"name", `name = "slow"`, `name = "Slow one"`, "warmup.plan[0].name", "Slow one"},
		{"hour", "hour_percent = 100", "hour_percent = 101", "warmup.plan[0].hour_percent", "101"},
		{"overflow", `overflow = "wait"`, `overflow = "bounce"`, "warmup.plan[0].overflow", "bounce"},
		{"gate", "min_used = 0", "min_used = 1001", "warmup.plan[0].gate.min_used", "1001"},
		{"unknown key", "min_used = 0", "least_used = 0", "warmup.plan.gate.least_used", "min_used"},
	} {
		text := strings.Replace(ownPlan, tc.old, tc.new, 1)
		if text == ownPlan {
			t.Fatalf("%s: nothing was changed", tc.name)
		}
		_, err := Parse(map[string]string{"warmup": text})
		f, ok := err.(*fault.Error)
		if !ok || !strings.Contains(f.Field+": "+f.Public, tc.field) || !strings.Contains(f.Public, tc.text) {
			t.Errorf("%s: %v, want %s to be refused for %q", tc.name, err, tc.field, tc.text)
		}
	}
	if _, err := Parse(map[string]string{"warmup": ownPlan + strings.ReplaceAll(ownPlan[strings.Index(ownPlan, "[[plan]]"):], "min_used", "min_used")}); err == nil || !strings.Contains(err.Error(), "plan[0]") {
		t.Errorf("two plans of one name: %v", err)
	}
}
