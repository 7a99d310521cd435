package warm

import (
	"fmt"
	"net/netip"
	"strings"
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/testutil"

	"github.com/relais-mta/relais/relay"
	"github.com/relais-mta/relais/relay/engine"
	"github.com/relais-mta/relais/shared/ids"
	"github.com/relais-mta/relais/shared/mailaddr"
	"github.com/relais-mta/relais/shared/policy"
	"github.com/relais-mta/relais/shared/warmup"
)

// afterOverflow is what is shown when an address has spent its quota of 20, and six
// recipients went on from another.
const afterOverflow = `
# HELP relais_relay_warmup_day_start_seconds Unix time at which the day began that is counted on.
# TYPE relais_relay_warmup_day_start_seconds gauge
relais_relay_warmup_day_start_seconds 1.7953056e+09
# HELP relais_relay_warmup_left_out Subjects and classes that are not shown, for there are too many.
# TYPE relais_relay_warmup_left_out gauge
relais_relay_warmup_left_out 0
# HELP relais_relay_warmup_overflow_recipients_total Recipients offered from warm addresses of a pool while another of its addresses had no room.
# TYPE relais_relay_warmup_overflow_recipients_total counter
relais_relay_warmup_overflow_recipients_total{class="other",pool="news"} 6
# HELP relais_relay_warmup_quota_recipients Recipients that all relays together may be sent to that day, as the leader said last.
# TYPE relais_relay_warmup_quota_recipients gauge
relais_relay_warmup_quota_recipients{class="other",kind="source",subject="192.0.2.1"} 20
# HELP relais_relay_warmup_refused_total Times that mail found no room, by what was used up: the quota of the day, or this relay's part of the hour.
# TYPE relais_relay_warmup_refused_total counter
relais_relay_warmup_refused_total{class="other",kind="source",of="day",subject="192.0.2.1"} 1
relais_relay_warmup_refused_total{class="other",kind="source",of="hour",subject="192.0.2.1"} 0
# HELP relais_relay_warmup_reserved_recipients Recipients of it that this relay has reserved.
# TYPE relais_relay_warmup_reserved_recipients gauge
relais_relay_warmup_reserved_recipients{class="other",kind="source",subject="192.0.2.1"} 20
# HELP relais_relay_warmup_stage The stage of the plan.
# TYPE relais_relay_warmup_stage gauge
relais_relay_warmup_stage{class="other",kind="source",subject="192.0.2.1"} 1
# HELP relais_relay_warmup_used_recipients Recipients of it that this relay has offered to hosts.
# TYPE relais_relay_warmup_used_recipients gauge
relais_relay_warmup_used_recipients{class="other",kind="source",subject="192.0.2.1"} 20
`

// TestMetricsShowWhatAnAddressHasAndWhatGoesOnElsewhere: an address spends its
// quota, and what finds no room leaves from a warm address of the pool.
func TestMetricsShowWhatAnAddressHasAndWhatGoesOnElsewhere(t *testing.T) {
	l, relays := newRelays(t, 1, 20)
	r := relays[0]
	if err := l.ledger.Assign(1, 7); err != nil {
		t.Fatal(err)
	}
	if err := testutil.CollectAndCompare(&collector{&Keeper{cfg: Config{Directory: func() *policy.Directory { return nil }}}}, strings.NewReader("")); err != nil {
		t.Errorf("without a view: %v", err)
	}
	warm := policy.Source{ID: ids.Source{3}, Bind: netip.MustParseAddr("192.0.2.3"), Public: netip.MustParseAddr("192.0.2.3"), EHLO: "mtb.example.com", Pool: testPool, Owner: ids.Node{1}, Epoch: 8}
	view := *r.view.View()
	view.Sources = append(view.Sources, warm)
	view.Warm.Subjects = []policy.WarmSubject{{Number: 1, Source: testSource, Plan: "test"}}
	var err error
	if r.view, err = policy.Compile(&view); err != nil {
		t.Fatal(err)
	}
	send := func(p *engine.Place) bool {
		if r.k.Begin(r.now, p).Reason != "" {
			return false
		}
		r.k.Done(r.now, p, []relay.Outcome{{Phase: relay.PhaseFinalDot, Status: relay.Delivered}})
		return true
	}
	fromWarm := func() *engine.Place {
		p := place(3)
		p.Lane.Source, p.Source = warm.ID, warm
		return p
	}
	if !send(fromWarm()) {
		t.Fatal("a warm address has no quota")
	}
	sent := 0
	for len(r.gates) == 0 {
		if send(place(1)) {
			sent++
		}
		r.look()
		if r.now = r.now.Add(time.Second); r.now.Sub(testStart) > time.Minute {
			t.Fatalf("%d sent, and the address is not held: %v", sent, r.gates)
		}
	}
	for range 2 {
		if !send(fromWarm()) {
			t.Fatal("the warm address is held, too")
		}
	}
	if err := testutil.CollectAndCompare(&collector{r.k}, strings.NewReader(afterOverflow)); err != nil {
		t.Errorf("after %d sent: %v", sent, err)
	}

	// When the address has room again, nothing goes on elsewhere because it had none.
	view.Warm.Today++
	if r.view, err = policy.Compile(&view); err != nil {
		t.Fatal(err)
	}
	r.look()
	if len(r.gates) > 0 || len(r.k.spills) > 0 {
		t.Fatalf("on the next day %v is held, and %v goes on", r.gates, r.k.spills)
	}
	if send(fromWarm()); r.k.spilled[overflow{testPool, "other"}] != 6 {
		t.Errorf("counted as overflow: %v", r.k.spilled)
	}
}

// TestMetricsAreBounded: of very many reservations the oldest subjects are shown, and
// how many are not.
func TestMetricsAreBounded(t *testing.T) {
	_, relays := newRelays(t, 1, 20)
	r := relays[0]
	view := *r.view.View()
	view.Warm.Subjects = nil
	tenant := ids.Tenant{9}
	view.Tenants = []policy.Tenant{{ID: tenant, Name: "acme"}}
	for i := range maxSeries + 7 {
		name := fmt.Sprintf("d%d.example", i)
		view.Domains = append(view.Domains, policy.Domain{Name: mailaddr.Domain(name), Tenant: tenant, ReturnPath: mailaddr.Domain("b." + name)})
		view.Warm.Subjects = append(view.Warm.Subjects, policy.WarmSubject{Number: uint64(i + 1), Domain: mailaddr.Domain(name), Plan: "test"})
		k := key{Subject: warmup.Subject(i + 1), Day: warmup.DayOf(testStart, time.UTC)}
		r.k.slots[k] = &slot{key: k}
	}
	var err error
	if r.view, err = policy.Compile(&view); err != nil {
		t.Fatal(err)
	}
	reg := prometheus.NewPedanticRegistry()
	if err := reg.Register(&collector{r.k}); err != nil {
		t.Fatal(err)
	}
	n, err := testutil.GatherAndCount(reg, "relais_relay_warmup_used_recipients")
	if err != nil || n != maxSeries {
		t.Errorf("%d are shown, %v", n, err)
	}
	const text = `
# HELP relais_relay_warmup_left_out Subjects and classes that are not shown, for there are too many.
# TYPE relais_relay_warmup_left_out gauge
relais_relay_warmup_left_out 7
`
	if err := testutil.GatherAndCompare(reg, strings.NewReader(text), "relais_relay_warmup_left_out"); err != nil {
		t.Error(err)
	}
}
