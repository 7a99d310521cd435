package auth

import (
	"crypto/sha256"
	"strings"
	"testing"

	"github.com/relais-mta/relais/shared/fault"
	"github.com/relais-mta/relais/shared/ids"
)

func TestAPIKey(t *testing.T) {
	id := ids.Key{1, 2, 3}
	key, hash := NewAPIKey(id)
	gotID, gotHash, err := ParseAPIKey(key)
	if err != nil || gotID != id || !Equal(gotHash, hash) {
		t.Fatalf("%s reads as %s, %v", key, gotID, err)
	}
	if again, _ := NewAPIKey(id); again == key {
		t.Error("two keys are the same")
	}
	for _, bad := range []string{"", "rk1", "rk1..", "rk1." + id.String() + ".", "rk2" + key[3:], key + ".x", "rk1.tok_x.y", key + strings.Repeat("a", maxSecretTextBytes)} {
		if _, _, err := ParseAPIKey(bad); !fault.Is(err, fault.Unauthenticated) {
			t.Errorf("%q: %v", bad, err)
		}
	}
	if Equal(hash, sha256.Sum256([]byte("other"))) {
		t.Error("different hashes are equal")
	}
}

func TestCredentialSecret(t *testing.T) {
	key := [32]byte{1}
	secret, hash := NewCredentialSecret(key)
	if !strings.HasPrefix(secret, "rs1_") || len(secret) != 4+52 || strings.ToLower(secret) != secret {
		t.Errorf("got a secret of %d characters", len(secret))
	}
	if CredentialHash(key, secret) != hash || CredentialHash([32]byte{2}, secret) == hash || CredentialHash(key, secret+"x") == hash {
		t.Error("the hash does not depend on key and secret")
	}
}

func TestPassword(t *testing.T) {
	password := NewPassword()
	if len(password) != 23 || NewPassword() == password {
		t.Errorf("got a password of %d characters", len(password))
	}
	hash, err := HashPassword(password)
	if err != nil || strings.Contains(hash, password) {
		t.Fatal(hash, err)
	}
	if !CheckPassword(hash, password) || CheckPassword(hash, password+"x") || CheckPassword(hash, "") {
		t.Error("the hash does not tell passwords apart")
	}
	for _, bad := range []string{"", "plain", strings.Replace(hash, "argon2id", "argon2i", 1), strings.Replace(hash, "m=65536", "m=99999999", 1), strings.Replace(hash, "v=19", "v=16", 1), hash[:len(hash)-4]} {
		if CheckPassword(bad, password) {
			t.Errorf("%q opens", bad)
		}
	}
	for _, bad := range []string{"short", strings.Repeat("x", maxPasswordBytes+1)} {
		if _, err := HashPassword(bad); !fault.Is(err, fault.Invalid) {
			t.Errorf("a password of %d bytes: %v", len(bad), err)
		}
	}
}
