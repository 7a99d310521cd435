package e2e

import (
	"fmt"
	"io"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/relais-mta/relais/shared/lab/fleet"
)

// promotionAge is for how long a server follows closely before it may vote.
const promotionAge = 10 * time.Second

// voters counts who votes, by the word of one server. 0: it does not say.
func (f *trio) voters(asked *fleet.ControlServer) int {
	rows, err := f.list(asked)
	if err != nil {
		return 0
	}
	n := 0
	for _, r := range rows {
		if r.Role == "leader" || r.Role == "voter" {
			n++
		}
	}
	return n
}

// startJoin runs the join of a server. The caller waits for its end.
func (f *trio) startJoin(s *fleet.ControlServer, token string) *exec.Cmd {
	f.t.Helper()
	cmd := exec.CommandContext(f.t.Context(), filepath.Join(binaries, "relais-control"), f.JoinArgs(s, token)...)
	if err := cmd.Start(); err != nil {
		f.t.Fatal(err)
	}
	return cmd
}

// joinKilled runs the join of a server and kills it after a while, several times.
func (f *trio) joinKilled(s *fleet.ControlServer, token string, after ...time.Duration) {
	f.t.Helper()
	for _, d := range after {
		cmd := f.startJoin(s, token)
		timer := time.AfterFunc(d, func() { _ = cmd.Process.Kill() }) // it may have ended
		_ = cmd.Wait()                                                // killed, most likely
		timer.Stop()
	}
}

// joinAgain runs the same command until its end, as the operations page says.
func (f *trio) joinAgain(s *fleet.ControlServer, token string) {
	f.t.Helper()
	out, err := program(f.t, "relais-control", f.JoinArgs(s, token)...)
	if err != nil && !strings.Contains(out, "already: start it with serve") {
		f.t.Fatalf("the join of %s cannot be repeated: %v\n%s", s.Name, err, out)
	}
}

// newServer prepares a further server.
func (f *trio) newServer() (s *fleet.ControlServer, token string) {
	f.t.Helper()
	s, err := f.NewServer("")
	if err == nil {
		token, err = f.ServerToken(f.t.Context())
	}
	if err != nil {
		f.t.Fatal(err)
	}
	return s, token
}

// waitRole waits until a server has a role, by the word of another.
func (f *trio) waitRole(asked, of *fleet.ControlServer, role string) {
	f.t.Helper()
	eventually(f.t, time.Minute, fmt.Sprintf("%s to be a %s", of.Name, role), func() bool {
		row, ok := f.row(asked, of)
		return ok && row.Role == role && row.Alive
	})
}

// bounce kills a server and starts it again.
func (f *trio) bounce(s *fleet.ControlServer) {
	f.t.Helper()
	s.Kill()
	if err := f.StartServer(within(f.t, time.Minute), s); err != nil {
		f.t.Fatal(err)
	}
}

// gone waits until a server that runs no more, or must not, is out of the cluster.
func (f *trio) gone(asked, removed *fleet.ControlServer) {
	f.t.Helper()
	eventually(f.t, 30*time.Second, removed.Name+" to be out of the cluster", func() bool { return f.out(asked, removed) })
}

// out reports whether a server says that another does not belong to the cluster.
func (f *trio) out(asked, removed *fleet.ControlServer) bool {
	rows, err := f.list(asked)
	return err == nil && !slices.ContainsFunc(rows, func(r serverRow) bool { return strings.HasPrefix(r.RaftAddress, removed.Addr.String()+":") })
}

// id finds a server's id, by which it is removed, once the leader hears everybody:
// a server that was started a moment ago counts as off until it was asked again
// (memberCheckPeriod of control/cluster), and nobody may be removed without whom too
// few would answer.
func (f *trio) id(asked, of *fleet.ControlServer) (id string) {
	f.t.Helper()
	eventually(f.t, 30*time.Second, fmt.Sprintf("%s to know %s, and all to answer", asked.Name, of.Name), func() bool {
		rows, err := f.list(asked)
		id = ""
		for _, r := range rows {
			if !r.Alive {
				return false
			}
			if strings.HasPrefix(r.RaftAddress, of.Addr.String()+":") {
				id = r.ID
			}
		}
		return err == nil && id != ""
	})
	return id
}

// says waits until a server says text of its own health.
func says(t *testing.T, s *fleet.ControlServer, text string) {
	t.Helper()
	var last string
	defer func() {
		if t.Failed() {
			t.Logf("%s says of its health:\n%s", s.Name, last)
		}
	}()
	eventually(t, 30*time.Second, fmt.Sprintf("%q in the health of %s", text, s.Name), func() bool {
		last = health(t, s)
		return strings.Contains(last, text)
	})
}

// health returns what a server says of itself.
func health(t *testing.T, s *fleet.ControlServer) string {
	req, err := http.NewRequestWithContext(within(t, 20*time.Second), http.MethodGet, s.Metrics()+"/health", nil)
	if err != nil {
		t.Fatal(err)
	}
	resp, err := http.DefaultClient.Do(req)
	if err != nil {
		return err.Error()
	}
	defer resp.Body.Close()
	text, err := io.ReadAll(resp.Body)
	if err != nil {
		return err.Error()
	}
	return string(text)
}

// TestMembershipUnderCrashes grows a cluster from one server to five and shrinks
// it to three, with somebody killed at each step, under mail and changes.
func TestMembershipUnderCrashes(t *testing.T) {
	f := &trio{Fleet: start(t, fleet.Config{Relays: 2, Open: true, NoDKIM: true}), t: t}
	first := f.FirstServer()
	f.servers = []*fleet.ControlServer{first}
	o := startOrdeal(t, f)
	o.write(first, time.Now())

	// The second server: killed while it joins, and while it begins to follow.
	second, token := f.newServer()
	f.joinKilled(second, token, 15*time.Millisecond, 40*time.Millisecond, 80*time.Millisecond)
	f.joinAgain(second, token)
	if err := second.Spawn(); err != nil {
		t.Fatal(err)
	}
	logged(t, second, `"serving"`)
	f.bounce(second)
	f.waitRole(first, second, "follower")
	follows := time.Now()
	o.write(second, time.Now())

	// The third: the only voter ends while it joins; it may be in by then.
	third, token := f.newServer()
	f.joinKilled(third, token, 30*time.Millisecond)
	joining := f.startJoin(third, token)
	eventually(t, time.Minute, "the join to have begun", func() bool {
		_, err := os.Stat(filepath.Join(third.Dir, "identity"))
		return err == nil
	})
	first.Kill()
	_ = joining.Wait() // it failed, unless it was quicker
	elsewhere := *third
	elsewhere.Dir = t.TempDir() // nothing of a join that was whole before it was killed
	if out, err := program(t, "relais-control", f.JoinArgs(&elsewhere, token)...); err == nil || !strings.Contains(out, first.Addr.String()) {
		t.Errorf("a join without a leader: %v\n%s", err, out)
	}
	if err := f.StartServer(within(t, time.Minute), first); err != nil {
		t.Fatal(err)
	}
	eventually(t, time.Minute, "the second server to have followed for long", func() bool {
		if n := f.voters(first); n > 1 {
			t.Fatalf("%d servers vote, there are two in all", n)
		}
		return time.Since(follows) > promotionAge+2*time.Second
	})
	f.joinAgain(third, token)
	if err := f.StartServer(within(t, time.Minute), third); err != nil {
		t.Fatal(err)
	}
	// Who is promoted first is killed in that moment.
	var promoted *fleet.ControlServer
	eventually(t, time.Minute, "a promotion", func() bool {
		for _, s := range []*fleet.ControlServer{second, third} {
			if row, ok := f.row(first, s); ok && row.Role == "voter" {
				promoted = s
			}
		}
		return promoted != nil
	})
	f.bounce(promoted)
	f.servers = append(f.servers, second, third)
	f.waitVoters(3)
	o.history.use(f.servers...)
	o.write(promoted, time.Now())
	o.survived("1 to 3 servers")

	o.grow()
	o.shrink()
	o.check()
}

// grow adds two servers, and kills the leader when both follow.
func (o *ordeal) grow() {
	o.t.Helper()
	var added []*fleet.ControlServer
	for range 2 {
		s, token := o.newServer()
		o.joinKilled(s, token, 50*time.Millisecond)
		o.joinAgain(s, token)
		if err := o.StartServer(within(o.t, time.Minute), s); err != nil {
			o.t.Fatal(err)
		}
		added = append(added, s)
	}
	leads, follows := o.leader()
	begin := time.Now()
	leads.Kill() // it counted how long they follow
	o.failover("kill -9 of the leader with two joins pending", follows, begin)
	if err := o.StartServer(within(o.t, time.Minute), leads); err != nil {
		o.t.Fatal(err)
	}
	o.servers = append(o.servers, added...)
	o.waitVoters(5)
	o.history.use(o.servers...)
	for _, s := range added {
		o.write(s, time.Now())
	}
	o.survived("3 to 5 servers")
}

// shrink removes a server that is killed meanwhile, and the leader, which is
// killed meanwhile. Then it removes the next leader, which steps down.
func (o *ordeal) shrink() {
	o.t.Helper()
	first := o.servers[0] // the fleet's own commands need its directory
	leads, victim := o.leader()
	if leads == first || victim == first {
		victim = o.other(leads, first)
	}
	id := o.id(leads, victim)
	o.leave(victim)
	victim.Kill()
	if _, err := o.CtlAt(o.t.Context(), leads, "server", "remove", id, "--reason", "killed"); err != nil {
		o.t.Fatal(err)
	}
	o.gone(leads, victim)
	o.write(leads, time.Now())
	if err := victim.Spawn(); err != nil {
		o.t.Fatal(err)
	}
	logged(o.t, victim, "the other servers refuse this one")
	says(o.t, victim, "join anew") // known a moment after it is logged, and not while the others are too busy to refuse

	leads = o.leadElsewhere(first)
	asked := o.other(leads)
	id = o.id(asked, leads)
	o.leave(leads)
	if _, err := o.CtlAt(o.t.Context(), asked, "server", "remove", id, "--reason", "the leader"); err != nil {
		o.t.Fatal(err)
	}
	begin := time.Now()
	leads.Kill()
	o.failover("removal and kill -9 of the leader", asked, begin)
	o.gone(asked, leads)
	o.waitVoters(3)
	o.survived("5 to 3 servers")

	// With one of three off, another one cannot be removed.
	leads, off := o.leader()
	rest := o.other(leads, off)
	id = o.id(leads, rest)
	off.Kill()
	o.waitProblem(leads, off, "does not answer the leader: start it")
	if _, err := o.CtlAt(o.t.Context(), leads, "server", "remove", id); err == nil || !strings.Contains(err.Error(), "bring another server back") {
		o.t.Errorf("a removal that would stop the cluster: %v", err)
	}
	if err := o.StartServer(within(o.t, time.Minute), off); err != nil {
		o.t.Fatal(err)
	}
	o.waitProblem(leads, off, "")

	leads = o.leadElsewhere(first)
	asked = o.other(leads)
	id = o.id(asked, leads)
	o.leave(leads)
	if _, err := o.CtlAt(o.t.Context(), asked, "server", "remove", id); err != nil {
		o.t.Fatal(err)
	}
	// It hands over when it has noticed, and is removed when it knows of it: each
	// change meanwhile is measured, and the last one is made without it.
	eventually(o.t, time.Minute, "changes until the leader is removed", func() bool {
		out := o.out(asked, leads)
		o.failover("removal of the leader", asked, time.Now())
		return out
	})
	says(o.t, leads, "was removed from the cluster")
	if err := leads.Stop(); err != nil {
		o.t.Errorf("the removed leader does not stop well: %v", err)
	}
}

// leave takes a server off the list of those that are asked.
func (o *ordeal) leave(s *fleet.ControlServer) {
	o.servers = slices.DeleteFunc(slices.Clone(o.servers), func(other *fleet.ControlServer) bool { return other == s })
	o.history.use(o.servers...)
}

// other returns a server that is not among these.
func (o *ordeal) other(not ...*fleet.ControlServer) *fleet.ControlServer {
	return o.servers[slices.IndexFunc(o.servers, func(s *fleet.ControlServer) bool { return !slices.Contains(not, s) })]
}

// leadElsewhere restarts the leader until it is another server than this one.
func (o *ordeal) leadElsewhere(than *fleet.ControlServer) *fleet.ControlServer {
	o.t.Helper()
	for {
		leads, _ := o.leader()
		if leads != than {
			return leads
		}
		o.bounce(leads)
	}
}
