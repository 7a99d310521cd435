package agent

import (
	"crypto/x509"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/pelletier/go-toml/v2"

	"github.com/relais-mta/relais/shared/fault"
	"github.com/relais-mta/relais/shared/ids"
	"github.com/relais-mta/relais/shared/pki"
	"github.com/relais-mta/relais/shared/wire"
)

// Files below the data directory.
const (
	identityDir     = "identity"
	keyFile         = "node.key"
	csrFile         = "node.csr" // kept, so that a repeated join is the same request
	leafFile        = "leaf.pem"
	caFile          = "ca.pem"
	membershipFile  = "join.toml" // written last: there is a membership if it exists
	incarnationFile = "incarnation"
	lockFile        = "lock"
	viewDir         = "view"
	viewFile        = "current"
)

const (
	membershipFormat = 1
	maxServers       = 16
)

// Membership is what a relay remembers of its joining.
type Membership struct {
	Format     int         `toml:"format"`
	Cluster    ids.Cluster `toml:"cluster"`
	Node       ids.Node    `toml:"node"`
	Generation uint64      `toml:"generation"`
	Servers    []string    `toml:"servers"` // link addresses, host:port
	JoinedAt   time.Time   `toml:"joined_at"`
	Evicted    *Eviction   `toml:"evicted,omitempty"` // nil while the relay is a member
}

// Eviction is how a membership ended.
type Eviction struct {
	At  time.Time `toml:"at"`  // when this relay was told
	Why string    `toml:"why"` // in the server's words
}

// LoadMembership reads the membership of a data directory. A directory that has
// not joined is fault.NotFound.
func LoadMembership(dir string) (Membership, error) {
	const op = "agent.LoadMembership"
	path := filepath.Join(dir, identityDir, membershipFile)
	var m Membership
	data, err := os.ReadFile(path)
	if os.IsNotExist(err) {
		return m, fault.Wrap(err, fault.NotFound, op, "%s has not joined a cluster: run relais-relay join --token … ADDRESS --data %s", dir, dir)
	}
	if err != nil {
		return m, fault.Wrap(err, fault.Internal, op, "cannot read %s", path)
	}
	if err := toml.Unmarshal(data, &m); err != nil || m.Cluster.IsZero() || m.Node.IsZero() {
		return m, &fault.Error{Kind: fault.Invalid, Op: op, Public: path + " is damaged: restore it, or remove " + filepath.Join(dir, identityDir) + " and join again", Cause: err}
	}
	if m.Format > membershipFormat {
		return m, fault.New(fault.Invalid, op, "%s has format %d, this version knows %d: run a newer version", path, m.Format, membershipFormat)
	}
	return m, nil
}

func (m Membership) save(dir string) error {
	m.Format = membershipFormat
	data, err := toml.Marshal(m)
	if err != nil {
		return fault.Wrap(err, fault.Internal, "agent.Membership.save", "cannot encode the membership")
	}
	return pki.WriteFile(filepath.Join(dir, identityDir, membershipFile), data, 0o600)
}

// grant is a JoinReply that was checked.
type grant struct {
	node       ids.Node
	state      string
	cluster    ids.Cluster
	generation uint64
	chain      []*x509.Certificate
	bundle     []*x509.Certificate
	servers    []string
}

// checkGrant reads a reply and makes sure that its certificate is ours: for our
// key, of the cluster and node it says, and of a CA in its own bundle. With
// pins, one of them must be in the bundle.
func checkGrant(reply *wire.JoinReply, key *pki.NodeKey, pins []pki.Pin, now time.Time) (grant, error) {
	const op = "agent.checkGrant"
	var g grant
	bad := func(cause error, what string) (grant, error) {
		return grant{}, &fault.Error{Kind: fault.Invalid, Op: op, Public: "the server's answer is unusable: " + what, Cause: cause}
	}
	var err error
	if g.chain, err = pki.ParseChain(reply.GetChain()); err != nil {
		return bad(err, "its certificate is damaged")
	}
	if g.bundle, err = pki.ParseChain(reply.GetBundle()); err != nil {
		return bad(err, "its CA bundle is damaged")
	}
	if !key.Owns(g.chain[0]) {
		return bad(nil, "the certificate is for another key")
	}
	identity, err := pki.CertIdentity(g.chain[0])
	if err != nil {
		return bad(err, "the certificate states no identity")
	}
	if err := wire.DecodeID(reply.GetNodeId(), &g.node); err != nil || identity.Node != g.node || identity.Role != pki.RoleRelay {
		return bad(err, "the certificate is for another node")
	}
	if err := wire.DecodeID(reply.GetClusterId(), &g.cluster); err != nil || identity.Cluster != g.cluster {
		return bad(err, "the certificate is of another cluster")
	}
	roots, intermediates := x509.NewCertPool(), x509.NewCertPool()
	pinned := len(pins) == 0
	for _, ca := range g.bundle {
		switch {
		case slices.Contains(pins, pki.PinOf(ca)):
			pinned = true
			roots.AddCert(ca)
		case len(pins) == 0 && string(ca.RawIssuer) == string(ca.RawSubject):
			roots.AddCert(ca)
		default:
			intermediates.AddCert(ca)
		}
	}
	for _, ca := range g.chain[1:] {
		intermediates.AddCert(ca) // newer than the bundle of a server that lags behind
	}
	if !pinned {
		return bad(nil, "its CA bundle lacks the CA that the token names")
	}
	if _, err := g.chain[0].Verify(x509.VerifyOptions{Roots: roots, Intermediates: intermediates, CurrentTime: now, KeyUsages: []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth}}); err != nil {
		return bad(err, "the certificate is not of the cluster's CA")
	}
	g.state, g.generation = reply.GetState(), reply.GetGeneration()
	g.servers = reply.GetServers()[:min(len(reply.GetServers()), maxServers)]
	return g, nil
}

// saveCertificates writes bundle and chain. The bundle goes first: it holds the
// old CAs too, so either order of a crash leaves a working pair.
func saveCertificates(dir string, g grant) error {
	if err := pki.WriteFile(filepath.Join(dir, identityDir, caFile), pki.EncodeCertificates(g.bundle), 0o644); err != nil {
		return err
	}
	return pki.WriteFile(filepath.Join(dir, identityDir, leafFile), pki.EncodeCertificates(g.chain), 0o644)
}

// nextIncarnation counts the starts of this relay, durably: whatever an earlier
// start said or held can be told from what this one says.
func nextIncarnation(dir string) (uint64, error) {
	const op = "agent.nextIncarnation"
	path := filepath.Join(dir, identityDir, incarnationFile)
	var last uint64
	data, err := os.ReadFile(path)
	if err == nil {
		last, err = strconv.ParseUint(strings.TrimSpace(string(data)), 10, 63)
	}
	if err != nil && !os.IsNotExist(err) {
		return 0, fault.Wrap(err, fault.Invalid, op, "%s is damaged: write a number into it that is higher than any before", path)
	}
	next := last + 1
	return next, pki.WriteFile(path, strconv.AppendUint(nil, next, 10), 0o600)
}
