package mailaddr

import (
	"strings"
	"testing"
	"unicode/utf8"
)

func TestParseUTF8(t *testing.T) {
	for in, want := range map[string]string{
		"jos\u00e9@example.com":                       "jos\u00e9@example.com",
		"\u7528\u6237@\u4f8b\u5b50.example":           "\u7528\u6237@xn--fsqu00a.example",
		"joe@example.com":                             "joe@example.com",
		"\"jos\u00e9 x\"@example.com":                 "\"jos\u00e9 x\"@example.com",
		"\"jos\u00e9\"@example.com":                   "jos\u00e9@example.com",
		"jos\xe9@example.com":                         "",
		"a\u0085b@example.com":                        "",
		"a\u2028b@example.com":                        "",
		".\u00e9@example.com":                         "",
		"\u00e9 x@example.com":                        "",
		strings.Repeat("\u00e9", 33) + "@example.com": "", // 66 octets
	} {
		got, err := ParseUTF8(in)
		if (err == nil) != (want != "") || err == nil && got.String() != want {
			t.Errorf("ParseUTF8(%q) = %q, %v; want %q", in, got, err, want)
		}
		if ascii := len(got.Local) == utf8.RuneCountInString(got.Local); err == nil && got.IsASCII() != ascii {
			t.Errorf("%q is ASCII: %v", got, got.IsASCII())
		}
	}
}

// What Parse takes ParseUTF8 takes alike; what it takes beyond is UTF-8 that no
// command or header field can be broken with, and reads back as itself.
func FuzzParseUTF8(f *testing.F) {
	for _, s := range []string{"joe@example.com", "jos\u00e9@b\u00fccher.example", "\"\u00e9\\\\\"@a", "a\u0085@b"} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, s string) {
		a, err := ParseUTF8(s)
		if plain, plainErr := Parse(s); plainErr == nil && (err != nil || a != plain) {
			t.Fatalf("%q is %q for Parse and %q, %v for ParseUTF8", s, plain, a, err)
		}
		if err != nil {
			return
		}
		text := a.String()
		if !utf8.ValidString(text) || strings.ContainsAny(text, "\r\n\x00\u0085\u2028\u2029") || strings.ContainsAny(text, "<> \t") && a.Local[0] != '"' {
			t.Fatalf("%q parsed to %q", s, text)
		}
		if again, err := ParseUTF8(text); len(text) <= MaxPathBytes-2 && len(a.Local) <= MaxLocalBytes && (err != nil || again != a) {
			t.Fatalf("%q parsed to %q, which parses to %q, %v", s, text, again, err)
		}
	})
}
