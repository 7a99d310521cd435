package ca

import (
	"crypto/x509"
	"time"

	"github.com/relais-mta/relais/shared/fault"
	"github.com/relais-mta/relais/shared/ids"
	"github.com/relais-mta/relais/shared/pki"
)

// When the issuing key is changed, counted from the end of its certificate.
const (
	// WarnBefore is when operators hear of it.
	WarnBefore = 60 * 24 * time.Hour
	// RotateBefore is when the cluster begins by itself. A change takes seconds
	// where everybody is there; what remains is for finding those who are not.
	RotateBefore = 30 * 24 * time.Hour
)

// Next is an issuing CA that is to follow the one that signs.
type Next struct {
	Certificate *x509.Certificate
	Sealed      []byte // private keys of the root and of this CA, under the KEK
}

// Issuing returns the issuing CA that signs.
func (a *Authority) Issuing() *x509.Certificate { return a.issuing }

// NextIssuing makes an issuing CA with a fresh key below the same root. Its
// certificate begins later than that of the one that signs, which is how nodes
// that were away tell the newer from the older.
func NextIssuing(material Material, cluster ids.Cluster, sealer Sealer, now time.Time) (Next, error) {
	const op = "ca.NextIssuing"
	authority, err := Open(material, cluster, sealer)
	if err != nil {
		return Next{}, err
	}
	keys, err := sealer.Open(material.Sealed, []byte(aadKeys+cluster.String()))
	if err != nil {
		return Next{}, err
	}
	private, err := decodeKey(keys, rootBlock)
	if err != nil {
		return Next{}, err
	}
	rootKey, err := pki.NodeKeyOf(private)
	if err != nil {
		return Next{}, err
	}
	key, err := pki.NewNodeKey()
	if err != nil {
		return Next{}, err
	}
	begin := now.Add(-Backdate)
	if last := authority.issuing.NotBefore; !begin.After(last) {
		begin = last.Add(time.Second) // the resolution of certificates, RFC 5280 section 4.1.2.5
	}
	if begin.After(now) {
		return Next{}, fault.New(fault.Conflict, op, "the issuing CA that signs begins at %s and this server's clock says %s: try again in %s, or set the clock",
			authority.issuing.NotBefore.UTC().Format(time.RFC3339), now.UTC().Format(time.RFC3339), begin.Sub(now).Round(time.Second)+time.Second)
	}
	if left := authority.root.NotAfter.Sub(now); left < IssuingLife {
		return Next{}, fault.New(fault.Unavailable, op, "the root ends at %s, before a new issuing CA would: the cluster needs a new root", authority.root.NotAfter.UTC().Format(time.RFC3339))
	}
	cert, err := makeCA("Relais issuing "+cluster.String(), 0, begin.Add(Backdate), IssuingLife-Backdate, key, authority.root, rootKey)
	if err != nil {
		return Next{}, fault.Wrap(err, fault.Internal, op, "cannot make the issuing certificate")
	}
	plain, err := encodeKeys(rootKey, key)
	if err != nil {
		return Next{}, err
	}
	next := Next{Certificate: cert}
	next.Sealed, err = sealer.Seal(plain, []byte(aadKeys+cluster.String()))
	return next, err
}
