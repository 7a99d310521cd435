package main

import (
	"context"
	"crypto/tls"
	"errors"
	"log/slog"
	"net"
	"os"
	"os/signal"
	"path/filepath"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/spf13/cobra"

	"github.com/relais-mta/relais/relay/admin"
	"github.com/relais-mta/relais/relay/agent"
	"github.com/relais-mta/relais/relay/brake"
	"github.com/relais-mta/relais/relay/config"
	"github.com/relais-mta/relais/relay/egress"
	"github.com/relais-mta/relais/relay/engine"
	"github.com/relais-mta/relais/relay/handover"
	"github.com/relais-mta/relais/relay/inbound"
	"github.com/relais-mta/relais/relay/limits"
	"github.com/relais-mta/relais/relay/outbox"
	"github.com/relais-mta/relais/relay/queue"
	"github.com/relais-mta/relais/relay/store"
	"github.com/relais-mta/relais/relay/submission"
	"github.com/relais-mta/relais/relay/trace"
	"github.com/relais-mta/relais/relay/warm"
	"github.com/relais-mta/relais/shared/buildinfo"
	"github.com/relais-mta/relais/shared/fault"
	"github.com/relais-mta/relais/shared/memlimit"
	"github.com/relais-mta/relais/shared/pki"
	"github.com/relais-mta/relais/shared/policy"
	"github.com/relais-mta/relais/shared/telemetry"
)

// Times of a shutdown and of the watch loop.
const (
	shutdownGrace = 30 * time.Second
	watchInterval = 10 * time.Second
)

func newServe(o *options) *cobra.Command {
	cmd := &cobra.Command{
		Use:     "serve",
		Short:   "Run the relay",
		Long:    "Run the relay until SIGTERM, which finishes what is in flight within 30 s. SIGHUP reads\nthe TLS certificate again. The log goes to standard error as JSON.",
		Example: "  relais-relay serve --data /var/lib/relais/relay\n  relais-relay serve --data /srv/relay --config /etc/relais/relay.toml",
		Args:    exactly(0),
		RunE: func(cmd *cobra.Command, _ []string) error {
			if err := awaitDisk(cmd.Context(), o.data); err != nil {
				return err
			}
			cfg, err := config.Load(o.config, o.data)
			if err != nil {
				return err
			}
			n, err := newNode(cmd.Context(), o.data, &cfg)
			if err != nil {
				return err
			}
			if err = n.run(cmd.Context()); errors.Is(err, errDiskFailed) {
				return beginAnew(&cfg, fault.Public(n.store.Health()))
			}
			return err
		},
	}
	cmd.Flags().StringVar(&o.config, "config", "", "configuration file (default: relay.toml in the data directory, if there is one)")
	return cmd
}

// node is a running relay: the parts in the order in which they are made.
type node struct {
	cfg      *config.Config
	dir      string
	log      *slog.Logger
	health   *telemetry.Health
	memory   *memlimit.Gauge
	heap     *memlimit.Target
	registry *prometheus.Registry

	agent      *agent.Agent
	clock      *engine.Clock
	store      *store.Store
	outbox     *outbox.Outbox
	leases     *egress.Leases
	egress     *egress.Manager
	engine     *engine.Engine
	limits     *limits.Limits
	brakes     *brake.Keeper
	warm       *warm.Keeper
	queue      *queue.Queue
	holder     *pki.Holder // certificate of the SMTP listeners
	submission *submission.Server
	inbound    *inbound.Server
	handover   *handover.Service
	notified   atomic.Pointer[handover.Service] // of the queue, which is older
	admin      *admin.Server
	listeners  listeners
	supervisor telemetry.Supervisor
	traces     trace.Hub

	background sync.WaitGroup
	failed     chan error
}

func newNode(ctx context.Context, dir string, cfg *config.Config) (_ *node, err error) {
	if err := checkExported(dir); err != nil {
		return nil, err
	}
	level, err := telemetry.ParseLevel(cfg.Log.Level)
	if err != nil {
		return nil, err
	}
	n := &node{cfg: cfg, dir: dir, log: telemetry.NewLogger(os.Stderr, level), health: telemetry.NewHealth(time.Now), failed: make(chan error, 16)}
	memlimit.Apply(os.DirFS("/"), os.Getenv, n.log)
	n.memory = memlimit.NewGauge(os.DirFS("/"))
	n.heap = memlimit.NewTarget(os.Getenv)
	n.supervisor = telemetry.NewSupervisor(os.Getenv, n.log)
	n.registry = telemetry.NewRegistry("relay", n.health)
	n.health.SetReady(false, "the relay is starting")
	defer func() {
		if err != nil {
			n.close()
		}
	}()
	for _, step := range []func(context.Context) error{n.openAgent, n.openStore, n.openEngine, n.openListeners, n.openHandover, n.openServers} {
		if err := step(ctx); err != nil {
			return nil, err
		}
	}
	n.watchHealth()
	return n, nil
}

func (n *node) openAgent(context.Context) (err error) {
	n.agent, err = agent.Open(agent.Options{
		Dir: n.dir, Servers: n.cfg.Control.Addresses, Names: serverNames(n.cfg), Version: buildinfo.Get().Version,
		LocalAddresses: n.localAddresses, Load: n.load, Handover: n.handoverAddress, Logger: n.log, Registerer: n.registry,
	})
	if err != nil {
		return err
	}
	n.clock, err = engine.NewClock(n.dir, time.Now(), n.agent.ClockOffset)
	return err
}

// document returns the policy in force, or the shipped defaults before the
// first view.
func (n *node) document() *policy.Document {
	if d := n.agent.Directory(); d != nil {
		return d.Document()
	}
	return defaults()
}

var defaults = sync.OnceValue(func() *policy.Document {
	doc, err := policy.Parse(nil)
	if err != nil {
		panic("the shipped policy does not parse: " + err.Error())
	}
	return &doc
})

func (n *node) openStore(ctx context.Context) (err error) {
	doc := n.document()
	n.store, err = store.Open(ctx, store.Config{Dir: filepath.Join(n.dir, "store"), Storage: doc.Storage, Logger: n.log, Registerer: n.registry})
	if err != nil {
		return err
	}
	n.outbox, err = outbox.Open(n.store, outbox.Config{MaxBytes: doc.Storage.MaxOutboxBytes, Logger: n.log, Registerer: n.registry})
	return err
}

// trusted reports whether the wall clock may end messages.
func (n *node) trusted() bool { return n.clock.Problem(time.Now()) == "" }

func (n *node) openListeners(context.Context) error { return n.listeners.open(&n.cfg.Listen) }

func (n *node) openServers(context.Context) (err error) {
	if n.holder = n.agent.Holder(); n.cfg.TLS.Cert != "" {
		if n.holder, err = pki.LoadHolder(pki.Files{Cert: n.cfg.TLS.Cert, Key: n.cfg.TLS.Key}); err != nil {
			return err
		}
	}
	serverTLS := &tls.Config{GetCertificate: n.holder.GetCertificate, MinVersion: tls.VersionTLS12}
	name := hostname(n.cfg)
	n.submission, err = submission.New(submission.Options{
		Hostname: name, TLS: serverTLS, Policy: n.agent.Directory, Connected: n.agent.Connected, Closed: n.closed,
		Spool: submission.NewSpool(n.store, n.queue), Proxies: n.cfg.Listen.Proxies, BinaryMIME: true, MemoryOver: n.memory.Over, Events: n.outbox.Write, Trace: &n.traces, Logger: n.log, Registerer: n.registry,
	})
	if err != nil {
		return err
	}
	n.inbound, err = inbound.New(inbound.Options{
		Hostname: name, TLS: serverTLS, Policy: n.agent.Directory, Closed: n.closed, Spool: inbound.NewSpool(n.store, n.queue), MemoryOver: n.memory.Over, Trace: &n.traces, Logger: n.log, Registerer: n.registry,
	})
	if err != nil {
		return err
	}
	n.admin, err = admin.Listen(admin.Config{
		Dir: n.dir, Queue: n.queue, Outbox: n.outbox, Engine: n.engine, Status: n.status, Elsewhere: n.elsewhere, Trace: &n.traces, Logger: n.log,
	})
	return err
}

// run works until ctx ends or a part fails for good.
func (n *node) run(ctx context.Context) (err error) {
	defer func() {
		if !errors.Is(err, errDiskFailed) { // closing would write
			n.close()
		}
	}()
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	linkCtx, stopLink := context.WithCancel(context.WithoutCancel(ctx))
	defer stopLink()
	n.start("telemetry", func() error {
		if n.listeners.metrics == nil {
			return nil
		}
		return telemetry.Serve(linkCtx, n.listeners.metrics, telemetry.Handler(n.registry, n.health, n.log), n.log)
	})
	n.start("admin", n.admin.Serve)
	n.start("link", func() error { return ignoreCanceled(n.agent.Run(linkCtx)) })
	n.start("egress", func() error { n.egress.Run(linkCtx); return nil })
	n.start("leases", func() error { n.leases.Run(linkCtx); return nil })
	n.start("handover", func() error { return n.handover.Run(linkCtx) })
	n.start("locks", func() error { return n.submission.Run(linkCtx) })
	n.start("watch", func() error { n.watch(linkCtx); return nil })
	engineCtx, stopEngine := context.WithCancel(linkCtx)
	defer stopEngine()
	n.warm.Attach(n.engine)
	n.start("warmup", func() error { n.warm.Run(engineCtx); return nil })
	n.brakes.Attach(n.engine) // before anything is delivered
	n.start("brakes", func() error { n.brakes.Run(engineCtx); return nil })
	n.limits.Attach(n.engine) // before anything is delivered
	n.start("limits", func() error { n.limits.Run(linkCtx); return nil })
	engineDone := make(chan struct{})
	go func() {
		defer close(engineDone)
		n.engine.Run(engineCtx, shutdownGrace)
	}()
	n.start("memory", func() error { n.heap.Run(linkCtx); return nil })
	n.start("watchdog", func() error { n.supervisor.KeepAlive(linkCtx, func() { n.health.Checks() }); return nil })
	n.serveSMTP()
	n.health.SetReady(true, "")
	n.supervisor.Ready("accepts and delivers mail")
	n.log.Info("the relay is running", "node", n.agent.Membership().Node, "data", n.dir, "version", buildinfo.Get().Version)

	select {
	case <-ctx.Done():
	case <-n.store.Failed():
		return n.abandon(stopEngine, engineDone)
	case err = <-n.failed:
		n.log.Error("a part of the relay failed", "error", err)
	}
	n.health.SetReady(false, "the relay is stopping")
	n.supervisor.Stopping()
	n.log.Info("the relay is stopping: what is in flight is finished", "grace_seconds", shutdownGrace.Seconds())
	grace, stop := context.WithTimeout(context.WithoutCancel(ctx), shutdownGrace)
	defer stop()
	stopEngine()
	n.stopSMTP(grace)
	<-engineDone
	n.limits.Release()
	stopLink()
	n.traces.Close()
	_ = n.admin.Close()
	n.background.Wait()
	return err
}

func ignoreCanceled(err error) error {
	if errors.Is(err, context.Canceled) {
		return nil
	}
	return err
}

// start runs a part in the background; its failure ends the relay.
func (n *node) start(name string, f func() error) {
	n.background.Add(1)
	go func() {
		defer n.background.Done()
		if err := f(); err != nil {
			n.log.Error("a part of the relay ended", "part", name, "error", err)
			select {
			case n.failed <- err:
			default: // another failure ends the relay already
			}
		}
	}()
}

func (n *node) serveSMTP() {
	serve := func(name string, ls []net.Listener, f func(net.Listener) error) {
		for _, l := range ls {
			n.start(name, func() error {
				err := f(l)
				if errors.Is(err, net.ErrClosed) {
					return nil
				}
				return err
			})
		}
	}
	serve("submissions", n.listeners.submissions, n.submission.ServeTLS)
	submit := n.submission.ServeSTARTTLS
	if n.cfg.Lab.ClearSubmission {
		submit = n.submission.ServeClear
	}
	serve("submission", n.listeners.submission, submit)
	serve("inbound", n.listeners.inbound, n.inbound.Serve)
	serve("handover", n.listeners.handover, n.handover.Serve)
}

func (n *node) stopSMTP(ctx context.Context) {
	var wg sync.WaitGroup
	for _, l := range n.listeners.handover {
		_ = l.Close() // nobody new
	}
	for _, stop := range []func(context.Context) error{n.submission.Shutdown, n.inbound.Shutdown, n.handover.Shutdown} {
		wg.Go(func() {
			if err := stop(ctx); err != nil && !errors.Is(err, context.DeadlineExceeded) {
				n.log.Warn("an SMTP server did not stop cleanly", "error", err)
			}
		})
	}
	wg.Wait()
}

// watch takes over new views, and looks at the clock and the certificate.
func (n *node) watch(ctx context.Context) {
	changed := n.agent.Subscribe()
	reload := make(chan os.Signal, 1)
	signal.Notify(reload, syscall.SIGHUP)
	defer signal.Stop(reload)
	ticker := time.NewTicker(watchInterval)
	defer ticker.Stop()
	n.applyView()
	for {
		select {
		case <-ctx.Done():
			return
		case <-changed:
			n.applyView()
		case <-reload:
			n.supervisor.Reloading()
			if err := n.holder.Reload(); err != nil {
				n.log.Error("the TLS certificate could not be read again; the old one stays in use", "error", err)
			}
			n.supervisor.Ready("accepts and delivers mail")
		case <-ticker.C:
			if err := n.clock.Save(time.Now()); err != nil {
				n.log.Warn("the time could not be kept", "error", err)
			}
			n.engine.Changed() // sources may have come or gone on this host
			n.handover.Changed()
		}
	}
}

func (n *node) applyView() {
	d := n.agent.Directory()
	if d == nil {
		return
	}
	doc := d.Document()
	n.useSources(d)
	n.store.SetLimits(doc.Storage)
	n.outbox.SetMaxBytes(doc.Storage.MaxOutboxBytes)
	n.queue.SetPolicy(doc.Queue, doc.Inbound.MaxStoredBytes)
	n.heap.Set(memoryBase + memoryPerRecipient*int64(doc.Queue.MaxMemoryRecipients))
	n.warm.Changed()
	n.brakes.Changed()
	n.limits.Changed()
	n.engine.Changed()
	n.handover.Changed()
}

// What is ample for the memory of a relay: beyond it garbage is collected more
// often, and what is free is given back at once.
const (
	memoryBase         = 128 << 20 // sessions, the store's tables
	memoryPerRecipient = 2 << 10   // that policy allows in memory
)

func (n *node) close() {
	n.listeners.close()
	if n.queue != nil {
		if err := n.queue.Close(); err != nil {
			n.log.Error("the queue was not closed cleanly", "error", err)
		}
	}
	if n.store != nil {
		if err := n.store.Close(); err != nil {
			n.log.Error("the store was not closed cleanly", "error", err)
		}
	}
	if n.agent != nil {
		if err := n.agent.Close(); err != nil {
			n.log.Error("the link was not closed cleanly", "error", err)
		}
	}
}
