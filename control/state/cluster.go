package state

import (
	"google.golang.org/protobuf/proto"

	"github.com/relais-mta/relais/control"
	"github.com/relais-mta/relais/control/command"
	"github.com/relais-mta/relais/shared/fault"
)

// unmarshalRow decodes a record and turns it into its row.
func unmarshalRow[M any, T any, PM interface {
	*M
	proto.Message
	Row() (*T, error)
}](b []byte) (*T, error) {
	var m M
	if err := proto.Unmarshal(b, PM(&m)); err != nil {
		return nil, fault.Wrap(err, fault.Internal, "state.Restore", "a row of the snapshot cannot be read")
	}
	return PM(&m).Row()
}

var singleton = []byte{1}

var clusterTable = &table[control.Cluster]{
	name: "cluster", section: sectionCluster, maxRows: 1, inViews: true,
	key:      func(*control.Cluster) []byte { return singleton },
	record:   func(c *control.Cluster) proto.Message { return command.ClusterRecord(c) },
	row:      unmarshalRow[command.Cluster, control.Cluster],
	revision: func(c *control.Cluster) *uint64 { return &c.Revision },
}

var serversTable = &table[control.Server]{
	name: "servers", section: sectionServers, maxRows: maxServers,
	key:      func(s *control.Server) []byte { return s.ID[:] },
	record:   func(s *control.Server) proto.Message { return command.ServerRecord(s) },
	row:      unmarshalRow[command.Server, control.Server],
	revision: func(s *control.Server) *uint64 { return &s.Revision },
}

func (a *applier) clusterInit(c *command.ClusterInit) (any, error) {
	row, err := c.GetCluster().Row()
	if err != nil {
		return nil, err
	}
	return putRow(a, clusterTable, row, change[control.Cluster]{what: "the cluster", object: row.ID.String()})
}

func (a *applier) fsmVersionSet(c *command.FSMVersionSet) (any, error) {
	old := get(a.txn, clusterTable, "id", singleton)
	if old == nil {
		return nil, fault.New(fault.NotFound, op, "the cluster is not initialised")
	}
	version := uint16(c.GetVersion())
	if version < old.FSMVersion {
		return nil, fault.Field(op, "version", "%d is below the cluster's %d: versions never go back", version, old.FSMVersion)
	}
	if old.FSMVersion < reverseVersion && version >= reverseVersion {
		if err := a.trustAddresses(); err != nil {
			return nil, err
		}
	}
	if old.FSMVersion < quarantineVersion && version >= quarantineVersion {
		if err := a.quarantineEvicted(); err != nil {
			return nil, err
		}
	}
	row := *old
	row.FSMVersion = version
	return putRow(a, clusterTable, &row, change[control.Cluster]{what: "the cluster", object: row.ID.String(), expect: old.Revision})
}

func (a *applier) serverUpsert(c *command.ServerUpsert) (any, error) {
	row, err := c.GetServer().Row()
	if err != nil {
		return nil, err
	}
	old := get(a.txn, serversTable, "id", row.ID[:])
	out, err := putRow(a, serversTable, row, change[control.Server]{what: quoted("server", row.Name), object: row.ID.String(), expect: c.GetExpect()})
	if err == nil && row.State == control.NodeEvicted && old != nil && old.State != control.NodeEvicted {
		err = a.revokeServer(old)
	}
	return out, err
}

// Cluster returns the row about the cluster, or nil before it was initialised.
func (r *Reader) Cluster() *control.Cluster { return get(r.txn, clusterTable, "id", singleton) }

// Servers returns the servers by id.
func (r *Reader) Servers() []*control.Server { return all(r.txn, serversTable) }
