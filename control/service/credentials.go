package service

import (
	"context"
	"slices"
	"time"

	"github.com/relais-mta/relais/control"
	"github.com/relais-mta/relais/control/auth"
	"github.com/relais-mta/relais/control/command"
	"github.com/relais-mta/relais/control/state"
	"github.com/relais-mta/relais/shared/fault"
	"github.com/relais-mta/relais/shared/ids"
	"github.com/relais-mta/relais/shared/policy"
)

// CredentialRequest asks for an SMTP credential.
type CredentialRequest struct {
	Tenant   string // id or name
	Project  string // id or name; empty: the default project
	Name     string // what it is for; may be empty
	Stream   string // used when a message names none; may be empty
	NotAfter time.Time
	Scope    policy.CredentialScope
}

// CreateCredential makes a credential. The second result is its secret, which
// is shown once and not kept; the user name is the credential's id.
func (s *Service) CreateCredential(ctx context.Context, a Actor, req CredentialRequest, c Change) (*control.Credential, string, error) {
	const op = "service.CreateCredential"
	if err := s.enter(a, control.RoleOperator, op); err != nil {
		return nil, "", err
	}
	r := s.state.Read()
	tenant, err := tenantByRef(r, req.Tenant)
	if err != nil {
		return nil, "", err
	}
	project, err := projectByRef(r, tenant, req.Project)
	if err != nil {
		return nil, "", err
	}
	if err := s.checkStream(op, tenant, project, req.Stream); err != nil {
		return nil, "", err
	}
	if err := s.checkScope(op, r, tenant, &req.Scope); err != nil {
		return nil, "", err
	}
	at := now()
	if !req.NotAfter.IsZero() && !req.NotAfter.After(at) {
		return nil, "", fault.Field(op, "not_after", "%s is past: choose a later time or none", req.NotAfter.UTC().Format(time.RFC3339))
	}
	view, err := s.baseView()
	if err != nil {
		return nil, "", err
	}
	row := control.Credential{Tenant: tenant.ID, Project: project.ID, Name: req.Name, Stream: req.Stream, CreatedAt: at, Scope: req.Scope}
	if !req.NotAfter.IsZero() {
		row.NotAfter = req.NotAfter.UTC().Truncate(time.Millisecond)
	}
	stamp(&row.ID, at)
	secret, hash := auth.NewCredentialSecret(view.CredentialKey)
	row.SecretHash = hash
	var put command.Command = &command.CredentialPut{Meta: c.meta(a), Credential: command.CredentialRecord(&row)}
	if !row.Scope.IsZero() {
		put = &command.CredentialPutScoped{Meta: c.meta(a), Credential: command.CredentialRecord(&row)}
	}
	out, err := propose[control.Credential](ctx, s, put)
	if err != nil {
		return nil, "", err
	}
	return out, secret, nil
}

// checkScope refuses a scope that cannot be, or that names what the tenant does
// not have: it would refuse all mail.
func (s *Service) checkScope(op string, r *state.Reader, tenant *control.Tenant, scope *policy.CredentialScope) error {
	if err := scope.Check(); err != nil {
		return err
	}
	for _, name := range scope.Domains {
		covered := slices.ContainsFunc(r.Domains(tenant.ID), func(d *control.Domain) bool { return name.IsSubdomainOf(d.Name) })
		if !covered {
			return fault.Field(op, "domains", "%s is not a sending domain of tenant %s, nor below one: add it first", name, tenant.Name)
		}
	}
	return nil
}

// The life of a credential's old secret after a rotation.
const (
	DefaultRotationOverlap = 24 * time.Hour
	MaxRotationOverlap     = 30 * 24 * time.Hour
)

// RotateCredential gives a credential a new secret, which is the second result
// and is shown once. The old one stays good for the overlap, 0 to
// MaxRotationOverlap; a secret from before the last rotation ends at once.
func (s *Service) RotateCredential(ctx context.Context, a Actor, ref string, overlap time.Duration, c Change) (*control.Credential, string, error) {
	const op = "service.RotateCredential"
	if err := s.enter(a, control.RoleOperator, op); err != nil {
		return nil, "", err
	}
	if overlap < 0 || overlap > MaxRotationOverlap {
		return nil, "", fault.Field(op, "overlap", "%s is out of range: the old secret stays good for 0 to %s", overlap, MaxRotationOverlap)
	}
	var id ids.Credential
	var row *control.Credential
	if parseID(&id, ref) {
		row = s.state.Read().Credential(id)
	}
	if row == nil {
		return nil, "", notFound("credential", "credential", ref)
	}
	view, err := s.baseView()
	if err != nil {
		return nil, "", err
	}
	secret, hash := auth.NewCredentialSecret(view.CredentialKey)
	out, err := propose[control.Credential](ctx, s, &command.CredentialRotate{Meta: c.meta(a), Expect: c.revision(row.Revision), Credential: id[:], SecretHash: hash[:], PreviousUntilMs: now().Add(overlap).UnixMilli()})
	if err != nil {
		return nil, "", err
	}
	return out, secret, nil
}

// Credentials returns the credentials of a tenant, or all if it is empty.
func (s *Service) Credentials(a Actor, tenant string) ([]*control.Credential, error) {
	if err := s.enter(a, control.RoleViewer, "service.Credentials"); err != nil {
		return nil, err
	}
	r := s.state.Read()
	id, err := optionalTenant(r, tenant)
	if err != nil {
		return nil, err
	}
	return r.Credentials(id), nil
}

// RevokeCredential ends a credential for good.
func (s *Service) RevokeCredential(ctx context.Context, a Actor, ref string, c Change) (*control.Credential, error) {
	if err := s.enter(a, control.RoleOperator, "service.RevokeCredential"); err != nil {
		return nil, err
	}
	var id ids.Credential
	if !parseID(&id, ref) || s.state.Read().Credential(id) == nil {
		return nil, notFound("credential", "credential", ref)
	}
	return propose[control.Credential](ctx, s, &command.CredentialRevoke{Meta: c.meta(a), Credential: id[:]})
}
