package cluster

import (
	"context"
	"errors"
	"math/rand/v2"
	"net/netip"
	"slices"
	"sync/atomic"
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
	w.startAlone(first)
	w.announce(first, control.NodeActive)
	return w
}

// startAlone starts the only server, and waits until it leads.
func (w *world) startAlone(s *peerServer) {
	w.t.Helper()
	w.start(s)
	electNow(w.t, s.Cluster)
	if err := s.WaitReady(w.ctx()); err != nil {
		w.t.Fatal(err)
	}
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
		s.address = ownAddress()
	}
	w.servers = append(w.servers, s)
	return s
}

// lastAddress counts addresses up from a random one, so that no other process that
// tests has the same.
var lastAddress atomic.Uint32

func init() { lastAddress.Store(rand.Uint32N(1 << 20)) }

// ownAddress returns a port at a loopback address of 127.96.0.0/12 that nobody else
// uses. A port that the kernel chose may be another program's once its server is
// stopped, and that server could not come back.
func ownAddress() string {
	n := 127<<24 | 96<<16 | lastAddress.Add(1)&(1<<20-1)
	return netip.AddrPortFrom(netip.AddrFrom4([4]byte{byte(n >> 24), byte(n >> 16), byte(n >> 8), byte(n)}), 7444).String()
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

// propose makes a change, whoever leads. It repeats it while there is no leader: on
// a machine that stood still for leaderLeaseTimeout the lead is lost at any moment.
func (w *world) propose(cmd command.Command) {
	w.t.Helper()
	unknown := false
	waitFor(w.t, func() bool {
		_, err := w.leader().Propose(w.ctx(), cmd)
		switch {
		case err == nil, unknown && (fault.Is(err, fault.Exists) || fault.Is(err, fault.Conflict)): // it had been made
			return true
		case errors.Is(err, control.ErrOutcomeUnknown):
			unknown = true
		case !errors.Is(err, control.ErrNoLeader):
			w.t.Fatal(err)
		}
		return false
	}, "the change to be made")
}

// proposeAt makes a change at one server, again while the cluster has no leader. The
// other errors are the test's.
func (w *world) proposeAt(s *peerServer, cmd command.Command) (result state.Result, err error) {
	w.t.Helper()
	waitFor(w.t, func() bool {
		result, err = s.Propose(w.ctx(), cmd)
		return !errors.Is(err, control.ErrNoLeader)
	}, "a leader to take the change")
	return result, err
}

// transfer gives the lead away, to one server or whoever, and returns who leads then.
// Raft gives up a transfer that takes longer than electionTimeout, and then it is
// tried again.
func (w *world) transfer(to *peerServer) *peerServer {
	w.t.Helper()
	old := w.leader()
	next := old
	waitFor(w.t, func() bool {
		for _, s := range w.servers {
			if s.Cluster != nil && s.Ready() && (s == to || to == nil && s != old) {
				next = s
				return true
			}
		}
		switch leads := w.leader(); {
		case to != nil:
			_ = leads.raft.LeadershipTransferToServer(raft.ServerID(to.id.String()), raft.ServerAddress(to.address)).Error()
		case leads == old:
			_ = old.raft.LeadershipTransfer().Error()
		}
		return false
	}, "another server to lead")
	return next
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

// members asks the leader who belongs to the cluster, and the next one if there is
// none any more.
func (w *world) members() (members []Member) {
	w.t.Helper()
	waitFor(w.t, func() bool {
		var err error
		members, err = w.leader().Members(w.ctx())
		return err == nil
	}, "the members to be told")
	return members
}

func (w *world) voters() int {
	w.t.Helper()
	n := 0
	for _, m := range w.members() {
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
