package e2e

import (
	"encoding/json"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/relais-mta/relais/shared/lab"
	"github.com/relais-mta/relais/shared/lab/fleet"
)

// program runs one of the two programs and returns what it wrote.
func program(t *testing.T, name string, args ...string) (string, error) {
	t.Helper()
	out, err := exec.CommandContext(within(t, time.Minute), filepath.Join(binaries, name), args...).CombinedOutput()
	return string(out), err
}

// TestRestoreTheControlPlane loses the control server's disk for good, and
// makes the cluster anew from a backup while mail moves.
func TestRestoreTheControlPlane(t *testing.T) {
	f := start(t, fleet.Config{Relays: 2, Sources: 2, Open: true})
	dir := filepath.Dir(f.CAFile)
	advertise, _, err := net.SplitHostPort(f.LinkAddr())
	if err != nil {
		t.Fatal(err)
	}
	file := filepath.Join(t.TempDir(), "backup")
	for _, args := range [][]string{{"backup", file}, {"backup", "verify", file}, {"tenant", "add", "toolate"}} {
		if _, err := f.Ctl(t.Context(), args...); err != nil {
			t.Fatal(err)
		}
	}
	kek := filepath.Join(dir, "identity", "kek.key")
	out, err := program(t, "relais-control", "restore", file, "--data", t.TempDir(), "--advertise", advertise, "--kek", kek)
	if err == nil || !strings.Contains(out, "the cluster lives") {
		t.Errorf("beside a living cluster: %v: %s", err, out)
	}
	if err := f.Control.Stop(); err != nil {
		t.Fatal(err)
	}
	lost := dir + ".lost"
	if err := os.Rename(dir, lost); err != nil {
		t.Fatal(err)
	}
	if err := os.Mkdir(dir, 0o700); err != nil {
		t.Fatal(err)
	}
	conf, err := os.ReadFile(filepath.Join(lost, "control.toml"))
	if err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(dir, "control.toml"), conf, 0o600); err != nil {
		t.Fatal(err)
	}
	submitted, err := f.Submit(within(t, time.Minute), fleet.Stream{Recipients: recipients(t, f, 100), Size: 2000, Connections: 4, Tag: "meanwhile"})
	if err != nil {
		t.Fatal(err)
	}
	if out, err = program(t, "relais-control", "restore", file, "--data", dir, "--advertise", advertise, "--kek", filepath.Join(lost, "identity", "kek.key")); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	if err := f.RestartControl(within(t, time.Minute)); err != nil {
		t.Fatal(err)
	}
	if err := f.WaitApplied(t.Context()); err != nil {
		t.Fatal(err)
	}
	endsRecovery(t, f)
	text, err := f.Ctl(t.Context(), "tenant", "list")
	if err != nil || !strings.Contains(string(text), fleet.Tenant) || strings.Contains(string(text), "toolate") {
		t.Errorf("tenants: %v: %s", err, text)
	}
	for _, r := range f.Relays {
		said := func() int {
			log, err := os.ReadFile(r.Log)
			if err != nil {
				t.Fatal(err)
			}
			return strings.Count(string(log), "the cluster has a new generation")
		}
		// A relay that says which view it holds may not hold one of the new generation yet.
		eventually(t, time.Minute, r.Name+" speaks of the new generation", func() bool { return said() > 0 })
		if n := said(); n != 1 {
			t.Errorf("%s speaks of the new generation %d times, want once", r.Name, n)
		}
	}
	after, err := f.Submit(within(t, time.Minute), fleet.Stream{Recipients: recipients(t, f, 100), Size: 2000, Connections: 4, Tag: "after"})
	if err != nil {
		t.Fatal(err)
	}
	if a := settle(t, f, append(submitted, after...)); a.accepted != 200 {
		t.Errorf("%d of 200 messages accepted", a.accepted)
	}
}

// endsRecovery waits until both relays were heard in recovery mode, and ends it.
func endsRecovery(t *testing.T, f *fleet.Fleet) {
	t.Helper()
	var recovery struct {
		Active     bool     `json:"active"`
		Generation uint64   `json:"generation"`
		Heard      []string `json:"heard"`
		Missing    []string `json:"missing"`
	}
	eventually(t, time.Minute, "all relays to be heard in recovery mode", func() bool {
		text, err := f.Ctl(t.Context(), "recovery", "show", "--json")
		recovery.Heard, recovery.Missing = nil, nil
		if err == nil {
			err = json.Unmarshal(text, &recovery)
		}
		if err != nil {
			t.Fatalf("%v: %s", err, text)
		}
		return !recovery.Active || len(recovery.Heard) == len(f.Relays) && len(recovery.Missing) == 0
	})
	if !recovery.Active {
		// Once all were heard it ends by itself, a minute after it began (control.MinRecovery).
		// Its log has the line after the state has the change.
		logged(t, f.FirstServer(), "recovery mode ended: every active relay was heard")
		return
	}
	if recovery.Generation < 2 {
		t.Errorf("recovery mode: %+v", recovery)
	}
	if _, err := f.Ctl(t.Context(), "recovery", "end", "--reason", "all relays are there"); err != nil {
		t.Error(err)
	}
}

// TestTheQueueOfADeadRelayMovesOn stops a relay with mail in its queue, for
// good, and lets another one deliver that.
func TestTheQueueOfADeadRelayMovesOn(t *testing.T) {
	f := start(t, fleet.Config{Relays: 2, Sources: 2})
	provider := f.Lab.Providers()[slices.IndexFunc(f.Lab.Providers(), func(p lab.ProviderInfo) bool { return len(p.Addrs) > 0 })].Name
	to := make([]string, 40)
	for i := range to {
		var err error
		if to[i], err = f.Lab.Recipient(provider, i, lab.Grey); err != nil {
			t.Fatal(err)
		}
	}
	// Nothing may be delivered before it has moved, however long that takes.
	if err := f.Lab.SetBehaviour(provider, lab.Behaviour{Answer: lab.At(lab.PhaseRcpt, lab.Answer{Reply: "451 4.7.1 greylisted, come back later"})}); err != nil {
		t.Fatal(err)
	}
	submitted, err := f.Submit(within(t, time.Minute), fleet.Stream{Recipients: to, Size: 2000, Connections: 4, Tag: "moves-on"})
	if err != nil {
		t.Fatal(err)
	}
	dead, other := f.Relays[0], f.Relays[1]
	file := filepath.Join(t.TempDir(), "queue")
	out, err := program(t, "relais-relay", "queue", "export", file, "--data", dead.Dir)
	if err == nil || !strings.Contains(out, "stop it for good and export then") {
		t.Errorf("exporting from a relay that runs: %v: %s", err, out)
	}
	if err := dead.Stop(); err != nil {
		t.Fatal(err)
	}
	var exported struct{ Messages, Damaged int }
	if out, err = program(t, "relais-relay", "queue", "export", file, "--data", dead.Dir, "--json"); err == nil {
		err = json.Unmarshal([]byte(out), &exported)
	}
	if err != nil || exported.Messages != len(to)/2 || exported.Damaged != 0 {
		t.Fatalf("want half of %d messages: %v: %s", len(to), err, out)
	}
	if out, err = program(t, "relais-relay", "serve", "--data", dead.Dir); err == nil || !strings.Contains(out, "was exported") {
		t.Errorf("the relay whose queue was exported starts: %v: %s", err, out)
	}
	if out, err = program(t, "relais-relay", "queue", "import", file, "--data", dead.Dir); err == nil {
		t.Errorf("it imports its own queue: %s", out)
	}
	for _, want := range []int{exported.Messages, 0} {
		var got struct{ Imported, Known int }
		if out, err = program(t, "relais-relay", "queue", "import", file, "--data", other.Dir, "--json"); err == nil {
			err = json.Unmarshal([]byte(out), &got)
		}
		if err != nil || got.Imported != want || got.Imported+got.Known != exported.Messages {
			t.Errorf("imported %+v of %d, %v: %s", got, exported.Messages, err, out)
		}
	}
	if err := f.Lab.SetBehaviour(provider, lab.Behaviour{}); err != nil {
		t.Fatal(err)
	}
	f.Relays = []*fleet.Relay{other}
	if a := settle(t, f, submitted); a.accepted != len(to) || a.delivered != len(to) {
		t.Errorf("%+v of %d", a, len(to))
	}
	if rep := f.Lab.Report(); rep.Duplicated != 0 {
		t.Errorf("%d mails arrived twice", rep.Duplicated)
	}
}
