package state

import (
	"slices"
	"strings"
	"testing"

	"github.com/relais-mta/relais/control"
	"github.com/relais-mta/relais/control/command"
	"github.com/relais-mta/relais/shared/fault"
	"github.com/relais-mta/relais/shared/ids"
)

// floatingWorld has relays 6 and 7, and the floating address 8 at relay 7.
func floatingWorld(t *testing.T, version uint32) *world {
	w := newWorld(t)
	w.ok(&command.ClusterInit{Cluster: &command.Cluster{Id: id(100), Generation: 1, FsmVersion: version, CaBundle: []byte("pem"), CredentialKeySealed: make([]byte, 32)}})
	w.pool(4, "default", nil)
	w.node(6)
	w.node(7)
	w.ok(&command.IPPut{Source: &command.Source{Id: id(8), Bind: []byte{10, 0, 0, 8}, Public: []byte{10, 0, 0, 8}, Ehlo: "a.example.net", State: "free"}})
	w.ok(&command.IPAssign{Source: id(8), Node: id(7), Pool: id(4)})
	w.ok(&command.IPVerify{Source: id(8), Reverse: "confirmed"})
	return w
}

func (w *world) leased() (out []byte) {
	for _, s := range w.store.Read().LeasedSources() {
		out = append(out, s.ID[15])
	}
	return out
}

func reclaim(epoch uint64) *command.IPReclaim {
	return &command.IPReclaim{Meta: &command.Meta{Actor: "system", Reason: "silent"}, Source: id(8), Epoch: epoch}
}

// TestReclaim: an address is taken from a silent relay under the epoch that was
// decided about, and given to another one then without anybody's word.
func TestReclaim(t *testing.T) {
	w := floatingWorld(t, control.FloatingVersion)
	first := w.at(8)
	if !first.Leased || first.Epoch == 0 || !slices.Equal(w.leased(), id(8)[15:]) {
		t.Fatalf("assigned: %+v", first)
	}
	if e := w.apply(&command.IPAssign{Source: id(8), Node: id(6)}).Err; !fault.Is(e, fault.Conflict) || !strings.Contains(fault.Public(e), "free by itself when that relay is silent") {
		t.Errorf("given away while its lease is not over: %v", e)
	}
	w.ok(reclaim(first.Epoch - 1))
	if s := w.at(8); s.Owner != ids.Node(id(7)) {
		t.Errorf("under a former epoch: %+v", s)
	}
	views := w.store.Read().ViewRevision()
	w.ok(&command.IPHeard{Processes: []*command.LeaseProcess{{Node: id(7), Incarnation: 3}, {Node: id(5), Incarnation: 3}}})
	if n := w.store.Read().Node(ids.Node(id(7))); n.LeaseProcess != 3 || w.store.Read().ViewRevision() != views {
		t.Errorf("leased to process %d; relays hear of that: %v", n.LeaseProcess, w.store.Read().ViewRevision() != views)
	}
	before := w.store.Read().ViewRevision()
	w.ok(reclaim(first.Epoch))
	if s := w.at(8); s.State != control.SourceFree || !s.Owner.IsZero() || s.Pool.IsZero() || s.Epoch != first.Epoch || len(w.leased()) != 0 || w.store.Read().ViewRevision() == before {
		t.Errorf("reclaimed: %+v", s)
	}
	if a := w.store.Read().Audit(1)[0]; a.Action != "ip.reclaim" || a.Reason != "silent" || !strings.Contains(a.Before, "state=assigned") || !strings.Contains(a.After, "state=free") {
		t.Errorf("the audit tail has %+v", a)
	}
	w.ok(reclaim(first.Epoch)) // repeated
	w.ok(&command.IPAssign{Source: id(8), Node: id(6)})
	if s := w.at(8); s.Owner != ids.Node(id(6)) || s.Epoch <= first.Epoch || !s.Leased {
		t.Errorf("assigned anew: %+v", s)
	}
	w.ok(reclaim(first.Epoch)) // it comes late
	if s := w.at(8); s.Owner != ids.Node(id(6)) {
		t.Errorf("a late word took it from its new owner: %+v", s)
	}
	w.refused(&command.IPReclaim{Source: id(5)}, fault.NotFound, "")

	w.ok(&command.NodeSetState{Meta: &command.Meta{Reason: "stolen"}, Node: id(6), State: "evicted"})
	w.ok(reclaim(w.at(8).Epoch))
	if s := w.at(8); s.State != control.SourceQuarantined || !s.Owner.IsZero() {
		t.Errorf("of a relay that was put out: %+v", s)
	}
	w.ok(&command.IPRelease{Meta: &command.Meta{Reason: "checked"}, Source: id(8)}) // nobody may still use it
}

// TestLeasesComeWithVersion6: what was assigned before is used without a lease, as
// its relay was told, until it is assigned again.
func TestLeasesComeWithVersion6(t *testing.T) {
	w := floatingWorld(t, control.FloatingVersion-1)
	w.ok(&command.FSMVersionSet{Version: control.FloatingVersion})
	if s := w.at(8); s.Leased || len(w.leased()) != 0 {
		t.Errorf("assigned before: %+v", s)
	}
	w.refused(reclaim(w.at(8).Epoch), fault.Conflict, "ip")
	w.ok(&command.IPRetire{Source: id(8)})
	w.ok(&command.IPLeft{Source: id(8), Node: id(7), Epoch: w.at(8).Epoch})
	w.ok(&command.IPAssign{Source: id(8), Node: id(7)})
	if s := w.at(8); !s.Leased {
		t.Errorf("assigned again: %+v", s)
	}
	v, err := w.store.Read().View(ids.Node(id(7)), func(sealed, _ []byte) ([]byte, error) { return sealed, nil })
	if err != nil || len(v.Sources) != 1 || !v.Sources[0].Leased {
		t.Errorf("the view has %+v, %v", v.Sources, err)
	}
}

// TestPinnedIsNeverLeased: whichever way it is given to its relay.
func TestPinnedIsNeverLeased(t *testing.T) {
	w := floatingWorld(t, control.FloatingVersion)
	put := func(n byte, pinned bool) *control.Source {
		w.ok(&command.IPPut{Source: &command.Source{Id: id(n), Bind: []byte{10, 0, 0, n}, Public: []byte{10, 0, 0, n}, Ehlo: "a.example.net", Pinned: pinned, State: "free"}, Node: id(7)})
		return w.at(n)
	}
	if s := put(9, true); s.Leased || s.Owner != ids.Node(id(7)) {
		t.Errorf("added: %+v", s)
	}
	w.ok(&command.IPAssign{Source: id(9), Node: id(6), OldOwnerIsOff: true})
	if s := w.at(9); s.Leased {
		t.Errorf("assigned: %+v", s)
	}
	w.refused(&command.IPReclaim{Source: id(9), Epoch: w.at(9).Epoch}, fault.Conflict, "ip")
	if s := put(10, false); !s.Leased {
		t.Errorf("a floating one: %+v", s)
	}
}

// TestNoReclaimInRecoveryMode: the state may be older than what relays hold.
func TestNoReclaimInRecoveryMode(t *testing.T) {
	w := floatingWorld(t, control.FloatingVersion)
	w.ok(&command.ClusterRecover{Generation: 2, Cause: "restore", Server: &command.Server{Id: id(101), Name: "c1", RaftAddress: "10.0.0.1:7444", State: "active", MaxFsmVersion: control.FloatingVersion}})
	w.refused(reclaim(w.at(8).Epoch), fault.Unavailable, "node")
}

// TestGoldenReclaim replays a log that this release wrote.
func TestGoldenReclaim(t *testing.T) {
	checkGolden(t, "reclaim6", func(t *testing.T) *world {
		w := floatingWorld(t, 6)
		w.ok(&command.IPHeard{Meta: &command.Meta{Actor: "system"}, Processes: []*command.LeaseProcess{{Node: id(7), Incarnation: 2}}})
		w.ok(reclaim(w.at(8).Epoch))
		w.ok(&command.IPAssign{Source: id(8), Node: id(6)})
		w.ok(&command.IPRetire{Source: id(8)})
		w.ok(reclaim(w.at(8).Epoch))
		return w
	})
}
