// Package admin serves a relay's operators on a socket in the data directory:
// what is in the queue, why it waits, and what the lanes do. The socket's file
// mode is the access control, so it needs no password and works while control
// is away.
package admin

import (
	"encoding/json"
	"errors"
	"log/slog"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"time"

	"github.com/relais-mta/relais/relay"
	"github.com/relais-mta/relais/relay/engine"
	"github.com/relais-mta/relais/relay/outbox"
	"github.com/relais-mta/relais/relay/queue"
	"github.com/relais-mta/relais/relay/trace"
	"github.com/relais-mta/relais/shared/fault"
	"github.com/relais-mta/relais/shared/ids"
)

// SocketName is the socket's name in the data directory.
const SocketName = "admin.sock"

// Bounds of one answer.
const (
	DefaultListed  = 100 // messages, if a list is asked for without a limit
	maxListed      = 10_000
	maxEventBytes  = 1 << 20
	headerDeadline = 5 * time.Second
)

// Config is what the server shows.
type Config struct {
	Dir    string // data directory
	Queue  *queue.Queue
	Outbox *outbox.Outbox
	Engine *engine.Engine
	// Elsewhere explains mail that goes to another relay; nil: none does.
	Elsewhere func(env *relay.Envelope, st *relay.RecipientState, inFlight bool) (engine.Explanation, bool)
	Status    func() Status
	Trace     *trace.Hub // nil: dialogues are not shown
	Logger    *slog.Logger
}

// Status is the relay in a few words.
type Status struct {
	Node      string `json:"node"`
	Cluster   string `json:"cluster"`
	Version   string `json:"version"`
	Revision  uint64 `json:"revision"`
	Connected bool   `json:"connected"`
	Evicted   bool   `json:"evicted,omitempty"` // the cluster has put this relay out for good
	Problem   string `json:"problem,omitempty"` // what is wrong with the tie to control, one sentence
	PID       int    `json:"pid"`
}

// Server answers on the socket.
type Server struct {
	cfg      Config
	http     http.Server
	listener net.Listener
}

// Listen makes the socket, mode 0600, replacing one that a dead process left.
// The data directory's lock guarantees that no living process owns it.
func Listen(cfg Config) (*Server, error) {
	const op = "admin.Listen"
	path := filepath.Join(cfg.Dir, SocketName)
	if err := os.Remove(path); err != nil && !errors.Is(err, os.ErrNotExist) {
		return nil, fault.Wrap(err, fault.Internal, op, "the old socket %s cannot be removed", path)
	}
	l, err := net.Listen("unix", path)
	if err != nil {
		return nil, fault.Wrap(err, fault.Internal, op, "the socket %s cannot be made", path)
	}
	if err := os.Chmod(path, 0o600); err != nil {
		_ = l.Close()
		return nil, fault.Wrap(err, fault.Internal, op, "the socket %s cannot be protected", path)
	}
	s := &Server{cfg: cfg, listener: l}
	mux := http.NewServeMux()
	mux.HandleFunc("GET /v1/status", s.answer(func(*http.Request) (any, error) { return cfg.Status(), nil }))
	mux.HandleFunc("GET /v1/queue/summary", s.answer(s.summary))
	mux.HandleFunc("GET /v1/queue/survey", s.survey)
	mux.HandleFunc("GET /v1/queue/messages", s.answer(s.list))
	mux.HandleFunc("GET /v1/queue/messages/{id}", s.answer(s.show))
	mux.HandleFunc("POST /v1/queue/fsck", s.fsck)
	mux.HandleFunc("POST /v1/queue/import", s.answer(s.importQueue))
	mux.HandleFunc("POST /v1/queue/operations", s.operate)
	mux.HandleFunc("GET /v1/queue/holds", s.answer(s.holds))
	mux.HandleFunc("POST /v1/queue/holds", s.answer(s.putHold))
	mux.HandleFunc("DELETE /v1/queue/holds/{id}", s.answer(s.removeHold))
	mux.HandleFunc("GET /v1/lanes", s.answer(func(*http.Request) (any, error) { return cfg.Engine.Lanes(), nil }))
	mux.HandleFunc("GET /v1/trace", s.trace)
	mux.HandleFunc("GET /v1/events", s.answer(s.events))
	s.http = http.Server{Handler: mux, ReadHeaderTimeout: headerDeadline, ConnContext: withActor, ErrorLog: slog.NewLogLogger(cfg.Logger.Handler(), slog.LevelWarn)}
	return s, nil
}

// Serve answers until Close.
func (s *Server) Serve() error {
	if err := s.http.Serve(s.listener); !errors.Is(err, http.ErrServerClosed) {
		return err
	}
	return nil
}

// Close ends the server and removes the socket.
func (s *Server) Close() error { return s.http.Close() }

// Problem is an error as the socket answers it (RFC 9457).
type Problem struct {
	Type   string `json:"type"`
	Title  string `json:"title"`
	Status int    `json:"status"`
	Detail string `json:"detail"`
}

var statuses = map[fault.Kind]int{
	fault.Invalid: http.StatusUnprocessableEntity, fault.NotFound: http.StatusNotFound,
	fault.Conflict: http.StatusConflict, fault.Unavailable: http.StatusServiceUnavailable,
}

func (s *Server) answer(f func(*http.Request) (any, error)) http.HandlerFunc {
	return func(w http.ResponseWriter, r *http.Request) {
		v, err := f(r)
		if err != nil {
			s.fail(w, r, err)
			return
		}
		s.write(w, http.StatusOK, "application/json", v)
	}
}

func (s *Server) fail(w http.ResponseWriter, r *http.Request, err error) {
	kind := fault.KindOf(err)
	status := statuses[kind]
	if status == 0 {
		status = http.StatusInternalServerError
		s.cfg.Logger.Error("admin request failed", "path", r.URL.Path, "error", err)
	}
	s.write(w, status, "application/problem+json", Problem{Type: "about:blank", Title: kind.String(), Status: status, Detail: fault.Public(err)})
}

func (s *Server) write(w http.ResponseWriter, status int, kind string, v any) {
	w.Header().Set("Content-Type", kind)
	w.WriteHeader(status)
	if err := json.NewEncoder(w).Encode(v); err != nil {
		s.cfg.Logger.Debug("admin answer not written", "error", err)
	}
}

// Recipient is one recipient for people.
type Recipient struct {
	ID        string              `json:"id"`
	Address   string              `json:"address"`
	State     string              `json:"state"`
	Attempts  uint32              `json:"attempts"`
	Next      time.Time           `json:"next,omitzero"`
	LastTry   time.Time           `json:"last_attempt,omitzero"`
	LastReply string              `json:"last_reply,omitempty"`
	LastClass string              `json:"last_class,omitempty"`
	LastMX    string              `json:"last_mx,omitempty"`
	InDoubt   uint8               `json:"in_doubt,omitempty"`
	InFlight  bool                `json:"in_flight,omitempty"` // being tried at the moment
	Provider  string              `json:"provider,omitempty"`
	Source    string              `json:"source,omitempty"` // of the last attempt
	Held      *Holder             `json:"held,omitempty"`
	Why       *engine.Explanation `json:"why,omitempty"`
}

// Holder is who holds a recipient and why.
type Holder struct {
	Rule  string    `json:"rule,omitempty"` // absent: held by hand
	By    string    `json:"by"`
	Why   string    `json:"why,omitempty"`
	Since time.Time `json:"since"`
}

// Message is one message for people.
type Message struct {
	ID         string      `json:"id"`
	Tenant     string      `json:"tenant"`
	TenantName string      `json:"tenant_name"` // its id, if the relay does not know it
	Stream     string      `json:"stream"`
	Tag        string      `json:"tag,omitempty"`
	Priority   int         `json:"priority"`
	Pool       string      `json:"pool"`
	PoolName   string      `json:"pool_name"`
	Sender     string      `json:"sender"`
	Bytes      int64       `json:"bytes"`
	Accepted   time.Time   `json:"accepted"`
	Expires    time.Time   `json:"expires"`
	Recipients []Recipient `json:"recipients"`
}

func (s *Server) message(m *queue.MessageInfo, why bool) Message {
	env := m.Env
	out := Message{
		ID: env.ID.String(), Tenant: env.Tenant.String(), TenantName: s.tenantName(env.Tenant), Stream: env.Stream, Tag: env.Tag,
		Priority: env.Priority.Number(), Pool: env.Pool.String(), PoolName: s.poolName(env.Pool), Sender: env.Sender.String(),
		Bytes: env.Body.Length, Accepted: env.AcceptedAt, Expires: env.ExpiresAt,
	}
	for i := range env.Recipients {
		st := m.States[i]
		r := Recipient{
			ID: ids.Recipient{Message: env.ID, Index: uint16(i)}.String(), Address: env.Recipients[i].Address.String(),
			State: st.State.String(), Attempts: st.Attempts, Next: st.Next, LastTry: st.LastAttempt,
			LastReply: st.LastReply.String(), LastClass: st.LastClass, LastMX: st.LastMX, InDoubt: st.InDoubt,
		}
		s.attribute(&r, env, uint16(i), &st)
		r.InFlight = slices.Contains(m.InFlight, uint16(i))
		switch {
		case !why || st.State.Final():
		case m.Damaged != "":
			r.Why = &engine.Explanation{Reason: "damaged", Text: m.Damaged}
		default:
			explain := s.cfg.Engine.Explain
			if r.InFlight {
				explain = s.cfg.Engine.ExplainInFlight
			}
			x := explain(env, i, st)
			if s.cfg.Elsewhere != nil {
				if moving, ok := s.cfg.Elsewhere(env, &st, r.InFlight); ok {
					x = moving
				}
			}
			r.Why = &x
		}
		out.Recipients = append(out.Recipients, r)
	}
	return out
}

// attribute says who has to do with a recipient.
func (s *Server) attribute(r *Recipient, env *relay.Envelope, index uint16, st *relay.RecipientState) {
	if p := s.providerFor(env, index, st); p != queue.UnknownProvider {
		r.Provider = p
	}
	if st.Source.IsValid() {
		r.Source = st.Source.String()
	}
	if h := st.Held; h != nil {
		r.Held = &Holder{By: h.By, Why: h.Why, Since: h.Since}
		if !h.Rule.IsZero() {
			r.Held.Rule = h.Rule.String()
		}
	}
}

func (s *Server) show(r *http.Request) (any, error) {
	const op = "admin.show"
	chosen, err := parseIDs([]string{r.PathValue("id")})
	if err != nil {
		return nil, err
	}
	id, index := chosen[0].Message, chosen[0].Index
	m, err := s.cfg.Queue.Show(id)
	if fault.Is(err, fault.NotFound) {
		return nil, fault.New(fault.NotFound, op, "message %s is not in the queue: it was delivered or given up, or another relay has it; `relais-relay events` tells what happened here", id)
	}
	if err != nil {
		return nil, err
	}
	out := s.message(m, true)
	if index == queue.AllRecipients {
		return out, nil
	}
	if index >= len(out.Recipients) {
		return nil, fault.New(fault.NotFound, op, "message %s has %d recipients, counted from 0", id, len(out.Recipients))
	}
	out.Recipients = out.Recipients[index : index+1]
	return out, nil
}

func (s *Server) list(r *http.Request) (any, error) {
	const op = "admin.list"
	v := r.URL.Query()
	text := filterFrom(v)
	f, err := text.parse(s.directory(), time.Now())
	if err != nil {
		return nil, err
	}
	limit := DefaultListed
	if t := v.Get("after"); t != "" {
		if f.After, err = ids.ParseMessage(t); err != nil {
			return nil, err
		}
	}
	if t := v.Get("limit"); t != "" {
		if limit, err = strconv.Atoi(t); err != nil || limit < 1 || limit > maxListed {
			return nil, fault.Field(op, "limit", "%q is not a number from 1 to %d", t, maxListed)
		}
	}
	out := make([]Message, 0, min(limit, DefaultListed))
	for len(out) < limit && r.Context().Err() == nil {
		found, next, err := s.cfg.Queue.List(f, limit-len(out))
		if err != nil {
			return nil, err
		}
		for i := range found {
			out = append(out, s.message(&found[i], false))
		}
		if next.IsZero() {
			break
		}
		f.After = next
	}
	return out, nil
}

// idText is an id, if there is one.
func idText[K ids.Kind](id ids.ID[K]) string {
	if id.IsZero() {
		return ""
	}
	return id.String()
}

// Event is one line of the outbox for people.
type Event struct {
	Seq       uint64    `json:"seq"`
	Type      string    `json:"type"`
	At        time.Time `json:"at"`
	Message   string    `json:"message"`
	Recipient uint16    `json:"recipient"`
	Address   string    `json:"address"`
	Tag       string    `json:"tag,omitempty"`
	Actor     string    `json:"actor,omitempty"`
	Domain    string    `json:"domain,omitempty"` // sending domain, of an event about one
	Source    string    `json:"source,omitempty"`
	Provider  string    `json:"provider,omitempty"`
	MX        string    `json:"mx,omitempty"`
	Phase     string    `json:"phase,omitempty"`
	Class     string    `json:"class,omitempty"`
	Reply     string    `json:"reply,omitempty"`
	Attempts  uint32    `json:"attempts,omitempty"` // of locked and unlocked: logins that failed or were refused

	Credential string    `json:"credential,omitempty"` // of locked and unlocked: whose logins
	Client     string    `json:"client,omitempty"`     // of locked and unlocked: who failed last
	Until      time.Time `json:"until,omitzero"`       // of locked, of reflexes and brakes

	Pool        string `json:"pool,omitempty"`   // of reflexes and brakes
	Tenant      string `json:"tenant,omitempty"` // of brakes
	Brake       string `json:"brake,omitempty"`
	PerHour     int64  `json:"per_hour,omitempty"` // of reflexes: messages that may be sent
	Connections int    `json:"connections,omitempty"`
}

func (s *Server) events(r *http.Request) (any, error) {
	after, err := strconv.ParseUint("0"+r.URL.Query().Get("after"), 10, 64)
	if err != nil {
		return nil, fault.Field("admin.events", "after", "%q is not a sequence number", r.URL.Query().Get("after"))
	}
	events, err := s.cfg.Outbox.Read(after, maxEventBytes)
	if err != nil {
		return nil, err
	}
	out := make([]Event, 0, len(events))
	for i := range events {
		ev := &events[i]
		e := Event{
			Seq: ev.Seq, Type: ev.Type.String(), At: ev.At, Message: ev.Message.String(), Recipient: ev.Index, Address: ev.Address, Tag: ev.Tag, Actor: ev.Actor, Domain: ev.Domain,
			Provider: ev.Provider, MX: ev.MX, Phase: ev.Phase.String(), Class: ev.Class, Reply: ev.Reply.String(), Attempts: ev.Attempts,
		}
		if ev.SourceIP.IsValid() {
			e.Source = ev.SourceIP.String()
		}
		if ev.Type == outbox.Locked || ev.Type == outbox.Unlocked {
			e.Client, e.Until = ev.RemoteIP.String(), ev.Next
			if !ev.Credential.IsZero() {
				e.Credential = ev.Credential.String()
			}
		}
		if ev.Type >= outbox.Slowed && ev.Type <= outbox.Unbraked {
			e.Until, e.PerHour, e.Connections = ev.Next, ev.PerHour, ev.Conns
			e.Pool, e.Tenant, e.Brake = idText(ev.Pool), idText(ev.Tenant), idText(ev.Brake)
			if e.Source == "" {
				e.Source = idText(ev.Source)
			}
		}
		out = append(out, e)
	}
	return out, nil
}
