// Package trace lets an operator watch SMTP dialogues while they happen. The code
// that speaks SMTP hands every line to its Session, which drops it unless
// somebody watches: that costs one atomic load. Secrets are taken out here, before
// a line reaches any watcher, so that no watcher can forget to.
//
// A watcher that reads too slowly loses lines, and is told how many; a dialogue
// never waits for one.
package trace

import (
	"fmt"
	"net/netip"
	"sync"
	"sync/atomic"
	"time"

	"github.com/relais-mta/relais/shared/fault"
	"github.com/relais-mta/relais/shared/ids"
	"github.com/relais-mta/relais/shared/mailaddr"
)

// Bounds of what is kept for watchers.
const (
	maxWatchers      = 8
	maxBufferedLines = 4096
	maxBufferedBytes = 1 << 20 // of texts
	maxTextBytes     = 1000    // of one line; the rest is cut off
)

// Kind says whose dialogue it is.
type Kind string

// The kinds.
const (
	Out        Kind = "out"        // the relay delivers
	Submission Kind = "submission" // a client submits
	Inbound    Kind = "inbound"    // another server brings mail to a return path
)

// The sides of a line.
const (
	Sent     = ">" // the relay said it
	Received = "<"
	Note     = "*" // what happened to the connection
)

// Party is who talks with the relay.
type Party struct {
	Kind     Kind
	Provider string     // Out: of the mail
	MX       string     // Out: the host
	Remote   netip.Addr // the other end
	Local    netip.Addr // Out: the source address
}

// Subject is what a dialogue is about at a time.
type Subject struct {
	Message ids.Message
	Tenant  ids.Tenant
	Domain  mailaddr.Domain // of recipients
}

// Line is one line of a dialogue as watchers get it.
type Line struct {
	At       time.Time `json:"at"`
	Session  uint64    `json:"session"` // unique while the relay runs
	Kind     Kind      `json:"kind"`
	Side     string    `json:"side"`
	Text     string    `json:"text"`
	Header   bool      `json:"header,omitempty"` // a line of the message's header section
	Provider string    `json:"provider,omitempty"`
	MX       string    `json:"mx,omitempty"`
	Remote   string    `json:"remote,omitempty"`
	Source   string    `json:"source,omitempty"`
	Domain   string    `json:"domain,omitempty"`
	Message  string    `json:"message,omitempty"`
	Tenant   string    `json:"tenant,omitempty"`
	Lost     uint64    `json:"lost,omitempty"` // lines that this watcher missed before this one
}

// Filter says what a watcher wants to see. A zero field leaves all in.
type Filter struct {
	Incoming bool // Submission and Inbound, and not Out
	Headers  bool // header sections too
	Provider string
	MX       string
	Address  netip.Addr // the source of Out, the client of the others
	Domain   mailaddr.Domain
	Message  ids.Message
	Tenant   ids.Tenant
}

func (f *Filter) wants(p *Party, s *Subject, header bool) bool {
	address := p.Remote
	if p.Kind == Out {
		address = p.Local
	}
	return f.Incoming == (p.Kind != Out) && (!header || f.Headers) &&
		(f.Provider == "" || f.Provider == p.Provider) && (f.MX == "" || f.MX == p.MX) && (!f.Address.IsValid() || f.Address == address) &&
		(f.Domain == "" || f.Domain == s.Domain) && (f.Message.IsZero() || f.Message == s.Message) && (f.Tenant.IsZero() || f.Tenant == s.Tenant)
}

// Hub brings dialogues and watchers together. The zero value is ready; a nil Hub
// has no watchers.
type Hub struct {
	active   atomic.Int32 // watchers
	sessions atomic.Uint64

	mu       sync.Mutex
	watchers map[*Watcher]struct{}
	closed   bool
}

// Watch begins to collect lines. The error is fault.Exhausted when too many
// watch, fault.Unavailable when the hub is closed.
func (h *Hub) Watch(f Filter) (*Watcher, error) {
	const op = "trace.Watch"
	h.mu.Lock()
	defer h.mu.Unlock()
	switch {
	case h.closed:
		return nil, fault.New(fault.Unavailable, op, "the relay is stopping")
	case len(h.watchers) >= maxWatchers:
		return nil, fault.New(fault.Exhausted, op, "%d traces run already, end one of them", maxWatchers)
	}
	w := &Watcher{hub: h, filter: f, ready: make(chan struct{}, 1), ended: make(chan struct{})}
	if h.watchers == nil {
		h.watchers = make(map[*Watcher]struct{})
	}
	h.watchers[w] = struct{}{}
	h.active.Add(1)
	return w, nil
}

// Close ends all watchers; there will be no others.
func (h *Hub) Close() {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.closed = true
	for w := range h.watchers {
		h.drop(w)
	}
}

// drop forgets a watcher. h.mu is held.
func (h *Hub) drop(w *Watcher) {
	if _, ok := h.watchers[w]; ok {
		delete(h.watchers, w)
		h.active.Add(-1)
		close(w.ended)
	}
}

// publish gives a line to those who want it.
func (h *Hub) publish(l *Line, p *Party, s *Subject) {
	h.mu.Lock()
	defer h.mu.Unlock()
	for w := range h.watchers {
		if w.filter.wants(p, s, l.Header) {
			w.add(l)
		}
	}
}

// Watcher collects lines for one reader.
type Watcher struct {
	hub    *Hub
	filter Filter
	ready  chan struct{} // has room for one: there are lines
	ended  chan struct{}

	mu    sync.Mutex
	lines []Line
	bytes int
	lost  uint64
}

// add keeps a line, or counts it as lost.
func (w *Watcher) add(l *Line) {
	w.mu.Lock()
	defer w.mu.Unlock()
	if len(w.lines) >= maxBufferedLines || w.bytes+len(l.Text) > maxBufferedBytes {
		w.lost++
		return
	}
	kept := *l
	kept.Lost, w.lost = w.lost, 0
	w.lines = append(w.lines, kept)
	w.bytes += len(l.Text)
	select {
	case w.ready <- struct{}{}:
	default:
	}
}

// Ready has something in it when there are lines to Take.
func (w *Watcher) Ready() <-chan struct{} { return w.ready }

// Ended is closed when no more lines come.
func (w *Watcher) Ended() <-chan struct{} { return w.ended }

// Take returns the lines collected since the last call, the oldest first.
func (w *Watcher) Take() []Line {
	w.mu.Lock()
	defer w.mu.Unlock()
	lines := w.lines
	w.lines, w.bytes = nil, 0
	return lines
}

// Close ends the watcher.
func (w *Watcher) Close() {
	w.hub.mu.Lock()
	defer w.hub.mu.Unlock()
	w.hub.drop(w)
}

// Session is one dialogue. Its goroutine alone uses it. The zero value, of no
// hub, is never watched.
type Session struct {
	hub     *Hub
	id      uint64
	party   Party
	subject Subject
	secret  string // not shown, wherever it stands
}

// Session begins a dialogue; a nil hub has one that nobody watches.
func (h *Hub) Session(p Party) Session {
	if h == nil {
		return Session{}
	}
	return Session{hub: h, id: h.sessions.Add(1), party: p}
}

// On reports whether anybody watches, so that nothing need be prepared
// otherwise.
func (s *Session) On() bool { return s.hub != nil && s.hub.active.Load() > 0 }

// About sets what the dialogue is about from now on.
func (s *Session) About(subject Subject) { s.subject = subject }

// Subject returns what was said to About last.
func (s *Session) Subject() Subject { return s.subject }

// From sets the address of the other end, once it is known.
func (s *Session) From(remote netip.Addr) { s.party.Remote = remote }

// minSecretBytes keeps short words from being taken out of replies.
const minSecretBytes = 8

// Hide keeps a text from being shown: the signed part of a return path. A short
// one is no secret.
func (s *Session) Hide(secret string) {
	if len(secret) < minSecretBytes {
		secret = ""
	}
	s.secret = secret
}

// Note tells what happened to the connection.
func (s *Session) Note(format string, args ...any) {
	if s.On() {
		s.line(Note, fmt.Sprintf(format, args...), false)
	}
}
