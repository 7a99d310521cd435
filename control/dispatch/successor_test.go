package dispatch

import (
	"errors"
	"strings"
	"testing"
	"time"

	"github.com/relais-mta/relais/control"
	"github.com/relais-mta/relais/shared/fault"
	"github.com/relais-mta/relais/shared/ids"
	"github.com/relais-mta/relais/shared/link"
	"github.com/relais-mta/relais/shared/pki/pkitest"
)

// TestACopyDoesNotSucceedTheFirst: a copy of a relay's machine gets in while nobody
// leads. The new leader takes nobody for the successor of anybody before it knows
// of all sessions, and then the first alone, until that is gone.
func TestACopyDoesNotSucceedTheFirst(t *testing.T) {
	m, worlds := newCluster(t, 3)
	node := pkitest.NewNode()
	for _, w := range worlds {
		w.nodes.setState(node, control.NodeActive)
	}
	m.lead(ids.Node{})
	first := worlds[1].process(node, 5, "first", true)
	if err := first.welcome(); err != nil {
		t.Fatal(err)
	}
	if err := worlds[2].process(node, 6, "copy", true).welcome(); err != nil {
		t.Fatal(err)
	}
	// The server that has the first is cut off: the leader knows of the copy alone.
	m.cut(worlds[1].self(), errors.New("cut off"))
	m.lead(worlds[0].self())
	leader := worlds[0].server
	eventually(t, "the leader knows the copy", func() bool { return worlds[0].known(node) == 1 })
	if leader.Succeeds(node, worlds[2].self(), 6) {
		t.Error("a copy succeeds the first, whose server has said nothing yet")
	}
	m.cut(worlds[1].self(), nil)
	eventually(t, "the first has its session", func() bool { return leader.Succeeds(node, worlds[1].self(), 5) })
	for name, wrong := range map[string]bool{
		"the copy":               leader.Succeeds(node, worlds[2].self(), 6),
		"another process":        leader.Succeeds(node, worlds[1].self(), 6),
		"through another server": leader.Succeeds(node, worlds[2].self(), 5),
		"another node":           leader.Succeeds(pkitest.NewNode(), worlds[1].self(), 5),
		"where nobody leads":     worlds[1].server.Succeeds(node, worlds[1].self(), 5),
	} {
		if wrong {
			t.Errorf("%s succeeds", name)
		}
	}
}

// TestWhoHasTheSession goes through what the leader may know of a relay's processes.
func TestWhoHasTheSession(t *testing.T) {
	now := time.Now()
	a, b, c, node := pkitest.NewNode(), pkitest.NewNode(), pkitest.NewNode(), pkitest.NewNode()
	servers := []ids.Node{a, b}
	var r registry
	r.begin(1, now)
	first, second := Claim{Node: node, Nonce: []byte("x"), Incarnation: 1}, Claim{Node: node, Nonce: []byte("y"), Incarnation: 2}
	r.put(a, first, 1, now)
	r.settle(a, 1, now)
	if r.complete(servers, now) {
		t.Error("a server has told nothing yet, and all is said to be known")
	}
	if !r.complete(servers, now.Add(cloneSilence)) {
		t.Error("a server that is gone is waited for without end")
	}
	r.settle(b, 1, now)
	if !r.complete(servers, now) || r.complete(append(servers, c), now) {
		t.Error("all servers have told, but not one that nobody heard of")
	}
	if !r.holds(node, a, 1, now) || r.holds(node, b, 1, now) {
		t.Error("the one process that is linked has not the session, or has it elsewhere")
	}
	r.put(b, second, 2, now)
	if r.holds(node, b, 2, now) || r.holds(node, a, 1, now) {
		t.Error("of two that live one has the session before that is ruled")
	}
	if !r.holds(node, b, 2, now.Add(cloneSilence)) {
		t.Error("the first is silent, and the second has not the session")
	}
	r.dispute(r.sessions[node][a])
	r.remove(node, a)
	if r.holds(node, b, 2, now) {
		t.Error("a copy that was refused has the session at once when the first goes")
	}
	if !r.holds(node, b, 2, now.Add(cloneSilence)) {
		t.Error("the first has gone long ago, and the second has not the session")
	}
	// The same process at two servers, while it moves.
	r.begin(2, now)
	r.put(a, first, 1, now)
	r.put(b, first, 1, now)
	if !r.holds(node, b, 1, now) {
		t.Error("a process that moves has no session")
	}
}

// TestLongLeasesNeedALongSilence: where leases live for two minutes, a machine that
// was silent for half a minute may still use what it was lent, so its copy does not
// get its place.
func TestLongLeasesNeedALongSilence(t *testing.T) {
	w := newWorld(t)
	ttl := 2 * time.Minute
	r := &w.server.presence.reg
	r.ttl = func() time.Duration { return ttl }
	if got := r.silence(); got != 121200*time.Millisecond {
		t.Errorf("with leases of 2 m the silence is %v", got)
	}
	now := time.Now()
	r.begin(1, now)
	a, b, node := pkitest.NewNode(), pkitest.NewNode(), pkitest.NewNode()
	first, second := Claim{Node: node, Nonce: []byte("x"), Incarnation: 1}, Claim{Node: node, Nonce: []byte("y"), Incarnation: 2}
	r.put(a, first, 1, now)
	r.put(b, second, 2, now)
	for after, want := range map[time.Duration]bool{cloneSilence: false, 120 * time.Second: false, 122 * time.Second: true} {
		if got := r.holds(node, b, 2, now.Add(after)); got != want {
			t.Errorf("%v after the first was heard the second has the session: %v", after, got)
		}
		if _, got := r.against(r.sessions[node][b], now.Add(after)); got == want {
			t.Errorf("%v after the first was heard it stands in the way: %v", after, got)
		}
		if got := r.complete([]ids.Node{a}, now.Add(after)); got != want {
			t.Errorf("%v after the term began all is known without a server: %v", after, got)
		}
	}
	r.settle(b, 2, now.Add(time.Minute))
	if r.sessions[node][a] == nil {
		t.Error("the first is forgotten after a minute")
	}
	// At one server: the original left a minute ago.
	original := w.process(node, 5, "original", true)
	if err := original.welcome(); err != nil {
		t.Fatal(err)
	}
	if err := w.process(node, 6, "copy", true).welcome(); !fault.Is(err, fault.Conflict) || !strings.Contains(fault.Public(err), "2m1s") {
		t.Errorf("a copy: %v", err)
	}
	original.link.Close(link.CodeDone, "")
	waitSessions(t, w, 0)
	leave := func(ago time.Duration) {
		w.server.mu.Lock()
		w.server.contests[node].heard = time.Now().Add(-ago)
		w.server.mu.Unlock()
	}
	leave(time.Minute)
	if err := w.process(node, 6, "copy", true).welcome(); !fault.Is(err, fault.Conflict) {
		t.Errorf("the copy a minute after the original: %v", err)
	}
	leave(r.silence())
	if err := w.process(node, 6, "copy", true).welcome(); err != nil {
		t.Errorf("the copy after the silence: %v", err)
	}
	// Shorter leases shorten nothing.
	if ttl = 5 * time.Second; r.silence() != cloneSilence {
		t.Errorf("with leases of 5 s the silence is %v", r.silence())
	}
}
