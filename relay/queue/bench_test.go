package queue

import (
	"context"
	"fmt"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/relais-mta/relais/relay"
	"github.com/relais-mta/relais/relay/outbox"
)

// BenchmarkAccept measures messages of 10 KB from 50 clients at once, each
// acknowledged after its group commit.
func BenchmarkAccept(b *testing.B) {
	f := newFixture(b)
	f.clock.now = time.Now()
	f.open()
	text := make([]byte, 10<<10)
	b.ReportAllocs()
	b.SetParallelism(25) // times GOMAXPROCS
	var n atomic.Int64
	b.RunParallel(func(pb *testing.PB) {
		for pb.Next() {
			f.benchAccept(b, text, int(n.Add(1)))
		}
	})
	b.StopTimer()
	stats := f.st.Stats()
	b.ReportMetric(float64(b.N)/b.Elapsed().Seconds(), "msg/s")
	b.ReportMetric(float64(stats.Batches)/float64(stats.Transactions), "msg/commit")
}

func (f *fixture) benchAccept(b *testing.B, text []byte, n int) {
	env := f.envelope(fmt.Sprintf("user@d%d.example", n%100))
	body := f.st.NewBody()
	_, _ = body.Write(text) // small: cannot fail
	if err := body.Seal(100, [32]byte{}); err != nil {
		b.Error(err)
	}
	if err := f.q.Accept(context.Background(), env, body); err != nil {
		b.Error(err)
	}
}

// BenchmarkCycle measures a message's whole life: accept, take, begin, read
// the body, finish, with 50 clients and at most 100 deliveries at once.
func BenchmarkCycle(b *testing.B) {
	f := newFixture(b)
	f.clock.now = time.Now()
	f.open()
	text := make([]byte, 10<<10)
	b.ReportAllocs()
	var delivered atomic.Int64
	allDone := make(chan struct{})
	sem := make(chan struct{}, 100)
	notified := make(chan Number, 100_000)
	f.q.cfg.Notify = func(n Number) {
		select {
		case notified <- n:
		default:
		}
	}
	bodies := sync.Pool{New: func() any { p := make([]byte, 0, 16<<10); return &p }}
	finish := func(w *Work, a *relay.Attempt) {
		f.q.Finish(w, a, all(w, relay.StateDelivered, outbox.Delivered, time.Time{}), nil, func(err error) {
			if err != nil {
				b.Error(err)
			}
			<-sem
			if delivered.Add(1) == int64(b.N) {
				close(allDone)
			}
		})
	}
	go func() {
		for n := range notified {
			for {
				w, ok := takeLoaded(f.q, n, time.Now().Add(time.Hour), 100)
				if !ok {
					break
				}
				sem <- struct{}{}
				a := f.attempt(w)
				f.q.Begin(w, a, func(err error) {
					p := bodies.Get().(*[]byte)
					if _, err := f.st.ReadBody(w.Env.Body, *p); err != nil {
						b.Error(err)
					}
					bodies.Put(p)
					finish(w, a)
				})
			}
		}
	}()
	b.SetParallelism(25)
	var n atomic.Int64
	b.ResetTimer()
	b.RunParallel(func(pb *testing.PB) {
		for pb.Next() {
			f.benchAccept(b, text, int(n.Add(1)))
		}
	})
	<-allDone
	b.StopTimer()
	stats := f.st.Stats()
	b.ReportMetric(float64(b.N)/b.Elapsed().Seconds(), "msg/s")
	b.ReportMetric(float64(stats.Batches)/float64(stats.Transactions), "changes/commit")
	close(notified)
}
