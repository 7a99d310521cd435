package resolve

import (
	"context"
	"fmt"
	"math/rand/v2"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/miekg/dns"

	"github.com/relais-mta/relais/relay"
	"github.com/relais-mta/relais/shared/fault"
	"github.com/relais-mta/relais/shared/mailaddr"
	"github.com/relais-mta/relais/shared/policy"
)

// show writes a route as "host@pref=addr,addr …" or "status code".
func show(r *Route) string {
	if r.Failure != nil {
		return map[relay.Status]string{relay.Failed: "failed ", relay.Deferred: "deferred "}[r.Failure.Status] + r.Failure.Reply.Enhanced
	}
	var out []string
	for _, h := range r.Hosts {
		var addrs []string
		for _, a := range h.Addrs {
			addrs = append(addrs, a.String())
		}
		out = append(out, fmt.Sprintf("%s@%d=%s", h.Name, h.Pref, strings.Join(addrs, ",")))
	}
	return strings.Join(out, " ")
}

func TestRoute(t *testing.T) {
	z := newZone(t,
		"two.example. 300 IN MX 20 B.mx.example.", "two.example. 300 IN MX 10 a.mx.example.",
		"a.mx.example. 300 IN A 192.0.2.1", "a.mx.example. 300 IN A 192.0.2.2", "a.mx.example. 300 IN AAAA 2001:db8::1",
		"b.mx.example. 300 IN A 192.0.2.3",
		"twice.example. 300 IN MX 20 a.mx.example.", "twice.example. 300 IN MX 5 A.MX.example.",
		"implicit.example. 300 IN A 192.0.2.9",
		"six.example. 300 IN AAAA 2001:db8::9",
		"nothing.example. 300 IN TXT \"x\"",
		"null.example. 300 IN MX 0 .",
		"halfnull.example. 300 IN MX 0 .", "halfnull.example. 300 IN MX 5 b.mx.example.",
		"alias.example. 300 IN CNAME two.example.",
		"chain.example. 300 IN CNAME alias.example.",
		"dangling.example. 300 IN CNAME missing.example.",
		"loop.example. 300 IN CNAME pool.example.", "pool.example. 300 IN CNAME loop.example.",
		"self.example. 300 IN CNAME self.example.",
		"partly.example. 300 IN MX 10 gone.example.", "partly.example. 300 IN MX 20 b.mx.example.",
		"pointless.example. 300 IN MX 10 gone.example.",
		"mxalias.example. 300 IN MX 10 hostalias.example.", "hostalias.example. 300 IN CNAME b.mx.example.",
		"silent.example. 300 IN MX 10 dumb.example.",
		"dumb.example. 300 IN A 192.0.2.8",
		"mixed.example. 300 IN MX 10 dumb.example.", "mixed.example. 300 IN MX 20 b.mx.example.",
		"broken.example. 300 IN MX 10 b.mx.example.",
		"refused.example. 300 IN MX 10 b.mx.example.",
	)
	z.fault("dumb.example", rcode(dns.RcodeServerFailure))
	z.fault("broken.example", rcode(dns.RcodeServerFailure))
	z.fault("refused.example", rcode(dns.RcodeRefused))
	r := newResolver(t, nil, z)
	for _, tc := range []struct {
		domain   mailaddr.Domain
		families Families
		want     string
	}{
		{"two.example", IPv4, "a.mx.example@10=192.0.2.1,192.0.2.2 b.mx.example@20=192.0.2.3"},
		{"two.example", 0, "a.mx.example@10=192.0.2.1,192.0.2.2 b.mx.example@20=192.0.2.3"},
		{"two.example", IPv4 | IPv6, "a.mx.example@10=192.0.2.1,192.0.2.2,2001:db8::1 b.mx.example@20=192.0.2.3"},
		{"two.example", IPv6, "a.mx.example@10=2001:db8::1 b.mx.example@20="},
		{"twice.example", IPv4, "a.mx.example@5=192.0.2.1,192.0.2.2"},
		{"implicit.example", IPv4, "implicit.example@0=192.0.2.9"},
		{"six.example", IPv4, "deferred 4.4.4"},
		{"six.example", IPv4 | IPv6, "six.example@0=2001:db8::9"},
		{"nothing.example", IPv4, "failed 5.1.2"},
		{"nothing.example", IPv4 | IPv6, "failed 5.1.2"},
		{"nxdomain.example", IPv4, "failed 5.1.2"},
		{"null.example", IPv4, "failed 5.1.10"},
		{"halfnull.example", IPv4, "b.mx.example@5=192.0.2.3"},
		{"alias.example", IPv4, "a.mx.example@10=192.0.2.1,192.0.2.2 b.mx.example@20=192.0.2.3"},
		{"chain.example", IPv4, "a.mx.example@10=192.0.2.1,192.0.2.2 b.mx.example@20=192.0.2.3"},
		{"dangling.example", IPv4, "failed 5.1.2"},
		{"loop.example", IPv4, "deferred 4.4.3"},
		{"self.example", IPv4, "deferred 4.4.3"},
		{"partly.example", IPv4, "gone.example@10= b.mx.example@20=192.0.2.3"},
		{"pointless.example", IPv4, "deferred 4.4.4"},
		{"mxalias.example", IPv4, "hostalias.example@10=192.0.2.3"},
		{"silent.example", IPv4, "deferred 4.4.3"},
		{"mixed.example", IPv4, "dumb.example@10= b.mx.example@20=192.0.2.3"},
		{"broken.example", IPv4, "deferred 4.4.3"},
		{"refused.example", IPv4, "deferred 4.4.3"},
		{"[192.0.2.7]", IPv4, "[192.0.2.7]@0=192.0.2.7"},
		{"[IPv6:2001:db8::7]", IPv6, "[IPv6:2001:db8::7]@0=2001:db8::7"},
		{"[IPv6:2001:db8::7]", IPv4, "deferred 4.4.4"},
	} {
		route := r.Route(t.Context(), tc.domain, tc.families)
		if got := show(route); got != tc.want {
			t.Errorf("%s in %d: %s, want %s (%+v)", tc.domain, tc.families, got, tc.want, route.Failure)
		}
		if len(route.Names) != len(route.Hosts) || !time.Now().Before(route.Expires) {
			t.Errorf("%s: names %v, expires %v", tc.domain, route.Names, route.Expires)
		}
	}
	if !r.Route(t.Context(), "implicit.example", IPv4).Implicit || r.Route(t.Context(), "two.example", IPv4).Implicit {
		t.Error("implicit is not told apart")
	}
	// Names stay known for finding the provider when no host is usable.
	if names := r.Route(t.Context(), "pointless.example", IPv4).Names; !slices.Equal(names, []string{"gone.example"}) {
		t.Errorf("names of a pointless MX: %v", names)
	}
	if a := r.Route(t.Context(), "two.example", IPv4).FirstAddr(); a != netip.MustParseAddr("192.0.2.1") {
		t.Errorf("first address %v", a)
	}
}

func TestRefusedAddresses(t *testing.T) {
	own := netip.MustParseAddr("8.8.8.1")
	z := newZone(t,
		"good.example. 300 IN MX 10 good.mx.example.", "good.mx.example. 300 IN A 8.8.4.4", "good.mx.example. 300 IN A 10.0.0.1",
		"loop.example. 300 IN MX 10 localhost.example.", "localhost.example. 300 IN A 127.0.0.1",
		"zero.example. 300 IN A 0.0.0.0",
		"private.example. 300 IN MX 10 private.mx.example.", "private.mx.example. 300 IN A 192.168.1.1", "private.mx.example. 300 IN A 10.1.1.1",
		"nat.example. 300 IN A 100.64.0.1",
		"ula.example. 300 IN AAAA fd00::1",
		"linklocal.example. 300 IN A 169.254.1.1",
		"own.example. 300 IN MX 10 own.mx.example.", "own.mx.example. 300 IN A 8.8.8.1",
		"backup.example. 300 IN MX 10 good.mx.example.", "backup.example. 300 IN MX 20 own.mx.example.", "backup.example. 300 IN MX 20 other.mx.example.",
		"backup.example. 300 IN MX 30 worse.mx.example.", "other.mx.example. 300 IN A 8.8.4.5", "worse.mx.example. 300 IN A 8.8.4.6",
	)
	r := newResolver(t, func(c *Config) {
		c.AllowPrivate = false
		c.Own = func(a netip.Addr) bool { return a == own }
	}, z)
	for _, tc := range []struct {
		domain mailaddr.Domain
		want   string
	}{
		{"good.example", "good.mx.example@10=8.8.4.4"},
		{"loop.example", "failed 5.4.6"},
		{"zero.example", "failed 5.4.6"},
		{"private.example", "failed 5.4.4"},
		{"nat.example", "failed 5.4.4"},
		{"ula.example", "failed 5.4.4"},
		{"linklocal.example", "failed 5.4.4"},
		{"own.example", "failed 5.4.6"},
		{"backup.example", "good.mx.example@10=8.8.4.4 other.mx.example@20= own.mx.example@20= worse.mx.example@30="},
		{"[127.0.0.1]", "failed 5.4.6"},
		{"[10.0.0.1]", "failed 5.4.4"},
		{"[8.8.8.1]", "failed 5.4.6"},
		{"[8.8.4.4]", "[8.8.4.4]@0=8.8.4.4"},
	} {
		if got := show(r.Route(t.Context(), tc.domain, IPv4|IPv6)); got != tc.want {
			t.Errorf("%s: %s, want %s", tc.domain, got, tc.want)
		}
	}
	lab := newResolver(t, nil, z)
	if got := show(lab.Route(t.Context(), "private.example", IPv4)); got != "private.mx.example@10=192.168.1.1,10.1.1.1" {
		t.Errorf("with private addresses allowed: %s", got)
	}
}

func TestOrder(t *testing.T) {
	addr := []netip.Addr{netip.MustParseAddr("192.0.2.1")}
	r := &Route{Hosts: []Host{{Name: "a", Pref: 5, Addrs: addr}, {Name: "b", Pref: 5, Addrs: addr}, {Name: "c", Pref: 5, Addrs: addr},
		{Name: "dead", Pref: 6}, {Name: "z", Pref: 9, Addrs: addr}}}
	before := fmt.Sprint(r.Hosts)
	rng := rand.New(rand.NewPCG(1, 2))
	firsts := map[string]int{}
	var buf []Host
	for range 3000 {
		buf = r.Order(rng, buf[:0])
		if len(buf) != 4 || buf[3].Name != "z" {
			t.Fatalf("order %v", buf)
		}
		firsts[buf[0].Name]++
	}
	for _, n := range []string{"a", "b", "c"} {
		if firsts[n] < 850 || firsts[n] > 1150 {
			t.Errorf("%s came first %d times of 3000, want about 1000", n, firsts[n])
		}
	}
	if fmt.Sprint(r.Hosts) != before {
		t.Error("the shared route was changed")
	}
}

func TestCacheAndSingleFlight(t *testing.T) {
	z := newZone(t, "busy.example. 300 IN MX 10 mx.example.", "other.example. 300 IN MX 10 mx.example.", "mx.example. 300 IN A 192.0.2.1")
	release := make(chan struct{})
	z.fault("busy.example", func(q *dns.Msg, _ bool) *dns.Msg {
		<-release
		z.mu.Lock()
		defer z.mu.Unlock()
		return z.answer(q, "busy.example.")
	})
	r := newResolver(t, func(c *Config) { c.QueryTimeout = 10 * time.Second }, z)
	if _, ok := r.Cached("busy.example", IPv4, time.Now()); ok {
		t.Fatal("an unknown domain is cached")
	}
	var wg sync.WaitGroup
	for range 50 {
		wg.Go(func() {
			if got := show(r.Route(t.Context(), "busy.example", IPv4)); got != "mx.example@10=192.0.2.1" {
				t.Error(got)
			}
		})
	}
	close(release)
	wg.Wait()
	r.Route(t.Context(), "other.example", IPv4)
	if n := z.count("busy.example MX"); n != 1 {
		t.Errorf("the domain was asked for %d times, want once", n)
	}
	if n := z.count("mx.example A"); n != 1 {
		t.Errorf("the shared host was asked for %d times, want once", n)
	}
	route, ok := r.Cached("busy.example", IPv4, time.Now())
	if !ok || route.Domain != "busy.example" {
		t.Fatal("the route is not cached")
	}
	if _, ok := r.Cached("busy.example", IPv4, route.Expires); ok {
		t.Error("the route is fresh after its time")
	}
	if allocs := testing.AllocsPerRun(100, func() { r.Cached("busy.example", IPv4, route.Resolved) }); allocs != 0 {
		t.Errorf("a cached look-up allocates %v times", allocs)
	}
}

func TestTTLBounds(t *testing.T) {
	z := newZone(t, "short.example. 0 IN MX 10 mx.example.", "long.example. 900000 IN MX 10 mx.example.", "mx.example. 900000 IN A 192.0.2.1",
		"nomx.example. 900 IN TXT x")
	p := &policy.Delivery{MinDNSTTL: policy.Duration(30 * time.Second), MaxDNSTTL: policy.Duration(time.Hour)}
	r := newResolver(t, func(c *Config) { c.Policy = func() *policy.Delivery { return p } }, z)
	for _, tc := range []struct {
		domain mailaddr.Domain
		want   time.Duration
	}{
		{"short.example", 30 * time.Second},
		{"long.example", time.Hour},
		{"missing.example", time.Minute}, // the SOA's minimum
		{"nomx.example", time.Minute},
	} {
		route := r.Route(t.Context(), tc.domain, IPv4)
		if got := route.Expires.Sub(route.Resolved); got > tc.want || got < tc.want-5*time.Second {
			t.Errorf("%s holds for %v, want %v", tc.domain, got, tc.want)
		}
	}
}

func TestStaleWhenDNSFails(t *testing.T) {
	z := newZone(t, "a.example. 300 IN MX 10 mx.example.", "mx.example. 300 IN A 192.0.2.1")
	r := newResolver(t, nil, z)
	key := routeKey{"a.example", IPv4}
	if got := show(r.Route(t.Context(), "a.example", IPv4)); got != "mx.example@10=192.0.2.1" {
		t.Fatal(got)
	}
	age := func(by time.Duration) {
		e, _ := r.routes.get(key)
		old := *e.value
		old.Resolved, old.Expires = old.Resolved.Add(-by), old.Expires.Add(-by)
		r.routes.put(key, entry[*Route]{value: &old, expires: old.Expires, drop: old.Expires.Add(maxStale)}, time.Now())
	}
	z.fault("a.example", rcode(dns.RcodeServerFailure))
	age(time.Hour)
	route := r.Route(t.Context(), "a.example", IPv4)
	if got := show(route); got != "mx.example@10=192.0.2.1" || !route.Stale {
		t.Errorf("an hour after: %s, stale %v", got, route.Stale)
	}
	if _, ok := r.Cached("a.example", IPv4, time.Now()); !ok {
		t.Error("the stale route is not used again at once")
	}
	// A name that turns out not to exist is believed at once.
	z.fault("a.example", rcode(dns.RcodeNameError))
	age(time.Hour)
	if got := show(r.Route(t.Context(), "a.example", IPv4)); got != "failed 5.1.2" {
		t.Errorf("NXDOMAIN: %s", got)
	}
	// And a route that is too old is not used.
	z.fault("a.example", nil)
	r.routes.remove(key)
	r.Route(t.Context(), "a.example", IPv4)
	z.fault("a.example", rcode(dns.RcodeServerFailure))
	age(maxStale + 2*time.Hour)
	if got := show(r.Route(t.Context(), "a.example", IPv4)); got != "deferred 4.4.3" {
		t.Errorf("too old: %s", got)
	}
}

func TestNextServer(t *testing.T) {
	bad := newZone(t)
	good := newZone(t, "a.example. 300 IN MX 10 mx.example.", "mx.example. 300 IN A 192.0.2.1")
	for name, f := range map[string]func(*dns.Msg, bool) *dns.Msg{"SERVFAIL": rcode(dns.RcodeServerFailure), "refused": rcode(dns.RcodeRefused), "silent": silence} {
		bad.fault("a.example", f)
		bad.fault("mx.example", f)
		// It passes once, for the silent one, and must be enough for the good one.
		r := newResolver(t, func(c *Config) { c.QueryTimeout = time.Second }, bad, good)
		if got := show(r.Route(t.Context(), "a.example", IPv4)); got != "mx.example@10=192.0.2.1" {
			t.Errorf("%s: %s", name, got)
		}
		if r.preferred.Load() != 1 {
			t.Errorf("%s: the server that answers is not preferred", name)
		}
	}
}

func TestUnansweredIsTemporary(t *testing.T) {
	z := newZone(t)
	z.fault("a.example", silence)
	r := newResolver(t, func(c *Config) { c.QueryTimeout = 20 * time.Millisecond }, z)
	route := r.Route(t.Context(), "a.example", IPv4)
	if got := show(route); got != "deferred 4.4.3" {
		t.Errorf("%s", got)
	}
	z.await(t, "a.example MX", minAttempts)
	if time.Until(route.Expires) > temporaryTTL {
		t.Error("a temporary failure is kept too long")
	}
}

func TestContextEnds(t *testing.T) {
	z := newZone(t)
	z.fault("a.example", silence)
	r := newResolver(t, func(c *Config) { c.QueryTimeout = 300 * time.Millisecond }, z)
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if got := show(r.Route(ctx, "a.example", IPv4)); got != "deferred 4.4.3" {
		t.Errorf("%s", got)
	}
	if _, ok := r.Cached("a.example", IPv4, time.Now()); ok {
		t.Error("a look-up that was given up is remembered")
	}
}

func TestTruncatedGoesOverTCP(t *testing.T) {
	z := newZone(t)
	var records []string
	for i := range 200 {
		records = append(records, fmt.Sprintf("big.example. 300 IN MX %d mx%d.a-rather-long-name-to-fill-the-answer.example.", i, i),
			fmt.Sprintf("mx%d.a-rather-long-name-to-fill-the-answer.example. 300 IN A 192.0.2.%d", i, i))
	}
	z.add(t, records...)
	z.fault("big.example", func(q *dns.Msg, overUDP bool) *dns.Msg {
		if overUDP {
			m := new(dns.Msg).SetReply(q)
			m.Truncated = true
			return m
		}
		z.mu.Lock()
		defer z.mu.Unlock()
		return z.answer(q, "big.example.")
	})
	r := newResolver(t, nil, z)
	route := r.Route(t.Context(), "big.example", IPv4)
	if len(route.Hosts) != maxHosts || route.Hosts[0].Pref != 0 || route.Hosts[maxHosts-1].Pref != maxHosts-1 {
		t.Errorf("%d hosts, want the best %d: %s", len(route.Hosts), maxHosts, show(route))
	}
}

func TestServerWithoutEDNS(t *testing.T) {
	z := newZone(t, "a.example. 300 IN MX 10 mx.example.", "mx.example. 300 IN A 192.0.2.1")
	z.mu.Lock()
	z.noEDNS = true
	z.mu.Unlock()
	r := newResolver(t, nil, z)
	if got := show(r.Route(t.Context(), "a.example", IPv4)); got != "mx.example@10=192.0.2.1" {
		t.Errorf("%s", got)
	}
}

func TestForeignAnswersAreNotBelieved(t *testing.T) {
	z := newZone(t)
	evil, _ := dns.NewRR("a.example. 300 IN MX 10 evil.example.")
	for name, f := range map[string]func(*dns.Msg) *dns.Msg{
		"another question": func(q *dns.Msg) *dns.Msg {
			m := new(dns.Msg).SetReply(q)
			m.Question[0].Name = "b.example."
			m.Answer = []dns.RR{evil}
			return m
		},
		"another type": func(q *dns.Msg) *dns.Msg {
			m := new(dns.Msg).SetReply(q)
			m.Question[0].Qtype = dns.TypeTXT
			m.Answer = []dns.RR{evil}
			return m
		},
		"a query": func(q *dns.Msg) *dns.Msg {
			m := new(dns.Msg).SetReply(q)
			m.Response = false
			m.Answer = []dns.RR{evil}
			return m
		},
		"another id": func(q *dns.Msg) *dns.Msg {
			m := new(dns.Msg).SetReply(q)
			m.Id++
			m.Answer = []dns.RR{evil}
			return m
		},
	} {
		z.fault("a.example", func(q *dns.Msg, _ bool) *dns.Msg { return f(q.Copy()) })
		r := newResolver(t, func(c *Config) { c.QueryTimeout = 50 * time.Millisecond }, z)
		if got := show(r.Route(t.Context(), "a.example", IPv4)); got != "deferred 4.4.3" {
			t.Errorf("%s: %s", name, got)
		}
	}
	// Records of another owner in an honest answer are left aside.
	z.fault("a.example", func(q *dns.Msg, _ bool) *dns.Msg {
		m := new(dns.Msg).SetReply(q)
		rr, _ := dns.NewRR("b.example. 300 IN MX 10 evil.example.")
		m.Answer = []dns.RR{rr}
		return m
	})
	r := newResolver(t, nil, z)
	if route := r.Route(t.Context(), "a.example", IPv4); slices.Contains(route.Names, "evil.example") {
		t.Errorf("%s", show(route))
	}
}

func TestCacheIsBounded(t *testing.T) {
	c := newCache[int](100, 1<<20, func(int) int { return 1 })
	now := time.Unix(1_800_000_000, 0)
	for i := range 1000 {
		c.put(i, entry[int]{value: i, expires: now.Add(time.Duration(i) * time.Second), drop: now.Add(time.Hour)}, now)
		if c.len() > 100 {
			t.Fatalf("%d entries, the bound is 100", c.len())
		}
	}
	if e, ok := c.get(999); !ok || e.value != 999 {
		t.Error("the newest entry is gone")
	}
	later := now.Add(2 * time.Hour)
	c.put(-1, entry[int]{expires: later, drop: later}, later)
	if c.len() > 100-evictionSample+1 {
		t.Errorf("%d entries remain: useless ones were not dropped", c.len())
	}
}

func TestSystemServers(t *testing.T) {
	path := filepath.Join(t.TempDir(), "resolv.conf")
	if err := os.WriteFile(path, []byte("search x\nnameserver 192.0.2.53\nnameserver 2001:db8::53\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	got, err := SystemServers(path)
	want := []netip.AddrPort{netip.MustParseAddrPort("192.0.2.53:53"), netip.MustParseAddrPort("[2001:db8::53]:53")}
	if err != nil || !slices.Equal(got, want) {
		t.Errorf("%v, %v", got, err)
	}
	if _, err := SystemServers(path + "x"); !fault.Is(err, fault.NotFound) {
		t.Errorf("missing file: %v", err)
	}
	if err := os.WriteFile(path, []byte("search x\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := SystemServers(path); !fault.Is(err, fault.Invalid) {
		t.Errorf("no server: %v", err)
	}
	if _, err := New(Config{}); !fault.Is(err, fault.Invalid) {
		t.Errorf("no resolvers: %v", err)
	}
}

func BenchmarkCached(b *testing.B) {
	z := newZone(b, "a.example. 300 IN MX 10 mx.example.", "mx.example. 300 IN A 192.0.2.1")
	r := newResolver(b, nil, z)
	now := r.Route(b.Context(), "a.example", IPv4).Resolved
	for b.Loop() {
		if _, ok := r.Cached("a.example", IPv4, now); !ok {
			b.Fatal("not cached")
		}
	}
}
