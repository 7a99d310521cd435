package lease

import (
	"cmp"
	"fmt"
	"slices"
	"strings"

	"github.com/relais-mta/relais/shared/fault"
)

// Reason says why a holding changed.
type Reason uint8

// The reasons. Only the first raises anything.
const (
	Raised    Reason = iota + 1
	Acked            // the relay confirmed that it holds less
	Released         // the relay gave it up
	Reclaimed        // the relay was silent for longer than its lease
)

// Session is the incarnation under which a relay holds things.
type Session struct {
	Node        Node
	Incarnation uint64
}

// Change sets what one relay holds of one limit.
type Change struct {
	Limit       LimitID
	Node        Node
	Incarnation uint64
	Ceiling     Share
	Floor       Share
	Why         Reason
}

// Tick is the command by which a leader changes the table, one a tick. Sessions
// come first.
type Tick struct {
	Sessions []Session
	Changes  []Change
}

// Refusal says that an item of a Tick was not applied.
type Refusal struct {
	Item   int // of Sessions, then of Changes
	Change *Change
	Why    string
}

// Holding is one row of the table: what one relay may hold of one limit.
type Holding struct {
	Limit   LimitID
	Node    Node
	Ceiling Share
	Floor   Share
}

type limitRow struct {
	limit    Limit
	holdings []Holding // in the order of nodes
	sum      Share     // of all ceilings and floors
}

type nodeRow struct {
	node        Node
	incarnation uint64
	gone        bool
	limits      []LimitID // of which it holds something, in order
}

// Table is the replicated part: every limit and who may hold how much of it.
// Applying the same commands in the same order gives the same table. It checks
// again what the leader's Grantor should have seen to: the sum of what is held of
// a limit never rises above the limit.
type Table struct {
	limits map[LimitID]*limitRow
	order  []LimitID
	nodes  map[Node]*nodeRow
	rows   int
}

// NewTable returns an empty table.
func NewTable() *Table {
	return &Table{limits: make(map[LimitID]*limitRow), nodes: make(map[Node]*nodeRow)}
}

// PutLimit adds a limit or changes one. Lowering it below what is held is right:
// nothing is given out until enough came back. The error is fault.Invalid,
// Conflict if Kind or Per of an id would change, Exhausted at MaxLimits.
func (t *Table) PutLimit(l Limit) error {
	const op = "lease.PutLimit"
	if err := l.Validate(); err != nil {
		return err
	}
	if row := t.limits[l.ID]; row != nil {
		if row.limit.Kind != l.Kind || row.limit.Per != l.Per {
			return fault.New(fault.Conflict, op, "limit %d counts something else: what relays hold of it means nothing under the new one; use a new number", l.ID)
		}
		row.limit = l
		return nil
	}
	if len(t.order) >= MaxLimits {
		return fault.New(fault.Exhausted, op, "the cluster shares %d limits, the most there may be: remove some first", MaxLimits)
	}
	t.limits[l.ID] = &limitRow{limit: l}
	at, _ := slices.BinarySearch(t.order, l.ID)
	t.order = slices.Insert(t.order, at, l.ID)
	return nil
}

// Load adds or changes a limit as PutLimit does, of which as much as room may be
// held although that is more than the limit: the limit was lowered, or a recovery
// found more in use. It is for making a table anew from what was replicated; when
// all holdings are in, each limit is loaded once more without room.
func (t *Table) Load(l Limit, room Share) {
	row := t.limits[l.ID]
	if row == nil {
		row = &limitRow{}
		t.limits[l.ID] = row
		at, _ := slices.BinarySearch(t.order, l.ID)
		t.order = slices.Insert(t.order, at, l.ID)
	}
	l.Max, l.Burst = max(l.Max, room.Amount), max(l.Burst, room.Burst)
	row.limit = l
}

// DropLimit removes a limit: it bounds nobody any more.
func (t *Table) DropLimit(id LimitID) {
	row := t.limits[id]
	if row == nil {
		return
	}
	for _, h := range row.holdings {
		t.nodes[h.Node].forget(id)
	}
	t.rows -= len(row.holdings)
	delete(t.limits, id)
	at, _ := slices.BinarySearch(t.order, id)
	t.order = slices.Delete(t.order, at, at+1)
}

// Evict puts a relay out: it gets nothing more. What it holds stays counted until
// it is reclaimed.
func (t *Table) Evict(n Node) { t.node(n).gone = true }

// Apply applies a tick and returns what was refused, in order.
func (t *Table) Apply(tick *Tick) []Refusal {
	var refused []Refusal
	for i, s := range tick.Sessions {
		if why := t.session(s); why != "" {
			refused = append(refused, Refusal{Item: i, Why: why})
		}
	}
	for i := range tick.Changes {
		if why := t.change(&tick.Changes[i]); why != "" {
			refused = append(refused, Refusal{Item: len(tick.Sessions) + i, Change: &tick.Changes[i], Why: why})
		}
	}
	return refused
}

// session records an incarnation and frees what the former one held.
func (t *Table) session(s Session) string {
	n := t.nodes[s.Node]
	switch {
	case n != nil && n.gone:
		return "the relay was put out"
	case n != nil && s.Incarnation < n.incarnation:
		return "a later incarnation is known"
	case n != nil && s.Incarnation == n.incarnation:
		return ""
	case n == nil && len(t.nodes) >= MaxNodes:
		return "too many relays"
	}
	n = t.node(s.Node)
	n.incarnation = s.Incarnation
	for _, id := range slices.Clone(n.limits) {
		row := t.limits[id]
		h := row.find(s.Node)
		t.set(row, n, Holding{Limit: id, Node: s.Node, Floor: h.Floor})
	}
	return ""
}

func (t *Table) change(c *Change) string {
	row, n := t.limits[c.Limit], t.nodes[c.Node]
	switch {
	case row == nil:
		return "no such limit"
	case n == nil || n.incarnation != c.Incarnation:
		return "another incarnation"
	}
	old := Holding{}
	if h := row.find(c.Node); h != nil {
		old = *h
	}
	if why := c.Against(&row.limit, old, row.sum, n.gone, t.rows); why != "" {
		return why
	}
	t.set(row, n, Holding{Limit: c.Limit, Node: c.Node, Ceiling: c.Ceiling, Floor: c.Floor})
	return ""
}

// Against returns why the change must not be made, or "": old is what the relay
// holds of the limit, sum what all hold of it, gone whether the relay was put out,
// and holders how many pairs of limit and relay there are. It is the rule that
// Table follows, for those who keep what a Table holds in another form.
func (c *Change) Against(l *Limit, old Holding, sum Share, gone bool, holders int) string {
	if c.Ceiling.Amount < 0 || c.Ceiling.Burst < 0 || c.Floor.Amount < 0 || c.Floor.Burst < 0 {
		return "a negative share"
	}
	before, after := old.Ceiling.add(old.Floor), c.Ceiling.add(c.Floor)
	rises := !c.Ceiling.within(old.Ceiling) || !c.Floor.within(old.Floor)
	switch {
	case rises && c.Why != Raised:
		return "only a raise may raise"
	case rises && gone:
		return "the relay was put out"
	case rises && old.Ceiling.zero() && old.Floor.zero() && holders >= MaxHolders:
		return "too many holders"
	}
	// I1. A part that rises must fit; one that falls always may.
	sum, whole := sum.sub(before).add(after), l.whole()
	if after.Amount > before.Amount && sum.Amount > whole.Amount || after.Burst > before.Burst && sum.Burst > whole.Burst {
		return fmt.Sprintf("%s%d and %d would be passed: %d and %d", passed, whole.Amount, whole.Burst, sum.Amount, sum.Burst)
	}
	return ""
}

// passed begins the text of a refusal for I1.
const passed = "the limit of "

// Passes reports whether the change was refused because the limit would have been
// passed: what a leader proposes must never come to that.
func (r *Refusal) Passes() bool { return strings.HasPrefix(r.Why, passed) }

// set writes one holding; an empty one is removed.
func (t *Table) set(row *limitRow, n *nodeRow, h Holding) {
	at, found := slices.BinarySearchFunc(row.holdings, h.Node, func(h Holding, n Node) int { return cmp.Compare(h.Node, n) })
	if found {
		row.sum = row.sum.sub(row.holdings[at].Ceiling).sub(row.holdings[at].Floor)
	}
	row.sum = row.sum.add(h.Ceiling).add(h.Floor)
	switch empty := h.Ceiling.zero() && h.Floor.zero(); {
	case empty && found:
		row.holdings = slices.Delete(row.holdings, at, at+1)
		n.forget(h.Limit)
		t.rows--
	case empty:
	case found:
		row.holdings[at] = h
	default:
		row.holdings = slices.Insert(row.holdings, at, h)
		n.remember(h.Limit)
		t.rows++
	}
}

func (t *Table) node(id Node) *nodeRow {
	n := t.nodes[id]
	if n == nil {
		n = &nodeRow{node: id}
		t.nodes[id] = n
	}
	return n
}

func (n *nodeRow) remember(id LimitID) {
	if at, found := slices.BinarySearch(n.limits, id); !found {
		n.limits = slices.Insert(n.limits, at, id)
	}
}

func (n *nodeRow) forget(id LimitID) {
	if at, found := slices.BinarySearch(n.limits, id); found {
		n.limits = slices.Delete(n.limits, at, at+1)
	}
}

func (r *limitRow) find(n Node) *Holding {
	at, found := slices.BinarySearchFunc(r.holdings, n, func(h Holding, n Node) int { return cmp.Compare(h.Node, n) })
	if !found {
		return nil
	}
	return &r.holdings[at]
}

// Limits returns every limit in the order of ids.
func (t *Table) Limits() []Limit {
	out := make([]Limit, len(t.order))
	for i, id := range t.order {
		out[i] = t.limits[id].limit
	}
	return out
}

// Limit returns one limit.
func (t *Table) Limit(id LimitID) (Limit, bool) {
	row := t.limits[id]
	if row == nil {
		return Limit{}, false
	}
	return row.limit, true
}

// Holdings returns who holds what of a limit, in the order of nodes. The slice is
// the table's own: read it before the next change.
func (t *Table) Holdings(id LimitID) []Holding {
	row := t.limits[id]
	if row == nil {
		return nil
	}
	return row.holdings
}

// Sum returns what is held of a limit altogether.
func (t *Table) Sum(id LimitID) Share {
	row := t.limits[id]
	if row == nil {
		return Share{}
	}
	return row.sum
}

// Holding returns what one relay may hold of one limit.
func (t *Table) Holding(id LimitID, n Node) Holding {
	if row := t.limits[id]; row != nil {
		if h := row.find(n); h != nil {
			return *h
		}
	}
	return Holding{Limit: id, Node: n}
}

// Session returns a relay's incarnation and whether it was put out.
func (t *Table) Session(n Node) (incarnation uint64, gone bool) {
	if row := t.nodes[n]; row != nil {
		return row.incarnation, row.gone
	}
	return 0, false
}

// Nodes returns every relay that the table knows, in order.
func (t *Table) Nodes() []Node {
	out := make([]Node, 0, len(t.nodes))
	for n := range t.nodes {
		out = append(out, n)
	}
	slices.Sort(out)
	return out
}
