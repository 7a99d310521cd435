package e2e

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/relais-mta/relais/shared/lab/fleet"
)

// trio is a fleet with three control servers.
type trio struct {
	*fleet.Fleet
	t       *testing.T
	servers []*fleet.ControlServer
	changes int // that were tried by the command line
}

func startTrio(t *testing.T, cfg fleet.Config) *trio {
	f := &trio{Fleet: start(t, cfg), t: t}
	f.servers = []*fleet.ControlServer{f.FirstServer()}
	for range 2 {
		s, err := f.AddServer(within(t, time.Minute))
		if err != nil {
			t.Fatal(err)
		}
		f.servers = append(f.servers, s)
	}
	f.waitVoters(3)
	return f
}

type serverRow struct {
	ID          string `json:"id"`
	Role        string `json:"role"`
	RaftAddress string `json:"raft_address"`
	Alive       bool   `json:"alive"`
	Problem     string `json:"problem"`
}

// list asks one server who belongs to the cluster.
func (f *trio) list(s *fleet.ControlServer) (rows []serverRow, err error) {
	out, err := f.CtlAt(f.t.Context(), s, "server", "list", "--json")
	if err == nil {
		err = json.Unmarshal(out, &rows)
	}
	return rows, err
}

// waitVoters waits until so many servers vote. One that joined may after 10 s in which
// it followed closely (stableFor of control/cluster), and these begin anew whenever it
// did not; if they last, the leader first makes the number odd, after 30 s (leaveEvenFor).
func (f *trio) waitVoters(want int) {
	f.t.Helper()
	eventually(f.t, 90*time.Second, fmt.Sprint(want, " voters"), func() bool {
		rows, err := f.list(f.servers[0])
		voters := 0
		for _, r := range rows {
			if r.Role == "leader" || r.Role == "voter" {
				voters++
			}
		}
		return err == nil && voters == want
	})
}

// leader returns the server that leads, and one that does not.
func (f *trio) leader() (leads, follows *fleet.ControlServer) {
	f.t.Helper()
	eventually(f.t, time.Minute, "a leader", func() bool {
		leads, follows = nil, nil
		for _, asked := range f.servers {
			if !asked.Alive() {
				continue
			}
			rows, err := f.list(asked)
			if err != nil {
				return false
			}
			for _, r := range rows {
				for _, s := range f.servers {
					if strings.HasPrefix(r.RaftAddress, s.Addr.String()+":") && s.Alive() {
						if r.Role == "leader" {
							leads = s
						} else {
							follows = s
						}
					}
				}
			}
			return leads != nil && follows != nil
		}
		return false
	})
	return leads, follows
}

// raftRound is the longest that raft waits for a heartbeat, or for the votes of a
// round: 1 s (heartbeatTimeout and electionTimeout of control/cluster), and as much
// again by chance.
const raftRound = 2 * time.Second

// failoverLimit is how long after a fault of the leader a change may be made again:
// maxFailover, of which noticing the fault takes up to a raftRound. Candidates that
// stand in the same moment lose that round, and who won one steps down if it did not
// hear a majority in time, as on a machine that is busy. Chance makes both rare and
// nothing makes them impossible: each costs a raftRound more, and is in the logs.
// Besides, a vote, the barrier of who won it, and the change take what three changes
// take without a fault, which is next to nothing but on a machine that is slow: it is
// asked of the server only if the change took more than maxFailover.
func (f *trio) failoverLimit(at *fleet.ControlServer, fault time.Time, took time.Duration) time.Duration {
	f.t.Helper()
	if took <= maxFailover {
		return maxFailover
	}
	most, won := 0, 0
	for _, s := range f.servers {
		log, err := os.ReadFile(s.Log)
		if err != nil && !errors.Is(err, fs.ErrNotExist) { // of one that was not started yet
			f.t.Fatal(err)
		}
		lost := 0
		for line := range bytes.Lines(log) {
			var entry struct {
				Time time.Time
				Msg  string
			}
			if json.Unmarshal(line, &entry) != nil || !entry.Time.After(fault) {
				continue
			}
			switch entry.Msg {
			case "Election timeout reached, restarting election":
				lost++
			case "this server leads", "leadership was not confirmed":
				won++
			}
		}
		most = max(most, lost)
	}
	most += max(0, won-1) // the last of them made the change
	if most > 0 {
		f.t.Logf("rounds of the election that nobody won, or not for long: %d", most)
	}
	begin := time.Now()
	for range 3 {
		f.change(at, "ordinary")
	}
	ordinary := time.Since(begin)
	f.t.Logf("three changes without a fault took %s", ordinary.Round(time.Millisecond))
	return maxFailover + time.Duration(most)*raftRound + time.Duration(1+most)*ordinary
}

// change makes a tenant with such a name by the command line of a server.
func (f *trio) change(at *fleet.ControlServer, name string) {
	f.t.Helper()
	eventually(f.t, time.Minute, "a change at "+at.Name, func() bool {
		f.changes++ // of one that failed nobody knows whether it was made
		_, err := f.CtlAt(f.t.Context(), at, "tenant", "add", fmt.Sprint(name, "-", f.changes))
		return err == nil
	})
}

// TestThreeServersUnderMail loses the leader, everything, and a follower's disk
// while mail goes on.
func TestThreeServersUnderMail(t *testing.T) {
	f := startTrio(t, fleet.Config{Relays: 2, Open: true, NoDKIM: true})
	var submitted []fleet.Submitted
	var stop atomic.Bool
	var sending sync.WaitGroup
	var longest time.Duration
	to := recipients(t, f.Fleet, 40)
	sending.Go(func() {
		for round := 0; !stop.Load(); round++ {
			begin := time.Now()
			batch, err := f.Submit(t.Context(), fleet.Stream{Recipients: to, Size: 2000, Connections: 2, Tag: fmt.Sprint("round", round)})
			if err != nil {
				t.Errorf("mail stopped: %v", err)
				return
			}
			submitted = append(submitted, batch...)
			longest = max(longest, time.Since(begin))
		}
	})
	defer func() { stop.Store(true); sending.Wait() }()

	leads, follows := f.leader()
	for _, s := range f.servers { // a change by any server shows on all of them
		f.change(s, "by-"+s.Name)
	}
	killed := time.Now()
	leads.Kill()
	f.change(follows, "after")
	failover := time.Since(killed)
	t.Logf("the first change was made %s after the leader was killed", failover.Round(time.Millisecond))
	if limit := f.failoverLimit(follows, killed, failover); failover > limit {
		t.Errorf("it took %s, want at most %s", failover, limit)
	}
	if err := f.StartServer(within(t, time.Minute), leads); err != nil {
		t.Fatal(err)
	}
	out, err := f.CtlAt(t.Context(), leads, "tenant", "list")
	if err != nil || !strings.Contains(string(out), "after-") || !strings.Contains(string(out), "by-"+follows.Name) {
		t.Errorf("the former leader lacks changes: %v\n%s", err, out)
	}

	for _, s := range f.servers {
		if err := s.Stop(); err != nil {
			t.Fatal(err)
		}
	}
	if err := f.Launch(within(t, time.Minute), f.servers...); err != nil {
		t.Fatal(err)
	}

	_, lost := f.leader()
	if lost == f.servers[0] { // the fleet's own commands need its directory
		lost = f.servers[1]
		if l, _ := f.leader(); l == lost {
			lost = f.servers[2]
		}
	}
	lost.Kill()
	if err := f.Rejoin(within(t, time.Minute), lost); err != nil {
		t.Fatal(err)
	}
	out, err = f.CtlAt(t.Context(), lost, "tenant", "list")
	if err != nil || !strings.Contains(string(out), "after-") {
		t.Errorf("the server that joined anew lacks changes: %v\n%s", err, out)
	}
	f.waitVoters(3)
	if err := f.WaitApplied(t.Context()); err != nil {
		t.Error(err)
	}

	stop.Store(true)
	sending.Wait()
	a := settle(t, f.Fleet, submitted)
	t.Logf("%d messages answered 250, %d refused, longest batch of %d took %s", a.accepted, a.refused, len(to), longest.Round(time.Millisecond))
	if a.refused > 0 || a.accepted == 0 {
		t.Errorf("%d messages were refused, %d accepted: mail depends on the control plane", a.refused, a.accepted)
	}
}

// TestRefusedJoins tries to make servers of what must not become one.
func TestRefusedJoins(t *testing.T) {
	f := start(t, fleet.Config{})
	bin := filepath.Join(binaries, "relais-control")
	first := f.FirstServer()
	control, _ := token(t, f, "--role", "control")
	relay, _ := token(t, f)
	for _, tc := range []struct{ name, token, dir, want string }{
		{"a used directory", control, first.Dir, "already"},
		{"a directory with something else", control, filepath.Dir(first.Dir), "not empty"},
		{"a relay's token", relay, t.TempDir(), "--role control"},
	} {
		out, err := runText(t, bin, "join", "--token", tc.token, "--data", tc.dir, f.LinkAddr())
		if err == nil || !strings.Contains(out, tc.want) {
			t.Errorf("%s: %v, want a message with %q:\n%s", tc.name, err, tc.want, out)
		}
	}
	other := start(t, fleet.Config{})
	foreign, _ := token(t, other, "--role", "control")
	for _, tc := range []struct {
		name, want string
		args       []string
	}{
		{"a second init in a used directory", "start the server that lives there", []string{"init", "--data", first.Dir, "--advertise", first.Addr.String()}},
		{"a server of one cluster joins another", "of cluster cls_", []string{"join", "--token", foreign, "--data", first.Dir, other.LinkAddr()}},
		{"a token of another cluster", "pin", []string{"join", "--token", foreign, "--data", t.TempDir(), f.LinkAddr()}},
	} {
		if out, err := runText(t, bin, tc.args...); err == nil || !strings.Contains(out, tc.want) {
			t.Errorf("%s: %v, want a message with %q:\n%s", tc.name, err, tc.want, out)
		}
	}
	// A refused join used nothing up.
	dir := t.TempDir()
	if out, err := runText(t, bin, "join", "--token", control, "--data", dir, "--advertise", "127.0.0.1", f.LinkAddr()); err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	kek, err := os.ReadFile(filepath.Join(dir, "identity", "kek.key"))
	if err != nil {
		t.Fatal(err)
	}
	log, err := os.ReadFile(first.Log)
	if err != nil || bytes.Contains(log, bytes.TrimSpace(kek)) {
		t.Errorf("the log of the server holds the key-encryption key (%v)", err)
	}
}

// runText runs a program and returns all it printed.
func runText(t *testing.T, bin string, args ...string) (string, error) {
	t.Helper()
	out, err := exec.CommandContext(within(t, time.Minute), bin, args...).CombinedOutput()
	return string(out), err
}
