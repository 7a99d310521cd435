package cluster

import (
	"bytes"
	"context"
	"fmt"
	"os"
	"path/filepath"
	"testing"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/relais-mta/relais/control/command"
	"github.com/relais-mta/relais/control/state"
	"github.com/relais-mta/relais/shared/fault"
)

func serverRecord(n byte) *command.Server {
	return &command.Server{Id: bytes.Repeat([]byte{n}, 16), Name: "c", RaftAddress: "127.0.0.1:1", State: "active", MaxFsmVersion: uint32(command.FSMVersion)}
}

func initialise(t *testing.T, c *Cluster, version uint16) {
	t.Helper()
	for _, cmd := range []command.Command{
		&command.ClusterInit{Cluster: &command.Cluster{Id: bytes.Repeat([]byte{1}, 16), Generation: 1, FsmVersion: uint32(version), CaBundle: []byte("pem"), CaSealed: []byte("s"), KekId: "k", RecoverySealed: []byte("r"), CredentialKeySealed: []byte("c")}},
		&command.ServerUpsert{Server: serverRecord(2)},
		tenantPut(1, "acme"),
	} {
		if _, err := c.Propose(t.Context(), cmd); err != nil {
			t.Fatal(err)
		}
	}
}

// TestRestoreIntoAFreshCluster: the restored state is there, changes go on from
// it, and all of it is still there after a restart.
func TestRestoreIntoAFreshCluster(t *testing.T) {
	t.Parallel()
	old := open(t, bootstrap(t))
	initialise(t, old, command.FSMVersion)
	for i := range 20 { // so that its index is ahead of the fresh cluster's
		if _, err := old.Propose(t.Context(), tenantPut(10+i, "t"+string(rune('a'+i)))); err != nil {
			t.Fatal(err)
		}
	}
	var snapshot bytes.Buffer
	r := old.state.Read()
	if _, err := r.WriteTo(&snapshot); err != nil {
		t.Fatal(err)
	}
	if err := old.Restore(t.Context(), bytes.NewReader(snapshot.Bytes()), int64(snapshot.Len()), r.Index()); !fault.Is(err, fault.Exists) {
		t.Errorf("restoring into a living cluster: %v", err)
	}
	closeNow(t, old)

	dir := bootstrap(t)
	fresh := open(t, dir)
	if err := fresh.Restore(t.Context(), bytes.NewReader(snapshot.Bytes()), int64(snapshot.Len()), r.Index()); err != nil {
		t.Fatal(err)
	}
	if fresh.state.Read().Hash() != r.Hash() {
		t.Error("the restored state has another hash")
	}
	if _, err := fresh.Propose(t.Context(), &command.ClusterRecover{Generation: 2, Cause: "restore", Server: serverRecord(3)}); err != nil {
		t.Fatal(err)
	}
	hash := fresh.state.Read().Hash()
	closeNow(t, fresh)
	again := open(t, dir)
	defer closeNow(t, again)
	got := again.state.Read()
	if got.Hash() != hash || got.Cluster().Generation != 2 || got.Recovery() == nil || got.TenantByName("tt") == nil || got.Index() <= r.Index() {
		t.Errorf("after a restart: generation %d, index %d (backup %d)", got.Cluster().Generation, got.Index(), r.Index())
	}
}

// TestRecoverFromOneServer: a server whose peers are gone leads again with all
// it knew.
func TestRecoverFromOneServer(t *testing.T) {
	t.Parallel()
	if err := Recover(t.TempDir(), "s1", "127.0.0.1:1", quiet); !fault.Is(err, fault.Invalid) {
		t.Errorf("a directory without a log: %v", err)
	}
	dir := bootstrap(t)
	c := open(t, dir)
	initialise(t, c, command.FSMVersion)
	// A second voter that never was makes every later start wait for ever.
	future := c.raft.AddVoter("s2", "127.0.0.1:2", 0, 0)
	waitFor(t, func() bool { return len(c.raft.GetConfiguration().Configuration().Servers) == 2 }, "the second voter")
	closeNow(t, c)
	_ = future.Error() // it cannot be committed
	if err := Recover(dir, "s1", "127.0.0.1:1", quiet); err != nil {
		t.Fatal(err)
	}
	c = open(t, dir)
	defer closeNow(t, c)
	if c.state.Read().TenantByName("acme") == nil {
		t.Error("the recovered server forgot what it knew")
	}
	if _, err := c.Propose(t.Context(), tenantPut(2, "more")); err != nil {
		t.Error(err)
	}
}

// TestAcknowledgedTailIsNotForgotten: the log drops damaged entries at its end;
// the server must notice that it had acknowledged them.
func TestAcknowledgedTailIsNotForgotten(t *testing.T) {
	t.Parallel()
	for name, damage := range map[string]func([]byte, int) []byte{
		"a flipped bit": func(b []byte, at int) []byte { b[at] ^= 1; return b },
		"zeros":         func(b []byte, at int) []byte { clear(b[at:]); return b },
		"cut off":       func(b []byte, at int) []byte { return b[:at] },
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			dir := bootstrap(t)
			c := open(t, dir)
			if _, err := c.Propose(context.Background(), tenantPut(1, "first")); err != nil {
				t.Fatal(err)
			}
			// Damage before the end of the log is another matter. An entry is not the
			// last one if the disk was probed just after it.
			last := ""
			for n := 2; last == ""; n++ {
				name := fmt.Sprint("lastone", n)
				r, err := c.Propose(context.Background(), tenantPut(n, name))
				if err != nil {
					t.Fatal(err)
				}
				closeNow(t, c)
				if c.raft.LastIndex() == r.Index {
					last = name
				} else {
					c = open(t, dir)
				}
			}
			logs, err := filepath.Glob(filepath.Join(dir, raftDir, "log", "*.wal"))
			if err != nil || len(logs) != 1 {
				t.Fatalf("%v, %v", logs, err)
			}
			b, err := os.ReadFile(logs[0])
			if err != nil {
				t.Fatal(err)
			}
			if err := os.WriteFile(logs[0], damage(b, bytes.Index(b, []byte(last))), 0o600); err != nil {
				t.Fatal(err)
			}
			_, err = Open(Options{Dir: dir, ServerID: "s1", Address: "127.0.0.1:1", State: state.New(), Logger: quiet, Registerer: prometheus.NewRegistry(), Halt: func(err error) { panic(err) }})
			if err == nil {
				t.Errorf("%s: the server started without an entry that it acknowledged", name)
				return
			}
			t.Logf("%s: %s", name, fault.Public(err))
			if fault.Is(err, fault.Invalid) {
				// The operator's word: what is missing is given up.
				if err := Recover(dir, "s1", "127.0.0.1:1", quiet); err != nil {
					t.Fatalf("%s: %v", name, err)
				}
				c = open(t, dir)
				if r := c.state.Read(); r.TenantByName("first") == nil || r.TenantByName(last) != nil {
					t.Errorf("%s: recovered to %d tenants", name, len(r.Tenants()))
				}
				closeNow(t, c)
			}
		})
	}
}
