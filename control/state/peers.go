package state

import (
	"bytes"

	"github.com/relais-mta/relais/control"
	"github.com/relais-mta/relais/control/command"
	"github.com/relais-mta/relais/shared/fault"
	"github.com/relais-mta/relais/shared/policy"
)

// PeersVersion is the version of the commands since which relays know each other.
const PeersVersion = 4

// applyOwn dispatches the commands about relays' hand-over and about addresses
// that change hands; known is false for any other command.
func (a *applier) applyOwn(body command.Command) (row any, known bool, err error) {
	switch c := body.(type) {
	case *command.NodeHandover:
		row, err = a.nodeHandover(c)
	case *command.IPRetire:
		row, err = a.sourceRetire(c)
	case *command.IPLeft:
		row, err = a.sourceLeft(c)
	case *command.IPQuarantine:
		row, err = a.sourceQuarantine(c)
	case *command.IPReclaim:
		row, err = a.sourceReclaim(c)
	case *command.IPHeard:
		row, err = nil, a.leaseProcesses(c)
	default:
		return nil, false, nil
	}
	return row, true, err
}

func (a *applier) nodeHandover(c *command.NodeHandover) (any, error) {
	old := get(a.txn, nodesTable, "id", c.GetNode())
	if old == nil {
		return nil, fault.New(fault.NotFound, op, "there is no such node")
	}
	if !old.State.Connects() {
		return nil, fault.New(fault.Conflict, op, "node %q is %s: it has no part in hand-over", old.Name, old.State)
	}
	row := *old
	row.Handover = c.GetAddress()
	return putRow(a, nodesTable, &row, change[control.Node]{what: quoted("node", row.Name), object: row.ID.String(), expect: revisionOr(c.GetExpect(), old.Revision)})
}

// movesViews reports whether relays must hear of a change of a node: of those
// who have a part in hand-over they know name, key, address and whether they
// drain.
func (a *applier) movesViews(old, row *control.Node) bool {
	cluster := get(a.txn, clusterTable, "id", singleton)
	if cluster == nil || cluster.FSMVersion < PeersVersion {
		return false
	}
	was, is := peerOf(old), peerOf(row)
	if was == nil || is == nil {
		return was != is
	}
	return was.Name != is.Name || was.Address != is.Address || was.Draining != is.Draining || !bytes.Equal(was.KeyPin, is.KeyPin)
}

// peerOf is what other relays know of a node; nil: nothing. A node that neither
// takes mail nor has to give its own has no part in hand-over, so that one that
// only joins is no change of the views.
func peerOf(n *control.Node) *policy.Peer {
	if n == nil || !n.State.Connects() || n.Handover == "" && n.State == control.NodeActive {
		return nil
	}
	p := &policy.Peer{Node: n.ID, Name: n.Name, KeyPin: n.CertSPKI, Address: n.Handover, Draining: n.State != control.NodeActive}
	if p.Address == command.HandoverNone {
		p.Address = ""
	}
	return p
}

func (r *Reader) viewPeers(v *policy.View) {
	if r.Cluster().FSMVersion < PeersVersion {
		return
	}
	for _, n := range r.Nodes() {
		if p := peerOf(n); p != nil {
			v.Peers = append(v.Peers, *p)
		}
	}
}
