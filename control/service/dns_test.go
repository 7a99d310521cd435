package service

import (
	"context"
	"errors"
	"net/netip"
	"strings"
	"sync"
	"testing"

	"github.com/relais-mta/relais/control"
	"github.com/relais-mta/relais/shared/fault"
	"github.com/relais-mta/relais/shared/ids"
	"github.com/relais-mta/relais/shared/policy"
)

// fakeDNS answers what it is told.
type fakeDNS struct {
	verdict control.ReverseVerdict
	detail  string
	err     error
	owned   FindingStatus
	facts   DomainFacts

	mu   sync.Mutex
	keys map[string]FindingStatus // by selector; absent: there is no record
}

func (d *fakeDNS) Key(_ context.Context, domain string, k KeyFacts) (Finding, bool) {
	d.mu.Lock()
	defer d.mu.Unlock()
	f := Finding{Check: "dkim", Name: k.Selector + "._domainkey." + domain, Required: k.Signs, Status: d.keys[k.Selector], Detail: "as told"}
	if f.Status == "" {
		f.Status = FindingWrong
		return f, false
	}
	return f, true
}

func (d *fakeDNS) publish(selector string, status FindingStatus) {
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.keys == nil {
		d.keys = map[string]FindingStatus{}
	}
	d.keys[selector] = status
}

func (d *fakeDNS) Reverse(context.Context, netip.Addr, string) (control.ReverseVerdict, string, error) {
	return d.verdict, d.detail, d.err
}
func (d *fakeDNS) Ownership(context.Context, DomainFacts) Finding {
	return Finding{Check: "ownership", Required: true, Status: d.owned}
}
func (d *fakeDNS) Domain(ctx context.Context, facts DomainFacts) []Finding {
	d.facts = facts
	return []Finding{d.Ownership(ctx, facts), {Check: "dmarc", Status: FindingWrong}}
}

// TestOnlyConfirmedAddressesAreUsed: the relays' view holds an address while
// its reverse DNS is confirmed or an operator overrides it.
func TestOnlyConfirmedAddressesAreUsed(t *testing.T) {
	t.Parallel()
	f := newFixture(t)
	node := f.join(t, "edge-1")
	must[*control.Source](t)(f.AddIP(ctx, operator, IPRequest{Bind: netip.MustParseAddr("198.51.100.1"), EHLO: "mta1.example.net", Node: "edge-1", Pool: "default"}, Change{}))
	used := func() bool { return len(must[*policy.View](t)(f.ViewFor(ctx, node)).Sources) == 1 }
	if _, err := f.CheckIP(ctx, operator, "198.51.100.1", Change{}); !fault.Is(err, fault.Unavailable) {
		t.Errorf("without a resolver: %v", err)
	}
	dns := &fakeDNS{verdict: control.ReverseFailed, detail: "the PTR record gives\x00" + strings.Repeat("é", 300)}
	f.SetDNS(dns)
	v := must[IPView](t)(f.CheckIP(ctx, operator, "198.51.100.1", Change{}))
	if used() || v.Reverse != control.ReverseFailed || !strings.HasPrefix(v.ReverseDetail, "the PTR record gives ") || len(v.ReverseDetail) > 255 {
		t.Errorf("got %+v", v)
	}
	// A policy may weigh an address that is not used yet.
	if _, err := f.PutPolicy(ctx, operator, map[string]string{"pools": "[[pool]]\nname = \"default\"\n[pool.weights]\n\"198.51.100.1\" = 5\n"}, nil, Change{}); err != nil {
		t.Error(err)
	}
	f.refused(t, fault.Invalid, "reason", func() error {
		_, err := f.OverrideIP(ctx, operator, "198.51.100.1", true, Change{Reason: " "})
		return err
	})
	f.refused(t, fault.Denied, "", func() error {
		_, err := f.OverrideIP(ctx, viewer, "198.51.100.1", true, Change{Reason: "x"})
		return err
	})
	must[IPView](t)(f.OverrideIP(ctx, operator, "198.51.100.1", true, Change{Reason: "ticket 4711"}))
	if e := must[[]*control.AuditEntry](t)(f.Audit(operator, AuditFilter{Limit: 1})); !used() || e[0].Reason != "ticket 4711" || !strings.Contains(e[0].After, "overridden") || strings.Contains(e[0].Before, "overridden") {
		t.Errorf("got %+v", e[0])
	}
	must[IPView](t)(f.OverrideIP(ctx, operator, "198.51.100.1", false, Change{}))
	if used() {
		t.Error("an override that ended holds")
	}
	dns.verdict, dns.detail = control.ReverseConfirmed, ""
	must[IPView](t)(f.CheckIP(ctx, operator, "198.51.100.1", Change{}))
	dns.err = errors.New("no answer")
	if _, err := f.CheckIP(ctx, operator, "198.51.100.1", Change{}); err == nil || !used() {
		t.Errorf("no answer changed the verdict: %v", err)
	}
}

func TestCheckDomain(t *testing.T) {
	t.Parallel()
	f := newFixture(t)
	must[*control.Tenant](t)(f.AddTenant(ctx, operator, "acme", Change{}))
	must[DomainView](t)(f.AddDomain(ctx, operator, DomainRequest{Tenant: "acme", Name: "example.com"}, Change{}))
	dns := &fakeDNS{owned: FindingWrong}
	f.SetDNS(dns)
	usable := func() bool { return len(must[*policy.View](t)(f.ViewFor(ctx, ids.Node{1})).Domains) == 1 }
	c := must[DomainCheck](t)(f.CheckDomain(ctx, viewer, "example.com"))
	if c.OK || len(c.Findings) != 2 || dns.facts.ReturnPath != "rp.example.com" || len(dns.facts.Keys) != 2 || dns.facts.OwnershipToken == "" || len(f.UnverifiedDomains()) != 1 {
		t.Errorf("got %+v of %+v", c, dns.facts)
	}
	if !usable() {
		t.Error("an unverified domain is not usable although the policy does not ask for it")
	}
	must[PolicyView](t)(f.PutPolicy(ctx, operator, map[string]string{"submission": "require_ownership = true\n"}, nil, Change{}))
	if usable() {
		t.Error("an unverified domain is usable although the policy requires ownership")
	}
	dns.owned = FindingOK
	if c = must[DomainCheck](t)(f.CheckDomain(ctx, viewer, "example.com")); !c.OK {
		t.Errorf("advice is taken for a fault: %+v", c)
	}
	if d := must[DomainView](t)(f.Domain(viewer, "example.com")); d.VerifiedAt.IsZero() || !usable() || len(f.UnverifiedDomains()) != 0 {
		t.Errorf("got %+v", d)
	}
	f.refused(t, fault.NotFound, "domain", func() error {
		_, err := f.CheckDomain(ctx, viewer, "example.org")
		return err
	})
}
