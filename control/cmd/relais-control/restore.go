package main

import (
	"bytes"
	"context"
	"crypto/x509"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"log/slog"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"time"

	"github.com/pelletier/go-toml/v2"
	"github.com/prometheus/client_golang/prometheus"
	"github.com/spf13/cobra"

	"github.com/relais-mta/relais/control"
	"github.com/relais-mta/relais/control/api"
	"github.com/relais-mta/relais/control/cluster"
	"github.com/relais-mta/relais/control/command"
	"github.com/relais-mta/relais/control/config"
	"github.com/relais-mta/relais/control/service"
	"github.com/relais-mta/relais/control/state"
	"github.com/relais-mta/relais/shared/buildinfo"
	"github.com/relais-mta/relais/shared/fault"
	"github.com/relais-mta/relais/shared/pki"
)

// livingTimeout bounds the question whether a server of the cluster is alive.
const livingTimeout = 3 * time.Second

// restoreOutput is what restore and recover show.
type restoreOutput struct {
	Cluster    string `json:"cluster"`
	Server     string `json:"server"`
	Endpoint   string `json:"endpoint"`
	Generation uint64 `json:"generation"`
	Index      uint64 `json:"index"` // of the last change that is in it
	Relays     int    `json:"relays"`
	CLIFile    string `json:"cli_file"`
	KeptLog    string `json:"kept_log,omitempty"`
}

func (o restoreOutput) print(w io.Writer, dir string) error {
	if err := printPairs(w, "Cluster", o.Cluster, "Server", o.Server, "Endpoint", o.Endpoint, "Generation", fmt.Sprint(o.Generation), "Last change", fmt.Sprint(o.Index), "Relays", fmt.Sprint(o.Relays), "Command line", o.CLIFile, "Log of before", o.KeptLog); err != nil {
		return err
	}
	_, err := fmt.Fprintf(w, `
The cluster is in recovery mode: addresses do not change hands until every
relay was heard (relais-control recovery show). Next:
  relais-control serve --data %s
Never start a server of before again: empty its data directory and join it.
`, dir)
	return err
}

func (a *app) restoreCommand() *cobra.Command {
	var key openingKey
	var advertise, configFile string
	cmd := &cobra.Command{
		Use:   "restore FILE --data DIR --advertise ADDRESS",
		Short: "Make a cluster of one server from a backup",
		Long: `Make the cluster of a backup anew, with this machine as its only server, when
all of its servers are lost. The directory must be empty, except for a
control.toml, and no server of the cluster may be running: a cluster that lives
is repaired with join, one that lost its majority with recover.

The cluster gets a new generation, so that relays do not listen to servers of
before, and is in recovery mode until every relay was heard. Relays find it by
themselves if this server has the address of one of the old ones. Join tokens
of before are void.`,
		Example: "  relais-control restore /srv/backups/relais-2026-01-31 --data /var/lib/relais/control --advertise 10.0.0.1 --recovery-key-file key.txt\n  relais-control restore backup --data /srv/c1 --advertise ctl1.example.com --kek /mnt/old/identity/kek.key",
		Args:    cobra.ExactArgs(1),
	}
	key.flags(cmd)
	cmd.Flags().StringVar(&advertise, "advertise", "", "address or host name, without a port, that relays and people reach this server at")
	cmd.Flags().StringVar(&configFile, "config", "", "configuration file (default: control.toml in the data directory)")
	cmd.RunE = func(cmd *cobra.Command, args []string) error {
		if advertise == "" {
			return usagef("--advertise is missing: give the address or name at which relays and people reach this server, best that of a server of before")
		}
		if (key.kekFile == "") == (key.recoveryFile == "") {
			return usagef("give either --recovery-key-file or --kek: one of them opens the backup")
		}
		conf, err := config.Load(configFile, a.dataDir)
		if err != nil {
			return err
		}
		archive, closeFile, err := openBackup(args[0])
		if err != nil {
			return err
		}
		defer closeFile()
		kek, err := key.open(cmd, archive.Manifest)
		if err != nil {
			return err
		}
		scratch, err := archive.Restore(kek)
		if err != nil {
			return err
		}
		ctx, cancel := context.WithTimeout(cmd.Context(), initTimeout)
		defer cancel()
		out, err := restore(ctx, paths{a.dataDir}, strings.ToLower(advertise), conf, kek, scratch)
		if err != nil {
			return err
		}
		if a.json {
			return printJSON(cmd.OutOrStdout(), out)
		}
		return out.print(cmd.OutOrStdout(), a.dataDir)
	}
	return cmd
}

// restore makes the directory of a server that holds the scratch state.
func restore(ctx context.Context, p paths, advertise string, conf config.Config, kek pki.Key, scratch *state.Store) (out restoreOutput, err error) {
	const op = "relais-control.restore"
	if err := checkAdvertise(advertise); err != nil {
		return out, err
	}
	if err := claimDir(p.dir); err != nil {
		return out, err
	}
	from := scratch.Read()
	authority, err := openCA(from.Cluster(), pki.NewSealer(kek))
	if err != nil {
		return out, err
	}
	if alive := living(ctx, from, authority.Pin()); alive != "" {
		return out, fault.Field(op, "data", "the cluster lives: %s answers. Repair a cluster that lives with join, one that lost its majority with recover; to go back to this backup, stop every server first", alive)
	}
	defer func() {
		if err != nil {
			clearDir(p.dir)
		}
	}()
	if err := os.MkdirAll(p.identity(), 0o700); err != nil {
		return out, fault.Wrap(err, fault.Internal, op, "the directory %s cannot be made", p.identity())
	}
	if err := pki.WriteKey(p.kek(), kek); err != nil {
		return out, err
	}
	f := serverFile{Format: serverFileFormat, Cluster: from.Cluster().ID, Advertise: advertise, Raft: hostPort(advertise, conf.Listen.Raft)}
	newID(&f.Server, time.Now())
	if err := cluster.Bootstrap(p.dir, f.Server.String(), f.Raft, slog.New(slog.DiscardHandler)); err != nil {
		return out, err
	}
	var snapshot bytes.Buffer
	if _, err := from.WriteTo(&snapshot); err != nil {
		return out, err
	}
	row, key, err := newGeneration(ctx, p, f, conf, pki.NewSealer(kek), control.CauseRestore, func(c *cluster.Cluster, _ *state.Store) error {
		return c.Restore(ctx, &snapshot, int64(snapshot.Len()), from.Index())
	})
	if err != nil {
		return out, err
	}
	out = restoreOutput{Cluster: f.Cluster.String(), Server: f.Server.String(), Endpoint: "https://" + hostPort(advertise, conf.Listen.HTTPS), Generation: row.Generation, Index: from.Index(), Relays: len(from.Nodes()), CLIFile: p.cli()}
	return out, writeIdentity(p, f, conf, row, pki.NewSealer(kek), cliFile{Endpoints: []string{out.Endpoint}, Key: key})
}

// newGeneration starts raft without peers, lets prepare fill it, and commits
// the new generation and a key for this server's command line.
func newGeneration(ctx context.Context, p paths, f serverFile, conf config.Config, sealer *pki.Sealer, cause control.RecoveryCause, prepare func(*cluster.Cluster, *state.Store) error) (row *control.Cluster, key string, err error) {
	quiet := slog.New(slog.DiscardHandler)
	st := state.New()
	var halted error
	c, err := cluster.Open(cluster.Options{Dir: p.dir, ServerID: f.Server.String(), Address: f.Raft, State: st, Logger: quiet, Registerer: prometheus.NewRegistry(), Halt: func(err error) { halted = err }})
	if err != nil {
		return nil, "", errors.Join(halted, err)
	}
	defer func() {
		if closeErr := c.Close(); err == nil {
			err = closeErr
		}
	}()
	if err := c.WaitReady(ctx); err != nil {
		return nil, "", err
	}
	if err := prepare(c, st); err != nil {
		return nil, "", err
	}
	server := control.Server{ID: f.Server, Name: "server1", MaxFSMVersion: command.FSMVersion}
	for _, old := range st.Read().Servers() {
		if old.ID == f.Server {
			server = *old
		}
	}
	if hostname, err := os.Hostname(); err == nil && command.CheckName("name", hostname) == nil && server.RaftAddress == "" {
		server.Name = hostname
	}
	server.RaftAddress, server.LinkAddress, server.HTTPAddress = f.Raft, hostPort(f.Advertise, conf.Listen.Link), hostPort(f.Advertise, conf.Listen.HTTPS)
	server.Version, server.MaxFSMVersion, server.State = buildinfo.Version(), command.FSMVersion, control.NodeActive
	svc := service.New(service.Options{State: st, Log: c, Sealer: sealer, Logger: quiet, Version: buildinfo.Version()})
	if row, err = svc.Recover(ctx, cause, server); err != nil {
		return nil, "", err
	}
	// Relays may have dropped the issuing CA of this state; a newer one they believe.
	if row, err = svc.RenewCA(ctx, string(cause)); err != nil {
		return nil, "", err
	}
	key, err = svc.IssueAdminKey(ctx, string(cause))
	return row, key, err
}

// writeIdentity writes what serve and the command line need, server.toml last.
func writeIdentity(p paths, f serverFile, conf config.Config, row *control.Cluster, sealer *pki.Sealer, cli cliFile) error {
	authority, err := openCA(row, sealer)
	if err != nil {
		return err
	}
	if _, err := issueOwn(p, authority, f, conf); err != nil {
		return err
	}
	if err := pki.WriteFile(p.ca(), pki.EncodeCertificates([]*x509.Certificate{authority.Root()}), 0o644); err != nil {
		return err
	}
	cli.CAPin = authority.Pin().String()
	if err := writeTOML(p.cli(), cli, 0o600); err != nil {
		return err
	}
	return writeTOML(p.server(), f, 0o600)
}

// living returns the endpoint of a server of the cluster that answers, or "".
func living(ctx context.Context, r *state.Reader, pin pki.Pin) string {
	c := r.Cluster()
	var endpoints []string
	for _, s := range r.Servers() {
		if s.HTTPAddress != "" {
			endpoints = append(endpoints, "https://"+s.HTTPAddress)
		}
	}
	return answering(ctx, pin, endpoints, func(v api.Version) bool { return v.Cluster == c.ID.String() })
}

// answering asks all endpoints at once what they are and returns the first that
// the condition holds for, or "".
func answering(ctx context.Context, pin pki.Pin, endpoints []string, holds func(api.Version) bool) string {
	ctx, cancel := context.WithTimeout(ctx, livingTimeout)
	defer cancel()
	h := &http.Client{Transport: &http.Transport{TLSClientConfig: trust(pin), DisableKeepAlives: true}}
	found := make([]bool, len(endpoints))
	var asking sync.WaitGroup
	for i, endpoint := range endpoints {
		asking.Go(func() {
			r, err := http.NewRequestWithContext(ctx, http.MethodGet, endpoint+api.Prefix+"/version", nil)
			if err != nil {
				return
			}
			resp, err := h.Do(r)
			if err != nil {
				return // it does not live, or not for us
			}
			defer resp.Body.Close()
			var v api.Version
			found[i] = json.NewDecoder(io.LimitReader(resp.Body, maxAnswerBytes)).Decode(&v) == nil && holds(v)
		})
	}
	asking.Wait()
	for i, is := range found {
		if is {
			return endpoints[i]
		}
	}
	return ""
}

func (a *app) recoverCommand() *cobra.Command {
	var configFile string
	cmd := &cobra.Command{
		Use:   "recover --data DIR",
		Short: "Go on with this server alone after the majority was lost",
		Long: `Make the server of the data directory the only one of its cluster, when the
majority of the servers is lost for good. Choose the server with the highest
index. Changes that only the lost servers had are lost; the log of before is
kept beside the new one. Stop every server of the cluster first; join new ones
afterwards, with empty data directories.

The cluster gets a new generation and is in recovery mode, as after restore.`,
		Example: "  relais-control recover --data /var/lib/relais/control",
		Args:    cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			conf, err := config.Load(configFile, a.dataDir)
			if err != nil {
				return err
			}
			ctx, cancel := context.WithTimeout(cmd.Context(), initTimeout)
			defer cancel()
			out, err := recoverServer(ctx, paths{a.dataDir}, conf)
			if err != nil {
				return err
			}
			if a.json {
				return printJSON(cmd.OutOrStdout(), out)
			}
			return out.print(cmd.OutOrStdout(), a.dataDir)
		},
	}
	cmd.Flags().StringVar(&configFile, "config", "", "configuration file (default: control.toml in the data directory)")
	return cmd
}

// recovering is a file that stands while recover is under way: serve does not
// start on a directory that has it.
func (p paths) recovering() string { return filepath.Join(p.dir, "recovering") }

// checkRecovered refuses a directory in which recover was interrupted.
func checkRecovered(p paths) error {
	if _, err := os.Lstat(p.recovering()); errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	return fault.Field("relais-control.serve", "data", "a recover was interrupted in %s: run `relais-control recover --data %s` again", p.dir, p.dir)
}

func recoverServer(ctx context.Context, p paths, conf config.Config) (out restoreOutput, err error) {
	const op = "relais-control.recover"
	f, err := loadServerFile(p)
	if err != nil {
		return out, err
	}
	unlock, err := lockDir(p)
	if err != nil {
		return out, err
	}
	defer unlock()
	kek, err := pki.LoadKey(p.kek())
	if err != nil {
		return out, err
	}
	if leader := leading(ctx, p); leader != "" {
		return out, fault.Field(op, "data", "the cluster has a leader, %s: nothing needs to be recovered; replace lost servers with join", leader)
	}
	out = restoreOutput{Cluster: f.Cluster.String(), Server: f.Server.String(), Endpoint: "https://" + hostPort(f.Advertise, conf.Listen.HTTPS), CLIFile: p.cli()}
	out.KeptLog = filepath.Join(p.dir, "raft.before-"+time.Now().UTC().Format("20060102T150405Z"))
	if err := os.CopyFS(out.KeptLog, os.DirFS(filepath.Join(p.dir, "raft"))); err != nil {
		return out, fault.Wrap(errors.Join(err, os.RemoveAll(out.KeptLog)), fault.Internal, op, "the log of before cannot be kept as %s: is there space left?", out.KeptLog)
	}
	if err := pki.WriteFile(p.recovering(), nil, 0o600); err != nil {
		return out, err
	}
	if err := cluster.Recover(p.dir, f.Server.String(), f.Raft, slog.New(slog.DiscardHandler)); err != nil {
		return out, err
	}
	row, key, err := newGeneration(ctx, p, f, conf, pki.NewSealer(kek), control.CauseRecover, func(_ *cluster.Cluster, st *state.Store) error {
		r := st.Read()
		out.Index, out.Relays = r.Index(), len(r.Nodes())
		return nil
	})
	if err != nil {
		return out, err
	}
	out.Generation = row.Generation
	if err := writeIdentity(p, f, conf, row, pki.NewSealer(kek), cliFile{Endpoints: []string{out.Endpoint}, Key: key}); err != nil {
		return out, err
	}
	if err := os.Remove(p.recovering()); err != nil {
		return out, fault.Wrap(err, fault.Internal, op, "%s cannot be removed: remove it before serve", p.recovering())
	}
	return out, nil
}

// leading returns the endpoint of a server that leads, by the file of this
// directory's command line.
func leading(ctx context.Context, p paths) string {
	text, err := os.ReadFile(p.cli())
	if err != nil {
		return ""
	}
	var file cliFile
	if err := toml.Unmarshal(text, &file); err != nil {
		return ""
	}
	raw, err := hex.DecodeString(file.CAPin)
	if err != nil || len(raw) != len(pki.Pin{}) {
		return ""
	}
	return answering(ctx, pki.Pin(raw), file.Endpoints, func(v api.Version) bool { return v.Leader })
}
