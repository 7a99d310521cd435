package main

import (
	"context"

	"github.com/relais-mta/relais/control"
	"github.com/relais-mta/relais/control/cluster"
	"github.com/relais-mta/relais/control/quota"
	"github.com/relais-mta/relais/shared/fault"
	"github.com/relais-mta/relais/shared/ids"
	"github.com/relais-mta/relais/shared/telemetry"
	"github.com/relais-mta/relais/shared/wire"
)

// newQuota returns this server's end of what relays share.
func (s *server) newQuota() (*quota.Quota, error) {
	q, err := quota.New(quota.Options{Self: s.file.Server, Cluster: s.cluster, Deliver: s.deliverQuota, Logger: s.logger, Registerer: s.registry})
	if err != nil {
		return nil, err
	}
	limits, err := quota.NewLease(quota.LeaseOptions{State: s.state, Log: s.cluster, Send: q.Send, Succeeds: s.succeeds, Logger: s.logger, Registerer: s.registry})
	if err != nil {
		return nil, err
	}
	q.Add("limits", limits)
	s.health.Watch("limits", func() (telemetry.Severity, string) {
		if alarm := limits.Alarm(); alarm != "" {
			return telemetry.Critical, alarm
		}
		return telemetry.OK, ""
	})
	warm, err := s.newWarm(q)
	if err != nil {
		return nil, fault.Wrap(err, fault.Internal, "relais-control.newQuota", "cannot register metrics")
	}
	q.Add("warmup", warm)
	q.Add("floating", quota.NewFloating(quota.FloatingOptions{State: s.state, Propose: s.cluster.Propose, Send: q.Send, Succeeds: s.succeeds, Logger: s.logger}))
	return q, nil
}

// deliverQuota hands a message of the leader to a relay that is linked here.
func (s *server) deliverQuota(node ids.Node, down *wire.QuotaDown) bool {
	views := s.sessions.Load()
	return views != nil && views.SendQuota(node, down)
}

// succeeds reports whether a relay's process has the relay's session.
func (s *server) succeeds(node, through ids.Node, incarnation uint64) bool {
	views := s.sessions.Load()
	return views != nil && views.Succeeds(node, through, incarnation)
}

// quotaRequests adds what servers ask the leader about what relays share.
func (s *server) quotaRequests(all map[string]cluster.PeerHandler) map[string]cluster.PeerHandler {
	all = warmRequests(all)
	for _, name := range quota.RequestNames() {
		all[name] = func(ctx context.Context, from ids.Node, body []byte) (any, error) {
			if s.answering.Load() == nil {
				return nil, fault.Wrap(control.ErrNoLeader, fault.Unavailable, "relais-control.serve", "this server is starting")
			}
			return s.quota.Requests()[name](ctx, from, body)
		}
	}
	return all
}
