package api

import (
	"context"
	"net/http"

	"github.com/danielgtaylor/huma/v2"

	"github.com/relais-mta/relais/control"
	"github.com/relais-mta/relais/control/service"
)

func (s *server) registerQuarantine(a huma.API) {
	s.registerIPEnd(a, route{method: http.MethodPost, path: "/ips/{ip}/release", id: "release-ip", summary: "Have the relay of an address stop using it, or end its quarantine; it is free then"}, s.svc.ReleaseIP)
	s.registerIPEnd(a, route{method: http.MethodPost, path: "/ips/{ip}/unquarantine", id: "unquarantine-ip", summary: "End the quarantine of an address; it is free again"}, s.svc.UnquarantineIP)
	handle(s, a, route{method: http.MethodPost, path: "/ips/{ip}/quarantine", id: "quarantine-ip", summary: "Have nobody send from an address until that is ended"},
		func(ctx context.Context, in *struct {
			Precondition
			IP string `path:"ip" doc:"The address or its id"`
		}) (*Out[IP], error) {
			c, err := in.change()
			if err != nil {
				return nil, err
			}
			row, err := s.svc.QuarantineIP(ctx, actorOf(ctx), in.IP, c)
			return s.ipOut(ctx, row, err)
		})
}

// registerIPEnd registers a request that makes an address free.
func (s *server) registerIPEnd(a huma.API, r route, end func(ctx context.Context, a service.Actor, ip string, oldOwnerIsOff bool, c service.Change) (*control.Source, error)) {
	handle(s, a, r, func(ctx context.Context, in *struct {
		Precondition
		IP   string `path:"ip" doc:"The address or its id"`
		Body struct {
			OldOwnerIsOff bool `json:"old_owner_is_off" doc:"Your word that the machine that held the address is switched off"`
		}
	}) (*Out[IP], error) {
		c, err := in.change()
		if err != nil {
			return nil, err
		}
		row, err := end(ctx, actorOf(ctx), in.IP, in.Body.OldOwnerIsOff, c)
		return s.ipOut(ctx, row, err)
	})
}
