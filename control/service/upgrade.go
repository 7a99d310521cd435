package service

import (
	"context"
	"time"

	"github.com/relais-mta/relais/control"
	"github.com/relais-mta/relais/control/command"
	"github.com/relais-mta/relais/shared/fault"
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
	cluster, err := u.service.Cluster()
	if err != nil {
		return nil // it was not initialised
	}
	view := u.service.upgradeView(cluster)
	if view.Next != u.version {
		u.version, u.since = view.Next, now
	}
	if view.Next <= cluster.FSMVersion || now.Sub(u.since) < StableBeforeUpgrade {
		return nil
	}
	return u.service.raiseVersion(ctx, view.Next, &command.Meta{Actor: System.Name, Reason: "every server knows it"})
}

// UpgradeView is where the cluster stands between two releases.
type UpgradeView struct {
	Version uint16            // of the commands that the cluster works at
	Next    uint16            // newest version that every server knows
	Newest  uint16            // newest version that any server knows
	Servers []*control.Server // that were not removed
}

func (s *Service) upgradeView(cluster *control.Cluster) UpgradeView {
	view := UpgradeView{Version: cluster.FSMVersion, Next: command.FSMVersion, Newest: cluster.FSMVersion, Servers: s.ServerRows()}
	for _, row := range view.Servers {
		view.Next, view.Newest = min(view.Next, row.MaxFSMVersion), max(view.Newest, row.MaxFSMVersion)
	}
	return view
}

func (s *Service) raiseVersion(ctx context.Context, to uint16, meta *command.Meta) error {
	_, err := propose[control.Cluster](ctx, s, &command.FSMVersionSet{Meta: meta, Version: uint32(to)})
	if err == nil {
		s.logger.Info("the cluster works at a newer version of the commands: older releases cannot start on it any more", "version", to)
	}
	return err
}

// Upgrade returns where the cluster stands between two releases.
func (s *Service) Upgrade(a Actor) (UpgradeView, error) {
	if err := s.enter(a, control.RoleViewer, "service.Upgrade"); err != nil {
		return UpgradeView{}, err
	}
	cluster, err := s.Cluster()
	if err != nil {
		return UpgradeView{}, err
	}
	return s.upgradeView(cluster), nil
}

// FinishUpgrade raises the version of the commands at once instead of when
// StableBeforeUpgrade is over. From then on the release of before cannot be put
// back. It is Conflict while a server knows no more than the cluster works at
// but others do; finishing an upgrade that is finished changes nothing.
func (s *Service) FinishUpgrade(ctx context.Context, a Actor, c Change) (UpgradeView, error) {
	const op = "service.FinishUpgrade"
	if err := s.enter(a, control.RoleAdmin, op); err != nil {
		return UpgradeView{}, err
	}
	view, err := s.Upgrade(a)
	if err != nil || view.Newest <= view.Version {
		return view, err
	}
	for _, row := range view.Servers {
		if row.MaxFSMVersion < view.Newest {
			return UpgradeView{}, fault.New(fault.Conflict, op, "%s at %s runs release %s, which knows version %d of the commands, others know %d: upgrade it first, or remove it if it is gone for good", row.Name, row.RaftAddress, row.Version, row.MaxFSMVersion, view.Newest)
		}
	}
	if err := s.raiseVersion(ctx, view.Next, c.meta(a)); err != nil {
		return UpgradeView{}, err
	}
	return s.Upgrade(a)
}

// needs refuses what an older server of the cluster would not know.
func (s *Service) needs(op, what string, version uint16) error {
	var have uint16
	if cluster := s.state.Read().Cluster(); cluster != nil {
		have = cluster.FSMVersion
	}
	if have >= version {
		return nil
	}
	return fault.New(fault.Unavailable, op, "%s needs version %d of the commands, the cluster works at %d: upgrade every server, the version is raised ten minutes after the last one, or by `relais-control upgrade finish`", what, version, have)
}
