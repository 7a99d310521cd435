// Package cluster runs one server's part of the raft cluster: its log and
// snapshots on disk, its transport, what to do when leadership comes and goes,
// and Propose, the only way to change the replicated state.
//
// It works the same on one server and on several: a follower has the leader
// commit its changes, and the leader decides who votes.
package cluster

import (
	"context"
	"fmt"
	"log/slog"
	"net/http"
	"os"
	"path/filepath"
	"sync"
	"sync/atomic"
	"time"

	"github.com/hashicorp/raft"
	"github.com/prometheus/client_golang/prometheus"

	"github.com/relais-mta/relais/control"
	"github.com/relais-mta/relais/control/command"
	"github.com/relais-mta/relais/control/fsm"
	"github.com/relais-mta/relais/control/state"
	"github.com/relais-mta/relais/shared/fault"
)

// The raft settings; control-plane.md section 14 says why.
const (
	heartbeatTimeout    = time.Second
	electionTimeout     = time.Second
	leaderLeaseTimeout  = 500 * time.Millisecond
	maxAppendEntries    = 512
	maxRPCsInFlight     = 1 // a follower was never fed again after its disk stalled, with more (hashicorp/raft 612)
	trailingLogs        = 100_000
	snapshotThreshold   = 65_536
	snapshotInterval    = 2 * time.Minute
	retainedSnapshots   = 3
	logCacheEntries     = 512
	maxPooledConns      = 4
	transportTimeout    = 10 * time.Second
	notifyBuffer        = 16
	barrierTimeout      = 10 * time.Second
	enqueueTimeout      = 5 * time.Second
	maxProposalsWaiting = 1024
	maxReadAge          = 2 * heartbeatTimeout
	maxReadLagEntries   = maxAppendEntries
	freshPollPeriod     = 20 * time.Millisecond
)

// Options configure a server.
type Options struct {
	Dir        string  // data directory; raft keeps to its own folder in it
	ServerID   string  // text form of the server's node id
	Address    string  // host:port that peers reach this server's raft at
	Stream     *Stream // nil: there are no peers
	State      *state.Store
	Logger     *slog.Logger
	Registerer prometheus.Registerer
	Halt       func(error)            // called when the log cannot be applied or written; must end the process
	Requests   map[string]PeerHandler // what other servers may ask besides what this package answers
	Tuning     Tuning

	wrapLogs func(raft.LogStore) raft.LogStore // tests make a disk hang with it
}

// Cluster is this server's part of the cluster. Use Open.
type Cluster struct {
	raft      *raft.Raft
	state     *state.Store
	stores    *stores
	transport closer
	logger    *slog.Logger
	metrics   *metrics
	slots     chan struct{}
	id        string
	address   string
	dir       string
	tuning    Tuning
	results   *results
	peers     *peerClient // nil: there are no peers
	http      *http.Server
	roster    roster

	ready   atomic.Bool
	caught  atomic.Bool // since it started, this server has had everything that the leader had
	unsound atomic.Pointer[error]
	refused atomic.Pointer[fault.Error] // why the others do not let this server in
	// committed is the newest configuration that a majority has; nil before one
	// was applied since the start. Raft itself tells the newest that it knows.
	committed atomic.Pointer[raft.Configuration]
	readyMu   sync.Mutex
	readyCh   chan struct{} // closed while this server leads and has applied its predecessors' entries

	stop    chan struct{}
	workers sync.WaitGroup
}

type closer interface{ Close() error }

// Open starts the server on a directory that Bootstrap, or a former run, made.
func Open(o Options) (*Cluster, error) {
	const op = "cluster.Open"
	c := &Cluster{state: o.State, logger: o.Logger, metrics: newMetrics(o.Registerer), slots: make(chan struct{}, maxProposalsWaiting), readyCh: make(chan struct{}), stop: make(chan struct{}),
		id: o.ServerID, address: o.Address, dir: o.Dir, tuning: o.Tuning, results: newResults(), roster: roster{heard: make(map[raft.ServerID]*heard)}}
	c.tuning.setDefaults()
	var err error
	if c.stores, err = openStores(o.Dir, o.Logger, c.verified, o.Halt); err != nil {
		return nil, err
	}
	logs := c.stores.logs
	if o.wrapLogs != nil {
		logs = o.wrapLogs(logs)
	}
	logger := newRaftLogger(o.Logger)
	var transport raft.Transport
	if o.Stream != nil {
		t := raft.NewNetworkTransportWithConfig(&raft.NetworkTransportConfig{Stream: o.Stream, MaxPool: maxPooledConns, MaxRPCsInFlight: maxRPCsInFlight, Timeout: transportTimeout, Logger: logger})
		transport, c.transport = t, t
	} else {
		_, t := raft.NewInmemTransport(raft.ServerAddress(o.Address))
		transport, c.transport = t, t
	}
	notify := make(chan bool, notifyBuffer)
	conf := raftConfig(o.ServerID, c.tuning)
	conf.Logger, conf.NotifyCh = logger, notify
	c.raft, err = raft.NewRaft(conf, machine{fsm.New(o.State, o.Halt), o.State, c.results, &c.committed}, logs, c.stores.stable, c.stores.snapshots, transport)
	if err != nil {
		_ = c.transport.Close()
		c.stores.close()
		return nil, fault.Wrap(err, fault.Internal, op, "raft does not start from %s: %s", filepath.Join(o.Dir, raftDir), damagedRemedy)
	}
	c.metrics.watch(o.Registerer, c)
	c.workers.Go(func() { c.lead(notify) })
	c.workers.Go(c.checkHashes)
	c.workers.Go(func() { c.watchDisk(o.Halt) })
	if o.Stream != nil {
		c.peers = newPeerClient(o.Stream)
		c.servePeers(o.Stream, o.Requests)
		c.workers.Go(c.catchUp)
		c.workers.Go(c.keepMembers)
		c.workers.Go(c.watchRefusal)
	}
	return c, nil
}

func raftConfig(serverID string, tuning Tuning) *raft.Config {
	conf := raft.DefaultConfig()
	conf.LocalID = raft.ServerID(serverID)
	conf.HeartbeatTimeout = heartbeatTimeout
	conf.ElectionTimeout = electionTimeout
	conf.LeaderLeaseTimeout = leaderLeaseTimeout
	conf.MaxAppendEntries = maxAppendEntries
	conf.TrailingLogs = tuning.TrailingLogs
	conf.SnapshotThreshold = tuning.SnapshotThreshold
	conf.SnapshotInterval = tuning.SnapshotInterval
	conf.ShutdownOnRemove = false
	conf.BatchApplyCh = true
	conf.PreVoteDisabled = false
	conf.NoLegacyTelemetry = true
	return conf
}

// Exists reports whether the directory holds raft state already.
func Exists(dir string) bool {
	entries, err := os.ReadDir(filepath.Join(dir, raftDir))
	return err == nil && len(entries) > 0
}

// Bootstrap makes the directory the first and only voter of a new cluster. It
// refuses a directory that holds raft state.
func Bootstrap(dir, serverID, address string, logger *slog.Logger) error {
	const op = "cluster.Bootstrap"
	if Exists(dir) {
		return fault.Field(op, "data", "%s holds a cluster already: start it with serve, or name an empty directory", dir)
	}
	s, err := openStores(dir, logger, nil, nil)
	if err != nil {
		return err
	}
	defer s.close()
	var tuning Tuning
	tuning.setDefaults()
	conf := raftConfig(serverID, tuning)
	conf.Logger = newRaftLogger(logger)
	_, transport := raft.NewInmemTransport(raft.ServerAddress(address))
	voters := raft.Configuration{Servers: []raft.Server{{Suffrage: raft.Voter, ID: raft.ServerID(serverID), Address: raft.ServerAddress(address)}}}
	err = raft.BootstrapCluster(conf, s.logs, s.stable, s.snapshots, transport, voters)
	return fault.Wrap(err, fault.Internal, op, "the first voter cannot be written to %s", dir)
}

// lead follows leadership: this server is ready once it leads and everything
// committed before is applied. Losing and regaining it starts over.
func (c *Cluster) lead(notify <-chan bool) {
	for {
		select {
		case <-c.stop:
			return
		case leads := <-notify:
			c.setReady(false)
			if !leads {
				c.logger.Info("this server follows")
				continue
			}
			if err := c.raft.Barrier(barrierTimeout).Error(); err != nil {
				c.logger.Warn("leadership was not confirmed", "error", err)
				if c.raft.State() == raft.Leader {
					// Without the barrier this server may lack entries; let another lead.
					c.logger.Error("this server steps down", "error", c.raft.LeadershipTransfer().Error())
				}
				continue
			}
			if err := c.sound(); err != nil {
				// Its state would become everybody's measure.
				c.logger.Error("this server must not lead and steps down", "error", err, "transfer", c.raft.LeadershipTransfer().Error())
				continue
			}
			c.setReady(true)
			c.logger.Info("this server leads", "term", c.raft.CurrentTerm())
		}
	}
}

func (c *Cluster) setReady(ready bool) {
	c.readyMu.Lock()
	defer c.readyMu.Unlock()
	if c.ready.Swap(ready) == ready {
		return
	}
	if ready {
		close(c.readyCh)
	} else {
		c.readyCh = make(chan struct{})
	}
}

// WaitReady waits until this server leads and is up to date.
func (c *Cluster) WaitReady(ctx context.Context) error {
	c.readyMu.Lock()
	ch := c.readyCh
	c.readyMu.Unlock()
	select {
	case <-ch:
		return nil
	case <-ctx.Done():
		return fault.Wrap(ctx.Err(), fault.Timeout, "cluster.WaitReady", "no leader was elected in time")
	case <-c.stop:
		return fault.New(fault.Unavailable, "cluster.WaitReady", "this server is shutting down")
	}
}

// Ready reports whether this server leads and is up to date.
func (c *Cluster) Ready() bool { return c.ready.Load() }

// Fresh reports whether reading this server's state gives what the cluster
// agreed on, give or take a moment: it leads, or it follows a leader it heard
// from just now and has applied nearly all it knows to be committed. Right
// after a start it is neither, and its state may be old or empty.
func (c *Cluster) Fresh() bool {
	if c.Ready() {
		return true
	}
	if leader, _ := c.Leader(); leader == "" || c.raft.State() != raft.Follower || !c.caught.Load() {
		return false
	}
	return time.Since(c.raft.LastContact()) < maxReadAge && c.raft.AppliedIndex()+maxReadLagEntries >= c.raft.CommitIndex()
}

// Leader returns the raft address and id of the leader; both are empty while
// there is none.
func (c *Cluster) Leader() (address, serverID string) {
	a, id := c.raft.LeaderWithID()
	return string(a), string(id)
}

// Health returns nil, or why this server must not serve: its state differs
// from the leader's, or its log is damaged.
func (c *Cluster) Health() error {
	if err := c.sound(); err != nil {
		return err
	}
	if err := c.removed(); err != nil {
		return err
	}
	if err := c.refused.Load(); err != nil {
		return err
	}
	return nil
}

// sound returns nil, or what is wrong with this server's state or log.
func (c *Cluster) sound() error {
	if d := c.state.Diverged(); d != nil {
		return d
	}
	if err := c.unsound.Load(); err != nil {
		return *err
	}
	return nil
}

// removed returns an error if this server was taken out of the cluster.
func (c *Cluster) removed() error {
	for _, row := range c.state.Read().Servers() {
		if row.State == control.NodeEvicted && row.ID.String() == c.id {
			return fault.New(fault.Denied, "cluster.Health", "this server (%s) was removed from the cluster: stop it; to bring the machine back, empty %s and join anew", row.Name, c.dir)
		}
	}
	return nil
}

// catchUp finds out when this server, started a moment ago, has everything that
// the leader has. Until then what raft knows to be committed is no measure: it
// knows of nothing before the first entries have come.
func (c *Cluster) catchUp() {
	tick := time.NewTicker(freshPollPeriod)
	defer tick.Stop()
	for {
		select {
		case <-c.stop:
			return
		case <-tick.C:
		}
		ctx, cancel := context.WithTimeout(context.Background(), catchUpTimeout)
		err := c.Fence(ctx)
		cancel()
		if err == nil {
			c.caught.Store(true)
			return
		}
	}
}

// WaitFresh waits until this server's state is up to date, whether it leads or
// follows.
func (c *Cluster) WaitFresh(ctx context.Context) error {
	tick := time.NewTicker(freshPollPeriod)
	defer tick.Stop()
	for !c.Fresh() {
		select {
		case <-tick.C:
		case <-ctx.Done():
			return fault.Wrap(ctx.Err(), fault.Timeout, "cluster.WaitFresh", "this server is not in touch with the cluster")
		case <-c.stop:
			return fault.New(fault.Unavailable, "cluster.WaitFresh", "this server is shutting down")
		}
	}
	return nil
}

// Snapshot writes a snapshot now. It returns nil if nothing changed since the
// last one.
func (c *Cluster) Snapshot() error {
	err := c.raft.Snapshot().Error()
	if err == raft.ErrNothingNewToSnapshot {
		return nil
	}
	return fault.Wrap(err, fault.Internal, "cluster.Snapshot", "no snapshot could be written")
}

// Close stops the server. Entries that were acknowledged are on disk.
func (c *Cluster) Close() error {
	close(c.stop)
	if c.raft.State() == raft.Leader && len(c.raft.GetConfiguration().Configuration().Servers) > 1 {
		// The others need not wait for an election.
		within(c.raft.LeadershipTransfer().Error, transferTimeout, nil)
	}
	if c.http != nil {
		_ = c.http.Close() // a server that waits for an answer asks another one
		c.peers.http.CloseIdleConnections()
	}
	stopping := c.raft.Shutdown()
	err := c.transport.Close() // or raft would wait for what it dials: a server that is off, until the timeout
	if stopErr := stopping.Error(); err == nil {
		err = stopErr
	}
	c.workers.Wait()
	c.stores.close()
	if err != nil {
		return fmt.Errorf("cluster: stop: %w", err)
	}
	return nil
}

// checkHashes lets the leader commit each checkpoint of the state hash, and
// raises the alarm when this server's own differs.
func (c *Cluster) checkHashes() {
	var committed uint64
	for {
		changed := c.state.Watch()
		if d := c.state.Diverged(); d != nil {
			c.metrics.divergences.Inc()
			c.logger.Error("this server stops serving", "error", d)
			return
		}
		if cp, ok := c.state.Read().LastCheckpoint(); ok && cp.Index > committed && c.Ready() {
			ctx, cancel := context.WithTimeout(context.Background(), enqueueTimeout)
			_, err := c.Propose(ctx, &command.StateHash{Index: cp.Index, Hash: cp.Hash[:]})
			cancel()
			if err != nil {
				c.logger.Warn("the state hash was not committed", "index", cp.Index, "error", err)
			}
			committed = cp.Index
		}
		select {
		case <-changed:
		case <-c.stop:
			return
		}
	}
}
