package cluster

import (
	"strings"
	"sync"
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
	hangs   func()
	release <-chan struct{}
}

func (h hangingLogs) StoreLog(l *raft.Log) error { return h.StoreLogs([]*raft.Log{l}) }

func (h hangingLogs) StoreLogs(logs []*raft.Log) error {
	if h.hang.Load() {
		h.hangs()
		<-h.release
	}
	return h.LogStore.StoreLogs(logs)
}

// TestLeaderWithAHungDiskGivesUp hangs the disk of a leader, which goes on
// sending heartbeats: it must end, and the others must go on.
func TestLeaderWithAHungDiskGivesUp(t *testing.T) {
	t.Parallel()
	var hang atomic.Bool
	hung, release := make(chan struct{}), make(chan struct{})
	goOn := sync.OnceFunc(func() { close(release) }) // the process would have ended; here it must be closed
	defer goOn()
	w := newWorld(t, TransportTCP, quick) // with the probeTimeout of a real disk, which a slow one keeps to
	first := w.servers[0]
	w.stop(first)
	first.logs = func(l raft.LogStore) raft.LogStore {
		return hangingLogs{l, &hang, sync.OnceFunc(func() { close(hung) }), release}
	}
	w.startAlone(first)
	w.join("")
	w.join("")
	waitFor(t, func() bool { return w.voters() == 3 }, "three voters")
	w.transfer(first) // if it lost the lead meanwhile
	before := testutil.ToFloat64(first.metrics.stalls)
	hang.Store(true)
	first.raft.Barrier(0) // so that it writes now, while it leads
	start := time.Now()
	select {
	case <-hung:
	case <-time.After(testTimeout):
		t.Fatal("the leader writes nothing")
	}
	select {
	case err := <-first.halted:
		if !fault.Is(err, fault.Unavailable) || !strings.Contains(fault.Public(err), "disk") {
			t.Errorf("it halts with %v", err)
		}
	case <-time.After(testTimeout):
		t.Fatal("the leader goes on with a hung disk")
	}
	if n := testutil.ToFloat64(first.metrics.stalls) - before; n != 1 {
		t.Errorf("%v stalls were counted", n)
	}
	t.Logf("it gave up after %s", time.Since(start).Round(time.Millisecond))
	goOn()
	w.stop(first)
	w.propose(tenantPut(1, "after"))
}
