package policy

import (
	"net/netip"
	"strings"
	"testing"

	"github.com/relais-mta/relais/shared/fault"
	"github.com/relais-mta/relais/shared/ids"
	"github.com/relais-mta/relais/shared/mailaddr"
)

// world is a small cluster: two tenants, three pools, this relay and another.
type world struct {
	view                      View
	acme, other               ids.Tenant
	shop, news, otherProject  ids.Project
	shared, acmePool, far     ids.Pool
	credential                ids.Credential
	here, there               ids.Node
	heavy, light, off, remote ids.Source
}

// id makes the n-th id of a kind.
func id[T ~[ids.Size]byte](n byte) T {
	var x T
	x[0], x[ids.Size-1] = 1, n
	return x
}

func newWorld(t testing.TB, sections map[string]string) *world {
	t.Helper()
	doc, err := Parse(sections)
	if err != nil {
		t.Fatal(err)
	}
	w := &world{
		acme: id[ids.Tenant](1), other: id[ids.Tenant](2),
		shop: id[ids.Project](3), news: id[ids.Project](4), otherProject: id[ids.Project](5),
		shared: id[ids.Pool](6), acmePool: id[ids.Pool](7), far: id[ids.Pool](8),
		credential: id[ids.Credential](9), here: id[ids.Node](10), there: id[ids.Node](11),
		heavy: id[ids.Source](12), light: id[ids.Source](13), off: id[ids.Source](14), remote: id[ids.Source](15),
	}
	source := func(id ids.Source, ip string, pool ids.Pool, owner ids.Node) Source {
		a := netip.MustParseAddr(ip)
		return Source{ID: id, Bind: a, Public: a, EHLO: "out.example.net", Pool: pool, Owner: owner, Epoch: 1}
	}
	w.view = View{
		Node: w.here, Revision: 7, Document: doc,
		Tenants:     []Tenant{{ID: w.acme, Name: "acme"}, {ID: w.other, Name: "other"}},
		Projects:    []Project{{w.shop, w.acme, "shop"}, {w.news, w.acme, "news"}, {w.otherProject, w.other, "shop"}},
		Credentials: []Credential{{ID: w.credential, Tenant: w.acme, Project: w.shop, Stream: "bulk"}},
		Domains: []Domain{
			{Name: "acme.example", Tenant: w.acme, ReturnPath: "rp.acme.example"},
			{Name: "news.acme.example", Tenant: w.acme, ReturnPath: "rp.acme.example"},
			{Name: "other.example", Tenant: w.other, ReturnPath: "rp.other.example"},
		},
		Pools: []Pool{{w.shared, "default", PoolShared, ids.Tenant{}}, {w.acmePool, "acme-own", PoolDedicated, w.acme}, {w.far, "far", PoolShared, ids.Tenant{}}},
		Sources: []Source{
			source(w.heavy, "192.0.2.10", w.shared, w.here), source(w.light, "192.0.2.11", w.shared, w.here),
			source(w.off, "192.0.2.12", w.shared, w.here), source(w.remote, "192.0.2.10", w.far, w.there),
			source(id[ids.Source](16), "192.0.2.99", ids.Pool{}, w.here), source(id[ids.Source](17), "192.0.2.98", w.acmePool, ids.Node{}),
		},
		ReturnPathKeys: []ReturnPathKey{{ID: 2}, {ID: 1}},
	}
	return w
}

const worldPools = `[[pool]]
name = "default"
[pool.weights]
"192.0.2.10" = 20
"192.0.2.12" = 0`

const worldStreams = `
stream = [
  { tenant = "acme", project = "shop", name = "bulk", kind = "bulk", pool = "acme-own", return_path = "message", expire = "2d" },
  { tenant = "acme", project = "*", name = "bulk", kind = "bulk", pool = "far" },
  { tenant = "*", project = "*", name = "bulk", kind = "bulk", pool = "default" },
  { tenant = "*", project = "*", name = "otp", kind = "transactional", pool = "default" },
  { tenant = "*", project = "*", name = "stolen", kind = "bulk", pool = "acme-own" },
  { tenant = "*", project = "*", name = "gone", kind = "bulk", pool = "no-such-pool" },
  { tenant = "left", project = "*", name = "otp", kind = "bulk", pool = "far" },
]`

func compiled(t testing.TB) (*world, *Directory) {
	t.Helper()
	w := newWorld(t, map[string]string{"pools": worldPools, "streams": worldStreams})
	d, err := Compile(&w.view)
	if err != nil {
		t.Fatal(err)
	}
	return w, d
}

func TestStreamResolution(t *testing.T) {
	w, d := compiled(t)
	for _, tc := range []struct {
		name    string
		tenant  ids.Tenant
		project ids.Project
		stream  string
		want    ResolvedStream
	}{
		{"tenant and project named", w.acme, w.shop, "bulk", ResolvedStream{"bulk", Bulk, w.acmePool, "acme-own", ReturnPathMessage, 2 * day, MinPriority, MaxPriority, false, false, w.acme}},
		{"tenant named", w.acme, w.news, "bulk", ResolvedStream{"bulk", Bulk, w.far, "far", ReturnPathRecipient, 4*day + 12*hour, MinPriority, MaxPriority, false, false, ids.Tenant{}}},
		{"none named", w.other, w.otherProject, "bulk", ResolvedStream{"bulk", Bulk, w.shared, "default", ReturnPathRecipient, 4*day + 12*hour, MinPriority, MaxPriority, true, false, ids.Tenant{}}},
		{"transactional", w.acme, w.shop, "otp", ResolvedStream{"otp", Transactional, w.shared, "default", ReturnPathMessage, day, MinPriority, MaxPriority, true, false, ids.Tenant{}}},
	} {
		got, err := d.Stream(tc.tenant, tc.project, tc.stream)
		if err != nil || *got != tc.want {
			t.Errorf("%s: %+v, %v; want %+v", tc.name, got, err, tc.want)
		}
	}
	for _, tc := range []struct {
		name   string
		tenant ids.Tenant
		stream string
		kind   fault.Kind
		text   string
	}{
		{"unknown name", w.acme, "nothing", fault.NotFound, `"nothing"`},
		{"empty name", w.acme, "", fault.NotFound, `""`},
		{"no tenant", ids.Tenant{}, "bulk", fault.NotFound, `"bulk"`},
		{"pool does not exist", w.acme, "gone", fault.NotFound, `"no-such-pool"`},
		{"pool of another tenant", w.other, "stolen", fault.Denied, `"acme-own"`},
	} {
		got, err := d.Stream(tc.tenant, w.news, tc.stream)
		if got != nil || fault.KindOf(err) != tc.kind || !strings.Contains(fault.Public(err), tc.text) {
			t.Errorf("%s: %+v, %v; want %v naming %s", tc.name, got, err, tc.kind, tc.text)
		}
	}
	if _, err := d.Stream(w.acme, w.news, "stolen"); err != nil {
		t.Errorf("the owner may use its own pool: %v", err)
	}
}

func TestDomainFor(t *testing.T) {
	w, d := compiled(t)
	for name, want := range map[mailaddr.Domain]mailaddr.Domain{
		"acme.example": "acme.example", "a.b.acme.example": "acme.example", "news.acme.example": "news.acme.example",
		"x.news.acme.example": "news.acme.example", "notacme.example": "", "example": "", "": "", "[192.0.2.1]": "",
	} {
		dom, ok := d.DomainFor(name)
		if ok != (want != "") || ok && dom.Name != want {
			t.Errorf("DomainFor(%q) = %v, %v; want %q", name, dom, ok, want)
		}
	}
	if dom, ok := d.ReturnPathDomain("rp.acme.example"); !ok || dom.Tenant != w.acme {
		t.Errorf("return path: %v, %v", dom, ok)
	}
	if _, ok := d.ReturnPathDomain("a.rp.acme.example"); ok {
		t.Error("a name below a return-path domain is none")
	}
}

func TestSourcesAndPools(t *testing.T) {
	w, d := compiled(t)
	got := d.LocalSources(w.shared)
	if len(got) != 2 || got[0].ID != w.heavy || got[0].Weight != 20 || got[1].ID != w.light || got[1].Weight != 1 {
		t.Errorf("LocalSources = %+v", got)
	}
	for _, pool := range []ids.Pool{w.far, w.acmePool, {}, id[ids.Pool](99)} {
		if s := d.LocalSources(pool); len(s) != 0 {
			t.Errorf("LocalSources(%v) = %+v: none is owned here", pool, s)
		}
	}
	for _, tc := range []struct {
		tenant ids.Tenant
		pool   ids.Pool
		want   bool
	}{{w.acme, w.shared, true}, {w.acme, w.acmePool, true}, {w.other, w.acmePool, false}, {w.acme, id[ids.Pool](99), false}} {
		if got := d.MayUse(tc.tenant, tc.pool); got != tc.want {
			t.Errorf("MayUse(%v, %v) = %v", tc.tenant, tc.pool, got)
		}
	}
	if len(d.Sources()) != 6 || d.ReturnPathKeys()[0].ID != 2 || d.View().Revision != 7 || d.Document().Queue.RetryMax != 4*hour {
		t.Error("the view does not come through")
	}
	if p, ok := d.PoolByName("far"); !ok || p.ID != w.far {
		t.Error("PoolByName")
	}
	if p, ok := d.Pool(w.acmePool); !ok || p.Name != "acme-own" {
		t.Error("Pool")
	}
	if c, ok := d.Credential(w.credential); !ok || c.Project != w.shop {
		t.Error("Credential")
	}
	if _, ok := d.Credential(ids.Credential{}); ok {
		t.Error("the zero credential must be unknown")
	}
	if n, ok := d.Tenant(w.other); !ok || n.Name != "other" {
		t.Error("Tenant")
	}
	if n, ok := d.Project(w.news); !ok || n.Tenant != w.acme {
		t.Error("Project")
	}
}

func TestCompileRefuses(t *testing.T) {
	for _, tc := range []struct {
		name  string
		spoil func(*world)
		want  string
	}{
		{"document out of range", func(w *world) { w.view.Document.Queue.Retry = nil }, "queue.retry"},
		{"tenant twice", func(w *world) { w.view.Tenants[1].Name = "acme" }, "view.tenants[1]"},
		{"project without tenant", func(w *world) { w.view.Projects[0].Tenant = ids.Tenant{} }, "view.projects[0].tenant"},
		{"credential for a foreign project", func(w *world) { w.view.Credentials[0].Project = w.otherProject }, "view.credentials[0].project"},
		{"domain not in normal form", func(w *world) { w.view.Domains[0].Name = "Acme.example" }, "view.domains[0].name"},
		{"domain twice", func(w *world) { w.view.Domains[1].Name = "acme.example" }, "view.domains[1].name"},
		{"return path of another tenant", func(w *world) { w.view.Domains[2].ReturnPath = "rp.acme.example" }, "view.domains[2].return_path"},
		{"pool of a strange kind", func(w *world) { w.view.Pools[0].Kind = "rented" }, "view.pools[0].kind"},
		{"dedicated to nobody", func(w *world) { w.view.Pools[1].Tenant = ids.Tenant{} }, "view.pools[1].tenant"},
		{"shared with an owner", func(w *world) { w.view.Pools[0].Tenant = w.acme }, "view.pools[0].tenant"},
		{"pool name twice", func(w *world) { w.view.Pools[2].Name = "default" }, "view.pools[2]"},
		{"source in no known pool", func(w *world) { w.view.Sources[0].Pool = id[ids.Pool](99) }, "view.sources[0].pool"},
		{"address twice on a relay", func(w *world) { w.view.Sources[1].Bind = w.view.Sources[0].Bind }, "view.sources[1].bind"},
		{"families differ", func(w *world) { w.view.Sources[1].Public = netip.MustParseAddr("2001:db8::1") }, "view.sources[1].bind"},
		{"key id twice", func(w *world) { w.view.ReturnPathKeys[1].ID = 2 }, "view.return_path_keys[1]"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			w := newWorld(t, nil)
			tc.spoil(w)
			d, err := Compile(&w.view)
			if d != nil || !fault.Is(err, fault.Invalid) || !strings.Contains(fault.Public(err), tc.want) {
				t.Errorf("error %v, want one naming %s", err, tc.want)
			}
		})
	}
	if _, err := Compile(nil); !fault.Is(err, fault.Invalid) {
		t.Errorf("Compile(nil): %v", err)
	}
}

func TestCheckReferences(t *testing.T) {
	w := newWorld(t, nil)
	refs := ReferencesOf(&w.view)
	for _, tc := range []struct {
		name, section, text string
		want                []string
	}{
		{"all known", "streams", `stream = [{ tenant = "acme", project = "shop", name = "x", kind = "bulk", pool = "acme-own" }]`, nil},
		{"unknown tenant", "streams", `stream = [{ tenant = "acne", project = "shop", name = "x", kind = "bulk", pool = "default" }]`,
			[]string{`streams.stream[0].tenant: there is no tenant "acne"`}},
		{"project of another tenant", "streams", `stream = [{ tenant = "other", project = "news", name = "x", kind = "bulk", pool = "default" }]`,
			[]string{`streams.stream[0].project: tenant "other" has no project "news"`}},
		{"unknown pool", "streams", `stream = [{ tenant = "*", project = "*", name = "x", kind = "bulk", pool = "defalt" }]`,
			[]string{`streams.stream[0].pool: there is no pool "defalt"`}},
		{"pool dedicated to another", "streams", `stream = [
			{ tenant = "other", project = "*", name = "x", kind = "bulk", pool = "acme-own" },
			{ tenant = "*", project = "*", name = "x", kind = "bulk", pool = "acme-own" }]`,
			[]string{`streams.stream[0].pool: pool "acme-own" is dedicated to tenant "acme"`, `streams.stream[1].pool`}},
		{"weight of an unknown tenant", "streams", `tenant = [{ name = "acme", weight = 2 }, { name = "acne", weight = 2 }]`,
			[]string{`streams.tenant[1].name: there is no tenant "acne"`}},
		{"weights of known sources", "pools", worldPools, nil},
		{"unknown pool weighed", "pools", "[[pool]]\nname = \"defalt\"", []string{`pools.pool[0].name: there is no pool "defalt"`}},
		{"unknown address", "pools", "[[pool]]\nname = \"far\"\n[pool.weights]\n\"192.0.2.11\" = 1",
			[]string{`pools.pool[0].weights."192.0.2.11": is no source address of pool "far"`}},
	} {
		t.Run(tc.name, func(t *testing.T) {
			doc, err := Parse(map[string]string{tc.section: tc.text})
			if err != nil {
				t.Fatal(err)
			}
			err = CheckReferences(&doc, refs)
			if len(tc.want) == 0 && err != nil {
				t.Fatal(err)
			}
			for _, want := range tc.want {
				if !fault.Is(err, fault.Invalid) || !strings.Contains(fault.Public(err), want) {
					t.Errorf("error %v lacks %q", err, want)
				}
			}
		})
	}
}

// Look-ups are on the path of every message.
func TestLookupsDoNotAllocate(t *testing.T) {
	w, d := compiled(t)
	hosts := []string{"mx1.free.fr", "mx2.free.fr"}
	allocs := testing.AllocsPerRun(100, func() {
		if _, err := d.Stream(w.acme, w.shop, "otp"); err != nil {
			t.Fatal(err)
		}
		d.Credential(w.credential)
		d.Tenant(w.acme)
		d.DomainFor("a.b.news.acme.example")
		d.ReturnPathDomain("rp.acme.example")
		d.MayUse(w.acme, w.shared)
		d.LocalSources(w.shared)
		if _, p := d.Providers().Match(hosts, netip.Addr{}); p.Connections(ScopeSource) != 2 || !p.MessageRate(ScopeSource).Limited() {
			t.Fatal("wrong profile")
		}
	})
	if allocs != 0 {
		t.Errorf("%v allocations a round, want none", allocs)
	}
}

func BenchmarkStream(b *testing.B) {
	w, d := compiled(b)
	b.ReportAllocs()
	for b.Loop() {
		if _, err := d.Stream(w.acme, w.shop, "otp"); err != nil {
			b.Fatal(err)
		}
	}
}

func BenchmarkParseAndCompile(b *testing.B) {
	w := newWorld(b, nil)
	b.ReportAllocs()
	for b.Loop() {
		doc, err := Parse(nil)
		if err != nil {
			b.Fatal(err)
		}
		w.view.Document = doc
		if _, err := Compile(&w.view); err != nil {
			b.Fatal(err)
		}
	}
}
