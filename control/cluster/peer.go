package cluster

import (
	"bytes"
	"context"
	"crypto/x509"
	"encoding/json"
	"errors"
	"io"
	"log/slog"
	"net"
	"net/http"
	"time"

	"github.com/relais-mta/relais/control"
	"github.com/relais-mta/relais/control/command"
	"github.com/relais-mta/relais/control/state"
	"github.com/relais-mta/relais/shared/fault"
	"github.com/relais-mta/relais/shared/ids"
	"github.com/relais-mta/relais/shared/pki"
)

// Requests of one server to another: HTTP/1.1 with JSON answers inside mutual
// TLS. They never travel further than the server they were sent to, so they
// cannot go round in circles.
const (
	peerPrefix        = "/v1/"
	maxRequestBytes   = 1 << 20
	maxAnswerBytes    = 16 << 20
	peerDialTimeout   = 2 * time.Second
	peerHeaderTimeout = 5 * time.Second
	peerIdleTimeout   = time.Minute
	maxIdlePeerConns  = 8
	leaderPollPeriod  = 50 * time.Millisecond
)

// answer is what a server says to another. Exactly one of Error and the other
// fields means something.
type answer struct {
	Index uint64          `json:"index,omitempty"` // of the change, or of the state
	Error *answerError    `json:"error,omitempty"`
	Body  json.RawMessage `json:"body,omitempty"`
}

type answerError struct {
	Kind    fault.Kind `json:"kind"`
	Field   string     `json:"field,omitempty"`
	Text    string     `json:"text"`
	NotDone bool       `json:"not_done,omitempty"` // nothing was changed, there is no leader here
	Unknown bool       `json:"unknown,omitempty"`  // it may or may not have been made
	Leader  string     `json:"leader,omitempty"`   // raft address of the leader that this server knows
}

func (c *Cluster) failure(err error) *answerError {
	e := &answerError{Kind: fault.KindOf(err), Text: fault.Public(err), NotDone: errors.Is(err, control.ErrNoLeader), Unknown: errors.Is(err, control.ErrOutcomeUnknown)}
	var f *fault.Error
	if errors.As(err, &f) {
		e.Field, e.Text = f.Field, f.Public
	}
	e.Leader, _ = c.Leader()
	return e
}

func (e *answerError) fault() error {
	f := &fault.Error{Kind: e.Kind, Op: "cluster.peer", Field: e.Field, Public: e.Text}
	switch {
	case e.NotDone:
		f.Cause = control.ErrNoLeader
	case e.Unknown:
		f.Cause = control.ErrOutcomeUnknown
	}
	return f
}

// peerClient asks other servers.
type peerClient struct{ http *http.Client }

func newPeerClient(s *Stream) *peerClient {
	return &peerClient{&http.Client{Transport: &http.Transport{
		DialTLSContext: func(ctx context.Context, _, addr string) (net.Conn, error) {
			ctx, cancel := context.WithTimeout(ctx, peerDialTimeout)
			defer cancel()
			conn, err := s.dialTCP(ctx, addr, s.dialPeer)
			if err != nil {
				return nil, &unreachableError{err}
			}
			return conn, nil
		},
		MaxIdleConnsPerHost: maxIdlePeerConns, IdleConnTimeout: peerIdleTimeout,
	}}}
}

// unreachableError says that a server heard nothing of the request.
type unreachableError struct{ cause error }

func (e *unreachableError) Error() string { return e.cause.Error() }
func (e *unreachableError) Unwrap() error { return e.cause }

// ask sends a request to the server at a raft address. Its refusals come back
// in the answer; the error says that there is no answer.
func (p *peerClient) ask(ctx context.Context, to, what string, body []byte) (answer, error) {
	var out answer
	req, err := http.NewRequestWithContext(ctx, http.MethodPost, "https://"+to+peerPrefix+what, bytes.NewReader(body))
	if err != nil {
		return out, &unreachableError{err}
	}
	req.GetBody = nil // a change is not sent again unasked
	resp, err := p.http.Do(req)
	if err != nil {
		return out, err
	}
	defer resp.Body.Close()
	text, err := io.ReadAll(io.LimitReader(resp.Body, maxAnswerBytes))
	if err == nil && resp.StatusCode != http.StatusOK {
		err = fault.New(fault.Internal, "cluster.ask", "the server at %s answered %s", to, resp.Status)
	}
	if err == nil {
		err = json.Unmarshal(text, &out)
	}
	return out, err
}

// leafKey finds the certificate of the asking server in a request's context.
type leafKey struct{}

// PeerHandler answers a request of another server; what it returns is sent as JSON.
type PeerHandler func(ctx context.Context, from ids.Node, body []byte) (any, error)

// servePeers answers other servers until the cluster closes.
func (c *Cluster) servePeers(s *Stream, more map[string]PeerHandler) {
	mux := http.NewServeMux()
	handle := func(what string, fn func(ctx context.Context, from ids.Node, body []byte) answer) {
		mux.HandleFunc(http.MethodPost+" "+peerPrefix+what, func(w http.ResponseWriter, r *http.Request) {
			out := c.admitRequest(w, r, fn)
			if err := json.NewEncoder(w).Encode(out); err != nil {
				c.logger.Debug("an answer did not reach its server", "error", err)
			}
		})
	}
	handle("propose", c.onPropose)
	for what, fn := range more {
		handle(what, func(ctx context.Context, from ids.Node, body []byte) answer { return c.reply(fn(ctx, from, body)) })
	}
	for what, fn := range map[string]PeerHandler{"fence": c.onFence, "attach": c.onAttach, "status": c.onStatus, "members": c.onMembers} {
		handle(what, func(ctx context.Context, from ids.Node, body []byte) answer { return c.reply(fn(ctx, from, body)) })
	}
	c.http = &http.Server{Handler: mux, ReadHeaderTimeout: peerHeaderTimeout, IdleTimeout: peerIdleTimeout, MaxHeaderBytes: 16 << 10, ErrorLog: slog.NewLogLogger(c.logger.Handler(), slog.LevelDebug),
		ConnContext: func(ctx context.Context, conn net.Conn) context.Context {
			if conn, ok := conn.(requestConn); ok {
				ctx = context.WithValue(ctx, leafKey{}, conn.leaf)
			}
			return ctx
		}}
	c.workers.Go(func() { _ = c.http.Serve(newRequestListener(s)) }) // it ends when the stream or the server is closed
}

// admitRequest checks who asks: the certificate was checked by the handshake,
// but a connection may outlive the membership of its server.
func (c *Cluster) admitRequest(w http.ResponseWriter, r *http.Request, fn func(context.Context, ids.Node, []byte) answer) answer {
	leaf, ok := r.Context().Value(leafKey{}).(*x509.Certificate)
	if !ok {
		return answer{Error: c.failure(fault.New(fault.Unauthenticated, "cluster.peer", "a certificate is needed"))}
	}
	identity, err := pki.CertIdentity(leaf)
	if err == nil {
		err = CheckServer(c.state, "", identity.Node)
	}
	if err != nil {
		return answer{Error: c.failure(err)}
	}
	body, err := io.ReadAll(http.MaxBytesReader(w, r.Body, maxRequestBytes))
	if err != nil {
		return answer{Error: c.failure(fault.Wrap(err, fault.TooLarge, "cluster.peer", "the request cannot be read"))}
	}
	return fn(r.Context(), identity.Node, body)
}

func (c *Cluster) reply(body any, err error) answer {
	if err != nil {
		return answer{Error: c.failure(err)}
	}
	text, err := json.Marshal(body)
	if err != nil {
		return answer{Error: c.failure(fault.Wrap(err, fault.Internal, "cluster.reply", "the answer cannot be encoded"))}
	}
	return answer{Body: text}
}

// CheckServer refuses a server that was removed, and another server at an
// address that belongs to a member. A server that the state does not know is
// newer than the state: its certificate says that it was let in.
func CheckServer(st *state.Store, dialed string, server ids.Node) error {
	const op = "cluster.CheckServer"
	r := st.Read()
	if row := r.Server(server); row != nil && row.State == control.NodeEvicted {
		return fault.New(fault.Denied, op, "server %s (%s) was removed from this cluster: empty its data directory and let it join anew", row.Name, row.ID)
	}
	if dialed == "" {
		return nil
	}
	for _, row := range r.Servers() {
		if row.RaftAddress == dialed && row.State == control.NodeActive && row.ID != server {
			return fault.New(fault.Denied, op, "%s answers as server %s, expected is %s (%s)", dialed, server, row.ID, row.Name)
		}
	}
	return nil
}

// onPropose commits a change for a server that does not lead. It is never
// passed on: the asking server finds the new leader itself.
func (c *Cluster) onPropose(ctx context.Context, _ ids.Node, body []byte) answer {
	e, err := command.Decode(body)
	if err != nil {
		return answer{Error: c.failure(fault.Wrap(err, fault.Invalid, "cluster.onPropose", "this server does not know the command: upgrade it"))}
	}
	result, err := c.proposeHere(ctx, e.Body)
	if err != nil && result.Index == 0 {
		return answer{Error: c.failure(err)}
	}
	// What a rule refused was committed too, so the asking server finds the
	// refusal in its own results.
	return answer{Index: result.Index}
}

// forward has the leader commit a change, waits until this server has applied
// it, and returns what that gave here.
func (c *Cluster) forward(ctx context.Context, cmd command.Command) (state.Result, error) {
	const op = "cluster.Propose"
	to, id := c.Leader()
	if to == "" || id == c.id || c.peers == nil {
		return state.Result{}, fault.Wrap(control.ErrNoLeader, fault.Unavailable, op, noLeaderText)
	}
	data, err := command.Encode(cmd, time.Now(), 0) // the leader stamps its own time and term
	if err != nil {
		return state.Result{}, err
	}
	asking, enough := c.whileLeads(ctx, id)
	out, err := c.peers.ask(asking, to, "propose", data)
	enough()
	var unreachable *unreachableError
	switch {
	case errors.As(err, &unreachable):
		return state.Result{}, fault.Wrap(errors.Join(control.ErrNoLeader, err), fault.Unavailable, op, "the leader at %s cannot be reached, nothing was changed: try again in a few seconds", to)
	case err != nil:
		return state.Result{}, unknown(err)
	case out.Error != nil:
		return state.Result{}, out.Error.fault()
	}
	ctx, cancel := context.WithTimeout(ctx, catchUpTimeout)
	defer cancel()
	result, known, err := c.await(ctx, out.Index)
	if err != nil || !known {
		return state.Result{}, unknown(errors.Join(err, fault.New(fault.Unavailable, op, "the change is entry %d, which this server has not seen go by", out.Index)))
	}
	return result, result.Err
}

// whileLeads returns a context that ends when this server learns that another
// one leads: what was asked of the former leader, paused or cut off, may be
// answered much later or never.
func (c *Cluster) whileLeads(ctx context.Context, leader string) (context.Context, context.CancelFunc) {
	ctx, cancel := context.WithCancel(ctx)
	go func() { // ends with the request
		tick := time.NewTicker(leaderPollPeriod)
		defer tick.Stop()
		for {
			select {
			case <-tick.C:
			case <-ctx.Done():
				return
			}
			if _, now := c.Leader(); now != leader && now != "" {
				cancel()
				return
			}
		}
	}()
	return ctx, cancel
}

// onFence confirms that this server leads and returns the index of its state:
// whoever has applied that much has everything committed before the request.
func (c *Cluster) onFence(ctx context.Context, _ ids.Node, _ []byte) (any, error) {
	if err := c.barrier(ctx); err != nil {
		return nil, err
	}
	return c.state.Read().Index(), nil
}

// Fence waits until this server's state has every change that was acknowledged
// anywhere before the call. Reading after it is linearizable.
func (c *Cluster) Fence(ctx context.Context) error {
	const op = "cluster.Fence"
	if c.Ready() {
		return c.barrier(ctx)
	}
	to, id := c.Leader()
	if to == "" || id == c.id || c.peers == nil {
		return fault.Wrap(control.ErrNoLeader, fault.Unavailable, op, noLeaderText)
	}
	var index uint64
	asking, enough := c.whileLeads(ctx, id)
	err := c.askFor(asking, to, "fence", nil, &index)
	enough()
	if err != nil {
		return err
	}
	ctx, cancel := context.WithTimeout(ctx, catchUpTimeout)
	defer cancel()
	_, _, err = c.await(ctx, index)
	return fault.Wrap(err, fault.Timeout, op, "this server has not caught up with entry %d: ask another one", index)
}

// barrier commits an entry without content and waits until everything before
// it is applied here. It fails on a server that does not lead.
func (c *Cluster) barrier(ctx context.Context) error {
	if !c.Ready() {
		return fault.Wrap(control.ErrNoLeader, fault.Unavailable, "cluster.barrier", "this server does not lead the cluster: try again in a few seconds")
	}
	future := c.raft.Barrier(enqueueTimeout)
	done := make(chan error, 1)
	go func() { done <- future.Error() }() // ends with the barrier or with raft
	var err error
	select {
	case err = <-done:
	case <-ctx.Done():
		err = ctx.Err()
	}
	if err != nil {
		return fault.Wrap(errors.Join(control.ErrNoLeader, err), fault.Unavailable, "cluster.barrier", "leadership is not confirmed: try again in a few seconds")
	}
	return nil
}

// askFor asks one server and decodes the body of its answer. Nothing that it
// asks for changes anything twice, so every failure may be tried again.
func (c *Cluster) askFor(ctx context.Context, to, what string, body []byte, v any) error {
	out, err := c.peers.ask(ctx, to, what, body)
	if err != nil {
		return fault.Wrap(errors.Join(control.ErrNoLeader, err), fault.Unavailable, "cluster.ask", "the server at %s does not answer: try again in a few seconds", to)
	}
	if out.Error != nil {
		return out.Error.fault()
	}
	return json.Unmarshal(out.Body, v)
}

// Ask asks the server at a raft address something that a PeerHandler answers.
func (c *Cluster) Ask(ctx context.Context, to, what string, v any) error {
	if c.peers == nil {
		return fault.New(fault.Unavailable, "cluster.Ask", "this server has no peers")
	}
	return c.askFor(ctx, to, what, nil, v)
}
