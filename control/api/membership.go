package api

import (
	"context"
	"net/http"

	"github.com/danielgtaylor/huma/v2"
)

// registerApproval adds what decides about machines that wait to be accepted.
func (s *server) registerApproval(a huma.API) {
	handle(s, a, route{method: http.MethodPost, path: "/nodes/{node}/approve", id: "approve-node", summary: "Accept a relay that joined with a token that needs approval"},
		func(ctx context.Context, in *struct {
			Precondition
			Node string `path:"node" doc:"Id or name"`
		}) (*Out[Node], error) {
			c, err := in.change()
			if err != nil {
				return nil, err
			}
			row, err := s.svc.ApproveNode(ctx, actorOf(ctx), in.Node, c)
			if err != nil {
				return nil, err
			}
			v, err := s.svc.Node(actorOf(ctx), row.ID.String())
			return out(nodeOf(v), v.Revision), err
		})
}
