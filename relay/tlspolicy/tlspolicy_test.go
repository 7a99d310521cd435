package tlspolicy

import (
	"fmt"
	"testing"
	"time"

	"github.com/relais-mta/relais/shared/policy"
)

func TestDecide(t *testing.T) {
	for _, tc := range []struct {
		mode   policy.TLSMode
		broken bool
		want   Decision
	}{
		{policy.TLSOpportunistic, false, Try},
		{policy.TLSOpportunistic, true, Clear},
		{"", false, Try},
		{"", true, Clear},
		{policy.TLSRequired, false, Require},
		{policy.TLSRequired, true, Require},
		{policy.TLSOff, false, Clear},
		{policy.TLSOff, true, Clear},
	} {
		if got := Decide(tc.mode, tc.broken); got != tc.want {
			t.Errorf("Decide(%q, broken %v) = %v, want %v", tc.mode, tc.broken, got, tc.want)
		}
	}
}

func TestMemoryForgets(t *testing.T) {
	now := time.Unix(1_800_000_000, 0)
	m := NewMemory()
	m.Remember("mx.example", now, time.Hour)
	m.Remember("never.example", now, 0)
	for _, tc := range []struct {
		host string
		mode policy.TLSMode
		at   time.Duration
		want Decision
	}{
		{"mx.example", policy.TLSOpportunistic, 0, Clear},
		{"mx.example", policy.TLSRequired, 0, Require},
		{"never.example", policy.TLSOpportunistic, 0, Try},
		{"mx.example", policy.TLSOpportunistic, time.Hour - 1, Clear},
		{"mx.example", policy.TLSOpportunistic, time.Hour, Try},
		{"mx.example", policy.TLSOpportunistic, 0, Try}, // forgotten for good
	} {
		if got := m.Decide(tc.mode, tc.host, now.Add(tc.at)); got != tc.want {
			t.Errorf("%s in mode %s after %v: %v, want %v", tc.host, tc.mode, tc.at, got, tc.want)
		}
	}
}

func TestMemoryIsBounded(t *testing.T) {
	now := time.Unix(1_800_000_000, 0)
	m := NewMemory()
	for i := range maxBrokenHosts + 50 {
		m.Remember(fmt.Sprintf("mx%d.example", i), now, time.Hour+time.Duration(i)*time.Second)
	}
	if len(m.broken) != maxBrokenHosts {
		t.Fatalf("%d hosts are remembered, the bound is %d", len(m.broken), maxBrokenHosts)
	}
	if m.Broken("mx0.example", now) {
		t.Error("the host that would be forgotten soonest was kept")
	}
	if !m.Broken(fmt.Sprintf("mx%d.example", maxBrokenHosts+49), now) {
		t.Error("the newest host was not kept")
	}
	m.Remember("late.example", now.Add(100*time.Hour), time.Hour)
	if len(m.broken) != 1 {
		t.Errorf("%d hosts remain after their time, want the new one only", len(m.broken))
	}
}
