package policy

import (
	"net/netip"

	"github.com/relais-mta/relais/shared/fault"
	"github.com/relais-mta/relais/shared/mailaddr"
)

// Bounds of a scope.
const (
	MaxScopeDomains      = 50
	MaxScopeNetworks     = 50
	MaxScopeCertificates = 10
	MaxMessagesPerHour   = 10_000_000
)

// CredentialScope narrows what a credential is good for, so that one that leaks
// is worth little. The zero value narrows nothing.
type CredentialScope struct {
	Domains         []mailaddr.Domain // of From and Sender: one of them or below; none: all of the tenant
	Networks        []netip.Prefix    // of clients; none: all
	MessagesPerHour uint32            // taken by each relay in any 60 minutes; 0: no limit
	Certificates    [][32]byte        // SHA-256 of certificates in DER, of which the client must show one in TLS; none: not needed
}

// IsZero reports whether the scope narrows nothing.
func (s *CredentialScope) IsZero() bool {
	return len(s.Domains) == 0 && len(s.Networks) == 0 && s.MessagesPerHour == 0 && len(s.Certificates) == 0
}

// Check returns a fault.Invalid that names the field if the scope breaks a bound
// or holds what is not in normal form.
func (s *CredentialScope) Check() error {
	const op = "policy.CredentialScope"
	switch {
	case len(s.Domains) > MaxScopeDomains:
		return fault.Field(op, "domains", "%d are too many, a credential has at most %d", len(s.Domains), MaxScopeDomains)
	case len(s.Networks) > MaxScopeNetworks:
		return fault.Field(op, "networks", "%d are too many, a credential has at most %d", len(s.Networks), MaxScopeNetworks)
	case len(s.Certificates) > MaxScopeCertificates:
		return fault.Field(op, "certificates", "%d are too many, a credential has at most %d", len(s.Certificates), MaxScopeCertificates)
	case s.MessagesPerHour > MaxMessagesPerHour:
		return fault.Field(op, "messages_per_hour", "%d is too much, write at most %d or 0 for no limit", s.MessagesPerHour, MaxMessagesPerHour)
	}
	for _, d := range s.Domains {
		if n, err := mailaddr.ParseDomain(string(d)); err != nil || n != d || n.IsLiteral() {
			return fault.Field(op, "domains", "%q is not a domain name in normal form", clip(string(d)))
		}
	}
	for _, n := range s.Networks {
		if !n.IsValid() || n != n.Masked() || n.Addr().Is4In6() {
			return fault.Field(op, "networks", "%s is not a network: write one such as 192.0.2.0/24 or 2001:db8::/32", n)
		}
	}
	return nil
}

// AllowsDomain reports whether an author at the domain may be named.
func (s *CredentialScope) AllowsDomain(d mailaddr.Domain) bool {
	for _, of := range s.Domains {
		if d.IsSubdomainOf(of) {
			return true
		}
	}
	return len(s.Domains) == 0
}

// AllowsClient reports whether a client may log in from the address.
func (s *CredentialScope) AllowsClient(ip netip.Addr) bool {
	for _, n := range s.Networks {
		if n.Contains(ip) {
			return true
		}
	}
	return len(s.Networks) == 0
}
