package schedule

import (
	"fmt"
	"testing"
	"time"

	"github.com/relais-mta/relais/shared/mailaddr"
	"github.com/relais-mta/relais/shared/policy"
)

// benchWorld is a scheduler with queues of many tenants to many domains of one
// provider, each domain a site of its own if apart.
type benchWorld struct {
	s    *Scheduler
	keys []Key
	now  time.Time
	busy []Session
}

func newBenchWorld(b *testing.B, tenants, domains, sessions int, apart bool, rate Rate) *benchWorld {
	b.Helper()
	w := &benchWorld{s: New(Limits{MaxResolvesInFlight: domains, MaxSessions: sessions}), now: time.Unix(1_800_000_000, 0)}
	w.s.SetPool(testPool(1), sources(4))
	for d := range domains {
		for t := range tenants {
			key := testKey(byte(t), policy.Bulk, fmt.Sprintf("d%d.test", d))
			key.Tenant[14] = byte(t >> 8)
			w.s.SetHead(Queue(len(w.keys)), key, w.now, 1_000_000_000, w.now)
			w.keys = append(w.keys, key)
		}
	}
	w.s.Next(w.now)
	for d := range domains {
		site := "mx"
		if apart {
			site = fmt.Sprintf("mx%d", d)
		}
		w.s.Routed(mailaddr.Domain(fmt.Sprintf("d%d.test", d)), Route{Provider: "p", Site: site, Shape: Shape{SourceMessageRate: rate}, Expires: w.now.Add(24 * time.Hour)}, w.now)
	}
	w.open()
	return w
}

// open plays the engine until the scheduler opens nothing more.
func (w *benchWorld) open() {
	for range 100 {
		effects := w.s.Next(w.now)
		if len(effects) == 0 {
			return
		}
		for _, f := range effects {
			if f.Kind == Open {
				w.s.Started(f.Session)
				w.s.Opened(f.Session)
				w.busy = append(w.busy, f.Session)
			}
		}
	}
}

func (w *benchWorld) started(id Session, n Queue) {
	w.s.Started(id)
	w.s.SetHead(n, w.keys[n], w.now, 1_000_000_000, w.now)
}

// BenchmarkNextFor is the decision of a session that goes on.
func BenchmarkNextFor(b *testing.B) {
	for _, c := range []struct{ tenants, domains int }{{10, 10}, {1_000, 100}, {10, 10_000}} {
		b.Run(fmt.Sprintf("queues=%d", c.tenants*c.domains), func(b *testing.B) {
			w := newBenchWorld(b, c.tenants, c.domains, 1, false, Rate{})
			b.ReportAllocs()
			for b.Loop() {
				n, answer := w.s.NextFor(w.busy[0], w.now)
				if answer != Work {
					b.Fatal(answer)
				}
				w.started(w.busy[0], n)
			}
		})
	}
}

// BenchmarkNextForApart is the same with a site for each domain and a session
// for each of some.
func BenchmarkNextForApart(b *testing.B) {
	for _, c := range []struct{ tenants, domains int }{{10, 10_000}, {100, 1_000}} {
		b.Run(fmt.Sprintf("tenants=%d/sites=%d", c.tenants, c.domains), func(b *testing.B) {
			w := newBenchWorld(b, c.tenants, c.domains, 200, true, Rate{})
			b.ReportAllocs()
			i := 0
			for b.Loop() {
				i = (i + 1) % len(w.busy)
				n, answer := w.s.NextFor(w.busy[i], w.now)
				switch answer {
				case Work:
					w.started(w.busy[i], n)
				case End:
					w.s.Ended(w.busy[i])
					w.busy[i] = w.busy[len(w.busy)-1]
					w.busy = w.busy[:len(w.busy)-1]
					w.open()
				}
			}
		})
	}
}

// BenchmarkNextUnderARate is the whole of a decision under a rate: the session
// parks, the token comes, the tenant whose turn it is gets it.
func BenchmarkNextUnderARate(b *testing.B) {
	for _, c := range []struct{ tenants, domains int }{{10, 10_000}, {100, 1_000}} {
		b.Run(fmt.Sprintf("tenants=%d/sites=%d", c.tenants, c.domains), func(b *testing.B) {
			w := newBenchWorld(b, c.tenants, c.domains, 500, true, Rate{Max: 1_000, Per: time.Second, Burst: 1})
			for _, id := range w.busy {
				w.s.NextFor(id, w.now)
			}
			w.busy = nil
			b.ReportAllocs()
			for b.Loop() {
				if wake := w.s.Wake(); wake.After(w.now) {
					w.now = wake
				}
				for _, f := range w.s.Next(w.now) {
					switch f.Kind {
					case Open:
						w.s.Opened(f.Session)
						fallthrough
					case Dispatch:
						w.started(f.Session, f.Queue)
						if _, answer := w.s.NextFor(f.Session, w.now); answer == End {
							w.s.Ended(f.Session)
						}
					case Close:
						w.s.Ended(f.Session)
					}
				}
			}
		})
	}
}

// BenchmarkArrival is a message for an empty queue of a busy provider.
func BenchmarkArrival(b *testing.B) {
	w := newBenchWorld(b, 10, 10_000, 200, true, Rate{Max: 1, Per: time.Hour, Burst: 1})
	key := testKey(1, policy.Transactional, "d7.test")
	b.ReportAllocs()
	for b.Loop() {
		w.s.SetHead(1_000_000, key, w.now, 1, w.now)
		w.s.Next(w.now)
		w.s.SetHead(1_000_000, key, time.Time{}, 0, w.now)
		w.s.Next(w.now)
	}
}
