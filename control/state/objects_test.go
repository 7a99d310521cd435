package state

import (
	"bytes"
	"fmt"
	"testing"
	"time"

	"github.com/relais-mta/relais/control"
	"github.com/relais-mta/relais/control/command"
	"github.com/relais-mta/relais/shared/fault"
	"github.com/relais-mta/relais/shared/ids"
)

func putVersion(w *world, text string, keep uint32) uint64 {
	row := w.ok(&command.PolicyPut{Expect: w.store.Read().Policy().Revision, KeepVersions: keep, Meta: &command.Meta{Actor: "ann", Reason: text},
		Sections: []*command.PolicySection{{Name: "queue", Text: text}}})
	return row.(*control.Policy).Revision
}

func TestPolicyVersions(t *testing.T) {
	w := newWorld(t)
	old := putVersion(w, "# old release\n", 0)
	if got := w.store.Read().PolicyVersions(); len(got) != 0 {
		t.Fatalf("a put that keeps nothing kept %d", len(got))
	}
	hash := func() [32]byte { return w.store.Read().Hash() }
	revisions := []uint64{old}
	for i := range 6 {
		revisions = append(revisions, putVersion(w, fmt.Sprintf("# %d\n", i), 4))
	}
	r := w.store.Read()
	kept := r.PolicyVersions()
	if len(kept) != 4 || kept[0].Policy != revisions[6] || kept[3].Policy != revisions[3] || kept[0].Sections[0].Text != "# 5\n" || kept[0].Actor != "ann" {
		t.Fatalf("got %+v", kept)
	}
	if r.PolicyVersion(old) != nil || r.PolicyVersion(revisions[4]) == nil || r.PolicyVersion(0) == nil {
		t.Error("the wrong versions are found")
	}
	before := hash()
	if again := putVersion(w, "# 5\n", 4); again != revisions[6] || hash() != before || len(w.store.Read().PolicyVersions()) != 4 {
		t.Error("a change that changes nothing made a version")
	}
	// What was put by a release that kept nothing is kept with the next change.
	w = newWorld(t)
	old = putVersion(w, "# old release\n", 0)
	putVersion(w, "# new\n", 4)
	if v := w.store.Read().PolicyVersion(old); v == nil || v.Sections[0].Text != "# old release\n" {
		t.Errorf("got %+v", v)
	}
	var snap bytes.Buffer
	if _, err := w.store.Read().WriteTo(&snap); err != nil {
		t.Fatal(err)
	}
	s := New()
	if err := s.Restore(&snap); err != nil || len(s.Read().PolicyVersions()) != 2 {
		t.Errorf("the snapshot lost versions: %v", err)
	}
}

func TestNodeDrain(t *testing.T) {
	w := newWorld(t)
	w.node(7)
	node := ids.Node(id(7))
	view := w.store.Read().ViewRevision()
	w.ok(&command.NodeDrain{Node: id(7), Draining: true})
	r := w.store.Read()
	if r.Node(node).State != control.NodeDraining || !r.Draining(node) || r.ViewRevision() == view {
		t.Errorf("got %+v, view %d after %d", r.Node(node), r.ViewRevision(), view)
	}
	view = r.ViewRevision()
	w.ok(&command.NodeDrain{Node: id(7), Draining: true}) // again
	if r = w.store.Read(); r.ViewRevision() != view {
		t.Error("draining again moved the views")
	}
	w.refused(&command.NodeDrain{Node: id(7), Expect: 1}, fault.Conflict, "")
	w.ok(&command.NodeDrain{Node: id(7)})
	if r = w.store.Read(); r.Draining(node) || r.ViewRevision() == view {
		t.Error("the node still drains")
	}
	w.ok(&command.NodeSetState{Node: id(7), State: "evicted"})
	w.refused(&command.NodeDrain{Node: id(7), Draining: true}, fault.Conflict, "")
	w.refused(&command.NodeDrain{Node: id(9), Draining: true}, fault.NotFound, "")
}

func TestCredentialRotate(t *testing.T) {
	w := newWorld(t)
	w.tenant(1, "acme")
	w.project(3, id(1), "default")
	w.ok(&command.CredentialPut{Credential: &command.Credential{Id: id(6), Tenant: id(1), Project: id(3), SecretHash: sum(6)}})
	until := w.now.Add(time.Hour)
	rotate := &command.CredentialRotate{Credential: id(6), SecretHash: sum(7), PreviousUntilMs: until.UnixMilli()}
	w.ok(rotate)
	w.ok(rotate) // repeated
	got := w.store.Read().Credential(ids.Credential(id(6)))
	if got.SecretHash != [32]byte(sum(7)) || got.PreviousHash != [32]byte(sum(6)) || !got.PreviousUntil.Equal(until) {
		t.Errorf("got %+v", got)
	}
	w.ok(&command.CredentialRotate{Credential: id(6), SecretHash: sum(8), PreviousUntilMs: w.now.UnixMilli()})
	if got = w.store.Read().Credential(ids.Credential(id(6))); got.PreviousHash != [32]byte{} || !got.PreviousUntil.IsZero() {
		t.Errorf("an overlap that is over keeps the old secret: %+v", got)
	}
	w.ok(&command.CredentialRevoke{Credential: id(6)})
	w.refused(&command.CredentialRotate{Credential: id(6), SecretHash: sum(9)}, fault.Conflict, "")
	w.refused(&command.CredentialRotate{Credential: id(5), SecretHash: sum(9)}, fault.NotFound, "")
}

func TestVerdicts(t *testing.T) {
	w := newWorld(t)
	w.tenant(1, "acme")
	w.source(8, 1)
	w.ok(domainPut("example.com", id(1)))
	source := func() *control.Source { return w.store.Read().Source(ids.Source(id(8))) }
	if source().Usable() {
		t.Error("an address that nobody checked is used")
	}
	w.ok(&command.IPVerify{Source: id(8), Reverse: "failed", Detail: "no PTR record"})
	w.ok(&command.IPVerify{Meta: &command.Meta{Reason: "lab"}, Source: id(8), Override: command.OverrideOn})
	if s := source(); !s.Usable() || s.Reverse != control.ReverseFailed || s.ReverseDetail != "no PTR record" || s.ReverseAt.IsZero() {
		t.Errorf("got %+v", s)
	}
	w.ok(&command.IPVerify{Source: id(8), Override: command.OverrideOff})
	if source().Usable() {
		t.Error("an override that ended holds")
	}
	w.ok(&command.IPVerify{Source: id(8), Reverse: "confirmed"})
	revision := source().Revision
	w.ok(&command.IPVerify{Source: id(8), Reverse: "confirmed"})
	if s := source(); !s.Usable() || s.Revision != revision {
		t.Errorf("got %+v", s)
	}
	w.refused(&command.IPVerify{Source: id(9), Reverse: "confirmed"}, fault.NotFound, "")
	w.ok(&command.DomainVerify{Domain: "example.com"})
	seen := w.store.Read().Domain("example.com").VerifiedAt
	w.ok(&command.DomainVerify{Domain: "example.com"})
	if d := w.store.Read().Domain("example.com"); seen.IsZero() || !d.VerifiedAt.Equal(seen) {
		t.Errorf("got %+v", d)
	}
	w.refused(&command.DomainVerify{Domain: "example.org"}, fault.NotFound, "")
}

// TestUpgradeStopsNoMail: addresses that were in use before verdicts could be
// recorded stay in use when the cluster's version rises.
func TestUpgradeStopsNoMail(t *testing.T) {
	w := newWorld(t)
	w.ok(&command.ClusterInit{Cluster: &command.Cluster{Id: id(100), Generation: 1, FsmVersion: 1, CaBundle: []byte("pem"), CredentialKeySealed: make([]byte, 32)}})
	w.source(8, 1)
	plain := func(sealed, _ []byte) ([]byte, error) { return sealed, nil }
	used := func() int {
		v, err := w.store.Read().View(ids.Node{}, plain)
		if err != nil {
			t.Fatal(err)
		}
		return len(v.Sources)
	}
	if used() != 1 {
		t.Error("before the upgrade the address is not used")
	}
	w.ok(&command.FSMVersionSet{Version: reverseVersion})
	if s := w.store.Read().Source(ids.Source(id(8))); used() != 1 || s.Reverse != control.ReverseConfirmed {
		t.Errorf("after the upgrade: %+v", s)
	}
	w.source(9, 2)
	if used() != 1 {
		t.Error("an address that came after the upgrade is used unchecked")
	}
}
