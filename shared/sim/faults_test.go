package sim

import (
	"os"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"testing"
)

// TestFaultsAreWhereTheListSays holds docs/fault-tests.md against the code: each
// number is there, and so is each test that it names.
func TestFaultsAreWhereTheListSays(t *testing.T) {
	const root = "../.."
	page, err := os.ReadFile(filepath.Join(root, "shared/docs/fault-tests.md"))
	if err != nil {
		t.Fatal(err)
	}
	named := regexp.MustCompile("`([a-z0-9/]+):(Test[A-Za-z0-9]+)`")
	number := regexp.MustCompile(`^\| (\d+) \|`)
	next := 1
	tests := make(map[string]string) // what a package's tests are, as text
	for line := range strings.Lines(string(page)) {
		m := number.FindStringSubmatch(line)
		if m == nil {
			continue
		}
		if m[1] != strconv.Itoa(next) {
			t.Errorf("number %s comes where %d should", m[1], next)
		}
		next++
		found := named.FindAllStringSubmatch(line, -1)
		if len(found) == 0 && m[1] != "31" {
			t.Errorf("number %s has no test", m[1])
		}
		for _, f := range found {
			if !strings.Contains(testsOf(t, tests, root, f[1]), "func "+f[2]+"(") {
				t.Errorf("number %s: %s has no %s", m[1], f[1], f[2])
			}
		}
	}
	if next != 35 {
		t.Errorf("the list ends before %d", next)
	}
}

func testsOf(t *testing.T, known map[string]string, root, pkg string) string {
	if text, ok := known[pkg]; ok {
		return text
	}
	files, err := filepath.Glob(filepath.Join(root, pkg, "*_test.go"))
	if err != nil {
		t.Fatal(err)
	}
	var all strings.Builder
	for _, f := range files {
		text, err := os.ReadFile(f)
		if err != nil {
			t.Fatal(err)
		}
		all.Write(text)
	}
	known[pkg] = all.String()
	return known[pkg]
}
