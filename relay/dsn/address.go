package dsn

import (
	"fmt"
	"strconv"
	"strings"
	"unicode/utf8"

	"github.com/relais-mta/relais/shared/mailaddr"
)

// typeUTF8 is the address type of RFC 6533 section 3.
const typeUTF8 = "utf-8"

// final writes an address with its type.
func (w *writer) final(a mailaddr.Address) string {
	s := a.String()
	switch {
	case printable(s):
		return "rfc822; " + s
	case w.wide:
		return typeUTF8 + "; " + s
	}
	return typeUTF8 + "; " + escapeUTF8(s)
}

// original returns the text of an ORCPT in the form that its field has: for
// utf-8 addresses as they are in a report of RFC 6533 and with ASCII escapes in
// another (section 3), for others without their xtext.
func (w *writer) original(kind, text string) string {
	if !strings.EqualFold(kind, typeUTF8) {
		return xtext(text)
	}
	plain, ok := unescapeUTF8(text)
	switch {
	case !ok && w.wide:
		return text
	case !ok:
		return escapeUTF8(text)
	case w.wide:
		return plain
	}
	return escapeUTF8(plain)
}

// escapeUTF8 writes utf-8-addr-xtext (RFC 6533 section 3).
func escapeUTF8(s string) string {
	var out strings.Builder
	for _, r := range s {
		if r > ' ' && r <= '~' && r != '+' && r != '=' && r != '\\' {
			out.WriteByte(byte(r))
			continue
		}
		fmt.Fprintf(&out, `\x{%02X}`, r)
	}
	return out.String()
}

// unescapeUTF8 reads utf-8-addr-xtext and utf-8-addr-unitext. False: s is
// neither, or stands for something that cannot be shown.
func unescapeUTF8(s string) (string, bool) {
	var out strings.Builder
	for rest := s; rest != ""; {
		plain, tail, found := strings.Cut(rest, `\`)
		out.WriteString(plain)
		if !found {
			break
		}
		digits, after, ok := strings.Cut(tail, "}")
		digits, opened := strings.CutPrefix(digits, "x{")
		n, err := strconv.ParseUint(digits, 16, 21)
		if !ok || !opened || err != nil || len(digits) > 6 || !utf8.ValidRune(rune(n)) {
			return "", false
		}
		out.WriteRune(rune(n))
		rest = after
	}
	plain := out.String()
	return plain, printableUTF8(plain)
}

// printableUTF8 reports whether s is UTF-8 without control characters and
// separators of lines.
func printableUTF8(s string) bool {
	for _, r := range s {
		if !isShown(r) {
			return false
		}
	}
	return utf8.ValidString(s)
}

func isShown(r rune) bool {
	return r >= ' ' && r <= '~' || r > 0x9f && r != utf8.RuneError && r != 0x2028 && r != 0x2029
}

// printable reports whether s holds visible ASCII and spaces only.
func printable(s string) bool {
	for i := 0; i < len(s); i++ {
		if s[i] < 0x20 || s[i] > 0x7e {
			return false
		}
	}
	return true
}

// clean returns s with everything that could forge a field, and in a report
// that is not wide everything but ASCII, replaced; it is at most limit bytes
// long, and an ellipsis. The status part is 7-bit (RFC 3464 section 2.1) or
// UTF-8 (RFC 6533 section 4).
func clean(s string, limit int, wide bool) string {
	var out strings.Builder
	for _, r := range s {
		switch {
		case out.Len() >= limit:
			return out.String() + "..."
		case r == '\t' || r == '\r' || r == '\n':
			out.WriteByte(' ')
		case r >= ' ' && r <= '~' || wide && isShown(r):
			out.WriteRune(r)
		default:
			out.WriteByte('?')
		}
	}
	return strings.TrimSpace(out.String())
}

// xtext decodes RFC 3461 section 4; text that is not xtext, or whose decoded
// form is not printable ASCII, is returned as it is.
func xtext(s string) string {
	if !strings.Contains(s, "+") {
		return s
	}
	var out strings.Builder
	for i := 0; i < len(s); i++ {
		if s[i] != '+' {
			out.WriteByte(s[i])
			continue
		}
		if i+2 >= len(s) {
			return s
		}
		n, err := strconv.ParseUint(s[i+1:i+3], 16, 8)
		if err != nil {
			return s
		}
		out.WriteByte(byte(n))
		i += 2
	}
	if decoded := out.String(); printable(decoded) {
		return decoded
	}
	return s
}
