package api

import (
	"context"
	"net/http"
	"time"

	"github.com/danielgtaylor/huma/v2"

	"github.com/relais-mta/relais/control/service"
	"github.com/relais-mta/relais/shared/lease"
	"github.com/relais-mta/relais/shared/policy"
)

// SharedLimit is a limit that all relays share.
type SharedLimit struct {
	Name           string  `json:"name" doc:"Of the limit in section limits of the policy"`
	Number         uint64  `json:"number" doc:"Never used again"`
	Counts         string  `json:"counts" doc:"messages or connections"`
	Max            float64 `json:"max" doc:"Messages within the span, or connections at once"`
	Per            string  `json:"per,omitempty" doc:"Span of a limit of messages"`
	Burst          int64   `json:"burst,omitempty" doc:"Messages that may begin at once after a pause, all relays together"`
	FloorPercent   int     `json:"floor_percent"`
	ReservePercent int     `json:"reserve_percent"`
	SoftFloor      bool    `json:"soft_floor,omitempty"`
	Provider       string  `json:"provider,omitempty" doc:"Absent: all"`
	Tenant         string  `json:"tenant,omitempty"`
	Domain         string  `json:"domain,omitempty" doc:"Of recipients"`
	Pool           string  `json:"pool,omitempty"`

	Held     float64       `json:"held" doc:"By all relays, floors included"`
	Free     float64       `json:"free"`
	Holders  []LimitHolder `json:"holders"`
	NotKept  []string      `json:"not_kept_by,omitempty" doc:"Connected relays of a release that knows no shared limits, by name"`
	Problem  string        `json:"problem,omitempty" doc:"Why nothing is known of what relays want"`
	Revision uint64        `json:"revision"`
}

// LimitHolder is one relay's part in a shared limit. What only the leader knows is
// absent in lists.
type LimitHolder struct {
	Node        string     `json:"node" doc:"Name of the relay"`
	State       string     `json:"state"`
	Ceiling     float64    `json:"ceiling" doc:"May be held at most, beyond the floor"`
	Burst       int64      `json:"burst,omitempty" doc:"Of the ceiling and the floor"`
	Floor       float64    `json:"floor" doc:"May be used when the relay is cut off"`
	Granted     *float64   `json:"granted,omitempty" doc:"Was told to the relay last, beyond the floor"`
	Demand      *float64   `json:"demand,omitempty" doc:"The relay could use now"`
	Used        *int64     `json:"used,omitempty" doc:"Between its last two reports"`
	Denied      *int64     `json:"denied,omitempty" doc:"Times that the limit said no meanwhile"`
	Heard       *bool      `json:"heard,omitempty" doc:"Within a lease"`
	LastHeard   *time.Time `json:"last_heard,omitempty" doc:"Of a relay that was not: since when the leader waits"`
	WaitsInTurn bool       `json:"waits_in_turn,omitempty" doc:"There are fewer rights than relays that want one"`
	Incarnation uint64     `json:"incarnation" doc:"Counts the starts of the relay"`
}

// units turns an amount into what people count.
func units(kind lease.Kind, amount int64) float64 {
	if kind == lease.Rate {
		return float64(amount) / lease.Milli
	}
	return float64(amount)
}

func limitOf(v service.LimitView) SharedLimit {
	shared := policy.SharedLimit{Limit: v.Limit}
	out := SharedLimit{Name: v.Name, Number: uint64(v.ID), Counts: shared.Counts(), Max: units(v.Kind, v.Max), Burst: v.Burst, FloorPercent: v.FloorPercent, ReservePercent: v.ReservePercent, SoftFloor: v.SoftFloor,
		Provider: v.Provider, Tenant: v.Tenant, Domain: v.Domain, Pool: v.Pool, Held: units(v.Kind, v.Held.Amount), Free: units(v.Kind, v.Free.Amount), Holders: []LimitHolder{}, NotKept: v.NotKept, Problem: v.Problem, Revision: v.Revision}
	if v.Kind == lease.Rate {
		out.Per = policy.Duration(v.Per).String()
	}
	now := time.Now()
	for _, h := range v.Holders {
		holder := LimitHolder{Node: h.Name, State: string(h.State), Ceiling: units(v.Kind, h.Ceiling.Amount), Floor: units(v.Kind, h.Floor.Amount), Burst: h.Ceiling.Burst + h.Floor.Burst, Incarnation: h.Incarnation}
		if live := h.Live; live != nil {
			granted, demand, at := units(v.Kind, live.Granted.Amount), units(v.Kind, live.Demand), now.Add(-time.Duration(live.SilentMS)*time.Millisecond).UTC()
			holder.Granted, holder.Demand, holder.Used, holder.Denied, holder.Heard, holder.LastHeard, holder.WaitsInTurn = &granted, &demand, &live.Used, &live.Denied, &live.Heard, &at, live.WaitsInTurn
		}
		out.Holders = append(out.Holders, holder)
	}
	return out
}

// PolicyWhy is what holds for some mail.
type PolicyWhy struct {
	Source   string          `json:"source,omitempty"`
	Pool     string          `json:"pool,omitempty"`
	Tenant   string          `json:"tenant,omitempty"`
	Provider string          `json:"provider,omitempty"`
	Domain   string          `json:"domain,omitempty"`
	Profile  bool            `json:"profile" doc:"The provider has a profile of its own; else the default holds"`
	Each     []ProviderLimit `json:"each" doc:"Limits of each source address or relay by itself"`
	Shared   []SharedLimit   `json:"shared" doc:"Limits of all relays together"`
	Brakes   []Brake         `json:"brakes" doc:"In force"`
	WarmUps  []WarmUp        `json:"warmups" doc:"Of the address, if one is named, of pools and of sending domains; with the class of the provider alone, if one is named"`
}

// ProviderLimit is one limit of a provider's profile.
type ProviderLimit struct {
	Kind  string `json:"kind"`
	Scope string `json:"scope" doc:"source or relay"`
	Max   int    `json:"max"`
	Per   string `json:"per,omitempty"`
	Burst int    `json:"burst,omitempty"`
}

func whyOf(w service.Why) PolicyWhy {
	out := PolicyWhy{Source: w.Mail.Source, Pool: w.Mail.Pool, Tenant: w.Mail.Tenant, Provider: w.Mail.Provider, Domain: w.Mail.Domain, Profile: w.Provider.Listed, Each: []ProviderLimit{}, Shared: []SharedLimit{}, Brakes: []Brake{}, WarmUps: []WarmUp{}}
	for _, l := range w.Provider.Limits {
		one := ProviderLimit{Kind: string(l.Kind), Scope: string(l.Scope), Max: l.Max, Burst: l.Burst}
		if l.Per > 0 {
			one.Per = policy.Duration(l.Per).String()
		}
		out.Each = append(out.Each, one)
	}
	for _, v := range w.Shared {
		out.Shared = append(out.Shared, limitOf(v))
	}
	for _, b := range w.Brakes {
		out.Brakes = append(out.Brakes, brakeOf(b))
	}
	for _, v := range w.WarmUps {
		out.WarmUps = append(out.WarmUps, warmUpOf(v))
	}
	return out
}

func (s *server) registerLimits(a huma.API) {
	handle(s, a, route{method: http.MethodGet, path: "/limits", id: "list-limits", summary: "The limits that all relays share, and who holds how much of them"},
		func(ctx context.Context, _ *struct{}) (*List[SharedLimit], error) {
			rows, err := s.svc.Limits(ctx, actorOf(ctx))
			if err != nil {
				return nil, err
			}
			return list(rows, limitOf), nil
		})
	handle(s, a, route{method: http.MethodGet, path: "/limits/{name}", id: "get-limit", summary: "One limit that all relays share: of messages, of connections, or both"},
		func(ctx context.Context, in *struct {
			Name string `path:"name"`
		}) (*List[SharedLimit], error) {
			rows, err := s.svc.Limit(ctx, actorOf(ctx), in.Name)
			if err != nil {
				return nil, err
			}
			return list(rows, limitOf), nil
		})
	handle(s, a, route{method: http.MethodGet, path: "/policy/why", id: "policy-why", summary: "Every limit that holds for some mail"},
		func(ctx context.Context, in *struct {
			Source   string `query:"source" doc:"Address that the mail leaves from"`
			Provider string `query:"provider"`
			Tenant   string `query:"tenant" doc:"Name"`
			Domain   string `query:"domain" doc:"Of the recipient"`
			Pool     string `query:"pool" doc:"Name"`
		}) (*Out[PolicyWhy], error) {
			w, err := s.svc.PolicyWhy(ctx, actorOf(ctx), service.Mail{Source: in.Source, Provider: in.Provider, Tenant: in.Tenant, Domain: in.Domain, Pool: in.Pool})
			if err != nil {
				return nil, err
			}
			return &Out[PolicyWhy]{Body: whyOf(w)}, nil
		})
}
