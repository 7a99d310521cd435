package admin

import (
	"cmp"
	"net/http"
	"slices"
	"strings"
	"time"

	"github.com/relais-mta/relais/relay"
	"github.com/relais-mta/relais/relay/queue"
	"github.com/relais-mta/relais/shared/fault"
)

// Summary is the queue in numbers. Counts are recipients.
type Summary struct {
	Queues        int     `json:"queues"`
	Waiting       int64   `json:"waiting"`   // those being delivered included
	Held          int64   `json:"held"`      // by rules or by hand
	InFlight      int64   `json:"in_flight"` // being delivered
	Counted       bool    `json:"counted"`   // false: what was there at the start is still being counted
	OverdueSecond float64 `json:"oldest_past_deadline_seconds"`
	LastEvent     uint64  `json:"last_event"`
	Tenants       []Group `json:"tenants,omitempty"`
	Streams       []Group `json:"streams,omitempty"` // tenant/stream
	Providers     []Group `json:"providers,omitempty"`
	Holds         []Hold  `json:"holds,omitempty"`
}

// Group is what waits for one tenant, stream or provider.
type Group struct {
	Name     string    `json:"name"`
	Waiting  int64     `json:"waiting"`
	InFlight int64     `json:"in_flight"`
	DueSince time.Time `json:"due_since,omitzero"` // when what waits longest for its turn became due; zero: nothing is due
}

func (s *Server) summary(*http.Request) (any, error) {
	q := s.cfg.Queue.Summary()
	out := Summary{
		Queues: q.Queues, Waiting: q.Waiting, Held: q.Held, InFlight: q.InFlight, Counted: q.Counted,
		OverdueSecond: q.OldestOverdue.Seconds(), LastEvent: s.cfg.Outbox.Last(),
	}
	now := time.Now()
	tenants, streams, providers := groups{}, groups{}, groups{}
	s.cfg.Queue.Queues(func(info queue.QueueInfo) bool {
		tenant := s.tenantName(info.Key.Tenant)
		tenants.add(tenant, &info, now)
		streams.add(tenant+"/"+info.Key.Stream, &info, now)
		providers.add(s.providerOf(info.Key.Domain), &info, now)
		return true
	})
	out.Tenants, out.Streams, out.Providers = tenants.list(), streams.list(), providers.list()
	for _, h := range s.cfg.Queue.Holds() {
		out.Holds = append(out.Holds, s.holdOf(&h))
	}
	return out, nil
}

type groups map[string]*Group

func (g groups) add(name string, info *queue.QueueInfo, now time.Time) {
	if info.Waiting == 0 && info.InFlight == 0 {
		return
	}
	one := g[name]
	if one == nil {
		one = &Group{Name: name}
		g[name] = one
	}
	one.Waiting += info.Waiting
	one.InFlight += int64(info.InFlight)
	if !info.Next.IsZero() && !info.Next.After(now) && (one.DueSince.IsZero() || info.Next.Before(one.DueSince)) {
		one.DueSince = info.Next
	}
}

func (g groups) list() []Group {
	out := make([]Group, 0, len(g))
	for _, one := range g {
		out = append(out, *one)
	}
	slices.SortFunc(out, func(a, b Group) int {
		return cmp.Or(cmp.Compare(b.Waiting, a.Waiting), strings.Compare(a.Name, b.Name))
	})
	return out
}

// Survey is one line of the answer to a full summary: how far it is, and at the
// end what it found.
type Survey struct {
	Looked    int64   `json:"looked"`
	Total     int64   `json:"total"` // an estimate of looked at the end
	Finished  bool    `json:"finished"`
	States    []Share `json:"states,omitempty"` // waiting, in-doubt, held
	Tenants   []Share `json:"tenants,omitempty"`
	Streams   []Share `json:"streams,omitempty"` // tenant/stream
	Providers []Share `json:"providers,omitempty"`
	Error     string  `json:"error,omitempty"`
}

// Share is a part of the queue. Counts are recipients.
type Share struct {
	Name   string    `json:"name"`
	Count  int64     `json:"count"`
	Held   int64     `json:"held"`
	Oldest time.Time `json:"oldest"` // acceptance of the oldest message
}

type shares map[string]*Share

func (h shares) add(name string, env *relay.Envelope, held bool) {
	one := h[name]
	if one == nil {
		one = &Share{Name: name, Oldest: env.AcceptedAt}
		h[name] = one
	}
	one.Count++
	if held {
		one.Held++
	}
	if env.AcceptedAt.Before(one.Oldest) {
		one.Oldest = env.AcceptedAt
	}
}

func (h shares) list() []Share {
	out := make([]Share, 0, len(h))
	for _, one := range h {
		out = append(out, *one)
	}
	slices.SortFunc(out, func(a, b Share) int {
		return cmp.Or(cmp.Compare(b.Count, a.Count), strings.Compare(a.Name, b.Name))
	})
	return out
}

// survey reads the whole queue, or what a filter selects of it, and counts.
func (s *Server) survey(w http.ResponseWriter, r *http.Request) {
	text := filterFrom(r.URL.Query())
	f, err := text.parse(s.directory(), time.Now())
	if err != nil {
		s.fail(w, r, err)
		return
	}
	states, tenants, streams, providers := shares{}, shares{}, shares{}, shares{}
	out, last := newLines(w), Survey{}
	err = s.cfg.Queue.Visit(r.Context(), f, func(env *relay.Envelope, index uint16, st *relay.RecipientState) {
		held := st.State == relay.StateHeld
		name := st.State.String()
		if !held && st.InDoubt > 0 {
			name = "in-doubt"
		}
		states.add(name, env, held)
		tenant := s.tenantName(env.Tenant)
		tenants.add(tenant, env, held)
		streams.add(tenant+"/"+env.Stream, env, held)
		providers.add(s.providerFor(env, index, st), env, held)
	}, func(looked, total int64) {
		last.Looked, last.Total = looked, total
		out.send(last)
	})
	last.Finished = err == nil
	last.States, last.Tenants, last.Streams, last.Providers = states.list(), tenants.list(), streams.list(), providers.list()
	if err != nil {
		last.Error = fault.Public(err)
	}
	out.send(last)
}

// providerFor is the provider of a recipient by its domain, or of its last
// attempt if the domain was not looked up lately.
func (s *Server) providerFor(env *relay.Envelope, index uint16, st *relay.RecipientState) string {
	if p := s.cfg.Engine.Provider(env.Recipients[index].Address.Domain); p != "" {
		return p
	}
	if st.Provider != "" {
		return st.Provider
	}
	return queue.UnknownProvider
}
