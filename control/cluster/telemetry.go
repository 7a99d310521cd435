package cluster

import (
	"context"
	"fmt"
	"io"
	"log/slog"

	"github.com/hashicorp/go-hclog"
	"github.com/hashicorp/raft"
	"github.com/prometheus/client_golang/prometheus"
)

type metrics struct {
	commitSeconds   prometheus.Histogram
	proposals       *prometheus.CounterVec
	divergences     prometheus.Counter
	damagedRanges   prometheus.Counter
	verifiedEntries prometheus.Counter
	probeSeconds    prometheus.Histogram
	stalls          prometheus.Counter
}

func newMetrics(reg prometheus.Registerer) *metrics {
	m := &metrics{
		commitSeconds: prometheus.NewHistogram(prometheus.HistogramOpts{
			Name: "relais_control_raft_commit_seconds", Help: "Time the leader took from proposing a change to having applied it.",
			Buckets: commitBuckets,
		}),
		proposals: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "relais_control_raft_proposals_total", Help: "Changes proposed, by command and outcome: applied, refused by a rule, or lost.",
		}, []string{"command", "outcome"}),
		divergences: prometheus.NewCounter(prometheus.CounterOpts{
			Name: "relais_control_state_divergences_total", Help: "Checkpoints at which this server's state differed from the leader's. Anything but 0 is an alarm.",
		}),
		damagedRanges: prometheus.NewCounter(prometheus.CounterOpts{
			Name: "relais_control_raft_damaged_ranges_total", Help: "Ranges of the log that read back otherwise than written. Anything but 0 is an alarm.",
		}),
		verifiedEntries: prometheus.NewCounter(prometheus.CounterOpts{
			Name: "relais_control_raft_verified_entries_total", Help: "Log entries that were read back and compared.",
		}),
		probeSeconds: prometheus.NewHistogram(prometheus.HistogramOpts{
			Name: "relais_control_raft_probe_seconds", Help: "Time the leader took to commit an entry without content, tried each second.",
			Buckets: prometheus.ExponentialBuckets(0.0005, 2, 14),
		}),
		stalls: prometheus.NewCounter(prometheus.CounterOpts{
			Name: "relais_control_raft_stalls_total", Help: "Times this server led and committed nothing, and another one was asked to take over. Anything but 0 is an alarm.",
		}),
	}
	reg.MustRegister(m.commitSeconds, m.proposals, m.divergences, m.damagedRanges, m.verifiedEntries, m.probeSeconds, m.stalls)
	return m
}

// commitBuckets are fine where a commit ought to be, on the disks and in the
// networks that servers have.
var commitBuckets = []float64{.0005, .001, .0015, .002, .003, .004, .005, .0075, .01, .02, .05, .1, .25, .5, 1, 2.5, 5}

// watch registers the numbers that raft itself keeps.
func (m *metrics) watch(reg prometheus.Registerer, c *Cluster) {
	gauge := func(name, help string, value func() float64) {
		reg.MustRegister(prometheus.NewGaugeFunc(prometheus.GaugeOpts{Name: name, Help: help}, value))
	}
	gauge("relais_control_raft_leader", "1 while this server leads the cluster.", func() float64 {
		if c.raft.State() == raft.Leader {
			return 1
		}
		return 0
	})
	gauge("relais_control_disk_free_bytes", "Space on the disk of the data directory that may be used; 0 if it does not answer.", func() float64 {
		free, err := freeBytes(c.dir)
		if err != nil {
			return 0
		}
		return float64(free)
	})
	gauge("relais_control_raft_term", "Current raft term.", func() float64 { return float64(c.raft.CurrentTerm()) })
	gauge("relais_control_raft_last_index", "Index of the last entry in this server's log.", func() float64 { return float64(c.raft.LastIndex()) })
	gauge("relais_control_raft_applied_index", "Index of the last entry applied here.", func() float64 { return float64(c.raft.AppliedIndex()) })
}

// slogSink passes what raft logs on to slog.
type slogSink struct{ logger *slog.Logger }

// newRaftLogger returns the logger that raft and its log store want.
func newRaftLogger(logger *slog.Logger) hclog.Logger {
	l := hclog.NewInterceptLogger(&hclog.LoggerOptions{Name: "raft", Level: hclog.Debug, Output: io.Discard})
	l.RegisterSink(slogSink{logger})
	return l
}

// Accept implements hclog.SinkAdapter. What raft calls information is routine
// to an operator, so it is logged as debug.
func (s slogSink) Accept(name string, level hclog.Level, msg string, args ...any) {
	to := slog.LevelDebug
	switch level {
	case hclog.Warn:
		to = slog.LevelWarn
	case hclog.Error:
		to = slog.LevelError
	}
	if !s.logger.Enabled(context.Background(), to) {
		return
	}
	for i := 1; i < len(args); i += 2 {
		if f, ok := args[i].(hclog.Format); ok && len(f) > 0 {
			args[i] = fmt.Sprintf(fmt.Sprint(f[0]), f[1:]...)
		}
	}
	s.logger.Log(context.Background(), to, msg, append([]any{"part", name}, args...)...)
}
