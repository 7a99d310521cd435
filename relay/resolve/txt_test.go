package resolve

import (
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/miekg/dns"
)

// TestText: what DNS says about text is told apart from what it does not say.
func TestText(t *testing.T) {
	long := strings.Repeat("0123456789", 20)
	z := newZone(t, `k1._domainkey.a.example. 300 IN TXT "v=DKIM1; p=" "`+long+`" "`+long+`"`,
		"alias._domainkey.a.example. 60 IN CNAME k1._domainkey.a.example.", "other.a.example. 300 IN A 192.0.2.1",
		`two.a.example. 300 IN TXT "one"`, `two.a.example. 300 IN TXT "two"`)
	for i := range 9 {
		z.add(t, `huge.a.example. 300 IN TXT `+strings.Repeat(`"`+strings.Repeat(string(rune('a'+i)), 255)+`" `, 40))
	}
	z.fault("failing.a.example", rcode(dns.RcodeServerFailure))
	z.fault("silent.a.example", silence)
	r := newResolver(t, func(c *Config) { c.QueryTimeout = 500 * time.Millisecond }, z)
	for _, tc := range []struct {
		name    string
		records []string
		missing string
		err     bool
		ttl     time.Duration
	}{
		{name: "k1._domainkey.a.example", records: []string{"v=DKIM1; p=" + long + long}, ttl: 300 * time.Second},
		{name: "alias._domainkey.a.example", records: []string{"v=DKIM1; p=" + long + long}, ttl: 60 * time.Second},
		{name: "two.a.example", records: []string{"one", "two"}, ttl: 300 * time.Second},
		{name: "other.a.example", missing: "no TXT record", ttl: 60 * time.Second},
		{name: "nothing.a.example", missing: "NXDOMAIN", ttl: 60 * time.Second},
		{name: "failing.a.example", err: true},
		{name: "silent.a.example", err: true},
		{name: "huge.a.example", err: true},
	} {
		for i, got := range append(r.TextEverywhere(t.Context(), tc.name), r.Text(t.Context(), tc.name)) {
			slices.Sort(got.Records)
			if !slices.Equal(got.Records, tc.records) || got.Missing != tc.missing || got.Err != nil != tc.err || got.TTL != tc.ttl {
				t.Errorf("%s, answer %d: %+v", tc.name, i, got)
			}
		}
	}
}

// TestTextEverywhere: each server is asked by itself, whatever the others say.
func TestTextEverywhere(t *testing.T) {
	right := newZone(t, `a.example. 300 IN TXT "right"`)
	stale := newZone(t, `a.example. 300 IN TXT "stale"`)
	dead := newZone(t)
	dead.fault("a.example", silence)
	r := newResolver(t, func(c *Config) { c.QueryTimeout = 500 * time.Millisecond }, stale, dead, right)
	got := r.TextEverywhere(t.Context(), "a.example")
	if len(got) != 3 || !slices.Equal(got[0].Records, []string{"stale"}) || got[1].Err == nil || !slices.Equal(got[2].Records, []string{"right"}) || got[2].Server != right.addr {
		t.Errorf("%+v", got)
	}
	dead.await(t, "a.example TXT", 2)
	if before, n := right.count("a.example TXT"), 0; before == 1 {
		r.TextEverywhere(t.Context(), "a.example")
		if n = right.count("a.example TXT"); n != 2 {
			t.Errorf("%d questions after a second look-up, want 2: nothing is cached", n)
		}
	}
}
