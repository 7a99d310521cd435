package service

import (
	"context"
	"crypto/sha256"
	"errors"
	"log/slog"
	"net/netip"
	"testing"
	"time"

	"github.com/relais-mta/relais/control"
	"github.com/relais-mta/relais/control/ca"
	"github.com/relais-mta/relais/control/command"
	"github.com/relais-mta/relais/control/state"
	"github.com/relais-mta/relais/shared/fault"
	"github.com/relais-mta/relais/shared/ids"
	"github.com/relais-mta/relais/shared/pki"
)

// localLog is a log of one server without raft: commands go through their
// bytes into the state at once.
type localLog struct {
	state   *state.Store
	index   uint64
	bytes   []byte // everything that was ever logged
	stale   bool
	unsound error
	fence   func() error // nil: nothing is to be waited for
}

func (l *localLog) Propose(_ context.Context, c command.Command) (state.Result, error) {
	if err := c.Validate(); err != nil {
		return state.Result{}, err
	}
	b, err := command.Encode(c, time.Now(), 1)
	if err != nil {
		return state.Result{}, err
	}
	l.bytes = append(l.bytes, b...)
	e, err := command.Decode(b)
	if err != nil {
		return state.Result{}, err
	}
	l.index++
	r := l.state.Apply(l.index, e)
	return r, r.Err
}

func (l *localLog) Ready() bool { return !l.stale }
func (l *localLog) Fresh() bool { return !l.stale }
func (l *localLog) Fence(context.Context) error {
	if l.fence == nil {
		return nil
	}
	return l.fence()
}
func (l *localLog) Health() error { return l.unsound }

var (
	ctx      = context.Background()
	admin    = Actor{Name: "ann", Role: control.RoleAdmin}
	operator = Actor{Name: "olga", Role: control.RoleOperator}
	viewer   = Actor{Name: "vic", Role: control.RoleViewer}
)

type fixture struct {
	*Service
	log    *localLog
	init   InitResult
	sealer *pki.Sealer
	pin    pki.Pin
}

func newFixture(t testing.TB) *fixture {
	t.Helper()
	st := state.New()
	log := &localLog{state: st}
	var req InitRequest
	stamp(&req.Cluster, time.Now())
	material, kek, _, err := ca.Create(req.Cluster, time.Now())
	if err != nil {
		t.Fatal(err)
	}
	sealer := pki.NewSealer(kek)
	s := New(Options{State: st, Log: log, Sealer: sealer, Logger: slog.New(slog.DiscardHandler), Version: "1.2.3"})
	req.CABundle, req.CASealed, req.KEKID, req.RecoverySealed = material.Bundle, material.Sealed, material.KEKID, material.RecoverySealed
	req.Server = control.Server{Name: "c1", LinkAddress: "10.0.0.1:7443", State: control.NodeActive}
	stamp(&req.Server.ID, time.Now())
	result, err := s.Init(ctx, req)
	if err != nil {
		t.Fatal(err)
	}
	authority, err := ca.Open(material, req.Cluster, sealer)
	if err != nil {
		t.Fatal(err)
	}
	return &fixture{Service: s, log: log, init: result, sealer: sealer, pin: authority.Pin()}
}

// refused checks an error's kind and field, and that the state is as before.
func (f *fixture) refused(t *testing.T, kind fault.Kind, field string, fn func() error) {
	t.Helper()
	before := f.state.Read().Hash()
	err := fn()
	var e *fault.Error
	if !errors.As(err, &e) || fault.KindOf(err) != kind || e.Field != field {
		t.Errorf("got %v, want %v about %q", err, kind, field)
	}
	if f.state.Read().Hash() != before {
		t.Errorf("%v: something was half applied", err)
	}
}

func must[T any](t *testing.T) func(T, error) T {
	return func(v T, err error) T {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
		return v
	}
}

func (f *fixture) join(t *testing.T, name string) ids.Node {
	t.Helper()
	row, _, err := f.CreateToken(ctx, admin, TokenRequest{Role: control.NodeRelay}, Change{})
	if err != nil {
		t.Fatal(err)
	}
	node, _, err := f.RedeemToken(ctx, RedeemRequest{TokenID: row.ID, CSRHash: sha256.Sum256([]byte(name)), Role: "relay", Name: name, RemoteAddr: netip.MustParseAddr("198.51.100.7")})
	if err != nil {
		t.Fatal(err)
	}
	return node
}
