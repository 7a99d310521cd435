//go:build deb

package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"
)

// Bounds of the test's waits.
const (
	bootTimeout    = 90 * time.Second
	commandTimeout = 120 * time.Second
	fetchTimeout   = 10 * time.Minute
	pollInterval   = 100 * time.Millisecond
	slowCommand    = 5 * time.Second // is named in the log
)

// included is what a server has beside the packages that every Debian has, and
// what the test looks with.
const included = "systemd,systemd-sysv,dbus,adduser,ca-certificates,curl,iproute2,procps"

// machine is a booted Debian.
type machine struct {
	t      *testing.T
	leader string // process id of its first process, as seen from here
}

// fetch returns the folder of the Debian that the packages are tried in. It is
// kept between runs, outside of the tree. mmdebstrap does what debootstrap does
// in a third of the time.
func fetch(ctx context.Context) (base string, err error) {
	suite, mirrors, err := sources()
	if err != nil {
		return "", err
	}
	cache, err := os.UserCacheDir()
	if err != nil {
		return "", err
	}
	base = filepath.Join(cache, "relais-deb", suite)
	if _, err := os.Stat(base); err == nil {
		return base, nil
	}
	if err := os.MkdirAll(filepath.Dir(base), 0o755); err != nil {
		return "", err
	}
	partial := base + "." + strconv.Itoa(os.Getpid())
	ctx, cancel := context.WithTimeout(ctx, fetchTimeout)
	defer cancel()
	// What it mounts there is gone with it, however it ends.
	cmd := exec.CommandContext(ctx, "unshare", append([]string{"--mount", "--propagation=private", "mmdebstrap", "--variant=minbase", "--include=" + included,
		"--dpkgopt=force-unsafe-io", "--aptopt=Acquire::Languages \"none\"", "--aptopt=Acquire::Retries \"3\"", suite, partial}, mirrors...)...)
	cmd.Cancel = func() error { return cmd.Process.Signal(syscall.SIGTERM) }
	cmd.WaitDelay = stopTimeout
	if out, err := cmd.CombinedOutput(); err != nil {
		return "", errors.Join(fmt.Errorf("no Debian for the test: mmdebstrap: %w\n%s", err, out), os.RemoveAll(partial))
	}
	if err := os.Rename(partial, base); err != nil && !errors.Is(err, fs.ErrExist) {
		return "", err
	}
	return base, os.RemoveAll(partial) // it is there when another run was faster
}

// sources returns the release of this Debian, and the lines that fetch it from
// the mirrors that apt is set up for here.
func sources() (suite string, lines []string, err error) {
	release, err := os.ReadFile("/etc/os-release")
	if err != nil {
		return "", nil, err
	}
	for line := range strings.Lines(string(release)) {
		if name, ok := strings.CutPrefix(strings.TrimSpace(line), "VERSION_CODENAME="); ok {
			suite = name
		}
	}
	text, err := output("apt-get", "indextargets", "--format", "$(RELEASE) $(COMPONENT) $(REPO_URI)", "Created-By: Packages")
	if err != nil {
		return "", nil, err
	}
	for line := range strings.Lines(text) {
		f := strings.Fields(line)
		if len(f) == 3 && f[1] == "main" && (f[0] == suite || strings.HasPrefix(f[0], suite+"-")) {
			lines = append(lines, "deb "+f[2]+" "+f[0]+" main")
		}
	}
	if len(lines) == 0 {
		return "", nil, errors.New("apt knows no mirror of " + suite + " main: the test runs on Debian, with its mirrors in /etc/apt")
	}
	return suite, lines, nil
}

// boot starts a Debian whose changes are forgotten when the test ends.
func boot(t *testing.T, base, packages string) *machine {
	t.Helper()
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
	var ended error
	gone := make(chan struct{})
	var waiting sync.WaitGroup
	waiting.Go(func() { ended = cmd.Wait(); close(gone) })
	t.Cleanup(func() {
		// The machine outlives a killed systemd-nspawn, so its own first process
		// is killed, which ends both.
		if leader, err := strconv.Atoi(m.leader); err == nil {
			_ = syscall.Kill(leader, syscall.SIGKILL)
		} else {
			_ = cmd.Process.Kill()
		}
		waiting.Wait()
		_ = console.Close()
	})
	wait(t, "the machine has booted", func() (string, bool) {
		select {
		case <-gone:
			t.Fatalf("systemd-nspawn ended (%v); it needs root with all capabilities and control groups that may be written:\n%s", ended, contents(t, console.Name()))
		default:
		}
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
