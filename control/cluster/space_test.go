package cluster

import (
	"errors"
	"fmt"
	"slices"
	"strings"
	"testing"

	"github.com/hashicorp/raft"
	wal "github.com/hashicorp/raft-wal"

	"github.com/relais-mta/relais/shared/fault"
)

// TestTheFirstFailedWriteEndsTheServer: only the end of a server that is closing
// is no failure.
func TestTheFirstFailedWriteEndsTheServer(t *testing.T) {
	t.Parallel()
	for _, tc := range []struct {
		err  error
		ends bool
	}{{nil, false}, {wal.ErrClosed, false}, {fmt.Errorf("shutting down: %w", wal.ErrClosed), false}, {wal.ErrSealed, true}, {errors.New("no space left on device"), true}} {
		var told error
		got := writer{t.TempDir(), func(err error) { told = err }}.check(tc.err)
		if !errors.Is(got, tc.err) || (told != nil) != tc.ends {
			t.Errorf("%v: returned %v, told %v", tc.err, got, told)
		}
		if text := fault.Public(told); tc.ends && (!strings.Contains(text, "MiB free") || !strings.Contains(text, "let this server join again")) {
			t.Errorf("%v: an operator is told %q", tc.err, text)
		}
	}
}

// TestAnUnsoundServerIsShownAndDoesNotLead marks the log of one of three servers
// as damaged and hands it the lead.
func TestAnUnsoundServerIsShownAndDoesNotLead(t *testing.T) {
	t.Parallel()
	w := newWorld(t, TransportTCP, quick)
	w.join("")
	w.join("")
	waitFor(t, func() bool { return w.voters() == 3 }, "three voters")
	leads := w.leader()
	var bad *peerServer
	for _, s := range w.servers {
		if s != leads {
			bad = s
		}
	}
	damage := fault.New(fault.Internal, "test", "the log is damaged: replace the disk")
	unsound := error(damage)
	bad.unsound.Store(&unsound)
	waitFor(t, func() bool {
		return slices.ContainsFunc(w.members(), func(m Member) bool { return m.ID == bad.id.String() && m.Problem == damage.Public })
	}, "its problem in the list")
	elected := make(chan raft.Observation, 1)
	bad.raft.RegisterObserver(raft.NewObserver(elected, false, func(o *raft.Observation) bool {
		state, ok := o.Data.(raft.RaftState)
		return ok && state == raft.Leader
	}))
	term := w.leader().raft.CurrentTerm()
	waitFor(t, func() bool {
		select {
		case <-elected:
			return true
		default: // a transfer that fails is tried again
			_ = w.leader().raft.LeadershipTransferToServer(raft.ServerID(bad.id.String()), raft.ServerAddress(bad.address)).Error()
			return false
		}
	}, "the damaged server to be elected")
	waitFor(t, func() bool {
		return slices.ContainsFunc(w.servers, func(s *peerServer) bool { return s != bad && s.Ready() && s.raft.CurrentTerm() >= term+2 })
	}, "a sound server to lead after it")
	if bad.Ready() {
		t.Error("the damaged server leads")
	}
	w.propose(tenantPut(1, "after"))
}
