package pki

import (
	"crypto/tls"
	"crypto/x509"
	"slices"
	"strings"
	"time"

	"github.com/relais-mta/relais/shared/fault"
	"github.com/relais-mta/relais/shared/ids"
)

// RenewGrace is how long after its end a certificate still opens the renewal
// endpoint: a relay that was cut off for weeks comes back by itself.
const RenewGrace = 30 * 24 * time.Hour

// Peer says whom we accept at the other end.
type Peer struct {
	Cluster ids.Cluster
	Role    Role          // of the peer; empty: any node of the cluster
	Grace   time.Duration // accept a leaf that ended at most this long ago
	// Known accepts a leaf of an issuing CA that is believed no more, because
	// who presents it is otherwise known to hold its key. nil: nobody is. The
	// chain, role and cluster were checked before.
	Known func(identity Identity, leaf *x509.Certificate) bool
}

// base holds what every configuration of ours has: TLS 1.3 alone, and no
// session tickets, because a resumed session skips the check of the chain, so
// a removed CA would live on in it. Without tickets there is no 0-RTT either.
func base(alpn []string) *tls.Config {
	return &tls.Config{
		MinVersion:             tls.VersionTLS13,
		NextProtos:             alpn,
		SessionTicketsDisabled: true,
	}
}

// ServerConfig is for listeners whose clients are nodes: mutual TLS.
func ServerConfig(h *Holder, peer Peer, alpn ...string) *tls.Config {
	config := base(alpn)
	config.GetCertificate = h.GetCertificate
	config.ClientAuth = tls.RequireAnyClientCert // checked below, by id and not by host name
	config.VerifyConnection = func(state tls.ConnectionState) error {
		return h.verify(state.PeerCertificates, peer, x509.ExtKeyUsageClientAuth, time.Now())
	}
	return config
}

// OpenServerConfig is for listeners whose clients have no certificate: joining
// nodes, the management API. The chain it presents ends in the root, so that a
// client can compare pins.
func OpenServerConfig(h *Holder, alpn ...string) *tls.Config {
	config := base(alpn)
	config.GetCertificate = func(*tls.ClientHelloInfo) (*tls.Certificate, error) {
		current := h.current.Load()
		withRoot := *current.cert
		for _, ca := range current.trust.Bundle {
			if isSelfSigned(ca) && !slices.ContainsFunc(withRoot.Certificate, func(der []byte) bool { return string(der) == string(ca.Raw) }) {
				withRoot.Certificate = append(slices.Clip(withRoot.Certificate), ca.Raw)
			}
		}
		return &withRoot, nil
	}
	return config
}

// ByALPN chooses among configurations by the first protocol that the client
// offers and we have, so that one port serves several protocols with different
// rules about client certificates.
func ByALPN(configs map[string]*tls.Config) *tls.Config {
	names := make([]string, 0, len(configs))
	for name := range configs {
		names = append(names, name)
	}
	slices.Sort(names)
	config := base(names)
	config.GetConfigForClient = func(hello *tls.ClientHelloInfo) (*tls.Config, error) {
		for _, name := range hello.SupportedProtos {
			if chosen, ok := configs[name]; ok {
				return chosen, nil
			}
		}
		return nil, fault.New(fault.Invalid, "pki.ByALPN", "the client offers none of the protocols %s", strings.Join(names, ", "))
	}
	return config
}

// ClientConfig is for connections from node to node: mutual TLS. The peer is
// known by its id, not by a host name, because servers are reached by address.
func ClientConfig(h *Holder, peer Peer, alpn ...string) *tls.Config {
	config := base(alpn)
	config.GetClientCertificate = func(*tls.CertificateRequestInfo) (*tls.Certificate, error) {
		return h.Certificate(), nil
	}
	config.InsecureSkipVerify = true // replaced by the stricter check below
	config.VerifyConnection = func(state tls.ConnectionState) error {
		return h.verify(state.PeerCertificates, peer, x509.ExtKeyUsageServerAuth, time.Now())
	}
	return config
}

// PinnedClientConfig is for a client that knows only the pin of the cluster's
// CA: a joining node, the command line. The handshake fails, and so nothing of
// the client's is sent, unless a control server of that CA answers.
func PinnedClientConfig(pins []Pin, alpn ...string) *tls.Config {
	config := base(alpn)
	config.InsecureSkipVerify = true // replaced by the stricter check below
	config.VerifyConnection = func(state tls.ConnectionState) error {
		return verifyPinned(state.PeerCertificates, pins, time.Now())
	}
	return config
}

// PinError says that another CA answered than the one expected.
type PinError struct {
	Presented Pin
	Wanted    []Pin
}

// Error names both pins.
func (e *PinError) Error() string {
	wanted := make([]string, 0, len(e.Wanted))
	for _, pin := range e.Wanted {
		wanted = append(wanted, pin.String())
	}
	return "the server presents a CA with pin " + e.Presented.String() + ", expected " + strings.Join(wanted, " or ")
}

// verify checks a peer's chain, role and cluster at one moment.
func (h *Holder) verify(chain []*x509.Certificate, peer Peer, usage x509.ExtKeyUsage, now time.Time) error {
	const op = "pki.verify"
	if len(chain) == 0 {
		return fault.New(fault.Unauthenticated, op, "the peer presents no certificate")
	}
	leaf := chain[0]
	at := now
	if at.After(leaf.NotAfter) && !at.After(leaf.NotAfter.Add(peer.Grace)) {
		at = leaf.NotAfter // the CAs above it must have been good then
	}
	current := h.current.Load()
	intermediates := current.extra.Clone()
	for _, cert := range chain[1:] {
		intermediates.AddCert(cert)
	}
	chains, err := checkChain(leaf, current.roots, intermediates, usage, at)
	if err != nil {
		return err
	}
	identity, err := CertIdentity(leaf)
	if err != nil {
		return err
	}
	if identity.Cluster != peer.Cluster {
		return fault.New(fault.Denied, op, "the peer belongs to cluster %s, we to %s", identity.Cluster, peer.Cluster)
	}
	if peer.Role != "" && identity.Role != peer.Role {
		return fault.New(fault.Denied, op, "the peer is a %s node, want a %s node", identity.Role, peer.Role)
	}
	if err := current.trust.revoked(leaf, identity); err != nil {
		return err
	}
	if !slices.ContainsFunc(chains, current.acceptsChain) && (peer.Known == nil || !peer.Known(identity, leaf)) {
		return fault.New(fault.Denied, op, "the peer's certificate is of an issuing CA (%s) that the cluster has dropped: the peer has to renew it", IssuerKeyID(leaf))
	}
	return nil
}

// verifyPinned checks that the chain leads to a CA with one of the pins and
// that its leaf is a control server.
func verifyPinned(chain []*x509.Certificate, pins []Pin, now time.Time) error {
	const op = "pki.verifyPinned"
	if len(chain) == 0 {
		return fault.New(fault.Unauthenticated, op, "the server presents no certificate")
	}
	roots, intermediates := x509.NewCertPool(), x509.NewCertPool()
	found := false
	for _, cert := range chain[1:] {
		intermediates.AddCert(cert)
		if cert.IsCA && slices.Contains(pins, PinOf(cert)) {
			roots.AddCert(cert)
			found = true
		}
	}
	if !found {
		return &PinError{Presented: PinOf(chain[len(chain)-1]), Wanted: pins}
	}
	if _, err := checkChain(chain[0], roots, intermediates, x509.ExtKeyUsageServerAuth, now); err != nil {
		return err
	}
	identity, err := CertIdentity(chain[0])
	if err != nil {
		return err
	}
	if identity.Role != RoleControl {
		return fault.New(fault.Denied, op, "the server is a %s node, want a control server", identity.Role)
	}
	return nil
}

// checkChain runs the chain check of RFC 5280 section 6, returns the chains from
// leaf to root, and explains the commonest failure, a wrong clock.
func checkChain(leaf *x509.Certificate, roots, intermediates *x509.CertPool, usage x509.ExtKeyUsage, now time.Time) ([][]*x509.Certificate, error) {
	const op = "pki.checkChain"
	chains, err := leaf.Verify(x509.VerifyOptions{
		Roots: roots, Intermediates: intermediates, CurrentTime: now, KeyUsages: []x509.ExtKeyUsage{usage},
	})
	if err == nil {
		return chains, nil
	}
	const layout = time.RFC3339
	switch {
	case now.Before(leaf.NotBefore):
		return nil, fault.Wrap(err, fault.Denied, op, "the peer's certificate begins at %s, but this machine's clock says %s: set the clock",
			leaf.NotBefore.UTC().Format(layout), now.UTC().Format(layout))
	case now.After(leaf.NotAfter):
		return nil, fault.Wrap(err, fault.Denied, op, "the peer's certificate ended at %s and this machine's clock says %s: set the clock, or let the peer renew",
			leaf.NotAfter.UTC().Format(layout), now.UTC().Format(layout))
	}
	return nil, fault.Wrap(err, fault.Denied, op, "the peer's certificate is not of a CA we believe")
}
