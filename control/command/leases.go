package command

import (
	"time"

	"github.com/relais-mta/relais/control"
	"github.com/relais-mta/relais/shared/fault"
	"github.com/relais-mta/relais/shared/lease"
)

// The commands about limits that relays share.
const (
	TypeLimitsSet    Type = 81
	TypeLeaseBegin   Type = 82
	TypeLeaseNumber  Type = 83
	TypeLeaseTick    Type = 84
	TypeLeaseDeclare Type = 85
)

// Bounds of what commands about shared limits carry, so that each stays below
// MaxBytes.
const (
	MaxLimitsInSet    = 1_000  // put or dropped by one command
	MaxLeaseChanges   = 4_000  // in one tick; a leader makes several commands of a larger one
	MaxLeaseNumbers   = 1_000  // relays numbered by one command
	MaxDeclaredFloors = 10_000 // of one relay
	maxLimitTextBytes = 256
	maxLeaseSessions  = 4_000
)

func leasesType(c Command) Type {
	switch c.(type) {
	case *LimitsSet:
		return TypeLimitsSet
	case *LeaseBegin:
		return TypeLeaseBegin
	case *LeaseNumber:
		return TypeLeaseNumber
	case *LeaseTick:
		return TypeLeaseTick
	case *LeaseDeclare:
		return TypeLeaseDeclare
	}
	return 0
}

// LeaseConfigRecord returns the record of the lengths of time.
func LeaseConfigRecord(c lease.Config) *LeaseConfig {
	return &LeaseConfig{TtlMs: c.TTL.Milliseconds(), FloorTtlMs: c.FloorTTL.Milliseconds(), GuardMs: c.Guard.Milliseconds(), LingerMs: c.Linger.Milliseconds(), HoldMs: c.Hold.Milliseconds(), FloorGapMs: c.FloorGap.Milliseconds()}
}

// Config returns the lengths of time of the record, zero if there is none.
func (r *LeaseConfig) Config() lease.Config {
	ms := func(n int64) time.Duration { return time.Duration(n) * time.Millisecond }
	return lease.Config{TTL: ms(r.GetTtlMs()), FloorTTL: ms(r.GetFloorTtlMs()), Guard: ms(r.GetGuardMs()), Linger: ms(r.GetLingerMs()), Hold: ms(r.GetHoldMs()), FloorGap: ms(r.GetFloorGapMs())}
}

// LeaseRecord returns the record of the row.
func LeaseRecord(l *control.Lease) *Lease {
	return &Lease{Epoch: l.Epoch, LastLimit: uint64(l.LastLimit), LastNode: uint64(l.LastNode), Changed: l.Changed, Holders: uint64(l.Holders), Config: LeaseConfigRecord(l.Config), Reclaim: LeaseConfigRecord(l.Reclaim), Settling: l.Settling}
}

// Row returns the row of the record.
func (r *Lease) Row() (*control.Lease, error) {
	return &control.Lease{Epoch: r.GetEpoch(), LastLimit: lease.LimitID(r.GetLastLimit()), LastNode: lease.Node(r.GetLastNode()), Changed: r.GetChanged(), Holders: int(r.GetHolders()), Config: r.GetConfig().Config(), Reclaim: r.GetReclaim().Config(), Settling: r.GetSettling()}, nil
}

// SharedLimitRecord returns the record of the row.
func SharedLimitRecord(l *control.SharedLimit) *SharedLimit {
	return &SharedLimit{Id: uint64(l.ID), Name: l.Name, Kind: uint32(l.Kind), Max: l.Max, PerMs: l.Per.Milliseconds(), Burst: l.Burst, FloorPercent: uint32(l.FloorPercent), ReservePercent: uint32(l.ReservePercent), SoftFloor: l.SoftFloor,
		Provider: l.Provider, Tenant: l.Tenant, Domain: l.Domain, Pool: l.Pool}
}

// Row returns the row of the record.
func (r *SharedLimit) Row() (*control.SharedLimit, error) {
	return &control.SharedLimit{Name: r.GetName(), Provider: r.GetProvider(), Tenant: r.GetTenant(), Domain: r.GetDomain(), Pool: r.GetPool(),
		Limit: lease.Limit{ID: lease.LimitID(r.GetId()), Kind: lease.Kind(min(r.GetKind(), 255)), Max: r.GetMax(), Per: time.Duration(r.GetPerMs()) * time.Millisecond, Burst: r.GetBurst(),
			FloorPercent: int(min(r.GetFloorPercent(), 1000)), ReservePercent: int(min(r.GetReservePercent(), 1000)), SoftFloor: r.GetSoftFloor()}}, nil
}

// LeaseNodeRecord returns the record of the row.
func LeaseNodeRecord(n *control.LeaseNode) *LeaseNode {
	return &LeaseNode{Id: optionalID(n.ID), Number: uint64(n.Number), Incarnation: n.Incarnation, Gone: n.Gone, Declared: n.Declared, WarmDeclared: n.WarmDeclared}
}

// Row returns the row of the record.
func (r *LeaseNode) Row() (*control.LeaseNode, error) {
	var s scan
	n := &control.LeaseNode{Number: lease.Node(r.GetNumber()), Incarnation: r.GetIncarnation(), Gone: r.GetGone(), Declared: r.GetDeclared(), WarmDeclared: r.GetWarmDeclared()}
	setID(&s, "node", &n.ID, r.GetId())
	return n, s.err
}

// HoldingsRecord returns the record of the row.
func HoldingsRecord(h *control.Holdings) *Holdings {
	n := len(h.Of)
	amounts := make([]int64, 4*n)
	r := &Holdings{Limit: uint64(h.Limit), Nodes: make([]uint64, n), Ceilings: amounts[:n:n], CeilingBursts: amounts[n : 2*n : 2*n], Floors: amounts[2*n : 3*n : 3*n], FloorBursts: amounts[3*n:]}
	for i := range h.Of {
		o := &h.Of[i]
		r.Nodes[i], r.Ceilings[i], r.CeilingBursts[i], r.Floors[i], r.FloorBursts[i] = uint64(o.Node), o.Ceiling.Amount, o.Ceiling.Burst, o.Floor.Amount, o.Floor.Burst
	}
	return r
}

// Row returns the row of the record.
func (r *Holdings) Row() (*control.Holdings, error) {
	n := len(r.GetNodes())
	if len(r.GetCeilings()) != n || len(r.GetCeilingBursts()) != n || len(r.GetFloors()) != n || len(r.GetFloorBursts()) != n {
		return nil, fault.New(fault.Invalid, opValidate, "the holdings of limit %d are lists of different length", r.GetLimit())
	}
	h := &control.Holdings{Limit: lease.LimitID(r.GetLimit()), Of: make([]lease.Holding, n)}
	for i, node := range r.GetNodes() {
		h.Of[i] = lease.Holding{Limit: h.Limit, Node: lease.Node(node), Ceiling: lease.Share{Amount: r.Ceilings[i], Burst: r.CeilingBursts[i]}, Floor: lease.Share{Amount: r.Floors[i], Burst: r.FloorBursts[i]}}
	}
	return h, nil
}

// NewLeaseTick returns the command of a part of a tick.
func NewLeaseTick(epoch uint64, sessions []lease.Session, changes []lease.Change) *LeaseTick {
	n := len(changes)
	numbers, amounts := make([]uint64, 3*n), make([]int64, 4*n)
	c := &LeaseTick{Epoch: epoch, Limits: numbers[:n:n], Nodes: numbers[n : 2*n : 2*n], Incarnations: numbers[2*n:], Reasons: make([]uint32, n),
		Ceilings: amounts[:n:n], CeilingBursts: amounts[n : 2*n : 2*n], Floors: amounts[2*n : 3*n : 3*n], FloorBursts: amounts[3*n:]}
	for _, s := range sessions {
		c.SessionNodes, c.SessionIncarnations = append(c.SessionNodes, uint64(s.Node)), append(c.SessionIncarnations, s.Incarnation)
	}
	for i := range changes {
		x := &changes[i]
		c.Limits[i], c.Nodes[i], c.Incarnations[i], c.Reasons[i] = uint64(x.Limit), uint64(x.Node), x.Incarnation, uint32(x.Why)
		c.Ceilings[i], c.CeilingBursts[i], c.Floors[i], c.FloorBursts[i] = x.Ceiling.Amount, x.Ceiling.Burst, x.Floor.Amount, x.Floor.Burst
	}
	return c
}

// Tick returns what the command carries. The command is valid.
func (c *LeaseTick) Tick() *lease.Tick {
	t := &lease.Tick{Sessions: make([]lease.Session, len(c.GetSessionNodes())), Changes: make([]lease.Change, len(c.GetLimits()))}
	for i, n := range c.GetSessionNodes() {
		t.Sessions[i] = lease.Session{Node: lease.Node(n), Incarnation: c.SessionIncarnations[i]}
	}
	for i, l := range c.GetLimits() {
		t.Changes[i] = lease.Change{Limit: lease.LimitID(l), Node: lease.Node(c.Nodes[i]), Incarnation: c.Incarnations[i], Why: lease.Reason(min(c.Reasons[i], 255)),
			Ceiling: lease.Share{Amount: c.Ceilings[i], Burst: c.CeilingBursts[i]}, Floor: lease.Share{Amount: c.Floors[i], Burst: c.FloorBursts[i]}}
	}
	return t
}

// Validate implements Command.
func (c *LimitsSet) Validate() error {
	if n := len(c.GetPut()) + len(c.GetDrop()); n > MaxLimitsInSet {
		return fault.Field(opValidate, "put", "and drop name %d limits, allowed are %d: split the change", n, MaxLimitsInSet)
	}
	for _, r := range c.GetPut() {
		row, err := r.Row()
		if err != nil {
			return err
		}
		if row.ID != 0 {
			return fault.Field(opValidate, "put", "gives limit %q the number %d: the state numbers limits", row.Name, row.ID)
		}
		row.ID = 1 // it gets one
		if err := row.Validate(); err != nil {
			return err
		}
		for field, text := range map[string]string{"name": r.GetName(), "provider": r.GetProvider(), "tenant": r.GetTenant(), "domain": r.GetDomain(), "pool": r.GetPool()} {
			if len(text) > maxLimitTextBytes {
				return fault.Field(opValidate, field, "has %d bytes, allowed are %d", len(text), maxLimitTextBytes)
			}
		}
		if err := CheckName("name", r.GetName()); err != nil {
			return err
		}
	}
	if c.GetConfig() != nil {
		if err := c.GetConfig().Config().Validate(); err != nil {
			return err
		}
	}
	return checkMeta(c.GetMeta())
}

// Validate implements Command.
func (c *LeaseBegin) Validate() error { return checkMeta(c.GetMeta()) }

// Validate implements Command.
func (c *LeaseNumber) Validate() error {
	if n := len(c.GetNodes()); n == 0 || n > MaxLeaseNumbers {
		return fault.Field(opValidate, "nodes", "are %d, allowed are 1 to %d", n, MaxLeaseNumbers)
	}
	for _, n := range c.GetNodes() {
		if len(n) != 16 {
			return fault.Field(opValidate, "nodes", "hold an id of %d bytes, want 16", len(n))
		}
	}
	return checkMeta(c.GetMeta())
}

// Validate implements Command.
func (c *LeaseTick) Validate() error {
	n := len(c.GetLimits())
	switch {
	case c.GetEpoch() == 0:
		return missing("epoch")
	case len(c.GetSessionNodes()) != len(c.GetSessionIncarnations()) || len(c.GetSessionNodes()) > maxLeaseSessions:
		return fault.Field(opValidate, "session_nodes", "are %d, with %d incarnations, allowed are %d of each", len(c.GetSessionNodes()), len(c.GetSessionIncarnations()), maxLeaseSessions)
	case n > MaxLeaseChanges:
		return fault.Field(opValidate, "limits", "are %d changes, allowed are %d: split the tick", n, MaxLeaseChanges)
	}
	for _, other := range []int{len(c.GetNodes()), len(c.GetIncarnations()), len(c.GetCeilings()), len(c.GetCeilingBursts()), len(c.GetFloors()), len(c.GetFloorBursts()), len(c.GetReasons())} {
		if other != n {
			return fault.Field(opValidate, "limits", "and the other lists of a tick are of different length: %d and %d", n, other)
		}
	}
	return checkMeta(c.GetMeta())
}

// Validate implements Command.
func (c *LeaseDeclare) Validate() error {
	n := len(c.GetLimits())
	switch {
	case len(c.GetNode()) != 16:
		return fault.Field(opValidate, "node", "is an id of %d bytes, want 16", len(c.GetNode()))
	case n > MaxDeclaredFloors || len(c.GetFloors()) != n || len(c.GetFloorBursts()) != n:
		return fault.Field(opValidate, "limits", "and floors are %d and %d, allowed are %d, as many of each", n, len(c.GetFloors()), MaxDeclaredFloors)
	}
	for i := range n {
		if c.Floors[i] < 0 || c.FloorBursts[i] < 0 || c.Floors[i] > lease.MaxEvents*lease.Milli || c.FloorBursts[i] > lease.MaxBurst {
			return fault.Field(opValidate, "floors", "of limit %d are %d and %d, which no limit allows", c.Limits[i], c.Floors[i], c.FloorBursts[i])
		}
	}
	return checkMeta(c.GetMeta())
}
