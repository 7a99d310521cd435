package service

import (
	"context"
	"crypto/rand"

	"github.com/relais-mta/relais/control"
	"github.com/relais-mta/relais/control/auth"
	"github.com/relais-mta/relais/control/command"
	"github.com/relais-mta/relais/control/state"
	"github.com/relais-mta/relais/shared/fault"
	"github.com/relais-mta/relais/shared/ids"
	"github.com/relais-mta/relais/shared/policy"
)

// InitRequest is what a new cluster begins with. The caller has made the CA.
type InitRequest struct {
	Cluster        ids.Cluster
	CABundle       []byte
	CASealed       []byte
	KEKID          string
	RecoverySealed []byte
	Server         control.Server
}

// InitResult holds the secrets that are shown once.
type InitResult struct {
	AdminName     string
	AdminPassword string
	APIKey        string
}

// AdminName is the operator every cluster starts with.
const AdminName = "admin"

// Init fills an empty state: the cluster with its keys, its first server, the
// admin with an API key, the shared pool and a key for return paths.
func (s *Service) Init(ctx context.Context, req InitRequest) (InitResult, error) {
	at := now()
	reason := Change{Reason: "init"}
	cluster := control.Cluster{ID: req.Cluster, Generation: 1, FSMVersion: command.FSMVersion, CreatedAt: at, CABundle: req.CABundle, CASealed: req.CASealed, KEKID: req.KEKID, RecoverySealed: req.RecoverySealed}
	var err error
	if cluster.CredentialKeySealed, err = s.sealedKey(state.CredentialKeyPurpose(req.Cluster)); err != nil {
		return InitResult{}, err
	}
	returnPath := control.ReturnPathKey{ID: 1, CreatedAt: at}
	if returnPath.KeySealed, err = s.sealedKey(state.ReturnPathKeyPurpose(returnPath.ID)); err != nil {
		return InitResult{}, err
	}
	out := InitResult{AdminName: AdminName, AdminPassword: auth.NewPassword()}
	admin := control.Operator{Name: AdminName, Role: control.RoleAdmin, CreatedAt: at}
	stamp(&admin.ID, at)
	if admin.PasswordHash, err = auth.HashPassword(out.AdminPassword); err != nil {
		return InitResult{}, err
	}
	key := control.APIKey{Operator: admin.ID, Name: "init", CreatedAt: at}
	stamp(&key.ID, at)
	out.APIKey, key.SecretHash = auth.NewAPIKey(key.ID)
	pool := control.Pool{Name: control.DefaultPool, Kind: policy.PoolShared, CreatedAt: at}
	stamp(&pool.ID, at)
	for _, cmd := range []command.Command{
		&command.ClusterInit{Meta: reason.meta(System), Cluster: command.ClusterRecord(&cluster)},
		&command.ServerUpsert{Meta: reason.meta(System), Server: command.ServerRecord(&req.Server)},
		&command.OperatorPut{Meta: reason.meta(System), Operator: command.OperatorRecord(&admin)},
		&command.APIKeyPut{Meta: reason.meta(System), Key: command.APIKeyRecord(&key)},
		&command.PoolPut{Meta: reason.meta(System), Pool: command.PoolRecord(&pool)},
		&command.ReturnPathKeyPut{Meta: reason.meta(System), Key: command.ReturnPathKeyRecord(&returnPath)},
	} {
		if _, err := s.log.Propose(ctx, cmd); err != nil {
			return InitResult{}, err
		}
	}
	return out, nil
}

// sealedKey returns 32 fresh random bytes, sealed for a purpose.
func (s *Service) sealedKey(purpose []byte) ([]byte, error) {
	var key [32]byte
	_, _ = rand.Read(key[:]) // documented never to return an error
	sealed, err := s.sealer.Seal(key[:], purpose)
	return sealed, fault.Wrap(err, fault.Internal, "service.sealedKey", "a key cannot be sealed")
}
