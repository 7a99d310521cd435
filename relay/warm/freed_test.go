package warm

import (
	"slices"
	"testing"
	"time"

	"github.com/relais-mta/relais/relay"
	"github.com/relais-mta/relais/shared/ids"
	"github.com/relais-mta/relais/shared/policy"
)

// TestMailOfADomainIsLookedAtAgain: mail that was refused for a domain's quota has
// no gate that opens, so it is recalled when there is room, and not before.
func TestMailOfADomainIsLookedAtAgain(t *testing.T) {
	change := func(t *testing.T, r *testRelay, f func(*policy.View)) {
		view := *r.view.View()
		f(&view)
		changed, err := policy.Compile(&view)
		if err != nil {
			t.Fatal(err)
		}
		r.view = changed
	}
	for name, frees := range map[string]func(*testing.T, *testRelay){
		"stopped":  func(t *testing.T, r *testRelay) { change(t, r, func(v *policy.View) { v.Warm.Subjects = nil }) },
		"next day": func(t *testing.T, r *testRelay) { change(t, r, func(v *policy.View) { v.Warm.Today++ }) },
		"more quota": func(t *testing.T, r *testRelay) {
			r.leader.quota = 40
			if err := r.leader.ledger.SetQuota(1, 0, r.leader.ledger.Today(), 40); err != nil {
				t.Fatal(err)
			}
		},
	} {
		t.Run(name, func(t *testing.T) {
			l, relays := newRelays(t, 1, 20)
			r := relays[0]
			change(t, r, func(v *policy.View) {
				tenant := ids.Tenant{9}
				v.Tenants = []policy.Tenant{{ID: tenant, Name: "acme"}}
				v.Domains = []policy.Domain{{Name: "brand.example", Tenant: tenant, ReturnPath: "bounces.brand.example"}}
				v.Warm.Subjects = []policy.WarmSubject{{Number: 1, Domain: "brand.example", Plan: "test"}}
			})
			p := place(1)
			p.From = "brand.example"
			sent, refused := 0, ""
			for range 60 {
				h := r.k.Begin(r.now, p)
				if h.Reason == "" {
					sent++
					r.k.Done(r.now, p, []relay.Outcome{{Phase: relay.PhaseFinalDot, Status: relay.Delivered}})
				}
				refused = h.Text
				r.look()
				r.now = r.now.Add(time.Second)
			}
			if _, reserved, _ := l.ledger.Totals(1, 0, l.ledger.Today()); reserved != 20 || refused == "" {
				t.Fatalf("%d sent, %d reserved, %q", sent, reserved, refused)
			}
			if len(r.recalled) > 0 || len(r.gates) > 0 {
				t.Fatalf("there is no room, but %v is recalled, with the gates %v", r.recalled, r.gates)
			}
			frees(t, r)
			for range 15 {
				r.look()
				r.now = r.now.Add(time.Second)
			}
			if !slices.Contains(r.recalled, "test") {
				t.Errorf("the mail is not looked at again: %v", r.recalled)
			}
		})
	}
}
