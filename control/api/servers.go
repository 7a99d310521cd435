package api

import (
	"context"
	"net/http"
	"strconv"

	"github.com/danielgtaylor/huma/v2"

	"github.com/relais-mta/relais/control"
	"github.com/relais-mta/relais/control/service"
)

// Server is a control server.
type Server struct {
	ID          string `json:"id"`
	Name        string `json:"name"`
	State       string `json:"state" enum:"pending,active,draining,drained,evicted" doc:"pending: it has joined and not been heard; evicted: it was removed"`
	Role        string `json:"role" enum:"leader,voter,follower,none" doc:"A follower has no vote: it waits until the number of voters can be odd"`
	Alive       bool   `json:"alive" doc:"It answered the leader within the last seconds"`
	Lag         uint64 `json:"lag" doc:"Log entries that it has not applied"`
	Version     string `json:"version"`
	Commands    uint16 `json:"commands" doc:"Newest version of the commands that it knows"`
	RaftAddress string `json:"raft_address"`
	LinkAddress string `json:"link_address"`
	HTTPAddress string `json:"http_address"`
	Revision    uint64 `json:"revision"`
	Problem     string `json:"problem,omitempty" doc:"What is wrong with it, and what helps"`
}

func serverOf(v service.ServerView) Server {
	out := Server{ID: v.ID.String(), Name: v.Name, State: string(v.State), Role: "none", Version: v.Version, Commands: v.MaxFSMVersion, RaftAddress: v.RaftAddress, LinkAddress: v.LinkAddress, HTTPAddress: v.HTTPAddress, Revision: v.Revision}
	if m := v.Member; m != nil {
		out.Alive, out.Lag = m.Alive, m.Lag
		switch {
		case m.Leader:
			out.Role = "leader"
		case m.Voter:
			out.Role = "voter"
		default:
			out.Role = "follower"
		}
		out.Problem = problemOfServer(v)
	}
	return out
}

// problemOfServer says in a sentence what is wrong with a member and what helps.
func problemOfServer(v service.ServerView) string {
	switch m := v.Member; {
	case v.State == control.NodeEvicted:
		return "it was removed and still counts: it leaves once it has heard of it, or once enough of the others answer"
	case !m.Alive:
		return "it does not answer the leader: start it, or see its log; if its disk is lost, empty its data directory and let it join again at its address, or remove it"
	default:
		return m.Problem
	}
}

func (s *server) registerServers(a huma.API) {
	handle(s, a, route{method: http.MethodGet, path: "/servers", id: "list-servers", summary: "List control servers"},
		func(ctx context.Context, in *struct {
			Removed bool `query:"removed" doc:"Also those that were removed"`
		}) (*List[Server], error) {
			rows, err := s.svc.Servers(ctx, actorOf(ctx), in.Removed)
			return list(rows, serverOf), err
		})
	handle(s, a, route{method: http.MethodPost, path: "/servers/{server}/remove", id: "remove-server", summary: "Take a control server out of the cluster for good"},
		func(ctx context.Context, in *struct {
			Precondition
			Server string `path:"server" doc:"Id or name"`
		}) (*Out[Server], error) {
			c, err := in.change()
			if err != nil {
				return nil, err
			}
			row, err := s.svc.RemoveServer(ctx, actorOf(ctx), in.Server, c)
			if err != nil {
				return nil, err
			}
			return out(serverOf(service.ServerView{Server: *row}), row.Revision), nil
		})
}

// appliedIndex says in every answer how new the state is that it was made from,
// and lets a reader ask for one that misses nothing: `Relais-Read: fenced` waits
// until this server has every change that was acknowledged before.
func (s *server) appliedIndex(a huma.API) func(huma.Context, func(huma.Context)) {
	return func(ctx huma.Context, next func(huma.Context)) {
		if ctx.Header("Relais-Read") == "fenced" && s.fence != nil {
			if err := s.fence(ctx.Context()); err != nil {
				s.refuse(a, ctx, problemOf(err))
				return
			}
		}
		ctx.SetHeader("Relais-Applied-Index", strconv.FormatUint(s.svc.Info().Index, 10))
		next(ctx)
	}
}

// refuse answers with a problem document before an operation has begun.
func (s *server) refuse(a huma.API, ctx huma.Context, p *Problem) {
	ctx.SetHeader("Content-Type", "application/problem+json")
	ctx.SetStatus(p.Status)
	if err := a.Marshal(ctx.BodyWriter(), "application/json", p); err != nil {
		s.logger.Debug("the answer was not delivered", "error", err)
	}
}
