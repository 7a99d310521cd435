package archtest

import (
	"bytes"
	"fmt"
	"go/ast"
	"go/parser"
	"go/token"
	"io/fs"
	"os"
	"os/exec"
	"path"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"
)

const module = "github.com/relais-mta/relais"

// folders are the top-level folders; all Go code is below one of them.
var folders = []string{"relay", "control", "shared", "images", "scripts"}

// file is one parsed Go file.
type file struct {
	path      string // from the root, with slashes
	ast       *ast.File
	lines     int
	test      bool
	generated bool
	imports   []importSpec
}

type importSpec struct {
	path, name string // name is what selectors use
	line       int
}

// dir returns the folder of the file, which is its package.
func (f *file) dir() string { return path.Dir(f.path) }

// tree is what the rules look at.
type tree struct {
	fset  *token.FileSet
	files []*file
	top   []string // names at the top level
	allow []allowance
}

func (t *tree) line(p token.Pos) int { return t.fset.Position(p).Line }

// parse returns the parsed form of one file.
func parse(fset *token.FileSet, name string, src []byte) (*file, error) {
	parsed, err := parser.ParseFile(fset, name, src, parser.ParseComments|parser.SkipObjectResolution)
	if err != nil {
		return nil, err
	}
	f := &file{
		path: name, ast: parsed, lines: bytes.Count(src, []byte("\n")),
		test: strings.HasSuffix(name, "_test.go"), generated: ast.IsGenerated(parsed),
	}
	for _, spec := range parsed.Imports {
		p, err := strconv.Unquote(spec.Path.Value)
		if err != nil {
			return nil, err
		}
		im := importSpec{path: p, name: importName(p), line: fset.Position(spec.Pos()).Line}
		if spec.Name != nil {
			im.name = spec.Name.Name
		}
		f.imports = append(f.imports, im)
	}
	return f, nil
}

// importName guesses the package name from its path: the last part that is no
// version.
func importName(p string) string {
	base := path.Base(p)
	if len(base) > 1 && base[0] == 'v' && strings.Trim(base[1:], "0123456789") == "" {
		base = path.Base(path.Dir(p))
	}
	return strings.TrimPrefix(base, "go-")
}

// root returns the folder that holds go.mod.
func root(t *testing.T) string {
	t.Helper()
	dir, err := os.Getwd()
	if err != nil {
		t.Fatal(err)
	}
	for {
		if _, err := os.Stat(filepath.Join(dir, "go.mod")); err == nil {
			return dir
		}
		up := filepath.Dir(dir)
		if up == dir {
			t.Fatal("no go.mod above the test's folder")
		}
		dir = up
	}
}

// load parses the whole tree.
func load(t *testing.T) *tree {
	t.Helper()
	base := root(t)
	tr := &tree{fset: token.NewFileSet(), top: topLevel(t, base)}
	var names []string
	for _, folder := range folders {
		err := filepath.WalkDir(filepath.Join(base, folder), func(p string, d fs.DirEntry, err error) error {
			switch {
			case os.IsNotExist(err):
				return nil
			case err != nil:
				return err
			case d.IsDir() && (d.Name() == "testdata" || d.Name() == "node_modules" || strings.HasPrefix(d.Name(), ".") || strings.HasPrefix(d.Name(), "_")):
				return fs.SkipDir
			case !d.IsDir() && strings.HasSuffix(p, ".go"):
				names = append(names, p)
			}
			return nil
		})
		if err != nil {
			t.Fatal(err)
		}
	}
	tr.files = make([]*file, len(names))
	errs := make([]error, len(names))
	var wg sync.WaitGroup
	gate := make(chan struct{}, 4)
	for i, name := range names {
		wg.Go(func() {
			gate <- struct{}{}
			defer func() { <-gate }()
			src, err := os.ReadFile(name)
			if err != nil {
				errs[i] = err
				return
			}
			rel, err := filepath.Rel(base, name)
			if err != nil {
				errs[i] = err
				return
			}
			tr.files[i], errs[i] = parse(tr.fset, filepath.ToSlash(rel), src)
		})
	}
	wg.Wait()
	for _, err := range errs {
		if err != nil {
			t.Fatal(err)
		}
	}
	text, err := os.ReadFile(filepath.Join(base, "shared/archtest/testdata/allow.txt"))
	if err != nil {
		t.Fatal(err)
	}
	if tr.allow, err = parseAllow(string(text)); err != nil {
		t.Fatal(err)
	}
	return tr
}

// topLevel lists what the repository tracks at the top; outside a repository,
// as in an unpacked archive, what is there.
func topLevel(t *testing.T, base string) []string {
	t.Helper()
	var names []string
	if out, err := exec.Command("git", "-C", base, "ls-files", "-z").Output(); err == nil && len(out) > 0 {
		for name := range strings.SplitSeq(strings.TrimRight(string(out), "\x00"), "\x00") {
			first, _, _ := strings.Cut(name, "/")
			if !slices.Contains(names, first) {
				names = append(names, first)
			}
		}
		return names
	}
	entries, err := os.ReadDir(base)
	if err != nil {
		t.Fatal(err)
	}
	for _, e := range entries {
		names = append(names, e.Name())
	}
	return names
}

// allowance is one line of testdata/allow.txt.
type allowance struct {
	kind string // "file", "func" or "sleep"
	path string
	name string // of a func: Name or Type.Name
	max  int    // lines of a file or func, calls of sleep
	line int
}

// parseAllow reads lines "file PATH LINES", "func PATH NAME LINES" and
// "sleep PATH CALLS"; # begins a comment, which every entry needs.
func parseAllow(text string) ([]allowance, error) {
	var list []allowance
	n := 0
	for line := range strings.Lines(text) {
		n++
		entry, why, _ := strings.Cut(strings.TrimSpace(line), "#")
		f := strings.Fields(entry)
		if len(f) == 0 {
			continue
		}
		if strings.TrimSpace(why) == "" {
			return nil, fmt.Errorf("allow.txt:%d: say why after a #", n)
		}
		a := allowance{kind: f[0], line: n}
		want := 3
		if a.kind == "func" {
			want = 4
		}
		if len(f) != want || a.kind != "file" && a.kind != "func" && a.kind != "sleep" {
			return nil, fmt.Errorf("allow.txt:%d: want \"file PATH LINES\", \"func PATH NAME LINES\" or \"sleep PATH CALLS\"", n)
		}
		a.path = f[1]
		if a.kind == "func" {
			a.name = f[2]
		}
		var err error
		if a.max, err = strconv.Atoi(f[len(f)-1]); err != nil || a.max < 1 {
			return nil, fmt.Errorf("allow.txt:%d: %q is not a count", n, f[len(f)-1])
		}
		list = append(list, a)
	}
	return list, nil
}
