package quota

import (
	"context"
	"encoding/json"
	"errors"
	"io"
	"log/slog"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/testutil"
	"google.golang.org/protobuf/proto"

	"github.com/relais-mta/relais/shared/ids"
	"github.com/relais-mta/relais/shared/lease"
	"github.com/relais-mta/relais/shared/wire"
)

// fleet is a few servers that ask each other without a network.
type fleet struct {
	mu      sync.Mutex
	leader  int // -1: none
	term    uint64
	servers []*testServer
}

type testServer struct {
	fleet *fleet
	at    int
	q     *Quota
	got   chan item // delivered to relays linked here
	full  bool      // no relay is linked here
}

func (s *testServer) Term() (uint64, bool) {
	s.fleet.mu.Lock()
	defer s.fleet.mu.Unlock()
	return s.fleet.term, s.fleet.leader == s.at
}

func (s *testServer) WaitReady(ctx context.Context) error {
	for {
		if _, leads := s.Term(); leads {
			return nil
		}
		if err := pause(ctx, 10*time.Millisecond); err != nil {
			return err
		}
	}
}

func (s *testServer) AskLeader(ctx context.Context, what string, in, out any) error {
	s.fleet.mu.Lock()
	leader := s.fleet.leader
	s.fleet.mu.Unlock()
	if leader < 0 || leader == s.at {
		return errors.New("no leader")
	}
	body, err := json.Marshal(in)
	if err != nil {
		return err
	}
	answer, err := s.fleet.servers[leader].q.Requests()[what](ctx, serverID(s.at), body)
	if err != nil {
		return err
	}
	if body, err = json.Marshal(answer); err != nil {
		return err
	}
	return json.Unmarshal(body, out)
}

func serverID(i int) (id ids.Node) { id[0], id[15] = 0xc, byte(i+1); return id }
func relayID(i int) (id ids.Node)  { id[0], id[14], id[15] = 0xe, byte((i+1)>>8), byte(i+1); return id }

func newFleet(t *testing.T, n int, parts func(q *Quota) Part) *fleet {
	f := &fleet{leader: -1}
	for i := range n {
		s := &testServer{fleet: f, at: i, got: make(chan item, 64)}
		q, err := New(Options{Self: serverID(i), Cluster: s, Logger: slog.New(slog.NewTextHandler(io.Discard, nil)), Registerer: prometheus.NewRegistry(), Deliver: func(node ids.Node, down *wire.QuotaDown) bool {
			s.got <- item{Node: node, Kind: down.GetKind(), Body: down.GetBody()}
			return !s.full
		}})
		if err != nil {
			t.Fatal(err)
		}
		s.q = q
		q.Add("echo", parts(q))
		f.servers = append(f.servers, s)
	}
	return f
}

func (f *fleet) elect(i int) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.leader = i
	f.term++
}

// echo answers each report with a grant of its nonce.
type echo struct {
	q     *Quota
	leads chan bool
}

func (e *echo) Takes(m proto.Message) bool { _, ok := m.(*wire.LeaseReport); return ok }

func (e *echo) Lead(ctx context.Context, in <-chan Message) error {
	e.leads <- true
	for {
		select {
		case m := <-in:
			nonce := m.Body.(*wire.LeaseReport).GetNonce()
			if nonce == 99 {
				return errors.New("began to fail")
			}
			e.q.Send(m.Node, wire.EncodeLeaseGrant(&lease.Grant{Nonce: nonce}))
		case <-ctx.Done():
			e.leads <- false
			return nil
		}
	}
}

func report(t *testing.T, nonce uint64) *wire.QuotaUp {
	t.Helper()
	up, err := wire.NewQuotaUp(&wire.LeaseReport{Nonce: nonce})
	if err != nil {
		t.Fatal(err)
	}
	return up
}

func nonceOf(t *testing.T, i item) uint64 {
	t.Helper()
	m, err := (&wire.QuotaDown{Kind: i.Kind, Body: i.Body}).Message()
	if err != nil {
		t.Fatal(err)
	}
	return m.(*wire.LeaseGrant).GetNonce()
}

func TestMessagesFindTheLeaderAndComeBack(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		leads := make(chan bool, 16)
		f := newFleet(t, 3, func(q *Quota) Part { return &echo{q, leads} })
		ctx, cancel := context.WithCancel(t.Context())
		var running sync.WaitGroup
		for _, s := range f.servers {
			running.Go(func() { s.q.Run(ctx) })
		}
		f.elect(0)
		if !<-leads {
			t.Error("the leader's part ended before it began")
		}
		synctest.Wait()
		// A relay at the leader, and one at another server.
		for at, server := range []int{0, 2} {
			f.servers[server].q.Up(relayID(at), report(t, uint64(7+at)))
			if got := <-f.servers[server].got; got.Node != relayID(at) || nonceOf(t, got) != uint64(7+at) {
				t.Errorf("relay %d at server %d got %+v", at, server, got)
			}
		}
		// Another server leads: the former one stops first, and messages go there.
		f.elect(2)
		if first, second := <-leads, <-leads; first == second {
			t.Errorf("leading ended and began: %v, %v", first, second)
		}
		if err := pause(ctx, pollTimeout); err != nil { // virtual: the polls have found the new leader
			t.Fatal(err)
		}
		f.servers[0].q.Up(relayID(0), report(t, 20))
		if got := <-f.servers[0].got; nonceOf(t, got) != 20 {
			t.Errorf("after the change of leader: %+v", got)
		}
		// A part that fails leads again.
		f.servers[2].q.Up(relayID(1), report(t, 99))
		if !<-leads {
			t.Error("a part that failed was ended")
		}
		f.servers[2].q.Up(relayID(1), report(t, 21))
		if got := <-f.servers[2].got; nonceOf(t, got) != 21 {
			t.Errorf("after the part failed: %+v", got)
		}
		cancel()
		running.Wait()
	})
}

func TestWhatCannotBeSentIsDroppedAndCounted(t *testing.T) {
	leads := make(chan bool, 16)
	f := newFleet(t, 2, func(q *Quota) Part { return &echo{q, leads} })
	q := f.servers[0].q
	count := func(place string) float64 { return testutil.ToFloat64(q.metrics.dropped.WithLabelValues(place)) }
	q.Send(relayID(0), &wire.LeaseGrant{}) // nobody knows where it is
	if count("down") != 1 {
		t.Errorf("a message to an unknown relay: %v", count("down"))
	}
	f.leader = 0
	q.Up(relayID(0), &wire.QuotaUp{Kind: 2, Body: []byte{0xff}})
	q.Up(relayID(0), &wire.QuotaUp{Kind: 777})
	if count("unknown") != 2 {
		t.Errorf("damaged and unknown: %v", count("unknown"))
	}
	// The inbox keeps the newest.
	for i := range maxInbox + 10 {
		q.Up(relayID(0), report(t, uint64(i+1)))
	}
	if first := (<-q.parts[0].in).Body.(*wire.LeaseReport).GetNonce(); first != 11 || count("inbox") != 10 {
		t.Errorf("the oldest is %d, %v were dropped", first, count("inbox"))
	}
	f.servers[0].full = true
	q.Send(relayID(0), &wire.LeaseGrant{})
	if count("link") != 1 {
		t.Errorf("a relay that is not linked: %v", count("link"))
	}
}

func TestOutboxIsBounded(t *testing.T) {
	b := newOutbox()
	body := make([]byte, 1<<20)
	dropped := 0
	for i := range 64 {
		dropped += b.put(item{Kind: uint32(i), Body: body})
	}
	if b.bytes > maxBoxBytes || dropped == 0 {
		t.Errorf("%d bytes are kept, %d dropped", b.bytes, dropped)
	}
	first := b.take(1)
	if len(first) != 1 || int(first[0].Kind) != dropped {
		t.Errorf("the oldest kept is %+v, %d were dropped", first, dropped)
	}
	if some := b.take(3 << 20); len(some) != 2 {
		t.Errorf("%d of 1 MiB in 3 MiB", len(some))
	}
	for len(b.take(maxDownBytes)) > 0 {
	}
	if b.bytes != 0 || b.items != nil {
		t.Errorf("an empty outbox holds %d bytes", b.bytes)
	}
	small := newOutbox()
	dropped = 0
	for i := range maxBoxItems + 5 {
		dropped += small.put(item{Kind: uint32(i)})
	}
	if dropped != 5 || len(small.take(1<<30)) != maxBatchItems {
		t.Errorf("%d dropped", dropped)
	}
}

func TestTheClockGoesOn(t *testing.T) {
	a := Now()
	if b := Now(); b < a || a <= 0 {
		t.Errorf("%d then %d", a, b)
	}
}
