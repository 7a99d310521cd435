package service

import (
	"context"

	"github.com/relais-mta/relais/control"
	"github.com/relais-mta/relais/control/command"
	"github.com/relais-mta/relais/control/state"
	"github.com/relais-mta/relais/shared/fault"
	"github.com/relais-mta/relais/shared/ids"
	"github.com/relais-mta/relais/shared/mailaddr"
)

// DomainRequest asks for a sending domain.
type DomainRequest struct {
	Tenant     string // id or name
	Name       string
	ReturnPath string // empty: rp.<name>
	Selector   string // of the RSA key; empty: r and the date, such as r20260102
}

// DomainView is a domain with every DNS record it needs.
type DomainView struct {
	control.Domain
	TenantName string
	Records    []DNSRecord
	Notes      []string // what the records do not say
	Keys       []KeyView
}

// AddDomain makes a sending domain with a fresh signing key.
func (s *Service) AddDomain(ctx context.Context, a Actor, req DomainRequest, c Change) (DomainView, error) {
	const op = "service.AddDomain"
	if err := s.enter(a, control.RoleOperator, op); err != nil {
		return DomainView{}, err
	}
	tenant, err := tenantByRef(s.state.Read(), req.Tenant)
	if err != nil {
		return DomainView{}, err
	}
	name, err := parseDomain("domain", req.Name)
	if err != nil {
		return DomainView{}, err
	}
	if err := checkRegistrable(op, "domain", name); err != nil {
		return DomainView{}, err
	}
	returnPath := mailaddr.Domain("rp." + string(name))
	if req.ReturnPath != "" {
		if returnPath, err = parseDomain("return_path", req.ReturnPath); err != nil {
			return DomainView{}, err
		}
		if err := checkRegistrable(op, "return_path", returnPath); err != nil {
			return DomainView{}, err
		}
	}
	if err := checkReturnPath(op, s.state.Read(), name, returnPath); err != nil {
		return DomainView{}, err
	}
	at := now()
	if req.Selector == "" {
		req.Selector = "r" + at.Format("20060102")
	}
	keys, err := s.newDKIMKeys(s.state.Read(), name, req.Selector, otherSelector(req.Selector, at))
	if err != nil {
		return DomainView{}, err
	}
	for i := range keys[1:] {
		// Nothing was signed yet, so the RSA key is used at once; a second
		// signature is worth nothing before its key is published.
		keys[1+i].State, keys[1+i].CreatedAt, keys[1+i].Since = control.KeyNew, at, at
	}
	row := control.Domain{Name: name, Tenant: tenant.ID, ReturnPath: returnPath, DKIM: keys, CreatedAt: at}
	out, err := propose[control.Domain](ctx, s, &command.DomainPut{Meta: c.meta(a), Domain: command.DomainRecord(&row)})
	if err != nil {
		return DomainView{}, err
	}
	return s.domainView(s.state.Read(), out)
}

func parseDomain(field, text string) (mailaddr.Domain, error) {
	d, err := mailaddr.ParseDomain(text)
	if err != nil {
		return "", fault.Field("service.AddDomain", field, "%s", fault.Public(err))
	}
	return d, nil
}

// Domains returns the domains of a tenant, or all if it is empty.
func (s *Service) Domains(a Actor, tenant string) ([]DomainView, error) {
	if err := s.enter(a, control.RoleViewer, "service.Domains"); err != nil {
		return nil, err
	}
	r := s.state.Read()
	id, err := optionalTenant(r, tenant)
	if err != nil {
		return nil, err
	}
	var out []DomainView
	for _, d := range r.Domains(id) {
		v := DomainView{Domain: *d}
		if t := r.Tenant(d.Tenant); t != nil {
			v.TenantName = t.Name
		}
		out = append(out, v)
	}
	return out, nil
}

// Domain returns one domain with its DNS records.
func (s *Service) Domain(a Actor, name string) (DomainView, error) {
	if err := s.enter(a, control.RoleViewer, "service.Domain"); err != nil {
		return DomainView{}, err
	}
	d, err := parseDomain("domain", name)
	if err != nil {
		return DomainView{}, err
	}
	r := s.state.Read()
	row := r.Domain(d)
	if row == nil {
		return DomainView{}, notFound("domain", "domain", name)
	}
	return s.domainView(r, row)
}

func (s *Service) domainView(r *state.Reader, row *control.Domain) (DomainView, error) {
	base, err := s.baseView()
	if err != nil {
		return DomainView{}, err
	}
	tenant := r.Tenant(row.Tenant)
	if tenant == nil {
		return DomainView{}, fault.New(fault.Internal, "service.domainView", "domain %s has no tenant", row.Name)
	}
	v := DomainView{Domain: *row, TenantName: tenant.Name}
	v.Keys = keyViews(row, base.Document.Delivery.DKIMPublishHold.D())
	v.Records, v.Notes = domainRecords(row, tenant, usableSources(r, tenant.ID), base.Document.Inbound.Hosts)
	return v, nil
}

// usableSources returns the addresses that may carry a tenant's mail: those of
// shared pools and of its own.
func usableSources(r *state.Reader, tenant ids.Tenant) (out []*control.Source) {
	for _, src := range r.Sources() {
		if p := r.Pool(src.Pool); p != nil && (p.Tenant.IsZero() || p.Tenant == tenant) {
			out = append(out, src)
		}
	}
	return out
}
