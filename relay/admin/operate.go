package admin

import (
	"context"
	"encoding/json"
	"errors"
	"io"
	"net"
	"net/http"
	"os/user"
	"strconv"
	"strings"
	"time"
	"unicode"

	"golang.org/x/sys/unix"

	"github.com/relais-mta/relais/relay/queue"
	"github.com/relais-mta/relais/shared/fault"
	"github.com/relais-mta/relais/shared/ids"
	"github.com/relais-mta/relais/shared/mailaddr"
	"github.com/relais-mta/relais/shared/policy"
)

// maxRequestBytes bounds the body of a request that is not an import.
const maxRequestBytes = 1 << 20

// Operation asks for an action on all mail that a filter selects.
type Operation struct {
	Action queue.Action `json:"action"` // retry, hold, release, purge or bounce
	Filter Filter       `json:"filter"`
	All    bool         `json:"all,omitempty"`    // everything, with an empty filter
	Reason string       `json:"reason,omitempty"` // words for people
	Resume string       `json:"resume,omitempty"` // from the last Progress of the one that is to go on
}

// Progress is one line of the answer to an Operation. Counts are recipients
// that are not final yet.
type Progress struct {
	Looked   int64  `json:"looked"`
	Matched  int64  `json:"matched"`
	Done     int64  `json:"done"`
	Skipped  int64  `json:"skipped"`   // left as they were: due already, in doubt, or held by a rule in force
	InFlight int64  `json:"in_flight"` // being tried, and left alone
	Total    int64  `json:"total"`     // an estimate of looked at the end
	Resume   string `json:"resume,omitempty"`
	Finished bool   `json:"finished"`
	Error    string `json:"error,omitempty"` // why it ended before its end; what was done stays done
}

// operate streams the progress of an operation, a JSON object a line. It stops
// behind the step in hand when the client goes away.
func (s *Server) operate(w http.ResponseWriter, r *http.Request) {
	op, err := s.operation(r)
	if err != nil {
		s.fail(w, r, err)
		return
	}
	out := newLines(w)
	last, err := s.cfg.Queue.Operate(r.Context(), op, func(p queue.Progress) { out.send(progressOf(p)) })
	if err != nil {
		p := progressOf(last)
		p.Error = fault.Public(err)
		out.send(p)
	}
	s.cfg.Logger.Info("an operation on the queue ended", "action", string(op.Action), "actor", op.Actor, "reason", op.Reason,
		"matched", last.Matched, "done", last.Done, "in_flight", last.InFlight, "finished", last.Finished, "error", err)
}

func progressOf(p queue.Progress) Progress {
	out := Progress{Looked: p.Looked, Matched: p.Matched, Done: p.Done, Skipped: p.Skipped, InFlight: p.InFlight, Total: p.Total, Finished: p.Finished}
	if !p.After.IsZero() {
		out.Resume = p.After.String()
	}
	return out
}

func (s *Server) operation(r *http.Request) (op queue.Operation, err error) {
	const name = "admin.operate"
	var in Operation
	if err := decode(r, &in); err != nil {
		return op, err
	}
	switch {
	case in.Filter.Empty() && !in.All:
		return op, fault.Field(name, "filter", "nothing says which mail is meant: name ids or a filter, or say all")
	case !in.Filter.Empty() && in.All:
		return op, fault.Field(name, "all", "all mail and only some of it were asked for: leave one away")
	}
	op = queue.Operation{Action: in.Action, Actor: actor(r.Context()), Reason: in.Reason}
	if op.Filter, err = in.Filter.parse(s.directory(), time.Now()); err != nil {
		return op, err
	}
	if in.Resume != "" {
		if op.Filter.After, err = ids.ParseMessage(in.Resume); err != nil {
			return op, fault.Field(name, "resume", "%s", fault.Public(err))
		}
	}
	if op.Action == queue.ActionBounce {
		op.End = s.cfg.Engine.Bounce(op.Actor, op.Reason)
	}
	return op, queue.CheckOperation(&op)
}

// directory is the view in force, for names; nil before the first.
func (s *Server) directory() *policy.Directory { return s.cfg.Engine.Directory() }

// decode reads a request's body, strictly.
func decode(r *http.Request, v any) error {
	d := json.NewDecoder(io.LimitReader(r.Body, maxRequestBytes))
	d.DisallowUnknownFields()
	if err := d.Decode(v); err != nil {
		return fault.Wrap(err, fault.Invalid, "admin.decode", "the request cannot be read: %s", err)
	}
	return nil
}

// lines writes JSON objects a line, each at once.
type lines struct {
	out *json.Encoder
	c   *http.ResponseController
}

func newLines(w http.ResponseWriter) *lines {
	w.Header().Set("Content-Type", "application/x-ndjson")
	w.WriteHeader(http.StatusOK)
	return &lines{out: json.NewEncoder(w), c: http.NewResponseController(w)}
}

// send writes one object. A client that is gone is found by the request's
// context.
func (l *lines) send(v any) {
	if l.out.Encode(v) == nil {
		_ = l.c.Flush()
	}
}

// Hold is a rule that holds mail.
type Hold struct {
	ID       string    `json:"id,omitempty"`
	Filter   Filter    `json:"filter"` // of mail, not of states or ages
	All      bool      `json:"all,omitempty"`
	Cause    string    `json:"cause"`
	Owner    string    `json:"owner,omitempty"`
	Actor    string    `json:"actor,omitempty"`
	Created  time.Time `json:"created,omitzero"`
	Until    time.Time `json:"until,omitzero"`
	Held     int64     `json:"held"`               // recipients
	Sweeping bool      `json:"sweeping,omitempty"` // what waited is still being held
	Ending   bool      `json:"ending,omitempty"`   // what it held is being released
}

// ownerOperator owns the rules that people make.
const ownerOperator = "operator"

func (s *Server) putHold(r *http.Request) (any, error) {
	const op = "admin.putHold"
	var in Hold
	if err := decode(r, &in); err != nil {
		return nil, err
	}
	if strings.ContainsFunc(in.Cause, unicode.IsControl) {
		return nil, fault.Field(op, "cause", "holds a line end or another control character: write it on one line")
	}
	match, err := in.Filter.rule(s.directory())
	if err != nil {
		return nil, err
	}
	id, err := s.cfg.Queue.PutHold(queue.HoldRule{Match: match, All: in.All, Cause: in.Cause, Owner: ownerOperator, Actor: actor(r.Context()), Until: in.Until})
	if err != nil {
		return nil, err
	}
	s.cfg.Logger.Info("a rule holds mail", "rule", id, "actor", actor(r.Context()), "cause", in.Cause)
	for _, h := range s.cfg.Queue.Holds() {
		if h.ID == id {
			return s.holdOf(&h), nil
		}
	}
	return nil, fault.New(fault.NotFound, op, "the rule %s ended at once", id)
}

func (s *Server) removeHold(r *http.Request) (any, error) {
	id, err := ids.ParseHold(r.PathValue("id"))
	if err != nil {
		return nil, err
	}
	var held int64
	for _, h := range s.cfg.Queue.Holds() {
		if h.ID == id {
			held = h.Held
		}
	}
	if err := s.cfg.Queue.RemoveHold(id, actor(r.Context())); err != nil {
		return nil, err
	}
	s.cfg.Logger.Info("a rule that held mail is gone", "rule", id, "actor", actor(r.Context()), "held", held)
	return Hold{ID: id.String(), Held: held, Ending: true}, nil
}

func (s *Server) holds(*http.Request) (any, error) {
	out := []Hold{}
	for _, h := range s.cfg.Queue.Holds() {
		out = append(out, s.holdOf(&h))
	}
	return out, nil
}

func (s *Server) holdOf(h *queue.HoldInfo) Hold {
	return Hold{
		ID: h.ID.String(), Filter: s.filterOf(&h.Match), All: h.All, Cause: h.Cause, Owner: h.Owner, Actor: h.Actor,
		Created: h.Created, Until: h.Until, Held: h.Held, Sweeping: h.Sweeping, Ending: h.Ending,
	}
}

// filterOf words what a rule matches.
func (s *Server) filterOf(m *queue.Match) Filter {
	f := Filter{Stream: m.Stream, FromDomain: string(m.From), Domain: string(m.Domain), Provider: m.Provider, Tag: m.Tag}
	if !m.Tenant.IsZero() {
		f.Tenant = s.tenantName(m.Tenant)
	}
	if !m.Pool.IsZero() {
		f.Pool = s.poolName(m.Pool)
	}
	if m.Source.IsValid() {
		f.Source = m.Source.String()
	}
	return f
}

func (s *Server) tenantName(id ids.Tenant) string {
	if dir := s.directory(); dir != nil {
		if t, ok := dir.Tenant(id); ok && t.Name != "" {
			return t.Name
		}
	}
	return id.String()
}

func (s *Server) poolName(id ids.Pool) string {
	if dir := s.directory(); dir != nil {
		if p, ok := dir.Pool(id); ok && p.Name != "" {
			return p.Name
		}
	}
	return id.String()
}

func (s *Server) providerOf(d mailaddr.Domain) string {
	if p := s.cfg.Engine.Provider(d); p != "" {
		return p
	}
	return queue.UnknownProvider
}

// actorKey is where a connection's context has who is at its other end.
type actorKey struct{}

// withActor notes whose process a connection comes from; the kernel says so.
func withActor(ctx context.Context, c net.Conn) context.Context {
	u, ok := c.(*net.UnixConn)
	if !ok {
		return ctx
	}
	raw, err := u.SyscallConn()
	if err != nil {
		return ctx
	}
	var cred *unix.Ucred
	var inner error
	err = raw.Control(func(fd uintptr) { cred, inner = unix.GetsockoptUcred(int(fd), unix.SOL_SOCKET, unix.SO_PEERCRED) })
	if errors.Join(err, inner) != nil {
		return ctx
	}
	uid := strconv.FormatUint(uint64(cred.Uid), 10)
	name := "uid " + uid
	if found, err := user.LookupId(uid); err == nil {
		name = found.Username
	}
	return context.WithValue(ctx, actorKey{}, "local:"+name)
}

// actor is who asked, as events say it.
func actor(ctx context.Context) string {
	if name, ok := ctx.Value(actorKey{}).(string); ok {
		return name
	}
	return "local"
}
