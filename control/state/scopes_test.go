package state

import (
	"net/netip"
	"reflect"
	"testing"

	"github.com/relais-mta/relais/control/command"
	"github.com/relais-mta/relais/shared/fault"
	"github.com/relais-mta/relais/shared/ids"
	"github.com/relais-mta/relais/shared/mailaddr"
	"github.com/relais-mta/relais/shared/policy"
)

// TestScopedCredentials: a scope stays with its credential through a rotation, a
// revocation and a snapshot, and reaches the views.
func TestScopedCredentials(t *testing.T) {
	w := newWorld(t)
	w.tenant(1, "acme")
	w.project(3, id(1), "default")
	put := &command.CredentialPutScoped{Credential: &command.Credential{Id: id(6), Tenant: id(1), Project: id(3), SecretHash: sum(6), Scope: &command.CredentialScope{
		Domains: []string{"shop.example"}, Networks: []string{"192.0.2.0/24", "2001:db8::/32"}, MessagesPerHour: 100, Certificates: [][]byte{sum(9)}}}}
	w.ok(put)
	want := policy.CredentialScope{Domains: []mailaddr.Domain{"shop.example"}, Networks: []netip.Prefix{netip.MustParsePrefix("192.0.2.0/24"), netip.MustParsePrefix("2001:db8::/32")},
		MessagesPerHour: 100, Certificates: [][32]byte{[32]byte(sum(9))}}
	w.ok(&command.CredentialRotate{Credential: id(6), SecretHash: sum(7), PreviousUntilMs: w.now.UnixMilli()})
	if got := w.store.Read().Credential(ids.Credential(id(6))); !reflect.DeepEqual(got.Scope, want) {
		t.Errorf("got %+v", got)
	}
	w.refused(&command.CredentialPutScoped{Credential: &command.Credential{Id: id(7), Tenant: id(1), Project: id(9), SecretHash: sum(6), Scope: put.Credential.Scope}}, fault.Invalid, "project")
	w.ok(&command.CredentialRevoke{Credential: id(6)})
	if got := w.store.Read().Credential(ids.Credential(id(6))); !got.Revoked || !reflect.DeepEqual(got.Scope, want) {
		t.Errorf("got %+v", got)
	}
}
