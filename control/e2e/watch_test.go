package e2e

import (
	"bufio"
	"bytes"
	"encoding/json"
	"io"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/relais-mta/relais/shared/lab"
	"github.com/relais-mta/relais/shared/lab/fleet"
)

// watching runs a command of the relay until it ends by itself and returns what
// it prints. It has begun when it has said so on standard error.
func watching(t *testing.T, r *fleet.Relay, args ...string) (output func() string) {
	t.Helper()
	cmd := exec.CommandContext(t.Context(), filepath.Join(binaries, "relais-relay"), append(args, "--data", r.Dir)...)
	var out bytes.Buffer
	cmd.Stdout = &out
	told, err := cmd.StderrPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	line, err := bufio.NewReader(told).ReadString('\n')
	if err != nil || !strings.HasPrefix(line, "watching") {
		t.Fatalf("%q says %q, %v", args, line, err)
	}
	return func() string {
		t.Helper()
		rest, _ := io.ReadAll(told)
		if err := cmd.Wait(); err != nil {
			t.Fatalf("%q: %v\n%s", args, err, rest)
		}
		return out.String()
	}
}

// checkLanes has the lanes show what was delivered. Without a terminal the live
// view prints once.
func checkLanes(t *testing.T, f *fleet.Fleet, delivered int) {
	t.Helper()
	eventually(t, 30*time.Second, "the lanes have counted the mail", func() bool {
		printed, err := program(t, "relais-relay", "lanes", "--json", "--data", f.Relays[0].Dir)
		var lanes []struct {
			Source, Provider, Pool string
			Sessions, Delivered    int
			InFlight               int `json:"in_flight"`
		}
		if err != nil || json.Unmarshal([]byte(printed), &lanes) != nil {
			t.Fatalf("%v\n%s", err, printed)
		}
		n := 0
		for _, l := range lanes {
			if n += l.Delivered; l.Source != f.Relays[0].Sources[0].String() || l.Provider == "" || l.Pool == "" {
				t.Errorf("lane %+v", l)
			}
		}
		return n == delivered
	})
	printed, err := program(t, "relais-relay", "lanes", "--top", "--sort", "delivered", "--data", f.Relays[0].Dir)
	if err != nil || !strings.HasPrefix(printed, "SOURCE ") || !strings.Contains(printed, f.Relays[0].Sources[0].String()) || strings.Contains(printed, "\x1b") {
		t.Errorf("%v\n%s", err, printed)
	}
	if said, err := program(t, "relais-relay", "lanes", "--sort", "colour"); err == nil || !strings.Contains(said, "oldest") {
		t.Errorf("%v, %s", err, said)
	}
}

// checkLockEvent guesses a password until the account is locked for the network
// of the guesser, and has the events say so once.
func checkLockEvent(t *testing.T, f *fleet.Fleet) {
	t.Helper()
	c := dial(t, f.Relays[0].Submission())
	c.startTLS(f.ClientTLS(f.Relays[0]))
	c.cmd("EHLO client.test", "250")
	const failures = 5 // submission.auth_failures_per_account
	for range failures {
		c.cmd("AUTH PLAIN "+plain(f.User, "guess"), "535")
	}
	c.cmd("AUTH PLAIN "+plain(f.User, f.Secret), "454 4.7.0")
	eventually(t, 20*time.Second, "an event tells of the lock", func() bool {
		printed, err := program(t, "relais-relay", "events", "--data", f.Relays[0].Dir)
		if err != nil {
			t.Fatalf("%v\n%s", err, printed)
		}
		found := 0
		for line := range strings.Lines(printed) {
			var e struct {
				Type, Class, Credential, Reply string
				Attempts                       int
			}
			if json.Unmarshal([]byte(line), &e) == nil && e.Type == "locked" {
				if found++; e.Class != "account" || e.Credential != f.User || e.Attempts != failures || !strings.Contains(e.Reply, "no more until") {
					t.Errorf("%s", line)
				}
			}
		}
		if strings.Contains(printed, f.Secret) || strings.Contains(printed, "guess") {
			t.Error("the events show a password")
		}
		return found == 1
	})
}

// TestTrace watches mail come in and go out.
func TestTrace(t *testing.T) {
	f := start(t, fleet.Config{Open: true})
	r := f.Relays[0]
	to := recipients(t, f, 8)
	_, domain, _ := strings.Cut(to[0], "@")
	for i := range to {
		local, _, _ := strings.Cut(to[i], "@")
		to[i] = local + "@" + domain
	}
	incoming := watching(t, r, "trace", "--inbound", "--json", "--count", "80", "--for", "1m")
	headers := watching(t, r, "trace", "--domain", domain, "--headers", "--count", "60", "--for", "1m")
	mine := watching(t, r, "trace", "--domain", domain, "--json", "--count", "10", "--for", "1m")
	nothing := watching(t, r, "trace", "--mx", "nowhere.example", "--for", "3s")
	submit := func(tag string, to []string) {
		t.Helper()
		if _, err := f.Submit(within(t, time.Minute), fleet.Stream{Recipients: to, Size: 2000, Connections: 2, Tag: tag}); err != nil {
			t.Fatal(err)
		}
	}
	// One goes first: the lines of many sessions that begin at once would fill what
	// is shown before any of them has come to its message.
	submit("first", to[:1])
	if err := f.Lab.WaitFor(within(t, time.Minute), func(r lab.Report) bool { return r.Accepted == 1 }); err != nil {
		t.Fatal(err)
	}
	submit("rest", to[1:])
	in, out, text := incoming(), mine(), headers()
	verbs := ""
	for line := range strings.Lines(in) {
		var l struct {
			Kind, Side, Text, Remote string
		}
		if err := json.Unmarshal([]byte(line), &l); err != nil || l.Kind != "submission" && l.Kind != "inbound" || l.Remote == "" {
			t.Errorf("%v: %s", err, line)
		}
		verbs += l.Side + l.Text + "\n"
	}
	for _, want := range []string{"*TLS 1.3, ", "<EHLO ", "<AUTH PLAIN (secret)\n", ">235 ", "<MAIL FROM:<news@"} {
		if !strings.Contains(verbs, want) {
			t.Errorf("%q is missing in\n%s", want, verbs)
		}
	}
	for line := range strings.Lines(out) {
		var l struct {
			Kind, Domain, Message, MX, Source, Provider string
			At                                          time.Time
		}
		if err := json.Unmarshal([]byte(line), &l); err != nil || l.Kind != "out" || l.Domain != domain || l.MX == "" || l.Source != r.Sources[0].String() || l.Provider == "" || !strings.HasPrefix(l.Message, "msg_") {
			t.Errorf("%v: %s", err, line)
		}
	}
	for _, want := range []string{"* connects to ", "< 220", "> MAIL FROM:<(secret)@", "> RCPT TO:<", " | Subject: "} {
		if !strings.Contains(text, want) {
			t.Errorf("%q is missing in\n%s", want, text)
		}
	}
	for name, printed := range map[string]string{"incoming": in, "out": out, "headers": text} {
		if strings.Contains(printed, f.Secret) {
			t.Errorf("%s shows the password", name)
		}
		if n := strings.Count(printed, "\n"); n < 10 {
			t.Errorf("%s has %d lines", name, n)
		}
	}
	checkLanes(t, f, len(to))
	checkLockEvent(t, f)
	if got := nothing(); got != "" {
		t.Errorf("a trace of nothing prints %q", got)
	}
	for _, args := range [][]string{{"--source", "x"}, {"--tenant", "x"}, {"--inbound", "--mx", "x"}} {
		if said, err := program(t, "relais-relay", append([]string{"trace", "--for", "1s"}, args...)...); err == nil || !strings.Contains(said, args[len(args)-2][2:]) {
			t.Errorf("%q: %v, %s", args, err, said)
		}
	}
}
