package cluster

import (
	"errors"
	"fmt"
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
		members, err := leads.Members(w.ctx())
		for _, m := range members {
			if m.ID == bad.id.String() && m.Problem == damage.Public {
				return err == nil
			}
		}
		return false
	}, "its problem in the list")
	term := leads.raft.CurrentTerm()
	if err := leads.raft.LeadershipTransferToServer(raft.ServerID(bad.id.String()), raft.ServerAddress(bad.address)).Error(); err != nil {
		t.Fatal(err)
	}
	waitFor(t, func() bool {
		for _, s := range w.servers {
			if s != bad && s.Ready() && s.raft.CurrentTerm() >= term+2 {
				return true
			}
		}
		return false
	}, "a sound server to lead after it")
	if bad.Ready() {
		t.Error("the damaged server leads")
	}
	w.propose(tenantPut(1, "after"))
}
