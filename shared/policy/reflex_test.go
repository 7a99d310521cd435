package policy

import (
	"testing"
	"time"
)

func TestReflexOfProviders(t *testing.T) {
	doc := parsed(t, map[string]string{"providers": `
[reflex]
keep_percent = 60

[[reflex_of]]
provider = "orange"
off = true

[[reflex_of]]
provider = "mx:example.net"
hold = "5m"
max_hold = "20m"
`})
	var p problems
	table := newProviderTable(&doc.Providers, &p)
	if err := p.err("test"); err != nil {
		t.Fatal(err)
	}
	profile := func(name string) *Reflex {
		out, ok := table.Named(name)
		if !ok {
			t.Fatal(name)
		}
		return out.Reflex()
	}
	for _, name := range []string{"google", "mx:example.org"} {
		if r := profile(name); r.Off || r.KeepPercent != 60 || r.Hold.D() != time.Minute || r.After != 3 {
			t.Errorf("%s: %+v", name, r)
		}
	}
	if r := profile("orange"); !r.Off || r.KeepPercent != 60 {
		t.Errorf("orange: %+v", r)
	}
	if r := profile("mx:example.net"); r.Off || r.KeepPercent != 60 || r.Hold.D() != 5*time.Minute || r.MaxHold.D() != 20*time.Minute {
		t.Errorf("mx:example.net: %+v", r)
	}
}

func TestPerHour(t *testing.T) {
	for _, c := range []struct {
		rate Rate
		want int64
	}{
		{Rate{}, 0},
		{Rate{Max: 600, Per: time.Minute}, 36_000},
		{Rate{Max: 1, Per: 24 * time.Hour}, 1},
		{Rate{Max: 1_000_000, Per: time.Second}, 3_600_000_000},
	} {
		if got := c.rate.PerHour(); got != c.want {
			t.Errorf("%+v: %d an hour, want %d", c.rate, got, c.want)
		}
	}
}
