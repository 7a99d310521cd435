package archtest

import (
	"fmt"
	"go/ast"
	"io/fs"
	"os"
	"path"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"testing"
)

// The RFC index says what is supported of each section of each RFC and where
// the code of it is. It is only worth reading if it is true, so each claim
// names a declaration in which a comment cites the section, and each RFC that
// a comment cites anywhere is in the index.

const (
	indexFolder   = "shared/docs/rfc-index"
	indexOverview = indexFolder + "/README.md"
)

// The words of the column "support".
const (
	supported     = "supported"
	inPart        = "partly"
	unsupported   = "not"
	notApplicable = "not applicable"
)

// citation is a mention of an RFC in a comment.
type citation struct {
	rfc     int
	section string // "4.5.2", or "" for the RFC as a whole
	line    int    // of the comment's line that names the RFC
}

var citationForm = regexp.MustCompile(`\bRFC (\d{3,5})(?:,? sections? ([0-9]+(?:\.[0-9]+)*)(?:(?:, | and | to )([0-9]+(?:\.[0-9]+)*))?)?`)

// citations returns the mentions in the comments of a file, in order.
func (t *tree) citations(f *file) []citation {
	var list []citation
	for _, group := range f.ast.Comments {
		var text strings.Builder
		var starts, lines []int // of each line of the group: its first octet in text, its number
		for _, c := range group.List {
			first := t.line(c.Pos())
			for i, line := range strings.Split(c.Text, "\n") {
				starts, lines = append(starts, text.Len()), append(lines, first+i)
				text.WriteString(strings.Trim(strings.TrimSpace(line), "/* \t"))
				text.WriteByte(' ')
			}
		}
		all := text.String()
		for _, m := range citationForm.FindAllStringSubmatchIndex(all, -1) {
			at, _ := slices.BinarySearch(starts, m[0]+1)
			number, _ := strconv.Atoi(all[m[2]:m[3]])
			c := citation{rfc: number, line: lines[at-1]}
			if m[4] < 0 {
				list = append(list, c)
				continue
			}
			c.section = all[m[4]:m[5]]
			list = append(list, c)
			if m[6] >= 0 {
				c.section = all[m[6]:m[7]]
				list = append(list, c)
			}
		}
	}
	return list
}

// lineRange is where a declaration stands, its comment included.
type lineRange struct{ first, last int }

// symbols returns where the declarations of a file are: Name, Type.Method,
// Type.Field. The comment of a group belongs to each declaration in it.
func (t *tree) symbols(f *file) map[string][]lineRange {
	out := make(map[string][]lineRange)
	note := func(name string, n ast.Node, docs ...*ast.CommentGroup) {
		out[name] = append(out[name], lineRange{t.line(n.Pos()), t.line(n.End())})
		for _, doc := range docs {
			if doc != nil {
				out[name] = append(out[name], lineRange{t.line(doc.Pos()), t.line(doc.End())})
			}
		}
	}
	for _, decl := range f.ast.Decls {
		switch d := decl.(type) {
		case *ast.FuncDecl:
			note(funcName(d), d, d.Doc)
		case *ast.GenDecl:
			for _, spec := range d.Specs {
				switch s := spec.(type) {
				case *ast.TypeSpec:
					note(s.Name.Name, s, d.Doc, s.Doc)
					fields, ok := s.Type.(*ast.StructType)
					for i := 0; ok && i < len(fields.Fields.List); i++ {
						for _, name := range fields.Fields.List[i].Names {
							note(s.Name.Name+"."+name.Name, fields.Fields.List[i], fields.Fields.List[i].Doc)
						}
					}
				case *ast.ValueSpec:
					for _, name := range s.Names {
						note(name.Name, s, d.Doc, s.Doc)
					}
				}
			}
		}
	}
	return out
}

// claimRow is a row of a table of the index.
type claimRow struct {
	page    string
	line    int
	rfc     int
	section string // "all" for the RFC as a whole
	support string
	code    []string // "relay/smtpconn/data.go:Conn.Chunk"
	remark  string   // what the last column says beside code
}

// covers reports whether a citation is of the row's section or a part of it.
func (r *claimRow) covers(c citation) bool {
	return c.rfc == r.rfc && (r.section == "all" || c.section == r.section || strings.HasPrefix(c.section, r.section+"."))
}

var (
	headingForm  = regexp.MustCompile(`^## RFC (\d{3,5})$`)
	sectionForm  = regexp.MustCompile(`^(all|[0-9]+(\.[0-9]+)*)$`)
	codeForm     = regexp.MustCompile("`([A-Za-z0-9_./-]+\\.go:[A-Za-z0-9_.]+)`")
	linkForm     = regexp.MustCompile(`\]\(([^)\s]+)\)`)
	overviewForm = regexp.MustCompile(`^\| \[(\d{3,5})\]\(`)
)

// parsePage reads the tables of a page. The line after a heading is the title
// of the RFC.
func parsePage(page, text string) (rows []claimRow, titles map[int]string, problems []string) {
	titles = make(map[int]string)
	rfc, n, wantTitle := 0, 0, false
	for line := range strings.Lines(text) {
		n++
		line = strings.TrimRight(line, "\n")
		bad := func(format string, args ...any) {
			problems = append(problems, fmt.Sprintf("%s:%d: ", page, n)+fmt.Sprintf(format, args...))
		}
		if m := headingForm.FindStringSubmatch(line); m != nil {
			rfc, _ = strconv.Atoi(m[1])
			if titles[rfc] != "" {
				bad("RFC %d has two headings", rfc)
			}
			wantTitle = true
			continue
		}
		switch {
		case strings.HasPrefix(line, "#"):
			if n > 1 {
				bad("the heading %q is not of the form \"## RFC 5321\"", line)
			}
		case rfc == 0 || line == "" || strings.HasPrefix(line, "| section |") || strings.HasPrefix(line, "| --- |"):
		case wantTitle:
			titles[rfc], wantTitle = line, false
		case strings.HasPrefix(line, "|"):
			cells := strings.Split(strings.Trim(line, "|"), "|")
			if len(cells) != 4 {
				bad("a row has 4 cells: section, what, support, code and remarks; this has %d", len(cells))
				continue
			}
			for i := range cells {
				cells[i] = strings.TrimSpace(cells[i])
			}
			row := claimRow{page: page, line: n, rfc: rfc, section: cells[0], support: cells[2]}
			for _, m := range codeForm.FindAllStringSubmatch(cells[3], -1) {
				row.code = append(row.code, m[1])
			}
			row.remark = strings.Trim(codeForm.ReplaceAllString(cells[3], ""), " ,;.")
			if !sectionForm.MatchString(row.section) || cells[1] == "" {
				bad("%q is not a section such as 4.5.2 or all, or there is no word of what it is about", row.section)
			}
			rows = append(rows, row)
		}
	}
	return rows, titles, problems
}

// checkRow holds one row against the code.
func (t *tree) checkRow(r *claimRow, byPath map[string]*file) []string {
	var out []string
	bad := func(format string, args ...any) {
		out = append(out, fmt.Sprintf("%s:%d: RFC %d section %s: ", r.page, r.line, r.rfc, r.section)+fmt.Sprintf(format, args...))
	}
	switch r.support {
	case supported, inPart:
		if len(r.code) == 0 {
			bad("%q needs the code that does it, such as `relay/smtpconn/data.go:Conn.Chunk`", r.support)
		}
		if r.support == inPart && r.remark == "" {
			bad("say what is missing")
		}
	case unsupported, notApplicable:
		if len(r.code) != 0 || r.remark == "" {
			bad("%q needs a reason and no code", r.support)
		}
	default:
		bad("support is %q, %q, %q or %q, not %q", supported, inPart, unsupported, notApplicable, r.support)
	}
	for _, place := range r.code {
		name, symbol, _ := strings.Cut(place, ":")
		f := byPath[name]
		if f == nil || f.test {
			bad("there is no %s outside of tests", name)
			continue
		}
		where, ok := t.symbols(f)[symbol]
		if !ok {
			bad("%s declares no %s", name, symbol)
			continue
		}
		cited := slices.ContainsFunc(t.citations(f), func(c citation) bool {
			return r.covers(c) && slices.ContainsFunc(where, func(l lineRange) bool { return c.line >= l.first && c.line <= l.last })
		})
		if !cited {
			bad("no comment in %s (lines %d to %d) cites it; write // RFC %d section %s where it is done", place, where[0].first, where[0].last, r.rfc, r.section)
		}
	}
	return out
}

// checkIndex holds the index's pages, by name in its folder, against the tree.
func (t *tree) checkIndex(pages map[string]string) []string {
	byPath := make(map[string]*file, len(t.files))
	for _, f := range t.files {
		byPath[f.path] = f
	}
	var problems []string
	home, titles, support := map[int]string{}, map[int]string{}, map[int][]string{}
	for _, page := range slices.Sorted(mapKeys(pages)) {
		if page == path.Base(indexOverview) {
			continue
		}
		rows, names, bad := parsePage(indexFolder+"/"+page, pages[page])
		problems = append(problems, bad...)
		for rfc, title := range names {
			if home[rfc] != "" {
				problems = append(problems, fmt.Sprintf("RFC %d is in %s and in %s", rfc, home[rfc], page))
			}
			home[rfc], titles[rfc] = page, title
		}
		for i := range rows {
			problems = append(problems, t.checkRow(&rows[i], byPath)...)
			support[rows[i].rfc] = append(support[rows[i].rfc], rows[i].support)
		}
	}
	problems = append(problems, checkOverview(pages[path.Base(indexOverview)], home, titles, support)...)
	for _, f := range t.files {
		for _, c := range t.citations(f) {
			if home[c.rfc] == "" {
				problems = append(problems, fmt.Sprintf("%s:%d: RFC %d is not in %s: say there what is supported of it", f.path, c.line, c.rfc, indexFolder))
			}
		}
	}
	return problems
}

func mapKeys[V any](m map[string]V) func(func(string) bool) {
	return func(yield func(string) bool) {
		for k := range m {
			if !yield(k) {
				return
			}
		}
	}
}

// checkOverview wants the one line for each RFC that its table amounts to.
func checkOverview(text string, home, titles map[int]string, support map[int][]string) []string {
	var problems []string
	have := make(map[int]string)
	last := 0
	for line := range strings.Lines(text) {
		m := overviewForm.FindStringSubmatch(line)
		if m == nil {
			continue
		}
		rfc, _ := strconv.Atoi(m[1])
		if rfc <= last {
			problems = append(problems, fmt.Sprintf("%s: RFC %d is not in order", indexOverview, rfc))
		}
		if home[rfc] == "" {
			problems = append(problems, fmt.Sprintf("%s: no page tells of RFC %d", indexOverview, rfc))
		}
		have[rfc], last = strings.TrimSpace(line), rfc
	}
	for rfc, page := range home {
		if len(support[rfc]) == 0 {
			problems = append(problems, fmt.Sprintf("%s/%s: RFC %d has no rows", indexFolder, page, rfc))
			continue
		}
		want := fmt.Sprintf("| [%d](%s#rfc-%d) | %s | %s |", rfc, page, rfc, titles[rfc], summary(support[rfc]))
		if have[rfc] != want {
			problems = append(problems, fmt.Sprintf("%s: the line of RFC %d must be\n%s", indexOverview, rfc, want))
		}
	}
	slices.Sort(problems)
	return problems
}

// summary is what the rows of one RFC amount to. What does not apply to us
// takes nothing away.
func summary(rows []string) string {
	applies := slices.DeleteFunc(slices.Clone(rows), func(s string) bool { return s == notApplicable })
	if len(applies) == 0 {
		return notApplicable
	}
	for _, s := range applies {
		if s != applies[0] {
			return inPart
		}
	}
	return applies[0]
}

func TestRFCIndex(t *testing.T) {
	tr := load(t)
	folder := filepath.Join(root(t), filepath.FromSlash(indexFolder))
	entries, err := os.ReadDir(folder)
	if err != nil {
		t.Fatal(err)
	}
	pages := make(map[string]string)
	for _, e := range entries {
		if path.Ext(e.Name()) != ".md" {
			t.Errorf("%s/%s does not belong there", indexFolder, e.Name())
			continue
		}
		text, err := os.ReadFile(filepath.Join(folder, e.Name()))
		if err != nil {
			t.Fatal(err)
		}
		pages[e.Name()] = string(text)
	}
	for _, p := range tr.checkIndex(pages) {
		t.Error(p)
	}
}

// TestDocumentLinks: what a page of shared/docs links to in the tree is there.
func TestDocumentLinks(t *testing.T) {
	base := filepath.Join(root(t), "shared", "docs")
	links := 0
	err := filepath.WalkDir(base, func(name string, d fs.DirEntry, err error) error {
		if err != nil || d.IsDir() || path.Ext(name) != ".md" {
			return err
		}
		text, err := os.ReadFile(name)
		if err != nil {
			return err
		}
		for _, m := range linkForm.FindAllStringSubmatch(string(text), -1) {
			target, _, _ := strings.Cut(m[1], "#")
			if strings.Contains(target, "://") || strings.HasPrefix(target, "mailto:") || target == "" {
				continue
			}
			links++
			if _, err := os.Stat(filepath.Join(filepath.Dir(name), filepath.FromSlash(target))); err != nil {
				t.Errorf("%s: dead link %s", name, m[1])
			}
		}
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	if links == 0 {
		t.Error("no links were found: the test looks at the wrong folder")
	}
}
