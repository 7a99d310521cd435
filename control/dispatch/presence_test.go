package dispatch

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net/netip"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/relais-mta/relais/control"
	"github.com/relais-mta/relais/shared/fault"
	"github.com/relais-mta/relais/shared/ids"
	"github.com/relais-mta/relais/shared/link"
	"github.com/relais-mta/relais/shared/pki/pkitest"
)

func (n *nodes) ClonesElsewhere(clones map[ids.Node]Clone) {
	n.mu.Lock()
	defer n.mu.Unlock()
	n.elsewhere = clones
}

// mesh connects the servers of a test; requests travel as bytes.
type mesh struct {
	mu      sync.Mutex
	servers map[ids.Node]*Server
	leader  ids.Node
	term    uint64
	broken  map[ids.Node]error // why a server cannot be asked
}

type meshEnd struct {
	mesh *mesh
	self ids.Node
}

func (e meshEnd) Term() (uint64, bool) {
	e.mesh.mu.Lock()
	defer e.mesh.mu.Unlock()
	return e.mesh.term, e.mesh.leader == e.self && e.mesh.broken[e.self] == nil
}

func (e meshEnd) Servers() (all []ids.Node) {
	e.mesh.mu.Lock()
	defer e.mesh.mu.Unlock()
	for id := range e.mesh.servers {
		all = append(all, id)
	}
	return all
}

func (e meshEnd) AskLeader(ctx context.Context, what string, in, out any) error {
	e.mesh.mu.Lock()
	leader := e.mesh.leader
	e.mesh.mu.Unlock()
	if leader == e.self || leader.IsZero() {
		return fault.Wrap(control.ErrNoLeader, fault.Unavailable, "test", "no leader")
	}
	return e.AskServer(ctx, leader, what, in, out)
}

func (e meshEnd) AskServer(ctx context.Context, to ids.Node, what string, in, out any) error {
	e.mesh.mu.Lock()
	server, err := e.mesh.servers[to], errors.Join(e.mesh.broken[to], e.mesh.broken[e.self])
	e.mesh.mu.Unlock()
	if err != nil {
		return err
	}
	body, err := json.Marshal(in)
	if err != nil {
		return err
	}
	answer, err := server.Requests()[what](ctx, e.self, body)
	if err != nil {
		return err
	}
	if body, err = json.Marshal(answer); err != nil {
		return err
	}
	return json.Unmarshal(body, out)
}

func (m *mesh) lead(server ids.Node) {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.leader = server
	m.term++
}

func (m *mesh) cut(server ids.Node, err error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.broken[server] = err
}

// newCluster makes servers of one cluster; the first leads, and all report.
func newCluster(t *testing.T, n int) (*mesh, []*world) {
	t.Helper()
	m, ca := &mesh{servers: make(map[ids.Node]*Server), broken: make(map[ids.Node]error)}, pkitest.New(t)
	var worlds []*world
	var running sync.WaitGroup
	ctx, cancel := context.WithCancel(context.Background())
	for i := range n {
		self := pkitest.NewNode()
		w := newWorldOf(t, ca, self, meshEnd{m, self})
		m.servers[self] = w.server
		if i == 0 {
			m.lead(self)
		}
		worlds = append(worlds, w)
	}
	for _, w := range worlds {
		running.Go(func() { w.server.Run(ctx) })
	}
	t.Cleanup(func() { cancel(); running.Wait() })
	return m, worlds
}

func (w *world) self() ids.Node { return w.server.config.Self }

// known reports how many sessions of a node the leader knows of.
func (w *world) known(node ids.Node) int {
	w.server.presence.reg.mu.Lock()
	defer w.server.presence.reg.mu.Unlock()
	return len(w.server.presence.reg.sessions[node])
}

func eventually(t *testing.T, what string, condition func() bool) {
	t.Helper()
	deadline := time.After(patience)
	tick := time.NewTicker(5 * time.Millisecond)
	defer tick.Stop()
	for !condition() {
		select {
		case <-tick.C:
		case <-deadline:
			t.Fatalf("waited in vain: %s", what)
		}
	}
}

// TestCloneAtAnotherServer lets copies of a relay come to every server of three
// while the original is linked to a follower: each is refused, and each server
// shows it.
func TestCloneAtAnotherServer(t *testing.T) {
	_, worlds := newCluster(t, 3)
	node := pkitest.NewNode()
	for _, w := range worlds {
		w.nodes.setState(node, control.NodeActive)
	}
	original := worlds[1].process(node, 5, "original", true)
	if err := original.welcome(); err != nil {
		t.Fatal(err)
	}
	eventually(t, "the leader knows", func() bool { return worlds[0].known(node) == 1 })
	for i, w := range []*world{worlds[2], worlds[0], worlds[1]} {
		for _, incarnation := range []uint64{4, 5, 6} {
			copied := w.process(node, incarnation, fmt.Sprint("copy", i), true)
			if err := copied.welcome(); !fault.Is(err, fault.Conflict) {
				t.Errorf("server %d let a copy of incarnation %d in: %v", i, incarnation, err)
			}
			if got := within(t, w.nodes.clones); got.Holder.Addr() != netip.MustParseAddr("127.0.0.1") {
				t.Errorf("the holder is said to be %v", got)
			}
		}
	}
	for i, w := range worlds {
		eventually(t, fmt.Sprintf("server %d shows the copy", i), func() bool {
			w.nodes.mu.Lock()
			defer w.nodes.mu.Unlock()
			return !w.nodes.elsewhere[node].At.IsZero()
		})
	}
	if original.link.Err() != nil {
		t.Errorf("the original lost its session: %v", original.link.Err())
	}
	// The copy does not get the place the moment the original falls silent, nor
	// when it leaves.
	original.mute.Store(true)
	if err := worlds[0].process(node, 8, "early copy", true).welcome(); !fault.Is(err, fault.Conflict) {
		t.Errorf("a copy while the original keeps silent: %v", err)
	}
	original.link.Close(link.CodeDone, "")
	eventually(t, "the original is gone", func() bool { return worlds[0].known(node) == 0 })
	if err := worlds[0].process(node, 9, "late copy", true).welcome(); !fault.Is(err, fault.Conflict) {
		t.Errorf("a copy right after the original: %v", err)
	}
}

// TestRelayMovesBetweenServers follows a relay that links elsewhere: the same
// process, and after a restart that left its session behind.
func TestRelayMovesBetweenServers(t *testing.T) {
	_, worlds := newCluster(t, 2)
	node := pkitest.NewNode()
	for _, w := range worlds {
		w.nodes.setState(node, control.NodeActive)
	}
	first := worlds[1].process(node, 5, "one", true)
	if err := first.welcome(); err != nil {
		t.Fatal(err)
	}
	eventually(t, "the leader knows", func() bool { return worlds[0].known(node) == 1 })
	moved := worlds[0].process(node, 5, "one", false)
	if err := moved.welcome(); err != nil {
		t.Fatal(err)
	}
	if closed := first.closed(); closed.Code != link.CodeReplaced {
		t.Errorf("the session that was left closed with %v", closed)
	}
	eventually(t, "one session is left", func() bool { return worlds[0].known(node) == 1 })
	// The process is dead, its session is not: it is asked, and does not answer.
	after := worlds[1].process(node, 6, "two", true)
	if err := after.welcome(); err != nil {
		t.Fatal(err)
	}
	if closed := moved.closed(); closed.Code != link.CodeReplaced {
		t.Errorf("the session of the dead process closed with %v", closed)
	}
	if after.link.Err() != nil || len(worlds[0].nodes.clones)+len(worlds[1].nodes.clones) != 0 {
		t.Error("a restart was taken for a clone")
	}
}

// TestLeaderIsGone links relays while nobody leads or answers: they get in. The
// next leader finds the copy within a period, and ends its session alone.
func TestLeaderIsGone(t *testing.T) {
	m, worlds := newCluster(t, 3)
	node := pkitest.NewNode()
	for _, w := range worlds {
		w.nodes.setState(node, control.NodeActive)
	}
	m.lead(ids.Node{})
	original := worlds[1].process(node, 5, "original", true)
	if err := original.welcome(); err != nil {
		t.Fatal(err)
	}
	copied := worlds[2].process(node, 6, "copy", true)
	if err := copied.welcome(); err != nil {
		t.Fatalf("without a leader a relay must be let in: %v", err)
	}
	m.lead(worlds[0].self())
	if closed := copied.closed(); closed.Code != link.CodeReplaced {
		t.Errorf("the copy's session closed with %v", closed)
	}
	within(t, worlds[2].nodes.clones)
	if original.link.Err() != nil {
		t.Errorf("the original lost its session: %v", original.link.Err())
	}
	// A server that is cut off keeps its sessions, and lets relays in.
	node = pkitest.NewNode()
	for _, w := range worlds {
		w.nodes.setState(node, control.NodeActive)
	}
	original = worlds[1].process(node, 5, "original", true)
	if err := original.welcome(); err != nil {
		t.Fatal(err)
	}
	eventually(t, "the leader knows the original", func() bool { return worlds[0].known(node) == 1 })
	m.cut(worlds[1].self(), errors.New("cut off"))
	if err := worlds[1].process(pkitest.NewNode(), 1, "other", true).welcome(); err != nil {
		t.Errorf("a server that is cut off refuses relays: %v", err)
	}
	// Whether the original lives cannot be asked now: its successor waits, and
	// nobody is called a copy.
	if err := worlds[0].process(node, 7, "successor", true).welcome(); !fault.Is(err, fault.Unavailable) || len(worlds[0].nodes.clones) != 0 {
		t.Errorf("a relay whose former server cannot be asked: %v", err)
	}
	if original.link.Err() != nil {
		t.Errorf("the original lost its session: %v", original.link.Err())
	}
	// Where no process listens there is no session.
	m.cut(worlds[1].self(), syscall.ECONNREFUSED)
	if err := worlds[0].process(node, 7, "successor", true).welcome(); err != nil {
		t.Errorf("after the end of the former server: %v", err)
	}
}

// TestSilenceEndsAClaim forgets sessions whose server has told nothing for the
// life of a lease, and what a newer report does not name.
func TestSilenceEndsAClaim(t *testing.T) {
	var r registry
	r.begin(1, time.Now())
	now := time.Now()
	a, b, node, other := pkitest.NewNode(), pkitest.NewNode(), pkitest.NewNode(), pkitest.NewNode()
	r.put(a, Claim{Node: node, Nonce: []byte("x"), Incarnation: 1}, 1, now)
	r.put(a, Claim{Node: other, Nonce: []byte("y"), Incarnation: 1}, 1, now)
	r.settle(a, 1, now)
	mine := r.put(b, Claim{Node: node, Nonce: []byte("z"), Incarnation: 2}, 1, now.Add(time.Second))
	if k, found := r.against(mine, now.Add(time.Second)); !found || k.newer != mine || k.rule() != askOlder {
		t.Errorf("got %+v, %v", k, found)
	}
	if _, found := r.against(mine, now.Add(cloneSilence)); found {
		t.Error("a silent session stands in the way")
	}
	r.put(a, Claim{Node: node, Nonce: []byte("x"), Incarnation: 1}, 2, now.Add(time.Second))
	r.settle(a, 2, now.Add(time.Second))
	if len(r.sessions[other]) != 0 || len(r.sessions[node]) != 2 || r.count != 2 {
		t.Errorf("left are %v", r.sessions)
	}
	r.settle(b, 1, now.Add(time.Second+cloneSilence))
	if r.count != 0 || len(r.sessions) != 0 {
		t.Errorf("left are %v", r.sessions)
	}
	r.begin(2, time.Now())
	if r.count != 0 || r.term != 2 {
		t.Error("a new term begins with what the last one knew")
	}
}

// TestRulings decides by the processes' numbers.
func TestRulings(t *testing.T) {
	for name, c := range map[string]struct {
		newer, older Claim
		want         ruling
	}{
		"the same process":        {Claim{Nonce: []byte("a"), Incarnation: 1}, Claim{Nonce: []byte("a"), Incarnation: 1}, endOlder},
		"as many starts":          {Claim{Nonce: []byte("b"), Incarnation: 1}, Claim{Nonce: []byte("a"), Incarnation: 1}, endNewer},
		"fewer starts":            {Claim{Nonce: []byte("b"), Incarnation: 1}, Claim{Nonce: []byte("a"), Incarnation: 2}, endNewer},
		"more starts":             {Claim{Nonce: []byte("b"), Incarnation: 3}, Claim{Nonce: []byte("a"), Incarnation: 2}, askOlder},
		"an old relay restarted":  {Claim{Incarnation: 3}, Claim{Incarnation: 2}, endOlder},
		"an old relay left over":  {Claim{Incarnation: 1}, Claim{Incarnation: 2}, endNewer},
		"an old relay's new self": {Claim{Nonce: []byte("a"), Incarnation: 3}, Claim{Incarnation: 2}, endOlder},
	} {
		if got := (conflict{newer: &standing{Claim: c.newer}, older: &standing{Claim: c.older}}).rule(); got != c.want {
			t.Errorf("%s: %d, want %d", name, got, c.want)
		}
	}
}

// TestManySessionsArePaged tells the leader more sessions than a page holds.
func TestManySessionsArePaged(t *testing.T) {
	m, worlds := newCluster(t, 2)
	m.cut(worlds[1].self(), errors.New("not yet"))
	follower := worlds[1].server
	follower.mu.Lock()
	for range 2*maxClaimsPerPage + 1 {
		n := &session{server: follower, node: pkitest.NewNode(), nonce: "process", began: time.Now(), ended: make(chan ending, 1), hello: Hello{Incarnation: 1, Remote: netip.MustParseAddrPort("[2001:db8::1]:65535")}}
		n.heard.Store(time.Now().UnixNano())
		follower.sessions[n.node] = n
	}
	follower.mu.Unlock()
	page := sessionsReport{Claims: follower.claimsHere(time.Now())[:maxClaimsPerPage]}
	if encoded, err := json.Marshal(page); err != nil || len(encoded) > 1<<19 {
		t.Errorf("a page has %d bytes: %v", len(encoded), err)
	}
	m.cut(worlds[1].self(), nil)
	follower.presence.move()
	reg := &worlds[0].server.presence.reg
	eventually(t, "the leader knows them all", func() bool {
		reg.mu.Lock()
		defer reg.mu.Unlock()
		return reg.count == 2*maxClaimsPerPage+1
	})
	follower.mu.Lock()
	clear(follower.sessions)
	follower.mu.Unlock()
	follower.presence.move()
	eventually(t, "the leader forgot them", func() bool {
		reg.mu.Lock()
		defer reg.mu.Unlock()
		return reg.count == 0
	})
}

// TestAReportBegunBeforeAClaim: a report that was gathered before a relay linked
// arrives after the claim of its session, and must not make the leader forget
// it: a copy would be let in meanwhile.
func TestAReportBegunBeforeAClaim(t *testing.T) {
	var r registry
	r.begin(1, time.Now())
	now := time.Now()
	server, node := pkitest.NewNode(), pkitest.NewNode()
	r.put(server, Claim{Node: node, Nonce: []byte("x"), Incarnation: 1}, 0, now)
	r.settle(server, 7, now.Add(claimGrace-time.Millisecond))
	if r.count != 1 {
		t.Error("the claim is forgotten for a report that cannot know of it")
	}
	r.settle(server, 8, now.Add(claimGrace))
	if r.count != 0 {
		t.Error("a claim that no report has ever named is still held")
	}
}
