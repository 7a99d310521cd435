package lease

import (
	"cmp"
	"slices"
)

// answers returns the replies that the committed command allows, and the grants
// of those whose holdings it raised although they had not asked just now.
func (g *Grantor) answers(pushed []*nodeState) ([]Welcome, []Grant) {
	var welcomes []Welcome
	var out []Grant
	for _, n := range g.batch {
		if n.gone {
			continue
		}
		if n.welcome && n.hello <= n.incarnation {
			n.welcome = false
			welcomes = append(welcomes, Welcome{n.id, n.incarnation, g.generation, g.term})
		}
		if n.batched == 0 {
			continue
		}
		n.answered, n.batched = n.batched, 0
		grant := Grant{Node: n.id, Incarnation: n.incarnation, Generation: g.generation, Term: g.term, Nonce: n.answered, Reply: true}
		grant.Lines = make([]GrantLine, 0, len(n.entries))
		for _, e := range n.entries {
			if e.seq == 0 {
				e.stamp(g) // the first grant of this term
			}
			e.push = false
			grant.Lines = append(grant.Lines, e.line())
		}
		out = append(out, grant)
	}
	g.batch = g.batch[:0]
	return welcomes, append(out, g.pushes(pushed)...)
}

// pushes returns grants that nobody asked for. They carry the nonce of the last
// report that was answered: they prolong nothing beyond what that report earned.
func (g *Grantor) pushes(nodes []*nodeState) []Grant {
	if len(nodes) == 0 {
		return nil
	}
	slices.SortFunc(nodes, func(a, b *nodeState) int { return cmp.Compare(a.id, b.id) })
	var out []Grant
	for _, n := range slices.Compact(nodes) {
		grant := Grant{Node: n.id, Incarnation: n.incarnation, Generation: g.generation, Term: g.term, Nonce: n.answered}
		for _, e := range n.entries {
			if e.push {
				e.push = false
				grant.Lines = append(grant.Lines, e.line())
			}
		}
		if len(grant.Lines) > 0 {
			out = append(out, grant)
		}
	}
	return out
}

func (e *entry) line() GrantLine {
	return GrantLine{Limit: e.l.ID, Kind: e.l.Kind, Per: e.l.Per, Seq: e.seq, Share: e.sent, Floor: e.sentFloor, Soft: e.l.SoftFloor}
}

func (g *Grantor) node(id Node) *nodeState {
	n := g.byNode[id]
	if n == nil {
		n = &nodeState{id: id, weight: 1}
		g.byNode[id] = n
		at, _ := slices.BinarySearchFunc(g.nodes, id, func(n *nodeState, id Node) int { return cmp.Compare(n.id, id) })
		g.nodes = slices.Insert(g.nodes, at, n)
	}
	return n
}

func (l *limitState) search(id Node) (int, bool) {
	return slices.BinarySearchFunc(l.entries, id, func(e *entry, id Node) int { return cmp.Compare(e.n.id, id) })
}

func (n *nodeState) search(id LimitID) (int, bool) {
	return slices.BinarySearchFunc(n.entries, id, func(e *entry, id LimitID) int { return cmp.Compare(e.l.ID, id) })
}

func (l *limitState) find(n *nodeState) *entry {
	if n == nil {
		return nil
	}
	if at, found := l.search(n.id); found {
		return l.entries[at]
	}
	return nil
}

// entry returns a relay's part in a limit, and makes it if need be.
func (g *Grantor) entry(l *limitState, n *nodeState) *entry {
	at, found := l.search(n.id)
	if found {
		return l.entries[at]
	}
	g.parts++
	e := &entry{n: n, l: l}
	l.entries = slices.Insert(l.entries, at, e)
	at, _ = n.search(l.ID)
	n.entries = slices.Insert(n.entries, at, e)
	return e
}

// remove forgets a relay's part that is nothing.
func (g *Grantor) remove(e *entry) {
	if at, found := e.l.search(e.n.id); found {
		e.l.entries = slices.Delete(e.l.entries, at, at+1)
		g.parts--
	}
	e.n.forget(e)
}

func (n *nodeState) forget(e *entry) {
	if at, found := n.search(e.l.ID); found {
		n.entries = slices.Delete(n.entries, at, at+1)
	}
}

// Status is what a leader knows of one relay's part in a limit, for people.
type Status struct {
	Node          Node
	Ceiling       Share // may be held at most
	Floor         Share
	Granted       Share // was told to the relay last
	Demand        int64
	Used          int64 // events started or slots opened between its last two reports
	Denied        int64 // times that the limit said no meanwhile
	Heard         bool  // the relay reported within a lease
	SilentSince   Instant
	WaitsForASeat bool
}

// Status returns who holds and wants how much of a limit, in the order of nodes,
// and how much nobody holds.
func (g *Grantor) Status(id LimitID) (holders []Status, free Share) {
	row := g.byID[id]
	if row == nil {
		return nil, Share{}
	}
	for _, e := range row.entries {
		holders = append(holders, Status{
			Node: e.n.id, Ceiling: e.ceiling, Floor: e.floor, Granted: e.sent, Demand: e.demand, Used: e.used, Denied: e.denied,
			Heard: e.n.heard, SilentSince: e.n.basis, WaitsForASeat: row.rotates && !e.seated && e.demand > 0,
		})
	}
	return holders, row.whole().sub(row.sum).max(Share{})
}
