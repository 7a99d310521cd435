package e2e

import (
	"fmt"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/relais-mta/relais/shared/lab/fleet"
)

// A flow gives every relay mail without end and watches it arrive.
const (
	flowBatch     = 16 // recipients
	flowPace      = 200 * time.Millisecond
	flowWatch     = 50 * time.Millisecond
	maxMailPause  = 5 * time.Second // between two arrivals; a batch is given each flowPace
	flowMailBytes = 2000
)

type flow struct {
	t       *testing.T
	f       *fleet.Fleet
	end     atomic.Bool
	workers sync.WaitGroup
	sent    []fleet.Submitted

	mu      sync.Mutex
	longest time.Duration // without an arrival, since the last look
	worst   time.Duration
}

// startFlow begins to send. Every test that calls it must call check.
func startFlow(t *testing.T, f *fleet.Fleet) *flow {
	t.Helper()
	w := &flow{t: t, f: f}
	to := recipients(t, f, flowBatch)
	t.Cleanup(w.stop)
	w.workers.Go(func() {
		tick := time.NewTicker(flowPace)
		defer tick.Stop()
		for round := 0; !w.end.Load(); round++ {
			batch, err := f.Submit(t.Context(), fleet.Stream{Recipients: to, Size: flowMailBytes, Connections: 2, Tag: fmt.Sprint("flow", round)})
			if err != nil {
				t.Errorf("mail stopped: %v", err)
				return
			}
			w.sent = append(w.sent, batch...)
			<-tick.C
		}
	})
	w.workers.Go(w.watch)
	return w
}

func (w *flow) watch() {
	tick := time.NewTicker(flowWatch)
	defer tick.Stop()
	arrived, last := int64(-1), time.Now()
	for !w.end.Load() {
		<-tick.C
		now := time.Now()
		if n := w.f.Lab.Report().Recipients; n != arrived {
			arrived, last = n, now
		}
		w.mu.Lock()
		w.longest = max(w.longest, now.Sub(last))
		w.mu.Unlock()
	}
}

// pause returns the longest time without an arrival since the last call.
func (w *flow) pause() time.Duration {
	w.mu.Lock()
	defer w.mu.Unlock()
	out := w.longest
	w.worst, w.longest = max(w.worst, w.longest), 0
	return out.Round(time.Millisecond)
}

func (w *flow) stop() {
	w.end.Store(true)
	w.workers.Wait()
}

// check ends the flow: everything given must have been taken and have arrived,
// and arrivals must never have paused.
func (w *flow) check() {
	w.t.Helper()
	w.stop()
	w.pause()
	a := settle(w.t, w.f, w.sent)
	w.t.Logf("mail: %d given, %d arrived, longest pause between arrivals %s", len(w.sent), a.delivered, w.worst.Round(time.Millisecond))
	if a.accepted != len(w.sent) || a.delivered != len(w.sent) || len(w.sent) == 0 {
		w.t.Errorf("%d messages were given to the relays, %d taken, %d arrived: mail depends on the control plane", len(w.sent), a.accepted, a.delivered)
	}
	if w.worst > maxMailPause {
		w.t.Errorf("no mail arrived for %s", w.worst)
	}
}
