package store

import (
	"context"
	"fmt"
	"os"
	"runtime"
	"testing"
)

// BenchmarkCommit measures messages as the queue commits them: a body and three
// keys from each of 50 clients at once, acknowledged when they are durable, and
// beside each two small batches as deliveries make them.
func BenchmarkCommit(b *testing.B) {
	for _, size := range []int{1 << 10, 10 << 10, 100 << 10} {
		b.Run(fmt.Sprintf("%dk", size>>10), func(b *testing.B) {
			cfg := testConfig(b.TempDir())
			cfg.Storage.SegmentBytes, cfg.MemTableBytes = 256<<20, 0
			s, err := Open(context.Background(), cfg)
			if err != nil {
				b.Fatal(err)
			}
			text := make([]byte, size)
			b.SetBytes(int64(size))
			b.SetParallelism(max(1, 50/runtime.GOMAXPROCS(0)))
			b.ReportAllocs()
			b.RunParallel(func(pb *testing.PB) {
				for pb.Next() {
					benchCommit(b, s, text)
				}
			})
			b.StopTimer()
			stats := s.Stats()
			b.ReportMetric(float64(b.N)/b.Elapsed().Seconds(), "msg/s")
			b.ReportMetric(float64(stats.Batches)/float64(stats.Transactions), "batches/commit")
			if err := s.Close(); err != nil {
				b.Error(err)
			}
			_ = os.RemoveAll(cfg.Dir)
		})
	}
}

func benchCommit(b *testing.B, s *Store, text []byte) {
	id := newID()
	if _, err := put(s, id, text); err != nil {
		b.Error(err)
		return
	}
	done := make(chan error, 1)
	for range 2 {
		small := s.NewBatch()
		small.Set(AppendAttemptPrefix(nil, id), text[:40])
		s.CommitAsync(small, func(err error) { done <- err })
		if err := <-done; err != nil {
			b.Error(err)
			return
		}
	}
}
