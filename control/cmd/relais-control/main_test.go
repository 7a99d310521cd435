package main

import (
	"bytes"
	"crypto/rand"
	"encoding/json"
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/rogpeppe/go-internal/testscript"
	"github.com/spf13/cobra"

	"github.com/relais-mta/relais/shared/policy"
)

func TestMain(m *testing.M) {
	testscript.Main(m, map[string]func(){
		"relais-control": func() { os.Exit(run(os.Args[1:])) },
	})
}

// TestScripts runs the real program. Every script has a loopback address of its
// own in $ADDR and a configuration in $CONF that binds everything there.
func TestScripts(t *testing.T) {
	testscript.Run(t, testscript.Params{
		Dir: "testdata",
		Setup: func(env *testscript.Env) error {
			addr := ownLoopback()
			conf := filepath.Join(env.WorkDir, "conf.toml")
			env.Vars = append(env.Vars, "ADDR="+addr, "CONF="+conf, "RELAIS_CLI=", "NOTIFY_SOCKET=")
			return os.WriteFile(conf, fmt.Appendf(nil, "[listen]\nhttps = \"%[1]s:8443\"\nlink = \"%[1]s:7443\"\nraft = \"%[1]s:7444\"\nmetrics = \"%[1]s:9091\"\n", addr), 0o600)
		},
		Cmds: map[string]func(*testscript.TestScript, bool, []string){
			"mode":   mode,
			"secret": secret,
			"field":  field,
		},
	})
}

// ownLoopback returns a random address of 127.128.0.0/9.
func ownLoopback() string {
	b := [4]byte{127}
	_, _ = rand.Read(b[1:]) // documented never to return an error
	b[1] |= 128
	b[3] = b[3]&0x7f | 2 // neither the network's nor its broadcast address
	return netip.AddrFrom4(b).String()
}

// mode checks a file's permissions: mode 600 FILE.
func mode(ts *testscript.TestScript, neg bool, args []string) {
	if neg || len(args) != 2 {
		ts.Fatalf("usage: mode OCTAL FILE")
	}
	info, err := os.Lstat(ts.MkAbs(args[1]))
	ts.Check(err)
	if got := fmt.Sprintf("%o", info.Mode().Perm()); got != args[0] {
		ts.Fatalf("%s has mode %s, want %s", args[1], got, args[0])
	}
}

// secret checks that the API key of a cli.toml is not in the named file:
// secret CLIFILE FILE.
func secret(ts *testscript.TestScript, neg bool, args []string) {
	if neg || len(args) != 2 {
		ts.Fatalf("usage: secret CLIFILE FILE")
	}
	_, rest, _ := strings.Cut(ts.ReadFile(args[0]), "key = '")
	key, _, _ := strings.Cut(rest, "'")
	parts := strings.Split(key, ".")
	if len(parts) != 3 {
		ts.Fatalf("%s holds no key", args[0])
	}
	if strings.Contains(ts.ReadFile(args[1]), parts[2]) {
		ts.Fatalf("%s holds the API key", args[1])
	}
}

func TestExitCodes(t *testing.T) {
	dir := t.TempDir()
	for _, tc := range []struct {
		args string
		want int
	}{
		{"--help", exitOK}, {"--version", exitOK}, {"completion bash", exitOK}, {"token create --help", exitOK},
		{"nonsense", exitUsage}, {"--nonsense", exitUsage}, {"tenant", exitUsage}, {"tenant nonsense", exitUsage}, {"tenant show", exitUsage}, {"tenant show a b", exitUsage},
		{"init --data " + dir, exitUsage}, {"token create --role boss", exitUsage}, {"ip assign 10.0.0.1", exitUsage}, {"domain add example.com", exitUsage},
		{"init --data " + dir + " --advertise a:b:c", exitFailed}, {"serve --data " + dir, exitFailed}, {"tenant list --data " + dir, exitFailed}, {"ca --data " + dir, exitFailed},
	} {
		if got := run(strings.Fields(tc.args)); got != tc.want {
			t.Errorf("%s: exit code %d, want %d", tc.args, got, tc.want)
		}
	}
	if left, err := os.ReadDir(dir); err != nil || len(left) != 0 {
		t.Errorf("failed commands left %v behind", left)
	}
}

// TestHelp: every command says what it does and shows an example.
func TestHelp(t *testing.T) {
	var check func(*cobra.Command)
	check = func(c *cobra.Command) {
		if c.Short == "" {
			t.Errorf("%s does not say what it does", c.CommandPath())
		}
		if !c.HasSubCommands() && !strings.Contains(c.Example, "relais-control ") {
			t.Errorf("%s has no example", c.CommandPath())
		}
		for _, sub := range c.Commands() {
			check(sub)
		}
	}
	check((&app{}).root())
}

func TestReadSections(t *testing.T) {
	dir := t.TempDir()
	write := func(name, text string) string {
		t.Helper()
		path := filepath.Join(dir, name)
		if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
		return path
	}
	queue, notes := write("queue.toml", "a = 1\n"), write("notes.txt", "")
	write("delivery.toml", "")
	got, err := readSections([]string{dir})
	if err != nil || len(got) != 2 || got["queue"] != "a = 1\n" {
		t.Errorf("got %v, %v", got, err)
	}
	long := write("streams.toml", strings.Repeat("#", policy.MaxSectionBytes+1))
	for _, bad := range [][]string{{notes}, {queue, queue}, {filepath.Join(dir, "none.toml")}, {t.TempDir()}, {long}} {
		if _, err := readSections(bad); err == nil || !strings.Contains(message(err), filepath.Base(bad[0])) && !strings.Contains(message(err), bad[0]) {
			t.Errorf("%v: %v", bad, err)
		}
	}
}

func TestPrintTable(t *testing.T) {
	var b bytes.Buffer
	if err := printTable(&b, "ID NAME", [][]string{{"1", "a"}, {"22", ""}}); err != nil || b.String() != "ID  NAME\n1   a\n22  -\n" {
		t.Errorf("got %q, %v", b.String(), err)
	}
}

// field writes one field of a JSON object to a file: field NAME FROM TO.
func field(ts *testscript.TestScript, neg bool, args []string) {
	if neg || len(args) != 3 {
		ts.Fatalf("usage: field NAME FROM TO")
	}
	var object map[string]any
	ts.Check(json.Unmarshal([]byte(ts.ReadFile(args[1])), &object))
	text, ok := object[args[0]].(string)
	if !ok {
		ts.Fatalf("%s has no text %q", args[1], args[0])
	}
	ts.Check(os.WriteFile(ts.MkAbs(args[2]), []byte(text+"\n"), 0o600))
}
