package state

import (
	"github.com/relais-mta/relais/control"
	"github.com/relais-mta/relais/control/command"
	"github.com/relais-mta/relais/shared/fault"
	"github.com/relais-mta/relais/shared/ids"
)

// serverRedeem turns a certificate request into a server that waits for its
// first contact over raft.
func (a *applier) serverRedeem(t *control.JoinToken, c *command.TokenRedeem) (any, error) {
	row, err := c.GetServer().Row()
	if err != nil {
		return nil, err
	}
	if err := readID(&row.ID, c.GetNode()); err != nil {
		return nil, err
	}
	row.Name, row.Version, row.State = c.GetName(), c.GetVersion(), control.NodePending
	if row.RaftAddress == "" {
		return nil, fault.Field(op, "raft_address", "is missing: a server says how the others reach it")
	}
	if get(a.txn, serversTable, "id", row.ID[:]) != nil {
		return nil, fault.New(fault.Exists, op, "server %s exists already", row.ID)
	}
	if err := a.spend(t, c, row.ID); err != nil {
		return nil, err
	}
	a.forgetServer()
	if err := put(a, serversTable, row); err != nil {
		return nil, err
	}
	a.audit(row.ID.String(), "", row.Summary())
	return row, nil
}

// forgetServer makes room in a full table: the server removed longest ago goes.
func (a *applier) forgetServer() {
	if a.progress.counts[serversTable.section] < serversTable.maxRows {
		return
	}
	var oldest *control.Server
	for _, s := range all(a.txn, serversTable) {
		if s.State == control.NodeEvicted && (oldest == nil || s.Revision < oldest.Revision) {
			oldest = s
		}
	}
	if oldest != nil {
		remove(a, serversTable, oldest)
	}
}

func (a *applier) serverRedeemedBefore(id ids.Node) (any, error) {
	server := get(a.txn, serversTable, "id", id[:])
	if server == nil || server.State == control.NodeEvicted {
		return nil, fault.New(fault.Denied, op, "server %s was removed: empty the data directory and join with a new token", id)
	}
	return server, nil
}

// Server returns the server, or nil.
func (r *Reader) Server(id ids.Node) *control.Server { return get(r.txn, serversTable, "id", id[:]) }

// APIKeys returns the API keys, oldest first.
func (r *Reader) APIKeys() []*control.APIKey { return all(r.txn, apiKeysTable) }
