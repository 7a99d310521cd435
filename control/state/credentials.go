package state

import (
	"google.golang.org/protobuf/proto"

	"github.com/relais-mta/relais/control"
	"github.com/relais-mta/relais/control/command"
	"github.com/relais-mta/relais/shared/fault"
	"github.com/relais-mta/relais/shared/ids"
)

var credentialsTable = &table[control.Credential]{
	name: "credentials", section: sectionCredentials, maxRows: maxCredentials, inViews: true,
	key:      func(c *control.Credential) []byte { return c.ID[:] },
	record:   func(c *control.Credential) proto.Message { return command.CredentialRecord(c) },
	row:      unmarshalRow[command.Credential, control.Credential],
	revision: func(c *control.Credential) *uint64 { return &c.Revision },
	indexes:  []index[control.Credential]{{name: "tenant", key: func(c *control.Credential) []byte { return c.Tenant[:] }}},
}

// credentialCommand is CredentialPut or CredentialPutScoped.
type credentialCommand interface {
	GetCredential() *command.Credential
	GetExpect() uint64
}

func (a *applier) credentialPut(c credentialCommand) (any, error) {
	row, err := c.GetCredential().Row()
	if err != nil {
		return nil, err
	}
	return putRow(a, credentialsTable, row, change[control.Credential]{what: quoted("credential", row.ID.String()), object: row.ID.String(), expect: c.GetExpect(), check: func(old *control.Credential) error {
		p := get(a.txn, projectsTable, "id", row.Project[:])
		if p == nil || p.Tenant != row.Tenant {
			return fault.Field(op, "project", "%s is not a project of tenant %s", row.Project, row.Tenant)
		}
		if old == nil {
			return nil
		}
		if old.Revoked && !row.Revoked {
			return fault.New(fault.Conflict, op, "credential %s is revoked for good: create a new one", row.ID)
		}
		if old.Project != row.Project || old.Tenant != row.Tenant {
			return fault.Field(op, "project", "a credential never changes its project: create a new one")
		}
		return nil
	}})
}

func (a *applier) credentialRevoke(c *command.CredentialRevoke) (any, error) {
	old := get(a.txn, credentialsTable, "id", c.GetCredential())
	if old == nil {
		return nil, fault.New(fault.NotFound, op, "there is no such credential")
	}
	row := *old
	row.Revoked = true
	return putRow(a, credentialsTable, &row, change[control.Credential]{what: "the credential", object: row.ID.String(), expect: old.Revision})
}

// Credential returns the credential, or nil.
func (r *Reader) Credential(id ids.Credential) *control.Credential {
	return get(r.txn, credentialsTable, "id", id[:])
}

// Credentials returns the credentials of a tenant, or all if the id is zero,
// oldest first.
func (r *Reader) Credentials(t ids.Tenant) (out []*control.Credential) {
	if t.IsZero() {
		return all(r.txn, credentialsTable)
	}
	each(r.txn, credentialsTable, "tenant", t[:], func(c *control.Credential) bool { out = append(out, c); return true })
	return out
}
