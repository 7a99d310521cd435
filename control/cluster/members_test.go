package cluster

import (
	"context"
	"errors"
	"fmt"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/hashicorp/raft"
	"github.com/prometheus/client_golang/prometheus"

	"github.com/relais-mta/relais/control"
	"github.com/relais-mta/relais/control/ca"
	"github.com/relais-mta/relais/control/command"
	"github.com/relais-mta/relais/control/state"
	"github.com/relais-mta/relais/shared/fault"
	"github.com/relais-mta/relais/shared/ids"
	"github.com/relais-mta/relais/shared/pki"
)

// quick is a tuning that changes members while a test watches.
var quick = Tuning{StableFor: 200 * time.Millisecond, LeaveEvenFor: 600 * time.Millisecond, CheckEvery: 50 * time.Millisecond}

// world is a cluster of several servers in one process, over real sockets.
type world struct {
	t         *testing.T
	transport string
	tuning    Tuning
	id        ids.Cluster
	authority *ca.Authority
	servers   []*peerServer
}

type peerServer struct {
	*Cluster
	id      ids.Node
	dir     string
	address string
	holder  *pki.Holder
	halted  chan error
	logs    func(raft.LogStore) raft.LogStore
}

func newWorld(t *testing.T, transport string, tuning Tuning) *world {
	w := &world{t: t, transport: transport, tuning: tuning, id: ids.Cluster{1}}
	w.authority = newAuthority(t, w.id, time.Now())
	first := w.newServer("")
	if err := Bootstrap(first.dir, first.id.String(), first.address, quiet); err != nil {
		t.Fatal(err)
	}
	w.start(first)
	if err := first.WaitReady(w.ctx()); err != nil {
		t.Fatal(err)
	}
	w.announce(first, control.NodeActive)
	return w
}

func (w *world) ctx() context.Context {
	ctx, cancel := context.WithTimeout(context.Background(), testTimeout)
	w.t.Cleanup(cancel)
	return ctx
}

// newServer makes a server that does not run yet, at an address of its own.
func (w *world) newServer(address string) *peerServer {
	s := &peerServer{id: ids.Node(ids.NewMessage(time.Now())), dir: w.t.TempDir(), address: address, halted: make(chan error, 1)}
	s.holder = pki.NewHolder(leaf(w.t, w.authority, pki.RoleControl, s.id, time.Now()), w.authority.Bundle())
	if address == "" {
		probe, err := Listen(StreamOptions{Bind: "127.0.0.1:0", Holder: s.holder, Cluster: w.id, Logger: quiet})
		if err != nil {
			w.t.Fatal(err)
		}
		s.address = probe.Addr().String()
		if err := probe.Close(); err != nil {
			w.t.Fatal(err)
		}
	}
	w.servers = append(w.servers, s)
	return s
}

func (w *world) start(s *peerServer) {
	w.t.Helper()
	st := state.New()
	transport := w.transport
	if transport == mixed { // as in the middle of a switch
		transport = []string{TransportTCP, TransportQUIC}[slices.Index(w.servers, s)%2]
	}
	stream, err := Listen(StreamOptions{Bind: s.address, Advertise: s.address, Transport: transport, Holder: s.holder, Cluster: w.id, Logger: quiet,
		Check: func(dialed string, server ids.Node) error { return CheckServer(st, dialed, server) }})
	if err != nil {
		w.t.Fatal(err)
	}
	c, err := Open(Options{Dir: s.dir, ServerID: s.id.String(), Address: s.address, Stream: stream, State: st, Logger: quiet, Registerer: prometheus.NewRegistry(),
		Halt: func(err error) { s.halted <- err }, Tuning: w.tuning, wrapLogs: s.logs})
	if err != nil {
		w.t.Fatal(err)
	}
	s.Cluster = c
	w.t.Cleanup(func() {
		if s.Cluster == c {
			w.stop(s)
		}
	})
}

func (w *world) stop(s *peerServer) {
	w.t.Helper()
	c := s.Cluster
	s.Cluster = nil
	if err := c.Close(); err != nil {
		w.t.Error(err)
	}
}

// leader waits for a server that leads.
func (w *world) leader() *peerServer {
	w.t.Helper()
	var found *peerServer
	waitFor(w.t, func() bool {
		for _, s := range w.servers {
			if s.Cluster != nil && s.Ready() {
				found = s
			}
		}
		return found != nil
	}, "a leader")
	return found
}

func (w *world) follower() *peerServer {
	w.t.Helper()
	leader := w.leader()
	for _, s := range w.servers {
		if s != leader && s.Cluster != nil {
			return s
		}
	}
	w.t.Fatal("there is no follower")
	return nil
}

// announce writes the row of a server.
func (w *world) announce(s *peerServer, to control.NodeState) {
	w.t.Helper()
	row := control.Server{ID: s.id, Name: "s", RaftAddress: s.address, LinkAddress: s.address, HTTPAddress: s.address, State: to}
	cmd := &command.ServerUpsert{Meta: &command.Meta{Actor: "test"}, Server: command.ServerRecord(&row)}
	if old := w.leader().state.Read().Server(s.id); old != nil {
		cmd.Expect = old.Revision
	}
	w.propose(cmd)
}

// propose repeats a change while there is no leader.
func (w *world) propose(cmd command.Command) state.Result {
	w.t.Helper()
	var result state.Result
	waitFor(w.t, func() bool {
		var err error
		result, err = w.leader().Propose(w.ctx(), cmd)
		if err != nil && !errors.Is(err, control.ErrNoLeader) {
			w.t.Fatal(err)
		}
		return err == nil
	}, "the change to be made")
	return result
}

// join adds a server and waits until it follows.
func (w *world) join(address string) *peerServer {
	w.t.Helper()
	s := w.newServer(address)
	w.announce(s, control.NodePending)
	w.start(s)
	if err := s.Attach(w.ctx(), w.addresses()); err != nil {
		w.t.Fatal(err)
	}
	if err := s.WaitFresh(w.ctx()); err != nil {
		w.t.Fatal(err)
	}
	return s
}

func (w *world) addresses() (out []string) {
	for _, s := range w.servers {
		out = append(out, s.address)
	}
	return out
}

func (w *world) voters() int {
	members, err := w.leader().Members(w.ctx())
	if err != nil {
		return -1
	}
	n := 0
	for _, m := range members {
		if m.Voter {
			n++
		}
	}
	return n
}

// agree waits until all running servers have the state of the leader.
func (w *world) agree() {
	w.t.Helper()
	waitFor(w.t, func() bool {
		want := w.leader().state.Read()
		for _, s := range w.servers {
			if s.Cluster != nil && (s.state.Read().Index() != want.Index() || s.state.Read().Hash() != want.Hash()) {
				return false
			}
		}
		return true
	}, "the servers to agree")
}

// mixed is a cluster in which every second server dials over QUIC.
const mixed = "mixed"

// transports runs a test over both transports, and over a mixture.
func transports(t *testing.T, test func(t *testing.T, transport string)) {
	for _, transport := range []string{TransportTCP, TransportQUIC, mixed} {
		t.Run(transport, func(t *testing.T) {
			t.Parallel()
			test(t, transport)
		})
	}
}

// TestThreeServers grows a cluster to three, changes it through a follower,
// loses the leader, and brings it back.
func TestThreeServers(t *testing.T) {
	t.Parallel()
	transports(t, func(t *testing.T, transport string) {
		w := newWorld(t, transport, quick)
		second := w.join("")
		waitFor(t, func() bool {
			members, err := w.leader().Members(w.ctx())
			return err == nil && slices.ContainsFunc(members, func(m Member) bool {
				return m.ID == second.id.String() && !m.Since.IsZero() && time.Since(m.Since) > 2*quick.StableFor+4*quick.CheckEvery
			})
		}, "the second server to be stable")
		if n := w.voters(); n != 1 {
			t.Fatalf("%d voters with two servers, want 1", n)
		}
		w.join("")
		waitFor(t, func() bool { return w.voters() == 3 }, "three voters")

		follower := w.follower()
		r, err := follower.Propose(w.ctx(), tenantPut(1, "acme"))
		if err != nil || r.Row.(*control.Tenant).Name != "acme" || follower.state.Read().TenantByName("acme") == nil {
			t.Fatalf("a change through a follower: %+v, %v", r, err)
		}
		if _, err := follower.Propose(w.ctx(), tenantPut(2, "acme")); !fault.Is(err, fault.Exists) {
			t.Errorf("a rule's refusal came through a follower as %v", err)
		}
		w.propose(tenantPut(3, "fenced"))
		if err := follower.Fence(w.ctx()); err != nil || follower.state.Read().TenantByName("fenced") == nil {
			t.Errorf("a fenced read on a follower misses a change: %v", err)
		}

		old := w.leader()
		start := time.Now()
		w.stop(old)
		w.propose(tenantPut(4, "after"))
		t.Logf("%s: %s from the leader's stop to the next change", transport, time.Since(start).Round(time.Millisecond))
		w.start(old)
		w.agree()
		if old.state.Read().TenantByName("after") == nil {
			t.Error("the former leader lacks a change")
		}
	})
}

// TestLaggingServerIsFedASnapshot keeps a follower away until the log it needs
// is gone.
func TestLaggingServerIsFedASnapshot(t *testing.T) {
	t.Parallel()
	transports(t, func(t *testing.T, transport string) {
		tuning := quick
		tuning.TrailingLogs, tuning.SnapshotThreshold, tuning.SnapshotInterval = 8, 16, 50*time.Millisecond
		w := newWorld(t, transport, tuning)
		w.join("")
		w.join("")
		waitFor(t, func() bool { return w.voters() == 3 }, "three voters")
		away := w.follower()
		w.stop(away)
		for i := range 200 {
			w.propose(tenantPut(1+i, fmt.Sprint("t", i)))
		}
		w.agree()
		for _, s := range w.servers { // whoever will lead
			if s == away {
				continue
			}
			if err := s.Snapshot(); err != nil {
				t.Fatal(err)
			}
			first, err := s.stores.logs.FirstIndex()
			if err != nil || first < 100 {
				t.Fatalf("a log still begins at %d (%v)", first, err)
			}
		}
		for _, s := range w.servers { // what is cached of the log is gone, too
			if s != away {
				w.stop(s)
				w.start(s)
			}
		}
		w.start(away)
		w.agree()
		if snaps, err := filepath.Glob(filepath.Join(away.dir, "raft", "snapshots", "*")); err != nil || len(snaps) == 0 {
			t.Errorf("no snapshot was installed: %v", err)
		}
		if _, err := away.Propose(w.ctx(), tenantPut(900, "through")); err != nil {
			t.Errorf("after the snapshot: %v", err)
		}
	})
}

// TestServersComeAndGo takes a cluster 1 -> 3 -> 5 -> 3 -> 1 and replaces a
// server whose disk was lost.
func TestServersComeAndGo(t *testing.T) {
	t.Parallel()
	w := newWorld(t, TransportTCP, quick)
	for range 2 {
		w.join("")
	}
	waitFor(t, func() bool { return w.voters() == 3 }, "three voters")
	lost := w.follower()
	w.stop(lost)
	replacement := w.join(lost.address)
	waitFor(t, func() bool { return w.voters() == 3 }, "three voters after the replacement")
	if row := w.leader().state.Read().Server(lost.id); row.State != control.NodeEvicted {
		t.Errorf("the lost server is %s", row.State)
	}
	w.join("")
	if n := w.voters(); n != 3 {
		t.Errorf("%d voters with four servers, want 3", n)
	}
	w.join("")
	waitFor(t, func() bool { return w.voters() == 5 }, "five voters")
	for want := 3; want >= 1; want -= 2 {
		for range 2 {
			w.announce(w.follower(), control.NodeEvicted)
			gone := w.follower()
			waitFor(t, func() bool {
				members, err := w.leader().Members(w.ctx())
				return err == nil && !slices.ContainsFunc(members, func(m Member) bool { return m.ID == gone.id.String() })
			}, "the server to be removed")
			waitFor(t, func() bool { return gone.Health() != nil }, "the removed server to say so")
			w.stop(gone)
		}
		waitFor(t, func() bool { return w.voters() == want }, fmt.Sprint(want, " voters"))
	}
	w.propose(tenantPut(1, "last"))
	_ = replacement
}

// TestARemovedServerIsRefused tries what a server may not do any more.
func TestARemovedServerIsRefused(t *testing.T) {
	t.Parallel()
	w := newWorld(t, TransportTCP, quick)
	s := w.join("")
	w.announce(s, control.NodeEvicted)
	waitFor(t, func() bool {
		members, err := w.leader().Members(w.ctx())
		return err == nil && len(members) == 1
	}, "the server to be removed")
	w.stop(s)
	w.start(s)
	ctx, cancel := context.WithTimeout(context.Background(), testTimeout)
	defer cancel()
	out, err := s.peers.ask(ctx, w.servers[0].address, "status", nil)
	if err == nil && (out.Error == nil || !strings.Contains(out.Error.Text, "removed")) {
		t.Errorf("a removed server was answered: %+v", out)
	}
	stranger := w.newServer("")
	w.start(stranger)
	if err := stranger.Attach(ctx, []string{w.servers[0].address}); !fault.Is(err, fault.Denied) {
		t.Errorf("a server without a row follows: %v", err)
	}
}

// TestANewLeaderKnowsWhoAnswers asks for the members in the moment in which the
// lead has changed: nobody is to be taken for dead.
func TestANewLeaderKnowsWhoAnswers(t *testing.T) {
	t.Parallel()
	slow := quick
	slow.CheckEvery = time.Second
	w := newWorld(t, TransportTCP, slow)
	w.join("")
	w.join("")
	waitFor(t, func() bool { return w.voters() == 3 }, "three voters")
	for range 3 {
		old := w.leader()
		if err := old.raft.LeadershipTransfer().Error(); err != nil {
			t.Fatal(err)
		}
		var next *peerServer
		waitFor(t, func() bool {
			for _, s := range w.servers {
				if s != old && s.Ready() {
					next = s
				}
			}
			return next != nil
		}, "another leader")
		members, err := next.Members(w.ctx())
		if err != nil || len(members) != 3 {
			t.Fatalf("%+v, %v", members, err)
		}
		for _, m := range members {
			if !m.Alive {
				t.Errorf("%s is said not to answer", m.ID)
			}
		}
	}
}

// TestAServerRemovedWhileOffIsTold removes a voter that does not run: when it
// comes back it must say why nobody talks to it.
func TestAServerRemovedWhileOffIsTold(t *testing.T) {
	t.Parallel()
	w := newWorld(t, TransportTCP, quick)
	w.join("")
	s := w.join("")
	waitFor(t, func() bool { return w.voters() == 3 }, "three voters")
	w.stop(s)
	w.announce(s, control.NodeEvicted)
	waitFor(t, func() bool {
		members, err := w.leader().Members(w.ctx())
		return err == nil && len(members) == 2
	}, "the server to be removed")
	w.start(s)
	waitFor(t, func() bool {
		err := s.Health()
		return err != nil && strings.Contains(fault.Public(err), "refuse this one") && strings.Contains(fault.Public(err), "join anew")
	}, "the server to say that the others refuse it")
}

// TestPeersAreCheckedBothWays lets certificates of others try the raft port.
func TestPeersAreCheckedBothWays(t *testing.T) {
	t.Parallel()
	transports(t, func(t *testing.T, transport string) {
		if transport == mixed {
			return // both were tried
		}
		w := newWorld(t, transport, quick)
		target := w.servers[0].address
		elsewhere := newAuthority(t, ids.Cluster{2}, time.Now())
		for name, holder := range map[string]*pki.Holder{
			"a relay":         pki.NewHolder(leaf(t, w.authority, pki.RoleRelay, ids.Node{9}, time.Now()), w.authority.Bundle()),
			"another cluster": pki.NewHolder(leaf(t, elsewhere, pki.RoleControl, ids.Node{8}, time.Now()), w.authority.Bundle()),
		} {
			stream, err := Listen(StreamOptions{Bind: "127.0.0.1:0", Transport: transport, Holder: holder, Cluster: w.id, Logger: quiet})
			if err != nil {
				t.Fatal(err)
			}
			conn, err := stream.Dial(raft.ServerAddress(target), 5*time.Second)
			if err == nil {
				// TLS 1.3 tells the client of the refusal at its first read.
				if _, err = conn.Write([]byte{0}); err == nil {
					if err = conn.SetReadDeadline(time.Now().Add(testTimeout)); err == nil {
						_, err = conn.Read(make([]byte, 1))
					}
				}
				_ = conn.Close()
			}
			if err == nil || strings.Contains(err.Error(), "i/o timeout") {
				t.Errorf("the certificate of %s opens the raft port: %v", name, err)
			}
			if err := stream.Close(); err != nil {
				t.Error(err)
			}
		}
	})
}

func TestPlan(t *testing.T) {
	t.Parallel()
	now := time.Now()
	since := now.Add(-time.Minute)
	server := func(id string, voter, alive bool, since time.Time) Member {
		return Member{ID: id, Voter: voter, Alive: alive, Since: since, Leader: id == "L"}
	}
	leader := server("L", true, true, since)
	for _, tc := range []struct {
		name    string
		members []Member
		removed []string
		even    time.Time
		want    []memberChange
	}{
		{"alone", []Member{leader}, nil, time.Time{}, nil},
		{"the second waits", []Member{leader, server("b", false, true, since)}, nil, time.Time{}, nil},
		{"the third promotes both", []Member{leader, server("b", false, true, since), server("c", false, true, since)}, nil, time.Time{}, []memberChange{{id: "b", promote: true}, {id: "c", promote: true}}},
		{"too young", []Member{leader, server("b", false, true, since), server("c", false, true, now.Add(-time.Second))}, nil, time.Time{}, nil},
		{"dead", []Member{leader, server("b", false, true, since), server("c", false, false, since)}, nil, time.Time{}, nil},
		{"half promoted", []Member{leader, server("b", true, true, since), server("c", false, true, since)}, nil, now, []memberChange{{id: "c", promote: true}}},
		{"even for a moment", []Member{leader, server("b", true, true, since)}, nil, now, nil},
		{"even for long", []Member{leader, server("b", true, true, since)}, nil, since, []memberChange{{id: "b", demote: true}}},
		{"the dead one is demoted", []Member{leader, server("b", true, true, since), server("c", true, false, since), server("d", true, true, since)}, nil, since, []memberChange{{id: "c", demote: true}}},
		{"removed", []Member{leader, server("b", true, true, since), server("c", true, true, since)}, []string{"b"}, time.Time{}, []memberChange{{id: "b", remove: true}}},
		{"removal would stop the cluster", []Member{leader, server("b", true, true, since), server("c", true, false, since)}, []string{"b"}, time.Time{}, nil},
		{"a dead one is removed", []Member{leader, server("b", true, true, since), server("c", true, false, since)}, []string{"c"}, time.Time{}, []memberChange{{id: "c", remove: true}}},
	} {
		removed := map[string]bool{}
		for _, id := range tc.removed {
			removed[id] = true
		}
		if got := plan(tc.members, removed, now, stableFor, tc.even, leaveEvenFor); !slices.Equal(got, tc.want) {
			t.Errorf("%s: %+v, want %+v", tc.name, got, tc.want)
		}
	}
}
