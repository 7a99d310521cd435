package service

import (
	"net/netip"
	"testing"
	"time"

	"github.com/relais-mta/relais/control"
	"github.com/relais-mta/relais/control/command"
	"github.com/relais-mta/relais/shared/warmup"
)

// TestWhyNamesBrakesAndWarmUps: who asks why a lane is slow is told of all that
// restricts it, and of nothing that certainly does not.
func TestWhyNamesBrakesAndWarmUps(t *testing.T) {
	f := newFixture(t)
	for _, name := range []string{"acme", "other"} {
		if _, err := f.AddTenant(ctx, operator, name, Change{}); err != nil {
			t.Fatal(err)
		}
	}
	for _, ip := range []string{"192.0.2.7", "192.0.2.8"} {
		if _, err := f.AddIP(ctx, operator, IPRequest{Bind: netip.MustParseAddr(ip), EHLO: "mta.example.net"}, Change{}); err != nil {
			t.Fatal(err)
		}
	}
	brakes := map[string]string{} // id to name
	for name, req := range map[string]BrakeRequest{
		"google": {Provider: "google"}, "orange": {Provider: "orange", Percent: 10}, "acme": {Tenant: "acme"}, "seven": {Source: "192.0.2.7"},
		"domain": {Domain: "example.net"}, "ended": {Provider: "google"},
	} {
		req.Cause = "complaints"
		b := must[*control.Brake](t)(f.SetBrake(ctx, operator, req, Change{}))
		brakes[b.ID.String()] = name
		if name == "ended" {
			must[*control.Brake](t)(f.CancelBrake(ctx, operator, b.ID.String(), Change{}))
		}
	}
	must[*control.WarmCalendar](t)(propose[control.WarmCalendar](ctx, f.Service, &command.WarmRoll{Day: int32(warmup.DayOf(time.Now(), time.UTC))}))
	must[WarmUpView](t)(f.StartWarmUp(ctx, operator, control.WarmSource, "192.0.2.7", "standard", nil, Change{}))
	must[WarmUpView](t)(f.StartWarmUp(ctx, operator, control.WarmPool, "default", "standard", nil, Change{}))

	for name, tc := range map[string]struct {
		mail   Mail
		brakes []string
		warm   []string // kinds
	}{
		"a lane":            {Mail{Source: "192.0.2.7", Provider: "google"}, []string{"google", "acme", "seven", "domain"}, []string{"source", "pool"}},
		"another lane":      {Mail{Source: "192.0.2.8", Provider: "orange"}, []string{"orange", "acme", "domain"}, []string{"pool"}},
		"a tenant's mail":   {Mail{Tenant: "other", Provider: "google", Domain: "example.com"}, []string{"google", "seven"}, []string{"pool"}},
		"its own, a domain": {Mail{Tenant: "acme", Domain: "Example.NET"}, []string{"google", "orange", "acme", "seven", "domain"}, []string{"pool"}},
	} {
		why, err := f.PolicyWhy(ctx, viewer, tc.mail)
		if err != nil {
			t.Fatalf("%s: %v", name, err)
		}
		want := map[string]bool{}
		for _, b := range tc.brakes {
			want[b] = true
		}
		for _, b := range why.Brakes {
			if of := brakes[b.ID.String()]; !want[of] {
				t.Errorf("%s: the brake %q is named", name, of)
			} else {
				delete(want, of)
			}
		}
		if len(want) > 0 {
			t.Errorf("%s: the brakes %v are not named", name, want)
		}
		kinds := map[string]bool{}
		for _, v := range why.WarmUps {
			kinds[string(v.Kind)] = true
			if tc.mail.Provider != "" && (len(v.Classes) != 1 || v.Classes[0].Class != tc.mail.Provider || v.Classes[0].Quota == 0) {
				t.Errorf("%s: classes of the warm-up of %s: %+v", name, v.Name, v.Classes)
			}
		}
		if len(kinds) != len(tc.warm) || len(why.WarmUps) != len(tc.warm) {
			t.Errorf("%s: warm-ups %v, want %v", name, kinds, tc.warm)
		}
		for _, kind := range tc.warm {
			if !kinds[kind] {
				t.Errorf("%s: the warm-up of a %s is not named", name, kind)
			}
		}
	}
}
