package state

import (
	"slices"

	"github.com/relais-mta/relais/control"
	"github.com/relais-mta/relais/control/command"
	"github.com/relais-mta/relais/shared/fault"
	"github.com/relais-mta/relais/shared/lease"
)

// leaseTick carries one entry through the holdings. Each limit's row is read
// once, changed in place, and written once.
type leaseTick struct {
	a     *applier
	row   *control.Lease
	known map[lease.LimitID]*leaseHoldings // nil: there is no such limit
	dirty []*leaseHoldings
}

type leaseHoldings struct {
	limit *control.SharedLimit
	old   *control.Holdings // nil: nobody held any
	of    []lease.Holding
	sum   lease.Share
	dirty bool
}

func (a *applier) newLeaseTick(row *control.Lease) *leaseTick {
	return &leaseTick{a: a, row: row, known: make(map[lease.LimitID]*leaseHoldings)}
}

// holdings returns who holds what of a limit, nil if there is no such limit.
func (t *leaseTick) holdings(id lease.LimitID) *leaseHoldings {
	h, known := t.known[id]
	if known {
		return h
	}
	if limit := get(t.a.txn, sharedLimitsTable, "id", number(uint64(id))); limit != nil {
		h = &leaseHoldings{limit: limit, old: get(t.a.txn, holdingsTable, "id", number(uint64(id)))}
		if h.old != nil {
			h.of, h.sum = h.old.Of, h.old.Sum()
		}
	}
	t.known[id] = h
	return h
}

func (h *leaseHoldings) find(n lease.Node) (int, bool) { return sortedHoldings(h.of, n) }

// set writes one holding, at is where find found it or would have; an empty one is
// removed.
func (t *leaseTick) set(h *leaseHoldings, at int, found bool, next lease.Holding) {
	if !h.dirty {
		h.dirty, h.of = true, slices.Clone(h.of) // readers have the old one
		t.dirty = append(t.dirty, h)
	}
	if found {
		h.count(h.of[at], -1)
	}
	h.count(next, 1)
	switch empty := next.Ceiling == (lease.Share{}) && next.Floor == (lease.Share{}); {
	case empty && found:
		h.of = slices.Delete(h.of, at, at+1)
		t.row.Holders--
	case empty:
	case found:
		h.of[at] = next
	default:
		h.of = slices.Insert(h.of, at, next)
		t.row.Holders++
	}
}

func (h *leaseHoldings) count(of lease.Holding, sign int64) {
	h.sum.Amount += sign * (of.Ceiling.Amount + of.Floor.Amount)
	h.sum.Burst += sign * (of.Ceiling.Burst + of.Floor.Burst)
}

// finish writes what was changed.
func (t *leaseTick) finish() error {
	for _, h := range t.dirty {
		switch {
		case len(h.of) > 0:
			if err := put(t.a, holdingsTable, &control.Holdings{Limit: h.limit.ID, Of: h.of}); err != nil {
				return err
			}
		case h.old != nil:
			remove(t.a, holdingsTable, h.old)
		}
	}
	return nil
}

// leaseTick applies what a leader decided. It checks again what the leader should
// have seen to, above all that no more is held of a limit than there is; an item
// that breaks a rule is refused, the others are applied.
func (a *applier) leaseTick(c *command.LeaseTick) (any, error) {
	if err := c.Validate(); err != nil {
		return nil, err
	}
	row := a.lease()
	if c.GetEpoch() != row.Epoch {
		return nil, fault.New(fault.Conflict, op, "limits are lent out since entry %d, not %d: another leader has begun", row.Epoch, c.GetEpoch())
	}
	if err := a.recovering(); err != nil {
		return nil, err
	}
	tick, t := c.Tick(), a.newLeaseTick(row)
	before := row.Holders
	nodes := make(map[lease.Node]*control.LeaseNode)
	result := &control.LeaseResult{}
	refuse := func(item int, change *lease.Change, why string) {
		result.Refused = append(result.Refused, lease.Refusal{Item: item, Change: change, Why: why})
	}
	begun := make(map[lease.Node]bool)
	for i, s := range tick.Sessions {
		began, why := a.leaseSession(s, nodes)
		if why != "" {
			refuse(i, nil, why)
		} else if began {
			begun[s.Node] = true
		}
	}
	t.end(begun)
	for i := range tick.Changes {
		if why := t.change(&tick.Changes[i], nodes); why != "" {
			refuse(len(tick.Sessions)+i, &tick.Changes[i], why)
		}
	}
	if err := t.finish(); err != nil {
		return nil, err
	}
	if row.Holders != before {
		return result, put(a, leaseTable, row)
	}
	return result, nil
}

// leaseNode returns a relay by its number, nil if there is none.
func (a *applier) leaseNode(n lease.Node, known map[lease.Node]*control.LeaseNode) *control.LeaseNode {
	row, ok := known[n]
	if !ok {
		row = get(a.txn, leaseNodesTable, "number", number(uint64(n)))
		known[n] = row
	}
	return row
}

// leaseSession records an incarnation, and reports whether it is new: then the
// ceilings of the former one are free.
func (a *applier) leaseSession(s lease.Session, known map[lease.Node]*control.LeaseNode) (began bool, why string) {
	n := a.leaseNode(s.Node, known)
	switch {
	case n == nil:
		return false, "there is no such relay"
	case n.Gone:
		return false, "the relay was put out"
	case s.Incarnation < n.Incarnation:
		return false, "a later incarnation is known"
	case s.Incarnation == n.Incarnation:
		return false, ""
	}
	next := *n
	next.Incarnation = s.Incarnation
	known[s.Node] = &next
	if err := put(a, leaseNodesTable, &next); err != nil {
		return false, fault.Public(err)
	}
	return true, ""
}

// end frees the ceilings of relays whose former process ended; their floors stay,
// on their disks.
func (t *leaseTick) end(begun map[lease.Node]bool) {
	if len(begun) == 0 {
		return
	}
	// One pass over everything, however many relays began: there is no index from
	// relays to limits to be kept with every change.
	for _, row := range all(t.a.txn, holdingsTable) {
		for _, of := range row.Of {
			if !begun[of.Node] || of.Ceiling == (lease.Share{}) {
				continue
			}
			h := t.holdings(row.Limit)
			at, found := h.find(of.Node)
			of.Ceiling = lease.Share{}
			t.set(h, at, found, of)
		}
	}
}

// change makes one change, or says why not.
func (t *leaseTick) change(c *lease.Change, nodes map[lease.Node]*control.LeaseNode) string {
	h, n := t.holdings(c.Limit), t.a.leaseNode(c.Node, nodes)
	switch {
	case h == nil:
		return "no such limit"
	case n == nil || n.Incarnation != c.Incarnation:
		return "another incarnation"
	}
	at, found := h.find(c.Node)
	old := lease.Holding{Limit: c.Limit, Node: c.Node}
	if found {
		old = h.of[at]
	}
	if why := c.Against(&h.limit.Limit, old, h.sum, n.Gone, t.row.Holders); why != "" {
		return why
	}
	t.set(h, at, found, lease.Holding{Limit: c.Limit, Node: c.Node, Ceiling: c.Ceiling, Floor: c.Floor})
	return ""
}
