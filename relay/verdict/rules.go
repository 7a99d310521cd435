package verdict

import (
	"strings"
	"time"

	"github.com/relais-mta/relais/relay"
)

// rule is one line of a table. All conditions that are set must hold; the
// first rule that fits decides.
type rule struct {
	name      string
	providers string        // names separated by spaces; "" and "*": any provider
	anywhere  bool          // the token is unmistakable: the rule also fits when the provider is not known or another
	codes     string        // three-digit codes or first digits, separated by spaces: "421", "5"; "": any
	esc       string        // enhanced codes, or prefixes of them ending in "*", separated by spaces; a leading "x" stands for 4 or 5
	all       []string      // every one is in the text
	any       []string      // at least one is in the text
	none      []string      // not one is in the text
	phases    []relay.Phase // one of these; empty: any
	class     Class
	action    Action        // "": the class's own
	after     time.Duration // least wait of a retry
	sample    string        // a reply that the rule is for
}

// subject is a reply made ready for matching.
type subject struct {
	provider string
	phase    relay.Phase
	code     uint16
	esc      string
	text     string // lower case, without addresses
}

func (r *rule) fits(s *subject) bool {
	return r.fitsProvider(s) && fitsCode(r.codes, s.code) && fitsEnhanced(r.esc, s.esc) && r.fitsPhase(s.phase) && r.fitsText(s.text)
}

func (r *rule) fitsProvider(s *subject) bool {
	return r.providers == "" || r.providers == "*" || r.anywhere || s.provider != "" && word(r.providers, s.provider)
}

func (r *rule) fitsPhase(p relay.Phase) bool {
	if len(r.phases) == 0 {
		return true
	}
	for _, want := range r.phases {
		if p == want {
			return true
		}
	}
	return false
}

func (r *rule) fitsText(text string) bool {
	for _, w := range r.all {
		if !contains(text, w) {
			return false
		}
	}
	for _, w := range r.none {
		if contains(text, w) {
			return false
		}
	}
	if len(r.any) == 0 {
		return true
	}
	for _, w := range r.any {
		if contains(text, w) {
			return true
		}
	}
	return false
}

// maxStarDigits bounds what a star in a pattern stands for.
const maxStarDigits = 4

// contains reports whether a pattern is in the text. A star stands for up to
// four digits, as in "ofr*_102", and then no further digit may follow the
// pattern.
func contains(text, pattern string) bool {
	head, tail, star := strings.Cut(pattern, "*")
	if !star {
		return strings.Contains(text, pattern)
	}
	for {
		i := strings.Index(text, head)
		if i < 0 {
			return false
		}
		text = text[i+len(head):]
		for n := 0; n <= maxStarDigits && n <= len(text); n++ {
			if n > 0 && !digit(text[n-1]) {
				break
			}
			if rest, ok := strings.CutPrefix(text[n:], tail); ok && (rest == "" || !digit(rest[0])) {
				return true
			}
		}
	}
}

func digit(c byte) bool { return c >= '0' && c <= '9' }

// word reports whether w is one of the words of list.
func word(list, w string) bool {
	for item := range strings.SplitSeq(list, " ") {
		if item == w {
			return true
		}
	}
	return false
}

func fitsCode(codes string, code uint16) bool {
	if codes == "" {
		return true
	}
	digits := [3]byte{byte('0' + code/100%10), byte('0' + code/10%10), byte('0' + code%10)}
	for item := range strings.SplitSeq(codes, " ") {
		if strings.HasPrefix(string(digits[:]), item) {
			return true
		}
	}
	return false
}

func fitsEnhanced(patterns, esc string) bool {
	if patterns == "" {
		return true
	}
	if esc == "" {
		return false
	}
	for item := range strings.SplitSeq(patterns, " ") {
		code := esc
		if item[0] == 'x' {
			if esc[0] != '4' && esc[0] != '5' {
				continue
			}
			item, code = item[1:], esc[1:]
		}
		if prefix, star := strings.CutSuffix(item, "*"); star && strings.HasPrefix(code, prefix) || item == code {
			return true
		}
	}
	return false
}

func first(table []rule, s *subject) *rule {
	for i := range table {
		if table[i].fits(s) {
			return &table[i]
		}
	}
	return nil
}

// Classify returns the verdict on a reply that did not deliver (or did: a 2xx
// is Delivered). The order of the tables is the rule order: what the provider
// itself says in its own words, then a blocklist named in the text, then
// authentication and TLS, then a consistent enhanced code, then common
// phrases, then the three digits, then the phase.
func Classify(provider string, phase relay.Phase, reply relay.Reply) Verdict {
	if reply.Code >= 200 && reply.Code < 300 {
		return delivered
	}
	s := subject{provider: provider, phase: phase, code: reply.Code, esc: reply.Enhanced, text: words(reply.Text)}
	if reply.Code == 0 {
		if r := first(localRules[:], &s); r != nil {
			return s.verdict(r)
		}
		return s.verdict(&undetermined)
	}
	if r := first(providerRules[:], &s); r != nil {
		return s.verdict(r)
	}
	if v, ok := blocklisted(&s); ok {
		return v
	}
	r := first(authRules[:], &s)
	if r == nil && consistent(s.code, s.esc) {
		// A code that contradicts the digits says nothing.
		r = first(enhancedRules[:], &s)
	}
	if r == nil {
		r = first(phraseRules[:], &s)
	}
	if r == nil {
		r = first(codeRules[:], &s)
	}
	if r == nil {
		r = first(phaseRules[:], &s)
	}
	if r == nil {
		r = &undetermined
	}
	return s.verdict(r)
}

// words returns a reply's text in lower case without mail addresses: the local
// part of a recipient must not decide what its refusal means.
func words(text string) string {
	text = strings.ToLower(text)
	if !strings.Contains(text, "@") {
		return text
	}
	var out strings.Builder
	for w := range strings.FieldsSeq(text) {
		if strings.Contains(w, "@") && !strings.HasPrefix(w, "http") {
			continue
		}
		if out.Len() > 0 {
			out.WriteByte(' ')
		}
		out.WriteString(w)
	}
	return out.String()
}

// consistent reports whether the enhanced code is of the class that the three
// digits say (RFC 2034 section 4).
func consistent(code uint16, esc string) bool {
	return esc != "" && uint16(esc[0]-'0') == code/100
}

var undetermined = rule{name: "undetermined", class: Undetermined}

// verdict makes the verdict that a rule gives on the subject.
func (s *subject) verdict(r *rule) Verdict {
	v := Verdict{Class: r.class, Scope: ScopeOf(r.class), Action: r.action, Rule: r.name}
	if v.Action == "" {
		v.Action = s.action(r.class)
	}
	if v.Action == Retry {
		v.After = r.after
	}
	if s.phase >= relay.PhaseConnect && s.phase <= relay.PhaseMAIL && (v.Scope == ScopeAddress || v.Scope == ScopeMaybeAddress) {
		// No recipient has been named yet: it cannot be the one at fault.
		v.Class, v.Scope, v.After = Undetermined, ScopePath, 0
	}
	if s.phase >= relay.PhaseConnect && s.phase < relay.PhaseMAIL && v.Action == Fail {
		// A 5xx before MAIL is about us or about that one host.
		v.Action = Retry
	}
	return v
}

// action is what a class does when its rule does not say otherwise.
func (s *subject) action(c Class) Action {
	permanent := s.code >= 500 || s.code == 0 && s.esc != "" && s.esc[0] == '5'
	switch c {
	case NoAnswer, BadConnection, Throttled, RecipientRate, Greylist:
		return Retry // whatever digit it came with
	case Expired, LocalSuppressed:
		return Fail
	}
	if permanent {
		return Fail
	}
	return Retry
}
