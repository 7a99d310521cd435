package state

import (
	"bytes"
	"errors"
	"strings"
	"testing"
	"time"

	"github.com/relais-mta/relais/control"
	"github.com/relais-mta/relais/control/command"
	"github.com/relais-mta/relais/shared/fault"
)

func recoverCommand(generation uint64) *command.ClusterRecover {
	return &command.ClusterRecover{Generation: generation, Cause: "restore", Server: &command.Server{Id: id(120), Name: "new", RaftAddress: "10.0.0.9:7444", State: "active", MaxFsmVersion: 2}}
}

// TestRecoverBeginsAGeneration: the servers of before are gone, their join
// tokens are void, addresses stay where they are until recovery mode ends.
func TestRecoverBeginsAGeneration(t *testing.T) {
	w := newWorld(t)
	w.refused(recoverCommand(2), fault.NotFound, "")
	w.refused(&command.RecoveryEnd{Generation: 2}, fault.NotFound, "")
	w.ok(&command.ClusterInit{Cluster: &command.Cluster{Id: id(100), Generation: 1, FsmVersion: 2}})
	for n := byte(101); n < 104; n++ {
		w.ok(&command.ServerUpsert{Server: &command.Server{Id: id(n), Name: "c", RaftAddress: "10.0.0.1:7444", State: "active"}})
	}
	w.pool(4, "default", nil)
	w.node(7)
	w.source(8, 1)
	w.source(9, 2)
	w.ok(&command.IPAssign{Source: id(8), Node: id(7), Pool: id(4)})
	w.ok(tokenCreate(10, nil))

	w.refused(recoverCommand(1), fault.Conflict, "")
	w.refused(recoverCommand(3), fault.Conflict, "")
	views := w.store.Read().ViewRevision()
	c := w.ok(recoverCommand(2)).(*control.Cluster)
	r := w.store.Read()
	if c.Generation != 2 || len(r.Servers()) != 1 || r.Servers()[0].Name != "new" || r.ViewRevision() == views {
		t.Errorf("got %+v with servers %+v", c, r.Servers())
	}
	if got := r.Recovery(); got == nil || got.Generation != 2 || got.Cause != control.CauseRestore || !got.Since.Equal(w.now.Truncate(time.Millisecond)) {
		t.Errorf("recovery mode is %+v", got)
	}
	for _, token := range r.Tokens() {
		if !token.Revoked {
			t.Errorf("token %s of before is still good", token.ID)
		}
	}
	hash := r.Hash()
	w.ok(recoverCommand(2)) // again, as after an unknown outcome
	if w.store.Read().Hash() != hash {
		t.Error("repeating the change changed something")
	}

	w.refused(&command.IPAssign{Source: id(9), Node: id(7)}, fault.Unavailable, "node")
	w.ok(&command.IPAssign{Source: id(9), Pool: id(4)}) // which no relay need know of
	var snapshot bytes.Buffer
	if _, err := w.store.Read().WriteTo(&snapshot); err != nil {
		t.Fatal(err)
	}
	other := New()
	if err := other.Restore(&snapshot); err != nil || other.Read().Recovery() == nil {
		t.Errorf("a snapshot forgets recovery mode: %v", err)
	}

	w.refused(&command.RecoveryEnd{Generation: 1}, fault.Conflict, "")
	w.ok(&command.RecoveryEnd{Generation: 2})
	w.ok(&command.RecoveryEnd{Generation: 2})
	if w.store.Read().Recovery() != nil {
		t.Error("recovery mode did not end")
	}
	w.ok(&command.IPAssign{Source: id(9), Node: id(7)})
}

// TestNewerSnapshotIsRefused: going back past a version that the cluster works
// at would make this server differ from the others.
// TestRecoveryIsAudited: the one entry of a recovery names the cause, the
// servers that went and the tokens that are void.
func TestRecoveryIsAudited(t *testing.T) {
	w := newWorld(t)
	w.ok(&command.ClusterInit{Cluster: &command.Cluster{Id: id(100), Generation: 1, FsmVersion: 3}})
	for n := byte(101); n < 104; n++ {
		w.ok(&command.ServerUpsert{Server: &command.Server{Id: id(n), Name: "lost", RaftAddress: "10.0.0.1:7444", State: "active"}})
	}
	w.ok(tokenCreate(10, nil))
	w.ok(recoverCommand(2))
	e := w.store.Read().Audit(1)[0]
	token := w.store.Read().Tokens()[0].ID.String()
	for _, want := range []string{"cause=restore", "lost/nod_", token, "generation=2"} {
		if !strings.Contains(e.After, want) {
			t.Errorf("the entry says %q, want %q in it", e.After, want)
		}
	}
	if n := strings.Count(e.After, "lost/"); n != 3 {
		t.Errorf("the entry names %d of 3 servers: %q", n, e.After)
	}
}

func TestNewerSnapshotIsRefused(t *testing.T) {
	w := newWorld(t)
	w.ok(&command.ClusterInit{Cluster: &command.Cluster{Id: id(100), Generation: 1, FsmVersion: uint32(command.FSMVersion) + 1}})
	var snapshot bytes.Buffer
	if _, err := w.store.Read().WriteTo(&snapshot); err != nil {
		t.Fatal(err)
	}
	old := New()
	err := old.Restore(&snapshot)
	if !isUnknown(err) || old.Read().Cluster() != nil {
		t.Errorf("got %v", err)
	}
}

func isUnknown(err error) bool { return errors.Is(err, command.ErrUnknown) }

// TestGenerationsAreTimes: from version 3 on a generation may be any number above
// the last, so that two restores of one backup do not make the same one.
func TestGenerationsAreTimes(t *testing.T) {
	w := newWorld(t)
	w.ok(&command.ClusterInit{Cluster: &command.Cluster{Id: id(100), Generation: 5, FsmVersion: generationTimeVersion}})
	w.refused(recoverCommand(5), fault.Conflict, "")
	w.refused(recoverCommand(command.MaxGeneration+1), fault.Invalid, "generation")
	if c := w.ok(recoverCommand(1_800_000_000)).(*control.Cluster); c.Generation != 1_800_000_000 {
		t.Errorf("got %+v", c)
	}
}
