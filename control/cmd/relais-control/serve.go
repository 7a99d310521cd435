package main

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"net"
	"net/http"
	"net/netip"
	"os"
	"os/signal"
	"sync/atomic"
	"syscall"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/spf13/cobra"
	"golang.org/x/sync/errgroup"
	"golang.org/x/sys/unix"

	"github.com/relais-mta/relais/control"
	"github.com/relais-mta/relais/control/api"
	"github.com/relais-mta/relais/control/backup"
	"github.com/relais-mta/relais/control/cluster"
	"github.com/relais-mta/relais/control/config"
	"github.com/relais-mta/relais/control/dispatch"
	"github.com/relais-mta/relais/control/quota"
	"github.com/relais-mta/relais/control/service"
	"github.com/relais-mta/relais/control/state"
	"github.com/relais-mta/relais/shared/buildinfo"
	"github.com/relais-mta/relais/shared/fault"
	"github.com/relais-mta/relais/shared/memlimit"
	"github.com/relais-mta/relais/shared/pki"
	"github.com/relais-mta/relais/shared/telemetry"
)

const (
	shutdownTimeout    = 25 * time.Second // of the 30 s that SIGTERM gives
	renewalCheckPeriod = 10 * time.Minute
	headerTimeout      = 10 * time.Second
	requestTimeout     = 60 * time.Second
	idleTimeout        = 2 * time.Minute
	maxHeaderBytes     = 64 << 10
)

func (a *app) serveCommand() *cobra.Command {
	var configFile string
	cmd := &cobra.Command{
		Use:     "serve --data DIR",
		Short:   "Run this server",
		Long:    "Run the control server of the data directory until SIGTERM or SIGINT. SIGHUP reads the certificate files of tls.cert and tls.key again. Logs go to standard error as JSON.",
		Example: "  relais-control serve --data /var/lib/relais/control\n  relais-control serve --data /srv/c1 --config /etc/relais/control.toml",
		Args:    cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			conf, err := config.Load(configFile, a.dataDir)
			if err != nil {
				return err
			}
			level, err := telemetry.ParseLevel(conf.Log.Level)
			if err != nil {
				return err
			}
			s := &server{paths: paths{a.dataDir}, conf: conf, logger: telemetry.NewLogger(os.Stderr, level)}
			return s.run(cmd.Context())
		},
	}
	cmd.Flags().StringVar(&configFile, "config", "", "configuration file (default: control.toml in the data directory)")
	return cmd
}

// server is a running control server.
type server struct {
	paths    paths
	conf     config.Config
	logger   *slog.Logger
	file     serverFile
	health   *telemetry.Health
	registry *prometheus.Registry
	holder   *pki.Holder // certificate of the cluster's CA
	web      *pki.Holder // certificate of the API: holder, or the configured files
	sealer   *pki.Sealer
	cluster  *cluster.Cluster
	state    *state.Store
	keeper   *backup.Keeper
	service  *service.Service
	kek      pki.Key
	// authority signs as the newest state says.
	authority authority
	// answering is service once other servers may be answered from it.
	answering atomic.Pointer[service.Service]
	sessions  atomic.Pointer[dispatch.Server] // nil before relays may link
	quota     *quota.Quota

	supervisor telemetry.Supervisor
}

func (s *server) run(ctx context.Context) error {
	var err error
	if s.file, err = loadServerFile(s.paths); err != nil {
		return err
	}
	if err := checkRecovered(s.paths); err != nil {
		return err
	}
	unlock, err := lockDir(s.paths)
	if err != nil {
		return err
	}
	defer unlock()
	if err := s.loadKeys(); err != nil {
		return err
	}
	memlimit.Apply(os.DirFS("/"), os.Getenv, s.logger)
	s.supervisor = telemetry.NewSupervisor(os.Getenv, s.logger)
	s.health = telemetry.NewHealth(time.Now)
	s.registry = telemetry.NewRegistry("control", s.health)
	st := state.New()
	s.state = st
	if s.keeper, err = s.newKeeper(st); err != nil {
		return err
	}
	key, err := pki.LoadNodeKey(s.paths.nodeKey())
	if err != nil {
		return err
	}
	stream, err := cluster.Listen(cluster.StreamOptions{Bind: s.conf.Listen.Raft.String(), Advertise: s.file.Raft, Transport: s.conf.Raft.Transport, Holder: s.holder, Cluster: s.file.Cluster,
		ResetKey: key.Derive("raft quic stateless reset"), Check: checkPeer(st), Known: knowsKey(st), Logger: s.logger})
	if err != nil {
		return err
	}
	halt := func(err error) {
		s.logger.Error("this server halts", "error", err)
		os.Exit(exitFailed)
	}
	s.cluster, err = cluster.Open(cluster.Options{Dir: s.paths.dir, ServerID: s.file.Server.String(), Address: s.file.Raft, Stream: stream, State: st, Logger: s.logger, Registerer: s.registry, Halt: halt, Requests: s.requests()})
	if err != nil {
		return errors.Join(err, stream.Close())
	}
	s.service = service.New(service.Options{State: st, Log: s.cluster, Sealer: s.sealer, Logger: s.logger, Version: buildinfo.Version(), Backups: s.keeper})
	if s.quota, err = s.newQuota(); err != nil {
		return errors.Join(err, s.cluster.Close())
	}
	s.service.SetMembership(membership{s.cluster}, s.file.Server)
	s.service.SetLender(s.quota)
	s.service.SetCertificateState(func() service.CertificateState { return service.CertificateStateOf(s.holder) })
	s.answering.Store(s.service)
	err = s.serve(ctx)
	s.logger.Info("stopped")
	return errors.Join(err, s.cluster.Close())
}

func (s *server) loadKeys() error {
	kek, err := pki.LoadKey(s.paths.kek())
	if err != nil {
		return err
	}
	s.kek, s.sealer = kek, pki.NewSealer(kek)
	if s.holder, err = pki.LoadHolder(pki.Files{Cert: s.paths.leaf(), Key: s.paths.nodeKey(), CA: s.paths.bundle()}); err != nil {
		return err
	}
	s.web = s.holder
	if s.conf.TLS.Cert != "" {
		s.web, err = pki.LoadHolder(pki.Files{Cert: s.conf.TLS.Cert, Key: s.conf.TLS.Key})
	}
	return err
}

// lockDir keeps a second server off the directory.
func lockDir(p paths) (unlock func(), err error) {
	const op = "relais-control.serve"
	f, err := os.OpenFile(p.lock(), os.O_CREATE|os.O_RDWR, 0o600)
	if err != nil {
		return nil, fault.Wrap(err, fault.Internal, op, "%s cannot be opened", p.lock())
	}
	if err := unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB); err != nil {
		_ = f.Close()
		return nil, fault.Field(op, "data", "another server runs on %s: stop it first", p.dir)
	}
	return func() { _ = f.Close() }, nil // closing releases the lock
}

// serve runs all listeners until the context ends or one of them fails.
func (s *server) serve(ctx context.Context) error {
	group, ctx := errgroup.WithContext(ctx)
	metrics, err := net.Listen("tcp", s.conf.Listen.Metrics.String())
	if err != nil {
		return bindFault("listen.metrics", s.conf.Listen.Metrics, err)
	}
	group.Go(func() error {
		return telemetry.Serve(ctx, metrics, telemetry.Handler(s.registry, s.health, s.logger), s.logger)
	})
	https, err := net.Listen("tcp", s.conf.Listen.HTTPS.String())
	if err != nil {
		return errors.Join(bindFault("listen.https", s.conf.Listen.HTTPS, err), metrics.Close())
	}
	socket, err := listenSocket(s.paths.socket())
	if err != nil {
		return errors.Join(err, metrics.Close(), https.Close())
	}
	local := service.Actor{Name: "admin.sock", Role: control.RoleAdmin}
	group.Go(func() error {
		l := tls.NewListener(https, pki.OpenServerConfig(s.web, "h2", "http/1.1"))
		return s.http(ctx, l, api.New(api.Options{Service: s.service, Logger: s.logger, Fence: s.cluster.Fence}))
	})
	group.Go(func() error {
		return s.http(ctx, socket, api.New(api.Options{Service: s.service, Logger: s.logger, Local: &local, Fence: s.cluster.Fence}))
	})
	group.Go(func() error { s.reload(ctx); return nil })
	group.Go(func() error { s.keepTrust(ctx); return nil })
	s.watchHealth()
	s.upkeep(ctx, group)
	s.logger.Info("serving", "version", buildinfo.Version(), "cluster", s.file.Cluster.String(), "server", s.file.Server.String(), "https", https.Addr().String(), "raft", s.conf.Listen.Raft.String())
	// The process has started: other servers and relays may be long in coming.
	s.supervisor.Ready("waiting for a leader")
	context.AfterFunc(ctx, s.supervisor.Stopping)
	group.Go(func() error { s.supervisor.KeepAlive(ctx, func() { s.health.Checks() }); return nil })
	group.Go(func() error { return s.whenReady(ctx, group) })
	return group.Wait()
}

func bindFault(field string, addr netip.AddrPort, cause error) error {
	return &fault.Error{Kind: fault.Unavailable, Op: "relais-control.serve", Field: field, Public: fmt.Sprintf("%s cannot be bound: is another server using it?", addr), Cause: cause}
}

// listenSocket makes the admin socket, which only the server's user can open.
func listenSocket(path string) (net.Listener, error) {
	const op = "relais-control.serve"
	// The lock is ours, so a socket file that is there is left from a crash.
	if err := os.Remove(path); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return nil, fault.Wrap(err, fault.Internal, op, "the old admin socket %s cannot be removed", path)
	}
	old := syscall.Umask(0o177)
	l, err := net.Listen("unix", path)
	syscall.Umask(old)
	return l, fault.Wrap(err, fault.Internal, op, "the admin socket %s cannot be made", path)
}

// http serves the API on one listener and lets requests finish at the end.
func (s *server) http(ctx context.Context, l net.Listener, h http.Handler) error {
	srv := &http.Server{
		Handler: h, ReadHeaderTimeout: headerTimeout, ReadTimeout: requestTimeout, WriteTimeout: requestTimeout, IdleTimeout: idleTimeout, MaxHeaderBytes: maxHeaderBytes,
		ErrorLog: slog.NewLogLogger(s.logger.Handler(), slog.LevelDebug),
	}
	done := make(chan error, 1)
	go func() { done <- srv.Serve(l) }()
	select {
	case err := <-done:
		return fault.Wrap(err, fault.Unavailable, "relais-control.serve", "the listener on %s failed", l.Addr())
	case <-ctx.Done():
	}
	stop, cancel := context.WithTimeout(context.WithoutCancel(ctx), shutdownTimeout)
	defer cancel()
	if err := srv.Shutdown(stop); err != nil {
		s.logger.Warn("requests were cut off", "error", err)
		_ = srv.Close()
	}
	<-done
	return nil
}

// whenReady starts what needs the cluster's state: the CA and the relay link.
func (s *server) whenReady(ctx context.Context, group *errgroup.Group) error {
	if err := s.attach(ctx); err != nil {
		return err
	}
	if err := s.cluster.WaitFresh(ctx); err != nil {
		if ctx.Err() != nil {
			return nil
		}
		return err
	}
	row, err := s.service.Cluster()
	if err != nil {
		return err
	}
	if row.ID != s.file.Cluster {
		return fault.New(fault.Invalid, "relais-control.serve", "the state in %s is of cluster %s, server.toml names %s: the directory is mixed up, restore it from a backup", s.paths.dir, row.ID, s.file.Cluster)
	}
	if err := s.announce(ctx); err != nil || ctx.Err() != nil {
		return err
	}
	group.Go(func() error { s.keepEndpoints(ctx); return nil })
	if err := s.useState(); err != nil {
		return err
	}
	if err := s.renew(ctx); err != nil {
		s.logger.Warn("the certificate is not up to date yet", "error", err) // keepRenewed tries again
	}
	group.Go(func() error { s.keepRenewed(ctx); return nil })
	if err := s.watchCA(ctx, group); err != nil {
		return err
	}
	if err := s.serveLink(ctx, group); err != nil {
		return err
	}
	s.watchDNS(ctx, group)
	s.watchKeys(ctx, group)
	s.watchBrakes(ctx, group)
	s.health.SetReady(true, "")
	s.supervisor.Ready("serving")
	return nil
}

// reload reads the configured certificate again on SIGHUP.
func (s *server) reload(ctx context.Context) {
	hup := make(chan os.Signal, 1)
	signal.Notify(hup, syscall.SIGHUP)
	defer signal.Stop(hup)
	for {
		select {
		case <-ctx.Done():
			return
		case <-hup:
			s.supervisor.Reloading()
			if err := s.web.Reload(); err != nil {
				s.logger.Error("the certificate was not reloaded, the old one stays", "error", err)
				s.supervisor.Ready("serving; the certificate was not reloaded, the old one stays")
				continue
			}
			s.logger.Info("certificate reloaded", "not_after", s.web.Leaf().NotAfter)
			s.supervisor.Ready("serving")
		}
	}
}

func (s *server) watchHealth() {
	s.health.Watch("raft", func() (telemetry.Severity, string) {
		if s.cluster.Ready() {
			return telemetry.OK, ""
		}
		if leader, _ := s.cluster.Leader(); leader != "" && s.cluster.Fresh() {
			return telemetry.OK, "follows " + leader
		}
		return telemetry.Critical, "this server is not in touch with a leader: changes and joins wait"
	})
	s.health.Watch("state", func() (telemetry.Severity, string) {
		if err := s.cluster.Health(); err != nil {
			return telemetry.Critical, fault.Public(err)
		}
		return telemetry.OK, ""
	})
	s.health.Watch("disk", func() (telemetry.Severity, string) {
		if err := s.cluster.Space(); err != nil {
			return telemetry.Warning, fault.Public(err)
		}
		return telemetry.OK, ""
	})
	s.health.Watch("clones", func() (telemetry.Severity, string) {
		if problem := s.service.CloneProblem(); problem != "" {
			return telemetry.Warning, problem
		}
		return telemetry.OK, ""
	})
	s.health.Watch("certificate", func() (telemetry.Severity, string) {
		leaf := s.web.Leaf()
		if left := time.Until(leaf.NotAfter); left < leaf.NotAfter.Sub(leaf.NotBefore)/3 {
			return telemetry.Warning, fmt.Sprintf("the certificate of the API ends at %s", leaf.NotAfter.UTC().Format(time.RFC3339))
		}
		if s.web == s.holder {
			return telemetry.OK, "the API serves a certificate of the cluster's own CA: set tls.cert and tls.key for browsers"
		}
		return telemetry.OK, ""
	})
}
