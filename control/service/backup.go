package service

import (
	"context"
	"io"

	"github.com/relais-mta/relais/control"
	"github.com/relais-mta/relais/control/backup"
	"github.com/relais-mta/relais/shared/fault"
)

// Backups takes verified backups; backup.Keeper implements it.
type Backups interface {
	Take(context.Context) (io.ReadCloser, backup.Manifest, error)
}

// Backup returns a verified backup of what this server has applied. It holds
// every secret of the cluster, encrypted, so only an admin gets it.
func (s *Service) Backup(ctx context.Context, a Actor) (io.ReadCloser, backup.Manifest, error) {
	const op = "service.Backup"
	if err := s.enter(a, control.RoleAdmin, op); err != nil {
		return nil, backup.Manifest{}, err
	}
	if s.backups == nil {
		return nil, backup.Manifest{}, fault.New(fault.Unavailable, op, "this server is still starting: try again in a few seconds")
	}
	r, m, err := s.backups.Take(ctx)
	if err == nil {
		s.logger.Info("backup taken", "actor", a.Name, "index", m.Index, "state_bytes", m.StateBytes)
	}
	return r, m, err
}
