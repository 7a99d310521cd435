// Package mailaddr holds the normal forms of mail addresses and mail domains.
// Every comparison, key and policy look-up uses these forms, so that
// "Joe@EXAMPLE.com" and "Joe@example.com" can never be two recipients while
// "joe" and "Joe" stay two local parts (RFC 5321 section 2.4).
package mailaddr

import (
	"errors"
	"net/netip"
	"strings"
	"unicode/utf8"

	"golang.org/x/net/idna"

	"github.com/relais-mta/relais/shared/fault"
)

// Limits of RFC 5321 section 4.5.3.1, in octets.
const (
	MaxLocalBytes  = 64
	MaxDomainBytes = 255
	MaxPathBytes   = 256 // with the angle brackets
)

// Domain is a domain name in normal form: lower-case A-labels without the
// final dot, or an address literal such as "[192.0.2.1]".
type Domain string

// Address is a mailbox: local part as given, domain in normal form. The zero
// Address is the null reverse path "<>".
type Address struct {
	Local  string
	Domain Domain
}

// IsNull reports whether a is the null reverse path (RFC 5321 section 4.5.5).
func (a Address) IsNull() bool { return a.Local == "" && a.Domain == "" }

// String returns local@domain, or the empty string for the null path.
func (a Address) String() string {
	if a.IsNull() {
		return ""
	}
	return a.Local + "@" + string(a.Domain)
}

// profile is strict on output and maps case; hyphens at places 3 and 4 are
// allowed because such names exist in the wild.
var profile = idna.New(idna.MapForLookup(), idna.StrictDomainName(true), idna.CheckHyphens(false), idna.Transitional(false), idna.BidiRule())

// ParseDomain returns the normal form of a domain name or of an address
// literal (RFC 5321 section 4.1.3). U-labels become A-labels.
func ParseDomain(s string) (Domain, error) {
	const op = "mailaddr.ParseDomain"
	if strings.HasPrefix(s, "[") {
		return parseLiteral(s)
	}
	s = strings.TrimSuffix(s, ".")
	if s == "" || len(s) > MaxDomainBytes {
		return "", fault.New(fault.Invalid, op, "a domain has 1 to %d octets, this one has %d", MaxDomainBytes, len(s))
	}
	if plainLower(s) {
		if err := checkLabels(s); err != nil {
			return "", err
		}
		return Domain(s), nil
	}
	ascii, err := profile.ToASCII(s)
	if err == nil {
		// Mapping must be a fixed point: a name that does not map to itself
		// again would have two normal forms.
		var again string
		if again, err = profile.ToASCII(ascii); err == nil && again != ascii {
			err = errNotFixed
		}
	}
	if err != nil || !utf8.ValidString(s) {
		return "", fault.New(fault.Invalid, op, "%q is not a domain name: labels hold letters, digits and inner hyphens", clip(s))
	}
	if err := checkLabels(ascii); err != nil {
		return "", err
	}
	return Domain(ascii), nil
}

var errNotFixed = errors.New("mapping is not stable")

// plainLower reports whether s needs no mapping at all: the common case.
func plainLower(s string) bool {
	for i := 0; i < len(s); i++ {
		c := s[i]
		if c >= 'a' && c <= 'z' || c >= '0' && c <= '9' || c == '.' || c == '-' || c == '_' {
			continue
		}
		return false
	}
	return !strings.Contains(s, "xn--")
}

func checkLabels(s string) error {
	const op = "mailaddr.ParseDomain"
	if len(s) > MaxDomainBytes {
		return fault.New(fault.Invalid, op, "a domain has at most %d octets, this one has %d", MaxDomainBytes, len(s))
	}
	for label := range strings.SplitSeq(s, ".") {
		// RFC 1035 section 2.3.4: 1 to 63 octets.
		if len(label) == 0 || len(label) > 63 {
			return fault.New(fault.Invalid, op, "%q has a label of %d octets, allowed are 1 to 63", clip(s), len(label))
		}
		if label[0] == '-' || label[len(label)-1] == '-' {
			return fault.New(fault.Invalid, op, "%q has a label that begins or ends with a hyphen", clip(s))
		}
	}
	return nil
}

func parseLiteral(s string) (Domain, error) {
	const op = "mailaddr.ParseDomain"
	inner, ok := strings.CutSuffix(s[1:], "]")
	if !ok {
		return "", fault.New(fault.Invalid, op, "%q is an address literal without its closing bracket", clip(s))
	}
	// RFC 5321 section 4.1.3: the IPv6 tag is case-insensitive.
	if len(inner) > 5 && strings.EqualFold(inner[:5], "IPv6:") {
		if ip, err := netip.ParseAddr(inner[5:]); err == nil && ip.Is6() && ip.Zone() == "" {
			return Domain("[IPv6:" + ip.String() + "]"), nil
		}
	} else if ip, err := netip.ParseAddr(inner); err == nil && ip.Is4() {
		return Domain("[" + ip.String() + "]"), nil
	}
	return "", fault.New(fault.Invalid, op, "%q is not an address literal, which looks like [192.0.2.1] or [IPv6:2001:db8::1]", clip(s))
}

// IsLiteral reports whether the domain is an address literal.
func (d Domain) IsLiteral() bool { return strings.HasPrefix(string(d), "[") }

// Literal returns the address of an address literal.
func (d Domain) Literal() (netip.Addr, bool) {
	s := strings.TrimSuffix(strings.TrimPrefix(string(d), "["), "]")
	ip, err := netip.ParseAddr(strings.TrimPrefix(s, "IPv6:"))
	return ip, d.IsLiteral() && err == nil
}

// IsSubdomainOf reports whether d is parent or lies below it.
func (d Domain) IsSubdomainOf(parent Domain) bool {
	if d == parent {
		return true
	}
	return len(d) > len(parent) && strings.HasSuffix(string(d), string(parent)) && d[len(d)-len(parent)-1] == '.'
}

// Parse reads a mailbox "local@domain" without angle brackets (RFC 5321
// section 4.1.2). The local part may be quoted; quotes that are not needed are
// removed, so that both forms are equal.
func Parse(s string) (Address, error) { return parse(s, false) }

// ParseUTF8 is Parse for clients that said SMTPUTF8: the local part may hold
// UTF-8 (RFC 6531 section 3.3) without control characters.
func ParseUTF8(s string) (Address, error) { return parse(s, true) }

// IsASCII reports whether the address can be written without SMTPUTF8. A domain
// in normal form always can.
func (a Address) IsASCII() bool {
	for i := 0; i < len(a.Local); i++ {
		if a.Local[i] >= utf8.RuneSelf {
			return false
		}
	}
	return true
}

// IsUTF8Text reports whether s is valid UTF-8 without the control characters
// beyond ASCII and the separators of lines and paragraphs.
func IsUTF8Text(s string) bool {
	for i, r := range s {
		if r == utf8.RuneError {
			if _, size := utf8.DecodeRuneInString(s[i:]); size == 1 {
				return false
			}
		}
		if r >= 0x80 && r < 0xa0 || r == 0x2028 || r == 0x2029 {
			return false
		}
	}
	return true
}

func parse(s string, utf8OK bool) (Address, error) {
	const op = "mailaddr.Parse"
	if len(s) > MaxPathBytes-2 {
		return Address{}, fault.New(fault.Invalid, op, "an address has at most %d octets, this one has %d", MaxPathBytes-2, len(s))
	}
	at := strings.LastIndexByte(s, '@')
	if at < 1 || at == len(s)-1 {
		return Address{}, fault.New(fault.Invalid, op, "%q is not an address of the form local@domain", clip(s))
	}
	local, err := parseLocal(s[:at], utf8OK)
	if err != nil {
		return Address{}, err
	}
	domain, err := ParseDomain(s[at+1:])
	if err != nil {
		return Address{}, err
	}
	return Address{Local: local, Domain: domain}, nil
}

func parseLocal(s string, utf8OK bool) (string, error) {
	const op = "mailaddr.Parse"
	if utf8OK && !IsUTF8Text(s) {
		return "", fault.New(fault.Invalid, op, "%q is not a local part in UTF-8", clip(s))
	}
	if len(s) > MaxLocalBytes {
		return "", fault.New(fault.Invalid, op, "a local part has at most %d octets, this one has %d", MaxLocalBytes, len(s))
	}
	if s[0] == '"' {
		return parseQuoted(s, utf8OK)
	}
	if !isDotString(s, utf8OK) {
		return "", fault.New(fault.Invalid, op, "%q is not a local part: quote it, or use letters, digits and !#$%%&'*+-/=?^_`{|}~ with single inner dots", clip(s))
	}
	return s, nil
}

// parseQuoted reads a Quoted-string (RFC 5321 section 4.1.2).
func parseQuoted(s string, utf8OK bool) (string, error) {
	const op = "mailaddr.Parse"
	bad := fault.New(fault.Invalid, op, "%q is not a quoted local part", clip(s))
	if len(s) < 3 || s[len(s)-1] != '"' {
		return "", bad
	}
	var out strings.Builder
	inner := s[1 : len(s)-1]
	for i := 0; i < len(inner); i++ {
		c := inner[i]
		switch {
		case c == '\\':
			i++
			if i == len(inner) || inner[i] < 32 || inner[i] > 126 {
				return "", bad
			}
			out.WriteByte(inner[i])
		case c == '"' || c < 32 || c > 126 && (c < utf8.RuneSelf || !utf8OK):
			return "", bad
		default:
			out.WriteByte(c)
		}
	}
	if plain := out.String(); isDotString(plain, utf8OK) {
		return plain, nil
	}
	return requote(out.String()), nil
}

func requote(s string) string {
	var out strings.Builder
	out.WriteByte('"')
	for i := 0; i < len(s); i++ {
		if s[i] == '"' || s[i] == '\\' {
			out.WriteByte('\\')
		}
		out.WriteByte(s[i])
	}
	out.WriteByte('"')
	return out.String()
}

// isDotString implements the Dot-string rule of RFC 5321 section 4.1.2.
func isDotString(s string, utf8OK bool) bool {
	if s == "" || s[0] == '.' || s[len(s)-1] == '.' {
		return false
	}
	for i := 0; i < len(s); i++ {
		c := s[i]
		if c == '.' {
			if s[i-1] == '.' {
				return false
			}
			continue
		}
		if !isAtext(c) && (c < utf8.RuneSelf || !utf8OK) {
			return false
		}
	}
	return true
}

func isAtext(c byte) bool {
	if c >= 'a' && c <= 'z' || c >= 'A' && c <= 'Z' || c >= '0' && c <= '9' {
		return true
	}
	return strings.IndexByte("!#$%&'*+-/=?^_`{|}~", c) >= 0
}

func clip(s string) string {
	const maxShownBytes = 80
	if len(s) > maxShownBytes {
		return s[:maxShownBytes] + "…"
	}
	return s
}
