package service

import (
	"net/netip"
	"slices"

	"github.com/relais-mta/relais/control"
	"github.com/relais-mta/relais/control/state"
	"github.com/relais-mta/relais/shared/ids"
	"github.com/relais-mta/relais/shared/mailaddr"
)

// may reports whether something that is stated, or left open, can be what mail has,
// or leaves open.
func may(stated, mail string) bool { return stated == "" || mail == "" || stated == mail }

// sourceOf returns the row of the address that some mail leaves from; nil: it is
// left open. completeMail has found that there is one.
func sourceOf(r *state.Reader, m *Mail) *control.Source {
	addr, err := netip.ParseAddr(m.Source)
	if err != nil {
		return nil
	}
	return r.SourceByAddr(addr.Unmap())
}

// brakesOn returns the brakes in force that may be for some mail.
func brakesOn(r *state.Reader, m *Mail) []BrakeView {
	var out []BrakeView
	source := sourceOf(r, m)
	for _, b := range r.Brakes() {
		if !b.InForce() {
			continue
		}
		v := brakeView(r, b)
		pool := v.PoolName
		if of := r.Source(b.Scope.Source); of != nil && pool == "" {
			if p := r.Pool(of.Pool); p != nil {
				pool = p.Name
			}
		}
		if (source == nil || b.Scope.Source == ids.Source{} || b.Scope.Source == source.ID) &&
			may(b.Scope.Provider, m.Provider) && may(pool, m.Pool) && may(v.TenantName, m.Tenant) && may(string(b.Scope.Domain), m.Domain) {
			out = append(out, v)
		}
	}
	return out
}

// warmUpsOf returns the warm-ups that may count some mail, with the class of its
// provider alone if that is named. Those of addresses are many, and only that of an
// address that is named is among them.
func (s *Service) warmUpsOf(r *state.Reader, m *Mail) ([]WarmUpView, error) {
	doc, err := s.Document()
	if err != nil {
		return nil, err
	}
	var out []WarmUpView
	source := sourceOf(r, m)
	for _, row := range r.WarmSubjects() {
		if !row.Warms() {
			continue
		}
		counts := true
		switch row.Kind {
		case control.WarmSource:
			counts = source != nil && row.Ref == string(source.ID[:])
		case control.WarmPool:
			counts = may(r.WarmName(row), m.Pool)
		case control.WarmDomain: // of senders: it says whose mail it can be
			if d := r.Domain(mailaddr.Domain(row.Ref)); d != nil {
				if t := r.Tenant(d.Tenant); t != nil {
					counts = may(t.Name, m.Tenant)
				}
			}
		}
		if !counts {
			continue
		}
		v, err := s.warmView(r, row)
		if err != nil {
			return nil, err
		}
		if plan, ok := doc.Warmup.PlanNamed(row.Plan); ok && m.Provider != "" {
			class := doc.Warmup.ClassOf(plan, m.Provider)
			v.Classes = slices.DeleteFunc(v.Classes, func(c WarmClassView) bool { return c.Class != class })
		}
		out = append(out, v)
	}
	return out, nil
}
