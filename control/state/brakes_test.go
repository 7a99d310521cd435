package state

import (
	"bytes"
	"testing"
	"time"

	"github.com/relais-mta/relais/control"
	"github.com/relais-mta/relais/control/command"
	"github.com/relais-mta/relais/shared/fault"
	"github.com/relais-mta/relais/shared/ids"
	"github.com/relais-mta/relais/shared/policy"
)

func brakesWorld(t *testing.T) *world {
	w := newWorld(t)
	w.ok(&command.ClusterInit{Cluster: &command.Cluster{Id: id(100), Generation: 1, FsmVersion: control.BrakesVersion, CaBundle: []byte("pem"), CredentialKeySealed: make([]byte, 32)}})
	w.tenant(3, "acme")
	w.pool(4, "default", nil)
	w.source(8, 8)
	return w
}

func (w *world) brake(n byte, change func(*command.Brake)) *command.BrakeSet {
	b := &command.Brake{Id: id(n), Provider: "google", Cause: "complaints", Owner: "anna", CreatedMs: w.now.UnixMilli()}
	change(b)
	return &command.BrakeSet{Meta: &command.Meta{Actor: "anna"}, Brake: b}
}

// reflex is the brake of relay 7 about its own reflex, by evidence of a time.
func (w *world) reflex(n byte, evidence time.Time) *command.BrakeSet {
	return w.brake(n, func(b *command.Brake) {
		b.Source, b.Owner, b.Automatic, b.Node, b.EvidenceMs = id(8), control.BrakeReflex, true, id(7), evidence.UnixMilli()
		b.UntilMs = w.now.Add(time.Hour).UnixMilli()
	})
}

func (w *world) brakes() []policy.Brake {
	var v policy.View
	w.store.Read().viewBrakes(&v)
	return v.Brakes
}

// goldenBrakes is the history of golden file brakes4.
func goldenBrakes(t *testing.T) *world {
	w := brakesWorld(t)
	w.ok(w.brake(20, func(b *command.Brake) { b.Percent, b.Tenant, b.Domain = 25, id(3), "gmail.example" }))
	w.ok(w.brake(21, func(b *command.Brake) { b.UntilMs = w.now.Add(time.Minute).UnixMilli() }))
	w.ok(w.brake(22, func(b *command.Brake) { b.Pool, b.UntilMs = id(4), w.now.Add(time.Minute).UnixMilli() }))
	w.ok(&command.BrakePin{Brake: id(22), Pinned: true})
	w.ok(w.reflex(23, w.now))
	w.ok(&command.BrakeCancel{Meta: &command.Meta{Actor: "bert", Reason: "seen"}, Brake: id(23)})
	w.now = w.now.Add(2 * time.Minute)
	w.ok(&command.BrakeSweep{})
	return w
}

func TestGoldenBrakes(t *testing.T) { checkGolden(t, "brakes4", goldenBrakes) }

func TestBrakesEndByTimeUnlessPinned(t *testing.T) {
	w := goldenBrakes(t)
	r := w.store.Read()
	if b := r.Brake(ids.Brake(id(21))); b.InForce() || b.EndedBy != "" {
		t.Errorf("%+v", b)
	}
	if b := r.Brake(ids.Brake(id(22))); !b.InForce() {
		t.Errorf("it is pinned and has ended: %+v", b)
	}
	if r.BrakesDue(w.now) {
		t.Error("a sweep is due again")
	}
	var seen []byte
	for _, b := range w.brakes() {
		seen = append(seen, b.ID[0])
		if b.ID[0] == 22 && !b.Until.IsZero() {
			t.Error("relays would end a pinned brake by its time")
		}
	}
	if string(seen) != string([]byte{20, 22, 23}) {
		t.Errorf("relays hear of brakes %d", seen)
	}
	w.ok(&command.BrakePin{Brake: id(22)})
	if !w.store.Read().BrakesDue(w.now) {
		t.Error("no sweep is due")
	}
	w.ok(&command.BrakeSweep{})
	if b := w.store.Read().Brake(ids.Brake(id(22))); b.InForce() {
		t.Error("it is not pinned any more and its time is over")
	}
	w.now = w.now.Add(8 * 24 * time.Hour)
	w.ok(&command.BrakeSweep{})
	if left := w.store.Read().Brakes(); len(left) != 1 || left[0].ID[0] != 20 {
		t.Errorf("%d brakes are left", len(left))
	}
}

// What a person cancelled is not set again by what was known then.
func TestARuleDoesNotSetAgainWhatAPersonCancelled(t *testing.T) {
	w := brakesWorld(t)
	evidence := w.now
	w.ok(w.reflex(23, evidence))
	first := w.ok(w.reflex(24, evidence.Add(time.Second))).(*control.Brake)
	if first.ID[0] != 23 || !first.EvidenceAt.Equal(evidence.Add(time.Second)) {
		t.Errorf("the rule has two brakes, or kept the old evidence: %+v", first)
	}
	w.ok(&command.BrakeCancel{Meta: &command.Meta{Actor: "bert"}, Brake: id(23)})
	cancelled := w.now
	if b := w.brakes(); len(b) != 1 || !b[0].Released.Equal(cancelled) || b[0].Node != ids.Node(id(7)) {
		t.Errorf("the relay does not hear that its reflex was ended: %+v", b)
	}
	w.refused(w.reflex(25, cancelled.Add(-time.Second)), fault.Conflict, "")
	other := w.reflex(26, evidence)
	other.Brake.Provider = "yahoo"
	w.ok(other)
	w.ok(w.reflex(27, w.now))
}

func TestRulesEndOnlyTheirOwnBrakes(t *testing.T) {
	w := brakesWorld(t)
	w.ok(w.brake(20, func(*command.Brake) {}))
	w.refused(&command.BrakeCancel{Brake: id(20), Rule: control.BrakeReflex}, fault.Denied, "")
	w.ok(w.reflex(23, w.now))
	w.ok(&command.BrakePin{Brake: id(23), Pinned: true})
	w.refused(&command.BrakeCancel{Brake: id(23), Rule: control.BrakeReflex}, fault.Conflict, "")
	w.ok(&command.BrakePin{Brake: id(23)})
	w.ok(&command.BrakeCancel{Brake: id(23), Rule: control.BrakeReflex})
	if b := w.brakes(); len(b) != 1 || b[0].ID[0] != 20 {
		t.Errorf("%+v", b)
	}
	w.refused(&command.BrakePin{Brake: id(23), Pinned: true}, fault.Conflict, "")
}

func TestBrakesNameWhatExists(t *testing.T) {
	w := brakesWorld(t)
	w.refused(w.brake(20, func(b *command.Brake) { b.Pool = id(99) }), fault.Invalid, "pool")
	w.refused(w.brake(20, func(b *command.Brake) { b.Source = id(99) }), fault.Invalid, "source")
	w.refused(w.brake(20, func(b *command.Brake) { b.Tenant = id(99) }), fault.Invalid, "tenant")
	w.refused(&command.BrakeCancel{Brake: id(20)}, fault.NotFound, "")
}

func TestBrakesAreBounded(t *testing.T) {
	w := brakesWorld(t)
	set := func(n int, reflex bool) Result {
		c := w.brake(0, func(b *command.Brake) { b.Id = bytes.Repeat([]byte{byte(n >> 8), byte(n)}, 8) })
		if reflex {
			c.Brake.Automatic, c.Brake.Owner, c.Brake.Provider = true, control.BrakeReflex, string(rune('a'+n%26))+string(rune('a'+n/26%26))+string(rune('a'+n/676))
		}
		return w.apply(c)
	}
	n := 1
	for ; n <= maxReflexBrakes; n++ {
		if r := set(n, true); r.Err != nil {
			t.Fatal(n, r.Err)
		}
	}
	if r := set(n, true); !fault.Is(r.Err, fault.Exhausted) {
		t.Errorf("one reflex too many: %v", r.Err)
	}
	for ; n <= maxBrakesInForce; n++ {
		if r := set(n, false); r.Err != nil {
			t.Fatal(n, r.Err)
		}
	}
	if r := set(n, false); !fault.Is(r.Err, fault.Exhausted) {
		t.Errorf("one brake too many: %v", r.Err)
	}
}
