// Package ca is the cluster's own certificate authority: it makes the root and
// the issuing CA once, at init, and signs the certificates by which nodes know
// each other. What must be replicated comes out as bytes, the private part
// sealed under the cluster's key-encryption key (KEK), so that the raft log,
// snapshots and backups never hold a usable key.
package ca

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/base32"
	"encoding/pem"
	"math/big"
	"strings"
	"time"

	"github.com/relais-mta/relais/shared/fault"
	"github.com/relais-mta/relais/shared/ids"
	"github.com/relais-mta/relais/shared/pki"
)

// Lifetimes. The root outlives machines; the issuing CA is changed every year
// because its key is in use; a leaf is short because nothing is ever revoked
// by list: a node's row decides, and a leaf that was copied dies soon.
const (
	RootLife    = 10 * 365 * 24 * time.Hour
	IssuingLife = 365 * 24 * time.Hour
	LeafLife    = 7 * 24 * time.Hour
	// Backdate lets a machine whose clock is a little behind use a fresh leaf.
	Backdate = 5 * time.Minute
)

// What the sealed bytes are for: they do not open in another place.
const (
	aadKeys     = "relais ca keys v1 "
	aadRecovery = "relais kek recovery v1 "
)

// Block types of the sealed private keys.
const (
	rootBlock    = "RELAIS ROOT KEY"
	issuingBlock = "RELAIS ISSUING KEY"
)

// Material is the CA as it is replicated: nothing in it is a secret by itself.
type Material struct {
	Bundle         []byte // certificates in PEM: the issuing CA that signs, another that is believed while the key is changed, the root
	Sealed         []byte // private keys of both, under the KEK
	KEKID          string
	RecoverySealed []byte // the KEK, under the recovery key
}

// Create makes the CA of a new cluster. The KEK goes to a file on the server's
// disk (pki.WriteKey); the recovery key is shown once and stored nowhere.
func Create(cluster ids.Cluster, now time.Time) (material Material, kek pki.Key, recovery string, err error) {
	const op = "ca.Create"
	rootKey, err := pki.NewNodeKey()
	if err != nil {
		return Material{}, kek, "", err
	}
	issuingKey, err := pki.NewNodeKey()
	if err != nil {
		return Material{}, kek, "", err
	}
	root, err := makeCA("Relais root "+cluster.String(), 1, now, RootLife, rootKey, nil, rootKey)
	if err != nil {
		return Material{}, kek, "", fault.Wrap(err, fault.Internal, op, "cannot make the root certificate")
	}
	issuing, err := makeCA("Relais issuing "+cluster.String(), 0, now, IssuingLife, issuingKey, root, rootKey)
	if err != nil {
		return Material{}, kek, "", fault.Wrap(err, fault.Internal, op, "cannot make the issuing certificate")
	}
	keys, err := encodeKeys(rootKey, issuingKey)
	if err != nil {
		return Material{}, kek, "", err
	}
	kek = pki.NewKey()
	sealer := pki.NewSealer(kek)
	material.KEKID = sealer.KeyID()
	material.Bundle = pki.EncodeCertificates([]*x509.Certificate{issuing, root})
	if material.Sealed, err = sealer.Seal(keys, []byte(aadKeys+cluster.String())); err != nil {
		return Material{}, kek, "", err
	}
	recoveryKey := pki.NewKey()
	material.RecoverySealed, err = recoverySealer(recoveryKey).Seal(kek[:], []byte(aadRecovery+cluster.String()))
	return material, kek, formatRecovery(recoveryKey), err
}

// makeCA signs a CA certificate; a nil parent makes it self-signed.
func makeCA(name string, pathLen int, now time.Time, life time.Duration, key *pki.NodeKey, parent *x509.Certificate, parentKey *pki.NodeKey) (*x509.Certificate, error) {
	template := &x509.Certificate{
		SerialNumber:          newSerial(),
		Subject:               pkix.Name{CommonName: name},
		NotBefore:             now.Add(-Backdate),
		NotAfter:              now.Add(life),
		IsCA:                  true,
		BasicConstraintsValid: true,
		MaxPathLen:            pathLen,
		MaxPathLenZero:        pathLen == 0,
		KeyUsage:              x509.KeyUsageCertSign | x509.KeyUsageCRLSign, // RFC 5280 section 4.2.1.3
	}
	if parent == nil {
		parent = template
	}
	der, err := x509.CreateCertificate(rand.Reader, template, parent, &key.Private().PublicKey, parentKey.Private())
	if err != nil {
		return nil, err
	}
	return x509.ParseCertificate(der)
}

// newSerial returns 127 random bits, positive as RFC 5280 section 4.1.2.2 asks.
func newSerial() *big.Int {
	var b [16]byte
	_, _ = rand.Read(b[:]) // documented never to return an error
	b[0] &= 0x7f
	b[0] |= 0x40 // never zero, always the same length
	return new(big.Int).SetBytes(b[:])
}

func encodeKeys(root, issuing *pki.NodeKey) ([]byte, error) {
	var out []byte
	for _, k := range []struct {
		kind string
		key  *pki.NodeKey
	}{{rootBlock, root}, {issuingBlock, issuing}} {
		der, err := x509.MarshalPKCS8PrivateKey(k.key.Private())
		if err != nil {
			return nil, fault.Wrap(err, fault.Internal, "ca.encodeKeys", "cannot encode a CA key")
		}
		out = append(out, pem.EncodeToMemory(&pem.Block{Type: k.kind, Bytes: der})...)
	}
	return out, nil
}

func decodeKey(data []byte, kind string) (*ecdsa.PrivateKey, error) {
	for block, rest := pem.Decode(data); block != nil; block, rest = pem.Decode(rest) {
		if block.Type != kind {
			continue
		}
		parsed, err := x509.ParsePKCS8PrivateKey(block.Bytes)
		if key, ok := parsed.(*ecdsa.PrivateKey); err == nil && ok && key.Curve == elliptic.P256() {
			return key, nil
		}
		break
	}
	return nil, fault.New(fault.Invalid, "ca.decodeKey", "the sealed CA keys hold no usable %s", strings.ToLower(kind))
}

func recoverySealer(key pki.Key) *pki.Sealer { return pki.NewSealer(key.Derive("kek recovery")) }

var recoveryText = base32.StdEncoding.WithPadding(base32.NoPadding)

// formatRecovery writes a recovery key in groups that a person can copy.
func formatRecovery(key pki.Key) string {
	digits := recoveryText.EncodeToString(key[:])
	groups := []string{"RK1"}
	for len(digits) > 0 {
		n := min(len(digits), 4)
		groups = append(groups, digits[:n])
		digits = digits[n:]
	}
	return strings.Join(groups, "-")
}

// Recover unwraps the KEK with the recovery key that init printed. Case, spaces
// and dashes do not matter.
func Recover(material Material, cluster ids.Cluster, recovery string) (pki.Key, error) {
	const op = "ca.Recover"
	var kek, key pki.Key
	text := strings.NewReplacer("-", "", " ", "", "\n", "", "\t", "").Replace(strings.ToUpper(recovery))
	text, ok := strings.CutPrefix(text, "RK1")
	raw, err := recoveryText.DecodeString(text)
	if !ok || err != nil || len(raw) != len(key) {
		return kek, fault.Field(op, "recovery-key", "it is not whole: it begins with RK1 and has 13 groups of four after that")
	}
	copy(key[:], raw)
	plain, err := recoverySealer(key).Open(material.RecoverySealed, []byte(aadRecovery+cluster.String()))
	if err != nil || len(plain) != len(kek) {
		return kek, &fault.Error{Kind: fault.Denied, Op: op, Field: "recovery-key", Public: "it is not the recovery key of this cluster", Cause: err}
	}
	copy(kek[:], plain)
	return kek, nil
}

// Sealer encrypts under the KEK; *pki.Sealer is one.
type Sealer interface {
	Seal(plain, aad []byte) ([]byte, error)
	Open(sealed, aad []byte) ([]byte, error)
	KeyID() string
}

// Authority signs. It is safe for concurrent use.
type Authority struct {
	cluster ids.Cluster
	bundle  []*x509.Certificate
	issuing *x509.Certificate
	root    *x509.Certificate
	key     *ecdsa.PrivateKey
}

// Open unseals the issuing key of a cluster's CA.
func Open(material Material, cluster ids.Cluster, sealer Sealer) (*Authority, error) {
	const op = "ca.Open"
	bundle, err := pki.ParseCertificates(material.Bundle)
	if err != nil {
		return nil, fault.Wrap(err, fault.Invalid, op, "the CA bundle of %s is damaged", cluster)
	}
	root := pki.Root(bundle)
	if len(bundle) < 2 || root != bundle[len(bundle)-1] {
		return nil, fault.New(fault.Invalid, op, "the CA bundle of %s has %d certificates, want the issuing CA that signs first and the root last", cluster, len(bundle))
	}
	keys, err := sealer.Open(material.Sealed, []byte(aadKeys+cluster.String()))
	if err != nil {
		return nil, fault.Wrap(err, fault.Denied, op, "the CA keys of %s do not open with key-encryption key %s, they need %s: restore the KEK file, or recover it with the recovery key",
			cluster, sealer.KeyID(), material.KEKID)
	}
	key, err := decodeKey(keys, issuingBlock)
	if err != nil {
		return nil, err
	}
	a := &Authority{cluster: cluster, bundle: bundle, issuing: bundle[0], root: root, key: key}
	if public, ok := a.issuing.PublicKey.(*ecdsa.PublicKey); !ok || !key.PublicKey.Equal(public) {
		return nil, fault.New(fault.Invalid, op, "the issuing certificate of %s does not match its key", cluster)
	}
	return a, nil
}

// Bundle returns the CAs that nodes believe: the issuing CA that signs, another
// one while the key is changed, the root.
func (a *Authority) Bundle() []*x509.Certificate { return a.bundle }

// Root returns the root certificate, to be installed where browsers look.
func (a *Authority) Root() *x509.Certificate { return a.root }

// Pin returns the pin of the root, which join tokens carry.
func (a *Authority) Pin() pki.Pin { return pki.PinOf(a.root) }

// Issue makes a certificate for a key that is at hand, as a server does for
// itself at start and before its leaf ends (pki.RenewAt).
func (a *Authority) Issue(key *pki.NodeKey, role pki.Role, node ids.Node, names pki.Request, now time.Time) (*tls.Certificate, error) {
	csr, err := key.CSR(names)
	if err != nil {
		return nil, err
	}
	chain, err := a.Sign(csr, role, node, now)
	if err != nil {
		return nil, err
	}
	return pki.TLSCertificate(key, chain)
}
