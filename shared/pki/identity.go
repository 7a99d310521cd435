package pki

import (
	"crypto/x509"
	"net/url"
	"strings"

	"github.com/relais-mta/relais/shared/fault"
	"github.com/relais-mta/relais/shared/ids"
)

// Role is what a node is in its cluster.
type Role string

// The roles. They are part of certificates, so a role's name never changes.
const (
	RoleRelay   Role = "relay"
	RoleControl Role = "control"
)

// Valid reports whether r is a known role.
func (r Role) Valid() bool { return r == RoleRelay || r == RoleControl }

// Identity is who a node is, as its certificate states it.
type Identity struct {
	Cluster ids.Cluster
	Role    Role
	Node    ids.Node
}

// URI returns the SPIFFE id, spiffe://<cluster id>/<role>/<node id>. The
// cluster id is the trust domain (SPIFFE-ID section 2.1), so a certificate of
// another cluster cannot be mistaken for ours even if a CA were shared.
func (i Identity) URI() *url.URL {
	return &url.URL{Scheme: "spiffe", Host: i.Cluster.String(), Path: "/" + string(i.Role) + "/" + i.Node.String()}
}

// String returns the SPIFFE id as text.
func (i Identity) String() string { return i.URI().String() }

// ParseIdentity reads a SPIFFE id of a Relais node.
func ParseIdentity(uri *url.URL) (Identity, error) {
	const op = "pki.ParseIdentity"
	var identity Identity
	bad := func() (Identity, error) {
		return Identity{}, fault.New(fault.Denied, op, "%q is not the id of a node: want spiffe://<cluster>/<role>/<node>", clip(uri.String()))
	}
	if uri.Scheme != "spiffe" || uri.User != nil || uri.RawQuery != "" || uri.Fragment != "" || uri.Opaque != "" || uri.ForceQuery {
		return bad()
	}
	parts := strings.Split(uri.Path, "/")
	if len(parts) != 3 || parts[0] != "" {
		return bad()
	}
	if identity.Role = Role(parts[1]); !identity.Role.Valid() {
		return bad()
	}
	if identity.Cluster.UnmarshalText([]byte(uri.Host)) != nil || identity.Node.UnmarshalText([]byte(parts[2])) != nil {
		return bad()
	}
	if identity.Cluster.IsZero() || identity.Node.IsZero() {
		return bad()
	}
	return identity, nil
}

// CertIdentity returns the identity that a certificate states. A certificate
// has exactly one URI name (X509-SVID section 2).
func CertIdentity(cert *x509.Certificate) (Identity, error) {
	if len(cert.URIs) != 1 {
		return Identity{}, fault.New(fault.Denied, "pki.CertIdentity", "the certificate has %d URI names, a node's has one", len(cert.URIs))
	}
	return ParseIdentity(cert.URIs[0])
}

func clip(s string) string {
	const maxShownBytes = 120
	if len(s) > maxShownBytes {
		return s[:maxShownBytes] + "…"
	}
	return s
}
