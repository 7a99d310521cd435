package admin

import (
	"fmt"
	"net/url"
	"reflect"
	"strings"
	"testing"
	"time"

	"github.com/relais-mta/relais/relay"
	"github.com/relais-mta/relais/relay/queue"
	"github.com/relais-mta/relais/shared/fault"
	"github.com/relais-mta/relais/shared/ids"
	"github.com/relais-mta/relais/shared/policy"
)

var (
	filterNow = time.Date(2026, 3, 1, 12, 0, 0, 0, time.UTC)
	acme      = ids.Tenant{15: 2}
	pool      = ids.Pool{15: 3}
)

func directory(t *testing.T) *policy.Directory {
	t.Helper()
	doc, err := policy.Parse(nil)
	if err != nil {
		t.Fatal(err)
	}
	dir, err := policy.Compile(&policy.View{
		Revision: 1, Document: doc, Tenants: []policy.Tenant{{ID: acme, Name: "acme"}},
		Pools: []policy.Pool{{ID: pool, Name: "default", Kind: policy.PoolShared}},
	})
	if err != nil {
		t.Fatal(err)
	}
	return dir
}

func TestFilterWords(t *testing.T) {
	id := ids.NewMessage(filterNow)
	for name, tc := range map[string]struct {
		in   Filter
		want queue.Filter
	}{
		"nothing":      {Filter{}, queue.Filter{}},
		"tenant":       {Filter{Tenant: "acme"}, queue.Filter{Match: queue.Match{Tenant: acme}}},
		"tenant by id": {Filter{Tenant: acme.String()}, queue.Filter{Match: queue.Match{Tenant: acme}}},
		"pool":         {Filter{Pool: "default"}, queue.Filter{Match: queue.Match{Pool: pool}}},
		"pool by id":   {Filter{Pool: pool.String()}, queue.Filter{Match: queue.Match{Pool: pool}}},
		"domains":      {Filter{FromDomain: "Brand.Example", Domain: "BÜCHER.example"}, queue.Filter{Match: queue.Match{From: "brand.example", Domain: "xn--bcher-kva.example"}}},
		"words":        {Filter{Stream: "bulk", Provider: "google", Tag: "june", LastReply: "421"}, queue.Filter{Match: queue.Match{Stream: "bulk", Provider: "google", Tag: "june"}, LastReply: "421"}},
		"priority":     {Filter{Priority: "80"}, queue.Filter{Priority: &queue.PriorityRange{Least: 30, Most: 30}}},
		"priorities":   {Filter{Priority: "0-49"}, queue.Filter{Priority: &queue.PriorityRange{Least: -50, Most: -1}}},
		"held":         {Filter{State: "held"}, queue.Filter{State: relay.StateHeld}},
		"waiting":      {Filter{State: "waiting"}, queue.Filter{State: relay.StateWaiting}},
		"in doubt":     {Filter{State: "in-doubt"}, queue.Filter{State: relay.StateWaiting, InDoubt: true}},
		"ages":         {Filter{OlderThan: "2h", YoungerThan: "3d"}, queue.Filter{AcceptedBefore: filterNow.Add(-2 * time.Hour), AcceptedAfter: filterNow.Add(-72 * time.Hour)}},
		"ids": {Filter{IDs: []string{id.String(), ids.Recipient{Message: id, Index: 7}.String()}},
			queue.Filter{Chosen: []queue.Chosen{{Message: id, Index: queue.AllRecipients}, {Message: id, Index: 7}}}},
	} {
		got, err := tc.in.parse(directory(t), filterNow)
		if err != nil || !reflect.DeepEqual(got, tc.want) {
			t.Errorf("%s: %+v, %v, want %+v", name, got, err, tc.want)
		}
		if back := filterFrom(tc.in.Values()); !reflect.DeepEqual(back, tc.in) {
			t.Errorf("%s: as a query %+v", name, back)
		}
		if tc.in.Empty() != (name == "nothing") {
			t.Errorf("%s: empty is %v", name, tc.in.Empty())
		}
	}
}

// TestFilterMistakes: a mistake names the field, and never selects more than
// was meant.
func TestFilterMistakes(t *testing.T) {
	many := make([]string, maxFilterIDs+1)
	for name, tc := range map[string]struct {
		in    Filter
		field string
	}{
		"tenant":      {Filter{Tenant: "nobody"}, "tenant"},
		"pool":        {Filter{Pool: "nowhere"}, "pool"},
		"from domain": {Filter{FromDomain: "a b"}, "from_domain"},
		"domain":      {Filter{Domain: "a@b.example"}, "domain"},
		"source":      {Filter{Source: "mx1.example"}, "source"},
		"state":       {Filter{State: "delivered"}, "state"},
		"priority":    {Filter{Priority: "101"}, "priority"},
		"backwards":   {Filter{Priority: "60-50"}, "priority"},
		"open range":  {Filter{Priority: "60-"}, "priority"},
		"age":         {Filter{OlderThan: "old"}, "older_than"},
		"other age":   {Filter{YoungerThan: "-2h"}, "younger_than"},
		"id":          {Filter{IDs: []string{"tnt_" + strings.Repeat("0", 25) + "1"}}, "ids"},
		"recipient":   {Filter{IDs: []string{"rcp_1"}}, "ids"},
		"ids":         {Filter{IDs: many}, "ids"},
		"length":      {Filter{Tag: fmt.Sprintf("%300d", 1)}, "tag"},
	} {
		_, err := tc.in.parse(directory(t), filterNow)
		if e, ok := err.(*fault.Error); !ok || e.Field != tc.field || e.Kind != fault.Invalid {
			t.Errorf("%s: %v", name, err)
		}
		if _, err := tc.in.parse(nil, filterNow); err == nil {
			t.Errorf("%s: passes without a view", name)
		}
	}
}

// TestFiltersKnowTheProvidersOfThePolicy: of a policy's own ones, too. A misspelt
// one would match nothing.
func TestFiltersKnowTheProvidersOfThePolicy(t *testing.T) {
	dir := directory(t)
	own := dir.View().Document.Providers.Provider[0]
	own.Name = "our-partner"
	dir.View().Document.Providers.Provider = append(dir.View().Document.Providers.Provider, own)
	for name, known := range map[string]bool{"google": true, "our-partner": true, "mx:example.net": true, "gogle": false, "mx:": false, "GOOGLE": false, "unknown": true} {
		f := Filter{Provider: name}
		if _, err := f.parse(dir, filterNow); (err == nil) != known {
			t.Errorf("%q: %v", name, err)
		}
		if _, err := f.parse(nil, filterNow); err != nil {
			t.Errorf("%q without a view: %v", name, err)
		}
		_, err := traceFilter(url.Values{"provider": {name}}, dir)
		if known = known && name != "unknown"; (err == nil) != known {
			t.Errorf("trace %q: %v", name, err)
		}
	}
	f := Filter{Provider: "gogle"}
	if _, err := f.parse(dir, filterNow); !strings.Contains(fault.Public(err), "google, ") || !strings.Contains(fault.Public(err), "our-partner") {
		t.Errorf("the mistake does not say what there is: %v", err)
	}
}

// TestTraceFilterKnowsTenantsByName: as the filters of the queue do.
func TestTraceFilterKnowsTenantsByName(t *testing.T) {
	for _, text := range []string{"acme", acme.String()} {
		if f, err := traceFilter(url.Values{"tenant": {text}}, directory(t)); err != nil || f.Tenant != acme {
			t.Errorf("%q: %v, %v", text, f.Tenant, err)
		}
	}
	if _, err := traceFilter(url.Values{"tenant": {"nobody"}}, directory(t)); !fault.Is(err, fault.Invalid) {
		t.Errorf("nobody: %v", err)
	}
	if f, err := traceFilter(url.Values{}, nil); err != nil || !f.Tenant.IsZero() {
		t.Errorf("nothing: %+v, %v", f, err)
	}
}

// TestRulesKnowTheStreamsOfThePolicy: a rule for a misspelt one would never hold
// anything. What is queued is found by any name, for its stream may be gone.
func TestRulesKnowTheStreamsOfThePolicy(t *testing.T) {
	dir := directory(t)
	dir.View().Document.Streams.Stream = []policy.Stream{{Tenant: "*", Project: "*", Name: "bulk"}, {Tenant: "acme", Project: "*", Name: "bulk"}, {Tenant: "acme", Project: "*", Name: "alerts"}}
	for name, known := range map[string]bool{"bulk": true, "alerts": true, "": true, "bulky": false, "BULK": false} {
		f := Filter{Stream: name, Tag: "june"}
		if m, err := f.rule(dir); (err == nil) != known || known && (m != queue.Match{Stream: name, Tag: "june"}) {
			t.Errorf("%q: %+v, %v", name, m, err)
		} else if err != nil && !strings.HasSuffix(fault.Public(err), "write one of alerts, bulk") {
			t.Errorf("%q: %v", name, err)
		}
		if _, err := f.rule(nil); err != nil {
			t.Errorf("%q without a view: %v", name, err)
		}
		if _, err := f.parse(dir, filterNow); err != nil {
			t.Errorf("%q of queued mail: %v", name, err)
		}
	}
	for _, f := range []Filter{{State: "held"}, {Provider: "gogle"}, {Tenant: "nobody"}} {
		if _, err := f.rule(dir); err == nil {
			t.Errorf("a rule for %+v", f)
		}
	}
}
