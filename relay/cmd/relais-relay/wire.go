package main

import (
	"context"
	"net"
	"net/netip"
	"os"
	"slices"
	"time"

	"github.com/relais-mta/relais/relay/admin"
	"github.com/relais-mta/relais/relay/agent"
	"github.com/relais-mta/relais/relay/brake"
	"github.com/relais-mta/relais/relay/config"
	"github.com/relais-mta/relais/relay/delivery"
	"github.com/relais-mta/relais/relay/egress"
	"github.com/relais-mta/relais/relay/engine"
	"github.com/relais-mta/relais/relay/queue"
	"github.com/relais-mta/relais/relay/resolve"
	"github.com/relais-mta/relais/relay/store"
	"github.com/relais-mta/relais/relay/tlspolicy"
	"github.com/relais-mta/relais/shared/buildinfo"
	"github.com/relais-mta/relais/shared/fault"
	"github.com/relais-mta/relais/shared/policy"
	"github.com/relais-mta/relais/shared/telemetry"
	"github.com/relais-mta/relais/shared/wire"
)

// openEngine makes everything that delivers, and the queue it delivers from.
func (n *node) openEngine(ctx context.Context) (err error) {
	delivering := func() *policy.Delivery { return &n.document().Delivery }
	if err = n.openEgress(); err != nil {
		return err
	}
	servers := n.cfg.DNS.Resolvers
	if len(servers) == 0 {
		if servers, err = resolve.SystemServers(""); err != nil {
			return err
		}
	}
	resolver, err := resolve.New(resolve.Config{
		Servers: servers, Validating: n.cfg.DNS.Validating, Policy: delivering, AllowPrivate: n.cfg.Lab.AllowPrivate, Own: n.own, Log: n.log, Registerer: n.registry,
	})
	if err != nil {
		return err
	}
	dialer, err := delivery.New(delivery.Config{
		Egress: n.egress, Broken: tlspolicy.NewMemory(), Port: n.cfg.Lab.SMTPPort, Policy: delivering, Trace: &n.traces, Log: n.log, Registerer: n.registry,
	})
	if err != nil {
		return err
	}
	if err = n.openWarm(); err != nil {
		return err
	}
	n.brakes, err = brake.New(brake.Config{Directory: n.agent.Directory, Now: time.Now, ClockTrusted: n.trusted, Logger: n.log, Registerer: n.registry, Events: n.outbox.Write})
	if err != nil {
		return err
	}
	if err = n.openLimits(); err != nil {
		return err
	}
	n.engine, err = engine.New(engine.Config{
		Store: n.store, Directory: n.agent.Directory, Resolver: resolver, Egress: n.egress, Dialer: dialer, Admit: []engine.Admitter{n.warm, n.brakes, n.limits}, Outbox: n.outbox, Hostname: hostname(n.cfg),
		Now: time.Now, ClockTrusted: n.trusted, Logger: n.log, Registerer: n.registry,
	})
	if err != nil {
		return err
	}
	doc := n.document()
	n.queue, err = queue.Open(ctx, n.store, n.outbox, queue.Config{
		Now: time.Now, ClockTrusted: n.trusted, Notify: n.queueChanged, Unconfirmed: n.engine.Unconfirmed, Provider: n.engine.Provider, Policy: doc.Queue, MaxInbound: doc.Inbound.MaxStoredBytes,
		Logger: n.log, Registerer: n.registry,
	})
	if err != nil {
		return err
	}
	n.engine.Attach(n.queue)
	check, err := n.queue.CheckInBackground(n.registry)
	if err != nil {
		return err
	}
	n.health.Watch("queue", func() (telemetry.Severity, string) {
		if p := check.Problem(); p != "" {
			return telemetry.Warning, p
		}
		return telemetry.OK, ""
	})
	return nil
}

// own reports whether an address is one of ours: of a listener for port 25 or
// of a source, so that mail sent there would come back.
func (n *node) own(a netip.Addr) bool {
	for _, l := range n.cfg.Listen.Inbound {
		if l.Addr().Unmap() == a {
			return true
		}
	}
	for _, s := range n.egress.Sources() {
		if s.Source.Bind == a || s.Source.Public == a {
			return true
		}
	}
	return false
}

func (n *node) load() agent.Load {
	if n.queue == nil {
		return agent.Load{}
	}
	l := loadOf(n.queue.Summary(), n.store.Stats())
	l.Handover = n.handoverReport()
	checks, _ := n.health.Checks()
	for _, c := range checks {
		if c.Severity != telemetry.OK && len(l.Problems) < 16 {
			l.Problems = append(l.Problems, c.Name+": "+c.Message)
		}
	}
	if n.engine != nil {
		for _, left := range n.engine.Left() {
			l.Left = append(l.Left, &wire.LeavingSource{SourceId: wire.EncodeID(left.ID), Epoch: left.Epoch})
		}
	}
	for _, r := range n.brakes.Long(wire.MaxLaneReflexes) {
		l.Reflexes = append(l.Reflexes, &wire.LaneReflex{SourceId: wire.EncodeID(r.Source), Provider: r.Provider, Phase: r.Phase, PerHour: r.PerHour, Connections: uint32(r.Connections),
			Class: r.Class, Reply: r.Reply, CauseMs: r.CauseAt.UnixMilli(), SinceMs: r.Since.UnixMilli()})
	}
	return l
}

// loadOf says what queue and disk hold. A relay that drains is done when it holds
// nothing.
func loadOf(s queue.Summary, disk store.Stats) agent.Load {
	l := agent.Load{WaitingRecipients: uint64(max(0, s.Waiting)), InFlightRecipients: uint64(max(0, s.InFlight)), HeldRecipients: uint64(max(0, s.Held)),
		QueueBytes: uint64(max(0, disk.LiveBodyBytes)), FreeBytes: uint64(max(0, disk.FreeBytes))}
	if !s.Counted {
		l.WaitingRecipients = max(1, l.WaitingRecipients) // a queue that is still being counted is not known to be empty
	}
	return l
}

// localAddresses are the addresses of this machine. An address may be its own
// without being listed at an interface, by a local route for a whole network:
// of the relay's sources the kernel was asked one by one.
func (n *node) localAddresses() []netip.Addr {
	out := hostAddresses(n.cfg)
	if n.egress == nil {
		return out
	}
	for _, s := range n.egress.Sources() {
		if s.State.Present() && !slices.Contains(out, s.Source.Bind) {
			out = append(out, s.Source.Bind)
		}
	}
	return out
}

func (n *node) status() admin.Status {
	m, h := n.agent.Membership(), n.agent.Health()
	return admin.Status{
		Node: m.Node.String(), Cluster: m.Cluster.String(), Version: buildinfo.Get().Version,
		Revision: h.Revision, Connected: h.Connected, Evicted: h.Evicted, Problem: h.Problem, PID: os.Getpid(),
	}
}

// closed says why the relay takes no mail now; empty: it does.
func (n *node) closed() string {
	if n.agent.Evicted() != nil {
		return "This relay was evicted from its cluster and takes no mail, use another one"
	}
	return ""
}

// unready says why the relay takes no new mail although it runs; empty: it does.
// Balancers and probes go by it, and send clients elsewhere.
func (n *node) unready() string {
	h := n.agent.Health()
	switch {
	case h.Evicted:
		return h.Problem
	case h.Copied:
		return "another machine is linked with the key of this relay: " + h.Problem
	}
	d := n.agent.Directory()
	if d == nil {
		return "no policy yet, so nobody may submit: " + h.Problem
	}
	if d.View().Draining {
		return "the relay drains: an operator lets it take no new mail"
	}
	if err := n.store.Health(); err != nil {
		return fault.Public(err)
	}
	return ""
}

// sources returns what mail may leave from. An evicted relay has nothing: its
// addresses may be another relay's by now.
func (n *node) sources(d *policy.Directory) []policy.Source {
	if n.agent.Evicted() != nil {
		return nil
	}
	return d.Sources()
}

// watchHealth names what /health and the control plane are told.
func (n *node) watchHealth() {
	n.health.WatchReady(n.unready)
	n.health.Watch("control", func() (telemetry.Severity, string) {
		h := n.agent.Health()
		switch {
		case h.Evicted:
			return telemetry.Critical, h.Problem
		case h.Revision == 0:
			return telemetry.Critical, "no policy yet: " + h.Problem
		case h.Problem != "":
			return telemetry.Warning, h.Problem
		}
		return telemetry.OK, ""
	})
	n.health.Watch("store", func() (telemetry.Severity, string) {
		if err := n.store.Health(); err != nil {
			return telemetry.Critical, fault.Public(err)
		}
		return telemetry.OK, ""
	})
	n.health.Watch("clock", func() (telemetry.Severity, string) {
		if p := n.clock.Problem(time.Now()); p != "" {
			return telemetry.Critical, p
		}
		return telemetry.OK, ""
	})
	n.health.Watch("memory", func() (telemetry.Severity, string) {
		if most := n.document().Submission.MaxMemoryPercent; most > 0 && n.memory.Over(most, time.Now()) {
			return telemetry.Warning, "more than submission.max_memory_percent of the memory is held: new SMTP connections get 421"
		}
		return telemetry.OK, ""
	})
	n.health.Watch("dkim", func() (telemetry.Severity, string) {
		if p := n.engine.DKIMProblem(); p != "" {
			return telemetry.Warning, p
		}
		return telemetry.OK, ""
	})
	n.health.Watch("sources", func() (telemetry.Severity, string) {
		for _, s := range n.egress.Sources() {
			if s.State == egress.NotLeased {
				if why := n.egress.Why(s.Source.ID); why != "" {
					return telemetry.Warning, why + ": it is not used"
				}
				continue // it has one by now
			}
			if s.State != egress.Usable {
				return telemetry.Warning, "source " + s.Source.Bind.String() + " is " + s.State.String() + ": it is not used"
			}
		}
		return telemetry.OK, ""
	})
	if n.cfg.TLS.Cert == "" {
		n.health.Set("certificate", telemetry.Warning, "the SMTP listeners use a certificate of the cluster's own CA, which mail clients do not know; set tls.cert and tls.key")
	}
}

// listeners are the open sockets.
type listeners struct {
	submissions, submission, inbound, handover []net.Listener

	metrics net.Listener
}

func (l *listeners) open(cfg *config.Listen) error {
	for _, group := range []struct {
		name  string
		addrs []netip.AddrPort
		into  *[]net.Listener
	}{
		{"listen.submissions", cfg.Submissions, &l.submissions},
		{"listen.submission", cfg.Submission, &l.submission},
		{"listen.inbound", cfg.Inbound, &l.inbound},
		{"listen.handover", cfg.Handover, &l.handover},
	} {
		for _, addr := range group.addrs {
			ln, err := listen(group.name, addr)
			if err != nil {
				return err
			}
			*group.into = append(*group.into, ln)
		}
	}
	if !cfg.Metrics.IsValid() {
		return nil
	}
	var err error
	l.metrics, err = listen("listen.metrics", cfg.Metrics)
	return err
}

func listen(name string, addr netip.AddrPort) (net.Listener, error) {
	ln, err := net.Listen("tcp", addr.String())
	if err != nil {
		return nil, &fault.Error{Kind: fault.Unavailable, Op: "relais-relay.listen", Field: name, Cause: err,
			Public: "cannot listen on " + addr.String() + ": another program uses it, the address is not on this host, or a port below 1024 needs the capability CAP_NET_BIND_SERVICE"}
	}
	return ln, nil
}

func (l *listeners) close() {
	all := append(append(append(append([]net.Listener(nil), l.submissions...), l.submission...), l.inbound...), l.handover...)
	if l.metrics != nil {
		all = append(all, l.metrics)
	}
	for _, ln := range all {
		_ = ln.Close() // it may be closed by its server already
	}
}
