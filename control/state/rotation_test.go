package state

import (
	"bytes"
	"encoding/pem"
	"fmt"
	"slices"
	"strings"
	"testing"
	"time"

	"pgregory.net/rapid"

	"github.com/relais-mta/relais/control"
	"github.com/relais-mta/relais/control/command"
	"github.com/relais-mta/relais/shared/fault"
	"github.com/relais-mta/relais/shared/ids"
)

// certificate returns PEM whose content is a name: rules about the state do not
// look into certificates.
func certificate(name string) []byte {
	return pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: []byte(name)})
}

func bundleNames(bundle []byte) string {
	var names []string
	for block, rest := pem.Decode(bundle); block != nil; block, rest = pem.Decode(rest) {
		names = append(names, string(block.Bytes))
	}
	return strings.Join(names, " ")
}

// rotationWorld has a cluster of two servers and two relays.
func rotationWorld(t fataler) *world {
	w := newWorld(t)
	w.ok(&command.ClusterInit{Cluster: &command.Cluster{Id: id(100), Generation: 1, FsmVersion: 3, CaBundle: append(certificate("aa"), certificate("root")...), CaSealed: []byte("keys aa")}})
	for n := byte(101); n < 103; n++ {
		w.ok(&command.ServerUpsert{Server: &command.Server{Id: id(n), Name: fmt.Sprint("c", n), RaftAddress: fmt.Sprintf("10.0.0.%d:7444", n), State: "active", MaxFsmVersion: 3,
			Certificates: []*command.ServerCertificate{{Serial: fmt.Sprintf("a%d", n), NotAfterMs: start.Add(5 * 24 * time.Hour).UnixMilli()}}}})
	}
	w.node(1)
	w.node(2)
	return w
}

func rotate(old, next string) *command.CARotate {
	return &command.CARotate{Meta: &command.Meta{Actor: "ann", Reason: "yearly"}, OldKeyId: old, Next: &command.IssuingCA{KeyId: next, Certificate: certificate(next), Sealed: []byte("keys " + next), NotAfterMs: start.Add(365 * 24 * time.Hour).UnixMilli()}}
}

func (w *world) ack(rotation, phase string, members ...byte) {
	w.t.Helper()
	c := &command.CAAck{Rotation: rotation, Phase: phase}
	for _, m := range members {
		c.Members = append(c.Members, id(m))
	}
	w.ok(c)
}

// believes checks who is believed and who signs.
func (w *world) believes(bundle, signer string) {
	w.t.Helper()
	c := w.store.Read().Cluster()
	if got := bundleNames(c.CABundle); got != bundle || string(c.CASealed) != "keys "+signer {
		w.t.Errorf("believed are %s and %q signs, want %s and %s", got, c.CASealed, bundle, signer)
	}
}

// TestRotationGoesThroughItsPhases: nothing goes on before everybody has
// acknowledged, and the old key is gone at the end.
func TestRotationGoesThroughItsPhases(t *testing.T) {
	w := rotationWorld(t)
	w.refused(&command.CAAdvance{Rotation: "bb", Phase: "distribute"}, fault.Conflict, "")
	views := w.store.Read().ViewRevision()
	row := w.ok(rotate("aa", "bb")).(*control.Rotation)
	if row.Phase != control.PhaseDistribute || w.store.Read().ViewRevision() == views {
		t.Errorf("got %+v, relays are not told", row)
	}
	w.believes("aa bb root", "aa")
	hash := w.store.Read().Hash()
	w.ok(rotate("aa", "bb")) // again, as after an unknown outcome
	if w.store.Read().Hash() != hash {
		t.Error("repeating the change changed something")
	}
	w.refused(rotate("aa", "cc"), fault.Conflict, "")

	w.refused(&command.CAAdvance{Rotation: "bb", Phase: "distribute"}, fault.Conflict, "")
	w.ack("bb", "distribute", 101, 102, 1, 77) // of a stranger nothing is kept
	w.refused(&command.CAAdvance{Rotation: "bb", Phase: "distribute"}, fault.Conflict, "")
	w.refused(&command.CAAck{Rotation: "bb", Phase: "sign", Members: [][]byte{id(2)}}, fault.Conflict, "")
	w.refused(&command.CAAck{Rotation: "cc", Phase: "distribute", Members: [][]byte{id(2)}}, fault.Conflict, "")
	w.ack("bb", "distribute", 2)
	w.ok(&command.CAAdvance{Rotation: "bb", Phase: "distribute"})
	w.believes("bb aa root", "bb")
	w.refused(&command.CAAdvance{Rotation: "bb", Phase: "distribute"}, fault.Conflict, "") // done already

	w.ack("bb", "sign", 101, 102, 1)
	w.refused(&command.CAAdvance{Rotation: "bb", Phase: "sign"}, fault.Conflict, "")
	w.ok(&command.NodeSetState{Node: id(2), State: "evicted"}) // who is out is not waited for
	w.ok(&command.CAAdvance{Rotation: "bb", Phase: "sign"})
	w.believes("bb root", "bb")
	r := w.store.Read().Rotation()
	if r.Phase != control.PhaseDone || r.Old.Sealed != nil || r.New.Sealed != nil || r.Old.KeyID != "aa" {
		t.Errorf("at the end there is %+v", r)
	}
	w.refused(&command.CARollback{Rotation: "bb"}, fault.Conflict, "")
	w.refused(&command.CASkip{Rotation: "bb", Member: id(1)}, fault.Conflict, "")
	w.ok(rotate("bb", "cc"))
	w.believes("bb cc root", "bb")
	if e := w.store.Read().Audit(1)[0]; e.Actor != "ann" || e.Reason != "yearly" || !strings.Contains(e.After, "phase=distribute") || strings.Contains(e.After+e.Before, "keys") {
		t.Errorf("audited as %+v", e)
	}
}

// TestRotationGoesBack: from every phase before the drop.
func TestRotationGoesBack(t *testing.T) {
	w := rotationWorld(t)
	w.ok(rotate("aa", "bb"))
	w.ok(&command.CARollback{Rotation: "bb"})
	w.ok(&command.CARollback{Rotation: "bb"})
	w.believes("aa root", "aa")
	if r := w.store.Read().Rotation(); r.Phase != control.PhaseRolledBack || r.New.Sealed != nil {
		t.Errorf("got %+v", r)
	}
	w.ok(rotate("aa", "cc"))
	w.ack("cc", "distribute", 101, 102, 1, 2)
	w.ok(&command.CAAdvance{Rotation: "cc", Phase: "distribute"})
	w.ack("cc", "sign", 101, 102, 1)
	w.ok(&command.CARollback{Rotation: "cc"})
	w.believes("aa cc root", "aa") // what the new key signed is good until it is renewed
	w.refused(&command.CAAdvance{Rotation: "cc", Phase: "return"}, fault.Conflict, "")
	w.ack("cc", "return", 101, 102, 1)
	w.ok(&command.CASkip{Meta: &command.Meta{Actor: "ann", Reason: "burnt"}, Rotation: "cc", Member: id(2)})
	w.ok(&command.CAAdvance{Rotation: "cc", Phase: "return"})
	w.believes("aa root", "aa")
	var refused []string
	for _, ca := range w.store.Read().RefusedCAs() {
		refused = append(refused, ca.KeyID)
	}
	if !slices.Equal(refused, []string{"bb", "cc"}) {
		t.Errorf("refused are %v: nodes would believe them, as they are newer", refused)
	}
	if s := w.store.Read().Rotation().Skip(ids.Node(id(2))); s == nil || s.Actor != "ann" || s.Reason != "burnt" {
		t.Errorf("skipped by %+v", s)
	}
	// They are forgotten when they have ended by themselves.
	w.ok(&command.CAPrune{})
	if len(w.store.Read().RefusedCAs()) != 2 {
		t.Error("forgotten too early")
	}
	w.now = w.now.Add(366 * 24 * time.Hour)
	w.ok(&command.CAPrune{})
	if len(w.store.Read().RefusedCAs()) != 0 {
		t.Error("not forgotten after their end")
	}
}

// TestForcedRotation goes on without those that have not acknowledged, and says
// who decided so.
func TestForcedRotation(t *testing.T) {
	w := rotationWorld(t)
	w.ok(rotate("aa", "bb"))
	w.ack("bb", "distribute", 101, 1)
	w.ok(&command.CAAdvance{Meta: &command.Meta{Actor: "ann", Reason: "gone"}, Rotation: "bb", Phase: "distribute", Force: true})
	r := w.store.Read().Rotation()
	if r.Phase != control.PhaseSign || len(r.Skips) != 2 || r.Skips[0].Reason != "gone" {
		t.Errorf("got %+v", r)
	}
	w.ack("bb", "sign", 101, 1)
	w.ok(&command.CAAdvance{Rotation: "bb", Phase: "sign"}) // who was skipped stays skipped
	// Relays that were away for longer than a certificate is renewed do not gate.
	w.ok(rotate("bb", "cc"))
	w.ack("cc", "distribute", 101, 102, 1)
	n := w.store.Read().Node(ids.Node(id(2)))
	w.ok(&command.NodeUpsert{Expect: n.Revision, Node: &command.Node{Id: id(2), Name: "edge-1", State: "active", Token: id(2), CertNotAfterMs: w.now.Add(-31 * 24 * time.Hour).UnixMilli()}})
	w.ok(&command.CAAdvance{Rotation: "cc", Phase: "distribute"})
	// After a restore the new key signs at once, whatever was under way.
	c := rotate("cc", "dd")
	c.AtOnce = true
	w.ok(c)
	w.believes("dd cc root", "dd")
	w.refused(&command.CARollback{Rotation: "dd"}, fault.Conflict, "")
}

// TestRemovedServersAreRevoked: relays hear of the certificates of a server
// that was removed, until these are over.
func TestRemovedServersAreRevoked(t *testing.T) {
	w := rotationWorld(t)
	s := w.store.Read().Server(ids.Node(id(102)))
	record := command.ServerRecord(s)
	record.State = "evicted"
	views := w.store.Read().ViewRevision()
	w.ok(&command.ServerUpsert{Meta: &command.Meta{Actor: "ann", Reason: "stolen"}, Expect: s.Revision, Server: record})
	r := w.store.Read()
	got := r.RevokedServers()
	if len(got) != 1 || got[0].Server != s.ID || !slices.Equal(got[0].Serials, []string{"a102"}) || r.ViewRevision() == views {
		t.Fatalf("revoked are %+v", got)
	}
	if want := w.now.Add(37 * 24 * time.Hour); !got[0].Until.Equal(want) {
		t.Errorf("until %s, want %s", got[0].Until, want)
	}
	if e := r.Audit(1)[0]; e.Action != "server.upsert" || e.Reason != "stolen" {
		t.Errorf("audited as %+v", e)
	}
	w.now = w.now.Add(38 * 24 * time.Hour)
	w.ok(&command.CAPrune{})
	if len(w.store.Read().RevokedServers()) != 0 {
		t.Error("kept though nothing of it can be used any more")
	}
	// A recovery gives up servers too.
	w.ok(recoverCommand(2))
	if got := w.store.Read().RevokedServers(); len(got) != 2 || w.store.Read().Server(s.ID) != nil {
		t.Errorf("after a recovery are revoked %+v", got)
	}
}

// TestNoRevocationBeforeItsVersion: servers of the release before apply the same
// entry and keep no such list.
func TestNoRevocationBeforeItsVersion(t *testing.T) {
	w := newWorld(t)
	w.ok(&command.ClusterInit{Cluster: &command.Cluster{Id: id(100), Generation: 1, FsmVersion: 2}})
	row := w.ok(&command.ServerUpsert{Server: &command.Server{Id: id(101), Name: "c1", RaftAddress: "10.0.0.1:7444", State: "active"}}).(*control.Server)
	w.ok(&command.ServerUpsert{Expect: row.Revision, Server: &command.Server{Id: id(101), Name: "c1", RaftAddress: "10.0.0.1:7444", State: "evicted"}})
	if len(w.store.Read().RevokedServers()) != 0 {
		t.Error("a list that other servers do not have")
	}
}

// TestRotationProperties draws any sequence of commands: the one who signs is
// believed by all, nobody is left out before everybody has acknowledged or was
// skipped, and a way back leads to where it began.
func TestRotationProperties(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		w := rotationWorld(t)
		signer, serial := "aa", 0
		for range rapid.IntRange(1, 40).Draw(t, "steps") {
			before := w.store.Read()
			was := before.Rotation()
			current, phase := "none", "distribute"
			if was != nil {
				current, phase = was.New.KeyID, string(was.Phase)
			}
			if rapid.IntRange(0, 9).Draw(t, "wrong") == 0 {
				phase = rapid.SampledFrom([]string{"distribute", "sign", "return"}).Draw(t, "phase")
			}
			member := id(rapid.SampledFrom([]byte{101, 102, 1, 2, 3}).Draw(t, "member"))
			var c command.Command
			switch rapid.SampledFrom([]string{"rotate", "ack", "ack", "ack", "ack", "ack", "advance", "advance", "force", "skip", "back", "evict", "prune"}).Draw(t, "command") {
			case "rotate":
				serial++
				c = rotate(signer, fmt.Sprintf("b%d", serial))
			case "ack":
				c = &command.CAAck{Rotation: current, Phase: phase, Members: [][]byte{member}}
			case "advance":
				c = &command.CAAdvance{Rotation: current, Phase: phase}
			case "force":
				c = &command.CAAdvance{Rotation: current, Phase: phase, Force: true}
			case "skip":
				c = &command.CASkip{Rotation: current, Member: member}
			case "back":
				c = &command.CARollback{Rotation: current}
			case "evict":
				c = &command.NodeSetState{Node: id(2), State: "evicted"}
			case "prune":
				c = &command.CAPrune{}
			}
			result := w.apply(c)
			after := w.store.Read()
			if result.Err != nil && (after.Hash() != before.Hash() || after.ViewRevision() != before.ViewRevision()) {
				t.Fatalf("a refused %s changed the state", command.TypeOf(c))
			}
			now := after.Rotation()
			cluster := after.Cluster()
			names := strings.Fields(bundleNames(cluster.CABundle))
			if string(cluster.CASealed) != "keys "+names[0] || names[len(names)-1] != "root" || len(names) > 3 {
				t.Fatalf("%s signs, believed are %v", cluster.CASealed, names)
			}
			for _, ca := range after.RefusedCAs() {
				if slices.Contains(names, ca.KeyID) {
					t.Fatalf("%s is refused and believed", ca.KeyID)
				}
			}
			if now == nil {
				continue
			}
			if string(now.Bundle()) != string(cluster.CABundle) || now.Signer().KeyID != names[0] {
				t.Fatalf("the rotation says %s, the cluster %v", bundleNames(now.Bundle()), names)
			}
			force, _ := c.(*command.CAAdvance)
			if was != nil && was.New.KeyID == now.New.KeyID && was.Phase != now.Phase && !force.GetForce() {
				if _, back := c.(*command.CARollback); !back && len(was.Waits(before.RotationMembers(), w.now)) > 0 {
					t.Fatalf("%s ended though it waited", was.Phase)
				}
			}
			switch {
			case now.Phase == control.PhaseDone:
				signer = now.New.KeyID
			case now.Phase == control.PhaseRolledBack && names[0] != signer:
				t.Fatalf("rolled back to %s, it began with %s", names[0], signer)
			}
			if !now.Phase.Running() && len(names) != 2 {
				t.Fatalf("at an end are believed %v", names)
			}
		}
		var snap bytes.Buffer
		if _, err := w.store.Read().WriteTo(&snap); err != nil {
			t.Fatal(err)
		}
		other := New()
		if err := other.Restore(&snap); err != nil || other.Read().Hash() != w.store.Read().Hash() {
			t.Fatalf("a snapshot leads elsewhere: %v", err)
		}
	})
}

// goldenLog3 has what version 3 brought.
func goldenLog3(t *testing.T) *world {
	w := rotationWorld(t)
	w.ok(rotate("aa", "bb"))
	w.ack("bb", "distribute", 101, 102, 1)
	w.ok(&command.CASkip{Rotation: "bb", Member: id(2)})
	w.ok(&command.CAAdvance{Rotation: "bb", Phase: "distribute"})
	w.ok(&command.CARollback{Rotation: "bb"})
	w.ack("bb", "return", 1)
	w.ok(&command.CAAdvance{Rotation: "bb", Phase: "return", Force: true})
	w.ok(rotate("aa", "cc"))
	w.ack("cc", "distribute", 101, 102)
	s := w.store.Read().Server(ids.Node(id(102)))
	record := command.ServerRecord(s)
	record.State = "evicted"
	w.ok(&command.ServerUpsert{Expect: s.Revision, Server: record})
	w.ok(&command.CAPrune{})
	return w
}

// TestGoldenLog3 replays a log of version 3 that was written once and for all.
func TestGoldenLog3(t *testing.T) { checkGolden(t, "golden3", goldenLog3) }
