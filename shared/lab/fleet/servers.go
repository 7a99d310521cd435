package fleet

import (
	"context"
	"crypto/x509"
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"strings"

	"github.com/relais-mta/relais/shared/fault"
)

// maxServers is how many control servers a fleet may have besides the first,
// counting those that were replaced.
const maxServers = 8

// ControlServer is one control server of the fleet.
type ControlServer struct {
	*Process
	Dir  string
	Addr netip.Addr
	ID   string // empty for the first
}

// FirstServer is the control server that the fleet began with.
func (f *Fleet) FirstServer() *ControlServer {
	return &ControlServer{Process: f.Control, Dir: f.dirCtl, Addr: f.block.Addr(placeControl)}
}

// API is the address of the server's management API.
func (s *ControlServer) API() string { return netip.AddrPortFrom(s.Addr, portAPI).String() }

// Metrics is the base URL of the server's metrics and health.
func (s *ControlServer) Metrics() string {
	return "http://" + netip.AddrPortFrom(s.Addr, portMetrics).String()
}

// Link is where relays join and link at this server.
func (s *ControlServer) Link() string { return netip.AddrPortFrom(s.Addr, portLink).String() }

func (s *ControlServer) ready() string { return s.Metrics() + "/readyz" }

// NewServer prepares a directory in which another control server can join: dir,
// or one of the fleet's if that is empty.
func (f *Fleet) NewServer(dir string) (*ControlServer, error) {
	n := len(f.servers)
	if n == maxServers {
		return nil, fault.Field("fleet.NewServer", "servers", "%d are the most", maxServers+1)
	}
	name := fmt.Sprintf("control%d", n+2)
	s := &ControlServer{Dir: dir, Addr: f.block.Addr(placeServer + n)}
	if dir == "" {
		s.Dir = filepath.Join(f.cfg.Dir, name)
	}
	s.Process = &Process{Name: name, Log: filepath.Join(f.cfg.Dir, name+".log"), bin: f.bin("relais-control"), args: []string{"serve", "--data", s.Dir}}
	f.servers = append(f.servers, s)
	return s, f.configure(s)
}

// configure makes the server's directory with a configuration in it.
func (f *Fleet) configure(s *ControlServer) error {
	const op = "fleet.configure"
	if err := os.MkdirAll(s.Dir, 0o700); err != nil {
		return fault.Wrap(err, fault.Internal, op, "the directory %s cannot be made", s.Dir)
	}
	text, err := os.ReadFile(filepath.Join(f.dirCtl, "control.toml"))
	if err != nil {
		return fault.Wrap(err, fault.Internal, op, "the configuration of the first server cannot be read")
	}
	own := strings.ReplaceAll(string(text), f.block.Addr(placeControl).String()+":", s.Addr.String()+":")
	if err := os.WriteFile(filepath.Join(s.Dir, "control.toml"), []byte(own), 0o600); err != nil {
		return fault.Wrap(err, fault.Internal, op, "the configuration of %s cannot be written", s.Name)
	}
	return nil
}

// AddServer lets another control server join by the documented commands, and
// waits until it follows.
func (f *Fleet) AddServer(ctx context.Context) (*ControlServer, error) {
	s, err := f.NewServer("")
	if err != nil {
		return nil, err
	}
	return s, f.JoinServer(ctx, s)
}

// Rejoin lets a server whose data directory was lost join anew at its address.
func (f *Fleet) Rejoin(ctx context.Context, s *ControlServer) error {
	if err := os.RemoveAll(s.Dir); err != nil {
		return fault.Wrap(err, fault.Internal, "fleet.Rejoin", "%s cannot be removed", s.Dir)
	}
	if err := f.configure(s); err != nil {
		return err
	}
	return f.JoinServer(ctx, s)
}

// ServerToken makes a token for a control server.
func (f *Fleet) ServerToken(ctx context.Context) (string, error) {
	var token struct {
		Token string `json:"token"`
	}
	err := f.controlJSON(ctx, &token, "token", "create", "--role", "control")
	return token.Token, err
}

// JoinArgs are the arguments of relais-control that let the server join.
func (f *Fleet) JoinArgs(s *ControlServer, token string) []string {
	return []string{"join", "--token", token, "--data", s.Dir, "--advertise", s.Addr.String(), f.LinkAddr()}
}

// JoinServer lets a prepared server join with a new token, starts it, and waits
// until it follows.
func (f *Fleet) JoinServer(ctx context.Context, s *ControlServer) error {
	token, err := f.ServerToken(ctx)
	if err != nil {
		return err
	}
	var joined struct {
		Server string `json:"server"`
	}
	if err := runJSON(ctx, &joined, f.bin("relais-control"), f.JoinArgs(s, token)...); err != nil {
		return err
	}
	s.ID = joined.Server
	return f.StartServer(ctx, s)
}

// StartServer starts a control server that does not run, and waits until it is
// in touch with the others.
func (f *Fleet) StartServer(ctx context.Context, s *ControlServer) error {
	if err := s.start(); err != nil {
		return err
	}
	return s.waitReady(ctx, s.ready())
}

// Spawn starts a control server and waits for nothing.
func (s *ControlServer) Spawn() error { return s.start() }

// Launch starts control servers together, as after a power cut: none is in
// touch before a majority runs.
func (f *Fleet) Launch(ctx context.Context, servers ...*ControlServer) error {
	for _, s := range servers {
		if err := s.start(); err != nil {
			return err
		}
	}
	for _, s := range servers {
		if err := s.waitReady(ctx, s.ready()); err != nil {
			return err
		}
	}
	return nil
}

// CtlAt runs a relais-control command with the command-line file of one server.
func (f *Fleet) CtlAt(ctx context.Context, s *ControlServer, args ...string) ([]byte, error) {
	return run(ctx, f.bin("relais-control"), append(args, "--data", s.Dir)...)
}

// CA returns the pool with the cluster's CA.
func (f *Fleet) CA() *x509.CertPool { return f.ca }
