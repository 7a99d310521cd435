package main

import (
	"context"
	"fmt"
	"path/filepath"
	"time"

	"golang.org/x/sync/errgroup"

	"github.com/relais-mta/relais/control/backup"
	"github.com/relais-mta/relais/control/state"
	"github.com/relais-mta/relais/shared/buildinfo"
	"github.com/relais-mta/relais/shared/fault"
	"github.com/relais-mta/relais/shared/pki"
	"github.com/relais-mta/relais/shared/telemetry"
)

// upkeepPeriod is how often the leader looks whether recovery mode is over and
// whether the commands' version can be raised.
const upkeepPeriod = 5 * time.Second

func (p paths) backups() string { return filepath.Join(p.dir, "backups") }

// newKeeper returns who takes this server's backups.
func (s *server) newKeeper(st *state.Store) (*backup.Keeper, error) {
	kek, err := pki.LoadKey(s.paths.kek())
	if err != nil {
		return nil, err
	}
	return backup.NewKeeper(backup.Options{Dir: s.paths.backups(), State: st, KEK: kek, Version: buildinfo.Version(), Leads: func() bool { return s.cluster.Ready() }, Logger: s.logger, Registerer: s.registry}), nil
}

// upkeep runs what the leader does by the clock, and shows in health how it
// stands.
func (s *server) upkeep(ctx context.Context, group *errgroup.Group) {
	s.health.Watch("backup", func() (telemetry.Severity, string) {
		if err := s.keeper.Health(); err != nil {
			return telemetry.Warning, fault.Public(err)
		}
		return telemetry.OK, ""
	})
	s.health.Watch("recovery", func() (telemetry.Severity, string) {
		if r := s.state.Read().Recovery(); r != nil {
			return telemetry.Warning, fmt.Sprintf("recovery mode since the %s of %s: see relais-control recovery show", r.Cause, r.Since.UTC().Format(time.RFC3339))
		}
		return telemetry.OK, ""
	})
	group.Go(func() error { s.keeper.Run(ctx); return nil })
	group.Go(func() error {
		tick := time.NewTicker(upkeepPeriod)
		defer tick.Stop()
		upgrade := s.service.NewUpgrade()
		for {
			select {
			case <-ctx.Done():
				return nil
			case now := <-tick.C:
				if !s.cluster.Ready() {
					upgrade = s.service.NewUpgrade() // who leads next counts anew
					continue
				}
				if err := s.service.EndRecoveryWhenHeard(ctx, now); err != nil {
					s.logger.Warn("recovery mode was not ended", "error", err)
				}
				if err := s.service.SettleDrains(ctx); err != nil {
					s.logger.Warn("a relay that has drained was not recorded so", "error", err)
				}
				if err := s.service.SettleReleases(ctx); err != nil {
					s.logger.Warn("that a relay has let go of an address was not recorded", "error", err)
				}
				if err := s.service.SettleHandover(ctx); err != nil {
					s.logger.Warn("where a relay takes mail of others was not recorded", "error", err)
				}
				if err := upgrade.Step(ctx, now); err != nil {
					s.logger.Warn("the version of the commands was not raised", "error", err)
				}
			}
		}
	})
}
