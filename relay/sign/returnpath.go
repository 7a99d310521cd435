package sign

import (
	"crypto/hmac"
	"crypto/sha256"
	"encoding/base32"
	"encoding/binary"
	"time"

	"github.com/relais-mta/relais/shared/fault"
	"github.com/relais-mta/relais/shared/ids"
	"github.com/relais-mta/relais/shared/policy"
)

// Layout of a return path's local part, version 1: the letter "r", then the
// following bytes in base32. The lengths are chosen so that no bit is left
// over, so each token has exactly one spelling but for case.
//
//	 0      key id
//	 1..16  message id
//	17..19  recipient index + 1, big endian; 0 = the whole message
//	20..21  last day on which it is good, in days since 1970-01-01 UTC, big endian
//	22..34  HMAC-SHA-256 of the version letter and bytes 0..21, first 104 bits
const (
	returnPathVersion = 'r'
	signedBytes       = 22
	macBytes          = 13
	tokenBytes        = signedBytes + macBytes
	encodedBytes      = tokenBytes / 5 * 8
)

// ReturnPathBytes is the length of the local part of every signed return path,
// in octets; RFC 5321 section 4.5.3.1.1 allows 64.
const ReturnPathBytes = 1 + encodedBytes

// NoRecipient stands for "the whole message" where a recipient index is asked for.
const NoRecipient = -1

const secondsPerDay = 24 * 60 * 60

// tokenEncoding has one case, because local parts come back from the world in
// any case, and no letters that look like digits.
var tokenEncoding = base32.NewEncoding("0123456789abcdefghjkmnpqrstvwxyz").WithPadding(base32.NoPadding)

// ReturnPath is what a signed return path says.
type ReturnPath struct {
	Message   ids.Message
	Recipient int       // index of the recipient in the envelope, or NoRecipient
	Expires   time.Time // the end of its last day, UTC
	KeyID     uint8     // of the key that signed it
}

// EncodeReturnPath returns the local part of the return path of a message, or of
// one of its recipients (0 to 65535) so that a bounce names the recipient even
// if it names nothing else. It is good until the end of expires' day in UTC.
// The first key signs; fault.Unavailable says that there is none.
func EncodeReturnPath(keys []policy.ReturnPathKey, message ids.Message, recipient int, expires time.Time) (string, error) {
	const op = "sign.EncodeReturnPath"
	if len(keys) == 0 {
		return "", fault.New(fault.Unavailable, op, "there is no key to sign return paths with")
	}
	if recipient < NoRecipient || recipient > 0xffff {
		return "", fault.New(fault.Invalid, op, "recipient index %d is not in 0 to 65535", recipient)
	}
	day := expires.Unix() / secondsPerDay
	if day < 0 || day > 0xffff {
		return "", fault.New(fault.Invalid, op, "a return path cannot expire at %s", expires.UTC().Format(time.RFC3339))
	}
	var token [tokenBytes]byte
	token[0] = keys[0].ID
	copy(token[1:17], message[:])
	index := uint32(recipient + 1)
	token[17], token[18], token[19] = byte(index>>16), byte(index>>8), byte(index)
	binary.BigEndian.PutUint16(token[20:22], uint16(day))
	mac := tokenMAC(&keys[0], token[:signedBytes])
	copy(token[signedBytes:], mac[:macBytes])
	var text [ReturnPathBytes]byte
	text[0] = returnPathVersion
	tokenEncoding.Encode(text[1:], token[:])
	return string(text[:]), nil
}

// VerifyReturnPath reads the local part of a return path that one of keys
// signed. The error is fault.Invalid if local does not look like one,
// fault.Denied if the signature is wrong, made with a key that is not known or
// past its last day at now.
func VerifyReturnPath(keys []policy.ReturnPathKey, local string, now time.Time) (ReturnPath, error) {
	const op = "sign.VerifyReturnPath"
	if len(local) != ReturnPathBytes || lower(local[0]) != returnPathVersion {
		return ReturnPath{}, fault.New(fault.Invalid, op, "this is not a return path of ours")
	}
	var text [encodedBytes]byte
	for i := range text {
		text[i] = lower(local[1+i])
	}
	var token [tokenBytes]byte
	if _, err := tokenEncoding.Decode(token[:], text[:]); err != nil {
		return ReturnPath{}, fault.New(fault.Invalid, op, "this is not a return path of ours")
	}
	if !verifyMAC(keys, &token) {
		return ReturnPath{}, fault.New(fault.Denied, op, "the signature of this return path is wrong")
	}
	rp := ReturnPath{KeyID: token[0]}
	copy(rp.Message[:], token[1:17])
	rp.Recipient = int(uint32(token[17])<<16|uint32(token[18])<<8|uint32(token[19])) - 1
	day := int64(binary.BigEndian.Uint16(token[20:22]))
	rp.Expires = time.Unix((day+1)*secondsPerDay, 0).UTC()
	if !now.Before(rp.Expires) {
		return ReturnPath{}, fault.New(fault.Denied, op, "this return path has expired")
	}
	return rp, nil
}

func verifyMAC(keys []policy.ReturnPathKey, token *[tokenBytes]byte) bool {
	for i := range keys {
		if keys[i].ID != token[0] {
			continue
		}
		mac := tokenMAC(&keys[i], token[:signedBytes])
		return hmac.Equal(mac[:macBytes], token[signedBytes:])
	}
	return false
}

// tokenMAC covers the version letter too, so a later layout cannot be read as
// this one.
func tokenMAC(key *policy.ReturnPathKey, signed []byte) (mac [sha256.Size]byte) {
	m := hmac.New(sha256.New, key.Key[:])
	_, _ = m.Write([]byte{returnPathVersion}) // hash.Hash never returns an error
	_, _ = m.Write(signed)
	m.Sum(mac[:0])
	return mac
}
