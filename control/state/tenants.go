package state

import (
	"google.golang.org/protobuf/proto"

	"github.com/relais-mta/relais/control"
	"github.com/relais-mta/relais/control/command"
	"github.com/relais-mta/relais/shared/fault"
	"github.com/relais-mta/relais/shared/ids"
)

// readID reads an id whose kind follows from where it goes.
func readID[K ids.Kind](dst *ids.ID[K], b []byte) (err error) {
	*dst, err = ids.FromBytes[K](b)
	return err
}

var tenantsTable = &table[control.Tenant]{
	name: "tenants", section: sectionTenants, maxRows: maxTenants, inViews: true,
	key:      func(t *control.Tenant) []byte { return t.ID[:] },
	record:   func(t *control.Tenant) proto.Message { return command.TenantRecord(t) },
	row:      unmarshalRow[command.Tenant, control.Tenant],
	revision: func(t *control.Tenant) *uint64 { return &t.Revision },
	indexes:  []index[control.Tenant]{{name: "name", unique: true, key: func(t *control.Tenant) []byte { return text(t.Name) }}},
}

var projectsTable = &table[control.Project]{
	name: "projects", section: sectionProjects, maxRows: maxProjects, inViews: true,
	key:      func(p *control.Project) []byte { return p.ID[:] },
	record:   func(p *control.Project) proto.Message { return command.ProjectRecord(p) },
	row:      unmarshalRow[command.Project, control.Project],
	revision: func(p *control.Project) *uint64 { return &p.Revision },
	indexes:  []index[control.Project]{{name: "name", unique: true, key: func(p *control.Project) []byte { return projectKey(p.Tenant, p.Name) }}},
}

// projectKey orders projects by tenant, then by name.
func projectKey(t ids.Tenant, name string) []byte { return append(t[:], text(name)...) }

func (a *applier) tenantPut(c *command.TenantPut) (any, error) {
	row, err := c.GetTenant().Row()
	if err != nil {
		return nil, err
	}
	return putRow(a, tenantsTable, row, change[control.Tenant]{what: quoted("tenant", row.Name), object: row.ID.String(), expect: c.GetExpect(), check: func(old *control.Tenant) error {
		if old == nil && len(c.GetDefaultProject()) > 0 {
			if err := a.defaultProject(row, c.GetDefaultProject()); err != nil {
				return err
			}
		}
		if other := get(a.txn, tenantsTable, "name", text(row.Name)); other != nil && other.ID != row.ID {
			return taken("name", "tenant", row.Name)
		}
		if old != nil && old.OwnershipToken != row.OwnershipToken {
			return fault.Field(op, "ownership_token", "never changes: it is published in DNS")
		}
		return nil
	}})
}

// defaultProject makes the project that a new tenant starts with, in the same
// entry, so that there is never a tenant without it.
func (a *applier) defaultProject(t *control.Tenant, id []byte) error {
	p := &control.Project{Tenant: t.ID, Name: control.DefaultProject, CreatedAt: t.CreatedAt}
	if err := readID(&p.ID, id); err != nil {
		return err
	}
	if get(a.txn, projectsTable, "id", p.ID[:]) != nil {
		return fault.New(fault.Exists, op, "project %s exists already", p.ID)
	}
	return put(a, projectsTable, p)
}

// taken is the error for a name that another row has.
func taken(field, kind, name string) error {
	e := fault.New(fault.Exists, op, "there is a %s %q already: choose another name", kind, name)
	e.Field = field
	return e
}

func (a *applier) projectPut(c *command.ProjectPut) (any, error) {
	row, err := c.GetProject().Row()
	if err != nil {
		return nil, err
	}
	return putRow(a, projectsTable, row, change[control.Project]{what: quoted("project", row.Name), object: row.ID.String(), expect: c.GetExpect(), check: func(old *control.Project) error {
		if get(a.txn, tenantsTable, "id", row.Tenant[:]) == nil {
			return fault.Field(op, "tenant", "%s does not exist", row.Tenant)
		}
		if old != nil && old.Tenant != row.Tenant {
			return fault.Field(op, "tenant", "a project never changes its tenant: make a new project")
		}
		if other := get(a.txn, projectsTable, "name", projectKey(row.Tenant, row.Name)); other != nil && other.ID != row.ID {
			return taken("name", "project", row.Name)
		}
		return nil
	}})
}

// Tenant returns the tenant, or nil.
func (r *Reader) Tenant(id ids.Tenant) *control.Tenant { return get(r.txn, tenantsTable, "id", id[:]) }

// TenantByName returns the tenant of that name, or nil.
func (r *Reader) TenantByName(name string) *control.Tenant {
	return get(r.txn, tenantsTable, "name", text(name))
}

// Tenants returns the tenants, oldest first.
func (r *Reader) Tenants() []*control.Tenant { return all(r.txn, tenantsTable) }

// Project returns the project, or nil.
func (r *Reader) Project(id ids.Project) *control.Project {
	return get(r.txn, projectsTable, "id", id[:])
}

// ProjectByName returns the tenant's project of that name, or nil.
func (r *Reader) ProjectByName(t ids.Tenant, name string) *control.Project {
	return get(r.txn, projectsTable, "name", projectKey(t, name))
}

// Projects returns the projects of a tenant by name, or all of them if the id
// is zero.
func (r *Reader) Projects(t ids.Tenant) (out []*control.Project) {
	if t.IsZero() {
		return all(r.txn, projectsTable)
	}
	each(r.txn, projectsTable, "name", t[:], func(p *control.Project) bool { out = append(out, p); return true })
	return out
}
