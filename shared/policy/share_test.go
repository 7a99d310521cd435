package policy

import (
	"testing"

	"github.com/relais-mta/relais/shared/ids"
)

func TestShare(t *testing.T) {
	doc, err := Parse(map[string]string{"streams": `
[[stream]]
tenant = "*"
project = "*"
name = "news"
kind = "bulk"
pool = "default"
priority = 0

[[stream]]
tenant = "acme"
project = "shop"
name = "news"
kind = "bulk"
pool = "default"
priority = 20
weight = 5

[[stream]]
tenant = "acme"
project = "blog"
name = "news"
kind = "bulk"
pool = "default"
priority = 70

[[tenant]]
name = "acme"
weight = 30

[[tenant]]
name = "nobody"
weight = 40
`})
	if err != nil {
		t.Fatal(err)
	}
	acme, other := ids.Tenant{1}, ids.Tenant{2}
	dir, err := Compile(&View{
		Document: doc,
		Tenants:  []Tenant{{ID: acme, Name: "acme"}, {ID: other, Name: "other"}},
		Projects: []Project{{ID: ids.Project{1}, Tenant: acme, Name: "shop"}, {ID: ids.Project{2}, Tenant: acme, Name: "blog"}},
	})
	if err != nil {
		t.Fatal(err)
	}
	for _, c := range []struct {
		what   string
		tenant ids.Tenant
		stream string
		kind   StreamKind
		want   Share
	}{
		{"the highest of the tenant's projects", acme, "news", Bulk, Share{30, 10, 70}},
		{"everybody's", other, "news", Bulk, Share{10, 10, 0}},
		{"another kind", other, "news", Transactional, Share{10, 10, 50}},
		{"no entry any more", acme, "gone", Bulk, Share{30, 10, 50}},
	} {
		if got := dir.Share(c.tenant, c.stream, c.kind); got != c.want {
			t.Errorf("%s: %+v, want %+v", c.what, got, c.want)
		}
	}
	before := defaultDocument(t)
	var keys []string
	for _, c := range Diff(&before, &doc) {
		keys = append(keys, c.Key+"="+c.New)
	}
	want := map[string]bool{`stream["*/*/news"].priority=0`: true, `tenant["acme"].weight=30`: true, `stream["acme/blog/news"].priority=70`: true}
	for _, k := range keys {
		delete(want, k)
	}
	if len(want) > 0 {
		t.Errorf("the difference does not show %v: %v", want, keys)
	}
	if got := ImpactOf(&before, &doc, dir.View()); len(got.Settings) != 1 || got.Settings[0] != "streams" {
		t.Errorf("weights of tenants are settings of every relay: %+v", got)
	}
}
