package engine

import (
	"context"
	"log/slog"
	"strings"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/relais-mta/relais/relay"
	"github.com/relais-mta/relais/relay/queue"
	"github.com/relais-mta/relais/shared/fault"
	"github.com/relais-mta/relais/shared/policy"
)

// metrics is what the engine exports. Providers without a profile share one
// label, so that the number of series stays bounded.
type metrics struct {
	outcomes *prometheus.CounterVec // by provider and result
	latency  *prometheus.HistogramVec
	attempts prometheus.Histogram
	dsns     *prometheus.CounterVec
	untold   *prometheus.CounterVec
	lanes    laneCounts // too many for series
}

func newMetrics(reg prometheus.Registerer, e *Engine) (*metrics, error) {
	m := &metrics{
		outcomes: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "relais_relay_recipients_total", Help: "Results of attempts and expiries for recipients, by provider.",
		}, []string{"provider", "result"}),
		latency: prometheus.NewHistogramVec(prometheus.HistogramOpts{
			Name: "relais_relay_delivery_seconds", Help: "Time from acceptance to the remote server's answer to the final dot.",
			Buckets: []float64{.01, .05, .1, .25, .5, 1, 2.5, 5, 15, 60, 300, 900, 3600, 14400, 86400, 432000},
		}, []string{"kind"}),
		attempts: prometheus.NewHistogram(prometheus.HistogramOpts{
			Name: "relais_relay_attempt_seconds", Help: "Duration of one transaction with a remote server.",
			Buckets: prometheus.ExponentialBuckets(.001, 3, 13),
		}),
		dsns: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "relais_relay_dsns_total", Help: "Notifications queued to senders, by action.",
		}, []string{"action"}),
		untold: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "relais_relay_dsns_kept_back_total", Help: "Notifications not written because the sender had as many as policy allows, by action.",
		}, []string{"action"}),
	}
	if reg == nil {
		return m, nil
	}
	stat := func(name, help string, read func() int) prometheus.Collector {
		return prometheus.NewGaugeFunc(prometheus.GaugeOpts{Name: name, Help: help}, func() float64 {
			e.mu.Lock()
			defer e.mu.Unlock()
			return float64(read())
		})
	}
	for _, c := range []prometheus.Collector{
		m.outcomes, m.latency, m.attempts, m.dsns, m.untold,
		stat("relais_relay_sessions", "SMTP sessions to remote servers, opening ones included.", func() int { return e.sched.Stats().Sessions }),
		stat("relais_relay_sessions_opening", "SMTP sessions being opened.", func() int { return e.sched.Stats().Opening }),
		stat("relais_relay_resolves_in_flight", "Domains being looked up.", func() int { return e.sched.Stats().Resolving }),
		stat("relais_relay_scheduled_queues", "Work queues known to the scheduler.", func() int { return e.sched.Stats().Queues }),
	} {
		if err := reg.Register(c); err != nil {
			return nil, fault.Wrap(err, fault.Internal, "engine.New", "metrics could not be registered")
		}
	}
	return m, nil
}

func providerLabel(name string) string {
	switch {
	case name == "":
		return "none"
	case strings.HasPrefix(name, policy.UnlistedPrefix):
		return "other"
	}
	return name
}

func (m *metrics) count(a *relay.Attempt, s *settlement) {
	m.lanes.count(a, s)
	label := providerLabel(a.Provider)
	for i := range s.results {
		m.outcomes.WithLabelValues(label, s.results[i].State.State.String()).Inc()
	}
	if d := a.EndedAt.Sub(a.StartedAt); d > 0 {
		m.attempts.Observe(d.Seconds())
	}
}

// logResults writes one line per recipient whose attempt ended: at debug level
// for what was delivered, so that a busy relay's log stays readable.
func (e *Engine) logResults(w *queue.Work, a *relay.Attempt, s *settlement) {
	ctx := context.Background()
	for i := range s.results {
		r := &s.results[i]
		level, text := slog.LevelInfo, "recipient not delivered"
		if r.State.State == relay.StateDelivered {
			level, text = slog.LevelDebug, "delivered"
			e.metrics.latency.WithLabelValues(string(w.Env.Kind)).Observe(a.EndedAt.Sub(w.Env.AcceptedAt).Seconds())
		}
		if !e.log.Enabled(ctx, level) {
			continue
		}
		e.log.LogAttrs(ctx, level, text,
			slog.String("message", w.Env.ID.String()), slog.Int("recipient", int(r.Index)), slog.String("domain", string(w.Key.Domain)),
			slog.String("state", r.State.State.String()), slog.String("phase", r.Phase.String()), slog.String("class", r.State.LastClass),
			slog.Int("code", int(r.State.LastReply.Code)), slog.String("reply", r.State.LastReply.Text),
			slog.String("provider", a.Provider), slog.String("mx", a.MX), slog.String("source", addrText(a)),
			slog.Uint64("attempts", uint64(r.State.Attempts)), slog.Time("next", r.State.Next))
	}
}

func addrText(a *relay.Attempt) string {
	if !a.SourceIP.IsValid() {
		return ""
	}
	return a.SourceIP.String()
}
