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

	"github.com/relais-mta/relais/control"
	"github.com/relais-mta/relais/shared/fault"
	"github.com/relais-mta/relais/shared/ids"
	"github.com/relais-mta/relais/shared/pki"
)

// TestThreeServers grows a cluster to three, changes it through a follower,
// loses the leader, and brings it back.
func TestThreeServers(t *testing.T) {
	t.Parallel()
	transports(t, func(t *testing.T, transport string) {
		w := newWorld(t, transport, quick)
		second := w.join("")
		waitFor(t, func() bool {
			return slices.ContainsFunc(w.members(), func(m Member) bool {
				return m.ID == second.id.String() && !m.Since.IsZero() && time.Since(m.Since) > 2*quick.StableFor+4*quick.CheckEvery
			})
		}, "the second server to be stable")
		if n := w.voters(); n != 1 {
			t.Fatalf("%d voters with two servers, want 1", n)
		}
		w.join("")
		waitFor(t, func() bool { return w.voters() == 3 }, "three voters")

		follower := w.follower()
		r, err := w.proposeAt(follower, tenantPut(1, "acme"))
		if err != nil || r.Row.(*control.Tenant).Name != "acme" || follower.state.Read().TenantByName("acme") == nil {
			t.Fatalf("a change through a follower: %+v, %v", r, err)
		}
		if _, err := w.proposeAt(follower, tenantPut(2, "acme")); !fault.Is(err, fault.Exists) {
			t.Errorf("a rule's refusal came through a follower as %v", err)
		}
		w.propose(tenantPut(3, "fenced"))
		waitFor(t, func() bool { return follower.Fence(w.ctx()) == nil }, "a fence")
		if follower.state.Read().TenantByName("fenced") == nil {
			t.Error("a fenced read on a follower misses a change")
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
		if _, err := w.proposeAt(away, tenantPut(900, "through")); err != nil {
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
			gone := w.follower()
			w.announce(gone, control.NodeEvicted)
			waitFor(t, func() bool {
				return !slices.ContainsFunc(w.members(), func(m Member) bool { return m.ID == gone.id.String() })
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
	waitFor(t, func() bool { return len(w.members()) == 1 }, "the server to be removed")
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
	// A server that takes longer than statusTimeout does not answer: where the machine
	// stood still meanwhile nothing is learned, and it is tried again.
	answers := func(ask func() ([]Member, error)) (asked bool) {
		start := time.Now()
		members, err := ask()
		if time.Since(start) >= statusTimeout || errors.Is(err, control.ErrNoLeader) {
			return false
		}
		if err != nil || len(members) != 3 {
			t.Fatalf("%+v, %v", members, err)
		}
		for _, m := range members {
			if !m.Alive {
				t.Errorf("%s is said not to answer", m.ID)
			}
		}
		return true
	}
	for range 3 {
		waitFor(t, func() bool {
			next := w.transfer(nil)
			return answers(func() ([]Member, error) { return next.Members(w.ctx()) })
		}, "a new leader to tell of the others")
	}
	// The leader's own look at the members has heard one of them, and the other not yet.
	waitFor(t, func() bool {
		leader := w.leader()
		return answers(func() ([]Member, error) {
			leader.roster.mu.Lock()
			for id := range leader.roster.heard {
				delete(leader.roster.heard, id)
				break
			}
			leader.roster.mu.Unlock()
			return leader.members()
		})
	}, "the leader to tell of one that it had not heard")
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
	waitFor(t, func() bool { return len(w.members()) == 2 }, "the server to be removed")
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
