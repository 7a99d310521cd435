package enroll

import (
	"context"

	"google.golang.org/protobuf/proto"

	"github.com/relais-mta/relais/control"
	"github.com/relais-mta/relais/shared/fault"
	"github.com/relais-mta/relais/shared/ids"
	"github.com/relais-mta/relais/shared/link"
	"github.com/relais-mta/relais/shared/pki"
	"github.com/relais-mta/relais/shared/wire"
)

// Servers is what enroll needs to let control servers in.
type Servers interface {
	// RedeemServer commits the use of a token by a control server. The same
	// CSRHash gives the same server again.
	RedeemServer(ctx context.Context, redemption Redemption, at ServerAddresses) (Member, error)
	// ServerSecrets returns what a server of the cluster must have: the
	// key-encryption key, and an API key for its command line.
	ServerSecrets(ctx context.Context, server ids.Node) (kek pki.Key, apiKey string, err error)
	// ServerAddresses returns how the servers of the cluster are reached.
	ServerAddresses() []ServerAddresses
}

// ServerAddresses is how a control server is reached, host:port each, and what
// it can apply.
type ServerAddresses struct {
	Raft, Link, HTTP string
	MaxFSMVersion    uint16
}

// joinServer lets a control server in. The proof was checked: only now, and
// only to the holder of the token at the other end of this very connection, the
// key-encryption key is handed over.
func (s *Server) joinServer(ctx context.Context, session link.Session, request *wire.JoinRequest, redemption Redemption) (*wire.JoinReply, error) {
	const op = "enroll.joinServer"
	at := request.GetServer()
	if s.config.Servers == nil || at == nil {
		return nil, fault.Field(op, "role", "a control server joins with relais-control join, a relay with a token of --role relay")
	}
	for _, address := range []string{at.GetRaft(), at.GetLink(), at.GetHttp()} {
		if err := link.CheckAddress(address); err != nil {
			return nil, err
		}
	}
	if at.GetMaxFsmVersion() > 1<<16-1 {
		return nil, fault.Field(op, "max_fsm_version", "%d is no version", at.GetMaxFsmVersion())
	}
	secret, err := s.config.Members.TokenSecretHash(ctx, redemption.Token)
	if err != nil {
		return nil, err
	}
	member, err := s.config.Servers.RedeemServer(ctx, redemption, ServerAddresses{Raft: at.GetRaft(), Link: at.GetLink(), HTTP: at.GetHttp(), MaxFSMVersion: uint16(at.GetMaxFsmVersion())})
	if err != nil {
		return nil, err
	}
	if member.State == control.NodeEvicted {
		return nil, fault.New(fault.Denied, op, "server %s was removed: empty the data directory and join with a new token", member.Node)
	}
	reply, err := s.certify(ctx, request.GetCsr(), redemption.Role, member)
	if err != nil {
		return nil, err
	}
	kek, apiKey, err := s.config.Servers.ServerSecrets(ctx, member.Node)
	if err != nil {
		return nil, err
	}
	plain, err := proto.Marshal(&wire.ServerSecrets{Kek: kek[:], ApiKey: apiKey})
	if err != nil {
		return nil, fault.Wrap(err, fault.Internal, op, "the server's secrets cannot be encoded")
	}
	sealed, err := link.SealServerSecrets(session, secret, member.Node, plain)
	if err != nil {
		return nil, err
	}
	reply.Server = &wire.ServerGrant{SecretsSealed: sealed}
	for _, one := range s.config.Servers.ServerAddresses() {
		reply.Server.Servers = append(reply.Server.Servers, &wire.ServerAddresses{Raft: one.Raft, Link: one.Link, Http: one.HTTP, MaxFsmVersion: uint32(one.MaxFSMVersion)})
	}
	s.config.Logger.Info("a control server joined", "server", member.Node.String(), "raft", at.GetRaft(), "remote", redemption.Remote.String())
	return reply, nil
}
