package api

import (
	"context"
	"net/http"

	"github.com/danielgtaylor/huma/v2"
)

func (s *server) registerQuarantine(a huma.API) {
	handle(s, a, route{method: http.MethodPost, path: "/ips/{ip}/release", id: "release-ip", summary: "Have the relay of an address stop using it, or end its quarantine; it is free then"},
		func(ctx context.Context, in *struct {
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
			row, err := s.svc.ReleaseIP(ctx, actorOf(ctx), in.IP, in.Body.OldOwnerIsOff, c)
			return s.ipOut(ctx, row, err)
		})
	handle(s, a, route{method: http.MethodPost, path: "/ips/{ip}/unquarantine", id: "unquarantine-ip", summary: "End the quarantine of an address; it is free again"},
		func(ctx context.Context, in *struct {
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
			row, err := s.svc.UnquarantineIP(ctx, actorOf(ctx), in.IP, in.Body.OldOwnerIsOff, c)
			return s.ipOut(ctx, row, err)
		})
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
