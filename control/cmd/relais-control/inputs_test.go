package main

import (
	"bytes"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/spf13/cobra"

	"github.com/relais-mta/relais/shared/fault"
)

// TestInputsThatMeanNothing: what a script with an unset variable would call is
// a usage error before anything is asked of a server.
func TestInputsThatMeanNothing(t *testing.T) {
	dir := t.TempDir()
	for name, args := range map[string][]string{
		"empty argument":      {"tenant", "show", ""},
		"empty second":        {"policy", "put", "a.toml", ""},
		"empty flag":          {"project", "list", "--tenant", ""},
		"empty network":       {"token", "create", "--role", "relay", "--cidr", ""},
		"empty data":          {"init", "--advertise", "192.0.2.1", "--data", ""},
		"two lines":           {"tenant", "add", "acme", "--reason", "a\nb"},
		"not UTF-8":           {"tenant", "add", "acme", "--reason", "\xff"},
		"long reason":         {"tenant", "add", "acme", "--reason", strings.Repeat("r", 256)},
		"no uses":             {"token", "create", "--role", "relay", "--uses", "0"},
		"no life":             {"token", "create", "--role", "relay", "--ttl", "0"},
		"credential's life":   {"credential", "create", "--tenant", "acme", "--ttl", "1ms"},
		"no certificate":      {"credential", "create", "--tenant", "acme", "--require-client-cert", "/nowhere.pem"},
		"long overlap":        {"credential", "rotate", "crd_1", "--overlap", "721h"},
		"life by the week":    {"token", "create", "--role", "relay", "--ttl", "2w"},
		"no entries":          {"audit", "--limit", "0"},
		"too many entries":    {"audit", "--limit", "1001"},
		"two keys":            {"backup", "verify", "b", "--kek", "a", "--recovery-key-file", "b"},
		"two tokens":          {"join", "--token", "a", "--token-file", "b", "192.0.2.1"},
		"advertise is absent": {"init"},
	} {
		if name != "empty data" {
			args = append([]string{"--data", dir}, args...)
		}
		if got := run(args); got != exitUsage {
			t.Errorf("%s: exit code %d, want %d", name, got, exitUsage)
		}
	}
	if got := run([]string{"init", "--data", dir, "--advertise", "192.0.2.400"}); got != exitFailed {
		t.Errorf("an address with a mistake: exit code %d", got)
	}
	if left, err := os.ReadDir(dir); err != nil || len(left) != 0 {
		t.Errorf("refused commands left %v behind", left)
	}
}

// TestConfirm: at a terminal what cannot be taken back is asked for, and only
// a yes goes on; without one nobody is asked.
func TestConfirm(t *testing.T) {
	for _, tc := range []struct {
		answer        string
		terminal, yes bool
		goesOn, asked bool
	}{
		{"", false, false, true, false}, {"", true, true, true, false},
		{"y\n", true, false, true, true}, {"YES\n", true, false, true, true},
		{"\n", true, false, false, true}, {"n\n", true, false, false, true}, {"y", true, false, false, true},
	} {
		var said bytes.Buffer
		cmd := &cobra.Command{}
		cmd.SetIn(strings.NewReader(tc.answer))
		cmd.SetErr(&said)
		err := (&app{terminal: &tc.terminal}).confirm(cmd, tc.yes, "Server %s goes.", "c3")
		if (err == nil) != tc.goesOn || (said.Len() > 0) != tc.asked {
			t.Errorf("%+v: got %v, said %q", tc, err, said.String())
		}
	}
	terminal := true
	a := &app{terminal: &terminal}
	root := a.root()
	root.SetArgs([]string{"server", "remove", "c3", "--data", t.TempDir()})
	root.SetIn(strings.NewReader("n\n"))
	root.SetErr(&bytes.Buffer{})
	if err := root.Execute(); !fault.Is(err, fault.Denied) {
		t.Errorf("server remove went on: %v", err)
	}
}

// TestMessageSaysThingsOnce: a system's cause is shown, our own words are not
// said again with the names of our functions.
func TestMessageSaysThingsOnce(t *testing.T) {
	system := &fs.PathError{Op: "open", Path: "x", Err: syscall.ENOENT}
	if got := message(fault.Wrap(system, fault.NotFound, "op", "x cannot be read")); got != "x cannot be read (open x: no such file or directory)" {
		t.Errorf("got %q", got)
	}
	inner := fault.New(fault.Unavailable, "link.Dial", "nobody answers")
	if got := message(fault.Wrap(errors.Join(inner, system), fault.Unavailable, "op", "nobody answers")); got != "nobody answers" {
		t.Errorf("got %q", got)
	}
}

func TestTokenFileAndLinkPort(t *testing.T) {
	path := filepath.Join(t.TempDir(), "token")
	if err := os.WriteFile(path, fmt.Appendf(nil, "ct1.a.b.c\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	if got, err := readTokenFile(path); err != nil || got != "ct1.a.b.c" {
		t.Errorf("got %q, %v", got, err)
	}
	if _, err := readTokenFile(path + ".none"); err == nil || !strings.Contains(message(err), "token-file") {
		t.Errorf("a missing file: %v", err)
	}
	got := withLinkPort([]string{"192.0.2.1", "192.0.2.1:1", "::1", "[::1]", "[::1]:2", "c.example.com"})
	want := []string{"192.0.2.1:7443", "192.0.2.1:1", "[::1]:7443", "[::1]:7443", "[::1]:2", "c.example.com:7443"}
	if !slices.Equal(got, want) {
		t.Errorf("got %v, want %v", got, want)
	}
}

// TestEndpointsWithoutTLS: the API key is never sent in clear, and a file that
// cannot be meant is refused with what is wrong in it.
func TestEndpointsWithoutTLS(t *testing.T) {
	pin := strings.Repeat("ab", 32)
	for name, tc := range map[string]struct{ text, says string }{
		"no TLS":       {"endpoints = ['http://192.0.2.1:8443']", "https://host:port"},
		"no scheme":    {"endpoints = ['192.0.2.1:8443']", "https://host:port"},
		"with a user":  {"endpoints = ['https://a:b@192.0.2.1:8443']", "https://host:port"},
		"second one":   {"endpoints = ['https://192.0.2.1:8443', 'ftp://192.0.2.2']", "ftp://192.0.2.2"},
		"none":         {"endpoints = []", "endpoints"},
		"unknown word": {"endpoints = ['https://192.0.2.1:8443']\nkeys = 'x'", `"keys"`},
	} {
		path := filepath.Join(t.TempDir(), "cli.toml")
		if err := os.WriteFile(path, fmt.Appendf(nil, "%s\nca_pin = '%s'\nkey = 'rk1.a.secret'\n", tc.text, pin), 0o600); err != nil {
			t.Fatal(err)
		}
		_, err := (&app{cliFile: path}).client()
		if err == nil || !strings.Contains(message(err), tc.says) || strings.Contains(message(err), "secret") {
			t.Errorf("%s: got %v, want it to say %q", name, err, tc.says)
		}
	}
}

// TestLengthsOfTime: every flag for one takes days, as the policy does.
func TestLengthsOfTime(t *testing.T) {
	for _, of := range []string{"token create --ttl", "credential create --ttl", "credential rotate --overlap", "brake set --ttl", "node drain --wait", "policy put --wait"} {
		words := strings.Fields(of)
		cmd, _, err := (&app{}).root().Find(words[:2])
		if err != nil {
			t.Fatal(err)
		}
		flag := cmd.Flags().Lookup(strings.TrimPrefix(words[2], "--"))
		if flag == nil || flag.Value.Set("4d12h") != nil || flag.Value.String() != "4d12h" || flag.Value.Type() != "duration" {
			t.Errorf("%s does not take 4d12h: %+v", of, flag)
		}
	}
	now := time.Date(2026, 3, 8, 12, 0, 0, 0, time.UTC)
	for text, want := range map[string]time.Time{"7d": now.AddDate(0, 0, -7), "1d12h": now.Add(-36 * time.Hour), "2026-03-01T00:00:00Z": time.Date(2026, 3, 1, 0, 0, 0, 0, time.UTC), "-1h": {}, "0": {}, "yesterday": {}} {
		if at, err := parseSince(text, now); !at.Equal(want) || (err == nil) != !want.IsZero() {
			t.Errorf("%q: %v, %v", text, at, err)
		}
	}
}
