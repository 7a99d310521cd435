package service

import (
	"context"
	"time"

	"github.com/relais-mta/relais/control"
	"github.com/relais-mta/relais/control/command"
)

// StableBeforeUpgrade is how long every server must have known a version of the
// commands before the cluster works at it. Until then an upgrade can be undone.
const StableBeforeUpgrade = 10 * time.Minute

// Upgrade raises the version of the commands when every server knows a newer
// one. It belongs to one goroutine of the leader.
type Upgrade struct {
	service *Service
	version uint16
	since   time.Time
}

// NewUpgrade returns the watch of a server that leads.
func (s *Service) NewUpgrade() *Upgrade { return &Upgrade{service: s} }

// Step looks at the servers, and raises the version if it is time.
func (u *Upgrade) Step(ctx context.Context, now time.Time) error {
	r := u.service.state.Read()
	cluster := r.Cluster()
	if cluster == nil {
		return nil
	}
	lowest := command.FSMVersion
	for _, s := range r.Servers() {
		if s.State != control.NodeEvicted {
			lowest = min(lowest, s.MaxFSMVersion)
		}
	}
	if lowest != u.version {
		u.version, u.since = lowest, now
	}
	if lowest <= cluster.FSMVersion || now.Sub(u.since) < StableBeforeUpgrade {
		return nil
	}
	_, err := propose[control.Cluster](ctx, u.service, &command.FSMVersionSet{Meta: &command.Meta{Actor: System.Name, Reason: "every server knows it"}, Version: uint32(lowest)})
	if err == nil {
		u.service.logger.Info("the cluster works at a newer version of the commands: older releases cannot start on it any more", "version", lowest)
	}
	return err
}
