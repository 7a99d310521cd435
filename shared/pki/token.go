package pki

import (
	"crypto/hmac"
	"crypto/rand"
	"crypto/sha256"
	"encoding/base32"
	"encoding/hex"
	"strings"

	"github.com/relais-mta/relais/shared/fault"
	"github.com/relais-mta/relais/shared/ids"
)

// tokenPrefixes tell what a token lets its bearer become, and the format.
var tokenPrefixes = map[Role]string{RoleRelay: "rl1", RoleControl: "ct1"}

// maxTokenPins: one, and during a change of CA the old one beside the new.
const maxTokenPins = 2

// minSecretBytes is the least a token's secret may have in text: 26 digits of
// base32 are 130 bits.
const minSecretBytes = 26

// maxTokenBytes bounds a token as pasted.
const maxTokenBytes = 512

// ExporterLabel and ExporterBytes name the TLS exporter value (RFC 8446
// section 7.5) that ties a proof to one connection.
const (
	ExporterLabel = "EXPORTER-relais-join/1"
	ExporterBytes = 32
)

// JoinToken is what an operator pastes on a new node:
// <prefix>.<pin>[-<pin>].<token id>.<secret>. The secret never crosses the
// wire; Proof does.
type JoinToken struct {
	Role   Role
	Pins   []Pin // of the CAs that may answer
	ID     ids.Token
	Secret string
}

// NewJoinToken makes a token with a fresh secret of 160 bits.
func NewJoinToken(role Role, id ids.Token, pins ...Pin) JoinToken {
	var secret [20]byte
	_, _ = rand.Read(secret[:]) // documented never to return an error
	text := base32.StdEncoding.WithPadding(base32.NoPadding).EncodeToString(secret[:])
	return JoinToken{Role: role, Pins: pins, ID: id, Secret: strings.ToLower(text)}
}

// String returns the text form. It holds the secret.
func (t JoinToken) String() string {
	pins := make([]string, 0, len(t.Pins))
	for _, pin := range t.Pins {
		pins = append(pins, pin.String())
	}
	return tokenPrefixes[t.Role] + "." + strings.Join(pins, "-") + "." + t.ID.String() + "." + t.Secret
}

// ParseJoinToken reads the text form. Its errors never repeat the secret.
func ParseJoinToken(text string) (JoinToken, error) {
	const op = "pki.ParseJoinToken"
	var token JoinToken
	bad := func(public string, args ...any) (JoinToken, error) {
		return JoinToken{}, fault.Field(op, "token", public, args...)
	}
	text = strings.TrimSpace(text)
	if len(text) > maxTokenBytes {
		return bad("it has %d characters, more than any token: paste it alone", len(text))
	}
	parts := strings.Split(text, ".")
	for role, prefix := range tokenPrefixes {
		if parts[0] == prefix {
			token.Role = role
		}
	}
	if token.Role == "" {
		return bad("it does not begin with rl1. or ct1.: paste the whole token")
	}
	if len(parts) != 4 {
		return bad("it has %d parts, want 4 (prefix, pin, id, secret): paste the whole token", len(parts))
	}
	pins := strings.Split(parts[1], "-")
	if len(pins) > maxTokenPins {
		return bad("it names %d CAs, at most %d", len(pins), maxTokenPins)
	}
	for _, text := range pins {
		pin, err := parsePin(text)
		if err != nil {
			return bad("its second part is not the pin of a CA: paste the whole token")
		}
		token.Pins = append(token.Pins, pin)
	}
	if err := token.ID.UnmarshalText([]byte(parts[2])); err != nil || token.ID.IsZero() {
		return bad("its third part is not a token id: paste the whole token")
	}
	if token.Secret = parts[3]; len(token.Secret) < minSecretBytes {
		return bad("its secret is cut short: paste the whole token")
	}
	return token, nil
}

// parsePin reads a pin in hexadecimal or in base32 without padding.
func parsePin(text string) (pin Pin, err error) {
	var raw []byte
	if len(text) == hex.EncodedLen(len(pin)) {
		raw, err = hex.DecodeString(text)
	} else {
		raw, err = base32.StdEncoding.WithPadding(base32.NoPadding).DecodeString(strings.ToUpper(text))
	}
	if err != nil || len(raw) != len(pin) {
		return pin, fault.New(fault.Invalid, "pki.parsePin", "not a pin")
	}
	copy(pin[:], raw)
	return pin, nil
}

// SecretHash returns SHA-256 of the secret's text: what control keeps, and the
// key of the proof. Knowing it lets one join, so control treats it as a secret.
func (t JoinToken) SecretHash() [32]byte { return sha256.Sum256([]byte(t.Secret)) }

// Proof shows knowledge of a token's secret on one TLS connection, for one
// certificate request and one role. It is worthless anywhere else.
func Proof(secretHash [32]byte, exporter []byte, csrHash [32]byte, role Role) [32]byte {
	mac := hmac.New(sha256.New, secretHash[:])
	mac.Write(exporter)
	mac.Write(csrHash[:])
	mac.Write([]byte(role))
	return [32]byte(mac.Sum(nil))
}
