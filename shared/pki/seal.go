package pki

import (
	"crypto/aes"
	"crypto/cipher"
	"crypto/rand"
	"crypto/sha256"
	"encoding/base64"
	"encoding/hex"
	"strings"

	"github.com/relais-mta/relais/shared/fault"
)

// Sealed text: 1 byte format, 8 bytes key id, 12 bytes nonce, AES-256-GCM
// ciphertext with its 16-byte tag. The first 9 bytes are authenticated too.
const (
	sealFormat     = 1
	sealKeyIDBytes = 8
	sealHeadBytes  = 1 + sealKeyIDBytes
	sealNonceBytes = 12
	sealTagBytes   = 16
)

// SealOverheadBytes is how much longer sealed text is than its plain text.
const SealOverheadBytes = sealHeadBytes + sealNonceBytes + sealTagBytes

// Key is a symmetric key for sealing: a KEK on control, a key derived from the
// node key on a relay.
type Key [32]byte

// NewKey returns a random key.
func NewKey() (key Key) {
	_, _ = rand.Read(key[:]) // documented never to return an error
	return key
}

// Derive returns an independent key for one purpose.
func (k Key) Derive(purpose string) Key { return derive(k[:], purpose) }

// Sealer encrypts secrets at rest with AES-256-GCM. What is sealed names its
// key, so the wrong key is told apart from damage. A random 96-bit nonce is
// safe for 2^32 sealings under one key (NIST SP 800-38D section 8.3), far more
// than a cluster's secrets.
type Sealer struct {
	id   [sealKeyIDBytes]byte
	aead cipher.AEAD
}

// NewSealer returns a sealer for the key.
func NewSealer(key Key) *Sealer {
	block, err := aes.NewCipher(key[:])
	if err != nil {
		panic("pki: AES refuses a 32-byte key: " + err.Error())
	}
	aead, err := cipher.NewGCM(block)
	if err != nil {
		panic("pki: GCM refuses AES: " + err.Error())
	}
	sum := sha256.Sum256(append([]byte("relais key id v1\x00"), key[:]...))
	s := &Sealer{aead: aead}
	copy(s.id[:], sum[:])
	return s
}

// KeyID names the key without telling anything about it, 16 hexadecimal digits.
func (s *Sealer) KeyID() string { return hex.EncodeToString(s.id[:]) }

// Seal encrypts plain and binds it to aad, which says what the secret is for:
// sealed text moved to another place does not open.
func (s *Sealer) Seal(plain, aad []byte) ([]byte, error) {
	out := make([]byte, sealHeadBytes+sealNonceBytes, len(plain)+SealOverheadBytes)
	out[0] = sealFormat
	copy(out[1:], s.id[:])
	_, _ = rand.Read(out[sealHeadBytes:]) // documented never to return an error
	return s.aead.Seal(out, out[sealHeadBytes:], plain, bind(out[:sealHeadBytes], aad)), nil
}

// Open decrypts what Seal made with the same key and aad.
func (s *Sealer) Open(sealed, aad []byte) ([]byte, error) {
	const op = "pki.Sealer.Open"
	if len(sealed) < SealOverheadBytes {
		return nil, fault.New(fault.Invalid, op, "the sealed secret is cut short: %d bytes", len(sealed))
	}
	if sealed[0] != sealFormat {
		return nil, fault.New(fault.Invalid, op, "the sealed secret has format %d, this version knows %d: run a newer version", sealed[0], sealFormat)
	}
	if id := sealed[1:sealHeadBytes]; string(id) != string(s.id[:]) {
		return nil, fault.New(fault.Denied, op, "the secret is sealed under key %s, this is key %s", hex.EncodeToString(id), s.KeyID())
	}
	nonce := sealed[sealHeadBytes : sealHeadBytes+sealNonceBytes]
	plain, err := s.aead.Open(nil, nonce, sealed[sealHeadBytes+sealNonceBytes:], bind(sealed[:sealHeadBytes], aad))
	return plain, fault.Wrap(err, fault.Invalid, op, "the sealed secret is damaged or belongs elsewhere")
}

func bind(head, aad []byte) []byte {
	return append(head[:len(head):len(head)], aad...)
}

// LoadKey reads a key file, as WriteKey made it. A missing file is fault.NotFound.
func LoadKey(path string) (Key, error) {
	const op = "pki.LoadKey"
	var key Key
	data, err := readFile(path, op)
	if err != nil {
		return key, err
	}
	raw, err := base64.StdEncoding.DecodeString(strings.TrimSpace(string(data)))
	if err != nil || len(raw) != len(key) {
		return key, fault.New(fault.Invalid, op, "%s is not a key file (32 bytes in base64): restore it, or recover it with the recovery key", path)
	}
	copy(key[:], raw)
	return key, nil
}

// WriteKey writes a key file with mode 0600.
func WriteKey(path string, key Key) error {
	return WriteFile(path, []byte(base64.StdEncoding.EncodeToString(key[:])+"\n"), 0o600)
}
