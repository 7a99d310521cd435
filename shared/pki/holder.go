package pki

import (
	"crypto/tls"
	"crypto/x509"
	"sync"
	"sync/atomic"
	"time"

	"github.com/relais-mta/relais/shared/fault"
)

// Holder holds a node's certificate and the CAs it believes, and lets both be
// replaced while connections are served: a renewal or a SIGHUP swaps them and
// the next handshake sees the new ones. Safe for concurrent use.
type Holder struct {
	current   atomic.Pointer[held]
	files     *Files
	replacing sync.Mutex
}

type held struct {
	cert    *tls.Certificate
	trust   Trust
	roots   *x509.CertPool
	extra   *x509.CertPool // issuing CAs of the bundle
	dropped []string       // key ids of issuing CAs that were in the bundle
}

// Files names the PEM files of a Holder. CA may be empty for a certificate
// that is only served, such as one bought for the submission listeners.
type Files struct {
	Cert string // leaf first, then its chain
	Key  string
	CA   string
}

// NewHolder returns a holder of a certificate and a CA bundle in memory.
func NewHolder(cert *tls.Certificate, bundle []*x509.Certificate) *Holder {
	h := &Holder{}
	h.Set(cert, bundle)
	return h
}

// LoadHolder returns a holder that reads its files now and at each Reload.
func LoadHolder(files Files) (*Holder, error) {
	h := &Holder{files: &files}
	if err := h.Reload(); err != nil {
		return nil, err
	}
	return h, nil
}

// Set replaces certificate and bundle.
func (h *Holder) Set(cert *tls.Certificate, bundle []*x509.Certificate) {
	h.replacing.Lock()
	defer h.replacing.Unlock()
	t := Trust{Bundle: bundle}
	var old []*x509.Certificate
	if current := h.current.Load(); current != nil {
		old = current.trust.Bundle
		t.Refused, t.Revoked = current.trust.Refused, current.trust.Revoked
	}
	h.store(cert, t, old)
}

// store puts a new pair in use. The caller holds replacing.
func (h *Holder) store(cert *tls.Certificate, t Trust, old []*x509.Certificate) {
	next := &held{cert: cert, trust: t, roots: x509.NewCertPool(), extra: x509.NewCertPool()}
	if current := h.current.Load(); current != nil {
		next.dropped = droppedFrom(current.dropped, old, t.Bundle)
	}
	for _, ca := range t.Bundle {
		if isSelfSigned(ca) {
			next.roots.AddCert(ca)
		} else {
			next.extra.AddCert(ca)
		}
	}
	h.current.Store(next)
}

// Reload reads the files again. On error the old certificate stays in use. A
// holder without files has nothing to read, and Reload does nothing.
func (h *Holder) Reload() error {
	const op = "pki.Holder.Reload"
	if h.files == nil {
		return nil
	}
	cert, err := tls.LoadX509KeyPair(h.files.Cert, h.files.Key)
	if err != nil {
		return fault.Wrap(err, fault.Invalid, op, "certificate %s and key %s are not usable together", h.files.Cert, h.files.Key)
	}
	var bundle []*x509.Certificate
	if h.files.CA != "" {
		if bundle, err = LoadCertificates(h.files.CA); err != nil {
			return err
		}
	}
	h.Set(&cert, bundle)
	return nil
}

// Certificate returns the certificate in use.
func (h *Holder) Certificate() *tls.Certificate { return h.current.Load().cert }

// Leaf returns the parsed leaf of the certificate in use.
func (h *Holder) Leaf() *x509.Certificate { return h.current.Load().cert.Leaf }

// Bundle returns the CAs believed.
func (h *Holder) Bundle() []*x509.Certificate { return h.current.Load().trust.Bundle }

// GetCertificate is for the field of the same name of a tls.Config of one's own.
func (h *Holder) GetCertificate(*tls.ClientHelloInfo) (*tls.Certificate, error) {
	return h.Certificate(), nil
}

// TLSCertificate joins a key and its chain, leaf first.
func TLSCertificate(key *NodeKey, chain []*x509.Certificate) (*tls.Certificate, error) {
	if len(chain) == 0 || !key.Owns(chain[0]) {
		return nil, fault.New(fault.Invalid, "pki.TLSCertificate", "the certificate was not made for this key")
	}
	return &tls.Certificate{Certificate: RawCertificates(chain), PrivateKey: key.Private(), Leaf: chain[0]}, nil
}

// RenewAt returns when a leaf is due for renewal: after a third of its life,
// plus up to a tenth of its life by spread (0 to 1), so that nodes that joined
// together do not renew together.
func RenewAt(leaf *x509.Certificate, spread float64) time.Time {
	life := leaf.NotAfter.Sub(leaf.NotBefore)
	return leaf.NotBefore.Add(life/3 + time.Duration(spread*float64(life/10)))
}

func isSelfSigned(cert *x509.Certificate) bool {
	return string(cert.RawIssuer) == string(cert.RawSubject)
}
