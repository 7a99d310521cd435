package cluster

import (
	"bytes"
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/hashicorp/raft"
	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/testutil"

	"github.com/relais-mta/relais/control"
	"github.com/relais-mta/relais/control/ca"
	"github.com/relais-mta/relais/control/command"
	"github.com/relais-mta/relais/control/state"
	"github.com/relais-mta/relais/shared/fault"
	"github.com/relais-mta/relais/shared/ids"
	"github.com/relais-mta/relais/shared/pki"
)

const testTimeout = time.Minute

var quiet = slog.New(slog.DiscardHandler)

func tenantPut(n int, name string) *command.TenantPut {
	id := bytes.Repeat([]byte{byte(n), byte(n >> 8)}, 8)
	return &command.TenantPut{Tenant: &command.Tenant{Id: id, Name: name, OwnershipToken: "own"}}
}

// open starts a server on a directory and waits until it leads.
func open(t testing.TB, dir string) *Cluster {
	t.Helper()
	c, err := Open(Options{Dir: dir, ServerID: "s1", Address: "127.0.0.1:1", State: state.New(), Logger: quiet, Registerer: prometheus.NewRegistry(), Halt: func(err error) { panic(err) }})
	if err != nil {
		t.Fatal(err)
	}
	electNow(t, c)
	ctx, cancel := context.WithTimeout(context.Background(), testTimeout)
	defer cancel()
	if err := c.WaitReady(ctx); err != nil {
		t.Fatal(err)
	}
	return c
}

// electNow has a server that is alone stand for the lead at once: there is nobody
// whom it would have to wait for. Raft looks whether there is a leader when it is
// told of a shorter timeout, be it by a millisecond.
func electNow(t testing.TB, c *Cluster) {
	t.Helper()
	conf := c.raft.ReloadableConfig()
	conf.HeartbeatTimeout -= time.Millisecond
	if err := c.raft.ReloadConfig(conf); err != nil {
		t.Fatal(err)
	}
}

func bootstrap(t testing.TB) string {
	t.Helper()
	dir := t.TempDir()
	if err := Bootstrap(dir, "s1", "127.0.0.1:1", quiet); err != nil {
		t.Fatal(err)
	}
	return dir
}

func closeNow(t testing.TB, c *Cluster) {
	t.Helper()
	if err := c.Close(); err != nil {
		t.Fatal(err)
	}
}

func TestBootstrapRefusesAnExistingCluster(t *testing.T) {
	t.Parallel()
	dir := bootstrap(t)
	if err := Bootstrap(dir, "s1", "127.0.0.1:1", quiet); !fault.Is(err, fault.Invalid) || !strings.Contains(fault.Public(err), dir) {
		t.Errorf("got %v", err)
	}
}

func TestChangesSurviveARestart(t *testing.T) {
	t.Parallel()
	dir := bootstrap(t)
	c := open(t, dir)
	ctx := context.Background()
	r, err := c.Propose(ctx, tenantPut(1, "acme"))
	if err != nil || r.Row.(*control.Tenant).Revision != r.Index {
		t.Fatalf("got %+v, %v", r, err)
	}
	if _, err := c.Propose(ctx, tenantPut(2, "acme")); !fault.Is(err, fault.Exists) {
		t.Errorf("a rule's refusal came back as %v", err)
	}
	if _, err := c.Propose(ctx, tenantPut(3, "no good name")); !fault.Is(err, fault.Invalid) {
		t.Errorf("a malformed command came back as %v", err)
	}
	if err := c.Snapshot(); err != nil {
		t.Fatal(err)
	}
	if _, err := c.Propose(ctx, tenantPut(4, "after")); err != nil { // replayed from the log on top of the snapshot
		t.Fatal(err)
	}
	want := c.state.Read().Hash()
	closeNow(t, c)
	if snaps, err := os.ReadDir(filepath.Join(dir, "raft", "snapshots")); err != nil || len(snaps) != 1 {
		t.Errorf("%d snapshots on disk, %v", len(snaps), err)
	}
	c = open(t, dir)
	defer closeNow(t, c)
	if got := c.state.Read().Hash(); got != want {
		t.Errorf("after a restart the state is %x, want %x", got, want)
	}
	if c.state.Read().TenantByName("after") == nil {
		t.Error("a change after the snapshot is lost")
	}
}

func TestWithoutALeaderNothingChanges(t *testing.T) {
	t.Parallel()
	c, err := Open(Options{Dir: t.TempDir(), ServerID: "s1", Address: "127.0.0.1:1", State: state.New(), Logger: quiet, Registerer: prometheus.NewRegistry(), Halt: func(err error) { panic(err) }})
	if err != nil {
		t.Fatal(err)
	}
	defer closeNow(t, c)
	_, err = c.Propose(context.Background(), tenantPut(1, "acme"))
	if !errors.Is(err, control.ErrNoLeader) || !fault.Is(err, fault.Unavailable) || c.Ready() || c.Fresh() {
		t.Errorf("got %v", err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	cancel()
	if err := c.WaitReady(ctx); !fault.Is(err, fault.Timeout) {
		t.Errorf("waiting for a leader gave %v", err)
	}
}

func TestErrorsAfterWhichTheOutcomeIsUnknown(t *testing.T) {
	t.Parallel()
	for _, tc := range []struct {
		err     error
		unknown bool
	}{
		{raft.ErrNotLeader, false}, {raft.ErrEnqueueTimeout, false}, {raft.ErrLeadershipTransferInProgress, false},
		{raft.ErrLeadershipLost, true}, {raft.ErrRaftShutdown, true}, {raft.ErrAbortedByRestore, true}, {errors.New("disk"), true},
	} {
		err := translate(tc.err)
		if errors.Is(err, control.ErrOutcomeUnknown) != tc.unknown || errors.Is(err, control.ErrNoLeader) == tc.unknown || !errors.Is(err, tc.err) || !fault.Is(err, fault.Unavailable) {
			t.Errorf("%v becomes %v", tc.err, err)
		}
	}
	c := open(t, bootstrap(t))
	defer closeNow(t, c)
	ctx, cancel := context.WithCancel(context.Background())
	cancel()
	// The caller gave up: either it was told the result in time, or nothing is known.
	if _, err := c.Propose(ctx, tenantPut(1, "acme")); err != nil && !errors.Is(err, control.ErrOutcomeUnknown) {
		t.Errorf("got %v", err)
	}
}

// TestStateHash drives a server past a checkpoint: its hash is committed, the
// log is read back and compared, and a differing hash stops the server.
func TestStateHash(t *testing.T) {
	t.Parallel()
	c := open(t, bootstrap(t))
	defer closeNow(t, c)
	ctx, cancel := context.WithTimeout(context.Background(), testTimeout)
	defer cancel()
	var writers sync.WaitGroup
	for w := range 64 {
		writers.Go(func() {
			for i := range state.CheckpointEvery/64 + 1 {
				n := 1 + w*1000 + i
				if _, err := c.Propose(ctx, tenantPut(n, fmt.Sprint("t", n))); err != nil {
					t.Error(err)
					return
				}
			}
		})
	}
	writers.Wait()
	name := command.TypeStateHash.String()
	waitFor(t, func() bool { return testutil.ToFloat64(c.metrics.proposals.WithLabelValues(name, "applied")) == 1 }, "the state hash to be committed")
	waitFor(t, func() bool { return testutil.ToFloat64(c.metrics.verifiedEntries) >= state.CheckpointEvery/2 }, "the log to be verified")
	if err := c.Health(); err != nil {
		t.Fatal(err)
	}
	cp, ok := c.state.Read().LastCheckpoint()
	if !ok {
		t.Fatal("there is no checkpoint")
	}
	if _, err := c.Propose(ctx, &command.StateHash{Index: cp.Index, Hash: make([]byte, 32)}); err != nil {
		t.Fatal(err)
	}
	if err := c.Health(); err == nil || !strings.Contains(err.Error(), "differs from the leader's") {
		t.Errorf("a diverged server says %v", err)
	}
	if text := c.problem(); !strings.Contains(text, "move its data directory away") || !strings.Contains(text, "relais-control join") {
		t.Errorf("an operator is told %q", text)
	}
	members, err := c.members()
	if err != nil || len(members) != 1 || !strings.Contains(members[0].Problem, "differs from the leader's") {
		t.Errorf("in the list: %+v, %v", members, err)
	}
	waitFor(t, func() bool { return testutil.ToFloat64(c.metrics.divergences) == 1 }, "the divergence to be counted")
}

// waitFor polls a condition that no channel tells of.
func waitFor(t *testing.T, cond func() bool, what string) {
	t.Helper()
	deadline := time.After(testTimeout)
	tick := time.NewTicker(2 * time.Millisecond)
	defer tick.Stop()
	for !cond() {
		select {
		case <-deadline:
			t.Fatalf("waited %s for %s", testTimeout, what)
		case <-tick.C:
		}
	}
}

func TestADamagedLogIsNotServed(t *testing.T) {
	t.Parallel()
	dir := bootstrap(t)
	c := open(t, dir)
	for n, name := range []string{"acme", "after", "after-that"} { // damage within the log, not at its end
		if _, err := c.Propose(context.Background(), tenantPut(n+1, name)); err != nil {
			t.Fatal(err)
		}
	}
	closeNow(t, c)
	logs, err := filepath.Glob(filepath.Join(dir, "raft", "log", "*.wal"))
	if err != nil || len(logs) != 1 {
		t.Fatalf("%v, %v", logs, err)
	}
	b, err := os.ReadFile(logs[0])
	if err != nil {
		t.Fatal(err)
	}
	at := bytes.Index(b, []byte("acme"))
	if at < 0 {
		t.Fatal("the entry is not in the log")
	}
	b[at] ^= 1
	if err := os.WriteFile(logs[0], b, 0o600); err != nil {
		t.Fatal(err)
	}
	_, err = Open(Options{Dir: dir, ServerID: "s1", Address: "127.0.0.1:1", State: state.New(), Logger: quiet, Registerer: prometheus.NewRegistry(), Halt: func(err error) { panic(err) }})
	if !fault.Is(err, fault.Invalid) || !strings.Contains(fault.Public(err), "join again") {
		t.Errorf("a log with a changed entry: %v", err)
	}
}

func newAuthority(t *testing.T, cluster ids.Cluster, now time.Time) *ca.Authority {
	t.Helper()
	material, kek, _, err := ca.Create(cluster, now)
	if err != nil {
		t.Fatal(err)
	}
	a, err := ca.Open(material, cluster, pki.NewSealer(kek))
	if err != nil {
		t.Fatal(err)
	}
	return a
}

func leaf(t *testing.T, a *ca.Authority, role pki.Role, node ids.Node, now time.Time) *tls.Certificate {
	t.Helper()
	key, err := pki.NewNodeKey()
	if err != nil {
		t.Fatal(err)
	}
	cert, err := a.Issue(key, role, node, pki.Request{}, now)
	if err != nil {
		t.Fatal(err)
	}
	return cert
}

// BenchmarkPropose tells how long one change takes on this machine's disk.
func BenchmarkPropose(b *testing.B) {
	c := open(b, bootstrap(b))
	defer closeNow(b, c)
	took := make([]time.Duration, 0, b.N)
	row := tenantPut(1, "acme")
	b.ResetTimer()
	for range b.N {
		row.Tenant.Suspended = !row.Tenant.Suspended
		start := time.Now()
		r, err := c.Propose(context.Background(), row)
		if err != nil {
			b.Fatal(err)
		}
		took = append(took, time.Since(start))
		row.Expect = r.Row.(*control.Tenant).Revision
	}
	slices.Sort(took)
	b.ReportMetric(float64(took[len(took)/2].Microseconds()), "p50-µs")
	b.ReportMetric(float64(took[len(took)*99/100].Microseconds()), "p99-µs")
}
