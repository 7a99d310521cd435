package e2e

import (
	"encoding/json"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/relais-mta/relais/shared/lab/fleet"
)

// token makes a join token.
func token(t *testing.T, f *fleet.Fleet, args ...string) (text, id string) {
	t.Helper()
	out, err := f.Ctl(t.Context(), append([]string{"token", "create", "--role", "relay", "--json"}, args...)...)
	if err != nil {
		t.Fatal(err)
	}
	var made struct {
		Token string `json:"token"`
		ID    string `json:"id"`
	}
	if err := json.Unmarshal(out, &made); err != nil || made.Token == "" {
		t.Fatalf("%v: %s", err, out)
	}
	return made.Token, made.ID
}

// join runs relais-relay join in a new directory.
func join(t *testing.T, f *fleet.Fleet, tok string, more ...string) (dir, out string, err error) {
	t.Helper()
	dir = t.TempDir()
	args := append([]string{"join", "--token", tok, "--data", dir}, more...)
	if len(more) == 0 {
		args = append(args, f.LinkAddr())
	}
	text, err := exec.CommandContext(within(t, time.Minute), filepath.Join(binaries, "relais-relay"), args...).CombinedOutput()
	return dir, string(text), err
}

// TestJoinSaysWhatIsWrong tries tokens that must not work; each failure names
// its cause, and the directory stays usable for the right token.
func TestJoinSaysWhatIsWrong(t *testing.T) {
	f := start(t, fleet.Config{})
	good, _ := token(t, f)
	parts := strings.Split(good, ".")
	if len(parts) != 4 {
		t.Fatalf("token %q has %d parts", good, len(parts))
	}
	other := start(t, fleet.Config{})
	foreign, _ := token(t, other)
	foreignPin := strings.Join([]string{parts[0], strings.Split(foreign, ".")[1], parts[2], parts[3]}, ".")
	used, _ := token(t, f, "--uses", "1")
	if _, out, err := join(t, f, used); err != nil {
		t.Fatalf("the first use: %v\n%s", err, out)
	}
	short, _ := token(t, f, "--ttl", "1s")
	expired := time.After(1100 * time.Millisecond)
	network, _ := token(t, f, "--cidr", "192.0.2.0/24")
	revoked, id := token(t, f)
	if _, err := f.Ctl(t.Context(), "token", "revoke", id); err != nil {
		t.Fatal(err)
	}
	secret := parts[3]
	<-expired
	for _, tc := range []struct{ name, token, want string }{
		{"wrong pin", foreignPin, "pin"},
		{"used up", used, "use"},
		{"expired", short, "expired"},
		{"wrong network", network, "network"},
		{"revoked", revoked, "revoked"},
		{"wrong secret", strings.Join([]string{parts[0], parts[1], parts[2], flip(secret)}, "."), "token"},
		{"not a token", "hello", "token"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			dir, out, err := join(t, f, tc.token)
			if err == nil {
				t.Fatalf("it joined:\n%s", out)
			}
			if !strings.Contains(strings.ToLower(out), tc.want) {
				t.Errorf("the message does not name the cause %q:\n%s", tc.want, out)
			}
			if strings.Contains(out, secret) {
				t.Errorf("the message shows the secret:\n%s", out)
			}
			if _, err := os.Stat(filepath.Join(dir, "identity", "join.toml")); err == nil {
				t.Error("the refused machine has a membership")
			}
		})
	}
	if _, out, err := join(t, f, good); err != nil {
		t.Errorf("the good token does not work any more: %v\n%s", err, out)
	}
}

// flip changes the last letter of a secret.
func flip(s string) string {
	last := "a"
	if strings.HasSuffix(s, "a") {
		last = "b"
	}
	return s[:len(s)-1] + last
}

// TestJoinIsRepeatable joins twice from one directory with a token of one use.
func TestJoinIsRepeatable(t *testing.T) {
	f := start(t, fleet.Config{})
	tok, _ := token(t, f)
	dir, out, err := join(t, f, tok)
	if err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	again, err := exec.Command(filepath.Join(binaries, "relais-relay"), "join", "--token", tok, f.LinkAddr(), "--data", dir).CombinedOutput()
	if err != nil || !strings.Contains(string(again), "already") {
		t.Errorf("joining again: %v\n%s", err, again)
	}
	other := start(t, fleet.Config{})
	foreign, _ := token(t, other)
	wrong, err := exec.Command(filepath.Join(binaries, "relais-relay"), "join", "--token", foreign, other.LinkAddr(), "--data", dir).CombinedOutput()
	if err == nil || !strings.Contains(string(wrong), "cls_") {
		t.Errorf("a member of one cluster joined another: %v\n%s", err, wrong)
	}
}

// TestBadInputIsNamed gives the management commands what they must refuse.
func TestBadInputIsNamed(t *testing.T) {
	f := start(t, fleet.Config{})
	write := func(name, text string) string {
		path := filepath.Join(t.TempDir(), name)
		if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
		return path
	}
	if _, err := f.Ctl(t.Context(), "tenant", "add", "other"); err != nil {
		t.Fatal(err)
	}
	revision := func() string {
		out, err := f.Ctl(t.Context(), "policy", "get")
		if err != nil {
			t.Fatal(err)
		}
		return string(out)
	}
	before := revision()
	source := f.Relays[0].Sources[0].String()
	for _, tc := range []struct {
		name string
		args []string
		want []string
	}{
		{"malformed TOML", []string{"policy", "put", write("queue.toml", "retry = [\n")}, []string{"queue"}},
		{"unknown key", []string{"policy", "put", write("queue.toml", "retries = 3\n")}, []string{"queue", "retries"}},
		{"unknown section", []string{"policy", "put", write("quue.toml", "retry = []\n")}, []string{"quue"}},
		{"out of range", []string{"policy", "put", write("queue.toml", "retry_jitter_percent = 900\n")}, []string{"retry_jitter_percent", "900"}},
		{"unknown pool", []string{"policy", "put", write("streams.toml", "[[stream]]\ntenant = \"*\"\nproject = \"*\"\nname = \"x\"\nkind = \"bulk\"\npool = \"nope\"\n")}, []string{"pool", "nope"}},
		{"unknown provider", []string{"policy", "put", write("providers.toml", "limit = [ { provider = \"gogle\", kind = \"connections\", scope = \"source\", max = 1 } ]\n")}, []string{"gogle"}},
		{"unenforceable scope", []string{"policy", "put", write("providers.toml", "limit = [ { provider = \"google\", kind = \"connections\", scope = \"planet\", max = 1 } ]\n")}, []string{"scope", "planet"}},
		{"duplicate address", []string{"ip", "add", source, "--ehlo", "x.relais.test"}, []string{source}},
		{"pool that is not there", []string{"ip", "add", "198.51.100.7", "--ehlo", "x.relais.test", "--pool", "nope"}, []string{"nope"}},
		{"domain of another tenant", []string{"domain", "add", fleet.Domain, "--tenant", "other"}, []string{fleet.Domain}},
		{"subdomain of another tenant's domain", []string{"domain", "add", "mail." + fleet.Domain, "--tenant", "other"}, []string{fleet.Domain}},
		{"tenant that is not there", []string{"credential", "create", "--tenant", "nobody"}, []string{"nobody"}},
		{"stale revision", []string{"policy", "put", "--expect", "1", write("queue.toml", "retry = [\"7m\"]\n")}, []string{"revision"}},
		{"token for longer than a day", []string{"token", "create", "--role", "relay", "--ttl", "1000h"}, []string{"24h"}},
	} {
		t.Run(tc.name, func(t *testing.T) {
			out, err := f.Ctl(t.Context(), tc.args...)
			if err == nil {
				t.Fatalf("accepted: %s", out)
			}
			for _, want := range tc.want {
				if !strings.Contains(err.Error(), want) {
					t.Errorf("the message lacks %q: %v", want, err)
				}
			}
		})
	}
	if after := revision(); after != before {
		t.Errorf("something was half applied: the policy changed from\n%s\nto\n%s", before, after)
	}
	bad := t.TempDir()
	if err := os.WriteFile(filepath.Join(bad, "relay.toml"), []byte("[listen]\nsubmision = []\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	out, err := exec.Command(filepath.Join(binaries, "relais-relay"), "serve", "--data", bad).CombinedOutput()
	if err == nil || !strings.Contains(string(out), "listen.submision") || !strings.Contains(string(out), "line 2") {
		t.Errorf("unknown key in relay.toml: %v\n%s", err, out)
	}
	if err := exec.Command(filepath.Join(binaries, "relais-relay"), "nonsense").Run(); err == nil || err.(*exec.ExitError).ExitCode() != 2 {
		t.Errorf("an unknown command ended with %v, want exit code 2", err)
	}
}
