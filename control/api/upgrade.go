package api

import (
	"context"
	"fmt"
	"net/http"

	"github.com/danielgtaylor/huma/v2"

	"github.com/relais-mta/relais/control"
	"github.com/relais-mta/relais/control/service"
)

// Upgrade is where the cluster stands between two releases.
type Upgrade struct {
	Commands   uint16   `json:"commands" doc:"Version of the commands that the cluster works at"`
	KnownByAll uint16   `json:"known_by_all" doc:"Newest version that every server knows; above commands, older releases can still be put back"`
	Newest     uint16   `json:"newest" doc:"Newest version that any server knows"`
	Waiting    []string `json:"waiting" doc:"Servers, with address and release, that do not know the newest version"`
}

func upgradeOf(v service.UpgradeView) Upgrade {
	out := Upgrade{Commands: v.Version, KnownByAll: v.Next, Newest: v.Newest, Waiting: []string{}}
	for _, row := range v.Servers {
		if row.MaxFSMVersion < v.Newest {
			out.Waiting = append(out.Waiting, serverName(row))
		}
	}
	return out
}

func serverName(row *control.Server) string {
	return fmt.Sprintf("%s at %s (%s)", row.Name, row.RaftAddress, row.Version)
}

func (s *server) registerUpgrade(a huma.API) {
	handle(s, a, route{method: http.MethodGet, path: "/upgrade", id: "get-upgrade", summary: "Where the cluster stands between two releases"},
		func(ctx context.Context, _ *struct{}) (*Out[Upgrade], error) {
			v, err := s.svc.Upgrade(actorOf(ctx))
			return &Out[Upgrade]{Body: upgradeOf(v)}, err
		})
	handle(s, a, route{method: http.MethodPost, path: "/upgrade/finish", id: "finish-upgrade", summary: "Work at the newest version of the commands at once; older releases cannot be put back then"},
		func(ctx context.Context, in *Precondition) (*Out[Upgrade], error) {
			v, err := s.svc.FinishUpgrade(ctx, actorOf(ctx), service.Change{Reason: in.Reason})
			return &Out[Upgrade]{Body: upgradeOf(v)}, err
		})
}
