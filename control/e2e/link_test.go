package e2e

import (
	"context"
	"crypto/tls"
	"encoding/json"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/relais-mta/relais/shared/lab/fleet"
	"github.com/relais-mta/relais/shared/link"
	"github.com/relais-mta/relais/shared/pki"
	"github.com/relais-mta/relais/shared/pki/pkitest"
	"github.com/relais-mta/relais/shared/wire"
)

// udpFallbackLimit is from when UDP is blocked to when the relay is linked over
// TCP, on a machine that lets the processes run: 2.5 s in which the server is
// silent, a moment before the relay looks for one again, 250 ms for QUIC
// (hurriedRaceDelay of shared/link), and the handshake.
const udpFallbackLimit = 5 * time.Second

// withheld tells for how long this process has not been run since the call,
// although it wanted to: others on the machine fared no better.
func withheld(t *testing.T) func() time.Duration {
	t.Helper()
	const nap = 10 * time.Millisecond
	var lost atomic.Int64
	ctx, cancel := context.WithCancel(t.Context())
	t.Cleanup(cancel)
	go func() {
		for ctx.Err() == nil {
			began := time.Now()
			<-time.After(nap)
			if late := time.Since(began) - nap; late > nap {
				lost.Add(int64(late))
			}
		}
	}()
	return func() time.Duration { return time.Duration(lost.Load()) }
}

// TestUDPBlockedMidConnection blocks UDP between a relay and its server while
// they are linked over QUIC: within 5 s of that moment the relay is linked over
// TCP, nothing else changes, and mail flows all the time. The test runs itself
// again in a network namespace, where everything else is as it is outside.
func TestUDPBlockedMidConnection(t *testing.T) {
	if inNamespace(t, 4*time.Minute) {
		blockUDP(t)
	}
}

// inNamespace reports whether the test runs in a network namespace of its own. If
// not, it has run the test again in one when it returns, for a time at most.
func inNamespace(t *testing.T, most time.Duration) bool {
	t.Helper()
	if os.Getenv(binariesVariable) != "" {
		run(t, "ip link set lo up")
		return true
	}
	cmd := exec.CommandContext(within(t, most), need(t, "unshare"), "--net", "--", os.Args[0], "-test.run=^"+t.Name()+"$", "-test.v", "-test.count=1")
	cmd.Env = append(os.Environ(), binariesVariable+"="+binaries)
	out, err := cmd.CombinedOutput()
	t.Logf("in the namespace:\n%s", out)
	if err != nil || !strings.Contains(string(out), "--- PASS: "+t.Name()) {
		t.Errorf("it failed in the namespace: %v", err)
	}
	return false
}

// run runs a program that changes the namespace.
func run(t *testing.T, line string) {
	t.Helper()
	args := strings.Fields(line)
	if out, err := command(t, need(t, args[0]), args[1:]...); err != nil {
		t.Fatalf("%s: %v\n%s", line, err, out)
	}
}

// linkedOver counts the sessions over a transport since the relay's first start.
func linkedOver(t *testing.T, r *fleet.Relay, transport string) int {
	t.Helper()
	return logLines(t, r, "linked to control", transport)
}

// logLines counts the lines of a relay's log that say msg, and of which transport.
func logLines(t *testing.T, r *fleet.Relay, msg, transport string) int {
	t.Helper()
	text, err := os.ReadFile(r.Log)
	if err != nil {
		t.Fatal(err)
	}
	n := 0
	for _, line := range strings.Split(string(text), "\n") {
		var entry struct{ Msg, Transport string }
		if json.Unmarshal([]byte(line), &entry) == nil && entry.Msg == msg && entry.Transport == transport {
			n++
		}
	}
	return n
}

func blockUDP(t *testing.T) {
	f := start(t, fleet.Config{Open: true, NoDKIM: true})
	r := f.Relays[0]
	if linkedOver(t, r, "quic") != 1 || linkedOver(t, r, "tcp") != 0 {
		t.Fatal("the relay is not linked over QUIC")
	}
	type row struct {
		ID     string `json:"id"`
		Joined string `json:"joined_at"`
	}
	var before, after row
	showNode(t, f, r.Node, &before)
	policyBefore := policyRevision(t, f)
	send := func(to []string, tag string) []fleet.Submitted {
		batch, err := f.Submit(within(t, time.Minute), fleet.Stream{Recipients: to, Size: 2000, Connections: 2, Tag: tag})
		if err != nil {
			t.Error(err)
		}
		return batch
	}
	submitted := send(recipients(t, f, 20), "before")
	meanwhile := recipients(t, f, 60)
	_, port, err := net.SplitHostPort(f.LinkAddr())
	if err != nil {
		t.Fatal(err)
	}
	// A class whose queue has no room drops what is sorted into it, silently.
	run(t, "tc qdisc add dev lo root handle 1: htb default 1")
	run(t, "tc class add dev lo parent 1: classid 1:1 htb rate 10gbit quantum 60000")
	run(t, "tc class add dev lo parent 1: classid 1:3 htb rate 10gbit quantum 60000")
	run(t, "tc qdisc add dev lo parent 1:3 pfifo limit 0")
	if linkedOver(t, r, "quic") != 1 {
		t.Fatal("the relay was not linked over QUIC all the time")
	}
	blocked, lost := time.Now(), withheld(t)
	for _, match := range []string{"dport", "sport"} {
		run(t, "tc filter add dev lo parent 1: protocol ip u32 match ip protocol 17 0xff match ip "+match+" "+port+" 0xffff flowid 1:3")
	}
	sent := make(chan []fleet.Submitted, 1)
	go func() { sent <- send(meanwhile, "blocked") }()
	eventually(t, 60*time.Second, "the relay is linked over TCP", func() bool { return linkedOver(t, r, "tcp") == 1 })
	took := time.Since(blocked)
	t.Logf("linked over TCP %v after UDP was blocked; the machine withheld %v", took.Round(time.Millisecond), lost().Round(time.Millisecond))
	if limit := udpFallbackLimit + lost(); took > limit {
		t.Errorf("the link was up over TCP after %v, want %v", took, limit)
	}
	submitted = append(append(submitted, <-sent...), send(recipients(t, f, 20), "after")...)
	eventually(t, 10*time.Second, "control shows the relay as linked", func() bool {
		var n nodeRow
		showNode(t, f, r.Node, &n)
		return n.Connected
	})
	if showNode(t, f, r.Node, &after); after != before {
		t.Errorf("the node was %+v and is %+v", before, after)
	}
	if now := policyRevision(t, f); now != policyBefore {
		t.Errorf("the policy was at revision %d and is at %d", policyBefore, now)
	}
	if n := linkedOver(t, r, "quic"); n != 1 {
		t.Errorf("%d sessions over QUIC, want the one before", n)
	}
	if a := settle(t, f, submitted); len(submitted) != 100 || a.refused > 0 || a.delivered != len(submitted) {
		t.Errorf("of %d messages: %+v", len(submitted), a)
	}
}

// TestPausedRelayKeepsItsLink stops a relay's process for longer than a silent
// server is given: it finds that it was away itself, and stays linked.
func TestPausedRelayKeepsItsLink(t *testing.T) {
	const pause = 8 * time.Second
	f := start(t, fleet.Config{Open: true, NoDKIM: true})
	r := f.Relays[0]
	if err := r.Signal(syscall.SIGSTOP); err != nil {
		t.Fatal(err)
	}
	stopped := time.Now()
	eventually(t, 2*pause, "the pause to be over", func() bool { return time.Since(stopped) >= pause })
	if err := r.Signal(syscall.SIGCONT); err != nil {
		t.Fatal(err)
	}
	views := logLines(t, r, "policy in use", "")
	ctl(t, f, "node", "drain", r.Node)
	eventually(t, 20*time.Second, "the relay to take a change", func() bool { return logLines(t, r, "policy in use", "") > views })
	if n := linkedOver(t, r, "quic") + linkedOver(t, r, "tcp"); n != 1 {
		t.Errorf("%d sessions, want the one before the pause", n)
	}
}

// policyRevision is that of the policy in force.
func policyRevision(t *testing.T, f *fleet.Fleet) uint64 {
	t.Helper()
	var status struct {
		Revision uint64 `json:"revision"`
	}
	if out := ctl(t, f, "policy", "status", "--json"); json.Unmarshal([]byte(out), &status) != nil {
		t.Fatalf("no JSON: %s", out)
	}
	return status.Revision
}

// impostor is a server with a CA of its own. It keeps what clients say to it
// once they believe it.
type impostor struct {
	ca     *pkitest.CA
	addr   string
	spoken atomic.Int64 // sessions that got past the handshake
	tried  atomic.Int64 // handshakes
}

func newImpostor(t *testing.T) *impostor {
	t.Helper()
	i := &impostor{ca: pkitest.New(t)}
	holder := i.ca.Node(pki.RoleControl, pkitest.NewNode())
	open := pki.OpenServerConfig(holder, wire.ALPNJoin, wire.ALPNLink, wire.ALPNRenew)
	open.ClientAuth = tls.RequestClientCert
	config := open.Clone()
	config.GetConfigForClient = func(*tls.ClientHelloInfo) (*tls.Config, error) {
		i.tried.Add(1)
		return open, nil
	}
	listener, err := link.Listen(link.ServerConfig{Address: netip.MustParseAddrPort("127.0.0.1:0"), TLS: config})
	if err != nil {
		t.Fatal(err)
	}
	i.addr = listener.Addr().String()
	ctx, cancel := context.WithCancel(context.Background())
	ended := make(chan error, 1)
	hear := func(context.Context, link.Session) (link.Code, string) {
		i.spoken.Add(1)
		return link.CodeDone, ""
	}
	go func() {
		ended <- listener.Serve(ctx, map[string]link.Handler{wire.ALPNJoin: hear, wire.ALPNLink: hear, wire.ALPNRenew: hear})
	}()
	t.Cleanup(func() {
		cancel()
		if err := <-ended; err != nil {
			t.Error(err)
		}
	})
	return i
}

// TestManInTheMiddleLearnsNothing puts a server of another CA where a relay
// joins and links: the relay ends the handshake before it has said a word, so
// there is no session in which anything could be told.
func TestManInTheMiddleLearnsNothing(t *testing.T) {
	f := start(t, fleet.Config{Open: true})
	i := newImpostor(t)
	tok, _ := token(t, f)
	dir, out, err := join(t, f, tok, i.addr)
	if err == nil || !strings.Contains(out, "pin") || !strings.Contains(out, strings.Split(tok, ".")[1][:8]) && !strings.Contains(out, i.ca.Pin().String()) {
		t.Errorf("joining through another CA: %v\n%s", err, out)
	}
	if i.tried.Load() == 0 || i.spoken.Load() != 0 {
		t.Errorf("%d handshakes, %d sessions: the relay spoke to another CA", i.tried.Load(), i.spoken.Load())
	}
	if _, err := os.Stat(filepath.Join(dir, "identity", "join.toml")); err == nil {
		t.Error("the relay believes that it has joined")
	}
	// The token is as good as before.
	if out, err := command(t, filepath.Join(binaries, "relais-relay"), "join", "--token", tok, f.LinkAddr(), "--data", dir); err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	// A relay that has joined meets the impostor at its server's address.
	tried := i.tried.Load()
	beside(t, f, dir, i.addr)
	misled := &fleet.Relay{Dir: dir}
	var problem string
	eventually(t, 30*time.Second, "the relay says that the server is not of its cluster", func() bool {
		s, err := statusOf(misled)
		problem = s.Problem
		return err == nil && !s.Connected && i.tried.Load() > tried && strings.Contains(s.Problem, "certificate")
	})
	t.Logf("the relay says: %s", problem)
	if i.spoken.Load() != 0 {
		t.Errorf("%d sessions: the relay spoke to another CA", i.spoken.Load())
	}
}
