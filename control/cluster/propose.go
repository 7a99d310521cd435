package cluster

import (
	"context"
	"errors"
	"time"

	"github.com/hashicorp/raft"

	"github.com/relais-mta/relais/control"
	"github.com/relais-mta/relais/control/command"
	"github.com/relais-mta/relais/control/state"
	"github.com/relais-mta/relais/shared/fault"
)

// noLeaderText also serves those who have lost a majority of their servers.
const noLeaderText = "the cluster has no leader now: try again in a few seconds. If it stays so, too few of its voters run: start them, or, if they are lost for good, see `relais-control recover --help`"

// Propose commits the command, through the leader if that is another server,
// and returns what applying it gave; this server's state has it then. The error
// is either a rule's refusal (nothing changed), or says that there is no leader
// (nothing changed), or wraps control.ErrOutcomeUnknown.
func (c *Cluster) Propose(ctx context.Context, cmd command.Command) (state.Result, error) {
	if err := cmd.Validate(); err != nil {
		return state.Result{}, err
	}
	if !c.Ready() {
		return c.forward(ctx, cmd)
	}
	return c.proposeHere(ctx, cmd)
}

// proposeHere commits the command if this server leads.
func (c *Cluster) proposeHere(ctx context.Context, cmd command.Command) (state.Result, error) {
	const op = "cluster.Propose"
	if err := cmd.Validate(); err != nil {
		return state.Result{}, err
	}
	if err := c.gate(cmd); err != nil {
		return state.Result{}, err
	}
	if !c.Ready() {
		return state.Result{}, fault.Wrap(control.ErrNoLeader, fault.Unavailable, op, "this server does not lead the cluster: try again in a few seconds")
	}
	select {
	case c.slots <- struct{}{}:
	default:
		return state.Result{}, fault.New(fault.Exhausted, op, "%d changes are waiting already: try again in a few seconds", maxProposalsWaiting)
	}
	start := time.Now()
	data, err := command.Encode(cmd, start, c.raft.CurrentTerm())
	if err != nil {
		<-c.slots
		return state.Result{}, err
	}
	future := c.raft.ApplyLog(raft.Log{Data: data, Extensions: sumOf(data)}, enqueueTimeout)
	done := make(chan error, 1)
	go func() { // ends with the proposal or with raft
		done <- future.Error()
		<-c.slots
	}()
	select {
	case err = <-done:
	case <-ctx.Done():
		return state.Result{}, unknown(ctx.Err())
	}
	name := command.TypeOf(cmd).String()
	if err != nil {
		c.metrics.proposals.WithLabelValues(name, "lost").Inc()
		return state.Result{}, translate(err)
	}
	c.metrics.commitSeconds.Observe(time.Since(start).Seconds())
	result, ok := future.Response().(state.Result)
	if !ok {
		return state.Result{}, fault.New(fault.Internal, op, "applying a %s gave %T", name, future.Response())
	}
	if result.Err != nil {
		c.metrics.proposals.WithLabelValues(name, "refused").Inc()
		return result, result.Err
	}
	c.metrics.proposals.WithLabelValues(name, "applied").Inc()
	return result, nil
}

func unknown(cause error) error {
	return fault.Wrap(errors.Join(control.ErrOutcomeUnknown, cause), fault.Unavailable, "cluster.Propose", "the change may or may not have been made: read again before repeating it")
}

// translate tells errors after which the entry cannot have been committed from
// those after which it may have been.
func translate(err error) error {
	switch {
	case errors.Is(err, raft.ErrNotLeader), errors.Is(err, raft.ErrEnqueueTimeout), errors.Is(err, raft.ErrLeadershipTransferInProgress):
		return fault.Wrap(errors.Join(control.ErrNoLeader, err), fault.Unavailable, "cluster.Propose", "the cluster is choosing a leader, nothing was changed: try again in a few seconds")
	}
	// ErrLeadershipLost, ErrAbortedByRestore, ErrRaftShutdown, storage errors:
	// another server may still commit the entry.
	return unknown(err)
}
