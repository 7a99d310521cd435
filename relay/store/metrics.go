package store

import (
	"time"

	"github.com/prometheus/client_golang/prometheus"
)

// Stats says how the store is doing.
type Stats struct {
	FreeBytes      int64 // as an ordinary process sees it
	FreeInodes     int64 // -1: the file system does not count them
	ReserveBytes   int64 // ballast held
	GrowthBytes    int64 // what the index may need before it shrinks
	BodyFiles      int   // segments and body files
	LiveBodyBytes  int64
	DeadBodyBytes  int64 // in files that are not removed or punched yet
	IndexBytes     int64 // Badger's tables
	Transactions   uint64
	Batches        uint64
	BodiesCounted  bool // the count of what was stored at start is through
	QueuedBatches  int
	CommitFailed   bool
	MaxBatchBytes  int64 // of one batch's keys and values
	MaxBatchWrites int
}

// Stats says how the store is doing.
func (s *Store) Stats() Stats {
	files, live, dead := s.ledger.totals()
	s.submitLock.Lock()
	queued := len(s.queued)
	s.submitLock.Unlock()
	counted := false
	select {
	case <-s.scanned:
		counted = true
	default:
	}
	lsm, _ := s.db.Size()
	return Stats{
		FreeBytes: s.freeBytes.Load(), FreeInodes: s.freeInodes.Load(),
		ReserveBytes: s.ballastBytes.Load(), GrowthBytes: s.growthBytes.Load(),
		BodyFiles: files, LiveBodyBytes: live, DeadBodyBytes: dead, IndexBytes: lsm,
		Transactions: s.metrics.transactions.Load(), Batches: s.metrics.batches.Load(),
		BodiesCounted: counted, QueuedBatches: queued, CommitFailed: s.failure() != nil,
		MaxBatchBytes: s.maxGroupBytes, MaxBatchWrites: s.maxGroupEntries,
	}
}

type storeMetrics struct {
	transactions, batches counter

	commit        prometheus.Histogram
	batch         prometheus.Histogram
	bodySync      prometheus.Histogram
	abandoned     prometheus.Counter
	diskErrors    prometheus.Counter
	unlinked      prometheus.Counter
	missingBodies prometheus.Gauge
}

func newMetrics() *storeMetrics {
	seconds := prometheus.ExponentialBuckets(0.0002, 2, 15)
	return &storeMetrics{
		commit:        prometheus.NewHistogram(prometheus.HistogramOpts{Name: "relais_relay_store_commit_seconds", Help: "Time of one synced index transaction.", Buckets: seconds}),
		batch:         prometheus.NewHistogram(prometheus.HistogramOpts{Name: "relais_relay_store_commit_batches", Help: "Changes that shared one transaction.", Buckets: prometheus.ExponentialBuckets(1, 2, 13)}),
		bodySync:      prometheus.NewHistogram(prometheus.HistogramOpts{Name: "relais_relay_store_body_sync_seconds", Help: "Time of one sync of the body segment.", Buckets: seconds}),
		abandoned:     prometheus.NewCounter(prometheus.CounterOpts{Name: "relais_relay_store_segments_abandoned_total", Help: "Body segments left after a failed write or sync."}),
		diskErrors:    prometheus.NewCounter(prometheus.CounterOpts{Name: "relais_relay_store_disk_errors_total", Help: "Failed writes and syncs of bodies."}),
		unlinked:      prometheus.NewCounter(prometheus.CounterOpts{Name: "relais_relay_store_body_files_removed_total", Help: "Segments and body files removed because nothing in them lived."}),
		missingBodies: prometheus.NewGauge(prometheus.GaugeOpts{Name: "relais_relay_store_missing_bodies", Help: "Messages found at start whose body file is missing."}),
	}
}

func (m *storeMetrics) observe(took time.Duration, g *group) {
	m.transactions.Add(1)
	m.batches.Add(uint64(len(g.batches)))
	m.commit.Observe(took.Seconds())
	m.batch.Observe(float64(len(g.batches)))
}

func (s *Store) register(r prometheus.Registerer) error {
	if r == nil {
		return nil
	}
	gauge := func(name, help string, value func(Stats) float64) prometheus.Collector {
		return prometheus.NewGaugeFunc(prometheus.GaugeOpts{Name: name, Help: help}, func() float64 { return value(s.Stats()) })
	}
	m := s.metrics
	for _, c := range []prometheus.Collector{
		m.commit, m.batch, m.bodySync, m.abandoned, m.diskErrors, m.unlinked, m.missingBodies,
		gauge("relais_relay_store_free_bytes", "Free space of the data directory's file system.", func(t Stats) float64 { return float64(t.FreeBytes) }),
		gauge("relais_relay_store_reserve_bytes", "Disk space held in reserve.", func(t Stats) float64 { return float64(t.ReserveBytes) }),
		gauge("relais_relay_store_live_body_bytes", "Bytes of messages in the queue.", func(t Stats) float64 { return float64(t.LiveBodyBytes) }),
		gauge("relais_relay_store_dead_body_bytes", "Bytes of finished messages whose space is not given back yet.", func(t Stats) float64 { return float64(t.DeadBodyBytes) }),
		gauge("relais_relay_store_index_bytes", "Size of the index.", func(t Stats) float64 { return float64(t.IndexBytes) }),
	} {
		if err := r.Register(c); err != nil {
			return err
		}
	}
	return nil
}
