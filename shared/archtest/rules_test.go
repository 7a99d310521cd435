package archtest

import (
	"fmt"
	"go/ast"
	"path"
	"slices"
	"strings"
)

// Sizes that need no allowance.
const (
	maxFileLines = 600
	maxFuncLines = 90
)

// pure packages take time as an argument and touch nothing outside themselves.
var pure = []string{
	"relay/schedule", "relay/verdict", "relay/reflex",
	"control/command", "control/state", "control/grid",
	"shared/policy", "shared/throttle", "shared/warmup", "shared/lease",
	"shared/ownership",
}

// words are the packages beside the pure ones that pure packages may import:
// they hold types and their forms.
var words = []string{"relay", "control", "shared/ids", "shared/fault", "shared/mailaddr"}

// homes says which packages alone may import a module.
var homes = []struct {
	prefix string
	in     []string
	sim    bool // tests of shared/sim may too
}{
	{"github.com/hashicorp/raft", []string{"control/fsm", "control/cluster"}, true},
	{"github.com/dgraph-io/badger", []string{"relay/store"}, false},
	{"github.com/quic-go/quic-go", []string{"shared/link"}, false},
}

// rule is one rule of the architecture. Each violation is one line that names
// the place and the way out.
type rule struct {
	name  string
	check func(*tree) []string
}

var rules = []rule{
	{"top level is fixed", topLevelIsFixed},
	{"shared imports neither side", sharedImportsNeitherSide},
	{"relay and control stay apart", sidesStayApart},
	{"nothing imports a cmd", nothingImportsACmd},
	{"modules have their homes", modulesHaveTheirHomes},
	{"api and console use service", apiUsesService},
	{"no cgo", noCgo},
	{"pure packages import nothing impure", pureImports},
	{"pure packages call nothing impure", pureCalls},
	{"packages say why they exist", packageDocs},
	{"packages are named by what they provide", packageNames},
	{"files and functions stay small", sizes},
	{"tests do not sleep", testsDoNotSleep},
	{"tests do not skip", testsDoNotSkip},
}

// within reports whether a folder is the package or below it.
func within(dir, pkg string) bool { return dir == pkg || strings.HasPrefix(dir, pkg+"/") }

func withinAny(dir string, pkgs []string) bool {
	return slices.ContainsFunc(pkgs, func(p string) bool { return within(dir, p) })
}

// local returns the folder of an import of this module, or "".
func (im importSpec) local() string {
	if im.path == module {
		return "."
	}
	rest, ok := strings.CutPrefix(im.path, module+"/")
	if !ok {
		return ""
	}
	return rest
}

// eachImport gathers what judge says about the imports of the tree.
func (t *tree) eachImport(judge func(f *file, im importSpec) string) []string {
	var out []string
	for _, f := range t.files {
		for _, im := range f.imports {
			if why := judge(f, im); why != "" {
				out = append(out, fmt.Sprintf("%s:%d: imports %s: %s", f.path, im.line, im.path, why))
			}
		}
	}
	return out
}

func topLevelIsFixed(t *tree) []string {
	fixed := append([]string{"go.mod", "go.sum", "Makefile", "README.md", "LICENSE", "CHANGELOG.md"}, folders...)
	var out []string
	for _, name := range t.top {
		if !strings.HasPrefix(name, ".") && !slices.Contains(fixed, name) {
			out = append(out, name+": does not belong at the top level; move it into one of "+strings.Join(folders, ", "))
		}
	}
	return out
}

func isSimTest(f *file) bool { return f.test && within(f.dir(), "shared/sim") }

func sharedImportsNeitherSide(t *tree) []string {
	return t.eachImport(func(f *file, im importSpec) string {
		side := im.local()
		if !within(f.dir(), "shared") || !within(side, "relay") && !within(side, "control") {
			return ""
		}
		if isSimTest(f) && (withinAny(side, pure) || side == "control/fsm" || slices.Contains(words, side)) {
			return ""
		}
		return "shared knows neither side; move the code to its owner"
	})
}

func sidesStayApart(t *tree) []string {
	return t.eachImport(func(f *file, im importSpec) string {
		for _, s := range [][2]string{{"relay", "control"}, {"control", "relay"}} {
			if within(f.dir(), s[0]) && within(im.local(), s[1]) {
				return s[0] + " and " + s[1] + " talk over the wire only; what both need belongs in shared"
			}
		}
		return ""
	})
}

func nothingImportsACmd(t *tree) []string {
	return t.eachImport(func(_ *file, im importSpec) string {
		if slices.Contains(strings.Split(im.local(), "/"), "cmd") {
			return "a command is wiring only; move what is needed into a package"
		}
		return ""
	})
}

func modulesHaveTheirHomes(t *tree) []string {
	return t.eachImport(func(f *file, im importSpec) string {
		for _, h := range homes {
			// raft-wal and raft/v2 count as raft, raftery would not.
			rest, ok := strings.CutPrefix(im.path, h.prefix)
			if !ok || rest != "" && rest[0] != '/' && rest[0] != '-' {
				continue
			}
			if withinAny(f.dir(), h.in) || h.sim && isSimTest(f) {
				continue
			}
			return "only " + strings.Join(h.in, " and ") + " may; use what they export"
		}
		return ""
	})
}

func apiUsesService(t *tree) []string {
	doors := []string{"control", "control/service", "control/auth", "control/api", "control/console"}
	return t.eachImport(func(f *file, im importSpec) string {
		if f.test || !within(f.dir(), "control/api") && !within(f.dir(), "control/console") || !within(im.local(), "control") {
			return ""
		}
		for _, d := range doors {
			if im.local() == d || d != "control" && within(im.local(), d) {
				return ""
			}
		}
		return "api and console reach state through control/service only"
	})
}

func noCgo(t *tree) []string {
	return t.eachImport(func(_ *file, im importSpec) string {
		if im.path == "C" {
			return "builds for users have cgo off"
		}
		return ""
	})
}

func pureImports(t *tree) []string {
	banned := []string{"net", "os", "log", "syscall", "io/ioutil", "crypto/rand", "runtime", "testing"}
	return t.eachImport(func(f *file, im importSpec) string {
		if f.test || !withinAny(f.dir(), pure) || im.path == "net/netip" {
			return ""
		}
		if dir := im.local(); dir != "" && !withinAny(dir, pure) && !slices.Contains(words, dir) {
			return "a pure package imports pure packages and " + strings.Join(words, ", ") + " only"
		}
		for _, b := range banned {
			// Generated protobuf code needs reflection; runtime and the rest
			// of its imports come from the generator.
			if within(im.path, b) && !f.generated {
				return "a pure package touches nothing outside itself; pass the value in"
			}
		}
		return ""
	})
}

// impure lists functions that read a clock or the global random source.
func impure(importPath, name string) bool {
	switch importPath {
	case "time":
		return slices.Contains([]string{"Now", "Since", "Until", "After", "AfterFunc", "Sleep", "Tick", "NewTimer", "NewTicker"}, name)
	case "math/rand", "math/rand/v2":
		// Constructors and types are fine, the global source is not.
		return !strings.HasPrefix(name, "New") && !slices.Contains([]string{"Rand", "Source", "Source64", "PCG", "ChaCha8", "Zipf"}, name)
	case module + "/shared/ids":
		return name == "New" || name == "NewMessage" // their random part comes from the system; ids.Make takes it
	}
	return false
}

func pureCalls(t *tree) []string {
	var out []string
	for _, f := range t.files {
		if f.test || !withinAny(f.dir(), pure) {
			continue
		}
		byName := make(map[string]string, len(f.imports))
		for _, im := range f.imports {
			byName[im.name] = im.path
		}
		ast.Inspect(f.ast, func(n ast.Node) bool {
			switch n := n.(type) {
			case *ast.GoStmt:
				out = append(out, fmt.Sprintf("%s:%d: starts a goroutine: a pure package has none", f.path, t.line(n.Pos())))
			case *ast.SelectorExpr:
				if x, ok := n.X.(*ast.Ident); ok && impure(byName[x.Name], n.Sel.Name) {
					out = append(out, fmt.Sprintf("%s:%d: uses %s.%s: pass time and randomness in", f.path, t.line(n.Pos()), x.Name, n.Sel.Name))
				}
			}
			return true
		})
	}
	return out
}

func packageDocs(t *tree) []string {
	documented := make(map[string]bool)
	first := make(map[string]*file)
	for _, f := range t.files {
		if f.test {
			continue
		}
		if first[f.dir()] == nil {
			first[f.dir()] = f
		}
		doc := f.ast.Doc.Text()
		name := f.ast.Name.Name
		if strings.HasPrefix(doc, "Package "+name+" ") || name == "main" && strings.HasPrefix(doc, "Command ") {
			documented[f.dir()] = true
		}
	}
	var out []string
	for dir, f := range first {
		if !documented[dir] {
			want := "Package " + f.ast.Name.Name + " …"
			if f.ast.Name.Name == "main" {
				want = "Command " + path.Base(dir) + " …"
			}
			out = append(out, fmt.Sprintf("%s: has no package comment that begins %q and says why it exists", dir, want))
		}
	}
	slices.Sort(out)
	return out
}

func packageNames(t *tree) []string {
	catchAll := []string{"util", "utils", "helper", "helpers", "common", "misc", "base", "lib", "internal", "models", "types"}
	var out []string
	seen := make(map[string]bool)
	for _, f := range t.files {
		for _, part := range strings.Split(f.dir(), "/") {
			if slices.Contains(catchAll, part) && !seen[f.dir()] {
				seen[f.dir()] = true
				out = append(out, fmt.Sprintf("%s: %q says nothing; name a package by what it provides, and keep packages flat", f.dir(), part))
			}
		}
	}
	return out
}

// sizes also judges the allowances, which may only shrink.
func sizes(t *tree) []string {
	var out []string
	used := make(map[int]bool)
	judge := func(kind, where, name string, line, n, limit int) {
		for _, a := range t.allow {
			if a.kind != kind || a.path != where || a.name != name {
				continue
			}
			used[a.line] = true
			switch {
			case n > a.max:
				out = append(out, fmt.Sprintf("%s:%d: %s %s has %d lines, allowed are %d: split it", where, line, kind, name, n, a.max))
			case n <= limit:
				out = append(out, fmt.Sprintf("allow.txt:%d: %s %s is small again: remove the line", a.line, where, name))
			case n < a.max:
				out = append(out, fmt.Sprintf("allow.txt:%d: %s %s has %d lines now: lower %d to that", a.line, where, name, n, a.max))
			}
			return
		}
		if n > limit {
			out = append(out, fmt.Sprintf("%s:%d: %s %s has %d lines, the limit is %d: split it", where, line, kind, name, n, limit))
		}
	}
	for _, f := range t.files {
		if f.generated {
			continue
		}
		judge("file", f.path, "", 1, f.lines, maxFileLines)
		for _, d := range f.ast.Decls {
			if fn, ok := d.(*ast.FuncDecl); ok {
				line := t.line(fn.Pos())
				judge("func", f.path, funcName(fn), line, t.line(fn.End())-line+1, maxFuncLines)
			}
		}
	}
	for _, a := range t.allow {
		if a.kind != "sleep" && !used[a.line] {
			out = append(out, fmt.Sprintf("allow.txt:%d: there is no %s %s: remove the line", a.line, a.path, a.name))
		}
	}
	return out
}

// funcName returns Name or Type.Name.
func funcName(fn *ast.FuncDecl) string {
	if fn.Recv == nil || len(fn.Recv.List) == 0 {
		return fn.Name.Name
	}
	typ := fn.Recv.List[0].Type
	for {
		switch x := typ.(type) {
		case *ast.StarExpr:
			typ = x.X
			continue
		case *ast.IndexExpr:
			typ = x.X
			continue
		case *ast.IndexListExpr:
			typ = x.X
			continue
		case *ast.Ident:
			return x.Name + "." + fn.Name.Name
		}
		return fn.Name.Name
	}
}

func testsDoNotSleep(t *tree) []string {
	var out []string
	calls := make(map[string]int)
	for _, f := range t.files {
		if !f.test {
			continue
		}
		name := ""
		for _, im := range f.imports {
			if im.path == "time" {
				name = im.name
			}
		}
		if name == "" {
			continue
		}
		ast.Inspect(f.ast, func(n ast.Node) bool {
			if c, ok := n.(*ast.CallExpr); ok && isBubble(c) {
				return false // a sleep in a bubble moves the bubble's clock and takes no time
			}
			s, ok := n.(*ast.SelectorExpr)
			if !ok || s.Sel.Name != "Sleep" {
				return true
			}
			if x, ok := s.X.(*ast.Ident); ok && x.Name == name {
				calls[f.path]++
				if calls[f.path] > t.sleepsAllowed(f.path) {
					out = append(out, fmt.Sprintf("%s:%d: time.Sleep in a test: wait for the condition, or use testing/synctest", f.path, t.line(n.Pos())))
				}
			}
			return true
		})
	}
	for _, a := range t.allow {
		if a.kind == "sleep" && calls[a.path] < a.max {
			out = append(out, fmt.Sprintf("allow.txt:%d: %s sleeps %d times now: lower %d to that or remove the line", a.line, a.path, calls[a.path], a.max))
		}
	}
	return out
}

// isBubble reports a call of synctest.Test.
func isBubble(c *ast.CallExpr) bool {
	s, ok := c.Fun.(*ast.SelectorExpr)
	return ok && s.Sel.Name == "Test" && isIdent(s.X, "synctest")
}

func (t *tree) sleepsAllowed(path string) int {
	for _, a := range t.allow {
		if a.kind == "sleep" && a.path == path {
			return a.max
		}
	}
	return 0
}

// testsDoNotSkip finds calls of Skip on a *testing.T, B, F or a testing.TB: a
// test whose peer is missing fails and says what to install.
func testsDoNotSkip(t *tree) []string {
	var out []string
	for _, f := range t.files {
		if !f.test {
			continue
		}
		ast.Walk(skipFinder{t, f, nil, &out}, f.ast)
	}
	return out
}

// skipFinder knows which names are testing handles in the current function.
type skipFinder struct {
	tree    *tree
	file    *file
	handles map[string]bool
	out     *[]string
}

// Visit implements ast.Visitor.
func (s skipFinder) Visit(n ast.Node) ast.Visitor {
	switch n := n.(type) {
	case *ast.FuncDecl:
		return s.enter(n.Type)
	case *ast.FuncLit:
		return s.enter(n.Type)
	case *ast.CallExpr:
		sel, ok := n.Fun.(*ast.SelectorExpr)
		if !ok {
			break
		}
		x, ok := sel.X.(*ast.Ident)
		if ok && s.handles[x.Name] && slices.Contains([]string{"Skip", "Skipf", "SkipNow"}, sel.Sel.Name) {
			*s.out = append(*s.out, fmt.Sprintf("%s:%d: skips: fail and name what is missing", s.file.path, s.tree.line(n.Pos())))
		}
	}
	return s
}

// enter returns the finder for a function's body, with its parameters known.
func (s skipFinder) enter(typ *ast.FuncType) skipFinder {
	inner := make(map[string]bool, len(s.handles)+1)
	for name, is := range s.handles {
		inner[name] = is
	}
	for _, p := range typ.Params.List {
		t := p.Type
		if star, ok := t.(*ast.StarExpr); ok {
			t = star.X
		}
		sel, ok := t.(*ast.SelectorExpr)
		is := ok && isIdent(sel.X, "testing")
		for _, name := range p.Names {
			inner[name.Name] = is
		}
	}
	s.handles = inner
	return s
}

func isIdent(e ast.Expr, name string) bool {
	x, ok := e.(*ast.Ident)
	return ok && x.Name == name
}
