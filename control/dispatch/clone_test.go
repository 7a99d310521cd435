package dispatch

import (
	"testing"
	"time"

	"github.com/relais-mta/relais/control"
	"github.com/relais-mta/relais/shared/fault"
	"github.com/relais-mta/relais/shared/ids"
	"github.com/relais-mta/relais/shared/link"
	"github.com/relais-mta/relais/shared/pki/pkitest"
	"github.com/relais-mta/relais/shared/wire"
)

// process is one process of a relay: it says which, and may answer probes.
func (w *world) process(node ids.Node, incarnation uint64, nonce string, answers bool) *relay {
	w.t.Helper()
	w.nodes.setState(node, control.NodeActive)
	r := w.dialAs(&wire.Preface{
		ProtocolMin: 1, ProtocolMax: 1, ClusterId: w.ca.Cluster[:], Incarnation: incarnation, BootNonce: []byte(nonce),
		Capabilities: wire.CapabilityProbe, Version: "test",
	}, node, &wire.Hello{})
	if _, err := wire.Expect[*wire.Preface](r.control); err != nil {
		w.t.Fatal(err)
	}
	if answers {
		r.answering = make(chan error, 1)
	}
	return r
}

// welcome reads the answer to the hello, and from then on answers probes.
func (r *relay) welcome() error {
	_, err := wire.Expect[*wire.Welcome](r.control)
	if err == nil && r.answering != nil {
		go func() {
			for {
				message, err := r.control.Receive()
				if err != nil {
					return
				}
				if probe, ok := message.(*wire.Probe); ok && !r.mute.Load() {
					_ = r.control.Send(&wire.ProbeReply{Nonce: probe.GetNonce()}) // the test sees what comes of it
				}
			}
		}()
	}
	return err
}

func TestCloneIsRefused(t *testing.T) {
	w := newWorld(t)
	linked := func() (ids.Node, *relay) {
		t.Helper()
		node := pkitest.NewNode()
		original := w.process(node, 5, "original", true)
		if err := original.welcome(); err != nil {
			t.Fatal(err)
		}
		return node, original
	}
	for incarnation, name := range map[uint64]string{5: "as many starts", 6: "one start more", 4: "fewer starts"} {
		node, _ := linked() // what is known of one copy decides about the next
		for _, again := range []string{"", ", again"} {
			if err := w.process(node, incarnation, "copy", true).welcome(); !fault.Is(err, fault.Conflict) {
				t.Errorf("a copy with %s%s: %v", name, again, err)
			}
			within(t, w.nodes.clones)
		}
	}
	node, original := linked()
	if err := w.process(node, 6, "copy", true).welcome(); !fault.Is(err, fault.Conflict) {
		t.Errorf("a copy: %v", err)
	}
	within(t, w.nodes.clones)
	// The same process may open another session.
	again := w.process(node, 5, "original", true)
	if err := again.welcome(); err != nil {
		t.Fatal(err)
	}
	if closed := original.closed(); closed.Code != link.CodeReplaced {
		t.Errorf("the original's first session closed with %v", closed)
	}
	// The copy does not get the place the moment the original leaves it.
	again.link.Close(link.CodeDone, "")
	waitSessions(t, w, 3)
	if err := w.process(node, 6, "copy", true).welcome(); !fault.Is(err, fault.Conflict) {
		t.Errorf("a copy right after the original: %v", err)
	}
	// It gets it once the original has been silent for long enough.
	w.server.mu.Lock()
	w.server.contests[node].heard = time.Now().Add(-cloneSilence)
	w.server.mu.Unlock()
	if err := w.process(node, 6, "copy", true).welcome(); err != nil {
		t.Errorf("after the silence: %v", err)
	}
}

// TestRelaysMayProbe has a relay ask whether the server lives.
func TestRelaysMayProbe(t *testing.T) {
	w := newWorld(t)
	node := pkitest.NewNode()
	w.nodes.setState(node, control.NodeActive)
	r := w.dial(node, 1, &wire.Hello{})
	preface, err := wire.Expect[*wire.Preface](r.control)
	if err != nil || preface.GetCapabilities()&wire.CapabilityProbe == 0 {
		t.Fatalf("the server announces %v, %v", preface, err)
	}
	if err := r.welcome(); err != nil {
		t.Fatal(err)
	}
	for _, nonce := range []uint64{7, 8} {
		if err := r.control.Send(&wire.Probe{Nonce: nonce}); err != nil {
			t.Fatal(err)
		}
		if reply, err := wire.Expect[*wire.ProbeReply](r.control); err != nil || reply.GetNonce() != nonce {
			t.Errorf("question %d: %v, %v", nonce, reply, err)
		}
	}
}

// TestRestartIsNoClone kills a relay, which leaves its session behind, and
// starts it again.
func TestRestartIsNoClone(t *testing.T) {
	w := newWorld(t)
	node := pkitest.NewNode()
	dead := w.process(node, 5, "before", false) // it answers nothing any more
	if err := dead.welcome(); err != nil {
		t.Fatal(err)
	}
	start := time.Now()
	if err := w.process(node, 6, "after", true).welcome(); err != nil {
		t.Fatal(err)
	}
	if took := time.Since(start); took < probeTimeout {
		t.Errorf("the former process had %v to answer", took)
	}
	if closed := dead.closed(); closed.Code != link.CodeReplaced {
		t.Errorf("the former session closed with %v", closed)
	}
	if len(w.nodes.clones) != 0 {
		t.Error("a restart was taken for a clone")
	}
	// Should it live after all, it is a copy, and refused.
	if err := w.process(node, 5, "before", true).welcome(); !fault.Is(err, fault.Conflict) {
		t.Errorf("the former process: %v", err)
	}
	within(t, w.nodes.clones)
}

func waitSessions(t *testing.T, w *world, want int) {
	t.Helper()
	deadline := time.After(patience)
	tick := time.NewTicker(5 * time.Millisecond)
	defer tick.Stop()
	for w.server.Sessions() != want {
		select {
		case <-tick.C:
		case <-deadline:
			t.Fatalf("%d sessions, want %d", w.server.Sessions(), want)
		}
	}
}
