// Package auth makes and checks the secrets by which people and programs prove
// who they are to the control plane: API keys and SMTP credentials, which are
// generated, and console passwords, which people choose. What it returns for
// storing never lets one log in by itself.
package auth

import (
	"crypto/hmac"
	"crypto/rand"
	"crypto/sha256"
	"crypto/subtle"
	"encoding/base32"
	"encoding/base64"
	"fmt"
	"strings"

	"golang.org/x/crypto/argon2"

	"github.com/relais-mta/relais/shared/fault"
	"github.com/relais-mta/relais/shared/ids"
)

// secretBytes is the entropy of a generated secret, in bytes.
const secretBytes = 32

// maxSecretTextBytes bounds what is hashed when a secret is checked.
const maxSecretTextBytes = 256

// The prefixes tell a found secret's kind, to people and to secret scanners.
const (
	apiKeyPrefix     = "rk1"
	credentialPrefix = "rs1_"
)

var base32Text = base32.StdEncoding.WithPadding(base32.NoPadding)

// random returns n random bytes in base32, lower case.
func random(n int) string {
	b := make([]byte, n)
	_, _ = rand.Read(b) // documented never to return an error
	return strings.ToLower(base32Text.EncodeToString(b))
}

// NewAPIKey returns the text of a new API key, shown once, and the hash to store.
func NewAPIKey(id ids.Key) (key string, hash [32]byte) {
	secret := random(secretBytes)
	return apiKeyPrefix + "." + id.String() + "." + secret, sha256.Sum256([]byte(secret))
}

// ParseAPIKey returns the id and the hash of the secret of a presented key.
func ParseAPIKey(key string) (id ids.Key, hash [32]byte, err error) {
	bad := fault.New(fault.Unauthenticated, "auth.ParseAPIKey", "the API key is malformed: it looks like rk1.key_….…")
	parts := strings.Split(key, ".")
	if len(key) > maxSecretTextBytes || len(parts) != 3 || parts[0] != apiKeyPrefix || parts[2] == "" {
		return id, hash, bad
	}
	if err := id.UnmarshalText([]byte(parts[1])); err != nil || id.IsZero() {
		return id, hash, bad
	}
	return id, sha256.Sum256([]byte(parts[2])), nil
}

// Equal compares two hashes in constant time.
func Equal(a, b [32]byte) bool { return subtle.ConstantTimeCompare(a[:], b[:]) == 1 }

// NewCredentialSecret returns a new SMTP secret, shown once, and what to store:
// its HMAC under the cluster's credential key. A relay can check it without
// being slowed by a password hash, and a stolen state is no use without the key.
func NewCredentialSecret(key [32]byte) (secret string, hash [32]byte) {
	secret = credentialPrefix + random(secretBytes)
	return secret, CredentialHash(key, secret)
}

// CredentialHash returns the HMAC-SHA-256 of a secret under the credential key.
func CredentialHash(key [32]byte, secret string) [32]byte {
	mac := hmac.New(sha256.New, key[:])
	mac.Write([]byte(secret))
	return [32]byte(mac.Sum(nil))
}

// NewPassword returns a generated password of 100 bits for a first login.
func NewPassword() string {
	text := random(13)[:20]
	return text[:5] + "-" + text[5:10] + "-" + text[10:15] + "-" + text[15:]
}

// NewOwnershipToken returns the text a tenant publishes to prove a domain its own.
func NewOwnershipToken() string { return random(20) }

// The argon2id costs (RFC 9106 section 4, second recommended option).
const (
	argonMemoryKiB = 64 << 10
	argonPasses    = 3
	argonLanes     = 4
	argonSaltBytes = 16
	argonKeyBytes  = 32
)

const (
	minPasswordBytes = 10
	maxPasswordBytes = 128
)

var b64 = base64.RawStdEncoding

// HashPassword returns the argon2id hash of a password in the usual text form.
func HashPassword(password string) (string, error) {
	if len(password) < minPasswordBytes || len(password) > maxPasswordBytes {
		return "", fault.Field("auth.HashPassword", "password", "has %d bytes: choose %d to %d", len(password), minPasswordBytes, maxPasswordBytes)
	}
	salt := make([]byte, argonSaltBytes)
	_, _ = rand.Read(salt) // documented never to return an error
	sum := argon2.IDKey([]byte(password), salt, argonPasses, argonMemoryKiB, argonLanes, argonKeyBytes)
	return fmt.Sprintf("$argon2id$v=%d$m=%d,t=%d,p=%d$%s$%s", argon2.Version, argonMemoryKiB, argonPasses, argonLanes, b64.EncodeToString(salt), b64.EncodeToString(sum)), nil
}

// CheckPassword reports whether the password is the one that was hashed.
func CheckPassword(hash, password string) bool {
	var version, memory, passes int
	var lanes uint8
	parts := strings.Split(hash, "$")
	if len(parts) != 6 || parts[1] != "argon2id" || len(password) > maxPasswordBytes {
		return false
	}
	if _, err := fmt.Sscanf(parts[2], "v=%d", &version); err != nil || version != argon2.Version {
		return false
	}
	if _, err := fmt.Sscanf(parts[3], "m=%d,t=%d,p=%d", &memory, &passes, &lanes); err != nil || memory < 8 || memory > 1<<20 || passes < 1 || passes > 16 || lanes < 1 {
		return false
	}
	salt, err := b64.DecodeString(parts[4])
	if err != nil {
		return false
	}
	want, err := b64.DecodeString(parts[5])
	if err != nil || len(want) != argonKeyBytes {
		return false
	}
	got := argon2.IDKey([]byte(password), salt, uint32(passes), uint32(memory), lanes, uint32(len(want)))
	return subtle.ConstantTimeCompare(got, want) == 1
}
