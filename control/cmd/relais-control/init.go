package main

import (
	"context"
	"crypto/x509"
	"fmt"
	"io"
	"log/slog"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/spf13/cobra"

	"github.com/relais-mta/relais/control"
	"github.com/relais-mta/relais/control/ca"
	"github.com/relais-mta/relais/control/cluster"
	"github.com/relais-mta/relais/control/command"
	"github.com/relais-mta/relais/control/config"
	"github.com/relais-mta/relais/control/service"
	"github.com/relais-mta/relais/control/state"
	"github.com/relais-mta/relais/shared/buildinfo"
	"github.com/relais-mta/relais/shared/fault"
	"github.com/relais-mta/relais/shared/ids"
	"github.com/relais-mta/relais/shared/mailaddr"
	"github.com/relais-mta/relais/shared/pki"
)

// initTimeout bounds the making of a cluster, its first election included.
const initTimeout = 60 * time.Second

// initOutput is what init shows once.
type initOutput struct {
	Cluster     string `json:"cluster"`
	Server      string `json:"server"`
	Endpoint    string `json:"endpoint"`
	CAPin       string `json:"ca_pin"`
	CAFile      string `json:"ca_file"`
	CLIFile     string `json:"cli_file"`
	Admin       string `json:"admin"`
	Password    string `json:"password"`
	RecoveryKey string `json:"recovery_key"`
}

func (a *app) initCommand() *cobra.Command {
	var advertise, configFile string
	cmd := &cobra.Command{
		Use:   "init --data DIR --advertise ADDRESS",
		Short: "Make a new cluster of one server",
		Long: `Make a new cluster with this machine as its first and only voter: its CA,
an admin account, an API key for the command line and the shared pool
"default". The directory must be empty, except for a control.toml.

The one-time password and the recovery key are printed once and kept nowhere.
The recovery key opens the cluster's secrets when the key file of every server
is lost: keep it off this machine.`,
		Example: "  relais-control init --data /var/lib/relais/control --advertise 10.0.0.1\n  relais-control init --data /srv/c1 --advertise ctl1.example.com --config /etc/relais/control.toml --json",
		Args:    cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			if advertise == "" {
				return usagef("--advertise is missing: give the address or name at which relays and people reach this server")
			}
			conf, err := config.Load(configFile, a.dataDir)
			if err != nil {
				return err
			}
			ctx, cancel := context.WithTimeout(cmd.Context(), initTimeout)
			defer cancel()
			out, err := initialise(ctx, paths{a.dataDir}, strings.ToLower(advertise), conf)
			if err != nil {
				return err
			}
			if a.json {
				return printJSON(cmd.OutOrStdout(), out)
			}
			return out.print(cmd.OutOrStdout(), a.dataDir)
		},
	}
	cmd.Flags().StringVar(&advertise, "advertise", "", "address or host name, without a port, that relays and people reach this server at")
	cmd.Flags().StringVar(&configFile, "config", "", "configuration file (default: control.toml in the data directory)")
	return cmd
}

func (o initOutput) print(w io.Writer, dir string) error {
	_, err := fmt.Fprintf(w, `Cluster       %s
Server        %s
Endpoint      %s
CA            %s (pin %s)
Command line  %s
Admin         %s
Password      %s
Recovery key  %s

Password and recovery key are not shown again. Start the server with
  relais-control serve --data %s
`, o.Cluster, o.Server, o.Endpoint, o.CAFile, o.CAPin, o.CLIFile, o.Admin, o.Password, o.RecoveryKey, dir)
	return err
}

// checkAdvertise wants a host name or an address that others can use.
func checkAdvertise(text string) error {
	const op = "relais-control.init"
	if addr, err := netip.ParseAddr(text); err == nil {
		if addr.IsUnspecified() || addr.IsMulticast() || addr.Zone() != "" {
			return fault.Field(op, "advertise", "%s is not an address others can connect to", text)
		}
		return nil
	}
	last := text[strings.LastIndexByte(text, '.')+1:]
	numeric := strings.Trim(last, "0123456789") == "" // RFC 3696 section 2: so it is an address with a mistake
	if d, err := mailaddr.ParseDomain(text); err != nil || d.IsLiteral() || string(d) != text || numeric {
		return fault.Field(op, "advertise", "%q is neither an IP address nor a host name; ports come from the configuration file", text)
	}
	return nil
}

// claimDir makes the directory, which must be empty but for the configuration.
func claimDir(dir string) error {
	const op = "relais-control.init"
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return fault.Wrap(err, fault.Internal, op, "the directory %s cannot be made", dir)
	}
	entries, err := os.ReadDir(dir)
	if err != nil {
		return fault.Wrap(err, fault.Internal, op, "the directory %s cannot be read", dir)
	}
	for _, e := range entries {
		if !keptByInit(e.Name()) {
			return fault.Field(op, "data", "%s is not empty (it holds %s): name an empty directory, or start the server that lives there with serve", dir, e.Name())
		}
	}
	return nil
}

func keptByInit(name string) bool { return name == "control.toml" || name == "lost+found" }

// clearDir takes back what a failed init wrote.
func clearDir(dir string) {
	entries, err := os.ReadDir(dir)
	if err != nil {
		return
	}
	for _, e := range entries {
		if !keptByInit(e.Name()) {
			_ = os.RemoveAll(filepath.Join(dir, e.Name())) // the error that led here is the one to show
		}
	}
}

func initialise(ctx context.Context, p paths, advertise string, conf config.Config) (out initOutput, err error) {
	if err := checkAdvertise(advertise); err != nil {
		return out, err
	}
	if err := claimDir(p.dir); err != nil {
		return out, err
	}
	defer func() {
		if err != nil {
			clearDir(p.dir)
		}
	}()
	if err := os.MkdirAll(p.identity(), 0o700); err != nil {
		return out, fault.Wrap(err, fault.Internal, "relais-control.init", "the directory %s cannot be made", p.identity())
	}
	now := time.Now()
	f := serverFile{Format: serverFileFormat, Advertise: advertise, Raft: hostPort(advertise, conf.Listen.Raft)}
	newID(&f.Cluster, now)
	newID(&f.Server, now)
	material, kek, recovery, err := ca.Create(f.Cluster, now)
	if err != nil {
		return out, err
	}
	if err := pki.WriteKey(p.kek(), kek); err != nil {
		return out, err
	}
	sealer := pki.NewSealer(kek)
	result, err := firstEntries(ctx, p, f, conf, material, sealer)
	if err != nil {
		return out, err
	}
	authority, err := ca.Open(material, f.Cluster, sealer)
	if err != nil {
		return out, err
	}
	if _, err := issueOwn(p, authority, f, conf); err != nil {
		return out, err
	}
	out = initOutput{Cluster: f.Cluster.String(), Server: f.Server.String(), Endpoint: "https://" + hostPort(advertise, conf.Listen.HTTPS), CAPin: authority.Pin().String(), CAFile: p.ca(), CLIFile: p.cli(),
		Admin: result.AdminName, Password: result.AdminPassword, RecoveryKey: recovery}
	if err := pki.WriteFile(p.ca(), pki.EncodeCertificates([]*x509.Certificate{authority.Root()}), 0o644); err != nil {
		return out, err
	}
	if err := writeTOML(p.cli(), cliFile{Endpoints: []string{out.Endpoint}, CAPin: out.CAPin, Key: result.APIKey}, 0o600); err != nil {
		return out, err
	}
	return out, writeTOML(p.server(), f, 0o600)
}

func newID[K ids.Kind](id *ids.ID[K], now time.Time) { *id = ids.New[K](now) }

// firstEntries bootstraps raft and commits what a new cluster begins with.
func firstEntries(ctx context.Context, p paths, f serverFile, conf config.Config, material ca.Material, sealer *pki.Sealer) (result service.InitResult, err error) {
	quiet := slog.New(slog.DiscardHandler)
	if err := cluster.Bootstrap(p.dir, f.Server.String(), f.Raft, quiet); err != nil {
		return result, err
	}
	st := state.New()
	c, err := cluster.Open(cluster.Options{Dir: p.dir, ServerID: f.Server.String(), Address: f.Raft, State: st, Logger: quiet, Registerer: prometheus.NewRegistry(), Halt: func(err error) { panic(err) }})
	if err != nil {
		return result, err
	}
	defer func() {
		if closeErr := c.Close(); err == nil {
			err = closeErr
		}
	}()
	if err := c.WaitReady(ctx); err != nil {
		return result, err
	}
	svc := service.New(service.Options{State: st, Log: c, Sealer: sealer, Logger: quiet, Version: buildinfo.Version()})
	hostname, err := os.Hostname()
	if err != nil || command.CheckName("name", hostname) != nil {
		hostname = "server1"
	}
	return svc.Init(ctx, service.InitRequest{
		Cluster: f.Cluster, CABundle: material.Bundle, CASealed: material.Sealed, KEKID: material.KEKID, RecoverySealed: material.RecoverySealed,
		Server: control.Server{ID: f.Server, Name: hostname, RaftAddress: f.Raft, LinkAddress: hostPort(f.Advertise, conf.Listen.Link), HTTPAddress: hostPort(f.Advertise, conf.Listen.HTTPS), Version: buildinfo.Version(), MaxFSMVersion: command.FSMVersion, State: control.NodeActive},
	})
}
