package dispatch

import (
	"bytes"
	"crypto/sha256"
	"fmt"
	"slices"
	"sync"
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus/testutil"

	"github.com/relais-mta/relais/shared/ids"
	"github.com/relais-mta/relais/shared/mailaddr"
	"github.com/relais-mta/relais/shared/pki/pkitest"
	"github.com/relais-mta/relais/shared/policy"
	"github.com/relais-mta/relais/shared/wire"
)

// follower is a simulated agent: it takes views and deltas and acknowledges.
type follower struct {
	*relay
	encoded []byte
	deltas  int
	wholes  int
	cheap   bool   // keeps sums alone, so that a hundred fit into one process
	sum     []byte // of what it holds
	forget  bool   // claims once not to hold what a delta starts from
}

// follow answers one offer and returns the revision it acknowledged.
func (f *follower) follow() (uint64, error) {
	for {
		message, err := f.views.Receive()
		if err != nil {
			return 0, err
		}
		var revision *wire.Revision
		switch begin := message.(type) {
		case *wire.ViewBegin:
			if f.encoded, err = wire.ReceiveView(f.views, begin); err != nil {
				return 0, err
			}
			revision = begin.GetRevision()
			sum := sha256.Sum256(f.encoded)
			f.sum = sum[:]
			f.wholes++
		case *wire.DeltaBegin:
			change, err := wire.ReceiveDelta(f.views, begin)
			if err != nil {
				return 0, err
			}
			if f.forget || !bytes.Equal(f.sum, begin.GetFromSha256()) {
				f.forget = false
				if err := f.views.Send(&wire.Resync{}); err != nil {
					return 0, err
				}
				continue
			}
			f.sum = begin.GetToSha256()
			if !f.cheap {
				if f.encoded, err = wire.ApplyDelta(f.encoded, change); err != nil {
					return 0, err
				}
				if err := wire.CheckSum(f.encoded, f.sum); err != nil {
					return 0, err
				}
			}
			revision = begin.GetTo()
			f.deltas++
		default:
			return 0, fmt.Errorf("got a %T", message)
		}
		return revision.GetIndex(), f.views.Send(&wire.Ack{Revision: revision})
	}
}

// follower connects a relay that takes deltas.
func (w *world) follower(capabilities uint64) *follower {
	w.t.Helper()
	node := pkitest.NewNode()
	w.nodes.setState(node, "active")
	r := w.dialAs(&wire.Preface{ProtocolMin: 1, ProtocolMax: 1, ClusterId: w.ca.Cluster[:], Incarnation: 1, Capabilities: capabilities, Version: "test"}, node, &wire.Hello{})
	if _, err := wire.Expect[*wire.Preface](r.control); err != nil {
		w.t.Fatal(err)
	}
	if err := r.welcome(); err != nil {
		w.t.Fatal(err)
	}
	stream, err := r.link.AcceptStream(w.t.Context())
	if err != nil {
		w.t.Fatal(err)
	}
	r.views = wire.NewConn(stream, wire.MaxFrameBytes)
	if _, err := wire.Expect[*wire.StreamStart](r.views); err != nil {
		w.t.Fatal(err)
	}
	return &follower{relay: r}
}

// bigView fills views with what a middling installation has: about 0.8 MiB.
func bigView(v *policy.View) {
	key := make([]byte, 1200)
	for i := range 500 {
		v.Domains = append(v.Domains, policy.Domain{Name: mailaddr.Domain(fmt.Sprintf("d%d.example", i)), Tenant: ids.Tenant{1, byte(i)}, DKIM: []policy.DKIMKey{{Selector: "s1", Algorithm: "rsa-sha256", Private: key}}})
	}
	for i := range 2500 {
		v.Credentials = append(v.Credentials, policy.Credential{ID: ids.Credential{1, byte(i >> 8), byte(i)}})
		v.Sources = append(v.Sources, policy.Source{ID: ids.Source{1, byte(i >> 8), byte(i)}, EHLO: "mx.example"})
	}
}

func mustFollow(t *testing.T, f *follower, want uint64) {
	t.Helper()
	got, err := f.follow()
	if err != nil || got != want {
		t.Fatalf("followed to revision %d, %v, want %d", got, err, want)
	}
}

// TestRelayGetsChangesOnly follows a relay from its first view through changes,
// a relay that lost its view, and a relay too old for deltas.
func TestRelayGetsChangesOnly(t *testing.T) {
	w := newWorld(t)
	w.nodes.fill = bigView
	f, old := w.follower(wire.CapabilityDelta), w.follower(0)
	mustFollow(t, f, 10)
	mustFollow(t, old, 10)
	for range 2 {
		within(t, w.nodes.acks)
	}
	whole := testutil.ToFloat64(w.server.viewBytes)
	next := w.nodes.change(nil)
	mustFollow(t, f, next)
	mustFollow(t, old, next)
	if f.deltas != 1 || f.wholes != 1 || old.deltas != 0 || old.wholes != 2 {
		t.Errorf("%d deltas and %d views, the old relay %d and %d", f.deltas, f.wholes, old.deltas, old.wholes)
	}
	for range 2 {
		within(t, w.nodes.acks)
	}
	if sent := testutil.ToFloat64(w.server.viewBytes) - whole; sent > whole/2+1000 {
		t.Errorf("a change cost %.0f bytes, all views %.0f", sent, whole)
	}
	got, err := wire.DecodeView(f.encoded)
	if err != nil || got.Node != f.node || got.Revision != next {
		t.Errorf("the delta led to %v of %v: %v", got.Revision, got.Node, err)
	}
	f.forget = true
	next = w.nodes.change(nil)
	mustFollow(t, f, next)
	if f.wholes != 2 || testutil.ToFloat64(w.server.resyncs) != 1 {
		t.Errorf("%d whole views, %v resyncs, want the whole view once more", f.wholes, testutil.ToFloat64(w.server.resyncs))
	}
	next = w.nodes.change(nil)
	mustFollow(t, f, next)
	if f.deltas != 2 {
		t.Errorf("%d deltas after the whole view", f.deltas)
	}
}

// TestHundredRelaysFollow changes a policy that 100 relays hold and waits for
// all of them, over real sockets: each gets the change alone. How soon is said, and
// judged where real programs run (TestHundredSessions).
func TestHundredRelaysFollow(t *testing.T) {
	const relays, changes = 100, 8
	w := newWorld(t)
	w.nodes.fill = bigView
	w.nodes.acks = make(chan uint64, relays*(changes+2))
	w.nodes.connected = make(chan ids.Node, relays)
	w.nodes.reports = make(chan Report, relays*100)
	var following sync.WaitGroup
	for i := range relays {
		f := w.follower(wire.CapabilityDelta)
		f.cheap = i%10 != 0 // relays have machines of their own
		following.Go(func() {
			for {
				if _, err := f.follow(); err != nil {
					return // the test is over
				}
			}
		})
	}
	all := func(revision uint64, since time.Time) (took []time.Duration) {
		t.Helper()
		timeout := time.After(2 * time.Minute)
		for len(took) < relays {
			select {
			case got := <-w.nodes.acks:
				if got == revision {
					took = append(took, time.Since(since))
				}
			case <-timeout:
				t.Fatalf("%d of %d relays acknowledged revision %d", len(took), relays, revision)
			}
		}
		return took
	}
	all(10, time.Now())
	whole := testutil.ToFloat64(w.server.viewBytes)
	var p99 []time.Duration // of each change
	for range changes {
		start := time.Now()
		took := all(w.nodes.change(nil), start)
		slices.Sort(took)
		p99 = append(p99, took[len(took)*99/100])
	}
	slices.Sort(p99)
	sent := testutil.ToFloat64(w.server.viewBytes) - whole
	t.Logf("%d relays, %d changes: p99 %v to %v; %.0f bytes sent, %.0f before", relays, changes, p99[0], p99[changes-1], sent, whole)
	// What makes it fast: a relay gets what changed, not all there is.
	if resent := testutil.ToFloat64(w.server.resyncs); resent > 0 || sent > whole/50 {
		t.Errorf("%d changes took %.0f bytes, the views %.0f; %v relays got all of it again", changes, sent, whole, resent)
	}
	w.dialer.Close()
	following.Wait()
}
