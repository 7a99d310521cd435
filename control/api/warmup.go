package api

import (
	"context"
	"net/http"

	"github.com/danielgtaylor/huma/v2"

	"github.com/relais-mta/relais/control"
	"github.com/relais-mta/relais/control/service"
)

// WarmUp is an address, a pool or a sending domain that warms up.
type WarmUp struct {
	Kind     string        `json:"kind" enum:"source,pool,domain"`
	Name     string        `json:"name" doc:"The address, or the name of the pool or domain"`
	Plan     string        `json:"plan"`
	StartDay string        `json:"start_day"`
	Today    string        `json:"today" doc:"The day that began last, UTC"`
	Hold     string        `json:"hold,omitempty" doc:"Why it stays at its stages"`
	Proven   []WarmProof   `json:"proven,omitempty"`
	Classes  []WarmUpClass `json:"classes"`
	Revision uint64        `json:"revision"`
}

// WarmUpClass is where it stands with a class of providers. Counts are of recipients.
type WarmUpClass struct {
	Class       string      `json:"class"`
	Stage       int         `json:"stage"`
	LastStage   int         `json:"last_stage,omitempty" doc:"The first that allows the target; missing if the plan is gone from the policy"`
	Quota       uint64      `json:"quota" doc:"Of today"`
	Reserved    uint64      `json:"reserved" doc:"By relays, of today"`
	Used        uint64      `json:"used" doc:"Of today, as far as relays have told; they do every 10 s"`
	Yesterday   uint64      `json:"used_yesterday"`
	Answers     WarmAnswers `json:"answers" doc:"What providers answered today, as far as relays have told"`
	Before      WarmAnswers `json:"answers_yesterday"`
	PausedUntil string      `json:"paused_until,omitempty"`
	Why         string      `json:"why,omitempty" doc:"Of the last judgement"`
}

// WarmAnswers is what providers answered, in recipients of attempts: one who is
// deferred and tried again counts at each attempt.
type WarmAnswers struct {
	Attempts   int64 `json:"attempts" doc:"That were answered"`
	Accepted   int64 `json:"accepted"`
	Deferred   int64 `json:"deferred"`
	Blocked    int64 `json:"blocked" doc:"Refused for good because of who sends, or of the content"`
	Hard       int64 `json:"hard" doc:"Refused for good because there is no such recipient"`
	Signatures int64 `json:"signatures" doc:"Attempts, deferred or refused, whose reply says that the address is blocked"`
}

// WarmProof is a volume that was shown to be welcome.
type WarmProof struct {
	Class    string `json:"class"`
	Volume   uint32 `json:"volume" doc:"Recipients a day"`
	Evidence string `json:"evidence"`
}

func warmUpOf(v service.WarmUpView) WarmUp {
	out := WarmUp{Kind: string(v.Kind), Name: v.Name, Plan: v.Plan, StartDay: v.StartDay.String(), Today: v.Today.String(), Hold: v.Hold, Classes: []WarmUpClass{}, Revision: v.Revision}
	for _, p := range v.Proofs {
		out.Proven = append(out.Proven, WarmProof{Class: p.Class, Volume: p.Volume, Evidence: p.Evidence})
	}
	for _, c := range v.Classes {
		class := WarmUpClass{Class: c.Class, Stage: c.Stage, LastStage: c.LastStage, Quota: c.Quota, Reserved: c.Reserved, Used: c.Used, Yesterday: c.Yesterday, Why: c.Why,
			Answers: WarmAnswers(c.Answers), Before: WarmAnswers(c.Before)}
		if c.Paused != 0 {
			class.PausedUntil = c.Paused.String()
		}
		out.Classes = append(out.Classes, class)
	}
	return out
}

// WarmUpPath names a warm-up in a path.
type WarmUpPath struct {
	Kind string `path:"kind" enum:"source,pool,domain"`
	Name string `path:"name" doc:"The address, or the name of the pool or domain"`
}

func warmOut(v service.WarmUpView, err error) (*Out[WarmUp], error) {
	if err != nil {
		return nil, err
	}
	return out(warmUpOf(v), v.Revision), nil
}

func (s *server) registerWarmUps(a huma.API) {
	handle(s, a, route{method: http.MethodGet, path: "/warmups", id: "list-warmups", summary: "List what warms up"},
		func(ctx context.Context, _ *struct{}) (*List[WarmUp], error) {
			all, err := s.svc.WarmUps(actorOf(ctx))
			if err != nil {
				return nil, err
			}
			return list(all, warmUpOf), nil
		})
	handle(s, a, route{method: http.MethodGet, path: "/warmups/{kind}/{name}", id: "show-warmup", summary: "Show where a warm-up stands"},
		func(ctx context.Context, in *WarmUpPath) (*Out[WarmUp], error) {
			return warmOut(s.svc.WarmUp(actorOf(ctx), control.WarmKind(in.Kind), in.Name))
		})
	handle(s, a, route{method: http.MethodPost, path: "/warmups/{kind}/{name}", id: "start-warmup", summary: "Put an address, pool or sending domain under a plan"},
		func(ctx context.Context, in *struct {
			Precondition
			WarmUpPath
			Body struct {
				Plan   string      `json:"plan"`
				Proven []WarmProof `json:"proven,omitempty" doc:"What it has shown already: it enters at the stages that allow that"`
			}
		}) (*Out[WarmUp], error) {
			c, err := in.change()
			if err != nil {
				return nil, err
			}
			var proofs []control.WarmProof
			for _, p := range in.Body.Proven {
				proofs = append(proofs, control.WarmProof{Class: p.Class, Volume: p.Volume, Evidence: p.Evidence})
			}
			return warmOut(s.svc.StartWarmUp(ctx, actorOf(ctx), control.WarmKind(in.Kind), in.Name, in.Body.Plan, proofs, c))
		})
	for _, resume := range []bool{false, true} {
		word, summary := "hold", "Keep a warm-up at its stages"
		if resume {
			word, summary = "resume", "Let a warm-up go on that was held"
		}
		handle(s, a, route{method: http.MethodPost, path: "/warmups/{kind}/{name}/" + word, id: word + "-warmup", summary: summary},
			func(ctx context.Context, in *struct {
				Precondition
				WarmUpPath
			}) (*Out[WarmUp], error) {
				c, err := in.change()
				if err != nil {
					return nil, err
				}
				return warmOut(s.svc.HoldWarmUp(ctx, actorOf(ctx), control.WarmKind(in.Kind), in.Name, resume, c))
			})
	}
	s.registerWarmEnds(a)
}

func (s *server) registerWarmEnds(a huma.API) {
	handle(s, a, route{method: http.MethodPost, path: "/warmups/{kind}/{name}/step-back", id: "step-warmup-back", summary: "Put a warm-up back by some stages"},
		func(ctx context.Context, in *struct {
			Precondition
			WarmUpPath
			Body struct {
				Stages int    `json:"stages" minimum:"1" maximum:"100"`
				Class  string `json:"class,omitempty" doc:"Of this class alone"`
			}
		}) (*Out[WarmUp], error) {
			c, err := in.change()
			if err != nil {
				return nil, err
			}
			return warmOut(s.svc.StepBackWarmUp(ctx, actorOf(ctx), control.WarmKind(in.Kind), in.Name, in.Body.Stages, in.Body.Class, c))
		})
	handle(s, a, route{method: http.MethodPost, path: "/warmups/{kind}/{name}/stop", id: "stop-warmup", summary: "End a warm-up: nothing limits it any more"},
		func(ctx context.Context, in *struct {
			Precondition
			WarmUpPath
		}) (*struct{ Body struct{} }, error) {
			c, err := in.change()
			if err != nil {
				return nil, err
			}
			return &struct{ Body struct{} }{}, s.svc.StopWarmUp(ctx, actorOf(ctx), control.WarmKind(in.Kind), in.Name, c)
		})
	handle(s, a, route{method: http.MethodPost, path: "/warmup-day", id: "roll-warmup-day", summary: "Begin today, although more than a day has passed since the last day began"},
		func(ctx context.Context, in *struct{ Precondition }) (*struct{ Body WarmDay }, error) {
			c, err := in.change()
			if err != nil {
				return nil, err
			}
			day, err := s.svc.RollWarmDay(ctx, actorOf(ctx), c)
			return &struct{ Body WarmDay }{WarmDay{Today: day.String()}}, err
		})
}

// WarmDay is the day that began last.
type WarmDay struct {
	Today string `json:"today"`
}
