package pki

import (
	"crypto/ecdh"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/hkdf"
	"crypto/rand"
	"crypto/sha256"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"io/fs"
	"net"
	"net/netip"
	"os"

	"github.com/relais-mta/relais/shared/fault"
)

// maxPEMBytes bounds a key, certificate or request file that we read.
const maxPEMBytes = 256 << 10

// NodeKey is the private key of a node: P-256, made on the node, never sent.
type NodeKey struct {
	private *ecdsa.PrivateKey
	scalar  *ecdh.PrivateKey // the same key, for Derive
}

// NewNodeKey makes a fresh key.
func NewNodeKey() (*NodeKey, error) {
	private, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return nil, fault.Wrap(err, fault.Internal, "pki.NewNodeKey", "cannot make a key")
	}
	return nodeKey(private)
}

// NodeKeyOf returns the key of a private key on P-256.
func NodeKeyOf(private *ecdsa.PrivateKey) (*NodeKey, error) { return nodeKey(private) }

func nodeKey(private *ecdsa.PrivateKey) (*NodeKey, error) {
	if private.Curve != elliptic.P256() {
		return nil, fault.New(fault.Invalid, "pki.NodeKey", "the key is on curve %s, want P-256", private.Params().Name)
	}
	scalar, err := private.ECDH()
	if err != nil {
		return nil, fault.Wrap(err, fault.Invalid, "pki.NodeKey", "the key is damaged")
	}
	return &NodeKey{private: private, scalar: scalar}, nil
}

// LoadNodeKey reads a key file. A missing file is fault.NotFound.
func LoadNodeKey(path string) (*NodeKey, error) {
	const op = "pki.LoadNodeKey"
	data, err := readFile(path, op)
	if err != nil {
		return nil, err
	}
	key, err := ParseNodeKey(data)
	if err != nil {
		return nil, fault.Wrap(err, fault.Invalid, op, "%s is not a usable key file: restore it, or remove it and join again", path)
	}
	return key, nil
}

// ParseNodeKey reads a PKCS #8 key in PEM.
func ParseNodeKey(data []byte) (*NodeKey, error) {
	const op = "pki.ParseNodeKey"
	block, _ := pem.Decode(data)
	if block == nil || block.Type != "PRIVATE KEY" {
		return nil, fault.New(fault.Invalid, op, "no PRIVATE KEY block")
	}
	parsed, err := x509.ParsePKCS8PrivateKey(block.Bytes)
	if err != nil {
		return nil, fault.Wrap(err, fault.Invalid, op, "the key is damaged")
	}
	private, ok := parsed.(*ecdsa.PrivateKey)
	if !ok {
		return nil, fault.New(fault.Invalid, op, "the key is a %T, want ECDSA on P-256", parsed)
	}
	return nodeKey(private)
}

// LoadOrCreateNodeKey reads the key at path, or makes one and writes it with
// mode 0600 if there is none.
func LoadOrCreateNodeKey(path string) (*NodeKey, error) {
	key, err := LoadNodeKey(path)
	if !fault.Is(err, fault.NotFound) {
		return key, err
	}
	if key, err = NewNodeKey(); err != nil {
		return nil, err
	}
	encoded, err := key.PEM()
	if err != nil {
		return nil, err
	}
	return key, WriteFile(path, encoded, 0o600)
}

// PEM returns the private key as PKCS #8 in PEM.
func (k *NodeKey) PEM() ([]byte, error) {
	der, err := x509.MarshalPKCS8PrivateKey(k.private)
	if err != nil {
		return nil, fault.Wrap(err, fault.Internal, "pki.NodeKey.PEM", "cannot encode the key")
	}
	return pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: der}), nil
}

// Private returns the key for use in TLS and for signing.
func (k *NodeKey) Private() *ecdsa.PrivateKey { return k.private }

// Derive returns 32 bytes that only the holder of the key can compute, one
// independent value per purpose (HKDF-SHA-256, RFC 5869).
func (k *NodeKey) Derive(purpose string) [32]byte {
	return derive(k.scalar.Bytes(), purpose)
}

// derive is HKDF with a fixed salt; it cannot fail for 32 bytes of output.
func derive(secret []byte, purpose string) (out [32]byte) {
	b, err := hkdf.Key(sha256.New, secret, []byte("relais key derivation v1"), purpose, len(out))
	if err != nil {
		panic("pki: HKDF refuses 32 bytes of output: " + err.Error())
	}
	copy(out[:], b)
	return out
}

// Request says what a certificate request asks for besides the identity, which
// control decides.
type Request struct {
	DNSNames  []string     // names under which the node serves TLS
	Addresses []netip.Addr // addresses under which it serves TLS
}

// CSR returns a signed certificate request (PKCS #10, RFC 2986) in DER.
func (k *NodeKey) CSR(request Request) ([]byte, error) {
	template := &x509.CertificateRequest{
		SignatureAlgorithm: x509.ECDSAWithSHA256,
		DNSNames:           request.DNSNames,
	}
	for _, address := range request.Addresses {
		template.IPAddresses = append(template.IPAddresses, net.IP(address.Unmap().AsSlice()))
	}
	der, err := x509.CreateCertificateRequest(rand.Reader, template, k.private)
	return der, fault.Wrap(err, fault.Invalid, "pki.NodeKey.CSR", "cannot make a certificate request for these names")
}

// Owns reports whether the certificate's public key is this key's.
func (k *NodeKey) Owns(cert *x509.Certificate) bool {
	public, ok := cert.PublicKey.(*ecdsa.PublicKey)
	return ok && k.private.PublicKey.Equal(public)
}

// readFile reads a small file. A missing file is fault.NotFound.
func readFile(path, op string) ([]byte, error) {
	info, err := os.Stat(path)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, fault.Wrap(err, fault.NotFound, op, "%s does not exist", path)
	}
	if err == nil && info.Size() > maxPEMBytes {
		return nil, fault.New(fault.TooLarge, op, "%s has %d bytes, more than any such file (%d)", path, info.Size(), maxPEMBytes)
	}
	var data []byte
	if err == nil {
		data, err = os.ReadFile(path)
	}
	return data, fault.Wrap(err, fault.Internal, op, "cannot read %s", path)
}
