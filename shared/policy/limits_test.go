package policy

import (
	"strings"
	"testing"
	"time"

	"github.com/relais-mta/relais/shared/ids"
	"github.com/relais-mta/relais/shared/lease"
)

const limitsText = `
[[limit]]
name = "orange"
provider = "orange"
messages = "600/1m"
connections = 2
[[limit]]
name = "slow"
tenant = "acme"
pool = "own"
messages = "6/1h"
floor_percent = 0
soft_floor = true
burst = 2
[lease]
ttl = "10s"
`

func TestLimitsComeToLeases(t *testing.T) {
	doc, err := Parse(map[string]string{"limits": limitsText})
	if err != nil {
		t.Fatal(err)
	}
	if c := doc.Limits.Lease.Config(); c.TTL != 10*time.Second || c.FloorTTL != 24*time.Hour || c.Validate() != nil {
		t.Errorf("lease %+v", c)
	}
	want := map[string][]lease.Limit{
		"orange": {{Kind: lease.Rate, Max: 600_000, Per: time.Minute, Burst: 20, FloorPercent: 20, ReservePercent: 5}, {Kind: lease.Slots, Max: 2, FloorPercent: 20, ReservePercent: 5}},
		"slow":   {{Kind: lease.Rate, Max: 6_000, Per: time.Hour, Burst: 2, ReservePercent: 5, SoftFloor: true}},
	}
	for i := range doc.Limits.Limit {
		e := &doc.Limits.Limit[i]
		got, err := e.Leases()
		if err != nil || len(got) != len(want[e.Name]) {
			t.Fatalf("%s: %+v, %v", e.Name, got, err)
		}
		for j := range got {
			if got[j] != want[e.Name][j] {
				t.Errorf("%s: %+v, want %+v", e.Name, got[j], want[e.Name][j])
			}
		}
	}
	for text, want := range map[string]int64{"1/1m": 1, "50/1m": 20, "60000/1m": 1000, "1000000/1s": lease.MaxBurst} {
		e := LimitEntry{Name: "a", Messages: text}
		if got, err := e.Leases(); err != nil || got[0].Burst != want {
			t.Errorf("%s has burst %+v, %v, want %d", text, got, err, want)
		}
	}
}

func TestLimitsNameWhatExists(t *testing.T) {
	doc, err := Parse(map[string]string{"limits": limitsText, "streams": "stream = []\n"})
	if err != nil {
		t.Fatal(err)
	}
	refs := References{Projects: map[string]map[string]bool{"acme": {}, "other": {}}, Pools: map[string]PoolReference{"own": {Owner: "acme"}}}
	if err := CheckReferences(&doc, refs); err != nil {
		t.Error(err)
	}
	refs.Pools["own"] = PoolReference{Owner: "other"}
	if err := CheckReferences(&doc, refs); err == nil || !strings.Contains(err.Error(), "limits.limit[1].pool") {
		t.Errorf("a pool of another tenant: %v", err)
	}
	if err := CheckReferences(&doc, References{}); err == nil || !strings.Contains(err.Error(), `there is no tenant "acme"`) || !strings.Contains(err.Error(), `there is no pool "own"`) {
		t.Errorf("unknown names: %v", err)
	}
}

func TestLimitsInDiffAndImpact(t *testing.T) {
	before, err := Parse(map[string]string{"limits": limitsText})
	if err != nil {
		t.Fatal(err)
	}
	after, err := Parse(map[string]string{"limits": strings.Replace(limitsText, "600/1m", "300/1m", 1)})
	if err != nil {
		t.Fatal(err)
	}
	changes := Diff(&before, &after)
	if len(changes) != 1 || changes[0] != (Change{Section: "limits", Key: `limit["orange"].messages`, Old: `"600/1m"`, New: `"300/1m"`}) {
		t.Errorf("%+v", changes)
	}
	i := ImpactOf(&before, &after, &View{})
	if len(i.Limits) != 1 || i.Limits[0] != "orange" || len(i.Settings) != 0 || i.String() != "changes limit orange across the cluster" {
		t.Errorf("%+v: %s", i, i)
	}
	if after, err = Parse(map[string]string{"limits": strings.Replace(limitsText, "10s", "20s", 1)}); err != nil {
		t.Fatal(err)
	}
	if i := ImpactOf(&before, &after, &View{}); len(i.Settings) != 1 || i.Settings[0] != "limits" {
		t.Errorf("another ttl: %+v", i)
	}
}

func TestSharedLimitsOfAView(t *testing.T) {
	tenant, pool := ids.Tenant{1}, ids.Pool{2}
	rate := lease.Limit{ID: 3, Kind: lease.Rate, Max: 1000, Per: time.Minute, Burst: 1}
	l := SharedLimit{Limit: rate, Provider: "orange", Tenant: tenant, Domain: "example.com", Pool: pool}
	for _, c := range []struct {
		provider string
		tenant   ids.Tenant
		domain   string
		pool     ids.Pool
		want     bool
	}{
		{"orange", tenant, "example.com", pool, true}, {"google", tenant, "example.com", pool, false}, {"orange", ids.Tenant{}, "example.com", pool, false},
		{"orange", tenant, "a.example.com", pool, false}, {"orange", tenant, "example.com", ids.Pool{9}, false},
	} {
		if got := l.Matches(c.provider, c.tenant, "example.com", c.pool); c.domain == "example.com" && got != c.want {
			t.Errorf("%+v: %v", c, got)
		}
		if c.domain != "example.com" && l.Matches(c.provider, c.tenant, "a.example.com", c.pool) {
			t.Errorf("%+v matches", c)
		}
	}
	all := SharedLimit{Limit: rate}
	if !all.Matches("mx:x.example", tenant, "x.example", pool) || all.Counts() != CountsMessages {
		t.Error("a limit without selectors does not count all messages")
	}
	doc, err := Parse(nil)
	if err != nil {
		t.Fatal(err)
	}
	v := &View{Document: doc, SharedLimits: []SharedLimit{all}, Lease: lease.DefaultConfig()}
	d, err := Compile(v)
	if err != nil || len(d.SharedLimits()) != 1 || d.Lease() != lease.DefaultConfig() {
		t.Fatalf("%v, %v", d, err)
	}
	v.Lease = lease.Config{}
	if _, err := Compile(v); err == nil || !strings.Contains(err.Error(), "view.lease") {
		t.Errorf("limits without a lease: %v", err)
	}
	v = &View{Document: doc, SharedLimits: []SharedLimit{all, all}, Lease: lease.DefaultConfig()}
	if _, err := Compile(v); err == nil || !strings.Contains(err.Error(), "there twice") {
		t.Errorf("a number twice: %v", err)
	}
	v.SharedLimits = []SharedLimit{{Limit: lease.Limit{ID: 4, Kind: 9}}}
	if _, err := Compile(v); err == nil || !strings.Contains(err.Error(), "cannot be kept") {
		t.Errorf("a kind that is not known: %v", err)
	}
}
