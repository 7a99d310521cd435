package policy

import (
	"strings"
	"testing"

	"github.com/relais-mta/relais/shared/fault"
	"github.com/relais-mta/relais/shared/ids"
	"github.com/relais-mta/relais/shared/mailaddr"
)

// feedbackDirectory compiles a view with a tenant and rules.
func feedbackDirectory(t *testing.T, rules string) *Directory {
	t.Helper()
	doc, err := Parse(map[string]string{"feedback": rules})
	if err != nil {
		t.Fatal(err)
	}
	d, err := Compile(&View{Document: doc, CredentialKey: [32]byte{1}, Tenants: []Tenant{{ID: ids.Tenant{15: 1}, Name: "acme"}, {ID: ids.Tenant{15: 2}, Name: "bolt"}}})
	if err != nil {
		t.Fatal(err)
	}
	return d
}

func TestFeedbackMostSpecificRuleWins(t *testing.T) {
	d := feedbackDirectory(t, `
[[rule]]
domain = "*"
stream = "*"
feedback_id = "everyone"
[[rule]]
domain = "*"
stream = "bulk"
feedback_id = "every-bulk"
[[rule]]
domain = "brand.test"
stream = "*"
feedback_id = "every-brand"
[[rule]]
domain = "brand.test"
stream = "bulk"
cfbl = "off"
`)
	for _, tc := range []struct{ domain, stream, want string }{
		{"other.test", "transactional", "everyone"}, {"other.test", "bulk", "every-bulk"}, {"brand.test", "transactional", "every-brand"}, {"brand.test", "bulk", ""},
	} {
		got := ""
		if plan := d.Feedback(mailaddr.Domain(tc.domain), tc.stream); plan != nil {
			got = string(plan.AppendFeedbackID(nil, "", "", "", ""))
		}
		if got != tc.want {
			t.Errorf("%s %s: %q, want %q", tc.domain, tc.stream, got, tc.want)
		}
	}
	if d := feedbackDirectory(t, ""); d.Feedback("brand.test", "bulk") != nil || d.FeedbackTenantName(ids.Tenant{15: 1}) != "" {
		t.Error("a plan without rules")
	}
}

// What a template becomes holds no space, at most three colons, and nothing
// that the client or tenant wrote but letters, digits, '.', '_' and '-'.
func TestFeedbackIDOfAnything(t *testing.T) {
	d := feedbackDirectory(t, "[[rule]]\ndomain = \"*\"\nstream = \"*\"\nfeedback_id = \"c.{tag}:{stream}_{domain}:{tenant}:sender-1\"\n")
	plan := d.Feedback("x.test", "s")
	acme, bolt := d.FeedbackTenantName(ids.Tenant{15: 1}), d.FeedbackTenantName(ids.Tenant{15: 2})
	if len(acme) != FeedbackTenantBytes || acme == bolt {
		t.Errorf("tenants are %q and %q", acme, bolt)
	}
	if other := FeedbackTenant([32]byte{2}, ids.Tenant{15: 1}); other == acme {
		t.Error("a tenant's name does not depend on the key")
	}
	got := string(plan.AppendFeedbackID(nil, "a b:c\r\n;é\x00", "my stream", acme, "xn--bcher-kva.test"))
	if want := "c.a-b-c------:my-stream_xn--bcher-kva.test:" + acme + ":sender-1"; got != want {
		t.Errorf("%q, want %q", got, want)
	}
}

func TestFeedbackAllocatesNothing(t *testing.T) {
	d := feedbackDirectory(t, "[[rule]]\ndomain = \"*\"\nstream = \"*\"\nfeedback_id = \"{tag}:{stream}:{tenant}:sender-1\"\n")
	buffer := make([]byte, 0, 256)
	if n := testing.AllocsPerRun(100, func() {
		plan := d.Feedback("brand.test", "default")
		buffer = plan.AppendFeedbackID(buffer[:0], "spring", "default", d.FeedbackTenantName(ids.Tenant{15: 1}), "brand.test")
	}); n > 0 {
		t.Errorf("%v allocations a message", n)
	}
}

func TestFeedbackRuleOfUnknownDomain(t *testing.T) {
	doc, err := Parse(map[string]string{"feedback": "[[rule]]\ndomain = \"brand.test\"\nstream = \"*\"\nfeedback_id = \"sender-1\"\n"})
	if err != nil {
		t.Fatal(err)
	}
	doc.Streams.Stream = nil
	view := View{Domains: []Domain{{Name: "other.test"}}}
	err = CheckReferences(&doc, ReferencesOf(&view))
	if !fault.Is(err, fault.Invalid) || !strings.Contains(fault.Public(err), "no sending domain \"brand.test\"") {
		t.Errorf("error %v", err)
	}
	view.Domains[0].Name = "brand.test"
	if err := CheckReferences(&doc, ReferencesOf(&view)); err != nil {
		t.Error(err)
	}
}
