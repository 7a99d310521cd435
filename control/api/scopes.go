package api

import (
	"encoding/hex"
	"net/netip"
	"strings"

	"github.com/relais-mta/relais/control/service"
	"github.com/relais-mta/relais/shared/fault"
	"github.com/relais-mta/relais/shared/mailaddr"
	"github.com/relais-mta/relais/shared/policy"
)

func (c *CredentialCreate) request() (req service.CredentialRequest, err error) {
	req = service.CredentialRequest{Tenant: c.Tenant, Project: c.Project, Name: c.Name, Stream: c.Stream}
	if c.NotAfter != nil {
		req.NotAfter = *c.NotAfter
	}
	req.Scope, err = c.scope()
	return req, err
}

// scope reads what a client wrote; networks and fingerprints in the forms that
// other programs print are brought to the normal one.
func (s *CredentialScope) scope() (out policy.CredentialScope, err error) {
	const op = "api.scope"
	out.MessagesPerHour = s.MessagesPerHour
	for _, text := range s.Domains {
		d, err := mailaddr.ParseDomain(text)
		if err != nil {
			return out, fault.Field(op, "domains", "%s", fault.Public(err))
		}
		out.Domains = append(out.Domains, d)
	}
	for _, text := range s.Networks {
		n, err := netip.ParsePrefix(text)
		if ip, addrErr := netip.ParseAddr(text); addrErr == nil && ip.Zone() == "" {
			n, err = netip.PrefixFrom(ip, ip.BitLen()), nil
		}
		if err != nil {
			return out, fault.Field(op, "networks", "%q is not a network: write one such as 192.0.2.0/24", text)
		}
		out.Networks = append(out.Networks, n)
	}
	for _, text := range s.Certificates {
		sum, err := hex.DecodeString(strings.ReplaceAll(text, ":", ""))
		if err != nil || len(sum) != 32 {
			return out, fault.Field(op, "certificates", "%q is not a SHA-256 fingerprint of 64 hexadecimal digits, as `openssl x509 -fingerprint -sha256` prints", text)
		}
		out.Certificates = append(out.Certificates, [32]byte(sum))
	}
	return out, out.Check()
}

func scopeOf(s *policy.CredentialScope) (out CredentialScope) {
	out.MessagesPerHour = s.MessagesPerHour
	for _, d := range s.Domains {
		out.Domains = append(out.Domains, string(d))
	}
	for _, n := range s.Networks {
		out.Networks = append(out.Networks, n.String())
	}
	for i := range s.Certificates {
		out.Certificates = append(out.Certificates, hex.EncodeToString(s.Certificates[i][:]))
	}
	return out
}
