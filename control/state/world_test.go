package state

import (
	"bytes"
	"time"

	"github.com/relais-mta/relais/control"
	"github.com/relais-mta/relais/control/command"
	"github.com/relais-mta/relais/shared/fault"
)

// world applies commands one after the other, as a log would.
type world struct {
	t     fataler
	store *Store
	index uint64
	now   time.Time
	log   [][]byte
}

var start = time.UnixMilli(1_767_225_600_000).UTC()

func newWorld(t fataler) *world { return &world{t: t, store: New(), now: start} }

func (w *world) apply(c command.Command) Result {
	w.t.Helper()
	w.index++
	w.now = w.now.Add(time.Second)
	b, err := command.Encode(c, w.now, 1)
	if err != nil {
		w.t.Fatal(err)
	}
	w.log = append(w.log, b)
	e, err := command.Decode(b)
	if err != nil {
		w.t.Fatal(err)
	}
	return w.store.Apply(w.index, e)
}

// ok applies a command that must succeed.
func (w *world) ok(c command.Command) any {
	w.t.Helper()
	r := w.apply(c)
	if r.Err != nil {
		w.t.Fatalf("%s: %v", command.TypeOf(c), r.Err)
	}
	return r.Row
}

// refused applies a command that must be refused, and checks that nothing but
// the log's progress changed.
func (w *world) refused(c command.Command, kind fault.Kind, field string) {
	w.t.Helper()
	before := w.store.Read()
	r := w.apply(c)
	var f *fault.Error
	if r.Err == nil || fault.KindOf(r.Err) != kind {
		w.t.Fatalf("%s: got %v, want %v", command.TypeOf(c), r.Err, kind)
	}
	if asFault(r.Err, &f); f.Field != field {
		w.t.Errorf("%s: the error is about %q, want %q: %v", command.TypeOf(c), f.Field, field, r.Err)
	}
	after := w.store.Read()
	if before.Hash() != after.Hash() || before.ViewRevision() != after.ViewRevision() || len(before.Audit(1000)) != len(after.Audit(1000)) {
		w.t.Errorf("%s: a refused command changed the state", command.TypeOf(c))
	}
}

func asFault(err error, f **fault.Error) {
	for err != nil {
		if e, ok := err.(*fault.Error); ok {
			*f = e
			return
		}
		u, ok := err.(interface{ Unwrap() error })
		if !ok {
			return
		}
		err = u.Unwrap()
	}
}

func id(b byte) []byte { return bytes.Repeat([]byte{b}, 16) }

func sum(b byte) []byte { return bytes.Repeat([]byte{b}, 32) }

func (w *world) tenant(n byte, name string) *control.Tenant {
	w.t.Helper()
	return w.ok(&command.TenantPut{Tenant: &command.Tenant{Id: id(n), Name: name, OwnershipToken: "own" + name}}).(*control.Tenant)
}

func (w *world) project(n byte, tenant []byte, name string) *control.Project {
	w.t.Helper()
	return w.ok(&command.ProjectPut{Project: &command.Project{Id: id(n), Tenant: tenant, Name: name}}).(*control.Project)
}

func (w *world) pool(n byte, name string, tenant []byte) *control.Pool {
	w.t.Helper()
	kind := "shared"
	if tenant != nil {
		kind = "dedicated"
	}
	return w.ok(&command.PoolPut{Pool: &command.Pool{Id: id(n), Name: name, Kind: kind, Tenant: tenant}}).(*control.Pool)
}

func sourcePut(n byte, last byte) *command.IPPut {
	return &command.IPPut{Source: &command.Source{Id: id(n), Bind: []byte{10, 0, 0, last}, Public: []byte{198, 51, 100, last}, Ehlo: "mta.example.net", Pinned: true, State: "free"}}
}

func (w *world) source(n, last byte) *control.Source {
	w.t.Helper()
	return w.ok(sourcePut(n, last)).(*control.Source)
}

func domainPut(name string, tenant []byte) *command.DomainPut {
	return &command.DomainPut{Domain: &command.Domain{Name: name, Tenant: tenant, ReturnPath: "rp." + name, Dkim: []*command.DKIMKey{{Selector: "r1", Algorithm: "rsa-sha256", Public: []byte("p"), PrivateSealed: []byte("sealed")}}}}
}

func tokenCreate(n byte, change func(*command.JoinToken)) *command.TokenCreate {
	t := &command.JoinToken{Id: id(n), Role: "relay", SecretHash: sum(n), UsesMax: 1, UsesLeft: 1, NotAfterMs: start.Add(time.Hour).UnixMilli()}
	if change != nil {
		change(t)
	}
	return &command.TokenCreate{Token: t}
}

func redeem(token, csr, node byte) *command.TokenRedeem {
	return &command.TokenRedeem{Token: id(token), CsrHash: sum(csr), Role: "relay", Node: id(node), Name: "edge-1", Remote: []byte{198, 51, 100, 7}}
}

func (w *world) node(n byte) *control.Node {
	w.t.Helper()
	w.ok(tokenCreate(n, nil))
	return w.ok(redeem(n, n, n)).(*control.Node)
}

// fataler is what tests of both kinds have.
type fataler interface {
	Helper()
	Fatal(args ...any)
	Fatalf(format string, args ...any)
	Errorf(format string, args ...any)
}
