package policy

import (
	"fmt"
	"strings"

	"github.com/relais-mta/relais/shared/fault"
)

// maxProblems bounds how many problems of one document are told at once.
const maxProblems = 20

// problems gathers what is wrong with a document, so that an operator can mend
// all of it in one go.
type problems struct {
	list []*fault.Error
	more int // problems beyond maxProblems
}

func (p *problems) add(field, public string, args ...any) {
	if len(p.list) >= maxProblems {
		p.more++
		return
	}
	p.list = append(p.list, fault.Field("", field, public, args...))
}

// between reports v outside lo to hi.
func (p *problems) between(field string, v, lo, hi int64) {
	if v < lo || v > hi {
		p.add(field, "is %d, write %d to %d", v, lo, hi)
	}
}

// lasts reports a duration outside lo to hi.
func (p *problems) lasts(field string, v, lo, hi Duration) {
	if v < lo || v > hi {
		p.add(field, "is %q, write \"%v\" to \"%v\"", v, lo, hi)
	}
}

// oneOf reports a word that is not in the list.
func (p *problems) oneOf(field, v string, words ...string) {
	for _, w := range words {
		if v == w {
			return
		}
	}
	p.add(field, "is %q, write one of %s", clip(v), quoteAll(words))
}

// err returns nil, the one problem, or one error that tells them all.
func (p *problems) err(op string) error {
	switch {
	case len(p.list) == 0:
		return nil
	case len(p.list) == 1 && p.more == 0:
		p.list[0].Op = op
		return p.list[0]
	}
	var text strings.Builder
	fmt.Fprintf(&text, "%d problems", len(p.list)+p.more)
	for i, e := range p.list {
		sep := "; "
		if i == 0 {
			sep = ": "
		}
		text.WriteString(sep + e.Field + ": " + e.Public)
	}
	if p.more > 0 {
		fmt.Fprintf(&text, "; and %d more", p.more)
	}
	return &fault.Error{Kind: fault.Invalid, Op: op, Public: text.String()}
}

func quoteAll(words []string) string {
	var out strings.Builder
	for i, w := range words {
		if i > 0 {
			out.WriteString(", ")
		}
		out.WriteString("\"" + w + "\"")
	}
	return out.String()
}

func clip(s string) string {
	const maxShownBytes = 80
	if len(s) > maxShownBytes {
		return s[:maxShownBytes] + "…"
	}
	return s
}
