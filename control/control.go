// Package control holds the words of the control plane: the objects that every
// server of a cluster agrees on. Everything below control/ speaks in these
// types, so that commands, state tables, use cases and the API name the same
// things the same way.
//
// DESIGN.md beside this file tells how a change moves through the packages.
package control

import (
	"errors"
	"fmt"
	"net/netip"
	"strconv"
	"strings"
	"time"

	"github.com/relais-mta/relais/shared/ids"
	"github.com/relais-mta/relais/shared/mailaddr"
	"github.com/relais-mta/relais/shared/policy"
)

// Role says what a person or an API key may do.
type Role string

// The roles, each holding the rights of the next.
const (
	RoleAdmin    Role = "admin"    // everything, operators and server tokens included
	RoleOperator Role = "operator" // everything about mail: tenants, addresses, policy, relay tokens
	RoleViewer   Role = "viewer"   // reading
)

// Allows reports whether a holder of role r may do what needs role need.
func (r Role) Allows(need Role) bool {
	rank := func(r Role) int {
		switch r {
		case RoleAdmin:
			return 3
		case RoleOperator:
			return 2
		case RoleViewer:
			return 1
		}
		return 0
	}
	return rank(r) > 0 && rank(r) >= rank(need)
}

// NodeRole says what a machine joins as.
type NodeRole string

// The node roles.
const (
	NodeRelay   NodeRole = "relay"
	NodeControl NodeRole = "control"
)

// NodeState is where a node stands. Only an active or draining node gets a
// link; only an active node gets new work.
type NodeState string

// The node states.
const (
	NodePending  NodeState = "pending"
	NodeActive   NodeState = "active"
	NodeDraining NodeState = "draining"
	NodeDrained  NodeState = "drained"
	NodeEvicted  NodeState = "evicted"
)

// Connects reports whether a node in this state may hold a link.
func (s NodeState) Connects() bool {
	return s == NodeActive || s == NodeDraining || s == NodeDrained
}

// SourceState is where an address stands.
type SourceState string

// The source states.
const (
	SourceFree     SourceState = "free"
	SourceAssigned SourceState = "assigned"
	// SourceReleasing: its relay finishes what it has begun and says when it has.
	SourceReleasing SourceState = "releasing"
	// SourceQuarantined: its relay was evicted, or an operator put it aside. Nobody
	// uses it until an operator releases or assigns it.
	SourceQuarantined SourceState = "quarantined"
)

// Label is a key and a value that an operator gave to a node.
type Label struct{ Key, Value string }

// Cluster is the one row about the cluster itself.
type Cluster struct {
	ID                  ids.Cluster
	Generation          uint64 // rises when a cluster was restored or recovered
	FSMVersion          uint16 // newest command version that every server can apply
	CreatedAt           time.Time
	CABundle            []byte // certificates, PEM
	CASealed            []byte // issuing material, sealed under the KEK
	KEKID               string
	RecoverySealed      []byte // the KEK, sealed under the recovery key
	CredentialKeySealed []byte
	Revision            uint64
}

// Server is one server of the control plane.
type Server struct {
	ID            ids.Node
	Name          string
	RaftAddress   string
	LinkAddress   string
	HTTPAddress   string
	Version       string
	MaxFSMVersion uint16
	Zone          string
	SPKI          []byte // SHA-256 of the SubjectPublicKeyInfo of its certificate
	State         NodeState
	Certificates  []ServerCertificate // that it was given and that may not be over; oldest first
	Revision      uint64
}

// Node is a relay.
type Node struct {
	ID           ids.Node
	Name         string
	State        NodeState
	Zone         string
	Labels       []Label // sorted by key
	Version      string
	CertSerial   string
	CertSPKI     []byte // SHA-256 of the SubjectPublicKeyInfo
	CertNotAfter time.Time
	Addresses    []netip.Addr
	Token        ids.Token
	JoinedAt     time.Time
	Handover     string // host:port at which it takes mail of other relays; empty: it never took any; "-": not any more
	Revision     uint64

	LeaseProcess uint64 // incarnation of the process that its floating addresses are leased to; 0: none yet
}

// Redemption remembers which node a certificate request became.
type Redemption struct {
	CSRHash [32]byte
	Node    ids.Node
}

// JoinToken lets machines join. Its secret is known only to who created it.
type JoinToken struct {
	ID          ids.Token
	Role        NodeRole
	SecretHash  [32]byte // SHA-256 of the secret
	UsesMax     uint32
	UsesLeft    uint32
	NotAfter    time.Time
	Labels      []Label
	CIDRs       []netip.Prefix // empty: from anywhere
	NameGlob    string         // empty: any name
	Redemptions []Redemption
	Approve     bool // nodes start as pending
	Revoked     bool
	CreatedAt   time.Time
	Revision    uint64
}

// Tenant is a customer of the installation.
type Tenant struct {
	ID             ids.Tenant
	Name           string
	Suspended      bool
	OwnershipToken string // published in DNS to prove that a domain is the tenant's
	CreatedAt      time.Time
	Revision       uint64
}

// Project groups streams and credentials of a tenant.
type Project struct {
	ID        ids.Project
	Tenant    ids.Tenant
	Name      string
	CreatedAt time.Time
	Revision  uint64
}

// DefaultProject is the name of the project every tenant starts with.
const DefaultProject = "default"

// DKIMKey is a signing key of a domain.
type DKIMKey struct {
	Selector      string
	Algorithm     string // of shared/policy
	Public        []byte // SubjectPublicKeyInfo, DER
	PrivateSealed []byte // PKCS #8 DER, sealed under the KEK; empty once it is over

	State     KeyState
	CreatedAt time.Time // zero: with its domain
	SeenAt    time.Time // since when DNS shows the record of a new key; zero: it does not
	Since     time.Time // of the state; zero: since its domain is
}

// Domain is a sending domain.
type Domain struct {
	Name       mailaddr.Domain
	Tenant     ids.Tenant
	ReturnPath mailaddr.Domain
	DKIM       []DKIMKey
	CreatedAt  time.Time
	VerifiedAt time.Time // when its ownership record was first seen in DNS; zero: never
	Revision   uint64
}

// Credential lets a client submit mail for a project.
type Credential struct {
	ID         ids.Credential
	Tenant     ids.Tenant
	Project    ids.Project
	Name       string
	SecretHash [32]byte // HMAC-SHA-256 of the secret under the cluster's credential key
	Stream     string
	NotAfter   time.Time // zero: no end
	Revoked    bool
	CreatedAt  time.Time
	Revision   uint64

	PreviousHash  [32]byte  // of the secret before the last rotation
	PreviousUntil time.Time // the previous secret is good until then; zero: there is none

	Scope policy.CredentialScope
}

// Pool is a named set of sources.
type Pool struct {
	ID        ids.Pool
	Name      string
	Kind      policy.PoolKind
	Tenant    ids.Tenant // owner of a dedicated pool
	CreatedAt time.Time
	Revision  uint64
}

// DefaultPool is the name of the shared pool every cluster starts with.
const DefaultPool = "default"

// Source is an address that mail leaves from.
type Source struct {
	ID        ids.Source
	Bind      netip.Addr
	Public    netip.Addr
	EHLO      string
	PTR       string // name the address's PTR record should give; empty: the EHLO name
	Pool      ids.Pool
	Owner     ids.Node
	Epoch     uint64 // raft index of the assignment; only grows
	Pinned    bool
	State     SourceState
	CreatedAt time.Time
	Revision  uint64

	Reverse       ReverseVerdict
	ReverseDetail string    // what the check found
	ReverseAt     time.Time // when the verdict was reached; zero: never checked
	Overridden    bool      // an operator uses it without confirmed reverse DNS

	Quarantine string // why it is in quarantine; empty: it is not
	Leased     bool   // its last assignment ends by itself when its relay is silent: of a floating address, since FloatingVersion
}

// FloatingVersion is the version of the commands in which floating addresses are
// leased to their relays.
const FloatingVersion = 6

// Policy is the policy document as the operators put it.
type Policy struct {
	Sections []PolicySection // sorted by name; only those that differ from the shipped default
	Revision uint64
}

// PolicySection is one section's text.
type PolicySection struct{ Name, Text string }

// Operator is a person or a program that manages the cluster.
type Operator struct {
	ID           ids.Operator
	Name         string
	Role         Role
	PasswordHash string // argon2id; empty: cannot log in with a password
	Disabled     bool
	CreatedAt    time.Time
	Revision     uint64
}

// APIKey authenticates an operator's programs.
type APIKey struct {
	ID         ids.Key
	Operator   ids.Operator
	Name       string
	SecretHash [32]byte // SHA-256 of the secret
	NotAfter   time.Time
	Revoked    bool
	CreatedAt  time.Time
	Revision   uint64
}

// ReturnPathKey signs return paths. The row with the highest revision signs.
type ReturnPathKey struct {
	ID        uint8
	KeySealed []byte
	CreatedAt time.Time
	Revision  uint64
}

// AuditEntry is one change: who, what, why, and how the row looked before and
// after, without secrets.
type AuditEntry struct {
	Index  uint64
	Time   time.Time
	Actor  string
	Reason string
	Action string
	Object string
	Before string
	After  string
}

// Summary renders the row for the audit tail, without secrets.
func (n *Node) Summary() string {
	labels := make([]string, len(n.Labels))
	for i, l := range n.Labels {
		labels[i] = l.Key + "=" + l.Value
	}
	text := fmt.Sprintf("name=%s state=%s zone=%s labels=%s version=%s cert=%s", n.Name, n.State, n.Zone, strings.Join(labels, ","), n.Version, n.CertSerial)
	if n.Handover != "" {
		text += " handover=" + n.Handover
	}
	return text
}

// Summary renders the row for the audit tail, without secrets.
func (s *Server) Summary() string {
	return fmt.Sprintf("name=%s state=%s raft=%s link=%s http=%s version=%s", s.Name, s.State, s.RaftAddress, s.LinkAddress, s.HTTPAddress, s.Version)
}

// Summary renders the row for the audit tail, without secrets.
func (t *JoinToken) Summary() string {
	return fmt.Sprintf("role=%s uses=%d/%d not_after=%s cidrs=%v names=%s revoked=%t%s", t.Role, t.UsesMax-t.UsesLeft, t.UsesMax, t.NotAfter.UTC().Format(time.RFC3339), t.CIDRs, t.NameGlob, t.Revoked, needsApproval(t.Approve))
}

func needsApproval(approve bool) string {
	if approve {
		return " approve=true"
	}
	return ""
}

// Summary renders the row for the audit tail.
func (t *Tenant) Summary() string { return fmt.Sprintf("name=%s suspended=%t", t.Name, t.Suspended) }

// Summary renders the row for the audit tail.
func (p *Project) Summary() string { return fmt.Sprintf("tenant=%s name=%s", p.Tenant, p.Name) }

// Summary renders the row for the audit tail, without secrets.
func (d *Domain) Summary() string {
	selectors := make([]string, len(d.DKIM))
	for i, k := range d.DKIM {
		selectors[i] = k.Selector
		if k.State != KeySigning {
			selectors[i] += ":" + k.State.String()
		}
		if k.State == KeyNew && !k.SeenAt.IsZero() {
			selectors[i] += ":seen"
		}
	}
	text := fmt.Sprintf("tenant=%s return_path=%s selectors=%s", d.Tenant, d.ReturnPath, strings.Join(selectors, ","))
	if !d.VerifiedAt.IsZero() {
		text += " verified"
	}
	return text
}

// Summary renders the row for the audit tail, without secrets.
func (c *Credential) Summary() string {
	text := fmt.Sprintf("tenant=%s project=%s name=%s stream=%s revoked=%t", c.Tenant, c.Project, c.Name, c.Stream, c.Revoked)
	if !c.NotAfter.IsZero() {
		text += " not_after=" + c.NotAfter.UTC().Format(time.RFC3339)
	}
	if !c.PreviousUntil.IsZero() {
		text += " previous_until=" + c.PreviousUntil.UTC().Format(time.RFC3339)
	}
	return text
}

// Summary renders the row for the audit tail.
func (p *Pool) Summary() string {
	return fmt.Sprintf("name=%s kind=%s tenant=%s", p.Name, p.Kind, p.Tenant)
}

// Summary renders the row for the audit tail.
func (s *Source) Summary() string {
	text := fmt.Sprintf("bind=%s public=%s ehlo=%s pool=%s owner=%s epoch=%d pinned=%t state=%s", s.Bind, s.Public, s.EHLO, s.Pool, s.Owner, s.Epoch, s.Pinned, s.State)
	if s.Reverse != ReverseUnchecked {
		text += " reverse=" + string(s.Reverse)
	}
	if s.Overridden {
		text += " overridden"
	}
	if s.Leased {
		text += " leased"
	}
	if s.Quarantine != "" {
		text += " quarantine=" + strconv.Quote(s.Quarantine)
	}
	return text
}

// Summary renders the row for the audit tail: the sizes of the sections, whose
// texts are too long for it.
func (p *Policy) Summary() string {
	parts := make([]string, len(p.Sections))
	for i, s := range p.Sections {
		parts[i] = fmt.Sprintf("%s=%dB", s.Name, len(s.Text))
	}
	return strings.Join(parts, " ")
}

// Summary renders the row for the audit tail, without secrets.
func (o *Operator) Summary() string {
	return fmt.Sprintf("name=%s role=%s disabled=%t", o.Name, o.Role, o.Disabled)
}

// Summary renders the row for the audit tail, without secrets.
func (k *APIKey) Summary() string {
	return fmt.Sprintf("operator=%s name=%s revoked=%t", k.Operator, k.Name, k.Revoked)
}

// Summary renders the row for the audit tail, without secrets.
func (k *ReturnPathKey) Summary() string { return fmt.Sprintf("id=%d", k.ID) }

// Summary renders the row for the audit tail, without secrets.
func (c *Cluster) Summary() string {
	return fmt.Sprintf("generation=%d fsm_version=%d kek=%s", c.Generation, c.FSMVersion, c.KEKID)
}

// ErrOutcomeUnknown is in the chain of an error after which a change may or may
// not have been made. Proposing the very same command again is harmless.
var ErrOutcomeUnknown = errors.New("outcome unknown")

// ErrNoLeader is in the chain of an error after which nothing was changed,
// because the cluster has no leader or this server is not it.
var ErrNoLeader = errors.New("this server does not lead")
