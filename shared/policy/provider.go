package policy

import (
	"fmt"
	"net/netip"
	"slices"
	"strings"
	"time"

	"golang.org/x/net/publicsuffix"

	"github.com/relais-mta/relais/shared/mailaddr"
)

// The values of Provider.Family.
const (
	FamilyAny       = "any"
	FamilyIPv4      = "ipv4"       // IPv4 only
	FamilyIPv4First = "ipv4-first" // IPv6 only when no IPv4 address is usable
	FamilyIPv6First = "ipv6-first"
)

// The values of Provider.Chunking and Delivery.Chunking.
const (
	ChunkAuto       = "auto"        // binary mail, and large mail
	ChunkBinaryOnly = "binary-only" // what cannot go otherwise
	ChunkOff        = "off"         // never
)

// UnlistedPrefix begins the names of providers without a profile.
const UnlistedPrefix = "mx:"

// Rate is at most Max events in any span of Per, and Burst more after a pause.
// The zero Rate sets no limit.
type Rate struct {
	Max   int
	Per   time.Duration
	Burst int // at least 1
}

// Limited reports whether r sets a limit.
func (r Rate) Limited() bool { return r.Max > 0 }

// Profile is a provider's entry in its compiled form: the defaults filled in
// and the overrides applied. It is immutable.
type Profile struct {
	Name   string // "" for the profile that unlisted providers share
	TLS    TLSMode
	Family string

	chunking      string // empty: as section delivery says
	onlySignature string // the one algorithm of signatures that the provider gets; empty: any

	connections              [scopes]int
	messageRate              [scopes]Rate
	connectionRate           [scopes]Rate
	reflex                   Reflex
	messagesPerConnection    int
	recipientsPerTransaction int
}

const scopes = 2

func scopeIndex(s Scope) int {
	if s == ScopeRelay {
		return 1
	}
	return 0
}

// Connections returns how many connections may be open or opening at once
// within the scope; 0 is no limit.
func (p *Profile) Connections(s Scope) int { return p.connections[scopeIndex(s)] }

// MessagesPerConnection returns how many transactions one connection may
// carry; 0 is no limit.
func (p *Profile) MessagesPerConnection() int { return p.messagesPerConnection }

// Chunking returns how mail goes to the provider by BDAT; empty: as section
// delivery says.
func (p *Profile) Chunking() string { return p.chunking }

// OnlySignature returns the one algorithm of the DKIM signatures that the
// provider gets, empty if it gets one of every key.
func (p *Profile) OnlySignature() string { return p.onlySignature }

// RecipientsPerTransaction returns how many RCPT commands one transaction may
// hold; 0 is no limit.
func (p *Profile) RecipientsPerTransaction() int { return p.recipientsPerTransaction }

// MessageRate returns the rate of transactions within the scope.
func (p *Profile) MessageRate(s Scope) Rate { return p.messageRate[scopeIndex(s)] }

// ConnectionRate returns the rate at which connections may be opened within
// the scope.
func (p *Profile) ConnectionRate(s Scope) Rate { return p.connectionRate[scopeIndex(s)] }

// set applies one limit that has passed the checks; Max 0 removes it.
func (p *Profile) set(l Limit) {
	i := scopeIndex(l.Scope)
	rate := Rate{}
	if l.Max > 0 {
		rate = Rate{Max: l.Max, Per: l.Per.D(), Burst: max(l.Burst, 1)}
	}
	switch l.Kind {
	case Connections:
		p.connections[i] = l.Max
	case MessagesPerConnection:
		p.messagesPerConnection = l.Max
	case RecipientsPerTransaction:
		p.recipientsPerTransaction = l.Max
	case MessageRate:
		p.messageRate[i] = rate
	case ConnectionRate:
		p.connectionRate[i] = rate
	}
}

// ProviderTable finds the provider behind an MX set. It is immutable and safe
// for use by many goroutines.
type ProviderTable struct {
	fallback *Profile
	byName   map[string]*Profile
	bySuffix map[string]*Profile
	unlisted map[string]*Profile // overrides of "mx:…" names
}

// Match returns the name and the profile of the provider behind an MX set.
// Hosts are the names of the whole set in normal form (lower case, no final
// dot), ordered by preference and, at equal preference, by name, so that a
// shuffled answer stays one provider. A profile matches only if it is the one
// with the longest matching suffix for every host. Otherwise the provider is
// "mx:" and the registrable domain of the first host; without one, ip; and
// without ip, the host itself. Without hosts it is "mx:" and ip, or "mx:unknown".
//
// A listed provider costs no allocation; the name of an unlisted one is built
// anew, so keep the result with the route.
func (t *ProviderTable) Match(hosts []string, ip netip.Addr) (string, *Profile) {
	var common *Profile
	for i, h := range hosts {
		p := t.longest(h)
		if p == nil || i > 0 && p != common {
			common = nil
			break
		}
		common = p
	}
	if common != nil {
		return common.Name, common
	}
	name := unlistedName(hosts, ip)
	if p, ok := t.unlisted[name]; ok {
		return name, p
	}
	return name, t.fallback
}

// Named returns the profile of a provider by its name. A "mx:" name without
// its own entry has the default profile.
func (t *ProviderTable) Named(name string) (*Profile, bool) {
	if p, ok := t.byName[name]; ok {
		return p, true
	}
	if !strings.HasPrefix(name, UnlistedPrefix) {
		return nil, false
	}
	if p, ok := t.unlisted[name]; ok {
		return p, true
	}
	return t.fallback, true
}

// Default returns the profile of providers without one.
func (t *ProviderTable) Default() *Profile { return t.fallback }

// longest returns the profile with the longest suffix that host equals or lies
// below.
func (t *ProviderTable) longest(host string) *Profile {
	for {
		if p, ok := t.bySuffix[host]; ok {
			return p
		}
		dot := strings.IndexByte(host, '.')
		if dot < 0 {
			return nil
		}
		host = host[dot+1:]
	}
}

func unlistedName(hosts []string, ip netip.Addr) string {
	if len(hosts) > 0 {
		host := hosts[0]
		literal, ok := mailaddr.Domain(host).Literal()
		if !ok {
			literal, _ = netip.ParseAddr(host) // some MX records name an address
		}
		if literal.IsValid() {
			return UnlistedPrefix + literal.Unmap().WithZone("").String()
		}
		if d, err := publicsuffix.EffectiveTLDPlusOne(host); err == nil {
			return UnlistedPrefix + d
		}
		if !ip.IsValid() {
			return UnlistedPrefix + host
		}
	}
	if !ip.IsValid() {
		return UnlistedPrefix + "unknown"
	}
	return UnlistedPrefix + ip.Unmap().WithZone("").String()
}

// newProviderTable checks and compiles the section.
func newProviderTable(s *Providers, p *problems) *ProviderTable {
	t := &ProviderTable{
		fallback: &Profile{TLS: TLSOpportunistic, Family: FamilyAny, reflex: s.Reflex},
		byName:   make(map[string]*Profile, len(s.Provider)),
		bySuffix: make(map[string]*Profile, 2*len(s.Provider)),
		unlisted: make(map[string]*Profile),
	}
	if len(s.Provider) > maxProviders {
		p.add("providers.provider", "has %d entries, write at most %d", len(s.Provider), maxProviders)
		return t
	}
	if len(s.Limit) > maxOverrides {
		p.add("providers.limit", "has %d entries, write at most %d", len(s.Limit), maxOverrides)
		return t
	}
	t.limits(t.fallback, "providers.default", s.Default, p)
	names := make([][]string, len(s.Provider)) // normal form of the suffixes
	for i := range s.Provider {
		names[i] = t.add(&s.Provider[i], fmt.Sprintf("providers.provider[%d]", i), p)
	}
	for i := range s.Provider {
		t.examples(&s.Provider[i], names[i], fmt.Sprintf("providers.provider[%d]", i), p)
	}
	t.overrides(s.Limit, p)
	t.reflexes(s, p)
	return t
}

// add compiles one provider and returns its suffixes in normal form.
func (t *ProviderTable) add(pr *Provider, at string, p *problems) []string {
	profile := *t.fallback
	profile.Name, profile.TLS, profile.Family = pr.Name, pr.TLS, pr.Family
	if profile.Family == "" {
		profile.Family = FamilyAny
	}
	if profile.TLS == "" {
		profile.TLS = TLSOpportunistic
	}
	if !isProviderName(pr.Name) {
		p.add(at+".name", "%q is not a provider's name, write 1 to %d lower-case letters, digits and inner hyphens", clip(pr.Name), maxNameBytes)
	} else if t.byName[pr.Name] != nil {
		p.add(at+".name", "%q is the name of an earlier provider: join the two", pr.Name)
	}
	p.oneOf(at+".tls", string(profile.TLS), string(TLSOpportunistic), string(TLSRequired), string(TLSOff))
	p.oneOf(at+".family", profile.Family, FamilyAny, FamilyIPv4, FamilyIPv4First, FamilyIPv6First)
	if profile.chunking = pr.Chunking; pr.Chunking != "" {
		p.oneOf(at+".chunking", pr.Chunking, ChunkAuto, ChunkBinaryOnly, ChunkOff)
	}
	for _, a := range pr.SignAlgorithms {
		p.oneOf(at+".sign_algorithms", a, AlgorithmRSA, AlgorithmEd25519)
	}
	profile.onlySignature = ""
	if wanted := slices.Compact(slices.Sorted(slices.Values(pr.SignAlgorithms))); len(wanted) == 1 {
		profile.onlySignature = wanted[0]
	}
	t.byName[pr.Name] = &profile
	t.limits(&profile, at+".limit", pr.Limits, p)
	return t.suffixes(&profile, pr, at, p)
}

func (t *ProviderTable) suffixes(profile *Profile, pr *Provider, at string, p *problems) []string {
	if n := len(pr.MXSuffixes); n < 1 || n > maxSuffixes {
		p.add(at+".mx_suffixes", "has %d names, write 1 to %d", n, maxSuffixes)
		return nil
	}
	if n := len(pr.MXExamples); n < 1 || n > maxSuffixes {
		p.add(at+".mx_examples", "has %d names, write 1 to %d, one for each suffix at least", n, maxSuffixes)
		return nil
	}
	names := make([]string, 0, len(pr.MXSuffixes))
	for i, text := range pr.MXSuffixes {
		field := fmt.Sprintf("%s.mx_suffixes[%d]", at, i)
		d, err := mailaddr.ParseDomain(text)
		name := string(d)
		if err != nil || d.IsLiteral() || !strings.Contains(name, ".") {
			p.add(field, "%q is not a host suffix, write a domain of two labels or more such as \"google.com\"", clip(text))
			continue
		}
		if other := t.bySuffix[name]; other != nil {
			p.add(field, "%q is a suffix of provider %q already: a host can belong to one provider only", name, other.Name)
			continue
		}
		t.bySuffix[name] = profile
		names = append(names, name)
	}
	// A suffix below another one of its own profile can never decide anything.
	for i, text := range pr.MXSuffixes {
		d, _ := mailaddr.ParseDomain(text)
		for _, other := range names {
			if d != "" && string(d) != other && d.IsSubdomainOf(mailaddr.Domain(other)) {
				p.add(fmt.Sprintf("%s.mx_suffixes[%d]", at, i), "%q is shadowed by %q of the same provider: remove one of them", d, other)
			}
		}
	}
	return names
}

// examples checks a provider's suffixes against its example hosts.
func (t *ProviderTable) examples(pr *Provider, suffixes []string, at string, p *problems) {
	shown := make(map[string]bool, len(suffixes))
	for i, text := range pr.MXExamples {
		field := fmt.Sprintf("%s.mx_examples[%d]", at, i)
		d, err := mailaddr.ParseDomain(text)
		if err != nil || d.IsLiteral() {
			p.add(field, "%q is not a host name, write one such as \"mx1.example.com\"", clip(text))
			continue
		}
		switch got := t.longest(string(d)); {
		case got == nil:
			p.add(field, "%q matches no suffix: add its suffix or remove it", d)
			continue
		case got.Name != pr.Name:
			p.add(field, "%q matches provider %q: a suffix there is more exact; correct one of the two", d, got.Name)
			continue
		}
		for _, s := range suffixes {
			if d.IsSubdomainOf(mailaddr.Domain(s)) {
				shown[s] = true
			}
		}
	}
	for _, s := range suffixes {
		if !shown[s] {
			p.add(at+".mx_suffixes", "%q has no example: name a real host that it matches in mx_examples", s)
		}
	}
}

// limits checks a list of limits and applies it to a profile.
func (t *ProviderTable) limits(profile *Profile, at string, limits []Limit, p *problems) {
	if len(limits) > maxLimits {
		p.add(at, "has %d entries, write at most %d", len(limits), maxLimits)
		return
	}
	type key struct {
		kind  LimitKind
		scope Scope
	}
	seen := make(map[key]int, len(limits))
	for i, l := range limits {
		field := fmt.Sprintf("%s[%d]", at, i)
		l.validate(field, 1, p)
		k := key{l.Kind, l.Scope}
		if first, dup := seen[k]; dup {
			p.add(field+".kind", "is stated by entry %d already: remove one of them", first)
		}
		seen[k] = i
		profile.set(l)
	}
}

// validate checks one limit; least is the smallest Max allowed.
func (l *Limit) validate(at string, least int64, p *problems) {
	p.oneOf(at+".kind", string(l.Kind), string(Connections), string(MessagesPerConnection), string(RecipientsPerTransaction), string(MessageRate), string(ConnectionRate))
	p.between(at+".max", int64(l.Max), least, maxLimitCount)
	switch l.Kind {
	case MessagesPerConnection, RecipientsPerTransaction:
		p.oneOf(at+".scope", string(l.Scope), string(ScopeSource))
	default:
		p.oneOf(at+".scope", string(l.Scope), string(ScopeSource), string(ScopeRelay))
	}
	if l.Kind != MessageRate && l.Kind != ConnectionRate {
		if l.Per != 0 {
			p.add(at+".per", "belongs to rates only: remove it")
		}
		if l.Burst != 0 {
			p.add(at+".burst", "belongs to rates only: remove it")
		}
		return
	}
	p.between(at+".burst", int64(l.Burst), 0, maxBurst)
	if l.Max < 1 {
		return
	}
	p.lasts(at+".per", l.Per, second, day)
	if l.Burst <= maxBurst && l.Per <= day && int64(l.Burst)*int64(l.Per)/int64(l.Max) > int64(maxBurstSaved) {
		p.add(at+".burst", "is %d, which this rate takes over %v to save up: write less", l.Burst, maxBurstSaved)
	}
}

// overrides checks and applies the changes: those for "*" first, then the
// named ones, each in the order of the document.
func (t *ProviderTable) overrides(list []Override, p *problems) {
	for i := range list {
		o := &list[i]
		at := fmt.Sprintf("providers.limit[%d]", i)
		o.Limit.validate(at, 0, p)
		if o.Provider != everyone {
			continue
		}
		t.fallback.set(o.Limit)
		for _, profile := range t.byName {
			profile.set(o.Limit)
		}
	}
	for i := range list {
		o := &list[i]
		if o.Provider == everyone {
			continue
		}
		if profile := t.named(o.Provider); profile != nil {
			profile.set(o.Limit)
		} else {
			p.add(fmt.Sprintf("providers.limit[%d].provider", i), "%q is not a known provider: write the name of a [[provider]], \"mx:\" and a registrable domain or an address, or \"*\"", clip(o.Provider))
		}
	}
}

func isProviderName(s string) bool {
	if s == "" || len(s) > maxNameBytes || s[0] == '-' || s[len(s)-1] == '-' {
		return false
	}
	return span(s, func(c byte) bool { return c >= 'a' && c <= 'z' || c >= '0' && c <= '9' || c == '-' }) == len(s)
}

// isUnlistedName reports whether Match could give the name.
func isUnlistedName(s string) bool {
	rest, ok := strings.CutPrefix(s, UnlistedPrefix)
	if !ok {
		return false
	}
	if ip, err := netip.ParseAddr(rest); err == nil {
		return ip.Unmap().WithZone("").String() == rest
	}
	d, err := mailaddr.ParseDomain(rest)
	if err != nil || string(d) != rest {
		return false
	}
	own, err := publicsuffix.EffectiveTLDPlusOne(rest)
	return err == nil && own == rest
}
