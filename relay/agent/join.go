package agent

import (
	"context"
	"crypto/tls"
	"encoding/pem"
	"errors"
	"fmt"
	"log/slog"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"time"

	"github.com/relais-mta/relais/shared/fault"
	"github.com/relais-mta/relais/shared/ids"
	"github.com/relais-mta/relais/shared/link"
	"github.com/relais-mta/relais/shared/pki"
	"github.com/relais-mta/relais/shared/wire"
)

const (
	// maxJoinSkew is how far the clocks may differ at join: certificates are
	// backdated by this much, so beyond it the new one might not work.
	maxJoinSkew = 5 * time.Minute
	csrBlock    = "CERTIFICATE REQUEST"
)

// JoinOptions says how to join.
type JoinOptions struct {
	Token       string   // rl1.…
	Servers     []string // link addresses, host:port, tried in order
	Dir         string   // data directory
	Name        string   // requested node name
	Version     string   // of the software
	Labels      map[string]string
	Addresses   []netip.Addr  // of the host
	Names       pki.Request   // names and addresses under which the relay serves TLS
	Local       netip.Addr    // address to connect from; zero: the kernel chooses
	DialTimeout time.Duration // for one address; 0: link.DefaultDialTimeout
	Logger      *slog.Logger
}

// JoinResult says what came of it.
type JoinResult struct {
	Cluster  ids.Cluster
	Node     ids.Node
	State    string // "active", "pending" until an operator accepts the node, or "member" if Already
	Servers  []string
	Server   string        // that answered
	NotAfter time.Time     // end of the certificate; it is renewed long before
	Already  bool          // the directory was a member before; the token was not used
	Skew     time.Duration // this machine's clock minus the server's
}

// Join makes the machine a relay of the cluster that the token names, and
// writes its identity below Dir. It may be run again after any failure: the
// same key and request are sent, so that an answer that was lost costs no
// second use of the token. A directory that has joined stays as it is.
func Join(ctx context.Context, options JoinOptions) (JoinResult, error) {
	const op = "agent.Join"
	token, err := pki.ParseJoinToken(options.Token)
	if err != nil {
		return JoinResult{}, err
	}
	if token.Role != pki.RoleRelay {
		return JoinResult{}, fault.Field(op, "token", "it lets a control server join (ct1.), this is a relay: make one with relais-control token create --role relay")
	}
	if len(options.Servers) == 0 || len(options.Servers) > maxServers {
		return JoinResult{}, fault.Field(op, "address", "name 1 to %d control servers, each as host:port", maxServers)
	}
	for _, address := range options.Servers {
		if err := link.CheckAddress(address); err != nil {
			return JoinResult{}, err
		}
	}
	j := joiner{options: options, token: token}
	if err := j.prepare(); err != nil {
		return JoinResult{}, err
	}
	dialer := link.NewDialer(link.DialerConfig{Local: options.Local, ResetKey: j.key.Derive(resetPurpose), Timeout: options.DialTimeout})
	defer dialer.Close()
	config := pki.PinnedClientConfig(token.Pins, wire.ALPNJoin)
	var failures []error
	for i, address := range options.Servers {
		result, final, err := j.try(ctx, dialer, address, config)
		if err == nil {
			return result, nil
		}
		if final || ctx.Err() != nil {
			return JoinResult{}, err
		}
		if i+1 < len(options.Servers) {
			options.Logger.Warn("cannot join here, trying the next address", "address", address, "error", err)
		}
		failures = append(failures, err)
	}
	return JoinResult{}, summary(op, failures)
}

// summary makes one error of the failures at all addresses.
func summary(op string, failures []error) error {
	if len(failures) == 1 {
		return failures[0]
	}
	texts := make([]string, 0, len(failures))
	for _, err := range failures {
		texts = append(texts, fault.Public(err))
	}
	return fault.Wrap(errors.Join(failures...), fault.KindOf(failures[0]), op, "no server let this relay join: %s", strings.Join(texts, "; "))
}

// resetPurpose derives the key of stateless resets from the node's key.
const resetPurpose = "quic stateless reset"

type joiner struct {
	options JoinOptions
	token   pki.JoinToken
	key     *pki.NodeKey
	csr     []byte
	member  *Membership // from an earlier join, nil if there is none
	skew    time.Duration
}

// prepare makes directory, key and request, or finds those of an earlier try.
func (j *joiner) prepare() error {
	dir := filepath.Join(j.options.Dir, identityDir)
	if member, err := LoadMembership(j.options.Dir); err == nil && member.Evicted != nil {
		if err := leaveEvicted(j.options.Dir, member); err != nil {
			return err
		}
		j.options.Logger.Info("the identity of the evicted node is set aside, this machine joins as a new one", "evicted", member.Node)
	}
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return fault.Wrap(err, fault.Internal, "agent.Join", "cannot make %s", dir)
	}
	member, err := LoadMembership(j.options.Dir)
	switch {
	case err == nil:
		j.member = &member
	case !fault.Is(err, fault.NotFound):
		return err
	}
	if j.key, err = pki.LoadOrCreateNodeKey(filepath.Join(dir, keyFile)); err != nil {
		return err
	}
	return j.loadOrCreateCSR(filepath.Join(dir, csrFile))
}

func (j *joiner) loadOrCreateCSR(path string) error {
	data, err := os.ReadFile(path)
	if err != nil && !os.IsNotExist(err) {
		return fault.Wrap(err, fault.Internal, "agent.Join", "cannot read %s", path)
	}
	if block, _ := pem.Decode(data); block != nil && block.Type == csrBlock {
		csr, err := pki.ParseCSR(block.Bytes)
		if err == nil && j.key.Private().PublicKey.Equal(csr.PublicKey) {
			j.csr = block.Bytes
			return nil
		}
	}
	if j.csr, err = j.key.CSR(j.options.Names); err != nil {
		return err
	}
	return pki.WriteFile(path, pem.EncodeToMemory(&pem.Block{Type: csrBlock, Bytes: j.csr}), 0o600)
}

// errAlready ends the exchange with a cluster that we belong to.
var errAlready = errors.New("already a member")

// accept decides, before anything of the token is sent, whether this is the
// cluster and the time to join.
func (j *joiner) accept(cluster ids.Cluster, serverTime time.Time) error {
	const op = "agent.Join"
	j.skew = time.Since(serverTime)
	if j.member != nil && j.member.Cluster != cluster {
		return fault.New(fault.Conflict, op, "%s belongs to cluster %s as %s since %s, the token is of cluster %s: use another --data, or remove %s to leave the old cluster",
			j.options.Dir, j.member.Cluster, j.member.Node, j.member.JoinedAt.UTC().Format(time.DateOnly), cluster, filepath.Join(j.options.Dir, identityDir))
	}
	if j.skew.Abs() > maxJoinSkew {
		word := "ahead of"
		if j.skew < 0 {
			word = "behind"
		}
		return fault.New(fault.Denied, op, "this machine's clock is %s %s the server's: set the clock and join again", j.skew.Abs().Round(time.Second), word)
	}
	if j.member != nil {
		if _, err := j.storedLeaf(); err == nil {
			return errAlready
		}
	}
	return nil
}

// storedLeaf returns the end of the stored certificate if it is still good.
func (j *joiner) storedLeaf() (time.Time, error) {
	chain, err := pki.LoadCertificates(filepath.Join(j.options.Dir, identityDir, leafFile))
	if err != nil {
		return time.Time{}, err
	}
	if !j.key.Owns(chain[0]) || time.Now().After(chain[0].NotAfter) {
		return time.Time{}, fault.New(fault.Invalid, "agent.Join", "the stored certificate has ended or is for another key")
	}
	return chain[0].NotAfter, nil
}

// try joins at one server. A final error is one that no other server mends.
func (j *joiner) try(ctx context.Context, dialer *link.Dialer, address string, config *tls.Config) (result JoinResult, final bool, err error) {
	session, err := dialer.Dial(ctx, address, config)
	if err != nil {
		return JoinResult{}, false, explainPin(err, address)
	}
	var refusal error // ours
	accepted := false
	reply, err := link.Join(ctx, session, link.JoinRequest{
		Token: j.token, CSR: j.csr, Name: j.options.Name, Version: j.options.Version, Labels: j.options.Labels, Addresses: j.options.Addresses,
		Accept: func(cluster ids.Cluster, serverTime time.Time) error {
			refusal = j.accept(cluster, serverTime)
			accepted = refusal == nil
			return refusal
		},
	})
	switch {
	case errors.Is(err, errAlready):
		notAfter, err := j.storedLeaf()
		m := j.member
		return JoinResult{Cluster: m.Cluster, Node: m.Node, State: "member", Servers: m.Servers, Server: address, NotAfter: notAfter, Already: true, Skew: j.skew}, true, err
	case err != nil && !accepted:
		return JoinResult{}, refusal != nil, err
	case err != nil:
		return JoinResult{}, isVerdict(err), err
	}
	g, err := checkGrant(reply, j.key, j.token.Pins, time.Now())
	if err != nil {
		return JoinResult{}, true, err
	}
	if err := j.save(g); err != nil {
		return JoinResult{}, true, err
	}
	return JoinResult{Cluster: g.cluster, Node: g.node, State: g.state, Servers: g.servers, Server: address, NotAfter: g.chain[0].NotAfter, Skew: j.skew}, true, nil
}

// save writes what makes the directory a member's; the membership comes last.
func (j *joiner) save(g grant) error {
	if err := saveCertificates(j.options.Dir, g); err != nil {
		return err
	}
	servers := g.servers
	if len(servers) == 0 {
		servers = j.options.Servers
	}
	return Membership{Cluster: g.cluster, Node: g.node, Generation: g.generation, Servers: servers, JoinedAt: time.Now().UTC().Truncate(time.Second)}.save(j.options.Dir)
}

// isVerdict reports whether err is the cluster's decision and not the failure
// of one server.
func isVerdict(err error) bool {
	var e *fault.Error
	return errors.As(err, &e) && e.Op == wire.PeerOp && e.Kind != fault.Unavailable && e.Kind != fault.Timeout && e.Kind != fault.Internal
}

// explainPin words a wrong pin in terms of the token that was pasted.
func explainPin(err error, address string) error {
	var pin *pki.PinError
	if !errors.As(err, &pin) {
		return err
	}
	wanted := make([]string, 0, len(pin.Wanted))
	for _, p := range pin.Wanted {
		wanted = append(wanted, p.String())
	}
	return fault.Wrap(err, fault.Denied, "agent.Join", "%s", fmt.Sprintf(
		"the server at %s presents a CA with pin %s, the token names %s: nothing was sent; check the address, or make a new token on this cluster", address, pin.Presented, strings.Join(wanted, " or ")))
}
