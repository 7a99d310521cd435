package service

import (
	"context"
	"net/netip"
	"slices"
	"strings"

	"github.com/relais-mta/relais/control"
	"github.com/relais-mta/relais/control/command"
	"github.com/relais-mta/relais/control/state"
	"github.com/relais-mta/relais/shared/fault"
	"github.com/relais-mta/relais/shared/ids"
)

// DNS looks at what the world sees; control/monitor implements it.
type DNS interface {
	// Reverse says whether the PTR record of the address gives the name and the
	// name the address; an error says that nothing is known.
	Reverse(ctx context.Context, addr netip.Addr, name string) (control.ReverseVerdict, string, error)
	// Ownership looks for the record that shows whose a domain is.
	Ownership(ctx context.Context, d DomainFacts) Finding
	// Key compares the record of a signing key with what it should be, at every
	// resolver; published says whether there may be one at all.
	Key(ctx context.Context, domain string, k KeyFacts) (f Finding, published bool)
	// Domain compares all records of a domain with what they should be.
	Domain(ctx context.Context, d DomainFacts) []Finding
}

// FindingStatus is what came out of one comparison.
type FindingStatus string

// The outcomes.
const (
	FindingOK      FindingStatus = "ok"
	FindingWrong   FindingStatus = "wrong"
	FindingUnknown FindingStatus = "unknown" // DNS gave no answer
)

// Finding is the outcome for one record.
type Finding struct {
	Check    string // ownership, dkim, spf, return-path, dmarc or reverse
	Name     string // what was looked up
	Required bool
	Status   FindingStatus
	Detail   string // what is wrong, and the fix
}

// DomainFacts are what the records of a domain are compared with.
type DomainFacts struct {
	Name           string
	ReturnPath     string
	OwnershipToken string
	Keys           []KeyFacts
	Inbound        []string // hosts that take mail to the return path
	Sources        []SourceFacts
}

// KeyFacts is a signing key.
type KeyFacts struct {
	Selector string
	Kind     string // of k=: rsa or ed25519
	Public   []byte // of p=
	Signs    bool   // it is in use
}

func keyFacts(k *control.DKIMKey) KeyFacts {
	kind, public := k.RecordKey()
	return KeyFacts{Selector: k.Selector, Kind: kind, Public: public, Signs: k.State == control.KeySigning}
}

// SourceFacts is an address that mail of the domain leaves from.
type SourceFacts struct {
	Public  netip.Addr
	EHLO    string
	PTRName string
}

// dnsBox lets an interface be stored atomically.
type dnsBox struct{ DNS }

// SetDNS gives the service its view of DNS. Until then checks are refused.
func (s *Service) SetDNS(d DNS) { s.dns.Store(&dnsBox{d}) }

func (s *Service) resolver() (DNS, error) {
	if box := s.dns.Load(); box != nil {
		return box.DNS, nil
	}
	return nil, fault.New(fault.Unavailable, "service.DNS", "this server is starting and does not look at DNS yet: try again in a few seconds")
}

// Leads reports whether this server leads and is up to date.
func (s *Service) Leads() bool { return s.log.Ready() }

// SourceRows returns the addresses, for the server's own checks.
func (s *Service) SourceRows() []*control.Source { return s.state.Read().Sources() }

// CheckIP looks at the reverse DNS of an address now and records the verdict.
// If DNS gives no answer the verdict stays as it is, and the error says so.
func (s *Service) CheckIP(ctx context.Context, a Actor, ref string, c Change) (IPView, error) {
	const op = "service.CheckIP"
	if err := s.enter(a, control.RoleOperator, op); err != nil {
		return IPView{}, err
	}
	src, err := sourceByRef(s.state.Read(), ref)
	if err != nil {
		return IPView{}, err
	}
	dns, err := s.resolver()
	if err != nil {
		return IPView{}, err
	}
	verdict, detail, err := dns.Reverse(ctx, src.Public, src.PTRName())
	if err != nil {
		return IPView{}, err
	}
	return s.verify(ctx, a, &command.IPVerify{Meta: c.meta(a), Source: src.ID[:], Reverse: string(verdict), Detail: clipText(detail)})
}

// OverrideIP uses an address whatever its reverse DNS is, or ends that. The
// first needs a reason.
func (s *Service) OverrideIP(ctx context.Context, a Actor, ref string, use bool, c Change) (IPView, error) {
	const op = "service.OverrideIP"
	if err := s.enter(a, control.RoleOperator, op); err != nil {
		return IPView{}, err
	}
	src, err := sourceByRef(s.state.Read(), ref)
	if err != nil {
		return IPView{}, err
	}
	if use && strings.TrimSpace(c.Reason) == "" {
		return IPView{}, fault.Field(op, "reason", "is missing: say why an address without confirmed reverse DNS is used")
	}
	override := command.OverrideOff
	if use {
		override = command.OverrideOn
	}
	return s.verify(ctx, a, &command.IPVerify{Meta: c.meta(a), Expect: c.revision(src.Revision), Source: src.ID[:], Override: override})
}

func (s *Service) verify(ctx context.Context, a Actor, cmd *command.IPVerify) (IPView, error) {
	row, err := propose[control.Source](ctx, s, cmd)
	if err != nil {
		return IPView{}, err
	}
	return ipView(s.state.Read(), row, s.seenAnywhere()), nil
}

// clipText fits a text of others into a command.
func clipText(text string) string {
	text = strings.ToValidUTF8(strings.Map(func(r rune) rune {
		if r < 0x20 || r == 0x7f {
			return ' '
		}
		return r
	}, text), "?")
	return strings.ToValidUTF8(text[:min(len(text), command.MaxTextBytes)], "")
}

// dnsMeta is whose the server's own findings are.
var dnsMeta = &command.Meta{Actor: System.Name, Reason: "DNS check"}

// RecordReverse records what the server's own check found.
func (s *Service) RecordReverse(ctx context.Context, id ids.Source, verdict control.ReverseVerdict, detail string) error {
	_, err := propose[control.Source](ctx, s, &command.IPVerify{Meta: dnsMeta, Source: id[:], Reverse: string(verdict), Detail: clipText(detail)})
	return err
}

// RecordOwnership records that the ownership record of a domain was seen.
func (s *Service) RecordOwnership(ctx context.Context, domain string) error {
	_, err := propose[control.Domain](ctx, s, &command.DomainVerify{Meta: dnsMeta, Domain: domain})
	return err
}

// UnverifiedDomains returns what is needed to look for ownership records.
func (s *Service) UnverifiedDomains() (out []DomainFacts) {
	r := s.state.Read()
	for _, d := range r.Domains(ids.Tenant{}) {
		if t := r.Tenant(d.Tenant); d.VerifiedAt.IsZero() && t != nil {
			out = append(out, DomainFacts{Name: string(d.Name), OwnershipToken: t.OwnershipToken})
		}
	}
	return out
}

// DomainCheck is a domain compared with DNS.
type DomainCheck struct {
	Name     string
	OK       bool // every required record is as it should be
	Findings []Finding
}

// CheckDomain compares the records of a domain with DNS now. Seeing the
// ownership record for the first time is recorded.
func (s *Service) CheckDomain(ctx context.Context, a Actor, name string) (DomainCheck, error) {
	if err := s.enter(a, control.RoleViewer, "service.CheckDomain"); err != nil {
		return DomainCheck{}, err
	}
	d, err := parseDomain("domain", name)
	if err != nil {
		return DomainCheck{}, err
	}
	r := s.state.Read()
	row := r.Domain(d)
	if row == nil {
		return DomainCheck{}, notFound("domain", "domain", name)
	}
	dns, err := s.resolver()
	if err != nil {
		return DomainCheck{}, err
	}
	facts, err := s.domainFacts(r, row)
	if err != nil {
		return DomainCheck{}, err
	}
	out := DomainCheck{Name: string(row.Name), OK: true, Findings: dns.Domain(ctx, facts)}
	for _, f := range out.Findings {
		out.OK = out.OK && (f.Status == FindingOK || !f.Required)
		if f.Check == "ownership" && f.Status == FindingOK && row.VerifiedAt.IsZero() {
			if err := s.RecordOwnership(ctx, string(row.Name)); err != nil {
				return DomainCheck{}, err
			}
		}
	}
	return out, nil
}

func (s *Service) domainFacts(r *state.Reader, row *control.Domain) (DomainFacts, error) {
	base, err := s.baseView()
	if err != nil {
		return DomainFacts{}, err
	}
	tenant := r.Tenant(row.Tenant)
	if tenant == nil {
		return DomainFacts{}, fault.New(fault.Internal, "service.CheckDomain", "domain %s has no tenant", row.Name)
	}
	facts := DomainFacts{Name: string(row.Name), ReturnPath: string(row.ReturnPath), OwnershipToken: tenant.OwnershipToken}
	for i := range row.DKIM {
		if row.DKIM[i].State != control.KeyOver {
			facts.Keys = append(facts.Keys, keyFacts(&row.DKIM[i]))
		}
	}
	for _, h := range base.Document.Inbound.Hosts {
		facts.Inbound = append(facts.Inbound, strings.ToLower(strings.TrimSuffix(h, ".")))
	}
	for _, src := range usableSources(r, tenant.ID) {
		facts.Sources = append(facts.Sources, SourceFacts{Public: src.Public, EHLO: src.EHLO, PTRName: src.PTRName()})
		if len(base.Document.Inbound.Hosts) == 0 && !slices.Contains(facts.Inbound, src.EHLO) {
			facts.Inbound = append(facts.Inbound, src.EHLO)
		}
	}
	return facts, nil
}
