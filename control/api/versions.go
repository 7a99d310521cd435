package api

import (
	"context"
	"net/http"
	"time"

	"github.com/danielgtaylor/huma/v2"

	"github.com/relais-mta/relais/control"
	"github.com/relais-mta/relais/control/service"
	"github.com/relais-mta/relais/shared/fault"
	"github.com/relais-mta/relais/shared/policy"
)

// PolicyPreviewRequest asks what a change would do.
type PolicyPreviewRequest struct {
	Sections map[string]string `json:"sections,omitempty" doc:"As for put-policy"`
	Revision *uint64           `json:"revision,omitempty" doc:"Instead of sections: a former revision to go back to; 0 is the shipped policy"`
}

// PolicyPreview says what a change would do.
type PolicyPreview struct {
	Revision uint64         `json:"revision" doc:"Policy that the change was compared with"`
	Changes  []PolicyChange `json:"changes"`
	Impact   PolicyImpact   `json:"impact"`
}

// PolicyChange is one key that differs; values are written as in TOML.
type PolicyChange struct {
	Section string `json:"section"`
	Key     string `json:"key"`
	Old     string `json:"old,omitempty" doc:"Absent: the key is new"`
	New     string `json:"new,omitempty" doc:"Absent: the key is gone"`
}

// PolicyImpact counts what a change touches.
type PolicyImpact struct {
	Summary   string           `json:"summary"`
	Pools     int              `json:"pools"`
	Sources   int              `json:"sources"`
	Lanes     int              `json:"lanes" doc:"Pairs of a source address and a provider"`
	Providers []ProviderImpact `json:"providers,omitempty"`
	Streams   []string         `json:"streams,omitempty" doc:"Entries that change, as tenant/project/name"`
	Settings  []string         `json:"settings,omitempty" doc:"Sections whose settings change on every relay"`
	Limits    []string         `json:"limits,omitempty" doc:"Limits across the cluster that change, by name"`
}

// ProviderImpact is a provider whose profile changes.
type ProviderImpact struct {
	Name    string `json:"name"`
	Lowers  bool   `json:"lowers" doc:"A limit becomes tighter"`
	Raises  bool   `json:"raises" doc:"A limit becomes wider or goes away"`
	Sources int    `json:"sources"`
}

// PolicyVersion is a policy that was in force.
type PolicyVersion struct {
	Revision uint64     `json:"revision"`
	Time     *time.Time `json:"time,omitempty" doc:"Absent for a policy from before versions were kept"`
	Actor    string     `json:"actor,omitempty"`
	Reason   string     `json:"reason,omitempty"`
	Sections []string   `json:"sections" doc:"Sections that differ from the shipped policy"`
}

// PolicyStatus says which relays work with the policy in force.
type PolicyStatus struct {
	Revision uint64        `json:"revision"`
	Applied  int           `json:"applied" doc:"Relays that work with it, as far as the server that answers heard"`
	Total    int           `json:"total"`
	Relays   []RelayStatus `json:"relays"`
}

// RelayStatus is where one relay stands.
type RelayStatus struct {
	ID              string     `json:"id"`
	Name            string     `json:"name"`
	State           string     `json:"state"`
	Connected       bool       `json:"connected" doc:"To any server"`
	AckedRevision   uint64     `json:"acked_revision"`
	AckedAt         *time.Time `json:"acked_at,omitempty"`
	Refused         bool       `json:"refused,omitempty" doc:"It refused the policy in force and works with its last good one"`
	RefusedRevision uint64     `json:"refused_revision,omitempty" doc:"The revision that it refused, not below that of the policy in force"`
	RefusedWhy      string     `json:"refused_why,omitempty"`
}

func previewOf(p service.Preview) PolicyPreview {
	i := p.Impact
	out := PolicyPreview{Revision: p.Revision, Changes: make([]PolicyChange, 0, len(p.Changes)),
		Impact: PolicyImpact{Summary: i.String(), Pools: i.Pools, Sources: i.Sources, Lanes: i.Lanes, Streams: i.Streams, Settings: i.Settings, Limits: i.Limits}}
	for _, c := range p.Changes {
		out.Changes = append(out.Changes, PolicyChange(c))
	}
	for _, p := range i.Providers {
		out.Impact.Providers = append(out.Impact.Providers, ProviderImpact(policy.ProviderImpact(p)))
	}
	return out
}

func versionOf(v *control.PolicyVersion) PolicyVersion {
	out := PolicyVersion{Revision: v.Policy, Time: optionalTime(v.Time), Actor: v.Actor, Reason: v.Reason, Sections: []string{}}
	for _, s := range v.Sections {
		out.Sections = append(out.Sections, s.Name)
	}
	return out
}

func statusOf(s service.PolicyStatus) PolicyStatus {
	out := PolicyStatus{Revision: s.Revision, Applied: s.Applied, Total: s.Total, Relays: []RelayStatus{}}
	for _, r := range s.Relays {
		out.Relays = append(out.Relays, RelayStatus{ID: r.Node.ID.String(), Name: r.Node.Name, State: string(r.Node.State), Connected: r.Connected,
			AckedRevision: r.Acked, AckedAt: optionalTime(r.AckedAt.UTC()), Refused: r.Refused, RefusedRevision: r.RefusedRevision, RefusedWhy: r.Why})
	}
	return out
}

func (s *server) registerVersions(a huma.API) {
	handle(s, a, route{method: http.MethodPost, path: "/policy/preview", id: "preview-policy", summary: "Check a change of the policy and say what it would do"},
		func(ctx context.Context, in *struct{ Body PolicyPreviewRequest }) (*Out[PolicyPreview], error) {
			var p service.Preview
			var err error
			switch {
			case in.Body.Revision == nil:
				p, err = s.svc.PreviewPolicy(actorOf(ctx), in.Body.Sections)
			case len(in.Body.Sections) > 0:
				err = fault.Field("api", "revision", "and sections exclude each other: send one of them")
			default:
				p, err = s.svc.PreviewRollback(actorOf(ctx), *in.Body.Revision)
			}
			if err != nil {
				return nil, err
			}
			return out(previewOf(p), p.Revision), nil
		})
	handle(s, a, route{method: http.MethodPost, path: "/policy/rollback", id: "rollback-policy", summary: "Put the policy of a former revision again, as a new one"},
		func(ctx context.Context, in *struct {
			Precondition
			Body struct {
				Revision uint64 `json:"revision" doc:"0 is the shipped policy"`
			}
		}) (*Out[Policy], error) {
			expect, err := in.revision()
			if err != nil {
				return nil, err
			}
			v, err := s.svc.RollbackPolicy(ctx, actorOf(ctx), in.Body.Revision, expect, service.Change{Reason: in.Reason})
			if err != nil {
				return nil, err
			}
			return out(policyOf(v), v.Revision), nil
		})
	handle(s, a, route{method: http.MethodGet, path: "/policy/versions", id: "list-policy-versions", summary: "List former policies, newest first"},
		func(ctx context.Context, _ *struct{}) (*List[PolicyVersion], error) {
			rows, err := s.svc.PolicyVersions(actorOf(ctx))
			return list(rows, versionOf), err
		})
	handle(s, a, route{method: http.MethodGet, path: "/policy/status", id: "get-policy-status", summary: "Show which relays work with the policy in force"},
		func(ctx context.Context, _ *struct{}) (*Out[PolicyStatus], error) {
			st, err := s.svc.PolicyStatus(actorOf(ctx))
			if err != nil {
				return nil, err
			}
			return out(statusOf(st), st.Revision), nil
		})
}
