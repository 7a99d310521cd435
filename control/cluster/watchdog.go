package cluster

import (
	"errors"
	"sync/atomic"
	"time"

	"github.com/hashicorp/raft"

	"github.com/relais-mta/relais/shared/fault"
)

const (
	probePeriod     = time.Second
	probeTimeout    = 3 * time.Second
	transferTimeout = 2 * time.Second
)

// watchDisk commits an entry without content each second while this server
// leads. A leader whose disk hangs goes on sending heartbeats, so the others
// would follow it for ever (hashicorp/raft 503, 612): if an entry is not
// committed in time, another server is to lead, and if that cannot be arranged
// either, the process ends.
func (c *Cluster) watchDisk(halt func(error)) {
	tick := time.NewTicker(probePeriod)
	defer tick.Stop()
	for {
		select {
		case <-c.stop:
			return
		case <-tick.C:
		}
		if !c.Ready() {
			continue
		}
		start := time.Now()
		if c.probe() {
			c.metrics.probeSeconds.Observe(time.Since(start).Seconds())
			continue
		}
		if c.raft.State() != raft.Leader {
			continue // it lost the lead: no wonder
		}
		c.metrics.stalls.Inc()
		c.logger.Error("nothing is committed although this server leads: another one is to take over", "waited", c.tuning.ProbeTimeout.String())
		if within(c.raft.LeadershipTransfer().Error, transferTimeout, c.stop) || c.raft.State() != raft.Leader {
			continue
		}
		halt(fault.New(fault.Unavailable, "cluster.watchDisk", "no entry was committed within %s and no other server took over: is the disk of %s full, broken or hanging?", c.tuning.ProbeTimeout, c.dir))
		return
	}
}

// probe reports whether an entry was committed in time, or the question became
// pointless.
func (c *Cluster) probe() bool {
	var full atomic.Bool
	answered := within(func() error {
		err := c.raft.Barrier(c.tuning.ProbeTimeout).Error()
		full.Store(errors.Is(err, raft.ErrEnqueueTimeout)) // raft took nothing for so long
		return err
	}, c.tuning.ProbeTimeout, c.stop)
	return answered && !full.Load()
}

// within reports whether wait returned, whatever it returned, within d.
func within(wait func() error, d time.Duration, stop <-chan struct{}) bool {
	done := make(chan struct{})
	go func() { // ends with what it waits for, or with raft
		_ = wait() // an answer of any kind shows that raft is alive
		close(done)
	}()
	timer := time.NewTimer(d)
	defer timer.Stop()
	select {
	case <-done:
		return true
	case <-stop:
		return true
	case <-timer.C:
		return false
	}
}
