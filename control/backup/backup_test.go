package backup

import (
	"bytes"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"os"
	"path/filepath"
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/relais-mta/relais/control"
	"github.com/relais-mta/relais/control/ca"
	"github.com/relais-mta/relais/control/command"
	"github.com/relais-mta/relais/control/state"
	"github.com/relais-mta/relais/shared/fault"
	"github.com/relais-mta/relais/shared/ids"
	"github.com/relais-mta/relais/shared/pki"
)

var taken = time.UnixMilli(1_767_225_600_000).UTC()

// filled is a state of a cluster with a CA and some tenants.
func filled(t *testing.T, tenants int) (*state.Store, pki.Key, string) {
	t.Helper()
	cluster := ids.Cluster{7}
	material, kek, recovery, err := ca.Create(cluster, taken)
	if err != nil {
		t.Fatal(err)
	}
	st := state.New()
	index := uint64(0)
	apply := func(c command.Command) {
		t.Helper()
		b, err := command.Encode(c, taken, 1)
		if err != nil {
			t.Fatal(err)
		}
		e, err := command.Decode(b)
		if err != nil {
			t.Fatal(err)
		}
		index++
		if r := st.Apply(index, e); r.Err != nil {
			t.Fatal(r.Err)
		}
	}
	apply(&command.ClusterInit{Cluster: command.ClusterRecord(&control.Cluster{ID: cluster, Generation: 3, FSMVersion: command.FSMVersion, CABundle: material.Bundle, CASealed: material.Sealed, KEKID: material.KEKID, RecoverySealed: material.RecoverySealed, CredentialKeySealed: []byte("sealed")})})
	for i := range tenants {
		apply(&command.TenantPut{Tenant: &command.Tenant{Id: fmt.Appendf(nil, "%016d", i), Name: fmt.Sprintf("tenant%d", i), OwnershipToken: "PLAINTEXT"}})
	}
	return st, kek, recovery
}

func write(t *testing.T, st *state.Store, kek pki.Key) ([]byte, Manifest) {
	t.Helper()
	var b bytes.Buffer
	m, err := Write(&b, st.Read(), kek, "1.2.3", taken)
	if err != nil {
		t.Fatal(err)
	}
	return b.Bytes(), m
}

func restore(b []byte, kek pki.Key) (*state.Store, error) {
	a, err := Open(bytes.NewReader(b))
	if err != nil {
		return nil, err
	}
	return a.Restore(kek)
}

// TestRoundTrip goes over the sizes around one chunk, and opens a backup with
// nothing but the file and the recovery key.
func TestRoundTrip(t *testing.T) {
	t.Parallel()
	for _, n := range []int{0, 1, 700, 5000} {
		st, kek, recovery := filled(t, n)
		b, m := write(t, st, kek)
		if bytes.Contains(b, []byte("PLAINTEXT")) {
			t.Errorf("%d tenants: the backup is not encrypted", n)
		}
		a, err := Open(bytes.NewReader(b))
		if err != nil || a.Manifest.StateHash != m.StateHash || a.Manifest.Index != uint64(n+1) || a.Manifest.Generation != 3 || a.Manifest.Version != "1.2.3" || !a.Manifest.CreatedAt.Equal(taken) {
			t.Fatalf("%d tenants: %+v, %v", n, a, err)
		}
		if err := a.CheckSum(); err != nil {
			t.Errorf("%d tenants: checksum: %v", n, err)
		}
		recovered, err := ca.Recover(ca.Material{RecoverySealed: a.Manifest.RecoverySealed}, a.Manifest.Cluster, recovery)
		if err != nil {
			t.Fatal(err)
		}
		got, err := restore(b, recovered)
		if err != nil {
			t.Fatal(err)
		}
		if got.Read().Hash() != st.Read().Hash() || len(got.Read().Tenants()) != n {
			t.Errorf("%d tenants: restored to another state", n)
		}
	}
}

// TestEveryDamageIsFound cuts the file at every place and flips bits all over.
func TestEveryDamageIsFound(t *testing.T) {
	t.Parallel()
	st, kek, _ := filled(t, 3)
	whole, _ := write(t, st, kek)
	check := func(what string, b []byte) {
		t.Helper()
		if _, err := restore(b, kek); err == nil {
			t.Errorf("%s: restored", what)
		}
		a, err := Open(bytes.NewReader(b))
		if err == nil {
			err = a.CheckSum()
		}
		if err == nil {
			t.Errorf("%s: the checksum is good", what)
		}
	}
	for n := range whole {
		check(fmt.Sprintf("cut at %d", n), whole[:n])
	}
	for at := range whole {
		b := bytes.Clone(whole)
		b[at] ^= 4
		check(fmt.Sprintf("bit at %d", at), b)
	}
	check("a byte behind the end", append(bytes.Clone(whole), 0))
	if _, err := restore(whole, pki.NewKey()); !fault.Is(err, fault.Denied) {
		t.Errorf("another key: %v", err)
	}
}

// TestChunksStayInPlace swaps, repeats and drops chunks and mends the checksum,
// as somebody could who wants to hide a change.
func TestChunksStayInPlace(t *testing.T) {
	t.Parallel()
	st, kek, _ := filled(t, 4000)
	whole, _ := write(t, st, kek)
	a, err := Open(bytes.NewReader(whole))
	if err != nil {
		t.Fatal(err)
	}
	head := whole[:len(a.head)]
	chunk := 4 + chunkBytes + tagBytes
	body := whole[len(head) : len(whole)-32]
	if len(body) < 2*chunk {
		t.Fatalf("only %d bytes", len(body))
	}
	forge := func(chunks ...[]byte) []byte {
		b := bytes.Join(append([][]byte{head}, chunks...), nil)
		return append(b, sha(b)...)
	}
	if _, err := restore(forge(body), kek); err != nil {
		t.Fatalf("the unchanged file: %v", err)
	}
	for name, b := range map[string][]byte{
		"swapped":  forge(body[chunk:2*chunk], body[:chunk], body[2*chunk:]),
		"repeated": forge(body[:chunk], body),
		"dropped":  forge(body[chunk:]),
		"no last":  forge(body[:2*chunk]),
	} {
		if _, err := restore(b, kek); !fault.Is(err, fault.Invalid) {
			t.Errorf("%s: %v", name, err)
		}
	}
}

func TestNewerFileIsRefused(t *testing.T) {
	t.Parallel()
	st, kek, _ := filled(t, 1)
	b, _ := write(t, st, kek)
	b[len(magic)+1]++
	if _, err := Open(bytes.NewReader(b)); !fault.Is(err, fault.Invalid) {
		t.Errorf("got %v", err)
	}
	if _, err := Write(io.Discard, st.Read(), pki.NewKey(), "1", taken); !fault.Is(err, fault.Invalid) {
		t.Errorf("a key that is not the cluster's: %v", err)
	}
	if _, err := Write(io.Discard, state.New().Read(), kek, "1", taken); !fault.Is(err, fault.Unavailable) {
		t.Errorf("an empty state: %v", err)
	}
}

func newKeeper(t *testing.T, st *state.Store, kek pki.Key, dir string) *Keeper {
	t.Helper()
	return NewKeeper(Options{Dir: dir, State: st, KEK: kek, Version: "1", Leads: func() bool { return true }, Logger: slog.New(slog.DiscardHandler), Registerer: prometheus.NewRegistry()})
}

// TestKeeper keeps one backup for each state, at most maxKept, and takes others
// on demand without leaving a file.
func TestKeeper(t *testing.T) {
	t.Parallel()
	st, kek, _ := filled(t, 1)
	dir := filepath.Join(t.TempDir(), "backups")
	k := newKeeper(t, st, kek, dir)
	for range 2 {
		if err := k.Keep(); err != nil {
			t.Fatal(err)
		}
	}
	names := k.names()
	if len(names) != 1 {
		t.Fatalf("a state that did not change was kept as %v", names)
	}
	b, err := os.ReadFile(filepath.Join(dir, names[0]))
	if err != nil {
		t.Fatal(err)
	}
	if info, err := os.Stat(filepath.Join(dir, names[0])); err != nil || info.Mode().Perm() != 0o600 {
		t.Errorf("%v, %v", info, err)
	}
	if _, err := restore(b, kek); err != nil {
		t.Error(err)
	}
	r, m, err := k.Take(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	b, err = io.ReadAll(r)
	if err = errors.Join(err, r.Close()); err != nil {
		t.Fatal(err)
	}
	if got, err := restore(b, kek); err != nil || got.Read().Index() != m.Index {
		t.Errorf("taken on demand: %v", err)
	}
	for i := range maxKept + 3 { // as if hours had passed
		name := fmt.Sprintf("20200101T%06dZ-%d%s", i, i, suffix)
		if err := os.WriteFile(filepath.Join(dir, name), nil, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	k.prune()
	left := k.names()
	if len(left) != maxKept || left[len(left)-1] != names[0] {
		t.Errorf("%d are left, the newest is %s", len(left), left[len(left)-1])
	}
	entries, err := os.ReadDir(dir)
	if err != nil || len(entries) != maxKept {
		t.Errorf("%d files, %v", len(entries), err)
	}
	if err := k.Health(); err != nil {
		t.Error(err)
	}
}

// TestKeeperSaysWhatFails: a backup that cannot be written shows in health.
func TestKeeperSaysWhatFails(t *testing.T) {
	t.Parallel()
	st, kek, _ := filled(t, 1)
	blocked := filepath.Join(t.TempDir(), "file")
	if err := os.WriteFile(blocked, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	k := newKeeper(t, st, kek, filepath.Join(blocked, "backups"))
	if err := k.Keep(); err == nil {
		t.Fatal("it was written into a file")
	}
	if err := k.Health(); err == nil {
		t.Error("health is good")
	}
	if _, _, err := k.Take(t.Context()); err == nil {
		t.Error("one on demand was written into a file")
	}
}

func sha(b []byte) []byte {
	sum := sha256.Sum256(b)
	return sum[:]
}
