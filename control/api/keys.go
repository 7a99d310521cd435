package api

import (
	"context"
	"net/http"
	"time"

	"github.com/danielgtaylor/huma/v2"

	"github.com/relais-mta/relais/control/service"
)

// DomainKey is a DKIM key of a domain.
type DomainKey struct {
	Selector  string     `json:"selector"`
	Algorithm string     `json:"algorithm" enum:"rsa-sha256,ed25519-sha256"`
	Bits      int        `json:"bits"`
	State     string     `json:"state" enum:"new,signing,retiring,retired,over"`
	Since     *time.Time `json:"since,omitempty" doc:"Of the state; absent: since the domain is"`
	SeenAt    *time.Time `json:"seen_at,omitempty" doc:"Since when DNS shows the record of a new key"`
	Waits     string     `json:"waits,omitempty" doc:"What the key waits for"`
}

func keysOf(keys []service.KeyView) []DomainKey {
	out := make([]DomainKey, 0, len(keys))
	for i := range keys {
		k := &keys[i]
		out = append(out, DomainKey{Selector: k.Selector, Algorithm: k.Algorithm, Bits: k.Bits(), State: k.State.String(), Since: optionalTime(k.Since), SeenAt: optionalTime(k.SeenAt), Waits: k.Waits})
	}
	return out
}

func (s *server) registerKeys(a huma.API) {
	handle(s, a, route{method: http.MethodPost, path: "/domains/{domain}/dkim/rotate", id: "rotate-domain-keys", summary: "Make new DKIM keys, which sign once DNS has shown their records"},
		func(ctx context.Context, in *struct {
			Precondition
			Domain string `path:"domain"`
		}) (*Out[Domain], error) {
			c, err := in.change()
			if err != nil {
				return nil, err
			}
			v, err := s.svc.RotateKeys(ctx, actorOf(ctx), in.Domain, c)
			if err != nil {
				return nil, err
			}
			return out(domainOf(v), v.Revision), nil
		})
	handle(s, a, route{method: http.MethodPost, path: "/domains/{domain}/dkim/rollback", id: "rollback-domain-keys", summary: "Give up new DKIM keys, or let the former ones sign again"},
		func(ctx context.Context, in *struct {
			Precondition
			Domain string `path:"domain"`
			Body   struct {
				Force bool `json:"force,omitempty" doc:"Even if DNS does not show the records of the former keys"`
			}
		}) (*Out[Domain], error) {
			c, err := in.change()
			if err != nil {
				return nil, err
			}
			v, err := s.svc.RollbackKeys(ctx, actorOf(ctx), in.Domain, in.Body.Force, c)
			if err != nil {
				return nil, err
			}
			return out(domainOf(v), v.Revision), nil
		})
}
