package mailaddr

import (
	"strings"
	"testing"
)

func TestParse(t *testing.T) {
	for _, tc := range []struct{ in, want string }{
		{"joe@example.com", "joe@example.com"},
		{"Joe@EXAMPLE.com.", "Joe@example.com"},
		{`"joe"@example.com`, "joe@example.com"},
		{`"j o"@example.com`, `"j o"@example.com`},
		{`"a\"b"@example.com`, `"a\"b"@example.com`},
		{"joe@bücher.example", "joe@xn--bcher-kva.example"},
		{"joe@xn--bcher-kva.example", "joe@xn--bcher-kva.example"},
		{"joe@[192.0.2.1]", "joe@[192.0.2.1]"},
		{"joe@[ipv6:2001:DB8::1]", "joe@[IPv6:2001:db8::1]"},
		{"a+b=c@_srv.example", "a+b=c@_srv.example"},
	} {
		got, err := Parse(tc.in)
		if err != nil || got.String() != tc.want {
			t.Errorf("Parse(%q) = %q, %v, want %q", tc.in, got, err, tc.want)
		}
	}
	for _, in := range []string{
		"", "joe", "@example.com", "joe@", "j..e@example.com", ".j@example.com", "j.@example.com", "j e@example.com",
		"joe@exa mple.com", "joe@-a.example", "joe@a-.example", "joe@a..b", "joe@[300.1.1.1]", "joe@[192.0.2.1", `"joe@example.com`,
		"joe@example.com\r\nRCPT", "joe\x00@example.com", "jö@example.com", strings.Repeat("a", 65) + "@example.com",
		"a@" + strings.Repeat("a.", 127) + "example",
		"a@" + strings.Repeat("b", 64) + ".example", "<joe@example.com>", "joe@exam\tple.com", "a@b@c d",
	} {
		if got, err := Parse(in); err == nil {
			t.Errorf("Parse(%q) = %q, want an error", in, got)
		}
	}
}

func TestIsSubdomainOf(t *testing.T) {
	for _, tc := range []struct {
		d, p Domain
		want bool
	}{{"a.b", "a.b", true}, {"x.a.b", "a.b", true}, {"xa.b", "a.b", false}, {"b", "a.b", false}} {
		if got := tc.d.IsSubdomainOf(tc.p); got != tc.want {
			t.Errorf("%q below %q = %v", tc.d, tc.p, got)
		}
	}
}

func FuzzParse(f *testing.F) {
	for _, s := range []string{"joe@example.com", `"a\"b"@[192.0.2.1]`, "jö@bücher.example", `"\\"@a`} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, s string) {
		a, err := Parse(s)
		if err != nil {
			return
		}
		text := a.String()
		if strings.ContainsAny(text, "\r\n\x00<> \t") && !strings.HasPrefix(a.Local, `"`) {
			t.Fatalf("%q parsed to %q", s, text)
		}
		again, err := Parse(text)
		if err != nil && len(text) <= MaxPathBytes-2 && len(a.Local) <= MaxLocalBytes {
			t.Fatalf("%q parsed to %q, which does not parse: %v", s, text, err)
		}
		if err == nil && again != a {
			t.Fatalf("%q is %q, then %q", s, a, again)
		}
	})
}
