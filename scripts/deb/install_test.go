//go:build deb

package main

import (
	"bytes"
	"encoding/json"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"testing"

	"golang.org/x/sync/errgroup"
)

// TestPackages takes both packages through their life on a machine of their
// own, where systemd starts them by their units: with every restriction that
// the units ask for.
func TestPackages(t *testing.T) {
	t.Chdir("../..")
	var group errgroup.Group
	var base string
	group.Go(func() (err error) { base, err = fetch(t.Context()); return err })
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
	if err := group.Wait(); err != nil {
		t.Fatal(err)
	}
	inside := func(files []string) string {
		return strings.ReplaceAll(strings.Join(files, " "), packages, "/packages")
	}
	m := boot(t, base, packages)
	m.surround()

	m.sh("dpkg -i " + inside(older))
	m.installed()
	m.start()
	m.join()
	secret := m.tenant()
	m.accept(secret, "b")
	m.upgrade(inside(older), inside(newer))
	m.accept(secret, "c")
	m.live()
	m.reinstall(inside(newer[:1]))
	m.deliver()
	m.purge(secret, inside(newer[:1]))
	m.sh("dpkg --purge relais-control")
	m.sh("test ! -e /var/lib/relais && test ! -e /etc/relais && ! systemctl cat relais-control relais-relay && getent passwd relais")
}

// installed looks at what the packages put on a machine that has not joined.
func (m *machine) installed() {
	m.t.Helper()
	m.want("getent passwd relais", "/var/lib/relais")
	for i := range products {
		p := &products[i]
		m.want("systemctl is-enabled "+p.name, "enabled")
		m.want("systemctl show -p ActiveState,ConditionResult "+p.name, "ActiveState=inactive", "ConditionResult=no")
		m.sh("dpkg --verify " + p.name + " && systemd-analyze verify --man=no " + p.unit())
		m.sh("systemd-analyze security --threshold=20 --no-pager " + p.unit())
	}
}

// start makes the machine a cluster of one server.
func (m *machine) start() {
	m.t.Helper()
	m.sh("relais-control init --data /var/lib/relais/control --advertise 127.0.0.1 --config /etc/relais/control.toml")
	m.sh("systemctl start relais-control")
	m.until("the server serves", "curl -fsS http://127.0.0.1:9091/readyz")
}

// join makes it a relay of that cluster, too, as an operator does.
func (m *machine) join() {
	m.t.Helper()
	var token struct{ Token string }
	if err := json.Unmarshal([]byte(m.sh("relais-control token create --role relay --json")), &token); err != nil || token.Token == "" {
		m.t.Fatalf("no token: %v", err)
	}
	m.sh(labConfig)
	m.sh("relais-relay join --token " + token.Token + " 127.0.0.1:7443 --config /etc/relais/relay.toml")
	m.sh("systemctl start relais-relay")
	m.until("the relay is ready", ready)
	m.want("systemctl show -p User,StatusText,NotifyAccess,WatchdogUSec relais-relay", "User=relais", "StatusText=accepts and delivers mail", "WatchdogUSec=1min")
	m.want("ps -o user= -C relais-relay,relais-control", "relais")
	m.sh("! find /var/lib/relais/relay /var/lib/relais/control ! -user relais | grep .")
}

const (
	ready     = "curl -fsS http://127.0.0.1:9090/readyz"
	labConfig = `printf '[lab]\nsmtp_port = 2525\nallow_private = true\n' >>/etc/relais/relay.toml`
)

// tenant makes somebody who may send, and returns the credential as curl wants
// it. The address to send from is not on the machine yet.
func (m *machine) tenant() string {
	m.t.Helper()
	m.sh("relais-control tenant add acme")
	m.sh("relais-control domain add example.com --tenant acme")
	m.source(source, sourceName)
	var c struct{ ID, Secret string } // the id is the user name
	if err := json.Unmarshal([]byte(m.sh("relais-control credential create --tenant acme --json")), &c); err != nil || c.Secret == "" {
		m.t.Fatalf("no credential: %v", err)
	}
	return c.ID + ":" + c.Secret
}

// source lets the relay send from an address.
func (m *machine) source(address, name string) {
	m.t.Helper()
	m.sh("relais-control ip add " + address + " --ehlo " + name + " --pool default --node " + m.node())
	m.sh("relais-control ip check " + address)
}

// node returns the id of the relay.
func (m *machine) node() string {
	m.t.Helper()
	var s struct{ Node string }
	if err := json.Unmarshal([]byte(m.sh("relais-relay status --json")), &s); err != nil || s.Node == "" {
		m.t.Fatalf("the relay does not know its node: %v", err)
	}
	return s.Node
}

// accept puts one more message into the queue, where it waits for its source.
func (m *machine) accept(secret, user string) {
	m.t.Helper()
	before := m.waits()
	m.until("the relay accepts a message", "id=$(cat /proc/sys/kernel/random/uuid) && printf 'From: a@example.com\\r\\nTo: "+user+"@"+destination+
		"\\r\\nMessage-ID: <%s@example.com>\\r\\nSubject: kept\\r\\n\\r\\nkept\\r\\n' $id >/tmp/m && curl -fsSk smtps://127.0.0.1:465 --user '"+
		secret+"' --mail-from a@example.com --mail-rcpt "+user+"@"+destination+" --upload-file /tmp/m")
	m.waiting(before + 1)
}

// upgrade goes to the newer version, back and forth again, with mail that waits.
func (m *machine) upgrade(older, newer string) {
	t := m.t
	t.Helper()
	want := m.waits()
	for _, step := range []struct{ packages, version, says string }{
		{newer, "v0.0.2", "over (0.0.1)"},
		{older, "v0.0.1", "downgrading relais-relay from 0.0.2 to 0.0.1"},
		{newer, "v0.0.2", "over (0.0.1)"},
	} {
		before := m.pid("relais-relay")
		m.want("dpkg -i "+step.packages+" 2>&1", step.says)
		m.until("the relay is ready as "+step.version, ready)
		m.until("the server is ready as "+step.version, "curl -fsS http://127.0.0.1:9091/readyz")
		if m.pid("relais-relay") == before {
			t.Errorf("as %s is installed the old process still runs", step.version)
		}
		m.want("relais-relay status", step.version)
		m.want("relais-control status", step.version)
		m.until("the link is up again", "relais-relay status --json | grep -q '\"connected\": *true'")
		m.waiting(want)
		m.sh("grep -q '^smtp_port = 2525$' /etc/relais/relay.toml")
	}
	m.want("journalctl --no-pager -u relais-relay", "Deactivated successfully", "the relay is stopping")
	m.sh("! journalctl --no-pager -u relais-relay -u relais-control | grep -i 'failed with result'")
	m.sh("! find /var/lib/relais/relay /var/lib/relais/control ! -user relais | grep .")
}

// live is what systemd does for a service from day to day.
func (m *machine) live() {
	m.t.Helper()
	want := m.waits()
	m.sh("systemctl reload relais-relay relais-control")
	m.want("systemctl is-active relais-relay relais-control", "active\nactive")
	m.sh("kill -KILL " + m.pid("relais-relay"))
	m.until("the relay is started again after a crash", ready)
	m.waiting(want)
}

// reinstall removes the relay's package, which keeps its queue, and what its
// operator wrote and decided.
func (m *machine) reinstall(relay string) {
	m.t.Helper()
	want := m.waits()
	m.sh("dpkg --remove relais-relay")
	m.sh("test -d /var/lib/relais/relay/store && test -f /etc/relais/relay.toml && ! pgrep -x relais-relay")
	m.want("cat /var/lib/relais/relay/mail-waits", strconv.Itoa(want))
	m.sh("dpkg -i " + relay)
	m.until("the relay is back after its package was installed again", ready)
	m.waiting(want)
}

// deliver puts the source address onto the machine, and all mail goes.
func (m *machine) deliver() {
	m.t.Helper()
	want := m.waits()
	m.sh("ip address add " + source + "/32 dev lo")
	m.arrived(int64(want))
	m.until("the queue is empty", `relais-relay queue summary --json | grep -q '"waiting": *0[,}]'`)
}

// purge removes all that was the relay's, but no mail that nobody else has.
func (m *machine) purge(secret, relay string) {
	m.t.Helper()
	gone := "test ! -e /var/lib/relais/relay && test ! -e /etc/relais/relay.toml && test -d /var/lib/relais/control"
	m.sh("dpkg --purge relais-relay")
	m.sh(gone)
	m.want("systemctl is-active relais-control", "active")

	m.sh("dpkg -i " + relay)
	m.join()
	m.source(nextSource, nextSourceName)
	m.accept(secret, "fulltemp")
	m.want("dpkg --purge relais-relay 2>&1", "Mail of 1 recipients waits in /var/lib/relais/relay, which is kept")
	m.sh("test -d /var/lib/relais/relay/store && test -d /var/lib/relais/relay/identity && test ! -e /etc/relais/relay.toml")
	m.sh("dpkg -i " + relay)
	m.until("the relay is back after it was purged with mail", ready)
	m.waiting(1)

	m.sh("systemctl stop relais-relay && relais-relay queue export /root/queue")
	m.sh("dpkg --remove relais-relay && dpkg --purge relais-relay")
	m.sh(gone)
}

// waits returns how many recipients wait in the relay's queue.
func (m *machine) waits() int {
	m.t.Helper()
	var s struct {
		Waiting int `json:"waiting"`
	}
	if err := json.Unmarshal([]byte(m.sh("relais-relay queue summary --json")), &s); err != nil {
		m.t.Fatal(err)
	}
	return s.Waiting
}

func (m *machine) waiting(want int) {
	m.t.Helper()
	if got := m.waits(); got != want {
		m.t.Errorf("%d recipients wait, want %d", got, want)
	}
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

func contents(t *testing.T, name string) []byte {
	t.Helper()
	text, err := os.ReadFile(name)
	if err != nil {
		t.Fatal(err)
	}
	return text
}
