package wire

import (
	"net/netip"

	"github.com/relais-mta/relais/shared/fault"
	"github.com/relais-mta/relais/shared/mailaddr"
	"github.com/relais-mta/relais/shared/policy"
)

// encodeScope returns nil for a scope that narrows nothing.
func encodeScope(s *policy.CredentialScope) *CredentialScope {
	if s.IsZero() {
		return nil
	}
	out := &CredentialScope{MessagesPerHour: s.MessagesPerHour}
	for _, d := range s.Domains {
		out.Domains = append(out.Domains, string(d))
	}
	for _, n := range s.Networks {
		out.Networks = append(out.Networks, n.String())
	}
	for i := range s.Certificates {
		out.Certificates = append(out.Certificates, s.Certificates[i][:])
	}
	return out
}

// scope reads the scope of a credential; scoped says in which list it stood. A
// scope that cannot be read must not widen what the credential is good for.
func (d *viewDecoder) scope(in *CredentialScope, out *policy.CredentialScope, scoped bool) {
	const op = "wire.DecodeView"
	if in != nil {
		out.MessagesPerHour = in.GetMessagesPerHour()
		for _, name := range in.GetDomains() {
			out.Domains = append(out.Domains, mailaddr.Domain(name))
		}
		for _, text := range in.GetNetworks() {
			n, err := netip.ParsePrefix(text)
			d.note(fault.Wrap(err, fault.Invalid, op, "%q is not a network of a credential", text))
			out.Networks = append(out.Networks, n)
		}
		for _, sum := range in.GetCertificates() {
			var hash [32]byte
			d.hash(sum, &hash, "certificate's hash")
			out.Certificates = append(out.Certificates, hash)
		}
	}
	if out.IsZero() == scoped {
		d.note(fault.New(fault.Invalid, op, "a credential with a scope stands among those without, or the other way round"))
	}
}
