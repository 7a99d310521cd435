//go:build deb

package main

import (
	"bytes"
	"context"
	"encoding/json"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"
)

// Bounds of the test's waits.
const (
	bootTimeout    = 90 * time.Second
	commandTimeout = 120 * time.Second
	pollInterval   = 100 * time.Millisecond
	slowCommand    = 5 * time.Second // is named in the log
)

// base is the Debian that the packages are tried in, kept between runs.
const base = "bin/deb-base"

// machine is a booted Debian.
type machine struct {
	t      *testing.T
	leader string // process id of its first process, as seen from here
}

// TestPackages takes both packages through their life on a machine of their
// own, where systemd starts them by their units: with every restriction that
// the units ask for.
func TestPackages(t *testing.T) {
	t.Chdir("../..")
	packages := t.TempDir()
	older := buildBoth(t, filepath.Join(packages, "1"), "v0.0.1")
	newer := buildBoth(t, filepath.Join(packages, "2"), "v0.0.2")
	again := buildBoth(t, filepath.Join(packages, "3"), "v0.0.2")
	for i := range newer {
		if !bytes.Equal(contents(t, newer[i]), contents(t, again[i])) {
			t.Errorf("%s was built twice from one source and differs", filepath.Base(newer[i]))
		}
	}
	lint(t, newer)
	inside := func(files []string) string {
		var out []string
		for _, f := range files {
			out = append(out, strings.Replace(f, packages, "/packages", 1))
		}
		return strings.Join(out, " ")
	}
	m := boot(t, packages)

	m.sh("dpkg -i " + inside(older))
	m.want("getent passwd relais", "/var/lib/relais")
	for i := range products {
		p := &products[i]
		m.want("systemctl is-enabled "+p.name, "enabled")
		m.want("systemctl show -p ActiveState,ConditionResult "+p.name, "ActiveState=inactive", "ConditionResult=no")
		m.sh("dpkg --verify " + p.name + " && systemd-analyze verify --man=no " + p.unit())
		m.sh("systemd-analyze security --threshold=20 --no-pager " + p.unit())
	}
	m.start()
	m.mail()

	m.sh("echo '# kept' >>/etc/relais/relay.toml")
	before := m.pid("relais-relay")
	m.sh("dpkg -i " + inside(newer))
	m.until("the relay is ready after the upgrade", "curl -fsS http://127.0.0.1:9090/readyz")
	if m.pid("relais-relay") == before {
		t.Error("after the upgrade the old process still runs")
	}
	m.want("relais-relay status", "v0.0.2")
	m.waiting(1)
	m.sh("grep -q '^# kept$' /etc/relais/relay.toml")
	m.want("journalctl --no-pager -u relais-relay", "Deactivated successfully", "the relay is stopping")
	m.sh("! journalctl --no-pager -u relais-relay | grep -i 'failed with result'")

	m.sh("systemctl reload relais-relay relais-control")
	m.want("systemctl is-active relais-relay relais-control", "active\nactive")
	m.sh("kill -KILL " + m.pid("relais-relay"))
	m.until("the relay is started again after a crash", "curl -fsS http://127.0.0.1:9090/readyz")
	m.waiting(1)

	m.sh("dpkg --remove relais-relay")
	m.sh("test -d /var/lib/relais/relay/store && test -f /etc/relais/relay.toml && ! pgrep -x relais-relay")
	m.sh("dpkg -i " + strings.Fields(inside(newer))[0])
	m.until("the relay is back after its package was installed again", "curl -fsS http://127.0.0.1:9090/readyz")
	m.waiting(1)

	m.sh("dpkg --purge relais-relay")
	m.sh("test ! -e /var/lib/relais/relay && test ! -e /etc/relais/relay.toml && test -d /var/lib/relais/control")
	m.want("systemctl is-active relais-control", "active")
	m.sh("dpkg --purge relais-control")
	m.sh("test ! -e /var/lib/relais && test ! -e /etc/relais && ! systemctl cat relais-control relais-relay && getent passwd relais")
}

// start makes the machine a cluster of one server and one relay.
func (m *machine) start() {
	m.t.Helper()
	m.sh("relais-control init --data /var/lib/relais/control --advertise 127.0.0.1 --config /etc/relais/control.toml")
	m.sh("systemctl start relais-control")
	m.until("the server serves", "curl -fsS http://127.0.0.1:9091/readyz")
	var token struct{ Token string }
	if err := json.Unmarshal([]byte(m.sh("relais-control token create --role relay --json")), &token); err != nil || token.Token == "" {
		m.t.Fatalf("no token: %v", err)
	}
	m.sh("relais-relay join --token " + token.Token + " 127.0.0.1:7443 --config /etc/relais/relay.toml")
	m.sh("systemctl start relais-relay")
	m.until("the relay is ready", "curl -fsS http://127.0.0.1:9090/readyz")
	m.want("systemctl show -p User,StatusText,NotifyAccess,WatchdogUSec relais-relay", "User=relais", "StatusText=accepts and delivers mail", "WatchdogUSec=1min")
	m.want("ps -o user= -C relais-relay,relais-control", "relais")
	m.sh("! find /var/lib/relais/relay /var/lib/relais/control ! -user relais | grep .")
}

// mail puts one message into the queue, where it stays: nothing is reachable.
func (m *machine) mail() {
	m.t.Helper()
	m.sh("relais-control tenant add acme")
	m.sh("relais-control domain add example.com --tenant acme")
	m.sh("ip address add 192.0.2.10/32 dev lo")
	m.sh("relais-control ip add 192.0.2.10 --ehlo mx10.example.net --pool default")
	var nodes []struct{ ID string }
	if err := json.Unmarshal([]byte(m.sh("relais-control node list --json")), &nodes); err != nil || len(nodes) == 0 {
		m.t.Fatalf("no nodes: %v", err)
	}
	m.sh("relais-control ip assign 192.0.2.10 --node " + nodes[len(nodes)-1].ID)
	var c struct{ ID, Secret string } // the id is the user name
	if err := json.Unmarshal([]byte(m.sh("relais-control credential create --tenant acme --json")), &c); err != nil || c.Secret == "" {
		m.t.Fatalf("no credential: %v", err)
	}
	m.until("the relay accepts a message", "printf 'From: a@example.com\\r\\nTo: b@example.org\\r\\nSubject: kept\\r\\n\\r\\nkept\\r\\n' >/tmp/m && curl -fsSk smtps://127.0.0.1:465 --user '"+
		c.ID+":"+c.Secret+"' --mail-from a@example.com --mail-rcpt b@example.org --upload-file /tmp/m")
	m.waiting(1)
}

// waiting checks how many recipients wait in the relay's queue.
func (m *machine) waiting(want int) {
	m.t.Helper()
	var s struct {
		Waiting int `json:"waiting"`
	}
	if err := json.Unmarshal([]byte(m.sh("relais-relay queue summary --json")), &s); err != nil || s.Waiting != want {
		m.t.Errorf("%d recipients wait, want %d (%v)", s.Waiting, want, err)
	}
}

func (m *machine) pid(unit string) string {
	m.t.Helper()
	return m.sh("systemctl show -p MainPID --value " + unit)
}

// sh runs a shell command on the machine and returns what it prints.
func (m *machine) sh(command string) string {
	m.t.Helper()
	start := time.Now()
	out, err := m.try(command)
	if took := time.Since(start); took > slowCommand {
		m.t.Logf("%v: %s", took.Round(time.Second), command)
	}
	if err != nil {
		journal, _ := m.try("journalctl --no-pager -n 40 -o cat -u relais-relay -u relais-control")
		m.t.Fatalf("%s: %v\n%s\n%s", command, err, out, journal)
	}
	return strings.TrimSpace(out)
}

func (m *machine) try(command string) (string, error) {
	ctx, cancel := context.WithTimeout(m.t.Context(), commandTimeout)
	defer cancel()
	cmd := exec.CommandContext(ctx, "nsenter", "--target", m.leader, "--all", "env", "-i",
		"PATH=/usr/sbin:/usr/bin:/sbin:/bin", "LANG=C.UTF-8", "DEBIAN_FRONTEND=noninteractive", "sh", "-c", "cd /; "+command)
	var errors bytes.Buffer
	cmd.Stderr = &errors
	out, err := cmd.Output()
	if err != nil {
		return string(out) + errors.String(), err
	}
	return string(out), nil
}

// want runs a command whose output must hold the texts.
func (m *machine) want(command string, texts ...string) {
	m.t.Helper()
	out := m.sh(command)
	for _, text := range texts {
		if !strings.Contains(out, text) {
			m.t.Errorf("%s prints %q, want %q in it", command, out, text)
		}
	}
}

// until repeats a command until it succeeds.
func (m *machine) until(what, command string) {
	m.t.Helper()
	wait(m.t, what, func() (string, bool) {
		out, err := m.try(command)
		return out, err == nil
	})
}

func wait(t *testing.T, what string, done func() (string, bool)) {
	t.Helper()
	tick := time.NewTicker(pollInterval)
	defer tick.Stop()
	deadline := time.After(bootTimeout)
	for {
		last, ok := done()
		if ok {
			return
		}
		select {
		case <-tick.C:
		case <-deadline:
			t.Fatalf("waited %v in vain until %s: %s", bootTimeout, what, last)
		}
	}
}

// boot starts a Debian whose changes are forgotten when the test ends.
func boot(t *testing.T, packages string) *machine {
	t.Helper()
	if _, err := os.Stat(filepath.Join(base, "complete")); err != nil {
		run(t, "rm", "-rf", base)
		run(t, "debootstrap", "--variant=minbase", "--include=systemd,systemd-sysv,dbus,adduser,ca-certificates,curl,iproute2,procps", "bookworm", base)
		run(t, "touch", filepath.Join(base, "complete"))
	}
	console, err := os.Create(filepath.Join(t.TempDir(), "console"))
	if err != nil {
		t.Fatal(err)
	}
	cmd := exec.Command("systemd-nspawn", "--quiet", "--register=no", "--keep-unit", "--private-network", "--volatile=overlay",
		"--machine=relais-deb-"+strconv.Itoa(os.Getpid()), "--bind-ro="+packages+":/packages", "--directory="+base, "--boot")
	cmd.Stdout, cmd.Stderr = console, console
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	m := &machine{t: t}
	t.Cleanup(func() {
		// The machine outlives a killed systemd-nspawn, so its own first process
		// is killed, which ends both.
		if leader, err := strconv.Atoi(m.leader); err == nil {
			_ = syscall.Kill(leader, syscall.SIGKILL)
		} else {
			_ = cmd.Process.Kill()
		}
		_ = cmd.Wait()
		_ = console.Close()
	})
	wait(t, "the machine has booted", func() (string, bool) {
		children, err := exec.Command("pgrep", "-P", strconv.Itoa(cmd.Process.Pid)).Output()
		if m.leader = strings.TrimSpace(string(children)); err != nil || m.leader == "" {
			return string(contents(t, console.Name())), false
		}
		state, _ := m.try("systemctl is-system-running")
		state = strings.TrimSpace(strings.SplitN(state, "\n", 2)[0])
		return state + string(contents(t, console.Name())), state == "running" || state == "degraded"
	})
	return m
}

// buildBoth builds the packages under a version and returns their files,
// relay first.
func buildBoth(t *testing.T, out, version string) []string {
	t.Helper()
	b := builder{out: out, described: version, maintainer: "Relais developers <developers@relais.invalid>", level: 0}
	if err := b.run(); err != nil {
		t.Fatal(err)
	}
	var files []string
	for i := range products {
		files = append(files, filepath.Join(out, products[i].name+"_"+b.version+"_amd64.deb"))
	}
	return files
}

// lint lets Debian's own checker look at the packages.
func lint(t *testing.T, files []string) {
	t.Helper()
	out, err := exec.Command("lintian", append([]string{"--allow-root", "--fail-on", "error,warning"}, files...)...).CombinedOutput()
	if err != nil {
		t.Errorf("lintian: %v\n%s", err, out)
	}
}

func run(t *testing.T, name string, args ...string) {
	t.Helper()
	if out, err := exec.Command(name, args...).CombinedOutput(); err != nil {
		t.Fatalf("%s: %v\n%s", name, err, out)
	}
}

func contents(t *testing.T, name string) []byte {
	t.Helper()
	text, err := os.ReadFile(name)
	if err != nil {
		t.Fatal(err)
	}
	return text
}
