package state

import (
	"slices"
	"strings"

	"google.golang.org/protobuf/proto"

	"github.com/relais-mta/relais/control"
	"github.com/relais-mta/relais/control/command"
	"github.com/relais-mta/relais/shared/fault"
	"github.com/relais-mta/relais/shared/ids"
	"github.com/relais-mta/relais/shared/mailaddr"
)

var domainsTable = &table[control.Domain]{
	name: "domains", section: sectionDomains, maxRows: maxDomains, inViews: true,
	key:      func(d *control.Domain) []byte { return text(string(d.Name)) },
	record:   func(d *control.Domain) proto.Message { return command.DomainRecord(d) },
	row:      unmarshalRow[command.Domain, control.Domain],
	revision: func(d *control.Domain) *uint64 { return &d.Revision },
	indexes: []index[control.Domain]{
		{name: "tenant", key: func(d *control.Domain) []byte { return d.Tenant[:] }},
		{name: "reversed", unique: true, key: func(d *control.Domain) []byte { return reversed(d.Name) }},
		{name: "return_path", key: func(d *control.Domain) []byte { return reversed(d.ReturnPath) }},
	},
}

// reversed turns mail.example.com into "com.example.mail.", so that all names
// below one name share its prefix.
func reversed(d mailaddr.Domain) []byte {
	labels := strings.Split(string(d), ".")
	slices.Reverse(labels)
	return []byte(strings.Join(labels, ".") + ".")
}

func (a *applier) domainPut(c *command.DomainPut) (any, error) {
	row, err := c.GetDomain().Row()
	if err != nil {
		return nil, err
	}
	return putRow(a, domainsTable, row, change[control.Domain]{what: quoted("domain", string(row.Name)), object: string(row.Name), expect: c.GetExpect(), check: func(old *control.Domain) error {
		if get(a.txn, tenantsTable, "id", row.Tenant[:]) == nil {
			return fault.Field(op, "tenant", "%s does not exist", row.Tenant)
		}
		if old != nil && old.Tenant != row.Tenant {
			return foreign("domain", row.Name, old.Name)
		}
		if err := a.ownable("domain", row.Name, row.Tenant); err != nil {
			return err
		}
		return a.ownable("return_path", row.ReturnPath, row.Tenant)
	}})
}

func foreign(field string, name, owned mailaddr.Domain) error {
	e := fault.New(fault.Denied, op, "%s belongs to another tenant, which has %s: the first tenant keeps a domain and everything below it", name, owned)
	e.Field = field
	return e
}

// ownable refuses a name that is, lies below, or lies above a domain of
// another tenant, or that is or lies above a return path of another tenant.
func (a *applier) ownable(field string, name mailaddr.Domain, tenant ids.Tenant) error {
	for up := name; ; {
		if d := get(a.txn, domainsTable, "id", text(string(up))); d != nil && d.Tenant != tenant {
			return foreign(field, name, d.Name)
		}
		_, rest, ok := strings.Cut(string(up), ".")
		if !ok {
			break
		}
		up = mailaddr.Domain(rest)
	}
	// Return paths count too: failure reports and complaints arrive there.
	for _, ix := range []string{"reversed", "return_path"} {
		var below *control.Domain
		each(a.txn, domainsTable, ix, reversed(name), func(d *control.Domain) bool {
			if d.Tenant != tenant {
				below = d
			}
			return below == nil
		})
		if below != nil {
			return foreign(field, name, below.Name)
		}
	}
	return nil
}

// Domain returns the domain of exactly that name, or nil.
func (r *Reader) Domain(name mailaddr.Domain) *control.Domain {
	return get(r.txn, domainsTable, "id", text(string(name)))
}

// Domains returns the domains of a tenant, or all by name if the id is zero.
func (r *Reader) Domains(t ids.Tenant) (out []*control.Domain) {
	if t.IsZero() {
		return all(r.txn, domainsTable)
	}
	each(r.txn, domainsTable, "tenant", t[:], func(d *control.Domain) bool { out = append(out, d); return true })
	return out
}
