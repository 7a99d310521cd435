package api

import (
	"context"
	"io"
	"net/http"
	"strconv"
	"time"

	"github.com/danielgtaylor/huma/v2"

	"github.com/relais-mta/relais/control"
	"github.com/relais-mta/relais/control/service"
)

// Recovery is where recovery mode stands.
type Recovery struct {
	Active     bool       `json:"active"`
	Generation uint64     `json:"generation,omitempty"`
	Cause      string     `json:"cause,omitempty" doc:"restore or recover"`
	Since      *time.Time `json:"since,omitempty"`
	Heard      []string   `json:"heard" doc:"Relays that said since then what they hold, by name"`
	Missing    []string   `json:"missing" doc:"Active relays that did not, or not all of it, by name"`
}

func recoveryOf(v service.RecoveryView) Recovery {
	out := Recovery{Heard: []string{}, Missing: []string{}}
	if v.Recovery == nil {
		return out
	}
	out.Active, out.Generation, out.Cause, out.Since = true, v.Recovery.Generation, string(v.Recovery.Cause), &v.Recovery.Since
	add := func(to *[]string, nodes []*control.Node) {
		for _, n := range nodes {
			*to = append(*to, n.Name)
		}
	}
	add(&out.Heard, v.Heard)
	add(&out.Missing, v.Missing)
	return out
}

// ManifestHeader carries the index of a backup that is being sent.
const ManifestHeader = "Relais-Backup-Index"

func (s *server) registerRecovery(a huma.API) {
	handle(s, a, route{method: http.MethodGet, path: "/backup", id: "take-backup", summary: "Take a verified, encrypted backup"},
		func(ctx context.Context, _ *struct{}) (*huma.StreamResponse, error) {
			r, m, err := s.svc.Backup(ctx, actorOf(ctx))
			if err != nil {
				return nil, err
			}
			return &huma.StreamResponse{Body: func(hc huma.Context) {
				defer r.Close()
				hc.SetHeader("Content-Type", "application/octet-stream")
				hc.SetHeader(ManifestHeader, strconv.FormatUint(m.Index, 10))
				if _, err := io.Copy(hc.BodyWriter(), r); err != nil {
					s.logger.Warn("the backup was not delivered", "error", err) // its end is missing, which the client sees
				}
			}}, nil
		})
	handle(s, a, route{method: http.MethodGet, path: "/recovery", id: "get-recovery", summary: "Where recovery mode stands"},
		func(ctx context.Context, _ *struct{}) (*Out[Recovery], error) {
			v, err := s.svc.Recovery(actorOf(ctx))
			return &Out[Recovery]{Body: recoveryOf(v)}, err
		})
	handle(s, a, route{method: http.MethodPost, path: "/recovery/end", id: "end-recovery", summary: "End recovery mode"},
		func(ctx context.Context, in *struct {
			Precondition
			Body struct {
				Waive []string `json:"waive,omitempty" doc:"Relays, id or name, that are given up though they were not heard"`
			}
		}) (*Out[Recovery], error) {
			if err := s.svc.EndRecovery(ctx, actorOf(ctx), in.Body.Waive, service.Change{Reason: in.Reason}); err != nil {
				return nil, err
			}
			v, err := s.svc.Recovery(actorOf(ctx))
			return &Out[Recovery]{Body: recoveryOf(v)}, err
		})
}
