// Package config reads a control server's bootstrap file: what must be known
// before the first contact with anybody. Everything else is policy.
package config

import (
	"bytes"
	"errors"
	"fmt"
	"io/fs"
	"net/netip"
	"os"
	"path/filepath"
	"strings"

	"github.com/pelletier/go-toml/v2"

	"github.com/relais-mta/relais/shared/fault"
)

// DefaultDataDir is where a control server keeps its state.
const DefaultDataDir = "/var/lib/relais/control"

// fileName is the file's name in the data directory.
const fileName = "control.toml"

// maxFileBytes bounds the file; a bootstrap file is a few lines.
const maxFileBytes = 64 << 10

// Config is the bootstrap file.
type Config struct {
	Listen Listen `toml:"listen"`
	TLS    TLS    `toml:"tls"`
	DNS    DNS    `toml:"dns"`
	Log    Log    `toml:"log"`
	Raft   Raft   `toml:"raft"`
}

// Listen holds the addresses of the listeners.
type Listen struct {
	HTTPS   netip.AddrPort `toml:"https"`   // management API
	Link    netip.AddrPort `toml:"link"`    // relays, QUIC on UDP
	Raft    netip.AddrPort `toml:"raft"`    // other control servers, TLS on TCP and QUIC on UDP
	Metrics netip.AddrPort `toml:"metrics"` // metrics, health, pprof; loopback only
}

// TLS names the certificate for the management API, reloaded on SIGHUP. Without
// it the certificate of the cluster's CA is used, and health says so.
type TLS struct {
	Cert string `toml:"cert"`
	Key  string `toml:"key"`
}

// DNS names the resolvers that records of domains and addresses are checked
// with; empty: those of /etc/resolv.conf.
type DNS struct {
	Resolvers []netip.AddrPort `toml:"resolvers"`
}

// Log sets the log on standard error.
type Log struct {
	Level string `toml:"level"` // debug, info, warn or error
}

// Raft sets how this server speaks with the other control servers.
type Raft struct {
	// Transport is what this server dials the others over: tcp, or quic. It
	// accepts both, so that servers can be switched one after the other.
	Transport string `toml:"transport"`
}

// Default returns the configuration of a server without a file.
func Default() Config {
	anywhere := func(port uint16) netip.AddrPort { return netip.AddrPortFrom(netip.IPv6Unspecified(), port) }
	return Config{
		Listen: Listen{HTTPS: anywhere(8443), Link: anywhere(7443), Raft: anywhere(7444), Metrics: netip.MustParseAddrPort("127.0.0.1:9091")},
		Log:    Log{Level: "info"},
		Raft:   Raft{Transport: "tcp"},
	}
}

// Load reads the file at path over the defaults. An empty path means
// control.toml in the data directory if there is one.
func Load(path, dataDir string) (Config, error) {
	const op = "config.Load"
	optional := path == ""
	if optional {
		path = filepath.Join(dataDir, fileName)
	}
	text, err := os.ReadFile(path)
	if optional && errors.Is(err, fs.ErrNotExist) {
		return Default(), nil
	}
	if err != nil {
		return Config{}, &fault.Error{Kind: fault.Invalid, Op: op, Field: "config", Public: fmt.Sprintf("%s cannot be read", path), Cause: err}
	}
	if len(text) > maxFileBytes {
		return Config{}, fault.Field(op, path, "has %d bytes, allowed are %d", len(text), maxFileBytes)
	}
	c, err := Parse(text)
	var e *fault.Error
	if errors.As(err, &e) {
		e.Field = strings.TrimSuffix(path+": "+e.Field, ": ")
	}
	return c, err
}

// Parse reads the text over the defaults. An unknown key is an error that names
// it and its line.
func Parse(text []byte) (Config, error) {
	const op = "config.Parse"
	c := Default()
	if err := toml.NewDecoder(bytes.NewReader(text)).DisallowUnknownFields().Decode(&c); err != nil {
		return Config{}, decodeFault(op, err)
	}
	if err := c.check(op); err != nil {
		return Config{}, err
	}
	return c, nil
}

func decodeFault(op string, err error) error {
	var unknown *toml.StrictMissingError
	if errors.As(err, &unknown) && len(unknown.Errors) > 0 {
		line, _ := unknown.Errors[0].Position()
		return fault.Field(op, strings.Join(unknown.Errors[0].Key(), "."), "line %d: there is no such key: remove it or correct its spelling", line)
	}
	var bad *toml.DecodeError
	if errors.As(err, &bad) {
		line, _ := bad.Position()
		return fault.Field(op, strings.Join(bad.Key(), "."), "line %d: %s", line, strings.TrimPrefix(bad.Error(), "toml: "))
	}
	return fault.Wrap(err, fault.Invalid, op, "the file is not TOML")
}

func (c *Config) check(op string) error {
	if (c.TLS.Cert == "") != (c.TLS.Key == "") {
		return fault.Field(op, "tls", "cert and key belong together: set both or none")
	}
	switch c.Log.Level {
	case "debug", "info", "warn", "error":
	default:
		return fault.Field(op, "log.level", "is %q: write debug, info, warn or error", c.Log.Level)
	}
	if c.Raft.Transport != "tcp" && c.Raft.Transport != "quic" {
		return fault.Field(op, "raft.transport", "is %q: write tcp or quic", c.Raft.Transport)
	}
	if a := c.Listen.Metrics; !a.Addr().IsLoopback() {
		return fault.Field(op, "listen.metrics", "%s is not a loopback address: metrics and profiles are open to whoever reaches them, use 127.0.0.1:9091", a)
	}
	seen := map[netip.AddrPort]string{}
	for _, l := range []struct {
		name string
		addr netip.AddrPort
	}{{"listen.https", c.Listen.HTTPS}, {"listen.raft", c.Listen.Raft}, {"listen.metrics", c.Listen.Metrics}} {
		if other, taken := seen[l.addr]; taken && l.addr.Port() != 0 {
			return fault.Field(op, l.name, "%s is also in %s: give each listener its own address or port", l.addr, other)
		}
		seen[l.addr] = l.name
	}
	return nil
}
