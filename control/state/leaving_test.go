package state

import (
	"strings"
	"testing"

	"github.com/relais-mta/relais/control"
	"github.com/relais-mta/relais/control/command"
	"github.com/relais-mta/relais/shared/fault"
	"github.com/relais-mta/relais/shared/policy"
)

func goldenLeaving(t *testing.T) *world {
	w := quarantineWorld(t, PeersVersion)
	w.ok(&command.IPRetire{Meta: &command.Meta{Reason: "moves"}, Source: id(8)})
	w.ok(&command.IPLeft{Source: id(8), Node: id(7), Epoch: w.at(8).Epoch})
	w.ok(&command.IPAssign{Source: id(8), Node: id(6)})
	w.ok(&command.IPQuarantine{Meta: &command.Meta{Reason: "listed"}, Source: id(9)})
	w.ok(&command.IPLeft{Source: id(9), Node: id(7), Epoch: w.at(9).Epoch})
	w.ok(&command.IPRelease{Meta: &command.Meta{Reason: "delisted"}, Source: id(9)})
	w.ok(&command.IPAssign{Source: id(9), Node: id(6)})
	w.ok(&command.IPRetire{Source: id(9)})
	return w
}

func TestGoldenLeaving(t *testing.T) { checkGolden(t, "leaving4", goldenLeaving) }

func (w *world) leavingOf(t *testing.T) []policy.LeavingSource {
	t.Helper()
	v, err := w.store.Read().View([16]byte(id(6)), func(sealed, _ []byte) ([]byte, error) { return sealed, nil })
	if err != nil {
		t.Fatal(err)
	}
	return v.Leaving
}

// conflict holds the words of a refusal against what they must name.
func (w *world) conflict(c command.Command, want ...string) {
	w.t.Helper()
	before := w.store.Read().Hash()
	err := w.apply(c).Err
	if !fault.Is(err, fault.Conflict) || w.store.Read().Hash() != before {
		w.t.Errorf("got %v, want a conflict that changes nothing", err)
		return
	}
	for _, s := range want {
		if !strings.Contains(fault.Public(err), s) {
			w.t.Errorf("%q does not name %q", fault.Public(err), s)
		}
	}
}

// TestAddressChangesHands follows an address from one relay to another: it waits
// for the word of the first, under the epoch that ends.
func TestAddressChangesHands(t *testing.T) {
	w := quarantineWorld(t, PeersVersion)
	to := &command.IPAssign{Source: id(8), Node: id(6)}
	w.conflict(to, "10.0.0.8 is assigned to node", "edge-1", "ip release", "--old-owner-is-off")
	epoch := w.at(8).Epoch
	left := &command.IPLeft{Source: id(8), Node: id(7), Epoch: epoch}
	w.ok(left) // it was not asked
	if w.at(8).State != control.SourceAssigned || len(w.leavingOf(t)) != 0 {
		t.Fatalf("got %+v", w.at(8))
	}
	before := w.store.Read().ViewRevision()
	w.ok(&command.IPRetire{Source: id(8)})
	w.ok(&command.IPRetire{Source: id(8)}) // repeated
	if w.viewed(t) != 1 || w.store.Read().ViewRevision() == before {
		t.Error("relays still see the address")
	}
	if got := w.leavingOf(t); len(got) != 1 || got[0] != (policy.LeavingSource{ID: [16]byte(id(8)), Owner: [16]byte(id(7)), Epoch: epoch}) {
		t.Errorf("leaving are %+v", got)
	}
	w.conflict(to, "is being released by node", "edge-1", "wait until")
	w.ok(&command.IPLeft{Source: id(8), Node: id(7), Epoch: epoch - 1})
	w.ok(&command.IPLeft{Source: id(8), Node: id(6), Epoch: epoch})
	if s := w.at(8); s.State != control.SourceReleasing {
		t.Fatalf("a word of somebody else, or of before, made %+v", s)
	}
	w.ok(left)
	if s := w.at(8); s.State != control.SourceFree || !s.Owner.IsZero() || s.Epoch != epoch || s.Pool.IsZero() || len(w.leavingOf(t)) != 0 {
		t.Errorf("left: %+v", s)
	}
	w.ok(to)
	w.ok(left) // it came late
	if s := w.at(8); s.State != control.SourceAssigned || s.Owner != [16]byte(id(6)) || s.Epoch <= epoch {
		t.Errorf("assigned anew: %+v", s)
	}
	w.refused(&command.IPRetire{Source: id(5)}, fault.NotFound, "")
	w.refused(&command.IPLeft{Source: id(5), Node: id(7)}, fault.NotFound, "")
	w.refused(&command.IPQuarantine{Source: id(5)}, fault.NotFound, "")
}

// TestARelayGetsBackWhatItReleases: under a new epoch, so that its word about the
// former one does not count.
func TestARelayGetsBackWhatItReleases(t *testing.T) {
	w := quarantineWorld(t, PeersVersion)
	epoch := w.at(8).Epoch
	w.ok(&command.IPRetire{Source: id(8)})
	w.ok(&command.IPAssign{Source: id(8), Node: id(7)})
	w.ok(&command.IPRetire{Source: id(8)})
	w.ok(&command.IPLeft{Source: id(8), Node: id(7), Epoch: epoch})
	if s := w.at(8); s.State != control.SourceReleasing || s.Epoch <= epoch {
		t.Errorf("got %+v", s)
	}
}

// TestQuarantineByAnOperator: it ends without a word about the machine once the
// relay has said that it stopped, and an evicted one is not asked.
func TestQuarantineByAnOperator(t *testing.T) {
	w := quarantineWorld(t, PeersVersion)
	aside := &command.IPQuarantine{Meta: &command.Meta{Reason: "listed"}, Source: id(8)}
	w.ok(aside)
	w.ok(aside) // repeated
	end := &command.IPRelease{Meta: &command.Meta{Reason: "delisted"}, Source: id(8)}
	w.conflict(end, "--old-owner-is-off")
	w.conflict(&command.IPRetire{Source: id(8)}, "ip unquarantine")
	w.conflict(&command.IPAssign{Source: id(8), Node: id(7)}, "in quarantine", "edge-1", "may still use it")
	if s := w.at(8); s.Quarantine != "listed" || len(w.leavingOf(t)) != 1 {
		t.Errorf("got %+v", s)
	}
	w.ok(&command.IPLeft{Source: id(8), Node: id(7), Epoch: w.at(8).Epoch})
	if s := w.at(8); s.State != control.SourceQuarantined || !s.Owner.IsZero() || s.Quarantine != "listed" {
		t.Errorf("left: %+v", s)
	}
	w.conflict(&command.IPAssign{Source: id(8), Node: id(6)}, "ip unquarantine")
	w.ok(end)
	w.ok(&command.IPAssign{Source: id(8), Node: id(6)})

	w.ok(&command.IPRetire{Source: id(9)})
	w.ok(evict)
	if s := w.at(9); s.State != control.SourceQuarantined || s.Owner.IsZero() || len(w.leavingOf(t)) != 0 {
		t.Errorf("evicted while it released: %+v", s)
	}
}

// TestNothingIsFreeInRecoveryMode: what relays said before a restore is of no use.
func TestNothingIsFreeInRecoveryMode(t *testing.T) {
	w := quarantineWorld(t, PeersVersion)
	w.ok(&command.IPRetire{Source: id(8)})
	w.ok(&command.ClusterRecover{Generation: 2, Cause: "restore", Server: &command.Server{Id: id(101), Name: "c1", RaftAddress: "10.0.0.1:7444", State: "active", MaxFsmVersion: 4}})
	w.refused(&command.IPLeft{Source: id(8), Node: id(7), Epoch: w.at(8).Epoch}, fault.Unavailable, "node")
}
