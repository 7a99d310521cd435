package api

import (
	"context"
	"net/http"
	"time"

	"github.com/danielgtaylor/huma/v2"

	"github.com/relais-mta/relais/control"
	"github.com/relais-mta/relais/control/service"
	"github.com/relais-mta/relais/shared/pki"
)

// CA is the cluster's certificate authority.
type CA struct {
	RootPin   string      `json:"root_pin" doc:"SHA-256 of the root's SubjectPublicKeyInfo, as in join tokens"`
	RootEnds  time.Time   `json:"root_ends"`
	Signs     string      `json:"signs" doc:"Key id of the issuing CA that signs"`
	Ends      time.Time   `json:"ends" doc:"End of the issuing CA that signs"`
	Believed  []string    `json:"believed" doc:"Key ids of all issuing CAs that are believed, the one that signs first"`
	Supported bool        `json:"supported" doc:"Every server can follow a change of the issuing key"`
	ChangesAt time.Time   `json:"changes_at" doc:"When the cluster changes the issuing key by itself"`
	Change    *CAChange   `json:"change,omitempty" doc:"The change that runs, or the last one"`
	Refused   []string    `json:"refused" doc:"Key ids of issuing CAs that were given up"`
	Revoked   []CARevoked `json:"revoked" doc:"Removed servers whose certificates relays refuse"`
}

// CAChange is a change of the issuing key.
type CAChange struct {
	Phase   string     `json:"phase" enum:"distribute,sign,return,done,rolled-back"`
	Running bool       `json:"running"`
	From    string     `json:"from" doc:"Key id of the old issuing CA"`
	To      string     `json:"to" doc:"Key id of the new issuing CA"`
	Started time.Time  `json:"started"`
	Since   time.Time  `json:"since" doc:"Of the phase"`
	Acked   int        `json:"acked" doc:"Members that have done what the phase asks"`
	Total   int        `json:"total" doc:"Members whose acknowledgement counts, and those that are skipped"`
	Waiting []CAMember `json:"waiting" doc:"Members that the phase waits for"`
	Skipped []CAMember `json:"skipped" doc:"Members that it does not wait for"`
}

// CAMember is a relay or server that holds a certificate.
type CAMember struct {
	ID        string     `json:"id"`
	Name      string     `json:"name"`
	Role      string     `json:"role" enum:"relay,control"`
	Connected bool       `json:"connected,omitempty" doc:"A relay: it is linked"`
	Heard     *time.Time `json:"heard,omitempty" doc:"A relay: last contact"`
	Why       string     `json:"why"`
}

// CARevoked is a removed server.
type CARevoked struct {
	Server  string    `json:"server"`
	Serials []string  `json:"serials"`
	Until   time.Time `json:"until" doc:"Its last certificate is over for good"`
}

func caOf(v service.CAView) CA {
	out := CA{RootPin: pki.PinOf(v.Root()).String(), RootEnds: v.Root().NotAfter.UTC(), Signs: pki.KeyID(v.Signer()), Ends: v.Signer().NotAfter.UTC(), Supported: v.Supported, ChangesAt: v.RotatesAt.UTC(), Refused: []string{}, Revoked: []CARevoked{}}
	for _, c := range v.Bundle[:len(v.Bundle)-1] {
		out.Believed = append(out.Believed, pki.KeyID(c))
	}
	for _, r := range v.Refused {
		out.Refused = append(out.Refused, r.KeyID)
	}
	for _, r := range v.Revoked {
		out.Revoked = append(out.Revoked, CARevoked{Server: r.Server.String(), Serials: append([]string{}, r.Serials...), Until: r.Until})
	}
	if v.Rotation != nil {
		out.Change = changeOf(v)
	}
	return out
}

func changeOf(v service.CAView) *CAChange {
	r := v.Rotation
	out := &CAChange{Phase: string(r.Phase), Running: r.Phase.Running(), From: r.Old.KeyID, To: r.New.KeyID, Started: r.StartedAt, Since: r.Since, Total: len(v.Members), Waiting: []CAMember{}, Skipped: []CAMember{}}
	for _, m := range v.Members {
		one := CAMember{ID: m.ID.String(), Name: m.Name, Role: string(control.NodeRelay), Connected: m.Connected, Heard: optionalTime(m.Heard.UTC()), Why: m.Why}
		if m.Server {
			one.Role = string(control.NodeControl)
		}
		switch {
		case m.Acked:
			out.Acked++
		case m.Skip != nil:
			one.Why = m.Skip.Actor + ": " + m.Skip.Reason
			out.Skipped = append(out.Skipped, one)
		default:
			out.Waiting = append(out.Waiting, one)
		}
	}
	return out
}

func (s *server) registerCA(a huma.API) {
	answer := func(v service.CAView, err error) (*Out[CA], error) {
		if err != nil {
			return nil, err
		}
		var revision uint64
		if v.Rotation != nil {
			revision = v.Rotation.Revision
		}
		return out(caOf(v), revision), nil
	}
	handle(s, a, route{method: http.MethodGet, path: "/ca", id: "get-ca", summary: "The cluster's CA, and where a change of its issuing key stands"},
		func(ctx context.Context, _ *struct{}) (*Out[CA], error) {
			return answer(s.svc.CA(ctx, actorOf(ctx)))
		})
	for _, change := range []struct {
		path, id, summary string
		do                func(context.Context, service.Actor, service.Change) (service.CAView, error)
	}{
		{"/ca/rotate", "rotate-ca", "Begin a change of the issuing key; it goes on by itself", s.svc.RotateCA},
		{"/ca/force", "force-ca", "Go on to the next phase without those that have not acknowledged", s.svc.ForceCA},
		{"/ca/rollback", "rollback-ca", "Go back to the old issuing key", s.svc.RollbackCA},
	} {
		handle(s, a, route{method: http.MethodPost, path: change.path, id: change.id, summary: change.summary},
			func(ctx context.Context, in *Precondition) (*Out[CA], error) {
				return answer(change.do(ctx, actorOf(ctx), service.Change{Reason: in.Reason}))
			})
	}
	handle(s, a, route{method: http.MethodPost, path: "/ca/skip", id: "skip-ca", summary: "Let the change go on without one member"},
		func(ctx context.Context, in *struct {
			Precondition
			Body struct {
				Node string `json:"node" doc:"Relay or server, id or name"`
			}
		}) (*Out[CA], error) {
			return answer(s.svc.SkipCA(ctx, actorOf(ctx), in.Body.Node, service.Change{Reason: in.Reason}))
		})
}
