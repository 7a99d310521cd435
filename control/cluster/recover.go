package cluster

import (
	"context"
	"fmt"
	"io"
	"log/slog"

	"github.com/hashicorp/raft"

	"github.com/relais-mta/relais/control/fsm"
	"github.com/relais-mta/relais/control/state"
	"github.com/relais-mta/relais/shared/fault"
)

// Restore replaces the state of a cluster that was bootstrapped for it by the
// snapshot, which was taken at index and has size bytes. Only a fresh cluster
// of one may be restored into: others would be asked to forget what they
// acknowledged.
func (c *Cluster) Restore(ctx context.Context, snapshot io.Reader, size int64, index uint64) error {
	const op = "cluster.Restore"
	if err := c.WaitReady(ctx); err != nil {
		return err
	}
	if existing := c.state.Read().Cluster(); existing != nil {
		return fault.New(fault.Exists, op, "this server belongs to cluster %s: a backup is restored into an empty directory", existing.ID)
	}
	meta := &raft.SnapshotMeta{Version: raft.SnapshotVersionMax, ID: "restore", Index: index, Size: size}
	err := c.raft.Restore(meta, snapshot, barrierTimeout)
	return fault.Wrap(err, fault.Internal, op, "the state cannot be restored")
}

// Recover makes the server of the directory, which must not be running, the
// only voter of its cluster. Everything in its log is taken for committed,
// which it may not have been; what it lacks is lost.
func Recover(dir, serverID, address string, logger *slog.Logger) (err error) {
	const op = "cluster.Recover"
	if !Exists(dir) {
		return fault.Field(op, "data", "%s holds no raft log: name the data directory of a server that survived", dir)
	}
	if err := forgetMark(dir); err != nil {
		return err
	}
	s, err := openStores(dir, logger, nil, nil)
	if err != nil {
		return err
	}
	defer s.close()
	// Applying panics after halt; the log then holds what this program cannot read.
	defer func() {
		if r := recover(); r != nil {
			err = fault.Wrap(fmt.Errorf("%v", r), fault.Invalid, op, "the log in %s cannot be applied by this program: install the release that wrote it, or a newer one", dir)
		}
	}()
	conf := raft.DefaultConfig()
	conf.LocalID, conf.Logger = raft.ServerID(serverID), newRaftLogger(logger)
	_, transport := raft.NewInmemTransport(raft.ServerAddress(address))
	only := raft.Configuration{Servers: []raft.Server{{Suffrage: raft.Voter, ID: raft.ServerID(serverID), Address: raft.ServerAddress(address)}}}
	err = raft.RecoverCluster(conf, fsm.New(state.New(), func(error) {}), s.logs, s.stable, s.snapshots, transport, only)
	return fault.Wrap(err, fault.Internal, op, "the raft log in %s cannot be recovered", dir)
}
