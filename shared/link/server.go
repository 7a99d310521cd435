package link

import (
	"crypto/hmac"
	"crypto/sha256"

	"google.golang.org/protobuf/proto"

	"github.com/relais-mta/relais/shared/fault"
	"github.com/relais-mta/relais/shared/ids"
	"github.com/relais-mta/relais/shared/pki"
	"github.com/relais-mta/relais/shared/wire"
)

// serverSecretsLabel is the exporter label (RFC 8446 section 7.5) of the key
// that a joining server's secrets are sealed under.
const serverSecretsLabel = "EXPORTER-relais-server-secrets"

// serverSealer derives the key from the TLS connection and the token, so that
// it takes both: a relay between the two ends has no part in the first, and
// who merely reaches the port none in the second.
func serverSealer(session Session, tokenSecretHash [32]byte) (*pki.Sealer, error) {
	exporter, err := session.Export(serverSecretsLabel, sha256.Size)
	if err != nil {
		return nil, err
	}
	mac := hmac.New(sha256.New, tokenSecretHash[:])
	mac.Write(exporter)
	var key pki.Key
	mac.Sum(key[:0])
	return pki.NewSealer(key), nil
}

// SealServerSecrets seals an encoded wire.ServerSecrets for the server at the
// other end of the session.
func SealServerSecrets(session Session, tokenSecretHash [32]byte, server ids.Node, plain []byte) ([]byte, error) {
	sealer, err := serverSealer(session, tokenSecretHash)
	if err != nil {
		return nil, err
	}
	return sealer.Seal(plain, server[:])
}

// OpenServerSecrets opens what SealServerSecrets sealed at the other end.
func OpenServerSecrets(session Session, token pki.JoinToken, server ids.Node, sealed []byte) (kek pki.Key, apiKey string, err error) {
	const op = "link.OpenServerSecrets"
	sealer, err := serverSealer(session, token.SecretHash())
	if err != nil {
		return kek, "", err
	}
	plain, err := sealer.Open(sealed, server[:])
	if err != nil {
		return kek, "", fault.Wrap(err, fault.Denied, op, "the server's keys do not open with this connection and token")
	}
	var secrets wire.ServerSecrets
	if err := proto.Unmarshal(plain, &secrets); err != nil || len(secrets.GetKek()) != len(kek) {
		return kek, "", fault.New(fault.Invalid, op, "the server sent no usable key-encryption key")
	}
	copy(kek[:], secrets.GetKek())
	return kek, secrets.GetApiKey(), nil
}
