// Package service holds the use cases of the control plane. It is the only door
// to the replicated state: it authorises who asks, validates what is asked,
// stamps ids, times and secrets, proposes the change, and reads. The API, the
// console, enrolment and the link server come through here.
package service

import (
	"context"
	"errors"
	"log/slog"
	"sync"
	"sync/atomic"
	"time"

	"github.com/relais-mta/relais/control"
	"github.com/relais-mta/relais/control/auth"
	"github.com/relais-mta/relais/control/command"
	"github.com/relais-mta/relais/control/state"
	"github.com/relais-mta/relais/shared/fault"
	"github.com/relais-mta/relais/shared/ids"
	"github.com/relais-mta/relais/shared/pki"
	"github.com/relais-mta/relais/shared/policy"
)

// Log is where changes are proposed; control/cluster implements it.
type Log interface {
	Propose(context.Context, command.Command) (state.Result, error)
	Ready() bool                 // this server leads and is up to date
	Fresh() bool                 // what is read here is what the cluster agreed on
	Fence(context.Context) error // waits until what is read here misses no change that was acknowledged before
	Health() error               // why this server must not serve, or nil
}

// Sealer encrypts secrets under the cluster's key-encryption key.
type Sealer interface {
	Seal(plain, aad []byte) ([]byte, error)
	Open(sealed, aad []byte) ([]byte, error)
	KeyID() string
}

// Options are what a Service needs.
type Options struct {
	State   *state.Store
	Log     Log
	Sealer  Sealer
	Logger  *slog.Logger
	Version string // of this program, shown by the API
	Backups Backups
}

// Service implements the use cases. Use New.
type Service struct {
	state   *state.Store
	log     Log
	sealer  Sealer
	logger  *slog.Logger
	version string
	started time.Time
	backups Backups

	viewMu sync.Mutex
	view   *policy.View // for no node in particular, of the newest revision asked for

	membership Membership // nil: this server has no others to ask
	self       ids.Node
	lender     Lender // nil: nobody knows what relays want of shared limits

	ownCertificate func() CertificateState // nil: not to be asked

	dns atomic.Pointer[dnsBox]

	seenMu sync.Mutex
	seen   map[ids.Node]*Seen
}

// New returns the service of one server.
func New(o Options) *Service {
	return &Service{state: o.State, log: o.Log, sealer: o.Sealer, logger: o.Logger, version: o.Version, backups: o.Backups, started: time.Now(), seen: map[ids.Node]*Seen{}}
}

// Actor is who asks for something.
type Actor struct {
	Name     string
	Role     control.Role
	Operator ids.Operator // zero for the server itself
}

// System is the server itself, for what it does by its own account.
var System = Actor{Name: "system", Role: control.RoleAdmin}

// Change is what every change may carry besides its content.
type Change struct {
	Expect uint64 // revision the change was made from; 0: whatever it is now
	Reason string // for the audit tail
}

func (c Change) meta(a Actor) *command.Meta { return &command.Meta{Actor: a.Name, Reason: c.Reason} }

// enter is the door: no use case goes on before it.
func (s *Service) enter(a Actor, need control.Role, op string) error {
	if err := s.log.Health(); err != nil {
		// Nothing was changed, and another server can answer.
		return fault.Wrap(errors.Join(control.ErrNoLeader, err), fault.Unavailable, op, "this server does not serve, ask another one: %s", fault.Public(err))
	}
	if err := s.fresh(op); err != nil {
		return err
	}
	if !a.Role.Allows(need) {
		return fault.New(fault.Denied, op, "%s has the role %s, this needs %s: ask an admin", a.Name, a.Role, need)
	}
	return nil
}

// fresh refuses to answer from a state that is not up to date, as it is for a
// moment after a start. Nothing was changed, so asking again is safe.
func (s *Service) fresh(op string) error {
	if s.log.Fresh() {
		return nil
	}
	return fault.Wrap(control.ErrNoLeader, fault.Unavailable, op, "this server is not in touch with the cluster's leader now: try again in a few seconds, or ask another server")
}

// propose commits a command and returns the row it left.
func propose[T any](ctx context.Context, s *Service, cmd command.Command) (*T, error) {
	result, err := s.log.Propose(ctx, cmd)
	if err != nil {
		return nil, s.sayWhatChanged(err)
	}
	row, ok := result.Row.(*T)
	if !ok {
		return nil, fault.New(fault.Internal, "service.propose", "a %s left a %T", command.TypeOf(cmd), result.Row)
	}
	return row, nil
}

// stamp gives a new id of the kind of its target.
func stamp[K ids.Kind](id *ids.ID[K], now time.Time) { *id = ids.New[K](now) }

// parseID reads an id of the kind of its target.
func parseID[K ids.Kind](id *ids.ID[K], text string) bool {
	return id.UnmarshalText([]byte(text)) == nil && !id.IsZero()
}

// now returns the time as commands carry it.
func now() time.Time { return time.Now().UTC().Truncate(time.Millisecond) }

// revision returns what a change expects: the caller's revision, or the row's.
func (c Change) revision(row uint64) uint64 {
	if c.Expect != 0 {
		return c.Expect
	}
	return row
}

func notFound(field, kind, name string) error {
	e := fault.New(fault.NotFound, "service", "there is no %s %q: see `relais-control %s list`", kind, name, kind)
	e.Field = field
	return e
}

// Authenticate returns who presents an API key. Unknown, revoked and expired
// keys and disabled operators get the same answer.
func (s *Service) Authenticate(key string) (Actor, error) {
	const op = "service.Authenticate"
	id, hash, err := auth.ParseAPIKey(key)
	if err != nil {
		return Actor{}, err
	}
	if err := s.fresh(op); err != nil {
		return Actor{}, err
	}
	r := s.state.Read()
	row := r.APIKey(id)
	var stored [32]byte
	if row != nil {
		stored = row.SecretHash
	}
	good := auth.Equal(stored, hash) && row != nil && !row.Revoked && (row.NotAfter.IsZero() || time.Now().Before(row.NotAfter))
	if good {
		if o := r.Operator(row.Operator); o != nil && !o.Disabled {
			return Actor{Name: o.Name, Role: o.Role, Operator: o.ID}, nil
		}
	}
	return Actor{}, fault.New(fault.Unauthenticated, op, "the API key is unknown, revoked or expired")
}

// Info is what anybody may know of a server.
type Info struct {
	Version  string
	Cluster  ids.Cluster
	Commands uint16 // version of the commands that the cluster works at
	Leader   bool
	Index    uint64 // of the last change applied here
	Revision uint64 // of the last change that relays must hear of
}

// Info returns facts about this server and its state.
func (s *Service) Info() Info {
	r := s.state.Read()
	i := Info{Version: s.version, Leader: s.log.Ready(), Index: r.Index(), Revision: r.ViewRevision()}
	if c := r.Cluster(); c != nil {
		i.Cluster, i.Commands = c.ID, c.FSMVersion
	}
	return i
}

// Health returns nil, or why this server must not serve.
func (s *Service) Health() error { return s.log.Health() }

// pins returns the pins of the cluster's roots, which join tokens carry.
func (s *Service) pins(c *control.Cluster) ([]pki.Pin, error) {
	certs, err := pki.ParseCertificates(c.CABundle)
	if err != nil {
		return nil, err
	}
	var pins []pki.Pin
	for _, cert := range certs {
		if string(cert.RawIssuer) == string(cert.RawSubject) {
			pins = append(pins, pki.PinOf(cert))
		}
	}
	return pins, nil
}

// Cluster returns the row about the cluster.
func (s *Service) Cluster() (*control.Cluster, error) {
	if c := s.state.Read().Cluster(); c != nil {
		return c, nil
	}
	return nil, fault.New(fault.Unavailable, "service.Cluster", "the cluster is not initialised: run `relais-control init`")
}
