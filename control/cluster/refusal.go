package cluster

import (
	"context"
	"errors"
	"net"
	"time"

	"github.com/relais-mta/relais/shared/fault"
)

// refusalPeriod is how often a server that is not in touch with the others asks
// why.
const refusalPeriod = 2 * time.Second

// watchRefusal finds out whether the others refuse this server. One that was
// removed while it was off hears of it from nobody: its connections are closed.
func (c *Cluster) watchRefusal() {
	tick := time.NewTicker(refusalPeriod)
	defer tick.Stop()
	for {
		select {
		case <-c.stop:
			return
		case <-tick.C:
		}
		if c.Ready() || c.Fresh() || !c.othersRefuse() {
			c.refused.Store(nil)
			continue
		}
		if c.refused.Load() == nil {
			err := fault.New(fault.Denied, "cluster.watchRefusal", "the other servers refuse this one: it was removed from the cluster, or was off until its certificate was worth nothing. If `relais-control server list` at another server does not name %s, empty %s and join anew", c.id, c.dir)
			c.logger.Error("this server is not let in", "error", err)
			c.refused.Store(err)
		}
	}
}

// othersRefuse reports whether some server refuses this one and none takes it.
func (c *Cluster) othersRefuse() bool {
	conf := c.raft.GetConfiguration()
	if conf.Error() != nil {
		return false
	}
	ctx, cancel := context.WithTimeout(context.Background(), statusTimeout)
	defer cancel()
	refusals := 0
	for _, s := range conf.Configuration().Servers {
		if string(s.ID) == c.id {
			continue
		}
		out, err := c.peers.ask(ctx, string(s.Address), "status", nil)
		var alert *net.OpError
		switch {
		case err == nil && out.Error == nil:
			return false
		case err == nil && out.Error.Kind == fault.Denied,
			// In TLS 1.3 the other side's verdict comes with the first read.
			errors.As(err, &alert) && alert.Op == "remote error":
			refusals++
		}
	}
	return refusals > 0
}
