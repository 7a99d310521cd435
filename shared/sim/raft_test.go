//go:build !noraft

package sim

import (
	"bytes"
	"crypto/tls"
	"encoding/gob"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"slices"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/hashicorp/raft"
	"google.golang.org/protobuf/proto"

	"github.com/relais-mta/relais/shared/lease"
)

// The second layer: the table, the Grantor and the Holder again, but in a cluster
// of the real Raft, in whose terms, barriers and lost leaderships the first layer
// only believes. Time is that of testing/synctest. Messages between servers go
// through Raft's transport in memory, those of relays over the real link.

// tableFSM is the replicated table of one server.
type tableFSM struct {
	mu      sync.Mutex
	table   *lease.Table
	index   uint64
	refused []string // what the table refused for the limit's sake: I1
}

func newTableFSM(limits []lease.Limit) *tableFSM {
	f := &tableFSM{table: lease.NewTable()}
	for _, l := range limits {
		if err := f.table.PutLimit(l); err != nil {
			panic(err)
		}
	}
	return f
}

func (f *tableFSM) Apply(l *raft.Log) any {
	var tick lease.Tick
	if err := gob.NewDecoder(bytes.NewReader(l.Data)).Decode(&tick); err != nil {
		panic(err)
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	refused := f.table.Apply(&tick)
	f.index = l.Index
	for i := range refused {
		if refused[i].Passes() {
			f.refused = append(f.refused, refused[i].Why)
		}
	}
	for _, l := range f.table.Limits() {
		if sum := f.table.Sum(l.ID); sum.Amount > l.Max || sum.Burst > max(l.Burst, 0) {
			f.refused = append(f.refused, fmt.Sprintf("of limit %d with %d are held %v", l.ID, l.Max, sum))
		}
	}
	return refused
}

var errNoSnapshots = errors.New("logs here are short enough to be kept")

func (f *tableFSM) Snapshot() (raft.FSMSnapshot, error) { return nil, errNoSnapshots }
func (f *tableFSM) Restore(io.ReadCloser) error         { return errNoSnapshots }

// raftServer is a server of the second layer: Raft, and the leader's loop as it has
// to be.
type raftServer struct {
	w     *raftWorld
	id    raft.ServerID
	clock func() lease.Instant
	fsm   *tableFSM
	raft  *raft.Raft
	trans *raft.InmemTransport
	gone  chan struct{}
	done  sync.WaitGroup

	mu      sync.Mutex
	grantor *lease.Grantor
	ending  bool                              // it is about to give the lead away
	out     map[lease.Node]chan proto.Message // to relays that are linked here
	paused  chan struct{}
}

// raftWorld is the servers, the relays, and what was promised.
type raftWorld struct {
	t       *testing.T
	rng     *rand.Rand // under mu
	cfg     lease.Config
	limits  []lease.Limit
	began   time.Time
	mu      sync.Mutex
	servers []*raftServer
	relays  []*raftRelay
	failed  string
	started map[lease.LimitID]int64
	windows map[lease.LimitID]*window
	terms   uint64 // that a Grantor began
	cuts    map[raftPair]time.Time
	links   sync.WaitGroup // everything that links do

	tlsServer, tlsClient *tls.Config
}

func (w *raftWorld) fail(format string, args ...any) {
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.failed == "" {
		w.failed = fmt.Sprintf("%v: ", time.Since(w.began)) + fmt.Sprintf(format, args...)
	}
}

func (w *raftWorld) intN(n int) int {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.rng.IntN(n)
}

// newClock returns a clock that runs faster or slower than time by millionths.
func (w *raftWorld) newClock(ppm int64) func() lease.Instant {
	offset := time.Duration(w.intN(1000)) * time.Hour
	return func() lease.Instant {
		d := time.Since(w.began)
		return lease.Instant(offset + d + time.Duration(int64(d/1000)*ppm/1000))
	}
}

func newRaftWorld(t *testing.T, servers, relays int, limits ...lease.Limit) *raftWorld {
	w := &raftWorld{
		t: t, rng: rand.New(rand.NewPCG(1, 2)), cfg: config(), limits: limits, began: time.Now(),
		started: make(map[lease.LimitID]int64), windows: make(map[lease.LimitID]*window), cuts: make(map[raftPair]time.Time),
	}
	w.configs()
	for range servers {
		w.addServer()
	}
	var members raft.Configuration
	for _, s := range w.servers {
		members.Servers = append(members.Servers, raft.Server{ID: s.id, Address: s.trans.LocalAddr()})
	}
	if err := w.servers[0].raft.BootstrapCluster(members).Error(); err != nil {
		t.Fatal(err)
	}
	for range relays {
		w.addRelay()
	}
	return w
}

func (w *raftWorld) addServer() *raftServer {
	s := &raftServer{w: w, id: raft.ServerID(rune('A' + len(w.servers))), fsm: newTableFSM(w.limits), out: make(map[lease.Node]chan proto.Message), gone: make(chan struct{})}
	s.clock = w.newClock(int64(w.intN(3)-1) * 4000)
	_, s.trans = raft.NewInmemTransportWithTimeout(raft.ServerAddress(s.id), 500*time.Millisecond)
	for _, o := range w.members() {
		s.trans.Connect(o.trans.LocalAddr(), o.trans)
		o.trans.Connect(s.trans.LocalAddr(), s.trans)
	}
	cfg := raft.DefaultConfig()
	cfg.LocalID, cfg.LogOutput, cfg.ShutdownOnRemove = s.id, io.Discard, false
	cfg.MaxAppendEntries, cfg.SnapshotThreshold, cfg.SnapshotInterval = 512, 1<<40, 24*time.Hour
	notify := make(chan bool, 64)
	cfg.NotifyCh = notify
	store := raft.NewInmemStore()
	var err error
	if s.raft, err = raft.NewRaft(cfg, s.fsm, store, store, raft.NewInmemSnapshotStore(), s.trans); err != nil {
		w.t.Fatal(err)
	}
	w.mu.Lock()
	w.servers = append(w.servers, s)
	w.mu.Unlock()
	s.done.Go(func() { s.run(notify) })
	return s
}

// run leads whenever Raft says so.
func (s *raftServer) run(notify <-chan bool) {
	for {
		select {
		case leads := <-notify:
			if leads {
				s.lead()
			}
		case <-s.gone:
			return
		}
	}
}

// lead gives out grants from the barrier of the term on until something is in
// doubt: then it ends, with the term.
func (s *raftServer) lead() {
	term := s.raft.CurrentTerm()
	if s.raft.Barrier(5*time.Second).Error() != nil || s.raft.State() != raft.Leader || s.raft.CurrentTerm() != term {
		s.resign()
		return
	}
	s.mu.Lock()
	s.fsm.mu.Lock()
	g := lease.NewGrantor(s.w.cfg, s.fsm.table, 1, term, s.clock())
	s.fsm.mu.Unlock()
	s.grantor, s.ending = g, false
	s.mu.Unlock()
	s.w.mu.Lock()
	s.w.terms++
	s.w.mu.Unlock()
	for s.turn(g) {
		select {
		case <-time.After(tickEvery):
		case <-s.gone:
			return
		}
	}
	s.mu.Lock()
	s.grantor = nil
	s.mu.Unlock()
	s.resign()
}

// turn is one tick, and whether there is another.
func (s *raftServer) turn(g *lease.Grantor) bool {
	s.mu.Lock()
	if s.ending {
		s.mu.Unlock()
		return false
	}
	cmd, grants := g.Tick(s.clock())
	s.mu.Unlock()
	s.tell(nil, grants)
	if cmd == nil {
		return s.raft.State() == raft.Leader
	}
	var data bytes.Buffer
	if err := gob.NewEncoder(&data).Encode(cmd); err != nil {
		panic(err)
	}
	f := s.raft.Apply(data.Bytes(), time.Second)
	if f.Error() != nil {
		return false // it may be applied all the same
	}
	s.pause()
	refused, _ := f.Response().([]lease.Refusal)
	s.mu.Lock()
	welcomes, grants := g.Committed(s.clock(), refused)
	s.mu.Unlock()
	s.tell(welcomes, grants)
	return true
}

// resign gives the lead away, if it is still there.
func (s *raftServer) resign() {
	if s.raft.State() == raft.Leader {
		_ = s.raft.LeadershipTransfer().Error() // who cannot will be found out by the others
	}
}

// pause has the loop stand still where it is while the server is paused.
func (s *raftServer) pause() {
	s.mu.Lock()
	p := s.paused
	s.mu.Unlock()
	if p != nil {
		<-p
	}
}

// stall stops the server's loop for a while, between a commit and its reply, and
// cuts it off from the other servers, so that another one leads.
func (s *raftServer) stall(d time.Duration) {
	p := make(chan struct{})
	s.mu.Lock()
	s.paused = p
	s.mu.Unlock()
	s.w.pass(time.Second) // reports come in, and a command is committed
	s.isolate(true)
	time.AfterFunc(d, func() {
		s.isolate(false)
		s.mu.Lock()
		s.paused = nil
		s.mu.Unlock()
		close(p)
	})
}

// isolate cuts a server off from the others, or connects it again.
func (s *raftServer) isolate(yes bool) {
	s.w.mu.Lock()
	defer s.w.mu.Unlock()
	for _, o := range s.w.servers {
		switch {
		case o == s:
		case yes:
			s.trans.Disconnect(o.trans.LocalAddr())
			o.trans.Disconnect(s.trans.LocalAddr())
		default:
			s.trans.Connect(o.trans.LocalAddr(), o.trans)
			o.trans.Connect(s.trans.LocalAddr(), s.trans)
		}
	}
}

// transfer gives the lead away on purpose: R5.
func (s *raftServer) transfer() {
	s.mu.Lock()
	if s.grantor != nil {
		s.grantor.Stop()
	}
	s.ending = true
	s.mu.Unlock()
}

// members returns all servers, also those that are none any more.
func (w *raftWorld) members() []*raftServer {
	w.mu.Lock()
	defer w.mu.Unlock()
	return slices.Clone(w.servers)
}

func (w *raftWorld) leader() *raftServer {
	for _, s := range w.members() {
		s.mu.Lock()
		leads := s.grantor != nil && s.paused == nil
		s.mu.Unlock()
		if leads && s.raft.State() == raft.Leader {
			return s
		}
	}
	return nil
}

// waitLeader waits until somebody gives out grants.
func (w *raftWorld) waitLeader() *raftServer {
	w.t.Helper()
	for range 600 {
		if s := w.leader(); s != nil {
			return s
		}
		w.pass(100 * time.Millisecond)
	}
	w.t.Fatal("nobody leads for a minute")
	return nil
}

// pass lets time pass, unless a promise is broken.
func (w *raftWorld) pass(d time.Duration) {
	w.t.Helper()
	<-time.After(d)
	w.mu.Lock()
	failed := w.failed
	w.mu.Unlock()
	if failed != "" {
		w.end()
		w.t.Fatal(failed)
	}
}

// end ends everything, and holds what the tables refused against I1.
func (w *raftWorld) end() {
	for _, r := range w.relays {
		close(r.gone)
		r.done.Wait()
		r.mu.Lock()
		r.link.close()
		r.mu.Unlock()
	}
	for _, s := range w.servers {
		close(s.gone)
		s.pause() // until it goes on
		if err := s.raft.Shutdown().Error(); err != nil {
			w.t.Error(err)
		}
		s.done.Wait()
		for _, why := range s.fsm.refused {
			w.t.Errorf("I1: server %s: %s", s.id, why)
		}
	}
	w.links.Wait()
	<-time.After(time.Minute) // sessions have an end of their own
}

// newest returns what a relay may hold, by the table that is furthest.
func (w *raftWorld) newest(n lease.Node, id lease.LimitID) lease.Holding {
	var best *tableFSM
	index := uint64(0)
	for _, s := range w.members() {
		s.fsm.mu.Lock()
		if best == nil || s.fsm.index > index {
			best, index = s.fsm, s.fsm.index
		}
		s.fsm.mu.Unlock()
	}
	best.mu.Lock()
	defer best.mu.Unlock()
	return best.table.Holding(id, n)
}

// raftScenario runs a test in a bubble of its own.
func raftScenario(t *testing.T, servers, relays int, do func(*testing.T, *raftWorld)) {
	synctest.Test(t, func(t *testing.T) {
		w := newRaftWorld(t, servers, relays, rateOf(20, 20), lease.Limit{ID: 2, Kind: lease.Slots, Max: 10})
		w.waitLeader()
		w.pass(15 * time.Second)
		do(t, w)
		w.end()
		t.Logf("%v, %d terms, %d events", time.Since(w.began).Round(time.Second), w.terms, w.started[1])
	})
}

// sent returns how many events of the rate were started during something, and how
// many could have been.
func (w *raftWorld) sent(do func()) (sent, could int64) {
	w.mu.Lock()
	before, began := w.started[1], time.Now()
	w.mu.Unlock()
	do()
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.started[1] - before, int64(time.Since(began).Seconds()) * 20
}

// Test04RaftTransfers: the real Raft gives the lead away a hundred times under load.
func Test04RaftTransfers(t *testing.T) {
	raftScenario(t, 3, 4, func(t *testing.T, w *raftWorld) {
		sent, could := w.sent(func() {
			for range 100 {
				w.waitLeader().transfer()
				w.pass(3 * time.Second)
			}
		})
		if sent < could*4/10 {
			t.Errorf("%d of %d events were started meanwhile", sent, could)
		}
		if w.terms < 90 {
			t.Errorf("only %d terms", w.terms)
		}
	})
}

// Test01RaftLeaderStalls: a leader stands still between a commit and its reply,
// longer than any lease or not, while another one leads; then it goes on.
func Test01RaftLeaderStalls(t *testing.T) {
	raftScenario(t, 3, 4, func(t *testing.T, w *raftWorld) {
		sent, could := w.sent(func() {
			for i := range 20 {
				w.waitLeader().stall(time.Duration(i%10+1) * 4 * time.Second)
				w.pass(30 * time.Second)
			}
		})
		if sent < could*4/10 {
			t.Errorf("%d of %d events were started meanwhile", sent, could)
		}
	})
}

// Test24RaftMembership: servers come and go, 3 to 5 to 3, the leader too, while
// others are cut off at each step.
func Test24RaftMembership(t *testing.T) {
	raftScenario(t, 3, 4, func(t *testing.T, w *raftWorld) {
		change := func(what func(*raft.Raft) raft.IndexFuture) {
			for range 100 {
				if what(w.waitLeader().raft).Error() == nil {
					return
				}
				w.pass(500 * time.Millisecond)
			}
			t.Fatal("the members cannot be changed")
		}
		cut := func() {
			all := w.members()
			s := all[w.intN(len(all))]
			s.isolate(true)
			w.pass(8 * time.Second)
			s.isolate(false)
			w.pass(4 * time.Second)
		}
		sent, could := w.sent(func() {
			for range 2 {
				s := w.addServer()
				change(func(r *raft.Raft) raft.IndexFuture { return r.AddVoter(s.id, s.trans.LocalAddr(), 0, time.Second) })
				cut()
			}
			for range 2 {
				leader := w.waitLeader()
				change(func(r *raft.Raft) raft.IndexFuture { return r.RemoveServer(leader.id, 0, time.Second) })
				cut()
			}
		})
		if sent < could*3/10 {
			t.Errorf("%d of %d events were started meanwhile", sent, could)
		}
	})
}

// Test05RaftPartitions: relays and servers are cut off from each other at random.
func Test05RaftPartitions(t *testing.T) {
	raftScenario(t, 3, 5, func(t *testing.T, w *raftWorld) {
		for range 60 {
			switch s, r := w.servers[w.intN(3)], w.relays[w.intN(5)]; w.intN(4) {
			case 0:
				s.isolate(true)
				time.AfterFunc(time.Duration(w.intN(20))*time.Second, func() { s.isolate(false) })
			case 1:
				w.cut(r, s, time.Duration(w.intN(40))*time.Second)
			case 2:
				for _, o := range w.servers {
					w.cut(r, o, time.Duration(w.intN(40))*time.Second)
				}
			case 3:
				r.restart()
			}
			w.pass(time.Duration(w.intN(8000)) * time.Millisecond)
		}
		w.pass(time.Minute)
		// Messages that take seconds cost some of a minute more than others: of many, nine
		// tenths are started, give or take a few hundredths.
		if sent, could := w.sent(func() { w.pass(5 * time.Minute) }); sent < could*8/10 {
			t.Errorf("after it all %d of %d events are started in five minutes", sent, could)
		}
	})
}
