package pki

import (
	"bytes"
	"crypto/sha256"
	"crypto/x509"
	"encoding/hex"
	"slices"
	"time"

	"github.com/relais-mta/relais/shared/fault"
	"github.com/relais-mta/relais/shared/ids"
)

// Trust is what a cluster says of its own CAs and servers. While the issuing
// key is changed there are two issuing CAs below one root.
type Trust struct {
	Bundle  []*x509.Certificate // issuing CAs, the one that signs first, then the root
	Refused []string            // key ids of issuing CAs that were given up before their time
	Revoked []RevokedServer     // control servers that were removed
}

// RevokedServer is a control server whose certificates are worth nothing any
// more, whatever their dates say.
type RevokedServer struct {
	Server  ids.Node
	Serials []string // of the certificates it is known to have had, hexadecimal
}

// KeyID returns the subject key identifier of a CA in hexadecimal (RFC 5280
// section 4.2.1.2). It names an issuing CA among those of one root.
func KeyID(ca *x509.Certificate) string { return hex.EncodeToString(ca.SubjectKeyId) }

// IssuerKeyID returns the key id of the CA that a certificate says it is from.
func IssuerKeyID(leaf *x509.Certificate) string { return hex.EncodeToString(leaf.AuthorityKeyId) }

// Serial returns a certificate's serial number as it is written everywhere.
func Serial(cert *x509.Certificate) string { return cert.SerialNumber.Text(16) }

// BundleSum names a bundle: SHA-256 over its certificates in order.
func BundleSum(bundle []*x509.Certificate) (sum [sha256.Size]byte) {
	h := sha256.New()
	for _, cert := range bundle {
		_, _ = h.Write(cert.Raw) // documented never to return an error
	}
	h.Sum(sum[:0])
	return sum
}

// Signer returns the issuing CA of the bundle that signs, nil if there is none.
func (t *Trust) Signer() *x509.Certificate {
	if len(t.Bundle) == 0 || isSelfSigned(t.Bundle[0]) {
		return nil
	}
	return t.Bundle[0]
}

// Root returns the root that a bundle ends with, nil if there is none.
func Root(bundle []*x509.Certificate) *x509.Certificate {
	for _, ca := range slices.Backward(bundle) {
		if isSelfSigned(ca) {
			return ca
		}
	}
	return nil
}

// SetTrust replaces what is believed of the cluster and keeps the certificate.
func (h *Holder) SetTrust(t Trust) {
	h.replacing.Lock()
	defer h.replacing.Unlock()
	current := h.current.Load()
	h.store(current.cert, t, current.trust.Bundle)
}

// Trust returns what is believed of the cluster.
func (h *Holder) Trust() Trust { return h.current.Load().trust }

// Dropped reports whether a certificate is from an issuing CA that was believed
// since this process began and is not any more. Whoever presented it in a
// handshake of before should come again with a new one.
func (h *Holder) Dropped(leaf *x509.Certificate) bool {
	return slices.Contains(h.current.Load().dropped, IssuerKeyID(leaf))
}

// Revoked returns an error if a certificate is of a control server that was removed.
func (h *Holder) Revoked(leaf *x509.Certificate) error {
	identity, err := CertIdentity(leaf)
	if err != nil {
		return err
	}
	return h.current.Load().trust.revoked(leaf, identity)
}

func (t *Trust) revoked(leaf *x509.Certificate, identity Identity) error {
	for i := range t.Revoked {
		if r := &t.Revoked[i]; r.Server == identity.Node || slices.Contains(r.Serials, Serial(leaf)) {
			return fault.New(fault.Denied, "pki.revoked", "the peer is server %s, which was removed from the cluster: its certificate is revoked", r.Server)
		}
	}
	return nil
}

// accepts reports whether an issuing CA, known to be of the root, may sign: it
// is in the bundle, or newer than all of those. A node that was off while the
// issuing key changed knows only the old one, and must come back by itself; an
// older one that is not in the bundle was dropped from it.
func (h *held) accepts(ca *x509.Certificate) bool {
	if slices.Contains(h.trust.Refused, KeyID(ca)) {
		return false
	}
	var newest time.Time
	for _, known := range h.trust.Bundle {
		if isSelfSigned(known) {
			continue
		}
		if bytes.Equal(known.Raw, ca.Raw) {
			return true
		}
		if known.NotBefore.After(newest) {
			newest = known.NotBefore
		}
	}
	return newest.IsZero() || ca.NotBefore.After(newest)
}

// acceptsChain reports whether every CA between leaf and root may sign.
func (h *held) acceptsChain(chain []*x509.Certificate) bool {
	for _, ca := range chain[1 : len(chain)-1] {
		if !h.accepts(ca) {
			return false
		}
	}
	return true
}

// maxDropped bounds how many dropped issuing CAs are remembered.
const maxDropped = 16

// droppedFrom returns the issuing CAs that were in a bundle and are in no more.
func droppedFrom(before []string, old, next []*x509.Certificate) []string {
	out := slices.Clone(before)
	for _, ca := range old {
		if !isSelfSigned(ca) {
			out = append(out, KeyID(ca))
		}
	}
	out = slices.DeleteFunc(out, func(id string) bool {
		return slices.ContainsFunc(next, func(ca *x509.Certificate) bool { return KeyID(ca) == id })
	})
	slices.Sort(out)
	out = slices.Compact(out)
	return out[max(0, len(out)-maxDropped):]
}
