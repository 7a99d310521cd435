package policy

import (
	"net/netip"
	"slices"
	"strings"
	"testing"
	"time"

	"pgregory.net/rapid"

	"github.com/relais-mta/relais/shared/throttle"
)

func tableOf(t testing.TB, providers string) *ProviderTable {
	t.Helper()
	doc, err := Parse(map[string]string{"providers": providers})
	if err != nil {
		t.Fatal(err)
	}
	var p problems
	table := newProviderTable(&doc.Providers, &p)
	if err := p.err("test"); err != nil {
		t.Fatal(err)
	}
	return table
}

func TestMatch(t *testing.T) {
	table := tableOf(t, "")
	ip := netip.MustParseAddr("192.0.2.7")
	for _, tc := range []struct {
		name  string
		hosts []string
		ip    netip.Addr
		want  string
	}{
		{"all hosts of one provider", []string{"aspmx.l.google.com", "alt1.aspmx.l.google.com", "aspmx2.googlemail.com"}, ip, "google"},
		{"the suffix itself", []string{"mx.microsoft"}, ip, "exchange-online"},
		{"longest suffix wins", []string{"hotmail-com.olc.protection.outlook.com"}, ip, "microsoft-consumer"},
		{"its sibling", []string{"acme-com.mail.protection.outlook.com"}, ip, "exchange-online"},
		{"a region of a filter", []string{"eu-smtp-inbound-1.mimecast.com", "eu-smtp-inbound-2.mimecast.com"}, ip, "mimecast-eu"},
		{"no label boundary", []string{"mx.notgoogle.com"}, ip, "mx:notgoogle.com"},
		{"one host elsewhere", []string{"aspmx.l.google.com", "backup.example.net"}, ip, "mx:google.com"},
		{"first host elsewhere", []string{"mx.example.net", "aspmx.l.google.com"}, ip, "mx:example.net"},
		{"two providers", []string{"mx1.free.fr", "smtp-in.orange.fr"}, ip, "mx:free.fr"},
		{"unlisted", []string{"mx1.mail.example.co.uk", "mx2.mail.example.co.uk"}, ip, "mx:example.co.uk"},
		{"registrable below an unknown top level", []string{"a.mx.boutique.test"}, ip, "mx:boutique.test"},
		{"host is a public suffix", []string{"co.uk"}, ip, "mx:192.0.2.7"},
		{"host is a public suffix, no address", []string{"co.uk"}, netip.Addr{}, "mx:co.uk"},
		{"address literal", []string{"[192.0.2.9]"}, ip, "mx:192.0.2.9"},
		{"IPv6 literal", []string{"[IPv6:2001:db8::9]"}, ip, "mx:2001:db8::9"},
		{"MX names an address", []string{"192.0.2.9"}, ip, "mx:192.0.2.9"},
		{"nothing known", nil, netip.Addr{}, "mx:unknown"},
		{"no host", nil, netip.MustParseAddr("::ffff:192.0.2.7"), "mx:192.0.2.7"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			name, p := table.Match(tc.hosts, tc.ip)
			if name != tc.want {
				t.Errorf("Match(%q) = %q, want %q", tc.hosts, name, tc.want)
			}
			if strings.HasPrefix(name, UnlistedPrefix) != (p == table.Default()) {
				t.Errorf("%q has the wrong profile %+v", name, p)
			}
			if named, ok := table.Named(name); !ok || named != p {
				t.Errorf("Named(%q) = %v, %v, want the matched profile", name, named, ok)
			}
		})
	}
	if _, ok := table.Named("gmail"); ok {
		t.Error("a name that no provider has must be unknown")
	}
}

func TestShippedLimits(t *testing.T) {
	table := tableOf(t, "")
	for _, tc := range []struct {
		name                                   string
		connections, perConnection, recipients int
		tls                                    TLSMode
	}{
		{"google", 5, 50, 100, TLSRequired},
		{"yahoo", 10, 20, 100, TLSOpportunistic},
		{"microsoft-consumer", 5, 50, 100, TLSOpportunistic},
		{"exchange-online", 5, 50, 100, TLSOpportunistic},
		{"apple", 10, 5, 100, TLSOpportunistic},
		{"orange", 2, 100, 100, TLSOpportunistic},
		{"laposte", 2, 100, 100, TLSOpportunistic},
		{"sfr", 2, 100, 100, TLSOpportunistic},
		{"free", 2, 100, 100, TLSOpportunistic},
		{"bouygues", 2, 50, 100, TLSOpportunistic},
		{"gmx", 4, 20, 100, TLSRequired},
		{"qq", 4, 8, 100, TLSOpportunistic},
		{"netease", 4, 7, 100, TLSOpportunistic},
		{"kpn", 10, 10, 100, TLSOpportunistic},
		{"barracuda", 10, 15, 100, TLSOpportunistic},
		{"mimecast", 10, 100, 100, TLSOpportunistic},
		{"mx:example.net", 10, 100, 100, TLSOpportunistic},
	} {
		p, ok := table.Named(tc.name)
		if !ok {
			t.Errorf("%s is not shipped", tc.name)
			continue
		}
		if p.Connections(ScopeSource) != tc.connections || p.MessagesPerConnection() != tc.perConnection ||
			p.RecipientsPerTransaction() != tc.recipients || p.TLS != tc.tls || p.Connections(ScopeRelay) != 0 {
			t.Errorf("%s: %+v, want %+v", tc.name, p, tc)
		}
		if !p.MessageRate(ScopeSource).Limited() || p.MessageRate(ScopeRelay).Limited() {
			t.Errorf("%s: message rate %+v", tc.name, p.messageRate)
		}
	}
	if got, want := table.Default().MessageRate(ScopeSource), (Rate{Max: 100, Per: time.Second, Burst: 20}); got != want {
		t.Errorf("default rate %+v, want %+v", got, want)
	}
}

func TestOverrides(t *testing.T) {
	text := func(provider, kind, scope, rest string) string {
		return "[[limit]]\nprovider = \"" + provider + "\"\nkind = \"" + kind + "\"\nscope = \"" + scope + "\"\n" + rest + "\n"
	}
	table := tableOf(t, strings.Join([]string{
		text("orange", "connections", "source", "max = 1"),
		text("orange", "connections", "relay", "max = 3"),
		text("*", "connections", "source", "max = 7"), // comes first although it stands later
		text("mx:example.net", "message_rate", "source", "max = 1\nper = \"1m\""),
		text("google", "message_rate", "source", "max = 0"),
		text("free", "message_rate", "source", "max = 5\nper = \"1m\""),
		text("free", "message_rate", "source", "max = 9\nper = \"1h\"\nburst = 4"), // the later one counts
	}, ""))
	get := func(name string) *Profile {
		p, ok := table.Named(name)
		if !ok {
			t.Fatalf("%s is unknown", name)
		}
		return p
	}
	if p := get("orange"); p.Connections(ScopeSource) != 1 || p.Connections(ScopeRelay) != 3 || p.MessagesPerConnection() != 100 {
		t.Errorf("orange %+v", p)
	}
	for _, name := range []string{"google", "mx:elsewhere.test", "mx:example.net"} {
		if n := get(name).Connections(ScopeSource); n != 7 {
			t.Errorf("%s: %d connections, want 7", name, n)
		}
	}
	if get("google").MessageRate(ScopeSource).Limited() {
		t.Error("max 0 must remove the limit")
	}
	if got, want := get("free").MessageRate(ScopeSource), (Rate{Max: 9, Per: time.Hour, Burst: 4}); got != want {
		t.Errorf("free %+v, want %+v", got, want)
	}
	if got, want := get("mx:example.net").MessageRate(ScopeSource), (Rate{Max: 1, Per: time.Minute, Burst: 1}); got != want {
		t.Errorf("mx:example.net %+v, want %+v", got, want)
	}
	name, p := table.Match([]string{"mx.example.net"}, netip.Addr{})
	if name != "mx:example.net" || p != get("mx:example.net") || p == table.Default() {
		t.Error("an unlisted provider's own limits are not found by its hosts")
	}
}

func TestOpenPolicyHasNoLimits(t *testing.T) {
	kinds := []LimitKind{Connections, MessagesPerConnection, RecipientsPerTransaction, MessageRate, ConnectionRate}
	var text strings.Builder
	for _, k := range kinds {
		text.WriteString("[[limit]]\nprovider = \"*\"\nkind = \"" + string(k) + "\"\nscope = \"source\"\nmax = 0\n")
	}
	table := tableOf(t, text.String())
	profiles := []*Profile{table.Default()}
	for _, p := range table.byName {
		profiles = append(profiles, p)
	}
	for _, p := range profiles {
		if p.Connections(ScopeSource) != 0 || p.MessagesPerConnection() != 0 || p.RecipientsPerTransaction() != 0 ||
			p.MessageRate(ScopeSource).Limited() || p.ConnectionRate(ScopeSource).Limited() {
			t.Errorf("%q is still limited: %+v", p.Name, p)
		}
	}
}

// The throttle takes every rate that validation lets through.
func TestValidRatesCanBeEnforced(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		l := Limit{
			Kind: MessageRate, Scope: ScopeSource,
			Max:   rapid.IntRange(1, maxLimitCount).Draw(t, "max"),
			Per:   Duration(rapid.Int64Range(int64(second), int64(day)).Draw(t, "per")),
			Burst: rapid.IntRange(0, maxBurst).Draw(t, "burst"),
		}
		var p problems
		if l.validate("limit", 1, &p); len(p.list) > 0 {
			return
		}
		if _, err := throttle.NewRate(l.Max, l.Per.D(), max(l.Burst, 1)); err != nil {
			t.Fatalf("%+v is valid, yet: %v", l, err)
		}
	})
}

// Whatever hosts are given, a listed provider is one whose suffix covers each
// of them, and no longer suffix of another provider does.
func FuzzMatch(f *testing.F) {
	for _, s := range []string{"aspmx.l.google.com", "mx1.free.fr mx2.free.fr", "a.b.c", "", ".", "..", "com", "[1.2.3.4]"} {
		f.Add(s)
	}
	doc := defaultDocument(f)
	table := tableOf(f, "")
	f.Fuzz(func(t *testing.T, text string) {
		hosts := strings.Fields(text)
		name, p := table.Match(hosts, netip.Addr{})
		if p == nil || name == "" {
			t.Fatalf("no provider for %q", hosts)
		}
		if strings.HasPrefix(name, UnlistedPrefix) {
			return
		}
		i := slices.IndexFunc(doc.Providers.Provider, func(pr Provider) bool { return pr.Name == name })
		if i < 0 {
			t.Fatalf("%q gave the unknown provider %q", hosts, name)
		}
		for _, h := range hosts {
			covered := func(s string) bool { return h == s || strings.HasSuffix(h, "."+s) }
			if !slices.ContainsFunc(doc.Providers.Provider[i].MXSuffixes, covered) {
				t.Fatalf("%q is no host of %q", h, name)
			}
		}
	})
}

func BenchmarkMatch(b *testing.B) {
	table := tableOf(b, "")
	hosts := []string{"gmail-smtp-in.l.google.com", "alt1.gmail-smtp-in.l.google.com", "alt2.gmail-smtp-in.l.google.com"}
	b.ReportAllocs()
	for b.Loop() {
		if name, _ := table.Match(hosts, netip.Addr{}); name != "google" {
			b.Fatal(name)
		}
	}
}
