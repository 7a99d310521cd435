package cluster

import (
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/hashicorp/raft"
	"github.com/prometheus/client_golang/prometheus/testutil"

	"github.com/relais-mta/relais/shared/fault"
)

// hangingLogs is a log on a disk that hangs when it is told to.
type hangingLogs struct {
	raft.LogStore
	hang    *atomic.Bool
	release chan struct{}
}

func (h hangingLogs) StoreLog(l *raft.Log) error { return h.StoreLogs([]*raft.Log{l}) }

func (h hangingLogs) StoreLogs(logs []*raft.Log) error {
	if h.hang.Load() {
		<-h.release
	}
	return h.LogStore.StoreLogs(logs)
}

// TestLeaderWithAHungDiskGivesUp hangs the disk of a leader, which goes on
// sending heartbeats: it must end, and the others must go on.
func TestLeaderWithAHungDiskGivesUp(t *testing.T) {
	t.Parallel()
	tuning := quick
	tuning.ProbeTimeout = 500 * time.Millisecond
	var hang atomic.Bool
	release := make(chan struct{})
	w := newWorld(t, TransportTCP, tuning)
	first := w.servers[0]
	w.stop(first)
	first.logs = func(l raft.LogStore) raft.LogStore { return hangingLogs{l, &hang, release} }
	w.start(first)
	w.join("")
	w.join("")
	waitFor(t, func() bool { return w.voters() == 3 }, "three voters")
	if w.leader() != first {
		t.Fatal("the first server does not lead")
	}
	hang.Store(true)
	start := time.Now()
	select {
	case err := <-first.halted:
		if !fault.Is(err, fault.Unavailable) || !strings.Contains(fault.Public(err), "disk") {
			t.Errorf("it halts with %v", err)
		}
	case <-time.After(testTimeout):
		t.Fatal("the leader goes on with a hung disk")
	}
	if n := testutil.ToFloat64(first.metrics.stalls); n != 1 {
		t.Errorf("%v stalls were counted", n)
	}
	t.Logf("it gave up after %s", time.Since(start).Round(time.Millisecond))
	close(release) // the process would have ended; here it must be closed
}
