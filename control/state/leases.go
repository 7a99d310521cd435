package state

import (
	"cmp"
	"encoding/binary"
	"slices"

	"google.golang.org/protobuf/proto"

	"github.com/relais-mta/relais/control"
	"github.com/relais-mta/relais/control/command"
	"github.com/relais-mta/relais/shared/fault"
	"github.com/relais-mta/relais/shared/ids"
	"github.com/relais-mta/relais/shared/lease"
	"github.com/relais-mta/relais/shared/mailaddr"
	"github.com/relais-mta/relais/shared/policy"
)

var leaseTable = &table[control.Lease]{
	name: "lease", section: sectionLease, maxRows: 1,
	key:      func(*control.Lease) []byte { return singleton },
	record:   func(l *control.Lease) proto.Message { return command.LeaseRecord(l) },
	row:      unmarshalRow[command.Lease, control.Lease],
	revision: func(l *control.Lease) *uint64 { return &l.Revision },
}

var sharedLimitsTable = &table[control.SharedLimit]{
	name: "shared limits", section: sectionSharedLimits, maxRows: lease.MaxLimits, inViews: true,
	key:      func(l *control.SharedLimit) []byte { return number(uint64(l.ID)) },
	record:   func(l *control.SharedLimit) proto.Message { return command.SharedLimitRecord(l) },
	row:      unmarshalRow[command.SharedLimit, control.SharedLimit],
	revision: func(l *control.SharedLimit) *uint64 { return &l.Revision },
	indexes:  []index[control.SharedLimit]{{name: "name", unique: true, key: func(l *control.SharedLimit) []byte { return limitName(l.Name, l.Kind) }}},
}

var leaseNodesTable = &table[control.LeaseNode]{
	name: "sharing relays", section: sectionLeaseNodes, maxRows: lease.MaxNodes,
	key:      func(n *control.LeaseNode) []byte { return n.ID[:] },
	record:   func(n *control.LeaseNode) proto.Message { return command.LeaseNodeRecord(n) },
	row:      unmarshalRow[command.LeaseNode, control.LeaseNode],
	revision: func(n *control.LeaseNode) *uint64 { return &n.Revision },
	indexes:  []index[control.LeaseNode]{{name: "number", unique: true, key: func(n *control.LeaseNode) []byte { return number(uint64(n.Number)) }}},
}

var holdingsTable = &table[control.Holdings]{
	name: "holdings", section: sectionHoldings, maxRows: lease.MaxLimits,
	key:      func(h *control.Holdings) []byte { return number(uint64(h.Limit)) },
	record:   func(h *control.Holdings) proto.Message { return command.HoldingsRecord(h) },
	row:      unmarshalRow[command.Holdings, control.Holdings],
	revision: func(h *control.Holdings) *uint64 { return &h.Revision },
}

func number(n uint64) []byte { return binary.BigEndian.AppendUint64(nil, n) }

func limitName(name string, kind lease.Kind) []byte { return append(text(name), byte(kind)) }

// limitNumbersPerGeneration keeps the numbers of limits apart that are given after
// two recoveries from one backup: relays may hold some of either.
const limitNumbersPerGeneration = 1 << 20

// applyLeases dispatches the commands about shared limits; known is false for any
// other command.
func (a *applier) applyLeases(body command.Command) (row any, known bool, err error) {
	switch c := body.(type) {
	case *command.LimitsSet:
		row, err = a.limitsSet(c)
	case *command.LeaseBegin:
		row, err = a.leaseBegin(c)
	case *command.LeaseNumber:
		row, err = a.leaseNumber(c)
	case *command.LeaseTick:
		row, err = a.leaseTick(c)
	case *command.LeaseDeclare:
		row, err = a.leaseDeclare(c)
	default:
		return nil, false, nil
	}
	return row, true, err
}

// lease returns a copy of the row about lending.
func (a *applier) lease() *control.Lease {
	row := control.Lease{Config: lease.DefaultConfig(), Reclaim: lease.DefaultConfig()}
	if old := get(a.txn, leaseTable, "id", singleton); old != nil {
		row = *old
	}
	return &row
}

// limitsSet makes the limits what the policy says.
func (a *applier) limitsSet(c *command.LimitsSet) (any, error) {
	if err := c.Validate(); err != nil {
		return nil, err
	}
	row := a.lease()
	before := *row
	var was, is []string
	for _, id := range c.GetDrop() {
		if old := a.dropLimit(row, id); old != nil {
			was = append(was, old.Summary())
		}
	}
	for _, r := range c.GetPut() {
		old, next, err := a.putLimit(row, r)
		if err != nil {
			return nil, err
		}
		if old != nil && next != nil {
			was = append(was, old.Summary())
		}
		if next != nil {
			is = append(is, next.Summary())
		}
	}
	if len(was)+len(is) > 0 {
		a.audit("limits", clipNames(was), clipNames(is)) // one entry of the log makes one of the tail
	}
	if c.GetConfig() != nil {
		setLeaseConfig(row, c.GetConfig().Config())
		if row.Config != before.Config {
			row.Changed, a.progress.viewIndex = a.index, a.index
		}
	}
	if *row == before {
		return row, nil
	}
	return row, put(a, leaseTable, row)
}

// setLeaseConfig takes the lengths of time for relays over at once. The leader
// goes on with the longer ones while anything is held: a relay that was not told
// yet works by them.
func setLeaseConfig(row *control.Lease, c lease.Config) {
	row.Config = c
	if row.Holders > 0 {
		c.TTL, c.FloorTTL, c.Linger = max(c.TTL, row.Reclaim.TTL), max(c.FloorTTL, row.Reclaim.FloorTTL), max(c.Linger, row.Reclaim.Linger)
	}
	row.Reclaim = c
}

// dropLimit removes a limit and what is held of it, and returns it, nil if there
// was none.
func (a *applier) dropLimit(row *control.Lease, id uint64) *control.SharedLimit {
	old := get(a.txn, sharedLimitsTable, "id", number(id))
	if old == nil {
		return nil
	}
	if h := get(a.txn, holdingsTable, "id", number(id)); h != nil {
		row.Holders -= len(h.Of)
		remove(a, holdingsTable, h)
	}
	remove(a, sharedLimitsTable, old)
	row.Changed = a.index
	return old
}

// putLimit adds a limit or changes the one of its name that counts the same, and
// returns both; next is nil if nothing changed.
func (a *applier) putLimit(row *control.Lease, r *command.SharedLimit) (old, next *control.SharedLimit, err error) {
	if next, err = r.Row(); err != nil {
		return nil, nil, err
	}
	old = get(a.txn, sharedLimitsTable, "name", limitName(next.Name, next.Kind))
	switch {
	case old == nil:
		generation := uint64(0)
		if cluster := get(a.txn, clusterTable, "id", singleton); cluster != nil {
			generation = cluster.Generation
		}
		row.LastLimit = max(row.LastLimit, lease.LimitID(generation*limitNumbersPerGeneration)) + 1
		next.ID = row.LastLimit
	case old.Per != next.Per:
		return nil, nil, fault.New(fault.Conflict, op, "limit %q counts within %v: what relays hold of it means nothing within %v; drop it in the same change, so that it gets a new number", next.Name, old.Per, next.Per)
	default:
		next.ID = old.ID
		if same(sharedLimitsTable, old, next) {
			return old, nil, nil
		}
	}
	row.Changed = a.index
	return old, next, put(a, sharedLimitsTable, next)
}

// leaseBegin begins a leader's lending: its number is that of the entry, so that
// it is higher than any before, and nothing that another leader proposed before
// and that comes later is taken for its own.
func (a *applier) leaseBegin(c *command.LeaseBegin) (any, error) {
	row := a.lease()
	if err := a.recovering(); err != nil {
		return nil, err
	}
	if row.Settling && !c.GetSettled() {
		return nil, fault.New(fault.Conflict, op, "a recovery ended: limits are lent out when the leases of before have run out")
	}
	row.Epoch, row.Settling = a.index, false
	if row.Holders == 0 {
		row.Reclaim = row.Config
	}
	return row, put(a, leaseTable, row)
}

// settleLeases has the next leader wait until what relays held before a recovery
// has run out.
func (a *applier) settleLeases() error {
	if get(a.txn, leaseTable, "id", singleton) == nil {
		return nil
	}
	row := a.lease()
	row.Epoch, row.Settling = 0, true
	return put(a, leaseTable, row)
}

// leaseNumber gives relays the numbers by which they share; those that have one,
// and those that may not, are passed over.
func (a *applier) leaseNumber(c *command.LeaseNumber) (any, error) {
	if err := c.Validate(); err != nil {
		return nil, err
	}
	row := a.lease()
	before := *row
	for _, id := range c.GetNodes() {
		if _, err := a.numberNode(row, ids.Node(id)); err != nil {
			return nil, err
		}
	}
	if *row == before {
		return row, nil
	}
	return row, put(a, leaseTable, row)
}

// numberNode returns a relay's row, nil if it may not share.
func (a *applier) numberNode(row *control.Lease, id ids.Node) (*control.LeaseNode, error) {
	if old := get(a.txn, leaseNodesTable, "id", id[:]); old != nil {
		return old, nil
	}
	if n := get(a.txn, nodesTable, "id", id[:]); n == nil || n.State == control.NodeEvicted {
		return nil, nil
	}
	row.LastNode++
	next := &control.LeaseNode{ID: id, Number: row.LastNode}
	return next, put(a, leaseNodesTable, next)
}

// evictLeases puts a relay out: it gets nothing more, and what it holds stays
// counted until it is reclaimed.
func (a *applier) evictLeases(id ids.Node) error {
	old := get(a.txn, leaseNodesTable, "id", id[:])
	if old == nil || old.Gone {
		return nil
	}
	next := *old
	next.Gone = true
	if err := put(a, leaseNodesTable, &next); err != nil {
		return err
	}
	row := a.lease()
	row.Changed = a.index
	return put(a, leaseTable, row)
}

// leaseDeclare takes in what a relay's disk holds of floors, after a restore: the
// cluster may have given it more than this state knows, and counts the larger of
// the two. So the sum may pass a limit; nothing is given out until it fits.
func (a *applier) leaseDeclare(c *command.LeaseDeclare) (any, error) {
	if err := c.Validate(); err != nil {
		return nil, err
	}
	recovery := get(a.txn, recoveryTable, "id", singleton)
	if recovery == nil {
		return nil, fault.New(fault.Conflict, op, "the cluster is not in recovery mode: what relays hold is known")
	}
	row := a.lease()
	n, err := a.numberNode(row, ids.Node(c.GetNode()))
	if err != nil {
		return nil, err
	}
	if n == nil {
		return nil, fault.New(fault.NotFound, op, "there is no such relay")
	}
	t := a.newLeaseTick(row)
	for i, limit := range c.GetLimits() {
		h := t.holdings(lease.LimitID(limit))
		if h == nil {
			continue // it is gone, and relays are told so by their view
		}
		at, found := h.find(n.Number)
		of := lease.Holding{Limit: h.limit.ID, Node: n.Number}
		if found {
			of = h.of[at]
		}
		of.Floor = lease.Share{Amount: max(of.Floor.Amount, c.Floors[i]), Burst: max(of.Floor.Burst, c.FloorBursts[i])}
		t.set(h, at, found, of)
	}
	if err := t.finish(); err != nil {
		return nil, err
	}
	if n.Declared != recovery.Generation {
		next := *n
		next.Declared = recovery.Generation
		if err := put(a, leaseNodesTable, &next); err != nil {
			return nil, err
		}
	}
	return row, put(a, leaseTable, row)
}

// sortedHoldings finds a relay among holdings.
func sortedHoldings(of []lease.Holding, n lease.Node) (int, bool) {
	return slices.BinarySearchFunc(of, n, func(h lease.Holding, n lease.Node) int { return cmp.Compare(h.Node, n) })
}

// viewLimits adds the limits that relays share. What names a tenant or a pool that
// is gone counts no mail and is left out.
func (r *Reader) viewLimits(v *policy.View) {
	tenants, pools := make(map[string]ids.Tenant, len(v.Tenants)), make(map[string]ids.Pool, len(v.Pools))
	for i := range v.Tenants {
		tenants[v.Tenants[i].Name] = v.Tenants[i].ID
	}
	for i := range v.Pools {
		pools[v.Pools[i].Name] = v.Pools[i].ID
	}
	for _, l := range r.SharedLimits() {
		row := policy.SharedLimit{Limit: l.Limit, Name: l.Name, Provider: l.Provider, Domain: mailaddr.Domain(l.Domain)}
		known := true
		if l.Tenant != "" {
			row.Tenant, known = tenants[l.Tenant]
		}
		if known && l.Pool != "" {
			row.Pool, known = pools[l.Pool]
		}
		if known {
			v.SharedLimits = append(v.SharedLimits, row)
		}
	}
	if len(v.SharedLimits) > 0 {
		v.Lease = r.Lease().Config
	}
}

// Lease returns the row about lending; before anything is lent it holds the
// defaults.
func (r *Reader) Lease() *control.Lease {
	if row := get(r.txn, leaseTable, "id", singleton); row != nil {
		return row
	}
	return &control.Lease{Config: lease.DefaultConfig(), Reclaim: lease.DefaultConfig()}
}

// SharedLimits returns the limits that relays share, by number.
func (r *Reader) SharedLimits() []*control.SharedLimit { return all(r.txn, sharedLimitsTable) }

// LeaseNodes returns the relays that share, by id.
func (r *Reader) LeaseNodes() []*control.LeaseNode { return all(r.txn, leaseNodesTable) }

// LeaseNode returns a relay's part in sharing, or nil.
func (r *Reader) LeaseNode(id ids.Node) *control.LeaseNode {
	return get(r.txn, leaseNodesTable, "id", id[:])
}

// Holdings returns who holds what of a limit, in the order of relays' numbers.
func (r *Reader) Holdings(id lease.LimitID) []lease.Holding {
	if h := get(r.txn, holdingsTable, "id", number(uint64(id))); h != nil {
		return h.Of
	}
	return nil
}

// LeaseTable returns what is lent out as a table of package lease, for a leader
// that begins.
func (r *Reader) LeaseTable() *lease.Table {
	t := lease.NewTable()
	load := &lease.Tick{}
	nodes := map[lease.Node]*control.LeaseNode{}
	for _, n := range r.LeaseNodes() {
		nodes[n.Number] = n
		load.Sessions = append(load.Sessions, lease.Session{Node: n.Number, Incarnation: n.Incarnation})
	}
	limits := r.SharedLimits()
	for _, l := range limits {
		held := lease.Share{}
		for _, h := range r.Holdings(l.ID) {
			held.Amount, held.Burst = held.Amount+h.Ceiling.Amount+h.Floor.Amount, held.Burst+h.Ceiling.Burst+h.Floor.Burst
			load.Changes = append(load.Changes, lease.Change{Limit: l.ID, Node: h.Node, Incarnation: nodes[h.Node].Incarnation, Ceiling: h.Ceiling, Floor: h.Floor, Why: lease.Raised})
		}
		t.Load(l.Limit, held)
	}
	t.Apply(load)
	for _, l := range limits {
		t.Load(l.Limit, lease.Share{})
	}
	for _, n := range nodes {
		if n.Gone {
			t.Evict(n.Number)
		}
	}
	return t
}
