package api

import (
	"regexp"
	"testing"
)

var placeholder = regexp.MustCompile(`\{(\w+)\}`)

// TestPathParametersAreRead asks the description, which is made from what
// handlers decode, for every parameter that a path names: a path struct that is
// embedded without being exported is left out of both, and its handler would
// act on an empty name.
func TestPathParametersAreRead(t *testing.T) {
	f := newFixture(t)
	doc := get[struct {
		Paths map[string]map[string]struct {
			OperationID string `json:"operationId"`
			Parameters  []struct {
				Name string `json:"name"`
				In   string `json:"in"`
			} `json:"parameters"`
		} `json:"paths"`
	}](f, f.do("GET", "/openapi.json", nil))
	seen := 0
	for path, methods := range doc.Paths {
		for method, op := range methods {
			read := make(map[string]bool)
			for _, p := range op.Parameters {
				read[p.Name] = p.In == "path"
			}
			for _, m := range placeholder.FindAllStringSubmatch(path, -1) {
				seen++
				if !read[m[1]] {
					t.Errorf("%s %s (%s): the handler does not read {%s}", method, path, op.OperationID, m[1])
				}
			}
		}
	}
	if seen < 10 {
		t.Errorf("only %d path parameters were found", seen)
	}
}
