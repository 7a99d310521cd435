package api

import (
	"context"
	"net/http"
	"time"

	"github.com/danielgtaylor/huma/v2"

	"github.com/relais-mta/relais/control"
	"github.com/relais-mta/relais/control/service"
)

// Brake is a restriction of mail.
type Brake struct {
	ID         string     `json:"id"`
	Provider   string     `json:"provider,omitempty"`
	Pool       string     `json:"pool,omitempty"`
	PoolName   string     `json:"pool_name,omitempty"`
	Source     string     `json:"source,omitempty"`
	SourceAddr string     `json:"source_address,omitempty"`
	Tenant     string     `json:"tenant,omitempty"`
	TenantName string     `json:"tenant_name,omitempty"`
	Domain     string     `json:"domain,omitempty" doc:"Of recipients"`
	Level      string     `json:"level" enum:"hold,slow"`
	Percent    int        `json:"percent,omitempty" doc:"With slow: of what policy allows a lane"`
	Cause      string     `json:"cause"`
	Evidence   string     `json:"evidence,omitempty"`
	EvidenceAt *time.Time `json:"evidence_at,omitempty"`
	Owner      string     `json:"owner" doc:"Who set it: a person, or a rule"`
	Automatic  bool       `json:"automatic" doc:"A rule set it"`
	NodeName   string     `json:"node_name,omitempty" doc:"The relay that slowed down by itself, with the owner reflex"`
	CreatedAt  time.Time  `json:"created_at"`
	Until      *time.Time `json:"until,omitempty"`
	Pinned     bool       `json:"pinned" doc:"Neither time nor a rule ends it"`
	InForce    bool       `json:"in_force"`
	EndedAt    *time.Time `json:"ended_at,omitempty"`
	EndedBy    string     `json:"ended_by,omitempty"`
	EndReason  string     `json:"end_reason,omitempty"`
	Revision   uint64     `json:"revision"`
}

// BrakeSet asks for a brake on the mail that matches all that is given.
type BrakeSet struct {
	Provider   string `json:"provider,omitempty"`
	Pool       string `json:"pool,omitempty" doc:"Id or name"`
	Source     string `json:"source,omitempty" doc:"Address or id"`
	Tenant     string `json:"tenant,omitempty" doc:"Id or name"`
	Domain     string `json:"domain,omitempty" doc:"Of recipients"`
	Level      string `json:"level" enum:"hold,slow"`
	Percent    int    `json:"percent,omitempty" minimum:"0" maximum:"99" doc:"With slow: of what policy allows a lane"`
	Cause      string `json:"cause" doc:"Why; it is shown to who wonders why mail waits"`
	TTLSeconds int64  `json:"ttl_seconds,omitempty" minimum:"0" doc:"0: until it is cancelled"`
}

func brakeOf(v service.BrakeView) Brake {
	out := Brake{ID: v.ID.String(), Provider: v.Scope.Provider, PoolName: v.PoolName, SourceAddr: v.SourceAddr, TenantName: v.TenantName, Domain: string(v.Scope.Domain),
		Level: "hold", Percent: v.Percent, Cause: v.Cause, Evidence: v.Evidence, EvidenceAt: optionalTime(v.EvidenceAt), Owner: v.Owner, Automatic: v.Automatic, NodeName: v.NodeName,
		CreatedAt: v.CreatedAt, Until: optionalTime(v.Until), Pinned: v.Pinned, InForce: v.InForce(), EndedAt: optionalTime(v.EndedAt), EndedBy: v.EndedBy, EndReason: v.EndReason, Revision: v.Revision}
	if v.Percent > 0 {
		out.Level = "slow"
	}
	if !v.Scope.Pool.IsZero() {
		out.Pool = v.Scope.Pool.String()
	}
	if !v.Scope.Source.IsZero() {
		out.Source = v.Scope.Source.String()
	}
	if !v.Scope.Tenant.IsZero() {
		out.Tenant = v.Scope.Tenant.String()
	}
	return out
}

func (s *server) registerBrakes(a huma.API) {
	handle(s, a, route{method: http.MethodGet, path: "/brakes", id: "list-brakes", summary: "List the restrictions of mail that are in force"},
		func(ctx context.Context, in *struct {
			Ended bool `query:"ended" doc:"Those that ended in the last seven days as well"`
		}) (*List[Brake], error) {
			rows, err := s.svc.Brakes(actorOf(ctx), in.Ended)
			return list(rows, brakeOf), err
		})
	handle(s, a, route{method: http.MethodPost, path: "/brakes", id: "set-brake", summary: "Hold or slow down the mail that matches", status: http.StatusCreated},
		func(ctx context.Context, in *struct {
			Precondition
			Body BrakeSet
		}) (*Out[Brake], error) {
			b := &in.Body
			if (b.Level == "slow") != (b.Percent > 0) {
				return nil, &Problem{Type: "about:blank", Title: http.StatusText(http.StatusUnprocessableEntity), Status: http.StatusUnprocessableEntity, Kind: "invalid", Field: "percent", Detail: "percent goes with level slow: write 1 to 99 with it, and nothing with hold"}
			}
			row, err := s.svc.SetBrake(ctx, actorOf(ctx), service.BrakeRequest{Provider: b.Provider, Pool: b.Pool, Source: b.Source, Tenant: b.Tenant, Domain: b.Domain,
				Percent: b.Percent, Cause: b.Cause, TTL: time.Duration(b.TTLSeconds) * time.Second}, service.Change{Reason: in.Reason})
			return s.brakeOut(ctx, row, err)
		})
	handle(s, a, route{method: http.MethodGet, path: "/brakes/{brake}", id: "get-brake", summary: "Show a restriction of mail"},
		func(ctx context.Context, in *struct {
			Brake string `path:"brake" doc:"Its id"`
		}) (*Out[Brake], error) {
			v, err := s.svc.Brake(actorOf(ctx), in.Brake)
			if err != nil {
				return nil, err
			}
			return out(brakeOf(v), v.Revision), nil
		})
	handle(s, a, route{method: http.MethodPost, path: "/brakes/{brake}/cancel", id: "cancel-brake", summary: "End a restriction of mail"},
		func(ctx context.Context, in *struct {
			Brake string `path:"brake" doc:"Its id"`
			Precondition
		}) (*Out[Brake], error) {
			c, err := in.change()
			if err != nil {
				return nil, err
			}
			row, err := s.svc.CancelBrake(ctx, actorOf(ctx), in.Brake, c)
			return s.brakeOut(ctx, row, err)
		})
	handle(s, a, route{method: http.MethodPut, path: "/brakes/{brake}/pinned", id: "pin-brake", summary: "Keep a restriction from ending by its time or a rule, or let it again"},
		func(ctx context.Context, in *struct {
			Brake string `path:"brake" doc:"Its id"`
			Precondition
			Body struct {
				Pinned bool `json:"pinned"`
			}
		}) (*Out[Brake], error) {
			c, err := in.change()
			if err != nil {
				return nil, err
			}
			row, err := s.svc.PinBrake(ctx, actorOf(ctx), in.Brake, in.Body.Pinned, c)
			return s.brakeOut(ctx, row, err)
		})
}

// brakeOut answers a change with the brake as it is now.
func (s *server) brakeOut(ctx context.Context, row *control.Brake, err error) (*Out[Brake], error) {
	if err != nil {
		return nil, err
	}
	v, err := s.svc.Brake(actorOf(ctx), row.ID.String())
	if err != nil {
		return nil, err
	}
	return out(brakeOf(v), v.Revision), nil
}
