package handover

import (
	"context"
	"math/rand/v2"
	"net"
	"net/netip"
	"slices"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/relais-mta/relais/relay"
	"github.com/relais-mta/relais/relay/queue"
	"github.com/relais-mta/relais/shared/fault"
	"github.com/relais-mta/relais/shared/ids"
	"github.com/relais-mta/relais/shared/pki"
	"github.com/relais-mta/relais/shared/wire"
)

func loopback(i int) netip.Addr { return netip.AddrFrom4([4]byte{127, 0, 9, byte(i)}) }

// TestMailGoesWhereItsPoolIs accepts mail at a relay without a source: it goes
// to the one that has one, whole, and is forgotten everywhere else.
func TestMailGoesWhereItsPoolIs(t *testing.T) {
	w := newWorld(t, 2)
	a, b := w.relays[0].start(), w.relays[1].start()
	want := a.accept(700)
	eventually(t, "all mail with the other relay", func() bool { return a.waiting() == 0 && b.waiting() == len(want) })
	for id := range want {
		info, err := b.q.Show(id)
		if err != nil {
			t.Fatal(err)
		}
		if _, err := b.st.ReadBody(info.Env.Body, nil); err != nil || info.Env.HandedFrom != a.id {
			t.Errorf("%s: from %s, body %v", id, info.Env.HandedFrom, err)
		}
	}
	// Owed is nothing as well as long as the last answer has not arrived.
	eventually(t, "both forgot", func() bool {
		s := a.s.Status()
		return s.Given == uint64(len(want)) && s.Flying == 0 && len(a.q.Owed(b.id, 1)) == 0
	})
	var list []queue.Transfer
	for id := range want {
		list = append(list, queue.Transfer{Message: id, Hop: 1})
	}
	if has, err := b.q.Has(a.id, list); err != nil || slices.Contains(has, true) {
		t.Errorf("the taker remembers mail of which the giver forgot: %v", err)
	}
	if s := a.s.Status(); s.Given != uint64(len(want)) || s.Flying != 0 || s.Pools != 1 {
		t.Errorf("status %+v", s)
	}
	if n := len(b.holds()); n != len(want) {
		t.Errorf("%d messages with the taker, want %d", n, len(want))
	}
}

// TestADrainingRelayGivesEverything drains a relay that has sources: what waits
// for later and what is held goes too.
func TestADrainingRelayGivesEverything(t *testing.T) {
	w := newWorld(t, 2)
	a, b := w.relays[0].start(), w.relays[1].start()
	a.set(func() { a.usable = true })
	w.publish()
	a.accept(20)
	if _, err := a.q.Operate(context.Background(), queue.Operation{Action: queue.ActionHold, Filter: queue.Filter{Match: queue.Match{Domain: "d3.example"}}, Actor: "test", Reason: "looked at"}, func(queue.Progress) {}); err != nil {
		t.Fatal(err)
	}
	later := a.envelope(1)
	later.NotBefore = time.Now().Add(20 * time.Minute)
	if err := a.q.Accept(context.Background(), later, nil); err != nil {
		t.Fatal(err)
	}
	if n := a.waiting(); n != 21 {
		t.Fatalf("%d recipients wait before the relay drains", n)
	}
	if x, ok := a.s.Explain(testPool); ok {
		t.Errorf("before it drains: %+v", x)
	}
	a.set(func() { a.draining = true })
	w.publish()
	if x, ok := a.s.Explain(testPool); !ok || !strings.Contains(x.Text, "to relay relay2, because this relay drains") {
		t.Errorf("%+v", x)
	}
	eventually(t, "nothing is left", func() bool { return a.waiting() == 0 })
	if s := b.q.Summary(); s.Held != 3 || s.Waiting != 18 {
		t.Errorf("the taker has %d waiting and %d held, want 18 and 3", s.Waiting, s.Held)
	}
}

// TestNobodyElseGetsMail offers mail to those who must refuse it: a stranger to
// the cluster's view, a machine with another key, one without sources.
func TestNobodyElseGetsMail(t *testing.T) {
	w := newWorld(t, 3)
	a, b, c := w.relays[0], w.relays[1].start(), w.relays[2]
	c.set(func() { c.absent = true })
	b.set(func() { b.usable = false })
	w.publish()
	a.start()
	a.accept(5)
	eventually(t, "the relay without a source refuses", func() bool { return strings.Contains(a.s.Problem(), "no source address of pool main") })
	if n := a.waiting(); n != 5 || b.waiting() != 0 {
		t.Errorf("%d messages stayed", n)
	}
	if x, ok := a.s.Explain(testPool); !ok || !strings.Contains(x.Text, "relay relay2: it refuses: the relay has no source") {
		t.Errorf("%+v", x)
	}
	// A stranger with a certificate of the cluster is refused at once.
	c.start()
	c.mu.Lock()
	dir := c.dir2
	c.mu.Unlock()
	peer, _ := dir.Peer(b.id)
	stranger := &worker{s: c.s, peer: b.id, wake: make(chan struct{}, 1), refused: map[ids.Pool]time.Time{}}
	if err := stranger.session(context.Background(), peer); !fault.Is(err, fault.Denied) || !strings.Contains(fault.Public(err), "not in the cluster") {
		t.Errorf("a stranger: %v", err)
	}
	// So is one whose certificate is for another key than the view says.
	c.set(func() { c.absent = false })
	w.publish()
	c.holder = w.ca.Node(pki.RoleRelay, c.id)
	c.stop()
	c.start()
	peer, _ = c.dir2.Peer(b.id)
	stranger = &worker{s: c.s, peer: b.id, wake: make(chan struct{}, 1), refused: map[ids.Pool]time.Time{}}
	if err := stranger.session(context.Background(), peer); !fault.Is(err, fault.Denied) || !strings.Contains(fault.Public(err), "another key") {
		t.Errorf("another key: %v", err)
	}
}

// TestMailOfAnEvictedTakerIsInDoubt puts a relay out of the cluster after mail
// was offered to it: nobody can ask it any more, so the mail is in doubt.
func TestMailOfAnEvictedTakerIsInDoubt(t *testing.T) {
	w := newWorld(t, 2)
	a, b := w.relays[0], w.relays[1]
	b.stop()
	a.open()
	a.accept(3)
	var numbers []queue.Number
	a.q.Queues(func(i queue.QueueInfo) bool { numbers = append(numbers, i.Number); return true })
	parcels, _, err := a.q.Claim(numbers, false, 10, func(*relay.Envelope) bool { return true })
	if err != nil || len(parcels) != 3 {
		t.Fatalf("%d parcels, %v", len(parcels), err)
	}
	if err := a.q.Offer(b.id, parcels[:2]); err != nil {
		t.Fatal(err)
	}
	a.stop()
	a.start()
	eventually(t, "the relay is not reached", func() bool { return strings.Contains(a.s.Problem(), "cannot be reached") })
	if x, ok := a.s.Flight(parcels[0].Env.ID); !ok || !strings.Contains(x.Text, "offered to relay relay2, whose answer is awaited: ") {
		t.Errorf("%+v", x)
	}
	b.set(func() { b.absent = true })
	w.publish()
	doubt := func() (n int) {
		_ = a.q.Visit(context.Background(), queue.Filter{InDoubt: true}, func(*relay.Envelope, uint16, *relay.RecipientState) { n++ }, func(int64, int64) {})
		return n
	}
	eventually(t, "what was offered is in doubt", func() bool { return doubt() == 2 })
	if n := a.waiting(); n != 3 {
		t.Errorf("%d recipients wait, want 3", n)
	}
}

// TestMailDoesNotGoBack hands mail over to a relay that loses its source while
// the other has one in its view and none in truth: it does not go round.
func TestMailDoesNotGoBack(t *testing.T) {
	w := newWorld(t, 3)
	first, b, c := w.relays[0].start(), w.relays[1].start(), w.relays[2].start()
	c.set(func() { c.usable = false })
	w.publish()
	first.accept(10)
	eventually(t, "it is with the relay that has a source", func() bool { return b.waiting() == 10 })
	// Now the third has a source and the second has none.
	b.set(func() { b.usable = false })
	c.set(func() { c.usable = true })
	b.s.Changed()
	eventually(t, "it went on", func() bool { return c.waiting() == 10 && b.waiting() == 0 })
	// And the other way round, without a new view: it must not go back.
	b.set(func() { b.usable = true })
	c.set(func() { c.usable = false })
	b.s.Changed()
	c.s.Changed()
	eventually(t, "the third knows that it should go", func() bool { _, ok := c.s.Explain(testPool); return ok })
	p := c.s.plan.Load()
	refused := 0
	var numbers []queue.Number
	c.q.Queues(func(i queue.QueueInfo) bool { numbers = append(numbers, i.Number); return true })
	for id := range c.holds() {
		info, err := c.q.Show(id)
		if err != nil {
			t.Fatal(err)
		}
		if info.Env.HandedFrom == b.id && info.Env.HandedAt == p.revision && info.Env.Hops == 2 {
			refused++
		}
	}
	if refused != 10 || c.waiting() != 10 {
		t.Errorf("%d messages are marked as not to go back, %d are there", refused, c.waiting())
	}
	w.publish() // a new view: now they may
	eventually(t, "it went back", func() bool { return b.waiting() == 10 && c.waiting() == 0 })
}

// cutting breaks a connection after a number of bytes.
type cutting struct {
	net.Conn
	left *atomic.Int64
}

func (c cutting) Write(p []byte) (int, error) {
	if c.left.Add(-int64(len(p))) < 0 {
		_ = c.Close()
	}
	return c.Conn.Write(p)
}

func (c cutting) Read(p []byte) (int, error) {
	n, err := c.Conn.Read(p)
	if c.left.Add(-int64(n)) < 0 {
		_ = c.Close()
	}
	return n, err
}

// TestBrokenConnectionsLoseNothing breaks every connection after some bytes, and
// restarts either relay now and then: in the end every message is with the taker
// once, and what it took it never takes again.
func TestBrokenConnectionsLoseNothing(t *testing.T) {
	w := newWorld(t, 2)
	a, b := w.relays[0], w.relays[1]
	random := rand.New(rand.NewPCG(1, 2))
	a.wrap = func(c net.Conn) net.Conn {
		left := new(atomic.Int64)
		left.Store(4000 + random.Int64N(600_000))
		return cutting{c, left}
	}
	a.start()
	b.start()
	want := a.accept(1500)
	for round := range 6 {
		count := b.waiting()
		eventually(t, "some mail has gone", func() bool { return b.waiting() > count || a.waiting() == 0 })
		if round%2 == 0 {
			a.stop()
			a.start()
		} else {
			b.stop()
			b.start()
		}
	}
	a.set(func() { a.wrap = nil })
	eventually(t, "all mail with the other relay", func() bool { return a.waiting() == 0 && b.waiting() == len(want) })
	if got := b.holds(); len(got) != len(want) {
		t.Errorf("%d messages with the taker, want %d", len(got), len(want))
	}
	if left := a.holds(); len(left) != 0 {
		t.Errorf("%d messages are left", len(left))
	}
}

// TestAnOlderSessionIsRefused opens sessions out of order: the taker serves the
// newest alone, because its answers are the last word about the others.
func TestAnOlderSessionIsRefused(t *testing.T) {
	w := newWorld(t, 2)
	a, b := w.relays[0].start(), w.relays[1].start()
	peer, _ := a.dir2.Peer(b.id)
	open := func(number uint64) (*wire.Conn, net.Conn, error) {
		worker := &worker{s: a.s, peer: b.id}
		conn, err := worker.dial(context.Background(), peer)
		if err != nil {
			t.Fatal(err)
		}
		c := wire.NewConn(timed{conn}, wire.MaxFrameBytes)
		if err := c.Send(a.s.preface()); err != nil {
			t.Fatal(err)
		}
		if err := c.Send(&wire.HandoverOpen{Session: number}); err != nil {
			t.Fatal(err)
		}
		if err := a.s.checkPreface(c); err != nil {
			return c, conn, err
		}
		_, err = wire.Expect[*wire.HandoverReady](c)
		return c, conn, err
	}
	first, conn1, err := open(1 << 40)
	if err != nil {
		t.Fatal(err)
	}
	defer conn1.Close()
	_, conn2, err := open(1<<40 + 1)
	if err != nil {
		t.Fatal(err)
	}
	defer conn2.Close()
	if _, err := wire.Expect[*wire.HandoverHas](first); err == nil {
		t.Error("the session of before goes on")
	}
	_, conn3, err := open(1 << 40)
	defer conn3.Close()
	if !fault.Is(err, fault.Conflict) {
		t.Errorf("an older session: %v", err)
	}
}

// BenchmarkHandover hands over messages of 2 kB between two relays of one
// process, with TLS, synced on both sides.
func BenchmarkHandover(b *testing.B) {
	w := newWorld(b, 2)
	giver, taker := w.relays[0], w.relays[1].start()
	giver.open()
	giver.accept(b.N)
	b.ResetTimer()
	giver.start()
	eventually(b, "all mail with the other relay", func() bool { return giver.waiting() == 0 && taker.waiting() == b.N })
	b.ReportMetric(float64(b.N)/b.Elapsed().Seconds(), "msg/s")
}
