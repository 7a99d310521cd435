package verdict

import (
	"bufio"
	"flag"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/relais-mta/relais/relay"
)

var update = flag.Bool("update", false, "rewrite the golden column of testdata/replies.txt")

func allRules() map[string][]rule {
	return map[string][]rule{"providers": providerRules[:], "auth": authRules[:], "enhanced": enhancedRules[:],
		"phrases": phraseRules[:], "codes": codeRules[:], "phases": phaseRules[:], "local": localRules[:]}
}

// TestEveryRuleDecidesItsSample guards against rules that an earlier one
// shadows: such a rule would be documentation that lies.
func TestEveryRuleDecidesItsSample(t *testing.T) {
	names := map[string]bool{}
	for table, rules := range allRules() {
		for _, r := range rules {
			if names[r.name] {
				t.Errorf("two rules are named %s", r.name)
			}
			names[r.name] = true
			if scopes[r.class] == "" && r.class != Delivered && r.class != NotABounce {
				t.Errorf("%s: class %q has no scope", r.name, r.class)
			}
			if table == "local" {
				continue
			}
			if r.sample == "" {
				t.Errorf("%s has no sample", r.name)
				continue
			}
			phase := relay.PhaseRCPT
			if len(r.phases) > 0 {
				phase = r.phases[0]
			}
			for provider := range strings.SplitSeq(r.providers, " ") {
				if got := Classify(provider, phase, ParseReply(r.sample)); got.Rule != r.name {
					t.Errorf("sample of %s at %q is decided by %s", r.name, provider, got.Rule)
				}
			}
			if r.anywhere {
				if got := Classify("", phase, ParseReply(r.sample)); got.Rule != r.name {
					t.Errorf("sample of %s without provider is decided by %s", r.name, got.Rule)
				}
			}
		}
	}
}

// TestReplies runs the corpus: provider, phase, reply, and behind "=>" the
// expected class, scope, action and rule.
func TestReplies(t *testing.T) {
	path := filepath.Join("testdata", "replies.txt")
	f, err := os.Open(path)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	var out strings.Builder
	lines := bufio.NewScanner(f)
	cases := 0
	for lines.Scan() {
		line := lines.Text()
		if line == "" || line[0] == '#' {
			fmt.Fprintln(&out, line)
			continue
		}
		input, want, _ := strings.Cut(line, " => ")
		provider, rest, _ := strings.Cut(input, " ")
		phaseName, text, _ := strings.Cut(rest, " ")
		phase, ok := phaseNamed(phaseName)
		if !ok {
			t.Fatalf("%q names no phase", line)
		}
		if provider == "-" {
			provider = ""
		}
		v := Classify(provider, phase, ParseReply(strings.ReplaceAll(text, `\n`, "\n")))
		got := fmt.Sprintf("%s %s %s %s", v.Class, v.Scope, v.Action, v.Rule)
		if v.Zone != "" {
			got += " " + v.Zone
		}
		if got != want && !*update {
			t.Errorf("%s\n got %s\nwant %s", input, got, want)
		}
		fmt.Fprintln(&out, input+" => "+got)
		cases++
	}
	if err := lines.Err(); err != nil || cases < 100 {
		t.Fatalf("%d cases were read, error %v", cases, err)
	}
	if *update {
		if err := os.WriteFile(path, []byte(out.String()), 0o644); err != nil {
			t.Fatal(err)
		}
	}
}

func phaseNamed(name string) (relay.Phase, bool) {
	for p := relay.PhaseNone; p <= relay.PhaseLocal; p++ {
		if p.String() == name {
			return p, true
		}
	}
	return 0, false
}

func TestOf(t *testing.T) {
	for _, tc := range []struct {
		name string
		o    relay.Outcome
		want Verdict
	}{
		{"delivered", relay.Outcome{Status: relay.Delivered, Phase: relay.PhaseFinalDot, Reply: relay.Reply{Code: 250}},
			Verdict{Class: Delivered, Action: Deliver, Rule: "accepted"}},
		{"not tried after a 421", relay.Outcome{Status: relay.NotTried, Phase: relay.PhaseMAIL, Reply: relay.Reply{Code: 421, Text: "Max message per connection"}},
			Verdict{Class: RemoteSystem, Scope: ScopePath, Action: RetryNow, Rule: "code-421"}},
		{"in doubt", relay.Outcome{Status: relay.InDoubt, Phase: relay.PhaseFinalDot, Reply: relay.Reply{Enhanced: "4.4.2", Text: "x"}},
			Verdict{Class: BadConnection, Scope: ScopePath, Action: Retry, Rule: "bad-connection"}},
		{"null MX", relay.Outcome{Status: relay.Failed, Phase: relay.PhaseResolve, Reply: relay.Reply{Enhanced: "5.1.10"}},
			Verdict{Class: BadDomain, Scope: ScopeAddress, Action: Fail, Rule: "local-bad-domain"}},
		{"silent name server", relay.Outcome{Status: relay.Deferred, Phase: relay.PhaseResolve, Reply: relay.Reply{Enhanced: "4.4.3"}},
			Verdict{Class: Routing, Scope: ScopePath, Action: Retry, Rule: "local-routing"}},
		{"loop", relay.Outcome{Status: relay.Failed, Phase: relay.PhaseResolve, Reply: relay.Reply{Enhanced: "5.4.6"}},
			Verdict{Class: Routing, Scope: ScopePath, Action: Fail, Rule: "local-routing"}},
		{"connection refused", relay.Outcome{Status: relay.Deferred, Phase: relay.PhaseConnect, Reply: relay.Reply{Enhanced: "4.4.1"}},
			Verdict{Class: NoAnswer, Scope: ScopePath, Action: Retry, Rule: "no-answer"}},
		{"too large here", relay.Outcome{Status: relay.Failed, Phase: relay.PhaseLocal, Reply: relay.Reply{Enhanced: "5.3.4"}},
			Verdict{Class: TooLarge, Scope: ScopeMessage, Action: Fail, Rule: "local-too-large"}},
	} {
		if got := Of("", &tc.o); got != tc.want {
			t.Errorf("%s: got %+v, want %+v", tc.name, got, tc.want)
		}
	}
}

// TestNobodyIsSuppressedEarly: before MAIL nothing can be about a recipient,
// whatever the words.
func TestNobodyIsSuppressedEarly(t *testing.T) {
	for table, rules := range allRules() {
		for _, r := range rules {
			if table == "local" {
				continue
			}
			for _, phase := range []relay.Phase{relay.PhaseConnect, relay.PhaseEHLO, relay.PhaseSTARTTLS} {
				provider, _, _ := strings.Cut(r.providers, " ")
				v := Classify(provider, phase, ParseReply(r.sample))
				if v.Scope == ScopeAddress || v.Scope == ScopeMaybeAddress || v.Action == Fail {
					t.Errorf("%q at %s: %+v", r.sample, phase, v)
				}
			}
		}
	}
}

func TestCutEnhanced(t *testing.T) {
	for _, tc := range []struct{ in, code, rest string }{
		{"5.1.1 no such user", "5.1.1", "no such user"},
		{" 5.1.1", "5.1.1", ""},
		{"5.7.1  two spaces", "5.7.1", "two spaces"},
		{"4.7.650 x", "4.7.650", "x"},
		{"2.0.0", "2.0.0", ""},
		{"5.1.1.10 x", "", "5.1.1.10 x"},
		{"5.1.1: x", "", "5.1.1: x"},
		{"3.1.1 x", "", "3.1.1 x"},
		{"5.1 x", "", "5.1 x"},
		{"5.1234.1 x", "", "5.1234.1 x"},
		{"5..1 x", "", "5..1 x"},
		{"<a@b> 5.1.1 x", "", "<a@b> 5.1.1 x"},
		{"91.195.1.10 is blocked", "", "91.195.1.10 is blocked"},
		{"", "", ""},
		{"5", "", "5"},
		{"5.1.", "", "5.1."},
	} {
		code, rest := CutEnhanced(tc.in)
		if code != tc.code || rest != tc.rest {
			t.Errorf("CutEnhanced(%q) = %q, %q, want %q, %q", tc.in, code, rest, tc.code, tc.rest)
		}
		bcode, brest := CutEnhanced([]byte(tc.in))
		if string(bcode) != tc.code || string(brest) != tc.rest {
			t.Errorf("CutEnhanced of bytes %q = %q, %q", tc.in, bcode, brest)
		}
	}
}

func TestParseReply(t *testing.T) {
	for _, tc := range []struct {
		in   string
		want relay.Reply
	}{
		{"550-5.7.1 one\n550 5.7.1 two", relay.Reply{Code: 550, Enhanced: "5.7.1", Text: "one two"}},
		{"550-5.7.1 one\n5.7.1 two", relay.Reply{Code: 550, Enhanced: "5.7.1", Text: "one two"}},
		{"421", relay.Reply{Code: 421}},
		{"554 30 sorry", relay.Reply{Code: 554, Text: "30 sorry"}},
		{"connection refused", relay.Reply{Text: "connection refused"}},
		{"5.1.1 x", relay.Reply{Enhanced: "5.1.1", Text: "x"}},
		{"550 see\n551 not a line of the reply", relay.Reply{Code: 550, Text: "see 551 not a line of the reply"}},
	} {
		if got := ParseReply(tc.in); got != tc.want {
			t.Errorf("ParseReply(%q) = %+v, want %+v", tc.in, got, tc.want)
		}
	}
}

func TestContains(t *testing.T) {
	for _, tc := range []struct {
		text, pattern string
		want          bool
	}{
		{"x ofr_102 [102]", "ofr*_102", true},
		{"x ofr005_102", "ofr*_102", true},
		{"x ofr00500_102", "ofr*_102", false},
		{"x ofr_1020", "ofr*_102", false},
		{"ofr_104 ofr_102", "ofr*_102", true},
		{"sfr_in_101", "sfr_in_*01", true},
		{"sfr_in_01", "sfr_in_*01", true},
		{"sfr_in_1012", "sfr_in_*01", false},
		{"plain", "lai", true},
		{"ofr", "ofr*_102", false},
	} {
		if got := contains(tc.text, tc.pattern); got != tc.want {
			t.Errorf("contains(%q, %q) = %v", tc.text, tc.pattern, got)
		}
	}
}

func FuzzClassify(f *testing.F) {
	for _, rules := range allRules() {
		for _, r := range rules {
			f.Add(r.providers, uint8(relay.PhaseRCPT), r.sample)
		}
	}
	f.Fuzz(func(t *testing.T, provider string, phase uint8, text string) {
		reply := ParseReply(text)
		p := relay.Phase(phase % 10)
		v := Classify(provider, p, reply)
		if v.Class == "" || v.Rule == "" || v.Action == "" {
			t.Fatalf("%q: incomplete verdict %+v", text, v)
		}
		if v != Classify(provider, p, reply) {
			t.Fatalf("%q: two verdicts on one reply", text)
		}
		if (v.Action == Deliver) != (reply.Code/100 == 2) {
			t.Fatalf("%q: %+v", text, v)
		}
		if v.After > 0 && v.Action != Retry {
			t.Fatalf("%q: a wait without a retry: %+v", text, v)
		}
	})
}

func BenchmarkClassify(b *testing.B) {
	reply := ParseReply("550 5.1.1 <joe@example.org>: recipient address rejected: user unknown in virtual mailbox table")
	for b.Loop() {
		if v := Classify("google", relay.PhaseRCPT, reply); v.Class != BadMailbox {
			b.Fatal(v)
		}
	}
}

func BenchmarkOfDelivered(b *testing.B) {
	o := relay.Outcome{Status: relay.Delivered, Phase: relay.PhaseFinalDot, Reply: relay.Reply{Code: 250, Text: "ok"}}
	for b.Loop() {
		if v := Of("google", &o); v.Action != Deliver {
			b.Fatal(v)
		}
	}
}
