package state

import (
	"google.golang.org/protobuf/proto"

	"github.com/relais-mta/relais/control"
	"github.com/relais-mta/relais/control/command"
	"github.com/relais-mta/relais/shared/fault"
	"github.com/relais-mta/relais/shared/ids"
)

var nodesTable = &table[control.Node]{
	name: "nodes", section: sectionNodes, maxRows: maxNodes, moves: (*applier).movesViews,
	key:      func(n *control.Node) []byte { return n.ID[:] },
	record:   func(n *control.Node) proto.Message { return command.NodeRecord(n) },
	row:      unmarshalRow[command.Node, control.Node],
	revision: func(n *control.Node) *uint64 { return &n.Revision },
	indexes:  []index[control.Node]{{name: "name", key: func(n *control.Node) []byte { return text(n.Name) }}},
}

func (a *applier) nodeUpsert(c *command.NodeUpsert) (any, error) {
	row, err := c.GetNode().Row()
	if err != nil {
		return nil, err
	}
	return putRow(a, nodesTable, row, change[control.Node]{what: quoted("node", row.Name), object: row.ID.String(), expect: c.GetExpect(), check: func(old *control.Node) error {
		if old != nil && old.State != row.State {
			return fault.Field(op, "state", "changes with its own command only")
		}
		return nil
	}})
}

func (a *applier) nodeSetState(c *command.NodeSetState) (any, error) {
	old := get(a.txn, nodesTable, "id", c.GetNode())
	if old == nil {
		return nil, fault.New(fault.NotFound, op, "there is no such node")
	}
	if old.State == control.NodeEvicted {
		if c.GetState() == string(control.NodeEvicted) {
			return old, nil
		}
		return nil, fault.New(fault.Conflict, op, "node %q is evicted for good: let the machine join again with an empty identity", old.Name)
	}
	row := *old
	row.State = control.NodeState(c.GetState())
	expect := c.GetExpect()
	if expect == 0 {
		expect = old.Revision
	}
	out, err := putRow(a, nodesTable, &row, change[control.Node]{what: quoted("node", row.Name), object: row.ID.String(), expect: expect})
	if err == nil && row.State == control.NodeEvicted {
		if err = a.evicted(old, &row); err == nil {
			err = a.evictLeases(row.ID)
		}
	}
	return out, err
}

// Node returns the node, or nil.
func (r *Reader) Node(id ids.Node) *control.Node { return get(r.txn, nodesTable, "id", id[:]) }

// Nodes returns the nodes, oldest first.
func (r *Reader) Nodes() []*control.Node { return all(r.txn, nodesTable) }

// NodesByName returns the nodes of that name: usually one, but a machine that
// lost its disk joins again beside its former self.
func (r *Reader) NodesByName(name string) (out []*control.Node) {
	each(r.txn, nodesTable, "name", text(name), func(n *control.Node) bool { out = append(out, n); return true })
	return out
}
