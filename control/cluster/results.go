package cluster

import (
	"context"
	"io"
	"sync"
	"sync/atomic"

	"github.com/hashicorp/raft"

	"github.com/relais-mta/relais/control/fsm"
	"github.com/relais-mta/relais/control/state"
)

// maxResults is how many results a server remembers: of as many changes as can
// be under way.
const maxResults = maxProposalsWaiting

// results remembers what applying the newest entries gave on this server. A
// follower that had the leader commit a change finds the row it left here, and
// knows that its own state has it.
type results struct {
	mu      sync.Mutex
	ring    [maxResults]state.Result
	last    uint64 // index applied, or restored to
	changed chan struct{}
}

func newResults() *results { return &results{changed: make(chan struct{})} }

func (r *results) add(one state.Result) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.ring[one.Index%maxResults] = one
	r.advance(one.Index)
}

// advance is called with the lock held.
func (r *results) advance(index uint64) {
	r.last = max(r.last, index)
	close(r.changed)
	r.changed = make(chan struct{})
}

// reached returns whether the entry at index is part of the state, the result
// if it is remembered, and a channel that is closed when more was applied.
func (r *results) reached(index uint64) (one state.Result, known, done bool, changed <-chan struct{}) {
	r.mu.Lock()
	defer r.mu.Unlock()
	one = r.ring[index%maxResults]
	return one, one.Index == index, r.last >= index, r.changed
}

// await waits until this server has applied the command at index. known says
// whether its result is remembered.
func (c *Cluster) await(ctx context.Context, index uint64) (result state.Result, known bool, err error) {
	for {
		one, known, done, changed := c.results.reached(index)
		if done {
			return one, known, nil
		}
		select {
		case <-changed:
		case <-ctx.Done():
			return state.Result{}, false, ctx.Err()
		case <-c.stop:
			return state.Result{}, false, raft.ErrRaftShutdown
		}
	}
}

// machine is the FSM with a memory of its results.
type machine struct {
	*fsm.FSM
	state     *state.Store
	results   *results
	committed *atomic.Pointer[raft.Configuration]
}

var _ raft.BatchingFSM = machine{}

// Apply implements raft.FSM.
func (m machine) Apply(l *raft.Log) any {
	out := m.FSM.Apply(l)
	m.remember(out)
	return out
}

// ApplyBatch implements raft.BatchingFSM.
func (m machine) ApplyBatch(logs []*raft.Log) []any {
	out := m.FSM.ApplyBatch(logs)
	for _, l := range logs {
		if l.Type == raft.LogConfiguration {
			conf := raft.DecodeConfiguration(l.Data)
			m.committed.Store(&conf)
		}
	}
	for _, one := range out {
		m.remember(one)
	}
	return out
}

func (m machine) remember(out any) {
	if one, ok := out.(state.Result); ok {
		m.results.add(one)
	}
}

// Restore implements raft.FSM.
func (m machine) Restore(r io.ReadCloser) error {
	if err := m.FSM.Restore(r); err != nil {
		return err
	}
	m.results.mu.Lock()
	defer m.results.mu.Unlock()
	m.results.advance(m.state.Read().Index())
	return nil
}
