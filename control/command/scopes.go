package command

import (
	"net/netip"

	"github.com/relais-mta/relais/shared/fault"
	"github.com/relais-mta/relais/shared/mailaddr"
	"github.com/relais-mta/relais/shared/policy"
)

// Validate implements Command.
func (c *CredentialPutScoped) Validate() error {
	r := c.GetCredential()
	if r == nil {
		return missing("credential")
	}
	if r.GetScope() == nil {
		return missing("scope")
	}
	return checkCredential(c.GetMeta(), r)
}

func checkCredential(meta *Meta, r *Credential) error {
	_, err := r.Row()
	if err := first(checkMeta(meta), err, checkText("name", r.GetName())); err != nil || r.GetStream() == "" {
		return err
	}
	return CheckName("stream", r.GetStream())
}

// scopeRecord returns the record of a scope, nil if it narrows nothing.
func scopeRecord(s *policy.CredentialScope) *CredentialScope {
	if s.IsZero() {
		return nil
	}
	r := &CredentialScope{MessagesPerHour: s.MessagesPerHour}
	for _, d := range s.Domains {
		r.Domains = append(r.Domains, string(d))
	}
	for _, n := range s.Networks {
		r.Networks = append(r.Networks, n.String())
	}
	for i := range s.Certificates {
		r.Certificates = append(r.Certificates, s.Certificates[i][:])
	}
	return r
}

// scope reads the record of a scope.
func (s *scan) scope(r *CredentialScope) (out policy.CredentialScope) {
	if r == nil {
		return out
	}
	out.MessagesPerHour = r.GetMessagesPerHour()
	for _, d := range r.GetDomains() {
		out.Domains = append(out.Domains, mailaddr.Domain(d))
	}
	for _, text := range r.GetNetworks() {
		n, err := netip.ParsePrefix(text)
		if err != nil && s.err == nil {
			s.err = fault.Field(opValidate, "networks", "%q is not a network: write one such as 192.0.2.0/24", text)
		}
		out.Networks = append(out.Networks, n)
	}
	for _, c := range r.GetCertificates() {
		out.Certificates = append(out.Certificates, s.hash("certificates", c))
	}
	if s.err == nil {
		s.err = out.Check()
	}
	if s.err == nil && out.IsZero() {
		s.err = missing("scope")
	}
	return out
}
