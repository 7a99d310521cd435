package e2e

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"net/http"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/relais-mta/relais/shared/lab/fleet"
)

const (
	maxFailover   = 5 * time.Second // from a fault of the leader to the next change by the command line
	attemptLimit  = 4 * time.Second // for one run of the command line
	leaderPause   = 30 * time.Second
	historyKeys   = 8
	historyPace   = 40 * time.Millisecond
	serverDisk    = 384 << 20 // of a server: log, snapshots, and what the file system needs
	fillerPolicy  = 200 << 10 // bytes of a policy that fills the log
	maxFillerPuts = 200
)

// ordeal is a cluster of three under mail, with a history of what its clients
// did and saw.
type ordeal struct {
	*trio
	mail    *flow
	history *history
	acked   []string // tenants whose making was acknowledged
	n       int
}

func startOrdeal(t *testing.T, f *trio) *ordeal {
	t.Helper()
	return &ordeal{trio: f, mail: startFlow(t, f.Fleet), history: startHistory(t, f, historyKeys, historyPace)}
}

// write makes changes with the command line of a server until one is
// acknowledged, and returns how long that took from the fault.
func (o *ordeal) write(at *fleet.ControlServer, fault time.Time) time.Duration {
	o.t.Helper()
	eventually(o.t, time.Minute, "a change at "+at.Name, func() bool {
		o.n++
		name := fmt.Sprint("acked", o.n)
		ctx, cancel := context.WithTimeout(o.t.Context(), attemptLimit)
		defer cancel()
		if _, err := o.CtlAt(ctx, at, "tenant", "add", name); err != nil {
			return false
		}
		o.acked = append(o.acked, name)
		return true
	})
	return time.Since(fault)
}

// failover is write after a fault of the leader.
func (o *ordeal) failover(what string, at *fleet.ControlServer, fault time.Time) {
	o.t.Helper()
	took := o.write(at, fault)
	o.t.Logf("%s: the command line changed something again after %s", what, took.Round(time.Millisecond))
	if limit := o.failoverLimit(at, fault, took); took > limit {
		o.t.Errorf("%s: it took %s until something could be changed, want at most %s", what, took, limit)
	}
}

// survived says how mail did during a fault.
func (o *ordeal) survived(what string) {
	o.t.Helper()
	o.t.Logf("%s: the longest pause between arrivals of mail was %s", what, o.mail.pause())
}

// check ends mail and history; every acknowledged change must be on every server.
func (o *ordeal) check() {
	o.t.Helper()
	o.history.check()
	o.mail.check()
	for _, s := range o.servers {
		eventually(o.t, 20*time.Second, "all changes at "+s.Name, func() bool { return o.missing(s) == "" })
	}
	o.t.Logf("%d changes by the command line were acknowledged, each is on every server", len(o.acked))
}

// missing names an acknowledged change that a server does not show.
func (o *ordeal) missing(at *fleet.ControlServer) string {
	out, err := o.CtlAt(o.t.Context(), at, "tenant", "list", "--json")
	var rows []struct{ Name string }
	if err == nil {
		err = json.Unmarshal(out, &rows)
	}
	if err != nil {
		return err.Error()
	}
	have := make(map[string]bool, len(rows))
	for _, r := range rows {
		have[r.Name] = true
	}
	for _, name := range o.acked {
		if !have[name] {
			return name
		}
	}
	return ""
}

// waitProblem waits until `server list`, asked of one server, says text of another.
func (o *ordeal) waitProblem(asked, of *fleet.ControlServer, text string) {
	o.t.Helper()
	var last string
	defer func() {
		if o.t.Failed() {
			o.t.Logf("%s says of %s: %q", asked.Name, of.Name, last)
		}
	}()
	eventually(o.t, 30*time.Second, fmt.Sprintf("%q said of %s", text, of.Name), func() bool {
		row, ok := o.row(asked, of)
		last = row.Problem
		return ok && (text == "" && row.Problem == "" || text != "" && strings.Contains(row.Problem, text))
	})
}

// row is what one server says of another.
func (f *trio) row(asked, of *fleet.ControlServer) (serverRow, bool) {
	rows, err := f.list(asked)
	i := slices.IndexFunc(rows, func(r serverRow) bool { return strings.HasPrefix(r.RaftAddress, of.Addr.String()+":") })
	if err != nil || i < 0 {
		return serverRow{}, false
	}
	return rows[i], true
}

// logged waits until a server's log has the text.
func logged(t *testing.T, s *fleet.ControlServer, text string) {
	t.Helper()
	loggedBehind(t, s, 0, text)
}

// loggedBehind waits until a server's log has the text behind what it had before.
func loggedBehind(t *testing.T, s *fleet.ControlServer, before int64, text string) {
	t.Helper()
	eventually(t, 20*time.Second, fmt.Sprintf("%q in the log of %s", text, s.Name), func() bool {
		log, err := os.ReadFile(s.Log)
		return err == nil && bytes.Contains(log[min(before, int64(len(log))):], []byte(text))
	})
}

// logSize is how long a server's log is by now.
func logSize(t *testing.T, s *fleet.ControlServer) int64 {
	t.Helper()
	info, err := os.Stat(s.Log)
	if err != nil {
		t.Fatal(err)
	}
	return info.Size()
}

// TestStoppedAndKilledLeaders stops the leader for 30 s, which the others take
// for its death and which it does not notice itself, kills the next one, and
// restarts everything at once.
func TestStoppedAndKilledLeaders(t *testing.T) {
	o := startOrdeal(t, startTrio(t, fleet.Config{Relays: 2, Open: true, NoDKIM: true}))
	paused, follows := o.leader()
	o.write(follows, time.Now())
	o.mail.pause()

	if err := paused.Signal(syscall.SIGSTOP); err != nil {
		t.Fatal(err)
	}
	stopped := time.Now()
	o.failover("SIGSTOP of the leader", follows, stopped)
	o.waitProblem(follows, paused, "does not answer")
	eventually(t, 2*leaderPause, "the pause to be over", func() bool {
		o.write(follows, time.Now())
		return time.Since(stopped) >= leaderPause
	})
	if err := paused.Signal(syscall.SIGCONT); err != nil {
		t.Fatal(err)
	}
	o.write(paused, time.Now())
	// On a busy machine it may be elected again; whoever changed something meanwhile
	// does not take it for the leader of before.
	eventually(t, 20*time.Second, "the former leader to follow", func() bool {
		row, ok := o.row(follows, paused)
		return ok && (row.Role == "voter" || row.Role == "leader") && row.Alive && row.Problem == ""
	})
	o.survived("SIGSTOP of the leader")

	killed, follows := o.leader()
	begin := time.Now()
	killed.Kill()
	o.failover("kill -9 of the leader", follows, begin)
	if err := o.StartServer(within(t, time.Minute), killed); err != nil {
		t.Fatal(err)
	}
	o.survived("kill -9 of the leader")

	for _, s := range o.servers {
		s.Kill()
	}
	if err := o.Launch(within(t, time.Minute), o.servers...); err != nil {
		t.Fatal(err)
	}
	o.write(o.servers[0], time.Now())
	o.survived("end and start of all servers")
	o.waitVoters(3)
	o.check()
}

// TestFullAndBrokenDisks fills the disk of a follower and of a leader, and takes
// a disk away. The server concerned ends and says why; nobody else notices.
func TestFullAndBrokenDisks(t *testing.T) {
	disks := make(map[*fleet.ControlServer]*disk)
	f := &trio{Fleet: start(t, fleet.Config{Relays: 2, Open: true, NoDKIM: true}), t: t}
	f.servers = []*fleet.ControlServer{f.FirstServer()}
	for range 2 {
		d := newDisk(t, serverDisk)
		s, err := f.NewServer(filepath.Join(d.path, "control"))
		if err == nil {
			err = f.JoinServer(within(t, time.Minute), s)
		}
		if err != nil {
			t.Fatal(err)
		}
		f.servers, disks[s] = append(f.servers, s), d
		t.Cleanup(s.Kill) // before its disk is unmounted
	}
	f.waitVoters(3)
	first := f.servers[0]
	first.Kill() // now one on a small disk leads
	leads, follows := f.leader()
	if err := f.StartServer(within(t, time.Minute), first); err != nil {
		t.Fatal(err)
	}
	o := startOrdeal(t, f)
	for _, s := range []*fleet.ControlServer{follows, leads} {
		what := "full disk of a follower"
		if s == leads {
			what = "full disk of the leader"
		}
		filler, before := filepath.Join(disks[s].path, "filler"), logSize(t, s)
		disks[s].fill(filler)
		o.waitProblem(first, s, "MiB free: free space")
		// What the log has allocated can still be written.
		ended := o.fillLog(first, s)
		if s == leads {
			o.failover(what, first, ended)
		} else {
			o.write(first, ended)
		}
		loggedBehind(t, s, before, "cannot be written, its disk has 0 MiB free: this server ends")
		o.waitProblem(first, s, "does not answer")
		o.refusesToStart(s, "needs 32 MiB: free space")
		if err := os.Remove(filler); err != nil {
			t.Fatal(err)
		}
		if err := o.StartServer(within(t, time.Minute), s); err != nil {
			t.Fatal(err)
		}
		o.waitProblem(first, s, "")
		o.survived(what)
	}

	now, _ := o.leader()
	broken, what := now, "broken disk of the leader"
	if broken == first {
		broken, what = leads, "broken disk of a follower"
	}
	before, begin := logSize(t, broken), time.Now()
	disks[broken].cutPower()
	if broken == now {
		o.failover(what, first, begin)
	} else {
		o.write(first, begin)
	}
	eventually(t, 20*time.Second, "the server without a disk to end", func() bool { return !broken.Alive() })
	loggedBehind(t, broken, before, "cannot be written")
	disks[broken].replug()
	if err := o.StartServer(within(t, time.Minute), broken); err != nil {
		t.Fatal(err)
	}
	o.survived(what)
	o.waitVoters(3)
	o.check()
}

// fill takes all space of the disk.
func (d *disk) fill(file string) {
	d.t.Helper()
	var st unix.Statfs_t
	if err := unix.Statfs(d.path, &st); err != nil {
		d.t.Fatal(err)
	}
	// Most of it at once, if nobody has taken some of it since, and what the file
	// system keeps for root and itself as far as it goes: cat ends when there is no
	// space left, which is our aim.
	script := fmt.Sprintf("fallocate -l %d %s; cat /dev/zero >> %s", st.Bavail*uint64(st.Bsize), file, file)
	if out, err := command(d.t, "sh", "-c", script); err == nil || !strings.Contains(out, "No space left") {
		d.t.Fatalf("the disk does not fill up: %v\n%s", err, out)
	}
}

// fillLog makes changes until the server on the full disk needs a new segment
// of its log, and returns when it ended.
func (o *ordeal) fillLog(at, full *fleet.ControlServer) (ended time.Time) {
	o.t.Helper()
	padding := strings.Repeat("# "+strings.Repeat("x", 97)+"\n", fillerPolicy/100)
	taken := 0
	eventually(o.t, 5*time.Minute, full.Name+" to end on its full disk", func() bool {
		if !full.Alive() {
			return true
		}
		if taken < maxFillerPuts { // more than that needs a new segment: its end is only waited for
			if o.putFiller(at, fmt.Sprint("# ", taken, "\n", padding)) {
				taken++
			}
		}
		return false
	})
	return time.Now()
}

// putFiller changes the policy at a server, and reports whether that was done.
func (o *ordeal) putFiller(at *fleet.ControlServer, pools string) bool {
	o.t.Helper()
	body, err := json.Marshal(map[string]any{"sections": map[string]string{"pools": pools}})
	if err != nil {
		o.t.Fatal(err)
	}
	ctx, cancel := context.WithTimeout(o.t.Context(), 10*time.Second)
	defer cancel()
	req, err := http.NewRequestWithContext(ctx, http.MethodPut, "https://"+at.API()+"/api/v1/policy", bytes.NewReader(body))
	if err != nil {
		o.t.Fatal(err)
	}
	req.Header.Set("Authorization", "Bearer "+o.history.key)
	req.Header.Set("Content-Type", "application/json")
	resp, err := o.history.web.Do(req)
	if err != nil {
		return false // the server it was passed on to ended
	}
	defer resp.Body.Close()
	text, _ := io.ReadAll(resp.Body) // half an answer will do, too
	if resp.StatusCode == http.StatusBadRequest || resp.StatusCode == http.StatusUnprocessableEntity {
		o.t.Fatalf("the policy is refused: %s: %s", resp.Status, text)
	}
	return resp.StatusCode == http.StatusOK
}

// refusesToStart starts a server that must end with an exit code and a message,
// as systemd would.
func (f *trio) refusesToStart(s *fleet.ControlServer, want string) {
	f.t.Helper()
	out, err := program(f.t, "relais-control", "serve", "--data", s.Dir)
	if err == nil || !strings.Contains(out, want) {
		f.t.Errorf("%s starts, or does not say %q: %v\n%s", s.Name, want, err, out)
	}
}
