package state

import (
	"encoding/hex"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/relais-mta/relais/control"
	"github.com/relais-mta/relais/control/command"
	"github.com/relais-mta/relais/shared/fault"
	"github.com/relais-mta/relais/shared/ids"
)

// checkGolden replays a log that was written once and for all: it must lead to
// the state that it led to then.
func checkGolden(t *testing.T, name string, write func(*testing.T) *world) {
	t.Helper()
	logPath, sumPath := filepath.Join("testdata", name+".log"), filepath.Join("testdata", name+".sums")
	if *update {
		w := write(t)
		var text strings.Builder
		for _, b := range w.log {
			fmt.Fprintln(&text, hex.EncodeToString(b))
		}
		if err := errors.Join(os.WriteFile(logPath, []byte(text.String()), 0o644), os.WriteFile(sumPath, []byte(sums(t, w.store)), 0o644)); err != nil {
			t.Fatal(err)
		}
	}
	log, err := os.ReadFile(logPath)
	if err != nil {
		t.Fatal(err)
	}
	want, err := os.ReadFile(sumPath)
	if err != nil {
		t.Fatal(err)
	}
	s := New()
	for i, line := range strings.Fields(string(log)) {
		b, err := hex.DecodeString(line)
		if err != nil {
			t.Fatal(err)
		}
		e, err := command.Decode(b)
		if err != nil {
			t.Fatal(err)
		}
		if r := s.Apply(uint64(i+1), e); r.Err != nil {
			t.Fatalf("entry %d: %v", i+1, r.Err)
		}
	}
	if got := sums(t, s); got != string(want) {
		t.Errorf("the golden log leads to\n%swant\n%s", got, want)
	}
}

// quarantineWorld has relay 7 with addresses 8 and 9 in pool 4, and relay 6.
func quarantineWorld(t *testing.T, version uint32) *world {
	w := newWorld(t)
	w.ok(&command.ClusterInit{Cluster: &command.Cluster{Id: id(100), Generation: 1, FsmVersion: version, CaBundle: []byte("pem"), CredentialKeySealed: make([]byte, 32)}})
	w.pool(4, "default", nil)
	w.node(6)
	w.node(7)
	for n := byte(8); n <= 9; n++ {
		w.source(n, n)
		w.ok(&command.IPAssign{Source: id(n), Node: id(7), Pool: id(4)})
		w.ok(&command.IPVerify{Source: id(n), Reverse: "confirmed"})
	}
	return w
}

func (w *world) at(n byte) *control.Source { return w.store.Read().Source(ids.Source(id(n))) }

func (w *world) viewed(t *testing.T) int {
	t.Helper()
	v, err := w.store.Read().View(ids.Node(id(6)), func(sealed, _ []byte) ([]byte, error) { return sealed, nil })
	if err != nil {
		t.Fatal(err)
	}
	return len(v.Sources)
}

var evict = &command.NodeSetState{Meta: &command.Meta{Actor: "ann", Reason: "stolen"}, Node: id(7), State: "evicted"}

func goldenQuarantine(t *testing.T) *world {
	w := quarantineWorld(t, 3)
	w.ok(evict)
	w.ok(&command.IPRelease{Meta: &command.Meta{Reason: "wiped"}, Source: id(8), OldOwnerIsOff: true})
	w.ok(&command.IPAssign{Source: id(9), Node: id(6), OldOwnerIsOff: true})
	return w
}

func TestGoldenQuarantine(t *testing.T) { checkGolden(t, "quarantine3", goldenQuarantine) }

// TestEvictionQuarantinesAddresses follows the addresses of an evicted relay
// until they are used again.
func TestEvictionQuarantinesAddresses(t *testing.T) {
	w := quarantineWorld(t, 3)
	if w.viewed(t) != 2 {
		t.Fatal("the addresses are not used")
	}
	before := w.store.Read().ViewRevision()
	w.ok(evict)
	for n := byte(8); n <= 9; n++ {
		if s := w.at(n); s.State != control.SourceQuarantined || s.Owner != ids.Node(id(7)) || s.Quarantine != "relay edge-1 was evicted: stolen" {
			t.Errorf("got %+v", s)
		}
	}
	if w.viewed(t) != 0 || w.store.Read().ViewRevision() == before {
		t.Error("relays still see the addresses")
	}
	if a := w.store.Read().Audit(1); a[0].Reason != "stolen" || a[0].Actor != "ann" || !strings.Contains(a[0].Before, "state=active") || !strings.HasSuffix(a[0].After, "quarantined=10.0.0.8,10.0.0.9") {
		t.Errorf("the audit tail has %+v", a[0])
	}
	w.ok(evict) // repeated
	w.refused(&command.IPRelease{Meta: &command.Meta{Reason: "wiped"}, Source: id(8)}, fault.Conflict, "old_owner_is_off")
	w.refused(&command.IPRelease{Meta: &command.Meta{Reason: "wiped"}, Source: id(5), OldOwnerIsOff: true}, fault.NotFound, "")
	w.refused(&command.IPAssign{Source: id(8), Node: id(6)}, fault.Conflict, "node")
	epoch := w.at(8).Epoch
	release := &command.IPRelease{Meta: &command.Meta{Reason: "wiped"}, Source: id(8), OldOwnerIsOff: true}
	w.ok(release)
	w.ok(release) // repeated
	if s := w.at(8); s.State != control.SourceFree || !s.Owner.IsZero() || s.Quarantine != "" || s.Pool.IsZero() || s.Epoch != epoch {
		t.Errorf("released: %+v", s)
	}
	w.ok(&command.IPAssign{Source: id(8), Node: id(6)})
	w.ok(&command.IPAssign{Source: id(9), Node: id(6), OldOwnerIsOff: true})
	for n := byte(8); n <= 9; n++ {
		if s := w.at(n); s.State != control.SourceAssigned || s.Owner != ids.Node(id(6)) || s.Quarantine != "" || s.Epoch <= epoch {
			t.Errorf("assigned anew: %+v", s)
		}
	}
	if w.viewed(t) != 2 {
		t.Error("the addresses are not used again")
	}
	w.refused(release, fault.Conflict, "")
}

// TestQuarantineComesWithVersion3: older rules leave the addresses where they
// are, so that servers of both releases agree; the raise to version 3 makes up.
func TestQuarantineComesWithVersion3(t *testing.T) {
	w := quarantineWorld(t, 2)
	w.ok(evict)
	if s := w.at(8); s.State != control.SourceAssigned || s.Quarantine != "" {
		t.Errorf("version 2 made %+v", s)
	}
	w.ok(&command.FSMVersionSet{Version: 3})
	if s := w.at(8); s.State != control.SourceQuarantined || s.Quarantine != "relay edge-1 was evicted" {
		t.Errorf("version 3 made %+v", s)
	}
}

// TestNoReleaseInRecoveryMode: an address changes hands when every relay was heard.
func TestNoReleaseInRecoveryMode(t *testing.T) {
	w := quarantineWorld(t, 3)
	w.ok(evict)
	w.ok(&command.ClusterRecover{Generation: 2, Cause: "restore", Server: &command.Server{Id: id(101), Name: "c1", RaftAddress: "10.0.0.1:7444", State: "active", MaxFsmVersion: 3}})
	w.refused(&command.IPRelease{Meta: &command.Meta{Reason: "wiped"}, Source: id(8), OldOwnerIsOff: true}, fault.Unavailable, "node")
}
