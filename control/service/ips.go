package service

import (
	"cmp"
	"context"
	"net/netip"
	"slices"

	"github.com/relais-mta/relais/control"
	"github.com/relais-mta/relais/control/command"
	"github.com/relais-mta/relais/control/state"
	"github.com/relais-mta/relais/shared/fault"
	"github.com/relais-mta/relais/shared/ids"
	"github.com/relais-mta/relais/shared/policy"
)

// AddPool makes a pool. A dedicated pool names its tenant, a shared one none.
func (s *Service) AddPool(ctx context.Context, a Actor, name string, kind policy.PoolKind, tenant string, c Change) (*control.Pool, error) {
	const op = "service.AddPool"
	if err := s.enter(a, control.RoleOperator, op); err != nil {
		return nil, err
	}
	if err := checkNewName(op, name); err != nil {
		return nil, err
	}
	if kind == "" {
		kind = policy.PoolShared
		if tenant != "" {
			kind = policy.PoolDedicated
		}
	}
	owner, err := optionalTenant(s.state.Read(), tenant)
	if err != nil {
		return nil, err
	}
	at := now()
	row := control.Pool{Name: name, Kind: kind, Tenant: owner, CreatedAt: at}
	stamp(&row.ID, at)
	return propose[control.Pool](ctx, s, &command.PoolPut{Meta: c.meta(a), Pool: command.PoolRecord(&row)})
}

// PoolView is a pool with its addresses.
type PoolView struct {
	control.Pool
	Sources []*control.Source
}

// Pools returns the pools, oldest first.
func (s *Service) Pools(a Actor) ([]PoolView, error) {
	if err := s.enter(a, control.RoleViewer, "service.Pools"); err != nil {
		return nil, err
	}
	r := s.state.Read()
	byPool := map[ids.Pool][]*control.Source{}
	for _, src := range r.Sources() {
		byPool[src.Pool] = append(byPool[src.Pool], src)
	}
	rows := r.Pools()
	out := make([]PoolView, 0, len(rows))
	for _, p := range rows {
		out = append(out, PoolView{Pool: *p, Sources: byPool[p.ID]})
	}
	return out, nil
}

// Pool returns one pool, by id or name.
func (s *Service) Pool(a Actor, ref string) (PoolView, error) {
	all, err := s.Pools(a)
	if err != nil {
		return PoolView{}, err
	}
	row, err := poolByRef(s.state.Read(), ref)
	if err != nil {
		return PoolView{}, err
	}
	for _, p := range all {
		if p.ID == row.ID {
			return p, nil
		}
	}
	return PoolView{}, notFound("pool", "pool", ref)
}

func poolByRef(r *state.Reader, ref string) (*control.Pool, error) {
	var id ids.Pool
	p := (*control.Pool)(nil)
	if parseID(&id, ref) {
		p = r.Pool(id)
	} else {
		p = r.PoolByName(ref)
	}
	if p == nil {
		return nil, notFound("pool", "pool", ref)
	}
	return p, nil
}

// IPRequest describes an address. Node and Pool may be empty: the address is
// then assigned later.
type IPRequest struct {
	Bind     netip.Addr
	Public   netip.Addr // invalid: the same as Bind
	EHLO     string
	PTR      string
	Floating bool // the address can move between machines; not pinned to one
	Node     string
	Pool     string
}

// AddIP makes a source address and, in the same change, assigns it if node or
// pool are named.
func (s *Service) AddIP(ctx context.Context, a Actor, req IPRequest, c Change) (*control.Source, error) {
	const op = "service.AddIP"
	if err := s.enter(a, control.RoleOperator, op); err != nil {
		return nil, err
	}
	if !req.Bind.IsValid() || req.Bind.Zone() != "" {
		return nil, fault.Field(op, "address", "is not an IP address such as 192.0.2.1 or 2001:db8::1")
	}
	if !req.Public.IsValid() {
		req.Public = req.Bind
	}
	req.EHLO, req.PTR = plainName(req.EHLO), plainName(req.PTR)
	for _, err := range []error{checkSourceAddr(op, "bind", req.Bind.Unmap()), checkSourceAddr(op, "public", req.Public.Unmap()), checkHostName(op, "ehlo", req.EHLO), checkHostName(op, "ptr", cmp.Or(req.PTR, req.EHLO))} {
		if err != nil {
			return nil, err
		}
	}
	if req.Floating {
		if err := s.needs(op, "a floating address", control.FloatingVersion); err != nil {
			return nil, err
		}
	}
	node, pool, err := s.placeOf(req.Node, req.Pool)
	if err != nil {
		return nil, err
	}
	at := now()
	row := control.Source{Bind: req.Bind.Unmap(), Public: req.Public.Unmap(), EHLO: req.EHLO, PTR: req.PTR, Pinned: !req.Floating, State: control.SourceFree, CreatedAt: at}
	stamp(&row.ID, at)
	return propose[control.Source](ctx, s, &command.IPPut{Meta: c.meta(a), Source: command.SourceRecord(&row), Node: node, Pool: pool})
}

// placeOf looks up a node and a pool; either may be empty.
func (s *Service) placeOf(nodeRef, poolRef string) (node, pool []byte, err error) {
	if nodeRef != "" {
		n, err := s.nodeByRef(nodeRef)
		if err != nil {
			return nil, nil, err
		}
		if n.State != control.NodeActive {
			return nil, nil, fault.Field("service", "node", "%q is %s: only an active node takes addresses", n.Name, n.State)
		}
		node = n.ID[:]
	}
	if poolRef != "" {
		p, err := poolByRef(s.state.Read(), poolRef)
		if err != nil {
			return nil, nil, err
		}
		pool = p.ID[:]
	}
	return node, pool, nil
}

// AssignRequest gives an address to a relay, to a pool, or to both.
type AssignRequest struct {
	Node          string
	Pool          string
	OldOwnerIsOff bool // an operator's word that the machine that held the address is switched off
}

// AssignIP assigns an address, named by itself or by its id.
func (s *Service) AssignIP(ctx context.Context, a Actor, ref string, req AssignRequest, c Change) (*control.Source, error) {
	const op = "service.AssignIP"
	if err := s.enter(a, control.RoleOperator, op); err != nil {
		return nil, err
	}
	src, err := sourceByRef(s.state.Read(), ref)
	if err != nil {
		return nil, err
	}
	if req.Node == "" && req.Pool == "" {
		return nil, fault.Field(op, "node", "is missing: name the relay or the pool that gets the address")
	}
	node, pool, err := s.placeOf(req.Node, req.Pool)
	if err != nil {
		return nil, err
	}
	if err := s.checkLease(ctx, src, node, req); err != nil {
		return nil, err
	}
	return propose[control.Source](ctx, s, &command.IPAssign{Meta: c.meta(a), Expect: c.revision(src.Revision), Source: src.ID[:], Node: node, Pool: pool, OldOwnerIsOff: req.OldOwnerIsOff})
}

func sourceByRef(r *state.Reader, ref string) (*control.Source, error) {
	var id ids.Source
	if parseID(&id, ref) {
		if src := r.Source(id); src != nil {
			return src, nil
		}
	} else if addr, err := netip.ParseAddr(ref); err == nil {
		if src := r.SourceByAddr(addr.Unmap()); src != nil {
			return src, nil
		}
	}
	return nil, notFound("ip", "ip", ref)
}

// IPView is an address with the names of its owner and pool, and whether the
// owner reported it as present on its host.
type IPView struct {
	control.Source
	OwnerName string
	PoolName  string
	Present   *bool  // nil: the owner is not connected
	Unused    string // why no mail leaves from it; empty: it may
	Lease     *AddressLease
}

// IPs returns the addresses, oldest first.
func (s *Service) IPs(ctx context.Context, a Actor) ([]IPView, error) {
	if err := s.enter(a, control.RoleViewer, "service.IPs"); err != nil {
		return nil, err
	}
	r := s.state.Read()
	rows := r.Sources()
	heard := s.seenAnywhere()
	out := make([]IPView, 0, len(rows))
	for _, src := range rows {
		out = append(out, ipView(r, src, heard))
	}
	s.addLeases(ctx, out)
	return out, nil
}

// IPView returns one address with its names.
func (s *Service) IPView(ctx context.Context, a Actor, ref string) (IPView, error) {
	if err := s.enter(a, control.RoleViewer, "service.IPView"); err != nil {
		return IPView{}, err
	}
	r := s.state.Read()
	src, err := sourceByRef(r, ref)
	if err != nil {
		return IPView{}, err
	}
	out := []IPView{ipView(r, src, s.seenAnywhere())}
	s.addLeases(ctx, out)
	return out[0], nil
}

func ipView(r *state.Reader, src *control.Source, heard map[ids.Node]Seen) IPView {
	v := IPView{Source: *src, Unused: unused(r, src)}
	if n := r.Node(src.Owner); n != nil {
		v.OwnerName = n.Name
	}
	if p := r.Pool(src.Pool); p != nil {
		v.PoolName = p.Name
	}
	seen := heard[src.Owner]
	if !seen.Connected {
		return v
	}
	switch {
	case seen.Report != nil && seen.Report.Revision >= src.Revision: // it knows of the assignment
		present := !slices.Contains(seen.Report.Missing, src.ID)
		v.Present = &present
	case slices.Contains(seen.Addresses, src.Bind):
		present := true
		v.Present = &present
	} // else it has not looked yet: an address can be its own without being listed at an interface
	return v
}
