package service

import (
	"context"

	"github.com/relais-mta/relais/control"
	"github.com/relais-mta/relais/control/auth"
	"github.com/relais-mta/relais/control/command"
	"github.com/relais-mta/relais/control/state"
	"github.com/relais-mta/relais/shared/fault"
	"github.com/relais-mta/relais/shared/ids"
	"github.com/relais-mta/relais/shared/policy"
)

// AddTenant makes a tenant and its default project.
func (s *Service) AddTenant(ctx context.Context, a Actor, name string, c Change) (*control.Tenant, error) {
	const op = "service.AddTenant"
	if err := s.enter(a, control.RoleOperator, op); err != nil {
		return nil, err
	}
	if err := checkNewName(op, name); err != nil {
		return nil, err
	}
	at := now()
	row := control.Tenant{Name: name, OwnershipToken: auth.NewOwnershipToken(), CreatedAt: at}
	stamp(&row.ID, at)
	var project ids.Project
	stamp(&project, at)
	return propose[control.Tenant](ctx, s, &command.TenantPut{Meta: c.meta(a), Tenant: command.TenantRecord(&row), DefaultProject: project[:]})
}

// SuspendTenant stops or resumes a tenant: while it is suspended its
// credentials are refused and its queue goes on.
func (s *Service) SuspendTenant(ctx context.Context, a Actor, ref string, suspended bool, c Change) (*control.Tenant, error) {
	if err := s.enter(a, control.RoleOperator, "service.SuspendTenant"); err != nil {
		return nil, err
	}
	old, err := tenantByRef(s.state.Read(), ref)
	if err != nil {
		return nil, err
	}
	row := *old
	row.Suspended = suspended
	return propose[control.Tenant](ctx, s, &command.TenantPut{Meta: c.meta(a), Expect: c.revision(old.Revision), Tenant: command.TenantRecord(&row)})
}

// Tenants returns the tenants, oldest first.
func (s *Service) Tenants(a Actor) ([]*control.Tenant, error) {
	if err := s.enter(a, control.RoleViewer, "service.Tenants"); err != nil {
		return nil, err
	}
	return s.state.Read().Tenants(), nil
}

// Tenant returns one tenant, by id or name.
func (s *Service) Tenant(a Actor, ref string) (*control.Tenant, error) {
	if err := s.enter(a, control.RoleViewer, "service.Tenant"); err != nil {
		return nil, err
	}
	return tenantByRef(s.state.Read(), ref)
}

// FeedbackName returns what a tenant is called in a Feedback-ID; empty while the
// relays' view cannot be built.
func (s *Service) FeedbackName(id ids.Tenant) string {
	view, err := s.baseView()
	if err != nil {
		return ""
	}
	return policy.FeedbackTenant(view.CredentialKey, id)
}

func tenantByRef(r *state.Reader, ref string) (*control.Tenant, error) {
	var id ids.Tenant
	t := (*control.Tenant)(nil)
	if parseID(&id, ref) { // an id names one object, whatever others are named
		t = r.Tenant(id)
	} else {
		t = r.TenantByName(ref)
	}
	if t == nil {
		return nil, notFound("tenant", "tenant", ref)
	}
	return t, nil
}

// optionalTenant returns the zero id for an empty reference.
func optionalTenant(r *state.Reader, ref string) (id ids.Tenant, err error) {
	if ref == "" {
		return id, nil
	}
	t, err := tenantByRef(r, ref)
	if err != nil {
		return id, err
	}
	return t.ID, nil
}

// AddProject makes a project of a tenant.
func (s *Service) AddProject(ctx context.Context, a Actor, tenant, name string, c Change) (*control.Project, error) {
	const op = "service.AddProject"
	if err := s.enter(a, control.RoleOperator, op); err != nil {
		return nil, err
	}
	if err := checkNewName(op, name); err != nil {
		return nil, err
	}
	t, err := tenantByRef(s.state.Read(), tenant)
	if err != nil {
		return nil, err
	}
	at := now()
	row := control.Project{Tenant: t.ID, Name: name, CreatedAt: at}
	stamp(&row.ID, at)
	return propose[control.Project](ctx, s, &command.ProjectPut{Meta: c.meta(a), Project: command.ProjectRecord(&row)})
}

// Projects returns the projects of a tenant, or all if it is empty.
func (s *Service) Projects(a Actor, tenant string) ([]*control.Project, error) {
	if err := s.enter(a, control.RoleViewer, "service.Projects"); err != nil {
		return nil, err
	}
	r := s.state.Read()
	id, err := optionalTenant(r, tenant)
	if err != nil {
		return nil, err
	}
	return r.Projects(id), nil
}

// projectByRef finds a tenant's project by id or name; empty is the default one.
func projectByRef(r *state.Reader, t *control.Tenant, ref string) (*control.Project, error) {
	if ref == "" {
		ref = control.DefaultProject
	}
	var id ids.Project
	p := (*control.Project)(nil)
	if parseID(&id, ref) {
		p = r.Project(id)
	} else {
		p = r.ProjectByName(t.ID, ref)
	}
	if p == nil || p.Tenant != t.ID {
		e := fault.New(fault.NotFound, "service", "tenant %q has no project %q: see `relais-control project list --tenant %s`", t.Name, ref, t.Name)
		e.Field = "project"
		return nil, e
	}
	return p, nil
}
