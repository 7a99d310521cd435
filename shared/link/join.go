package link

import (
	"context"
	"crypto/sha256"
	"errors"
	"net/netip"
	"time"

	"google.golang.org/protobuf/proto"

	"github.com/relais-mta/relais/shared/fault"
	"github.com/relais-mta/relais/shared/ids"
	"github.com/relais-mta/relais/shared/pki"
	"github.com/relais-mta/relais/shared/wire"
)

// joinTimeout bounds a join or a renewal once the session stands. The server
// commits to raft meanwhile.
const joinTimeout = 20 * time.Second

// JoinRequest is what a machine says to become a node. Relays and control
// servers join alike.
type JoinRequest struct {
	Token     pki.JoinToken
	CSR       []byte // PKCS #10 in DER; the same bytes at each try, so that a lost answer costs nothing
	Name      string // requested node name
	Version   string // of the software
	Labels    map[string]string
	Addresses []netip.Addr          // of the host
	Server    *wire.ServerAddresses // of a control server; nil for a relay

	// Accept is asked, before anything about the token is sent, whether to go
	// on with this cluster and its clock.
	Accept func(cluster ids.Cluster, serverTime time.Time) error
}

// Join asks for membership over a session with wire.ALPNJoin, whose TLS
// configuration has verified the pin. A refusal by the server is the fault that
// it sent.
func Join(ctx context.Context, session Session, request JoinRequest) (*wire.JoinReply, error) {
	conn, end, err := openFirst(ctx, session)
	if err != nil {
		return nil, err
	}
	defer end()
	if err := greet(conn, session, request.Version); err != nil {
		return nil, err
	}
	challenge, err := expect[*wire.JoinChallenge](conn, session)
	if err != nil {
		return nil, err
	}
	var cluster ids.Cluster
	if err := wire.DecodeID(challenge.GetClusterId(), &cluster); err != nil {
		return nil, err
	}
	if err := request.Accept(cluster, time.UnixMilli(challenge.GetServerTimeMs())); err != nil {
		return nil, err
	}
	exporter, err := session.Export(pki.ExporterLabel, pki.ExporterBytes)
	if err != nil {
		return nil, err
	}
	proof := pki.Proof(request.Token.SecretHash(), exporter, sha256.Sum256(request.CSR), request.Token.Role)
	if err := conn.Send(&wire.JoinRequest{
		TokenId: request.Token.ID[:], Role: string(request.Token.Role), Csr: request.CSR, Proof: proof[:],
		Name: request.Name, Version: request.Version, Labels: request.Labels, Addresses: wire.EncodeAddresses(request.Addresses),
		Server: request.Server,
	}); err != nil {
		return nil, ended(session, err)
	}
	return expect[*wire.JoinReply](conn, session)
}

// Renew asks for a new certificate over a session with wire.ALPNRenew.
func Renew(ctx context.Context, session Session, csr []byte, version string) (*wire.JoinReply, error) {
	conn, end, err := openFirst(ctx, session)
	if err != nil {
		return nil, err
	}
	defer end()
	if err := greet(conn, session, version); err != nil {
		return nil, err
	}
	if err := conn.Send(&wire.RenewRequest{Csr: csr}); err != nil {
		return nil, ended(session, err)
	}
	return expect[*wire.JoinReply](conn, session)
}

// openFirst opens the only stream of a join or renewal. The returned function
// ends the session, which tells the server that its answer has arrived.
func openFirst(ctx context.Context, session Session) (*wire.Conn, func(), error) {
	ctx, cancel := context.WithTimeout(ctx, joinTimeout)
	stream, err := session.OpenStream(ctx)
	if err == nil {
		err = stream.SetDeadline(time.Now().Add(joinTimeout))
	}
	if err != nil {
		cancel()
		return nil, nil, err
	}
	stop := context.AfterFunc(ctx, func() { session.Close(CodeDone, "given up") })
	return wire.NewConn(stream, wire.MaxJoinFrameBytes), func() {
		stop()
		cancel()
		session.Close(CodeDone, "")
	}, nil
}

// greet exchanges prefaces and checks that a version is shared.
func greet(conn *wire.Conn, session Session, version string) error {
	mine := &wire.Preface{ProtocolMin: wire.ProtocolMin, ProtocolMax: wire.ProtocolMax, Version: version}
	if err := conn.Send(mine); err != nil {
		return ended(session, err)
	}
	theirs, err := expect[*wire.Preface](conn, session)
	if err != nil {
		return err
	}
	_, err = wire.Negotiate(theirs)
	return err
}

func expect[T proto.Message](conn *wire.Conn, session Session) (T, error) {
	message, err := wire.Expect[T](conn)
	return message, ended(session, err)
}

// ended prefers the reason why a session ended over the broken stream that it
// left behind. A refusal that the peer sent in a frame stays as it is.
func ended(session Session, err error) error {
	var refused *fault.Error
	if err == nil || errors.As(err, &refused) && refused.Op == wire.PeerOp {
		return err
	}
	if reason := session.Err(); reason != nil {
		return reason
	}
	return err
}
