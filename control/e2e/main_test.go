package e2e

import (
	"context"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"testing"
	"time"

	"github.com/relais-mta/relais/shared/lab"
	"github.com/relais-mta/relais/shared/lab/fleet"
)

// binaries is where TestMain put the two programs, and the one that simulates
// the sessions of many relays.
var binaries string

// binariesVariable names the directory of the programs to a test that runs
// this program again in a network namespace of its own.
const binariesVariable = "RELAIS_E2E_BINARIES"

func TestMain(m *testing.M) {
	if binaries = os.Getenv(binariesVariable); binaries != "" {
		os.Exit(m.Run())
	}
	dir, err := os.MkdirTemp("", "relais-e2e-bin-")
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
	binaries = dir
	build := exec.Command("go", "build", "-o", dir+string(filepath.Separator), "./relay/cmd/relais-relay", "./control/cmd/relais-control", "./relay/agent/agentsim")
	build.Dir = filepath.Join("..", "..")
	build.Env = append(os.Environ(), "CGO_ENABLED=0")
	if out, err := build.CombinedOutput(); err != nil {
		fmt.Fprintf(os.Stderr, "the binaries do not build: %v\n%s", err, out)
		os.Exit(1)
	}
	code := m.Run()
	_ = os.RemoveAll(dir)
	os.Exit(code)
}

// start brings up a fleet that ends with the test. Its directory is kept when
// the test fails.
func start(t *testing.T, cfg fleet.Config) *fleet.Fleet {
	t.Helper()
	dir, err := os.MkdirTemp("", "relais-e2e-")
	if err != nil {
		t.Fatal(err)
	}
	if cfg.Bin == "" {
		cfg.Bin = binaries
	}
	cfg.Dir = dir
	cfg.Relays, cfg.Sources, cfg.Seed = max(1, cfg.Relays), max(1, cfg.Sources), max(1, cfg.Seed)
	f, err := fleet.Start(t.Context(), cfg)
	if err != nil {
		t.Fatalf("%v (data in %s)", err, dir)
	}
	t.Cleanup(func() {
		err := f.Close()
		if err != nil {
			t.Errorf("stopping: %v", err)
		}
		if t.Failed() {
			t.Logf("data and logs are kept in %s", dir)
			return
		}
		_ = os.RemoveAll(dir)
	})
	return f
}

// within bounds a wait.
func within(t *testing.T, d time.Duration) context.Context {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), d)
	t.Cleanup(cancel)
	return ctx
}

// accounts sums up what became of submitted mail.
type accounts struct {
	accepted, refused, delivered, missing int
}

// settle waits until the queues are empty and accounts for every message that
// was answered 250: it must have arrived or have been reported as failed.
func settle(t *testing.T, f *fleet.Fleet, submitted []fleet.Submitted) accounts {
	t.Helper()
	if err := f.WaitEmpty(within(t, 2*time.Minute), nil); err != nil {
		t.Fatal(err)
	}
	failed := make(map[string]int)
	if err := f.NewLedger().Read(t.Context(), func(_ *fleet.Relay, e *fleet.Event) {
		if e.Final() && e.Type != "delivered" {
			failed[e.Address]++
		}
	}); err != nil {
		t.Fatal(err)
	}
	var a accounts
	for i := range submitted {
		s := &submitted[i]
		if s.Result.State != lab.StateAccepted {
			a.refused++
			continue
		}
		a.accepted++
		switch {
		case f.Lab.Deliveries(s.MessageID, s.Recipient) > 0:
			a.delivered++
		case failed[s.Recipient] > 0:
			failed[s.Recipient]--
		default:
			a.missing++
			if a.missing < 5 {
				t.Errorf("answered 250 and lost: %s to %s", s.MessageID, s.Recipient)
			}
		}
	}
	if a.missing > 0 {
		t.Errorf("%d of %d messages answered 250 are lost", a.missing, a.accepted)
	}
	return a
}

// accepting returns n recipients at open providers.
func recipients(t *testing.T, f *fleet.Fleet, n int) []string {
	t.Helper()
	to, err := f.Recipients(n)
	if err != nil {
		t.Fatal(err)
	}
	return to
}
