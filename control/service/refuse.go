package service

import (
	"errors"
	"fmt"
	"math"
	"net/netip"
	"strings"
	"time"

	"golang.org/x/net/publicsuffix"

	"github.com/relais-mta/relais/control"
	"github.com/relais-mta/relais/control/state"
	"github.com/relais-mta/relais/shared/fault"
	"github.com/relais-mta/relais/shared/ids"
	"github.com/relais-mta/relais/shared/mailaddr"
)

// What is refused here is refused before it is proposed and not in Apply: a
// rule that is added later must not change what old logs mean.

// idTextBytes is the length of an id as text: three letters, '_' and 26 more.
const idTextBytes = 30

// checkNewName refuses a name that could be taken for an id: whoever names an
// object by its id would mean the one with that name.
func checkNewName(op, name string) error {
	if len(name) == idTextBytes && name[3] == '_' {
		return fault.Field(op, "name", "%q looks like an id: choose another name", name)
	}
	return nil
}

// isNumber reports whether a text has digits only.
func isNumber(text string) bool {
	return text != "" && strings.Trim(text, "0123456789") == ""
}

// checkRegistrable refuses what nobody can own as a mail domain: addresses, and
// suffixes below which a registry gives out names, which would belong to the
// first tenant with all that is below them.
func checkRegistrable(op, field string, d mailaddr.Domain) error {
	text := string(d)
	last := text[strings.LastIndexByte(text, '.')+1:]
	if d.IsLiteral() || isNumber(last) { // RFC 3696 section 2: a top-level domain is not all-numeric
		return fault.Field(op, field, "%q is an address, not a domain name such as example.com", text)
	}
	if suffix, icann := publicsuffix.PublicSuffix(text); icann && suffix == text {
		return fault.Field(op, field, "%q is a suffix below which names are registered: name a registered domain, such as example.%s", text, text)
	}
	return nil
}

// checkReturnPath refuses a return path at a domain that is also sent from: its
// MX records lead to the relays, which take returned mail and nothing else.
func checkReturnPath(op string, r *state.Reader, name, returnPath mailaddr.Domain) error {
	if returnPath == name || r.Domain(returnPath) != nil {
		return fault.Field(op, "return_path", "%q is a sending domain: its MX records would lead to the relays, which take only returned mail; name a domain of its own, such as rp.%s", returnPath, name)
	}
	for _, d := range r.Domains(ids.Tenant{}) {
		if d.ReturnPath == name {
			return fault.Field(op, "domain", "%q is the return path of %s: mail to it leads to the relays, which take only returned mail; send from another domain", name, d.Name)
		}
	}
	return nil
}

// plainName writes a host name as it is compared.
func plainName(text string) string { return strings.TrimSuffix(strings.ToLower(text), ".") }

// checkHostName wants a name that can be said in EHLO (RFC 5321 section 2.3.5).
func checkHostName(op, field, text string) error {
	d, err := mailaddr.ParseDomain(text)
	if err != nil || d.IsLiteral() || !strings.Contains(text, ".") || strings.Contains(text, "_") || isNumber(text[strings.LastIndexByte(text, '.')+1:]) {
		return fault.Field(op, field, "%q is not a full host name, such as mta1.example.com", text)
	}
	return nil
}

// checkSourceAddr refuses addresses from which no mail can come.
func checkSourceAddr(op, field string, a netip.Addr) error {
	if a.IsLinkLocalUnicast() || a == netip.AddrFrom4([4]byte{255, 255, 255, 255}) {
		return fault.Field(op, field, "%s cannot be a source address: it is not reachable from outside its network", a)
	}
	return nil
}

// checkStream wants a stream that the policy has for the project: mail of a
// credential with another one would all be refused.
func (s *Service) checkStream(op string, tenant *control.Tenant, project *control.Project, name string) error {
	if name == "" {
		return nil
	}
	view, err := s.baseView()
	if err != nil {
		return err
	}
	for _, e := range view.Document.Streams.Stream {
		if e.Name == name && (e.Tenant == "*" || e.Tenant == tenant.Name) && (e.Project == "*" || e.Project == project.Name) {
			return nil
		}
	}
	return fault.Field(op, "stream", "the policy has no stream %q for project %q of tenant %q: see `relais-control policy get streams`", name, project.Name, tenant.Name)
}

// sayWhatChanged adds to a conflict who made the change that came between, and
// what it was, so that whoever repeats the change knows what is overwritten.
func (s *Service) sayWhatChanged(err error) error {
	var f *fault.Error
	var stale *state.StaleError
	if !errors.As(err, &f) || f.Kind != fault.Conflict || !errors.As(err, &stale) {
		return err
	}
	for _, e := range s.state.Read().Audit(math.MaxInt) {
		if e.Index == stale.Revision {
			said := *f
			said.Public += fmt.Sprintf(". What came between: %s by %s at %s, from %q to %q", e.Action, e.Actor, e.Time.UTC().Format(time.RFC3339), e.Before, e.After)
			return &said
		}
	}
	return err
}

// checkNetwork wants a network that a machine can come from.
func checkNetwork(op string, p netip.Prefix) error {
	if !p.IsValid() || p.Addr().Zone() != "" || p.Addr().Is4In6() {
		return fault.Field(op, "cidr", "%q is not a network such as 198.51.100.0/24 or 2001:db8::/32", p)
	}
	return nil
}
