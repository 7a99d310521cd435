// Package api is the management API: HTTP and JSON in front of the use cases of
// control/service. It translates and nothing else: who asks is found from the
// API key, a revision from If-Match, an error becomes a problem document (RFC
// 9457) in one place, and the OpenAPI 3.1 description is made from the very
// types that are served.
package api

import (
	"context"
	"errors"
	"log/slog"
	"net/http"
	"strconv"
	"strings"
	"unicode/utf8"

	"github.com/danielgtaylor/huma/v2"
	"github.com/danielgtaylor/huma/v2/adapters/humachi"
	"github.com/go-chi/chi/v5"

	"github.com/relais-mta/relais/control"
	"github.com/relais-mta/relais/control/service"
	"github.com/relais-mta/relais/shared/fault"
)

// Prefix is the path below which the API lives.
const Prefix = "/api/v1"

// maxBodyBytes bounds a request's body: a policy of 256 KiB as JSON.
const maxBodyBytes = 1 << 20

// Options configure a handler.
type Options struct {
	Service *service.Service
	Logger  *slog.Logger
	// Local is who a request without an API key comes from. It is set for the
	// handler behind the admin socket, which only its owner can open.
	Local *service.Actor
	// Fence waits until this server has every change that was acknowledged
	// before, for readers who ask for that; nil: there is one server.
	Fence func(context.Context) error
}

// The library makes its own errors, such as a body that does not fit the
// schema, through this hook; they become the same documents as ours.
func init() { huma.NewError = libraryProblem }

type server struct {
	svc    *service.Service
	logger *slog.Logger
	local  *service.Actor
	fence  func(context.Context) error
}

// New returns the handler of the API.
func New(o Options) http.Handler {
	s := &server{svc: o.Service, logger: o.Logger, local: o.Local, fence: o.Fence}
	router := chi.NewRouter()
	config := huma.DefaultConfig("Relais control", o.Service.Info().Version)
	config.OpenAPIPath = Prefix + "/openapi"
	config.SchemasPath = Prefix + "/schemas"
	config.DocsPath = ""      // the usual page loads its script from a stranger
	config.CreateHooks = nil  // no $schema member in answers
	config.Transformers = nil // answers are what the types say
	config.Components.SecuritySchemes = map[string]*huma.SecurityScheme{
		"key": {Type: "http", Scheme: "bearer", Description: "An API key, such as init printed"},
	}
	a := humachi.New(router, config)
	a.UseMiddleware(s.authenticate(a), s.appliedIndex(a))
	s.registerOpen(a)
	s.registerTenants(a)
	s.registerSending(a)
	s.registerDNS(a)
	s.registerKeys(a)
	s.registerQuarantine(a)
	s.registerNodes(a)
	s.registerServers(a)
	s.registerCA(a)
	s.registerPolicy(a)
	s.registerRecovery(a)
	s.registerUpgrade(a)
	s.registerLimits(a)
	s.registerWarmUps(a)
	s.registerBrakes(a)
	return router
}

type actorKey struct{}

// authenticate finds who asks and refuses strangers, except where an operation
// is open to all.
func (s *server) authenticate(a huma.API) func(huma.Context, func(huma.Context)) {
	return func(ctx huma.Context, next func(huma.Context)) {
		if len(ctx.Operation().Security) == 0 {
			next(ctx)
			return
		}
		actor, err := s.actor(ctx.Header("Authorization"))
		if err != nil {
			p := problemOf(err)
			ctx.SetHeader("WWW-Authenticate", "Bearer") // RFC 9110 section 11.6.1
			ctx.SetHeader("Content-Type", "application/problem+json")
			ctx.SetStatus(p.Status)
			if err := a.Marshal(ctx.BodyWriter(), "application/json", p); err != nil {
				s.logger.Debug("the answer was not delivered", "error", err)
			}
			return
		}
		next(huma.WithValue(ctx, actorKey{}, actor))
	}
}

func (s *server) actor(header string) (service.Actor, error) {
	if header == "" && s.local != nil {
		return *s.local, nil
	}
	scheme, key, ok := strings.Cut(header, " ") // RFC 6750 section 2.1
	if !ok || !strings.EqualFold(scheme, "Bearer") {
		return service.Actor{}, fault.New(fault.Unauthenticated, "api", "an API key is needed: send it as `Authorization: Bearer rk1.…`")
	}
	return s.svc.Authenticate(strings.TrimSpace(key))
}

func actorOf(ctx context.Context) service.Actor {
	actor, _ := ctx.Value(actorKey{}).(service.Actor) // the zero actor may do nothing
	return actor
}

// Precondition is what a change may carry in its headers.
type Precondition struct {
	IfMatch string `header:"If-Match" doc:"Revision the change was made from; without it, whatever it is now"`
	Reason  string `header:"Relais-Reason" doc:"Why, for the audit tail"`
}

// Resolve implements huma.Resolver: a header may carry any bytes, an audit
// entry may not.
func (p *Precondition) Resolve(huma.Context) []error {
	if utf8.ValidString(p.Reason) {
		return nil
	}
	return []error{&huma.ErrorDetail{Location: "header.Relais-Reason", Message: "is not UTF-8 text"}}
}

// change reads the headers.
func (p Precondition) change() (service.Change, error) {
	c := service.Change{Reason: p.Reason}
	expect, err := p.revision()
	if err == nil && expect != nil {
		if c.Expect = *expect; c.Expect == 0 { // within, 0 stands for whatever it is now
			return c, fault.Field("api", "If-Match", "0 is no object's revision: send the one that was read, or nothing")
		}
	}
	return c, err
}

// revision reads If-Match (RFC 9110 section 13.1.1); nil means none or "*".
func (p Precondition) revision() (*uint64, error) {
	text := strings.Trim(p.IfMatch, `"`)
	if text == "" || text == "*" {
		return nil, nil
	}
	n, err := strconv.ParseUint(text, 10, 64)
	if err != nil {
		return nil, fault.Field("api", "If-Match", "%q is not a revision: send the number that was read, in quotes", p.IfMatch)
	}
	return &n, nil
}

// Out is an answer with its body and, for one object, its revision.
type Out[T any] struct {
	ETag string `header:"ETag" doc:"The object's revision"`
	Body T
}

func out[T any](body T, revision uint64) *Out[T] {
	return &Out[T]{Body: body, ETag: `"` + strconv.FormatUint(revision, 10) + `"`}
}

// List is an answer with several objects.
type List[T any] struct {
	Body ListBody[T]
}

// ListBody is the JSON of a list.
type ListBody[T any] struct {
	Items []T `json:"items"`
}

func list[R, T any](rows []R, convert func(R) T) *List[T] {
	l := &List[T]{Body: ListBody[T]{Items: make([]T, 0, len(rows))}}
	for _, r := range rows {
		l.Body.Items = append(l.Body.Items, convert(r))
	}
	return l
}

// route describes an operation.
type route struct {
	method, path, id, summary string
	status                    int
	open                      bool // no API key is needed
}

// handle registers an operation and turns its errors into problem documents.
func handle[I, O any](s *server, a huma.API, r route, fn func(context.Context, *I) (*O, error)) {
	op := huma.Operation{Method: r.method, Path: Prefix + r.path, OperationID: r.id, Summary: r.summary, DefaultStatus: r.status, MaxBodyBytes: maxBodyBytes}
	if !r.open {
		op.Security = []map[string][]string{{"key": {}}}
	}
	huma.Register(a, op, func(ctx context.Context, in *I) (*O, error) {
		o, err := fn(ctx, in)
		if err != nil {
			p := problemOf(err)
			level := slog.LevelInfo
			if p.Status >= http.StatusInternalServerError {
				level = slog.LevelError
			}
			s.logger.Log(ctx, level, "request refused", "operation", r.id, "actor", actorOf(ctx).Name, "status", p.Status, "error", err)
			return nil, p
		}
		return o, nil
	})
}

// Problem is a problem document (RFC 9457) with the kind of error and the field
// at fault as extension members.
type Problem struct {
	Type   string `json:"type"`
	Title  string `json:"title"`
	Status int    `json:"status"`
	Detail string `json:"detail"`
	Kind   string `json:"kind"`
	Field  string `json:"field,omitempty"`
	Retry  bool   `json:"retry,omitempty"` // nothing was changed because there is no leader here: ask again, or another server
}

// Error implements error.
func (p *Problem) Error() string { return p.Detail }

// GetStatus implements huma.StatusError.
func (p *Problem) GetStatus() int { return p.Status }

// ContentType implements huma.ContentTypeFilter.
func (p *Problem) ContentType(string) string { return "application/problem+json" }

var statuses = map[fault.Kind]int{
	fault.Invalid:         http.StatusUnprocessableEntity,
	fault.NotFound:        http.StatusNotFound,
	fault.Conflict:        http.StatusConflict,
	fault.Exists:          http.StatusConflict,
	fault.Unauthenticated: http.StatusUnauthorized,
	fault.Denied:          http.StatusForbidden,
	fault.Exhausted:       http.StatusTooManyRequests,
	fault.NoSpace:         http.StatusInsufficientStorage,
	fault.Unavailable:     http.StatusServiceUnavailable,
	fault.Timeout:         http.StatusGatewayTimeout,
	fault.TooLarge:        http.StatusRequestEntityTooLarge,
}

// libraryProblem words an error of the library: the first detail names the field.
func libraryProblem(status int, text string, errs ...error) huma.StatusError {
	p := &Problem{Type: "about:blank", Title: http.StatusText(status), Status: status, Detail: text, Kind: fault.Invalid.String()}
	var details []string
	for _, err := range errs {
		if err == nil {
			continue
		}
		var d huma.ErrorDetailer
		if !errors.As(err, &d) {
			details = append(details, err.Error())
			continue
		}
		detail := d.ErrorDetail()
		_, field, located := strings.Cut(detail.Location, ".") // the first word says in which part of the request
		if !located {
			field = detail.Location
		}
		if p.Field == "" {
			p.Field = field
		}
		details = append(details, strings.TrimPrefix(field+": ", ": ")+detail.Message)
	}
	if len(details) > 0 {
		p.Detail = strings.Join(details, "; ")
	}
	if status >= http.StatusInternalServerError {
		p.Kind, p.Detail = fault.Internal.String(), fault.Public(errors.New(text))
	}
	return p
}

// problemOf is the one place where errors become HTTP.
func problemOf(err error) *Problem {
	var p *Problem
	if errors.As(err, &p) {
		return p
	}
	kind := fault.KindOf(err)
	status, ok := statuses[kind]
	if !ok {
		status = http.StatusInternalServerError
	}
	p = &Problem{Type: "about:blank", Title: http.StatusText(status), Status: status, Detail: fault.Public(err), Kind: kind.String(), Retry: errors.Is(err, control.ErrNoLeader)}
	var f *fault.Error
	if errors.As(err, &f) {
		p.Field = f.Field
	}
	return p
}
