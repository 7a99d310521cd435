// Package enroll lets machines in: it checks join tokens and certificate
// requests, has the redemption committed, and hands out certificates, and it
// renews them. It is the only part of control that talks to peers without a
// certificate, so everything here is bounded and says little before a peer has
// proved that it knows a token.
package enroll

import (
	"context"
	"crypto/hmac"
	"crypto/sha256"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"log/slog"
	"net/netip"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"google.golang.org/protobuf/proto"

	"github.com/relais-mta/relais/control"
	"github.com/relais-mta/relais/shared/fault"
	"github.com/relais-mta/relais/shared/ids"
	"github.com/relais-mta/relais/shared/link"
	"github.com/relais-mta/relais/shared/pki"
	"github.com/relais-mta/relais/shared/wire"
)

const (
	exchangeTimeout = 15 * time.Second // for one join or renewal, commit included
	lingerTimeout   = 2 * time.Second  // for the peer to take the answer and close
	maxExchanges    = 64               // at once; more are told to come back
	maxNameBytes    = 253
	maxVersionBytes = 64
	maxLabels       = 32
	maxLabelBytes   = 255
	maxAddresses    = 4096
)

// Members is what enroll needs of the replicated state.
type Members interface {
	// TokenSecretHash returns SHA-256 of a token's secret, fault.NotFound or
	// fault.Unauthenticated for an unknown token.
	TokenSecretHash(ctx context.Context, id ids.Token) ([32]byte, error)
	// Redeem commits the use of a token. The same CSRHash gives the same node
	// again. Its errors are for the peer: expired, used up, address not allowed.
	Redeem(ctx context.Context, redemption Redemption) (Member, error)
	// Member returns a node, of either role, fault.NotFound for an unknown one.
	Member(ctx context.Context, node ids.Node) (Member, error)
	// SetCertificate commits which certificate a node has.
	SetCertificate(ctx context.Context, certificate Certificate) error
	// LinkServers returns the link addresses of all servers, host:port.
	LinkServers(ctx context.Context) ([]string, error)
	// Generation is the cluster's.
	Generation() uint64
}

// Redemption is the use of a token by a machine that has proved to know it.
type Redemption struct {
	Token     ids.Token
	CSRHash   [32]byte // SHA-256 of the certificate request
	Role      pki.Role
	Name      string
	Remote    netip.Addr // where the request came from
	Labels    map[string]string
	Version   string
	Addresses []netip.Addr
}

// Member is a node as enroll sees it.
type Member struct {
	Node  ids.Node
	State control.NodeState
	SPKI  []byte // SHA-256 of the SubjectPublicKeyInfo of its certificate; nil if none is known
}

// Certificate is what is recorded of a certificate.
type Certificate struct {
	Node     ids.Node
	Role     pki.Role
	Serial   string // hexadecimal
	SPKI     [32]byte
	NotAfter time.Time
}

// Signer is what enroll needs of the CA; *ca.Authority is one.
type Signer interface {
	Sign(csr []byte, role pki.Role, node ids.Node, now time.Time) ([]*x509.Certificate, error)
	Bundle() []*x509.Certificate
}

// Config configures a Server. All fields but Servers are required.
type Config struct {
	Cluster    ids.Cluster
	Members    Members
	Servers    Servers // nil: no control servers join here
	Signer     Signer
	Version    string // of the software
	Logger     *slog.Logger
	Registerer prometheus.Registerer
}

// Server handles joins and renewals. It is safe for concurrent use.
type Server struct {
	config    Config
	failures  *failureLimit
	exchanges chan struct{}
	outcomes  *prometheus.CounterVec
}

// New returns a server.
func New(config Config) (*Server, error) {
	s := &Server{
		config:    config,
		failures:  newFailureLimit(),
		exchanges: make(chan struct{}, maxExchanges),
		outcomes: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "relais_control_enrollments_total",
			Help: "Joins and renewals by result (ok, left by the machine, or the kind of the refusal).",
		}, []string{"exchange", "result"}),
	}
	if err := config.Registerer.Register(s.outcomes); err != nil {
		return nil, fault.Wrap(err, fault.Internal, "enroll.New", "cannot register metrics")
	}
	return s, nil
}

// handshakeGrace lets a certificate through the handshake that ended long before
// pki.RenewGrace, so that renew can say in words what is to be done; a handshake
// that fails leaves the relay with an alert.
const handshakeGrace = 10 * 365 * 24 * time.Hour

// TLSConfig is for the listener that carries joins, links and renewals on one
// port: only joins come without a certificate, and only renewals with one that
// has ended, or that is of an issuing CA that was dropped: known says whether
// such a one is of a node whose key is on record.
func TLSConfig(holder *pki.Holder, cluster ids.Cluster, known func(pki.Identity, *x509.Certificate) bool) *tls.Config {
	return pki.ByALPN(map[string]*tls.Config{
		wire.ALPNJoin:  pki.OpenServerConfig(holder, wire.ALPNJoin),
		wire.ALPNLink:  pki.ServerConfig(holder, pki.Peer{Cluster: cluster, Role: pki.RoleRelay}, wire.ALPNLink),
		wire.ALPNRenew: pki.ServerConfig(holder, pki.Peer{Cluster: cluster, Grace: handshakeGrace, Known: known}, wire.ALPNRenew),
	})
}

// errEvicted is the cause of refusals that end a membership for good.
var errEvicted = errors.New("evicted")

// Join is the link.Handler of wire.ALPNJoin.
func (s *Server) Join(ctx context.Context, session link.Session) (link.Code, string) {
	return s.serve(ctx, session, "join", s.join)
}

// Renew is the link.Handler of wire.ALPNRenew.
func (s *Server) Renew(ctx context.Context, session link.Session) (link.Code, string) {
	return s.serve(ctx, session, "renew", s.renew)
}

// serve runs one exchange: it answers with the reply or with the refusal, and
// waits for the peer to have it.
func (s *Server) serve(ctx context.Context, session link.Session, name string, exchange func(context.Context, link.Session, *wire.Conn) (*wire.JoinReply, error)) (link.Code, string) {
	select {
	case s.exchanges <- struct{}{}:
		defer func() { <-s.exchanges }()
	default:
		return link.CodeBusy, "too many machines are joining: try again in a moment"
	}
	ctx, cancel := context.WithTimeout(ctx, exchangeTimeout)
	defer cancel()
	stream, err := session.AcceptStream(ctx)
	if err == nil {
		err = stream.SetDeadline(time.Now().Add(exchangeTimeout))
	}
	if err != nil {
		return link.CodeProtocol, "no request came"
	}
	conn := wire.NewConn(stream, wire.MaxJoinFrameBytes)
	var answer proto.Message
	answer, err = exchange(ctx, session, conn)
	log := s.config.Logger.With("exchange", name, "remote", session.RemoteAddr().String())
	result := "ok"
	if closed, ok := link.ClosedByPeer(session.Err()); err != nil && ok && closed.Code == link.CodeDone {
		s.outcomes.WithLabelValues(name, "left").Inc()
		log.Debug("the machine went away: a member already, or it does not like what it saw")
		return link.CodeDone, ""
	}
	if err != nil {
		result = fault.KindOf(err).String()
		log.Warn("enrollment refused", "error", err)
		answer = wire.NewError(err)
	}
	if errors.Is(err, errEvicted) {
		s.outcomes.WithLabelValues(name, result).Inc()
		return link.CodeEvicted, fault.Public(err) // the code says it, and nothing else does
	}
	s.outcomes.WithLabelValues(name, result).Inc()
	if err := conn.Send(answer); err != nil {
		log.Info("the answer did not reach the peer", "error", err)
	}
	_ = stream.Close() // the answer is on its way
	linger, done := context.WithTimeout(ctx, lingerTimeout)
	defer done()
	select {
	case <-session.Done():
	case <-linger.Done():
	}
	return link.CodeDone, ""
}

// greet receives the peer's preface and sends ours.
func (s *Server) greet(conn *wire.Conn) error {
	theirs, err := wire.Expect[*wire.Preface](conn)
	if err != nil {
		return err
	}
	if _, err := wire.Negotiate(theirs); err != nil {
		return err
	}
	return conn.Send(&wire.Preface{
		ProtocolMin: wire.ProtocolMin, ProtocolMax: wire.ProtocolMax,
		ClusterId: s.config.Cluster[:], Generation: s.config.Members.Generation(), Version: s.config.Version,
	})
}

func (s *Server) join(ctx context.Context, session link.Session, conn *wire.Conn) (*wire.JoinReply, error) {
	const op = "enroll.Join"
	remote := session.RemoteAddr().Addr()
	if wait := s.failures.blocked(remote, time.Now()); wait > 0 {
		return nil, fault.New(fault.Exhausted, op, "too many failed attempts to join from %s: wait %s", remote, wait.Round(time.Second))
	}
	if err := s.greet(conn); err != nil {
		return nil, err
	}
	if err := conn.Send(&wire.JoinChallenge{ClusterId: s.config.Cluster[:], ServerTimeMs: time.Now().UnixMilli()}); err != nil {
		return nil, err
	}
	request, err := wire.Expect[*wire.JoinRequest](conn)
	if err != nil {
		return nil, err
	}
	redemption, err := readRequest(request, remote)
	if err != nil {
		return nil, err
	}
	if err := s.prove(ctx, session, redemption, request.GetProof()); err != nil {
		if fault.Is(err, fault.Unauthenticated) {
			s.failures.failed(remote, time.Now())
		}
		return nil, err
	}
	if _, err := pki.ParseCSR(request.GetCsr()); err != nil {
		return nil, err // before a use of the token is spent on it
	}
	if redemption.Role == pki.RoleControl {
		return s.joinServer(ctx, session, request, redemption)
	}
	member, err := s.config.Members.Redeem(ctx, redemption)
	if err != nil {
		return nil, err
	}
	if !member.State.Connects() && member.State != control.NodePending {
		return nil, fault.New(fault.Denied, op, "this key belongs to %s, which is %s: to join as a new node remove the identity directory of the machine", member.Node, member.State)
	}
	return s.certify(ctx, request.GetCsr(), redemption.Role, member)
}

// prove checks the proof. An unknown token and a wrong secret are one error,
// found with the same work, so that neither can be told from outside.
func (s *Server) prove(ctx context.Context, session link.Session, redemption Redemption, proof []byte) error {
	const op = "enroll.prove"
	exporter, err := session.Export(pki.ExporterLabel, pki.ExporterBytes)
	if err != nil {
		return err
	}
	secret, err := s.config.Members.TokenSecretHash(ctx, redemption.Token)
	known := err == nil
	if !known && !fault.Is(err, fault.NotFound) && !fault.Is(err, fault.Unauthenticated) {
		return err
	}
	if !known {
		secret = sha256.Sum256(redemption.Token[:])
	}
	want := pki.Proof(secret, exporter, redemption.CSRHash, redemption.Role)
	if !hmac.Equal(want[:], proof) || !known {
		return fault.Wrap(errors.New("token "+redemption.Token.String()), fault.Unauthenticated, op,
			"the token is not known here or its secret is wrong: paste the whole token, or make a new one with relais-control token create")
	}
	return nil
}

func (s *Server) renew(ctx context.Context, session link.Session, conn *wire.Conn) (*wire.JoinReply, error) {
	const op = "enroll.Renew"
	identity, err := link.PeerIdentity(session)
	if err != nil {
		return nil, err
	}
	if err := s.greet(conn); err != nil {
		return nil, err
	}
	request, err := wire.Expect[*wire.RenewRequest](conn)
	if err != nil {
		return nil, err
	}
	member, err := s.config.Members.Member(ctx, identity.Node)
	if err != nil {
		return nil, err
	}
	if member.State == control.NodeEvicted {
		return nil, fault.Wrap(errEvicted, fault.Denied, op, "%s was evicted from the cluster: its certificate is not renewed, join again with a new token", identity.Node)
	}
	if !member.State.Connects() {
		return nil, fault.New(fault.Denied, op, "%s is %s: its certificate is not renewed", identity.Node, member.State)
	}
	csr, err := pki.ParseCSR(request.GetCsr())
	if err != nil {
		return nil, err
	}
	held := session.PeerCertificate()
	if over := time.Since(held.NotAfter); over > pki.RenewGrace {
		return nil, fault.New(fault.Denied, op, "the certificate of %s ended %d days ago and is renewed for %d days at most: join again with a new token from relais-control token create --role relay",
			identity.Node, over/(24*time.Hour), pki.RenewGrace/(24*time.Hour))
	}
	pin := pki.PinOf(held)
	if member.SPKI != nil && string(member.SPKI) != string(pin[:]) {
		return nil, fault.New(fault.Denied, op, "%s has another key by now: its certificate is not renewed", identity.Node)
	}
	if string(csr.RawSubjectPublicKeyInfo) != string(held.RawSubjectPublicKeyInfo) {
		return nil, fault.New(fault.Denied, op, "the request is for another key than the certificate of %s: join again for a new key", identity.Node)
	}
	return s.certify(ctx, request.GetCsr(), identity.Role, member)
}

// certify signs, has the certificate recorded, and words the answer.
func (s *Server) certify(ctx context.Context, csr []byte, role pki.Role, member Member) (*wire.JoinReply, error) {
	chain, err := s.config.Signer.Sign(csr, role, member.Node, time.Now())
	if err != nil {
		return nil, err
	}
	leaf := chain[0]
	if err := s.config.Members.SetCertificate(ctx, Certificate{
		Node: member.Node, Role: role, Serial: leaf.SerialNumber.Text(16), SPKI: pki.PinOf(leaf), NotAfter: leaf.NotAfter,
	}); err != nil {
		return nil, err
	}
	servers, err := s.config.Members.LinkServers(ctx)
	if err != nil {
		return nil, err
	}
	s.config.Logger.Info("certificate issued", "node", member.Node.String(), "role", string(role), "state", string(member.State), "not_after", leaf.NotAfter)
	return &wire.JoinReply{
		NodeId: member.Node[:], State: string(member.State),
		Chain: pki.RawCertificates(chain), Bundle: pki.RawCertificates(s.config.Signer.Bundle()),
		Servers: servers, ClusterId: s.config.Cluster[:], Generation: s.config.Members.Generation(),
	}, nil
}
