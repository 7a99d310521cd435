// Package config reads a relay's bootstrap file: what must be known before the
// first contact with the control plane. Everything else is policy, which
// arrives over the link, so that a fleet is changed in one place.
package config

import (
	"bytes"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"strconv"
	"strings"

	"github.com/pelletier/go-toml/v2"

	"github.com/relais-mta/relais/shared/fault"
)

// DefaultDataDir is where a relay keeps its state.
const DefaultDataDir = "/var/lib/relais/relay"

// DefaultHandoverPort is where a relay takes mail of other relays.
const DefaultHandoverPort = 7445

// maxFileBytes bounds the file; a bootstrap file is a few lines.
const maxFileBytes = 64 << 10

// Config is the bootstrap file.
type Config struct {
	Hostname string  `toml:"hostname"` // name said in our greetings; empty: the host's own
	Listen   Listen  `toml:"listen"`
	Control  Control `toml:"control"`
	TLS      TLS     `toml:"tls"`
	DNS      DNS     `toml:"dns"`
	Lab      Lab     `toml:"lab"`
	Log      Log     `toml:"log"`
}

// Listen holds address:port pairs; an empty list turns a listener off.
type Listen struct {
	Submissions []netip.AddrPort `toml:"submissions"` // implicit TLS, RFC 8314 section 3.3: port 465
	Submission  []netip.AddrPort `toml:"submission"`  // STARTTLS, RFC 6409 section 3.1: port 587
	Inbound     []netip.AddrPort `toml:"inbound"`     // our own signed return paths: port 25
	Metrics     netip.AddrPort   `toml:"metrics"`     // metrics, health, pprof
	// Handover is where other relays of the cluster hand over mail; nil, when the
	// file does not say: DefaultHandoverPort on all addresses, if it is free.
	Handover []netip.AddrPort `toml:"handover"`
	// HandoverAdvertise is host:port at which the others reach it; empty: the
	// address of the listener or, if that is all of them, the one that the relay
	// links to control from.
	HandoverAdvertise string `toml:"handover_advertise"`
	// Proxies are balancers in front of the submission listeners, which must
	// begin each connection with a PROXY header (version 1 or 2). Others cannot.
	Proxies []netip.Prefix `toml:"proxies"`
}

// Control tells where the control servers are.
type Control struct {
	Addresses []string `toml:"addresses"` // host:port of the relay link; empty: as learned at join
}

// TLS names the certificate for SMTP listeners, reloaded on SIGHUP. Without it
// the certificate of the cluster's CA is used, and health says so.
type TLS struct {
	Cert string `toml:"cert"`
	Key  string `toml:"key"`
}

// DNS names the resolvers; empty: those of /etc/resolv.conf. Validating are
// those of them whose word about DNSSEC is taken, because they validate and the
// way to them is safe; absent: those on loopback addresses, [] is none.
type DNS struct {
	Resolvers  []netip.AddrPort `toml:"resolvers"`
	Validating []netip.AddrPort `toml:"validating"`
}

// Lab opens what a real relay must never do; it is for test networks.
type Lab struct {
	SMTPPort     uint16 `toml:"smtp_port"`     // deliver to this port instead of 25
	AllowPrivate bool   `toml:"allow_private"` // deliver to loopback and private addresses
	// ClearSubmission lets clients of listen.submission log in and send without
	// TLS, as measurements against servers without TLS need.
	ClearSubmission bool `toml:"clear_submission"`
}

// Log sets the log on standard error.
type Log struct {
	Level string `toml:"level"` // debug, info, warn or error
}

// Default returns the configuration of a relay without a file.
func Default() Config {
	anyAddr := func(port uint16) []netip.AddrPort {
		return []netip.AddrPort{netip.AddrPortFrom(netip.IPv6Unspecified(), port)}
	}
	return Config{
		Listen: Listen{
			Submissions: anyAddr(465),
			Submission:  anyAddr(587),
			Inbound:     anyAddr(25),
			Metrics:     netip.MustParseAddrPort("127.0.0.1:9090"),
		},
		Log: Log{Level: "info"},
	}
}

// Load reads the file at path over the defaults. An empty path means
// relay.toml in the data directory if there is one.
func Load(path, dataDir string) (Config, error) {
	const op = "config.Load"
	optional := path == ""
	if optional {
		path = filepath.Join(dataDir, "relay.toml")
	}
	text, err := os.ReadFile(path)
	if optional && errors.Is(err, fs.ErrNotExist) {
		return Default(), nil
	}
	if err != nil {
		return Config{}, fault.Wrap(err, fault.Invalid, op, "cannot read the configuration file %s", path)
	}
	if len(text) > maxFileBytes {
		return Config{}, fault.Field(op, path, "has %d bytes, a configuration file has at most %d", len(text), maxFileBytes)
	}
	c, err := Parse(text)
	if err != nil {
		var e *fault.Error
		if errors.As(err, &e) {
			e.Field = path + ": " + e.Field
		}
		return Config{}, err
	}
	return c, nil
}

// Parse reads the TOML text over the defaults; an unknown key is an error.
func Parse(text []byte) (Config, error) {
	const op = "config.Parse"
	c := Default()
	dec := toml.NewDecoder(bytes.NewReader(text)).DisallowUnknownFields()
	if err := dec.Decode(&c); err != nil {
		return Config{}, decodeFault(op, err)
	}
	return c, c.check(op)
}

func decodeFault(op string, err error) error {
	var unknown *toml.StrictMissingError
	if errors.As(err, &unknown) && len(unknown.Errors) > 0 {
		row, _ := unknown.Errors[0].Position()
		key := strings.Join(unknown.Errors[0].Key(), ".")
		return fault.Field(op, key, "line %d: there is no such key; remove it or mend its spelling", row)
	}
	var bad *toml.DecodeError
	if errors.As(err, &bad) {
		row, _ := bad.Position()
		return &fault.Error{Kind: fault.Invalid, Op: op, Field: strings.Join(bad.Key(), "."),
			Public: fmt.Sprintf("line %d: the value does not fit: %s", row, bad.Error())}
	}
	return fault.Wrap(err, fault.Invalid, op, "not a TOML file")
}

func (c *Config) check(op string) error {
	if (c.TLS.Cert == "") != (c.TLS.Key == "") {
		return fault.Field(op, "tls", "cert and key belong together; set both or none")
	}
	switch c.Log.Level {
	case "debug", "info", "warn", "error":
	default:
		return fault.Field(op, "log.level", "is %q; write debug, info, warn or error", c.Log.Level)
	}
	seen := make(map[netip.AddrPort]string)
	for _, l := range []struct {
		name  string
		addrs []netip.AddrPort
	}{
		{"listen.submissions", c.Listen.Submissions}, {"listen.submission", c.Listen.Submission},
		{"listen.inbound", c.Listen.Inbound}, {"listen.handover", c.Listen.Handover}, {"listen.metrics", []netip.AddrPort{c.Listen.Metrics}},
	} {
		for _, a := range l.addrs {
			if other, taken := seen[a]; taken && a.Port() != 0 {
				return fault.Field(op, l.name, "%s is also in %s; give each listener its own address or port", a, other)
			}
			seen[a] = l.name
		}
	}
	for i, p := range c.Listen.Proxies {
		if p.Bits() == 0 || p != p.Masked() || p.Addr().Is4In6() {
			return fault.Field(op, fmt.Sprintf("listen.proxies[%d]", i), "%s is not a network of balancers; write one such as 10.0.0.0/24 or 10.0.0.7/32: whoever is in it can claim to be any client", p)
		}
	}
	if a := c.Listen.HandoverAdvertise; a != "" {
		host, port, err := net.SplitHostPort(a)
		if n, perr := strconv.ParseUint(port, 10, 16); err != nil || host == "" || perr != nil || n == 0 {
			return fault.Field(op, "listen.handover_advertise", "is %q; write host:port as other relays reach it, such as edge-1.example:7445", a)
		}
	}
	if a := c.Listen.Metrics; a.IsValid() && !a.Addr().IsLoopback() {
		return fault.Field(op, "listen.metrics", "%s is not a loopback address; metrics and profiles are not protected, use 127.0.0.1:9090", a)
	}
	return nil
}
