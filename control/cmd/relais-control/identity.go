package main

import (
	"crypto/tls"
	"errors"
	"io/fs"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"strconv"
	"time"

	"github.com/pelletier/go-toml/v2"

	"github.com/relais-mta/relais/control"
	"github.com/relais-mta/relais/control/ca"
	"github.com/relais-mta/relais/control/config"
	"github.com/relais-mta/relais/shared/fault"
	"github.com/relais-mta/relais/shared/ids"
	"github.com/relais-mta/relais/shared/pki"
)

// paths names the files of a server's data directory.
type paths struct{ dir string }

func (p paths) server() string   { return filepath.Join(p.dir, "server.toml") }
func (p paths) cli() string      { return filepath.Join(p.dir, "cli.toml") }
func (p paths) ca() string       { return filepath.Join(p.dir, "ca.pem") }
func (p paths) socket() string   { return filepath.Join(p.dir, "admin.sock") }
func (p paths) lock() string     { return filepath.Join(p.dir, "lock") }
func (p paths) kek() string      { return filepath.Join(p.dir, "identity", "kek.key") }
func (p paths) nodeKey() string  { return filepath.Join(p.dir, "identity", "node.key") }
func (p paths) leaf() string     { return filepath.Join(p.dir, "identity", "leaf.pem") }
func (p paths) bundle() string   { return filepath.Join(p.dir, "identity", "ca.pem") }
func (p paths) identity() string { return filepath.Join(p.dir, "identity") }

// serverFile is DIR/server.toml: who this server is. It is written last by
// init, so a directory that has it is whole.
type serverFile struct {
	Format    int         `toml:"format"`
	Cluster   ids.Cluster `toml:"cluster"`
	Server    ids.Node    `toml:"server"`
	Advertise string      `toml:"advertise"`       // host or address that others reach this server at
	Raft      string      `toml:"raft"`            // host:port that peers know this server by; it never changes
	Peers     []string    `toml:"peers,omitempty"` // raft addresses of the others when this server joined
}

const serverFileFormat = 1

func loadServerFile(p paths) (serverFile, error) {
	const op = "relais-control.serve"
	var f serverFile
	text, err := os.ReadFile(p.server())
	if errors.Is(err, fs.ErrNotExist) {
		return f, fault.Field(op, "data", "%s holds no server: run `relais-control init --data %s --advertise ADDRESS` first", p.dir, p.dir)
	}
	if err != nil {
		return f, fault.Wrap(err, fault.Internal, op, "%s cannot be read", p.server())
	}
	if err := toml.Unmarshal(text, &f); err != nil || f.Server.IsZero() || f.Cluster.IsZero() {
		return f, fault.Wrap(orDamaged(err), fault.Invalid, op, "%s is damaged: restore the data directory from a backup", p.server())
	}
	if f.Format != serverFileFormat {
		return f, fault.New(fault.Invalid, op, "%s has format %d, this program knows %d: install a newer release", p.server(), f.Format, serverFileFormat)
	}
	return f, nil
}

func orDamaged(err error) error {
	if err == nil {
		return errors.New("an id is missing")
	}
	return err
}

func writeTOML(path string, v any, mode fs.FileMode) error {
	text, err := toml.Marshal(v)
	if err != nil {
		return fault.Wrap(err, fault.Internal, "relais-control", "%s cannot be written", path)
	}
	return pki.WriteFile(path, text, mode)
}

// names returns what the server's certificate is for besides its identity.
func names(advertise string, c config.Config) pki.Request {
	req := pki.Request{DNSNames: []string{"localhost"}, Addresses: []netip.Addr{netip.MustParseAddr("127.0.0.1"), netip.IPv6Loopback()}}
	add := func(a netip.Addr) {
		if a.IsValid() && !a.IsUnspecified() && !a.IsLoopback() || a.IsLoopback() && a.String() != "127.0.0.1" && a.String() != "::1" {
			req.Addresses = append(req.Addresses, a)
		}
	}
	if a, err := netip.ParseAddr(advertise); err == nil {
		add(a)
	} else {
		req.DNSNames = append(req.DNSNames, advertise)
	}
	if a := c.Listen.HTTPS.Addr(); a.String() != advertise {
		add(a)
	}
	return req
}

// hostPort joins the advertised host with the port of a listener.
func hostPort(advertise string, listen netip.AddrPort) string {
	return net.JoinHostPort(advertise, strconv.Itoa(int(listen.Port())))
}

// openCA unseals the issuing key of the cluster with this server's KEK.
func openCA(cluster *control.Cluster, sealer *pki.Sealer) (*ca.Authority, error) {
	return ca.Open(ca.Material{Bundle: cluster.CABundle, Sealed: cluster.CASealed, KEKID: cluster.KEKID, RecoverySealed: cluster.RecoverySealed}, cluster.ID, sealer)
}

// issueOwn makes this server's certificate and writes it where serve finds it.
func issueOwn(p paths, authority *ca.Authority, f serverFile, c config.Config) (*tls.Certificate, error) {
	cert, err := makeOwn(p, authority, f, c)
	if err != nil {
		return nil, err
	}
	return cert, saveOwn(p, authority, cert)
}

// makeOwn makes this server's certificate.
func makeOwn(p paths, authority *ca.Authority, f serverFile, c config.Config) (*tls.Certificate, error) {
	key, err := pki.LoadOrCreateNodeKey(p.nodeKey())
	if err != nil {
		return nil, err
	}
	return authority.Issue(key, pki.RoleControl, f.Server, names(f.Advertise, c), time.Now())
}

// saveOwn writes this server's certificate and the CAs it believes.
func saveOwn(p paths, authority *ca.Authority, cert *tls.Certificate) error {
	chain, err := pki.ParseChain(cert.Certificate)
	if err != nil {
		return err
	}
	if err := pki.WriteFile(p.leaf(), pki.EncodeCertificates(chain), 0o600); err != nil {
		return err
	}
	return pki.WriteFile(p.bundle(), pki.EncodeCertificates(authority.Bundle()), 0o644)
}
