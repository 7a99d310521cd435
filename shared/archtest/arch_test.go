package archtest

import (
	"fmt"
	"go/token"
	"slices"
	"strings"
	"testing"
)

// TestTree judges the real tree.
func TestTree(t *testing.T) {
	tr := load(t)
	if len(tr.files) < 50 {
		t.Fatalf("only %d files were found: the test looks at the wrong folder", len(tr.files))
	}
	for _, r := range rules {
		t.Run(strings.ReplaceAll(r.name, " ", "-"), func(t *testing.T) {
			for _, v := range r.check(tr) {
				t.Error(v)
			}
		})
	}
}

// world builds a tree of invented files: "path: source" with the source's
// package clause made from the path.
func world(t *testing.T, files map[string]string, top, allow string) *tree {
	t.Helper()
	tr := &tree{fset: token.NewFileSet(), top: strings.Fields(top)}
	paths := make([]string, 0, len(files))
	for p := range files {
		paths = append(paths, p)
	}
	slices.Sort(paths)
	for _, p := range paths {
		src := files[p]
		if !strings.Contains(src, "package ") {
			src = "// Package x exists for this test.\npackage x\n" + src
		}
		f, err := parse(tr.fset, p, []byte(src))
		if err != nil {
			t.Fatal(err)
		}
		tr.files = append(tr.files, f)
	}
	var err error
	if tr.allow, err = parseAllow(allow); err != nil {
		t.Fatal(err)
	}
	return tr
}

func imports(path string) string { return fmt.Sprintf("import _ %q\n", path) }

func long(lines int) string { return "func f() {\n" + strings.Repeat("\t_ = 0\n", lines-2) + "}\n" }

const (
	own       = module + "/"
	skip      = "import \"testing\"\nfunc Test(t *testing.T) { t.Skip() }\n"
	rapidSkip = "import (\"testing\"; \"pgregory.net/rapid\")\nfunc Test(t *testing.T) { rapid.Check(t, func(t *rapid.T) { t.Skip() }) }\n"
	inner     = "import \"testing\"\nfunc Test(t *testing.T) { t.Run(\"\", func(tt *testing.T) { _ = func() { tt.Skipf(\"\") } }) }\n"
	sleep     = "import \"time\"\nfunc wait() { time.Sleep(1) }\n"
	bubble    = "import (\"time\"; \"testing\"; \"testing/synctest\")\nfunc Test(t *testing.T) { synctest.Test(t, func(t *testing.T) { time.Sleep(1) }) }\n"
)

// examples give every rule trees that break it and trees that are just within
// it. Want is a part of the one violation expected, empty for none.
var examples = []struct {
	rule, path, src, top, allow, want string
}{
	{"top level is fixed", "", "", "relay shared go.mod .github helpers", "", "helpers: does not belong"},
	{"top level is fixed", "", "", "relay control shared images scripts go.mod go.sum Makefile README.md LICENSE CHANGELOG.md .ci", "", ""},

	{"shared imports neither side", "shared/x/x.go", imports(own + "relay"), "", "", "shared/x/x.go:3: imports"},
	{"shared imports neither side", "shared/x/x_test.go", imports(own + "control/state"), "", "", "shared knows neither side"},
	{"shared imports neither side", "shared/sim/x.go", imports(own + "relay/schedule"), "", "", "shared knows neither side"},
	{"shared imports neither side", "shared/sim/x_test.go", imports(own + "relay/store"), "", "", "shared knows neither side"},
	{"shared imports neither side", "shared/sim/x_test.go", imports(own + "relay/schedule"), "", "", ""},
	{"shared imports neither side", "shared/x/x.go", imports(own + "shared/relayed"), "", "", ""},

	{"relay and control stay apart", "relay/x/x.go", imports(own + "control/state"), "", "", "talk over the wire"},
	{"relay and control stay apart", "control/e2e/x_test.go", imports(own + "relay"), "", "", "talk over the wire"},
	{"relay and control stay apart", "scripts/run/main.go", imports(own + "relay/store"), "", "", ""},

	{"nothing imports a cmd", "scripts/x/x.go", imports(own + "relay/cmd/relais-relay"), "", "", "a command is wiring only"},
	{"nothing imports a cmd", "relay/x/x.go", imports("example.com/cmd/tool"), "", "", ""},

	{"modules have their homes", "control/service/x.go", imports("github.com/hashicorp/raft"), "", "", "only control/fsm and control/cluster may"},
	{"modules have their homes", "relay/x/x_test.go", imports("github.com/hashicorp/raft-wal/verifier"), "", "", "only control/fsm"},
	{"modules have their homes", "relay/queue/x.go", imports("github.com/dgraph-io/badger/v4"), "", "", "only relay/store may"},
	{"modules have their homes", "relay/agent/x.go", imports("github.com/quic-go/quic-go"), "", "", "only shared/link may"},
	{"modules have their homes", "relay/store/x.go", imports("github.com/dgraph-io/badger/v4/options"), "", "", ""},
	{"modules have their homes", "relay/storeroom/x.go", imports("github.com/dgraph-io/badger/v4"), "", "", "only relay/store may"},
	{"modules have their homes", "shared/sim/x_test.go", imports("github.com/hashicorp/raft"), "", "", ""},
	{"modules have their homes", "shared/sim/x.go", imports("github.com/hashicorp/raft"), "", "", "only control/fsm"},

	{"api and console use service", "control/api/x.go", imports(own + "control/state"), "", "", "through control/service only"},
	{"api and console use service", "control/console/x.go", imports(own + "control/cluster"), "", "", "through control/service only"},
	{"api and console use service", "control/api/x.go", imports(own + "control/service"), "", "", ""},
	{"api and console use service", "control/api/x_test.go", imports(own + "control/state"), "", "", ""},

	{"no cgo", "shared/x/x.go", imports("C"), "", "", "cgo off"},

	{"pure packages import nothing impure", "shared/policy/x.go", imports("net"), "", "", "touches nothing outside itself"},
	{"pure packages import nothing impure", "relay/schedule/x.go", imports("log/slog"), "", "", "touches nothing outside itself"},
	{"pure packages import nothing impure", "control/state/x.go", imports("os/exec"), "", "", "touches nothing outside itself"},
	{"pure packages import nothing impure", "control/grid/x.go", imports(own + "control/service"), "", "", "imports pure packages and"},
	{"pure packages import nothing impure", "shared/policy/x.go", imports("net/netip") + imports(own+"shared/ids") + imports("embed"), "", "", ""},
	{"pure packages import nothing impure", "shared/policy/x_test.go", imports("os"), "", "", ""},

	{"pure packages call nothing impure", "shared/lease/x.go", "import \"time\"\nvar _ = time.Now()\n", "", "", "uses time.Now"},
	{"pure packages call nothing impure", "shared/lease/x.go", "import clock \"time\"\nvar _ = clock.Since\n", "", "", "uses clock.Since"},
	{"pure packages call nothing impure", "shared/lease/x.go", "import \"math/rand/v2\"\nvar _ = rand.IntN(3)\n", "", "", "uses rand.IntN"},
	{"pure packages call nothing impure", "control/command/x.go", "import \"" + own + "shared/ids\"\nvar _ = ids.NewMessage\n", "", "", "uses ids.NewMessage"},
	{"pure packages call nothing impure", "shared/lease/x.go", "func f() { go f() }\n", "", "", "starts a goroutine"},
	{"pure packages call nothing impure", "shared/lease/x.go", "import (\"math/rand/v2\"; \"time\")\nvar _ = rand.New(rand.NewPCG(1, 2))\nvar _ = time.Unix(0, 0)\n", "", "", ""},
	{"pure packages call nothing impure", "relay/engine/x.go", "import \"time\"\nvar _ = time.Now()\n", "", "", ""},

	{"packages say why they exist", "shared/x/x.go", "package x\n", "", "", "shared/x: has no package comment"},
	{"packages say why they exist", "shared/x/x.go", "// Something else.\npackage x\n", "", "", "\"Package x …\""},
	{"packages say why they exist", "scripts/x/main.go", "// Command x runs.\npackage main\n", "", "", ""},
	{"packages say why they exist", "shared/x/x.go", "", "", "", ""},

	{"packages are named by what they provide", "relay/util/x.go", "", "", "", "says nothing"},
	{"packages are named by what they provide", "relay/utility/x.go", "", "", "", ""},

	{"files and functions stay small", "shared/x/x.go", long(maxFuncLines + 1), "", "", "func f has 91 lines, the limit is 90"},
	{"files and functions stay small", "shared/x/x.go", long(maxFuncLines), "", "", ""},
	{"files and functions stay small", "shared/x/x.go", long(100), "", "func shared/x/x.go f 100 # reason", ""},
	{"files and functions stay small", "shared/x/x.go", long(101), "", "func shared/x/x.go f 100 # reason", "allowed are 100"},
	{"files and functions stay small", "shared/x/x.go", long(95), "", "func shared/x/x.go f 100 # reason", "lower 100"},
	{"files and functions stay small", "shared/x/x.go", long(80), "", "func shared/x/x.go f 100 # reason", "remove the line"},
	{"files and functions stay small", "shared/x/x.go", "", "", "func shared/x/x.go gone 100 # reason", "there is no shared/x/x.go gone"},
	{"files and functions stay small", "shared/x/x.go", "type t[K any] struct{}\n" + strings.Replace(long(91), "func f", "func (*t[K]) f", 1), "", "", "func t.f has 91"},
	{"files and functions stay small", "shared/x/x.go", strings.Repeat("//\n", 600), "", "", "file  has 602 lines"},
	{"files and functions stay small", "shared/x/x.go", strings.Repeat("//\n", 598), "", "", ""},
	{"files and functions stay small", "shared/x/x.pb.go", "// Code generated by a tool. DO NOT EDIT.\npackage x\n" + strings.Repeat("//\n", 600), "", "", ""},

	{"tests do not sleep", "shared/x/x_test.go", sleep, "", "", "time.Sleep in a test"},
	{"tests do not sleep", "shared/x/x.go", sleep, "", "", ""},
	{"tests do not sleep", "shared/x/x_test.go", bubble, "", "", ""},
	{"tests do not sleep", "shared/x/x_test.go", sleep, "", "sleep shared/x/x_test.go 1 # reason", ""},
	{"tests do not sleep", "shared/x/x_test.go", sleep, "", "sleep shared/x/x_test.go 2 # reason", "lower 2"},

	{"tests do not skip", "shared/x/x_test.go", skip, "", "", "skips: fail"},
	{"tests do not skip", "shared/x/x_test.go", inner, "", "", "skips: fail"},
	{"tests do not skip", "shared/x/x_test.go", rapidSkip, "", "", ""},
}

func TestRulesCanFail(t *testing.T) {
	broken := make(map[string]bool)
	for _, tc := range examples {
		i := slices.IndexFunc(rules, func(r rule) bool { return r.name == tc.rule })
		if i < 0 {
			t.Fatalf("there is no rule %q", tc.rule)
		}
		files := map[string]string{}
		if tc.path != "" {
			files[tc.path] = tc.src
		}
		got := rules[i].check(world(t, files, tc.top, tc.allow))
		switch {
		case tc.want == "" && len(got) != 0:
			t.Errorf("%s: %s is within the rule, yet: %v", tc.rule, tc.path, got)
		case tc.want != "" && (len(got) != 1 || !strings.Contains(got[0], tc.want)):
			t.Errorf("%s: %s gave %q, want one violation with %q", tc.rule, tc.path, got, tc.want)
		}
		if tc.want != "" {
			broken[tc.rule] = true
		}
	}
	for _, r := range rules {
		if !broken[r.name] {
			t.Errorf("rule %q was never seen to fail", r.name)
		}
	}
}

func TestAllowListRefuses(t *testing.T) {
	for _, text := range []string{
		"file a.go 700", "file a.go # no count", "func a.go 100 # no name", "size a.go 3 # unknown",
		"file a.go many # no number", "file a.go 0 # zero", "sleep a_test.go 1 2 # too many",
	} {
		if _, err := parseAllow(text); err == nil {
			t.Errorf("%q was taken", text)
		}
	}
	list, err := parseAllow("# only a comment\n\nfunc a.go T.f 100 # because\n")
	if err != nil || len(list) != 1 || list[0] != (allowance{"func", "a.go", "T.f", 100, 3}) {
		t.Errorf("%+v, %v", list, err)
	}
}
