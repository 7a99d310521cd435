package e2e

import (
	"encoding/json"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/relais-mta/relais/shared/lab"
	"github.com/relais-mta/relais/shared/lab/fleet"
)

// nodeRow is what `node show --json` tells, as far as these tests look.
type nodeRow struct {
	ID        string `json:"id"`
	State     string `json:"state"`
	Connected bool   `json:"connected"`
}

func showNode(t *testing.T, f *fleet.Fleet, node string, v any) {
	t.Helper()
	out, err := f.Ctl(t.Context(), "node", "show", node, "--json")
	if err != nil {
		t.Fatal(err)
	}
	if err := json.Unmarshal(out, v); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
}

// relayStatus is what the relay says of itself on its admin socket.
type relayStatus struct {
	Node      string `json:"node"`
	Connected bool   `json:"connected"`
	Evicted   bool   `json:"evicted"`
	Problem   string `json:"problem"`
}

func statusOf(r *fleet.Relay) (s relayStatus, err error) {
	out, err := exec.Command(filepath.Join(binaries, "relais-relay"), "status", "--json", "--data", r.Dir).Output()
	if err == nil {
		err = json.Unmarshal(out, &s)
	}
	return s, err
}

// eventually waits for a condition that a process reports.
func eventually(t *testing.T, d time.Duration, what string, condition func() bool) {
	t.Helper()
	ctx := within(t, d)
	tick := time.NewTicker(20 * time.Millisecond)
	defer tick.Stop()
	for !condition() {
		select {
		case <-tick.C:
		case <-ctx.Done():
			t.Fatalf("waited %v in vain: %s", d, what)
		}
	}
}

// TestEvictedRelayStops evicts a relay with mail in its queue: it is
// disconnected within a second, refuses mail, delivers nothing, and stays so
// after a restart. Another, evicted while it is off, is told at its next start.
func TestEvictedRelayStops(t *testing.T) {
	f := start(t, fleet.Config{Relays: 2, Open: true})
	r := f.Relays[0]
	for _, p := range f.Lab.Providers() {
		if err := f.Lab.SetBehaviour(p.Name, lab.Behaviour{Answer: lab.At(lab.PhaseConnect, lab.Answer{Reply: "421 4.3.2 down"})}); err != nil {
			t.Fatal(err)
		}
	}
	if _, err := f.Submit(within(t, time.Minute), fleet.Stream{Recipients: recipients(t, f, 20), Size: 2000, Connections: 4, Tag: "evicted"}); err != nil {
		t.Fatal(err)
	}
	before, err := r.Queue(t.Context())
	if err != nil || before.Waiting == 0 {
		t.Fatalf("nothing waits on the relay: %+v, %v", before, err)
	}
	begin := time.Now()
	if out, err := f.Ctl(t.Context(), "node", "evict", r.Node, "--reason", "stolen"); err != nil || !strings.Contains(string(out), "evicted") {
		t.Fatalf("%s, %v", out, err)
	}
	evicted := time.Now()
	eventually(t, 20*time.Second, "the session is closed", func() bool {
		var n nodeRow
		showNode(t, f, r.Node, &n)
		return n.State == "evicted" && !n.Connected
	})
	// By the server's own word: the commands that look take their time. It looks
	// four times a second whom it may still talk to.
	if took := unlinkedAt(t, f, r.Node, begin).Sub(evicted); took > time.Second {
		t.Errorf("the session was closed after %v, want a second", took)
	}
	refuses := func() {
		t.Helper()
		eventually(t, 20*time.Second, "the relay says that it is evicted", func() bool {
			s, err := statusOf(r)
			return err == nil && s.Evicted && !s.Connected && strings.Contains(s.Problem, "evicted")
		})
		c := dial(t, r.Submission())
		c.startTLS(f.ClientTLS(r))
		c.cmd("EHLO client.test", "250")
		c.cmd("AUTH PLAIN "+plain(f.User, f.Secret), "235")
		if reply := c.cmd("MAIL FROM:<news@"+fleet.Domain+">", "451 4.3.2"); !strings.Contains(reply, "evicted") {
			t.Errorf("the refusal does not say why: %s", reply)
		}
		if ready := get(t, r.Metrics()+"/readyz"); !strings.Contains(ready, "not ready: this relay was evicted") {
			t.Errorf("readyz says %q", ready)
		}
	}
	refuses()
	// The providers are well again; only the other relay may use them.
	for _, p := range f.Lab.Providers() {
		if err := f.Lab.SetBehaviour(p.Name, lab.Behaviour{}); err != nil {
			t.Fatal(err)
		}
	}
	if err := r.Stop(); err != nil {
		t.Fatal(err)
	}
	if err := f.RestartUnready(t.Context(), r); err != nil {
		t.Fatal(err)
	}
	refuses()
	eventually(t, time.Minute, "the other relay delivers", func() bool {
		q, err := f.Relays[1].Queue(t.Context())
		return err == nil && q.Waiting == 0
	})
	checkQuarantine(t, f, r)
	after, err := r.Queue(t.Context())
	if err != nil || after.Waiting != before.Waiting {
		t.Errorf("the queue has %+v, it had %+v: %v", after, before, err)
	}
	checkRejoin(t, f, r)

	off := f.Relays[1]
	if err := off.Stop(); err != nil {
		t.Fatal(err)
	}
	if _, err := f.Ctl(t.Context(), "node", "evict", off.Node); err != nil {
		t.Fatal(err)
	}
	if err := f.RestartUnready(t.Context(), off); err != nil {
		t.Fatal(err)
	}
	eventually(t, 20*time.Second, "the relay that was off is told", func() bool {
		s, err := statusOf(off)
		return err == nil && s.Evicted
	})
}

// unlinkedAt returns when the first server's session with a relay ended, by its
// log, which says so a moment after it shows.
func unlinkedAt(t *testing.T, f *fleet.Fleet, node string, since time.Time) (at time.Time) {
	t.Helper()
	eventually(t, 20*time.Second, "the server to log the end of the session", func() bool {
		text, err := os.ReadFile(f.Control.Log)
		if err != nil {
			t.Fatal(err)
		}
		for line := range strings.Lines(string(text)) {
			var entry struct {
				Time      time.Time
				Msg, Node string
			}
			if json.Unmarshal([]byte(line), &entry) == nil && entry.Msg == "relay unlinked" && entry.Node == node && entry.Time.After(since) {
				at = entry.Time
			}
		}
		return !at.IsZero()
	})
	return at
}

// checkQuarantine looks at the addresses of an evicted relay, and gives one to
// another relay.
func checkQuarantine(t *testing.T, f *fleet.Fleet, r *fleet.Relay) {
	t.Helper()
	address := r.Sources[0].String()
	if out := ctl(t, f, "ip", "list"); !strings.Contains(out, "quarantined: relay relay1.relais.test was evicted: stolen") {
		t.Errorf("ip list says\n%s", out)
	}
	refusedCtl(t, f, "switch that off", "ip", "release", address, "--reason", "wiped")
	refusedCtl(t, f, "--reason", "ip", "release", address, "--old-owner-is-off")
	if out := ctl(t, f, "ip", "release", address, "--old-owner-is-off", "--reason", "wiped"); !strings.Contains(out, "free") {
		t.Errorf("release said\n%s", out)
	}
	// The leader may have done something by itself since.
	if out := ctl(t, f, "audit", "--limit", "20"); !strings.Contains(out, "ip.release") || !strings.Contains(out, "wiped") {
		t.Errorf("the audit tail says\n%s", out)
	}
	if out := ctl(t, f, "ip", "assign", address, "--node", f.Relays[1].Node); !strings.Contains(out, "assigned") {
		t.Errorf("assign said\n%s", out)
	}
}

// checkRejoin lets an evicted machine join again: it is a new node.
func checkRejoin(t *testing.T, f *fleet.Fleet, r *fleet.Relay) {
	t.Helper()
	if err := r.Stop(); err != nil {
		t.Fatal(err)
	}
	tok, _ := token(t, f)
	out, err := command(t, filepath.Join(binaries, "relais-relay"), "join", "--token", tok, f.LinkAddr(), "--data", r.Dir)
	if err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	if err := f.Restart(t.Context(), r); err != nil {
		t.Fatal(err)
	}
	eventually(t, 20*time.Second, "the relay is linked as a new node", func() bool {
		s, err := statusOf(r)
		return err == nil && s.Connected && !s.Evicted && s.Node != r.Node
	})
}

// beside runs a relay from a directory on a port of its own, until the test
// ends. With servers named it links to no other.
func beside(t *testing.T, f *fleet.Fleet, dir string, servers ...string) {
	t.Helper()
	named, err := json.Marshal(servers) // a list of TOML, too
	if err != nil {
		t.Fatal(err)
	}
	if len(servers) == 0 {
		named = []byte("[]")
	}
	text := "[control]\naddresses = " + string(named) + "\n[dns]\nresolvers = [\"" + f.Lab.DNSAddr().String() + "\"]\n[listen]\nsubmission = [\"127.0.0.1:0\"]\nsubmissions = []\ninbound = []\nhandover = []\nmetrics = \"127.0.0.1:0\"\n[lab]\nallow_private = true\n"
	if err := os.WriteFile(filepath.Join(dir, "relay.toml"), []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	cmd := exec.Command(filepath.Join(binaries, "relais-relay"), "serve", "--data", dir)
	log, err := os.Create(filepath.Join(t.TempDir(), "log"))
	if err != nil {
		t.Fatal(err)
	}
	cmd.Stderr = log
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		_ = cmd.Process.Kill()
		_ = cmd.Wait() // it was killed
		_ = log.Close()
		if t.Failed() {
			text, _ := os.ReadFile(log.Name())
			t.Logf("the log of the relay in %s:\n%s", dir, text)
		}
	})
}

// TestClonedMachineIsRefused starts a copy of a relay's identity beside it: the
// copy is refused, both are shown, and the original works on.
func TestClonedMachineIsRefused(t *testing.T) {
	f := start(t, fleet.Config{Open: true})
	r := f.Relays[0]
	dir := t.TempDir()
	if err := os.CopyFS(filepath.Join(dir, "identity"), os.DirFS(filepath.Join(r.Dir, "identity"))); err != nil {
		t.Fatal(err)
	}
	if err := os.Chmod(filepath.Join(dir, "identity", "node.key"), 0o600); err != nil {
		t.Fatal(err)
	}
	beside(t, f, dir)
	copied := &fleet.Relay{Dir: dir}
	eventually(t, 20*time.Second, "the copy says that it is one", func() bool {
		s, err := statusOf(copied)
		return err == nil && !s.Connected && strings.Contains(s.Problem, "copy")
	})
	var n struct {
		nodeRow
		Clone *struct {
			Times int `json:"times"`
		} `json:"clone"`
	}
	showNode(t, f, r.Node, &n)
	if n.Clone == nil || n.Clone.Times == 0 {
		t.Error("node show tells nothing of the copy")
	}
	if s, err := statusOf(r); err != nil || !s.Connected {
		t.Errorf("the original lost its link: %+v, %v", s, err)
	}
	if ready := get(t, r.Metrics()+"/readyz"); !strings.Contains(ready, "ready") || strings.Contains(ready, "not ready") {
		t.Errorf("readyz of the original says %q", ready)
	}
}

// TestPendingRelayWaits joins with a token that needs approval: the relay runs
// without a link until an operator accepts it.
func TestPendingRelayWaits(t *testing.T) {
	f := start(t, fleet.Config{Open: true})
	tok, _ := token(t, f, "--approve", "--name", "late-*")
	dir, out, err := join(t, f, tok, "--name", "late-1", f.LinkAddr())
	if err != nil || !strings.Contains(out, "pending") {
		t.Fatalf("%v\n%s", err, out)
	}
	beside(t, f, dir)
	late := &fleet.Relay{Dir: dir}
	eventually(t, 20*time.Second, "the relay waits for approval", func() bool {
		s, err := statusOf(late)
		return err == nil && !s.Connected && strings.Contains(s.Problem, "node approve")
	})
	if out, err := f.Ctl(t.Context(), "node", "approve", "late-1"); err != nil {
		t.Fatalf("%s, %v", out, err)
	}
	eventually(t, 20*time.Second, "the accepted relay is linked", func() bool { // it asks every two seconds
		s, err := statusOf(late)
		return err == nil && s.Connected
	})
	if _, err := f.Ctl(t.Context(), "node", "approve", f.Relays[0].Node); err != nil {
		t.Errorf("accepting an active relay: %v", err)
	}
}
