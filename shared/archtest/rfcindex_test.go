package archtest

import (
	"strings"
	"testing"
)

const (
	citing   = "// F does it (RFC\n// 1234 section 2.1).\nfunc F() {}\n\nfunc G() {}\n\ntype T struct {\n\ta int // RFC 1234 section 3\n\tb int\n}\n\n// Both are of RFC 1234 sections 5 and 6.\nconst (\n\tX = 1\n\tY = 2\n)\n\nfunc (T) M() {\n\t_ = 1 // RFC 1234\n}\n"
	head     = "# Page\n\n## RFC 1234\nA Title\n\n| section | what | support | code and remarks |\n| --- | --- | --- | --- |\n"
	goodRow  = "| 2.1 | it | supported | `relay/x/x.go:F` |\n"
	overview = "| [1234](page.md#rfc-1234) | A Title | supported |\n"
)

// TestIndexCheck breaks the index in each way that the check is there to find.
func TestIndexCheck(t *testing.T) {
	tests := []struct {
		name, code, page, overview, want string
	}{
		{"right", citing, head + goodRow, overview, ""},
		{"a part of the section", citing, head + "| 2 | it | supported | `relay/x/x.go:F` |\n", overview, ""},
		{"as a whole", citing, head + "| all | it | supported | `relay/x/x.go:T.M` |\n", overview, ""},
		{"a field", citing, head + "| 3 | it | supported | `relay/x/x.go:T.a` |\n", overview, ""},
		{"the comment of a group, two sections", citing, head + "| 6 | it | supported | `relay/x/x.go:Y` |\n", overview, ""},
		{"a reason for not", citing, head + goodRow + "| 4 | it | not | nobody asks |\n", strings.Replace(overview, "supported", "partly", 1), ""},
		{"what does not apply takes nothing away", citing, head + goodRow + "| 4 | it | not applicable | for others |\n", overview, ""},

		{"no such file", citing, head + "| 2 | it | supported | `relay/x/y.go:F` |\n", overview, "there is no relay/x/y.go"},
		{"no such declaration", citing, head + "| 2 | it | supported | `relay/x/x.go:H` |\n", overview, "declares no H"},
		{"cited elsewhere", citing, head + "| 2 | it | supported | `relay/x/x.go:G` |\n", overview, "no comment in relay/x/x.go:G"},
		{"another field", citing, head + "| 3 | it | supported | `relay/x/x.go:T.b` |\n", overview, "no comment in relay/x/x.go:T.b"},
		{"another section", citing, head + "| 2.1.1 | it | supported | `relay/x/x.go:F` |\n", overview, "no comment"},
		{"a section that begins alike", strings.Replace(citing, "2.1", "21", 1), head + "| 2 | it | supported | `relay/x/x.go:F` |\n", overview, "no comment"},
		{"no code", citing, head + "| 2.1 | it | supported | |\n", overview, "needs the code"},
		{"half, but what is missing", citing, head + "| 2.1 | it | partly | `relay/x/x.go:F` |\n", strings.Replace(overview, "supported", "partly", 1), "say what is missing"},
		{"not, without a reason", citing, head + goodRow + "| 4 | it | not | |\n", strings.Replace(overview, "supported", "partly", 1), "needs a reason"},
		{"another word", citing, head + goodRow + "| 4 | it | planned | soon |\n", strings.Replace(overview, "supported", "partly", 1), "not \"planned\""},
		{"no section", citing, head + goodRow + "| four | it | not | never |\n", strings.Replace(overview, "supported", "partly", 1), "is not a section"},
		{"too many cells", citing, head + goodRow + "| 4 | it | not | never | ever |\n", overview, "a row has 4 cells"},
		{"twice", citing, head + goodRow + "\n## RFC 1234\nA Title\n", overview, "two headings"},
		{"another heading", citing, head + goodRow + "\n## Of RFC 2345\n", overview, "is not of the form"},
		{"no rows", citing, head, overview, "has no rows"},
		{"cited, not in the index", citing + "\n// RFC 2345 says so.\nfunc Z() {}\n", head + goodRow, overview, "relay/x/x.go:24: RFC 2345 is not in"},
		{"not in the overview", citing, head + goodRow, "", "the line of RFC 1234 must be\n" + strings.TrimSpace(overview)},
		{"another sum in the overview", citing, head + goodRow, strings.Replace(overview, "supported", "partly", 1), "must be"},
		{"in the overview only", citing, head + goodRow, overview + "| [2345](page.md#rfc-2345) | B | not |\n", "no page tells of RFC 2345"},
		{"out of order", citing, head + goodRow + strings.ReplaceAll(strings.TrimPrefix(head, "# Page\n"), "1234", "1233") + "| 1 | it | not | never |\n", overview + "| [1233](page.md#rfc-1233) | A Title | not |\n", "RFC 1233 is not in order"},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			tr := world(t, map[string]string{"relay/x/x.go": tt.code}, "", "")
			problems := tr.checkIndex(map[string]string{"README.md": "# Index\n" + tt.overview, "page.md": tt.page})
			switch {
			case tt.want == "" && len(problems) > 0:
				t.Errorf("found wrong: %q", problems)
			case tt.want != "" && (len(problems) != 1 || !strings.Contains(problems[0], tt.want)):
				t.Errorf("found %q, want one with %q", problems, tt.want)
			}
		})
	}
}

// TestTestsProveNothing: a claim names code, not the test of it.
func TestTestsProveNothing(t *testing.T) {
	tr := world(t, map[string]string{"relay/x/x.go": "", "relay/x/x_test.go": citing}, "", "")
	problems := tr.checkIndex(map[string]string{"README.md": overview, "page.md": head + strings.Replace(goodRow, "x.go", "x_test.go", 1)})
	if len(problems) != 1 || !strings.Contains(problems[0], "outside of tests") {
		t.Errorf("found %q", problems)
	}
}
