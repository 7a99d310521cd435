package agent

import (
	"context"
	"math/rand/v2"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/relais-mta/relais/shared/fault"
	"github.com/relais-mta/relais/shared/link"
	"github.com/relais-mta/relais/shared/pki"
	"github.com/relais-mta/relais/shared/wire"
)

const (
	minRenewRetry = time.Second
	maxRenewRetry = 10 * time.Minute
	maxRenewSleep = time.Hour // the clock may jump meanwhile
)

// renewLoop keeps the certificate fresh until ctx ends.
func (a *Agent) renewLoop(ctx context.Context) {
	spread, retry := rand.Float64(), minRenewRetry
	for ctx.Err() == nil {
		changed := a.trustChange()
		wait := min(time.Until(a.renewAt(spread)), maxRenewSleep)
		if wait <= 0 {
			err := a.renew(ctx)
			if a.noteEviction(err) {
				return
			}
			if err != nil {
				a.noteRenewal("the certificate is due for renewal: " + describe(err))
				a.options.Logger.Warn("cannot renew the certificate", "error", err, "ends", a.holder.Leaf().NotAfter, "retry_in", retry.String())
				wait, retry = jitter(retry), min(2*retry, maxRenewRetry)
			} else {
				a.noteRenewal("")
				a.options.Logger.Info("certificate renewed", "ends", a.holder.Leaf().NotAfter)
				wait, retry = minRenewRetry, minRenewRetry
			}
		}
		timer := time.NewTimer(wait)
		select {
		case <-timer.C:
		case <-changed:
			timer.Stop()
		case <-ctx.Done():
			timer.Stop()
		}
	}
}

func (a *Agent) noteRenewal(problem string) {
	a.mu.Lock()
	defer a.mu.Unlock()
	a.renewDue = problem
}

// renew gets a new certificate for the same key from the first server that
// gives one, and puts it in use.
func (a *Agent) renew(ctx context.Context) error {
	csr, err := a.key.CSR(a.options.Names)
	if err != nil {
		return err
	}
	member := a.Membership()
	config := pki.ClientConfig(a.holder, pki.Peer{Cluster: member.Cluster, Role: pki.RoleControl}, wire.ALPNRenew)
	var last error
	for _, address := range a.servers() {
		session, err := a.dialer.Dial(ctx, address, config)
		if err != nil {
			last = err
			continue
		}
		reply, err := link.Renew(ctx, session, csr, a.options.Version)
		if closed, ok := link.ClosedByPeer(err); ok && closed.Code == link.CodeEvicted {
			return err // the next server knows nothing better
		}
		if err != nil {
			last = err
			continue
		}
		g, err := checkGrant(reply, a.key, nil, time.Now())
		if err == nil && (g.node != member.Node || g.cluster != member.Cluster) {
			err = fault.New(fault.Invalid, "agent.renew", "the server's answer is for node %s of %s", g.node, g.cluster)
		}
		if err != nil {
			last = err
			continue
		}
		return a.useGrant(g)
	}
	return last
}

func (a *Agent) useGrant(g grant) error {
	cert, err := pki.TLSCertificate(a.key, g.chain)
	if err != nil {
		return err
	}
	g = a.believed(g)
	if err := saveCertificates(a.options.Dir, g); err != nil {
		return err
	}
	a.holder.Set(cert, g.bundle)
	a.noteRenewed()
	a.noteServers(g.servers)
	select {
	case a.renewed <- struct{}{}:
	default: // a token is there already
	}
	return nil
}

// metrics are the agent's.
type metrics struct {
	all      []prometheus.Collector
	sessions prometheus.Counter
	views    *prometheus.CounterVec
}

func newMetrics(registerer prometheus.Registerer, a *Agent) (*metrics, error) {
	m := &metrics{
		sessions: prometheus.NewCounter(prometheus.CounterOpts{
			Name: "relais_relay_link_sessions_total", Help: "Sessions that control welcomed.",
		}),
		views: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "relais_relay_policy_views_total", Help: "Views received, by result (applied, refused, resync).",
		}, []string{"result"}),
	}
	gauge := func(name, help string, value func(Health) float64) prometheus.Collector {
		return prometheus.NewGaugeFunc(prometheus.GaugeOpts{Name: name, Help: help}, func() float64 { return value(a.Health()) })
	}
	m.all = []prometheus.Collector{
		m.sessions, m.views,
		gauge("relais_relay_link_connected", "1 while there is a link to control.", func(h Health) float64 {
			if h.Connected {
				return 1
			}
			return 0
		}),
		gauge("relais_relay_policy_revision", "Revision of the view in use, 0 without one.", func(h Health) float64 { return float64(h.Revision) }),
		gauge("relais_relay_policy_age_seconds", "Time since the view in use was put in use.", func(h Health) float64 { return h.ViewAge.Seconds() }),
		gauge("relais_relay_certificate_ends_seconds", "Unix time at which the certificate ends.", func(h Health) float64 { return float64(h.LeafEnds.Unix()) }),
		prometheus.NewGaugeFunc(prometheus.GaugeOpts{Name: "relais_relay_clock_offset_seconds", Help: "Control's clock minus ours, 0 before the first exchange."}, func() float64 {
			offset, _ := a.ClockOffset()
			return offset.Seconds()
		}),
	}
	for i, collector := range m.all {
		if err := registerer.Register(collector); err != nil {
			for _, done := range m.all[:i] {
				registerer.Unregister(done)
			}
			return nil, fault.Wrap(err, fault.Internal, "agent.newMetrics", "cannot register metrics")
		}
	}
	return m, nil
}

func (m *metrics) unregister(registerer prometheus.Registerer) {
	for _, collector := range m.all {
		registerer.Unregister(collector)
	}
}
