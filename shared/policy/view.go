package policy

import (
	"net/netip"
	"time"

	"github.com/relais-mta/relais/shared/ids"
	"github.com/relais-mta/relais/shared/lease"
	"github.com/relais-mta/relais/shared/mailaddr"
)

// View is everything one relay knows of the cluster at one revision: the
// policy document and the objects it may use. It is immutable once built;
// a relay swaps one pointer.
type View struct {
	Cluster    ids.Cluster
	Generation uint64 // rises when a cluster was restored or recovered
	Revision   uint64 // raft index of the last change in it
	Node       ids.Node
	Draining   bool // the relay takes no new mail and finishes what it has

	Sections map[string]string // section name → TOML text as the operators put it
	Document Document          // the defaults overlaid by Sections

	Tenants        []Tenant
	Projects       []Project
	Domains        []Domain
	Credentials    []Credential
	Pools          []Pool
	Sources        []Source // of all relays: a relay must know pools that are placed elsewhere
	ReturnPathKeys []ReturnPathKey
	CredentialKey  [32]byte // keys the SHA-256 of credential secrets
	Trust          Trust

	Leaving      []LeavingSource // by id; their owners are to stop using them
	Peers        []Peer          // all relays that may hand over mail, this one included; by id
	SharedLimits []SharedLimit   // by number; those of all relays
	Brakes       []Brake         // by id
	Warm         Warm            // what warms up
	Lease        lease.Config    // zero: there are no shared limits
}

// Trust is whom a relay believes to be a control server.
type Trust struct {
	CAs            [][]byte // certificates in DER: the issuing CA that signs first, the root last; none: as they were
	RefusedCAs     []string // key ids of issuing CAs that were given up
	RevokedServers []RevokedServer
}

// RevokedServer is a control server that was removed.
type RevokedServer struct {
	Server  ids.Node
	Serials []string // of its certificates, hexadecimal
}

// Tenant is a customer of the installation.
type Tenant struct {
	ID        ids.Tenant
	Name      string
	Suspended bool // its credentials are refused, its queue goes on
}

// Project groups streams and credentials of a tenant.
type Project struct {
	ID     ids.Project
	Tenant ids.Tenant
	Name   string
}

// Domain is a sending domain. Mail from any address at it, or below it, may be
// sent with credentials of its tenant.
type Domain struct {
	Name       mailaddr.Domain
	Tenant     ids.Tenant
	ReturnPath mailaddr.Domain // domain of our signed return paths, usually below Name
	DKIM       []DKIMKey       // all are used to sign
}

// The signature algorithms of DKIM.
const (
	AlgorithmRSA     = "rsa-sha256"     // RFC 6376 section 3.3.2
	AlgorithmEd25519 = "ed25519-sha256" // RFC 8463 section 3
)

// SignatureLifetime is how long a DKIM signature is good for: for so long after
// the last one the public key must stay in DNS.
const SignatureLifetime = 14 * 24 * time.Hour

// DKIMKey is a signing key. The private part is in PKCS #8 DER and exists in
// clear only in memory.
type DKIMKey struct {
	Selector  string
	Algorithm string // AlgorithmRSA or AlgorithmEd25519
	Private   []byte
}

// Credential lets a client submit mail for a project. The user name is the id's text form.
type Credential struct {
	ID         ids.Credential
	Tenant     ids.Tenant
	Project    ids.Project
	SecretHash [32]byte  // HMAC-SHA-256 of the secret under View.CredentialKey
	Stream     string    // used when a message names none
	NotAfter   time.Time // zero: no end

	PreviousHash  [32]byte  // of the secret before the last rotation
	PreviousUntil time.Time // the previous secret is good until then; zero: there is none

	Scope CredentialScope
}

// PoolKind says who may use a pool.
type PoolKind string

// The pool kinds.
const (
	PoolShared    PoolKind = "shared"
	PoolDedicated PoolKind = "dedicated"
)

// Pool is a named set of sources.
type Pool struct {
	ID     ids.Pool
	Name   string
	Kind   PoolKind
	Tenant ids.Tenant // owner of a dedicated pool
}

// Source is an address that mail leaves from.
type Source struct {
	ID     ids.Source
	Bind   netip.Addr // bound locally
	Public netip.Addr // what the world sees; equal to Bind without 1:1 NAT
	EHLO   string     // name said in EHLO; its address must be Public
	Pool   ids.Pool   // zero: in no pool
	Owner  ids.Node   // zero: assigned to no relay
	Epoch  uint64     // raft index of the assignment; only grows
	Pinned bool       // the address is routed to one machine
	Leased bool       // its owner uses it only while the leader answers, by shared/ownership
}

// ReturnPathKey signs return paths. The first key of a view signs; all verify.
type ReturnPathKey struct {
	ID  uint8
	Key [32]byte
}
