package service

import (
	"net/netip"
	"strings"
	"testing"

	"github.com/relais-mta/relais/control"
	"github.com/relais-mta/relais/shared/fault"
)

// refused checks that an error is Invalid, names the field and says the text.
func refused(t *testing.T, what string, err error, field, says string) {
	t.Helper()
	if !fault.Is(err, fault.Invalid) || !strings.HasPrefix(fault.Public(err), field+": ") || !strings.Contains(fault.Public(err), says) {
		t.Errorf("%s: got %v, want field %q to be refused with %q", what, err, field, says)
	}
}

// TestIdsNameOneObject: an object cannot be named like another one's id, and an
// id means its object even where a row of before is named so.
func TestIdsNameOneObject(t *testing.T) {
	t.Parallel()
	f := newFixture(t)
	acme := must[*control.Tenant](t)(f.AddTenant(ctx, admin, "acme", Change{}))
	_, err := f.AddTenant(ctx, admin, acme.ID.String(), Change{})
	refused(t, "a tenant", err, "name", "looks like an id")
	_, err = f.AddProject(ctx, admin, "acme", acme.ID.String(), Change{})
	refused(t, "a project", err, "name", "looks like an id")
	if p := must[*control.Project](t)(f.AddProject(ctx, admin, acme.ID.String(), "shop", Change{})); p.Tenant != acme.ID {
		t.Errorf("the project belongs to %s, want %s", p.Tenant, acme.ID)
	}
}

func TestDomainsThatNobodyOwns(t *testing.T) {
	t.Parallel()
	f := newFixture(t)
	must[*control.Tenant](t)(f.AddTenant(ctx, admin, "acme", Change{}))
	must[DomainView](t)(f.AddDomain(ctx, admin, DomainRequest{Tenant: "acme", Name: "brand.example", ReturnPath: "bounce.example"}, Change{}))
	for name, tc := range map[string]struct {
		req         DomainRequest
		field, says string
	}{
		"suffix":                      {DomainRequest{Name: "co.uk"}, "domain", "suffix"},
		"address":                     {DomainRequest{Name: "192.0.2.1"}, "domain", "is an address"},
		"literal":                     {DomainRequest{Name: "[192.0.2.1]"}, "domain", "is an address"},
		"return path is a suffix":     {DomainRequest{Name: "a.example", ReturnPath: "co.uk"}, "return_path", "suffix"},
		"return path is itself":       {DomainRequest{Name: "a.example", ReturnPath: "a.example"}, "return_path", "rp.a.example"},
		"return path is sent from":    {DomainRequest{Name: "a.example", ReturnPath: "brand.example"}, "return_path", "is a sending domain"},
		"a return path is to be sent": {DomainRequest{Name: "bounce.example"}, "domain", "return path of brand.example"},
	} {
		tc.req.Tenant = "acme"
		_, err := f.AddDomain(ctx, admin, tc.req, Change{})
		refused(t, name, err, tc.field, tc.says)
	}
	must[DomainView](t)(f.AddDomain(ctx, admin, DomainRequest{Tenant: "acme", Name: "shop.co.uk"}, Change{}))
}

func TestAddressesThatNoMailComesFrom(t *testing.T) {
	t.Parallel()
	f := newFixture(t)
	for name, tc := range map[string]struct{ bind, public, ehlo, ptr, field string }{
		"broadcast":     {"255.255.255.255", "", "mta.example.com", "", "bind"},
		"link-local":    {"fe80::1", "", "mta.example.com", "", "bind"},
		"public":        {"10.0.0.1", "169.254.0.1", "mta.example.com", "", "public"},
		"address":       {"10.0.0.1", "", "10.0.0.1", "", "ehlo"},
		"underscore":    {"10.0.0.1", "", "mta_1.example.com", "", "ehlo"},
		"one label":     {"10.0.0.1", "", "mta", "", "ehlo"},
		"PTR of spaces": {"10.0.0.1", "", "mta.example.com", "x y", "ptr"},
	} {
		req := IPRequest{Bind: netip.MustParseAddr(tc.bind), EHLO: tc.ehlo, PTR: tc.ptr}
		if tc.public != "" {
			req.Public = netip.MustParseAddr(tc.public)
		}
		_, err := f.AddIP(ctx, admin, req, Change{})
		refused(t, name, err, tc.field, " ")
	}
	row := must[*control.Source](t)(f.AddIP(ctx, admin, IPRequest{Bind: netip.MustParseAddr("10.0.0.1"), EHLO: "MTA.Example.com.", PTR: "Name.Example.com."}, Change{}))
	if row.EHLO != "mta.example.com" || row.PTR != "name.example.com" {
		t.Errorf("got EHLO %q and PTR %q, want both in lower case without the dot", row.EHLO, row.PTR)
	}
	pool := must[PoolView](t)(f.Pool(viewer, "default"))
	_, err := f.AddPool(ctx, admin, pool.ID.String(), "", "", Change{})
	refused(t, "a pool", err, "name", "looks like an id")
	if by := must[PoolView](t)(f.Pool(viewer, pool.ID.String())); by.Name != "default" {
		t.Errorf("the pool of that id is %q", by.Name)
	}
}

func TestCredentialOfAStreamThatIsNotThere(t *testing.T) {
	t.Parallel()
	f := newFixture(t)
	must[*control.Tenant](t)(f.AddTenant(ctx, admin, "acme", Change{}))
	_, _, err := f.CreateCredential(ctx, admin, CredentialRequest{Tenant: "acme", Stream: "nope"}, Change{})
	refused(t, "stream", err, "stream", `no stream "nope"`)
	if _, _, err := f.CreateCredential(ctx, admin, CredentialRequest{Tenant: "acme", Stream: "bulk"}, Change{}); err != nil {
		t.Errorf("a shipped stream: %v", err)
	}
}

func TestTokenNetworksThatNoMachineIsIn(t *testing.T) {
	t.Parallel()
	f := newFixture(t)
	mapped := netip.PrefixFrom(netip.MustParseAddr("::ffff:10.0.0.0"), 104)
	_, _, err := f.CreateToken(ctx, admin, TokenRequest{Role: control.NodeRelay, CIDRs: []netip.Prefix{mapped}}, Change{})
	refused(t, "IPv4 in IPv6", err, "cidr", "::ffff:10.0.0.0/104")
}

// TestConflictSaysWhatChanged: who comes second hears what came between.
func TestConflictSaysWhatChanged(t *testing.T) {
	t.Parallel()
	f := newFixture(t)
	acme := must[*control.Tenant](t)(f.AddTenant(ctx, admin, "acme", Change{}))
	must[*control.Tenant](t)(f.SuspendTenant(ctx, operator, "acme", true, Change{Expect: acme.Revision}))
	_, err := f.SuspendTenant(ctx, admin, "acme", false, Change{Expect: acme.Revision})
	for _, want := range []string{"tenant.put by olga", "suspended=false", "suspended=true"} {
		if !fault.Is(err, fault.Conflict) || !strings.Contains(fault.Public(err), want) {
			t.Errorf("got %v, want a conflict that says %q", err, want)
		}
	}
	sections := map[string]string{"queue": "in_doubt_retries = 2\n"}
	first := must[PolicyView](t)(f.PutPolicy(ctx, operator, sections, nil, Change{}))
	stale := first.Revision - 1
	if _, err := f.PutPolicy(ctx, admin, sections, &stale, Change{}); !fault.Is(err, fault.Conflict) || !strings.Contains(fault.Public(err), "policy.put by olga") {
		t.Errorf("the policy: got %v", err)
	}
}

// TestAuditIsFoundByName: rows that are known by an id are found by their name.
func TestAuditIsFoundByName(t *testing.T) {
	t.Parallel()
	f := newFixture(t)
	must[*control.Tenant](t)(f.AddTenant(ctx, admin, "acme", Change{}))
	must[*control.Tenant](t)(f.AddTenant(ctx, admin, "rival", Change{}))
	if got := must[[]*control.AuditEntry](t)(f.Audit(admin, AuditFilter{Limit: 9, Object: "acme"})); len(got) != 1 || got[0].Action != "tenant.put" {
		t.Errorf("got %v", got)
	}
}

// TestAuditIsFoundByQuarantinedAddress: an eviction is one change; it is found
// by the addresses it put aside as well.
func TestAuditIsFoundByQuarantinedAddress(t *testing.T) {
	t.Parallel()
	e := &control.AuditEntry{Object: "nod_1", Before: "name=edge-1 state=active", After: "name=edge-1 state=evicted quarantined=192.0.2.1,192.0.2.2"}
	for text, want := range map[string]bool{"192.0.2.2": true, "edge-1": true, "nod_1": true, "": true, "192.0.2.3": false, "evicted": false} {
		if got := names(e, text); got != want {
			t.Errorf("%q: got %t", text, got)
		}
	}
}
