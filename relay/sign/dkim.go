package sign

import (
	"crypto"
	"crypto/ed25519"
	"crypto/rsa"
	"crypto/sha256"
	"crypto/x509"
	"encoding/base64"
	"hash"
	"slices"
	"strconv"
	"sync"
	"sync/atomic"
	"time"

	"github.com/relais-mta/relais/shared/fault"
	"github.com/relais-mta/relais/shared/mailaddr"
	"github.com/relais-mta/relais/shared/policy"
)

// The signature algorithms.
const (
	AlgorithmRSA     = policy.AlgorithmRSA     // RFC 6376 section 3.3.2
	AlgorithmEd25519 = policy.AlgorithmEd25519 // RFC 8463 section 3
)

// minRSABits is what receivers still take (RFC 8301 section 3.2). Keys that
// control makes have 2048.
const minRSABits = 1024

// signatureLifetime is how long a signature says it is good for (x=, RFC 6376
// section 3.5): longer than any receiver keeps a message queued.
const signatureLifetime = policy.SignatureLifetime

// maxSignatureLineBytes is where the lines of our own field are folded.
const maxSignatureLineBytes = 76

// Signer signs the messages of one sending domain with all its keys. It never
// changes, but for when its signatures are due to be checked, and may be used by
// many goroutines.
type Signer struct {
	domain mailaddr.Domain
	keys   []signingKey
	kinds  Algorithms // of the keys
}

// Algorithms is a set of signature algorithms; the zero value is all.
type Algorithms uint8

// The members of a set.
const (
	UseRSA Algorithms = 1 << iota
	UseEd25519
)

// OnlyAlgorithm returns the set of one algorithm, of all for an empty name.
func OnlyAlgorithm(name string) Algorithms {
	switch name {
	case AlgorithmRSA:
		return UseRSA
	case AlgorithmEd25519:
		return UseEd25519
	}
	return 0
}

// signingKey has exactly one of its private keys.
type signingKey struct {
	rsa     *rsa.PrivateKey
	ed25519 ed25519.PrivateKey
	kind    Algorithms // one member
	head    string     // the field up to the value of s=, which never changes

	selector string
	next     *atomic.Int64 // when one of its signatures is due to be checked, in nanoseconds since 1970
}

// NewSigner reads the keys of a domain. It returns fault.Invalid, with the
// selector as the field, for a key that cannot be used, and for a domain
// without keys.
//
// RSA signatures come before Ed25519 ones whatever the order of the keys,
// because a verifier that looks at few signatures should meet the one it is
// bound to know first (RFC 8301 section 3.1, RFC 8463 section 3).
func NewSigner(domain mailaddr.Domain, keys []policy.DKIMKey) (*Signer, error) {
	const op = "sign.NewSigner"
	if len(keys) == 0 {
		return nil, fault.Field(op, "dkim", "domain %s has no signing key", domain)
	}
	s := &Signer{domain: domain, keys: make([]signingKey, 0, len(keys))}
	for _, k := range keys {
		one := signingKey{selector: k.Selector, next: new(atomic.Int64), head: "DKIM-Signature: v=1; a=" + k.Algorithm + "; c=relaxed/relaxed; d=" + string(domain) + ";\r\n\ts=" + k.Selector}
		var err error
		switch k.Algorithm {
		case AlgorithmRSA:
			one.kind = UseRSA
			// The cause may hold key material: it is left out on purpose.
			if one.rsa, err = parseRSA(k.Private); err != nil {
				return nil, fault.Field(op, k.Selector, "the key of selector %s at domain %s is not an RSA key in PKCS #8 with at least %d bits", k.Selector, domain, minRSABits)
			}
		case AlgorithmEd25519:
			one.kind = UseEd25519
			if one.ed25519, err = parseEd25519(k.Private); err != nil {
				return nil, fault.Field(op, k.Selector, "the key of selector %s at domain %s is not an Ed25519 key in PKCS #8", k.Selector, domain)
			}
		default:
			return nil, fault.Field(op, k.Selector, "signing algorithm %q of domain %s is not known, use %q or %q", k.Algorithm, domain, AlgorithmRSA, AlgorithmEd25519)
		}
		s.kinds |= one.kind
		s.keys = append(s.keys, one)
	}
	slices.SortStableFunc(s.keys, func(a, b signingKey) int { return len(a.ed25519) - len(b.ed25519) })
	return s, nil
}

func parseRSA(der []byte) (*rsa.PrivateKey, error) {
	const op = "sign.parseRSA"
	parsed, err := x509.ParsePKCS8PrivateKey(der)
	if err != nil {
		return nil, err
	}
	private, ok := parsed.(*rsa.PrivateKey)
	if !ok || private.N.BitLen() < minRSABits {
		return nil, fault.New(fault.Invalid, op, "not an RSA key of at least %d bits", minRSABits)
	}
	return private, nil
}

func parseEd25519(der []byte) (ed25519.PrivateKey, error) {
	parsed, err := x509.ParsePKCS8PrivateKey(der)
	if err != nil {
		return nil, err
	}
	private, ok := parsed.(ed25519.PrivateKey)
	if !ok {
		return nil, fault.New(fault.Invalid, "sign.parseEd25519", "not an Ed25519 key")
	}
	return private, nil
}

// signature signs the digest of the canonical header.
func (k *signingKey) signature(digest []byte) ([]byte, error) {
	if k.rsa == nil {
		// RFC 8463 section 3: PureEdDSA over the SHA-256 digest.
		return ed25519.Sign(k.ed25519, digest), nil
	}
	return rsa.SignPKCS1v15(nil, k.rsa, crypto.SHA256, digest)
}

// scratch is what one signature needs and the next can use again.
type scratch struct {
	sum    hash.Hash
	found  []foundField
	names  []byte // the value of h=, folded
	canon  []byte
	digest [sha256.Size]byte
}

var scratches = sync.Pool{New: func() any { return &scratch{sum: sha256.New()} }}

// maxKeptScratchBytes bounds the canonical text buffer that is kept for reuse.
const maxKeptScratchBytes = 64 << 10

// Sign appends one DKIM-Signature field per key of a wanted algorithm, or per
// key if there is none of those, to dst, each with its CRLF, to
// stand in front of added and the message. added are fields that go in front of
// the message too, and are signed like its own, each with its CRLF; header is the
// header section as it will be sent; bodyHash is the BodyHasher's sum of the body as it will be sent. now is
// the time of signing (t=). An error is fault.Internal; dst is then unchanged.
func (s *Signer) Sign(dst, added, header []byte, bodyHash [sha256.Size]byte, want Algorithms, now time.Time) ([]byte, error) {
	want = s.used(want)
	w := scratches.Get().(*scratch)
	defer func() {
		if cap(w.canon) <= maxKeptScratchBytes {
			clear(w.found) // they point into the message
			scratches.Put(w)
		}
	}()
	// All signatures cover the same fields, in one canonical form.
	w.found, w.canon = findFields(findFields(w.found[:0], added), header), w.canon[:0]
	w.names = w.appendNames(w.names[:0])
	covered := len(w.canon)
	out := dst
	for i := range s.keys {
		if s.keys[i].kind&want == 0 {
			continue
		}
		var err error
		w.canon = w.canon[:covered]
		if out, err = s.keys[i].sign(w, out, bodyHash, now); err != nil {
			return dst, err
		}
	}
	return out, nil
}

// sign appends the field of one key; w has the names and the canonical form of
// the fields it covers.
func (k *signingKey) sign(w *scratch, dst []byte, bodyHash [sha256.Size]byte, now time.Time) ([]byte, error) {
	start := len(dst)
	dst = append(dst, k.head...)
	dst = append(dst, "; t="...)
	dst = strconv.AppendInt(dst, now.Unix(), 10)
	dst = append(dst, "; x="...)
	dst = strconv.AppendInt(dst, now.Add(signatureLifetime).Unix(), 10)
	dst = append(dst, ";\r\n\th="...)
	dst = append(dst, w.names...)
	dst = append(dst, ";\r\n\tbh="...)
	dst = base64.StdEncoding.AppendEncode(dst, bodyHash[:])
	dst = append(dst, ";\r\n\tb="...)
	// RFC 6376 section 3.7: the field itself comes last, with an empty b= and
	// without its CRLF.
	w.canon = appendRelaxed(w.canon, dst[start:])
	w.sum.Reset()
	_, _ = w.sum.Write(w.canon[:len(w.canon)-2]) // hash.Hash never returns an error
	signature, err := k.signature(w.sum.Sum(w.digest[:0]))
	if err != nil {
		return dst[:start], fault.Wrap(err, fault.Internal, "sign.Sign", "the message could not be signed")
	}
	dst = appendBase64Folded(dst, signature, len("\tb="))
	return append(dst, '\r', '\n'), nil
}

// appendNames appends the value of h= and gathers the fields it names, in
// canonical form, in w.canon. Of several fields with one name the last comes
// first (RFC 6376 section 5.4.2).
func (w *scratch) appendNames(dst []byte) []byte {
	column := len("\th=")
	for which := range signedFields {
		f := &signedFields[which]
		times := 0
		for i := len(w.found) - 1; i >= 0; i-- {
			if w.found[i].which == which {
				w.canon = appendRelaxed(w.canon, w.found[i].text)
				times++
			}
		}
		if f.oversign == always || f.oversign == whenPresent && times > 0 {
			times++
		}
		for ; times > 0; times-- {
			if column > len("\th=") {
				dst = append(dst, ':')
				column++
			}
			if column+len(f.name)+1 > maxSignatureLineBytes {
				dst = append(dst, "\r\n\t"...)
				column = 1
			}
			dst = append(dst, f.name...)
			column += len(f.name)
		}
	}
	return dst
}

// appendBase64Folded appends data in base64 with folding white space, which
// verifiers ignore in b= (RFC 6376 section 3.5).
func appendBase64Folded(dst, data []byte, column int) []byte {
	const group = 3 // bytes that make four digits
	for len(data) > 0 {
		n := min((maxSignatureLineBytes-column)/4*group, len(data))
		dst = base64.StdEncoding.AppendEncode(dst, data[:n])
		if data = data[n:]; len(data) > 0 {
			dst = append(dst, "\r\n\t"...)
			column = 1
		}
	}
	return dst
}
