package state

import (
	"fmt"
	"net/netip"

	"google.golang.org/protobuf/proto"

	"github.com/relais-mta/relais/control"
	"github.com/relais-mta/relais/control/command"
	"github.com/relais-mta/relais/shared/fault"
	"github.com/relais-mta/relais/shared/ids"
	"github.com/relais-mta/relais/shared/policy"
)

var poolsTable = &table[control.Pool]{
	name: "pools", section: sectionPools, maxRows: maxPools, inViews: true,
	key:      func(p *control.Pool) []byte { return p.ID[:] },
	record:   func(p *control.Pool) proto.Message { return command.PoolRecord(p) },
	row:      unmarshalRow[command.Pool, control.Pool],
	revision: func(p *control.Pool) *uint64 { return &p.Revision },
	indexes:  []index[control.Pool]{{name: "name", unique: true, key: func(p *control.Pool) []byte { return text(p.Name) }}},
}

var sourcesTable = &table[control.Source]{
	name: "ips", section: sectionSources, maxRows: maxSources, inViews: true,
	key:      func(s *control.Source) []byte { return s.ID[:] },
	record:   func(s *control.Source) proto.Message { return command.SourceRecord(s) },
	row:      unmarshalRow[command.Source, control.Source],
	revision: func(s *control.Source) *uint64 { return &s.Revision },
	indexes: []index[control.Source]{
		{name: "bind", unique: true, key: func(s *control.Source) []byte { return addrKey(s.Bind) }},
		{name: "public", unique: true, key: func(s *control.Source) []byte { return addrKey(s.Public) }},
		{name: "leased", unique: true, key: leasedKey},
	},
}

// addrKey makes an index key of fixed length, so that an IPv4 address is never
// the prefix of an IPv6 one.
func addrKey(a netip.Addr) []byte {
	k := a.As16()
	return k[:]
}

func (a *applier) poolPut(c *command.PoolPut) (any, error) {
	row, err := c.GetPool().Row()
	if err != nil {
		return nil, err
	}
	return putRow(a, poolsTable, row, change[control.Pool]{what: quoted("pool", row.Name), object: row.ID.String(), expect: c.GetExpect(), check: func(old *control.Pool) error {
		if (row.Kind == policy.PoolDedicated) == row.Tenant.IsZero() {
			return fault.Field(op, "tenant", "a dedicated pool belongs to one tenant, a shared pool to none")
		}
		if !row.Tenant.IsZero() && get(a.txn, tenantsTable, "id", row.Tenant[:]) == nil {
			return fault.Field(op, "tenant", "%s does not exist", row.Tenant)
		}
		if other := get(a.txn, poolsTable, "name", text(row.Name)); other != nil && other.ID != row.ID {
			return taken("name", "pool", row.Name)
		}
		// A3: an address never carries another tenant's mail because its pool
		// changed hands.
		if old != nil && (old.Kind != row.Kind || old.Tenant != row.Tenant) {
			return fault.Field(op, "kind", "a pool never changes kind or tenant: make a new pool and assign addresses to it")
		}
		return nil
	}})
}

func (a *applier) sourcePut(c *command.IPPut) (any, error) {
	row, err := c.GetSource().Row()
	if err != nil {
		return nil, err
	}
	return putRow(a, sourcesTable, row, change[control.Source]{what: "address " + row.Bind.String(), object: row.Bind.String(), expect: c.GetExpect(), check: func(old *control.Source) error {
		if err := a.addressFree(row); err != nil {
			return err
		}
		if old == nil {
			old = &control.Source{State: control.SourceFree}
			if err := unplaced(row, old); err != nil {
				return err
			}
			return a.place(old, row, &command.IPAssign{Node: c.GetNode(), Pool: c.GetPool()})
		}
		return unplaced(row, old)
	}})
}

// unplaced refuses a row whose placement differs from the old one's.
func unplaced(row, old *control.Source) error {
	if row.Owner != old.Owner || row.Pool != old.Pool || row.Epoch != old.Epoch || row.State != old.State || row.Quarantine != old.Quarantine || row.Leased != old.Leased {
		return fault.Field(op, "owner", "owner and pool change by assignment only")
	}
	return nil
}

// addressFree refuses an address that another source has, on either side of a NAT.
func (a *applier) addressFree(row *control.Source) error {
	if other := get(a.txn, sourcesTable, "bind", addrKey(row.Bind)); other != nil && other.ID != row.ID {
		return duplicate("bind", row.Bind, other)
	}
	if other := get(a.txn, sourcesTable, "public", addrKey(row.Public)); other != nil && other.ID != row.ID {
		return duplicate("public", row.Public, other)
	}
	return nil
}

func duplicate(field string, addr netip.Addr, other *control.Source) error {
	e := fault.New(fault.Exists, op, "%s is the %s address of %s already: an address is added once, then assigned with `relais-control ip assign`", addr, field, other.ID)
	e.Field = field
	return e
}

func (a *applier) sourceAssign(c *command.IPAssign) (any, error) {
	old := get(a.txn, sourcesTable, "id", c.GetSource())
	if old == nil {
		return nil, fault.New(fault.NotFound, op, "there is no such address")
	}
	row := *old
	if err := a.place(old, &row, c); err != nil {
		return nil, err
	}
	expect := c.GetExpect()
	if expect == 0 {
		expect = old.Revision
	}
	return putRow(a, sourcesTable, &row, change[control.Source]{what: "address " + row.Bind.String(), object: row.Bind.String(), expect: expect})
}

// place gives row the pool and the owner that an assignment names.
func (a *applier) place(old, row *control.Source, c *command.IPAssign) error {
	if len(c.GetPool()) > 0 {
		pool := get(a.txn, poolsTable, "id", c.GetPool())
		if pool == nil {
			return fault.Field(op, "pool", "there is no such pool")
		}
		if err := a.poolChangeAllowed(old, pool); err != nil {
			return err
		}
		row.Pool = pool.ID
	}
	if len(c.GetNode()) > 0 {
		return a.newOwner(old, row, c)
	}
	return nil
}

// newOwner hands the address to a node under a new epoch. A2: the epoch is the
// index of this entry, so it only grows. A1: an address that a machine may
// still be using changes hands only on an operator's word that it is off.
func (a *applier) newOwner(old, row *control.Source, c *command.IPAssign) error {
	node := get(a.txn, nodesTable, "id", c.GetNode())
	if node == nil {
		return fault.Field(op, "node", "there is no such node")
	}
	if node.State != control.NodeActive {
		return fault.Field(op, "node", "%q is %s: only an active node takes addresses", node.Name, node.State)
	}
	if old.Owner == node.ID && old.State == control.SourceAssigned {
		return nil
	}
	if err := a.recovering(); err != nil {
		return err
	}
	if why := a.keptBy(old, node, c.GetOldOwnerIsOff()); why != "" {
		e := fault.New(fault.Conflict, op, "%s %s", old.Bind, why)
		e.Field = "node"
		return e
	}
	row.Owner, row.Epoch, row.State, row.Quarantine = node.ID, a.index, control.SourceAssigned, ""
	row.Leased = a.leases(row)
	return nil
}

// keptBy says why an address is not given to a node now; empty: it may be. A relay
// that has not let go of it yet may have it again.
func (a *applier) keptBy(old *control.Source, to *control.Node, ownerIsOff bool) string {
	quarantined := old.State == control.SourceQuarantined
	if old.Owner.IsZero() {
		if quarantined {
			return "is in quarantine: end that first with `relais-control ip unquarantine`"
		}
		return ""
	}
	if ownerIsOff || old.Owner == to.ID && !quarantined {
		return ""
	}
	name := old.Owner.String()
	if n := get(a.txn, nodesTable, "id", old.Owner[:]); n != nil {
		name = fmt.Sprintf("%q (%s)", n.Name, name)
	}
	switch old.State {
	case control.SourceReleasing:
		return "is being released by node " + name + ": wait until `relais-control ip list` shows it as free, or switch that machine off and say so with --old-owner-is-off"
	case control.SourceQuarantined:
		return "is in quarantine, and node " + name + " may still use it: switch that machine off and say so with --old-owner-is-off"
	}
	if old.Leased && old.Usable() {
		return "is assigned to node " + name + ": release it with `relais-control ip release`, or wait: it is floating, and free by itself when that relay is silent"
	}
	return "is assigned to node " + name + ": release it with `relais-control ip release`, or switch that machine off and say so with --old-owner-is-off"
}

// poolChangeAllowed enforces A3: an address of a tenant's dedicated pool does
// not carry others' mail later, nor does a tenant inherit what others did. From one
// to the other it passes through quarantine, when nobody has it.
func (a *applier) poolChangeAllowed(old *control.Source, to *control.Pool) error {
	if old.Pool.IsZero() || old.Pool == to.ID {
		return nil
	}
	from := get(a.txn, poolsTable, "id", old.Pool[:])
	if aside := old.State == control.SourceQuarantined && old.Owner.IsZero(); from != nil && from.Tenant != to.Tenant && !aside {
		e := fault.New(fault.Conflict, op, "%s is in pool %q, which is not for the same tenant as %q: an address passes from one tenant's mail to another's only through quarantine (`relais-control ip quarantine`), when no relay has it", old.Bind, from.Name, to.Name)
		e.Field = "pool"
		return e
	}
	return nil
}

// Pool returns the pool, or nil.
func (r *Reader) Pool(id ids.Pool) *control.Pool { return get(r.txn, poolsTable, "id", id[:]) }

// PoolByName returns the pool of that name, or nil.
func (r *Reader) PoolByName(name string) *control.Pool {
	return get(r.txn, poolsTable, "name", text(name))
}

// Pools returns the pools, oldest first.
func (r *Reader) Pools() []*control.Pool { return all(r.txn, poolsTable) }

// Source returns the source, or nil.
func (r *Reader) Source(id ids.Source) *control.Source { return get(r.txn, sourcesTable, "id", id[:]) }

// SourceByAddr returns the source with that bind address or, failing that,
// that public address, or nil.
func (r *Reader) SourceByAddr(addr netip.Addr) *control.Source {
	if s := get(r.txn, sourcesTable, "bind", addrKey(addr)); s != nil {
		return s
	}
	return get(r.txn, sourcesTable, "public", addrKey(addr))
}

// Sources returns the sources, oldest first.
func (r *Reader) Sources() []*control.Source { return all(r.txn, sourcesTable) }
