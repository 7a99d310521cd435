package service

import (
	"crypto/rsa"
	"crypto/x509"
	"encoding/base64"
	"net/netip"
	"slices"
	"strings"
	"testing"

	"github.com/relais-mta/relais/control"
	"github.com/relais-mta/relais/control/state"
	"github.com/relais-mta/relais/shared/fault"
	"github.com/relais-mta/relais/shared/ids"
	"github.com/relais-mta/relais/shared/policy"
)

func TestDomain(t *testing.T) {
	t.Parallel()
	f := newFixture(t)
	acme := must[*control.Tenant](t)(f.AddTenant(ctx, operator, "acme", Change{}))
	rival := must[*control.Tenant](t)(f.AddTenant(ctx, operator, "rival", Change{}))
	node := f.join(t, "edge-1")
	must[*control.Pool](t)(f.AddPool(ctx, operator, "own", "", "acme", Change{}))
	must[*control.Pool](t)(f.AddPool(ctx, operator, "theirs", "", "rival", Change{}))
	for _, ip := range []IPRequest{
		{Bind: netip.MustParseAddr("10.0.0.1"), Public: netip.MustParseAddr("198.51.100.1"), EHLO: "MTA1.example.net.", Node: "edge-1", Pool: "default"},
		{Bind: netip.MustParseAddr("2001:db8::1"), EHLO: "mta2.example.net", Node: node.String(), Pool: "own"},
		{Bind: netip.MustParseAddr("198.51.100.3"), EHLO: "mta3.example.net", Pool: "theirs"},
		{Bind: netip.MustParseAddr("198.51.100.4"), EHLO: "mta4.example.net"},
	} {
		must[*control.Source](t)(f.AddIP(ctx, operator, ip, Change{}))
	}
	d := must[DomainView](t)(f.AddDomain(ctx, operator, DomainRequest{Tenant: "acme", Name: "Example.COM."}, Change{}))
	zone := make([]string, len(d.Records))
	for i, r := range d.Records {
		zone[i] = r.Zone()
	}
	all := strings.Join(zone, "\n")
	for _, want := range []string{
		`_relais.example.com. 3600 IN TXT "relais-verify=` + acme.OwnershipToken + `"`,
		`rp.example.com. 3600 IN MX 10 mta1.example.net.`,
		`rp.example.com. 3600 IN MX 10 mta2.example.net.`,
		`rp.example.com. 3600 IN TXT "v=spf1 ip4:198.51.100.1 ip6:2001:db8::1 -all"`,
		`_dmarc.example.com. 3600 IN TXT "v=DMARC1; p=none"`,
		`1.100.51.198.in-addr.arpa. 3600 IN PTR mta1.example.net.`,
		`mta1.example.net. 3600 IN A 198.51.100.1`,
		`1.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.8.b.d.0.1.0.0.2.ip6.arpa. 3600 IN PTR mta2.example.net.`,
		`mta2.example.net. 3600 IN AAAA 2001:db8::1`,
	} {
		if !slices.Contains(zone, want) {
			t.Errorf("missing %s in\n%s", want, all)
		}
	}
	if strings.Contains(all, "mta3") || strings.Contains(all, "mta4") || strings.Contains(all, "10.0.0.1") {
		t.Errorf("addresses that are not the tenant's are published:\n%s", all)
	}
	checkDKIM(t, f, d, node)

	f.refused(t, fault.Denied, "domain", func() error {
		_, err := f.AddDomain(ctx, operator, DomainRequest{Tenant: "rival", Name: "mail.example.com"}, Change{})
		return err
	})
	f.refused(t, fault.Denied, "return_path", func() error {
		_, err := f.AddDomain(ctx, operator, DomainRequest{Tenant: rival.ID.String(), Name: "rival.net", ReturnPath: "rp.example.com"}, Change{})
		return err
	})
	f.refused(t, fault.Exists, "", func() error {
		_, err := f.AddDomain(ctx, operator, DomainRequest{Tenant: "acme", Name: "example.com"}, Change{})
		return err
	})
	f.refused(t, fault.Invalid, "domain", func() error {
		_, err := f.AddDomain(ctx, operator, DomainRequest{Tenant: "acme", Name: "-x.com"}, Change{})
		return err
	})
	f.refused(t, fault.Invalid, "selector", func() error {
		_, err := f.AddDomain(ctx, operator, DomainRequest{Tenant: "acme", Name: "example.org", Selector: "A b"}, Change{})
		return err
	})
	if got := must[[]DomainView](t)(f.Domains(viewer, "acme")); len(got) != 1 || got[0].TenantName != "acme" {
		t.Errorf("got %+v", got)
	}
}

// checkDKIM: the published public key belongs to the private key of the view,
// and that private key is nowhere in the log in clear.
func checkDKIM(t *testing.T, f *fixture, d DomainView, node ids.Node) {
	t.Helper()
	i := slices.IndexFunc(d.Records, func(r DNSRecord) bool { return strings.Contains(r.Name, "._domainkey.") })
	published := strings.Join(d.Records[i].Values, "")
	for _, s := range d.Records[i].Values {
		if len(s) > 255 {
			t.Errorf("a character-string has %d bytes", len(s))
		}
	}
	v := must[*policy.View](t)(f.ViewFor(ctx, node))
	key, err := x509.ParsePKCS8PrivateKey(v.Domains[0].DKIM[0].Private)
	if err != nil {
		t.Fatal(err)
	}
	public, err := x509.MarshalPKIXPublicKey(&key.(*rsa.PrivateKey).PublicKey)
	if err != nil || published != "v=DKIM1; k=rsa; p="+base64.StdEncoding.EncodeToString(public) {
		t.Errorf("published %s, %v", published, err)
	}
	if d.Records[i].Name != v.Domains[0].DKIM[0].Selector+"._domainkey.example.com" {
		t.Errorf("the record is at %s", d.Records[i].Name)
	}
	if strings.Contains(string(f.log.bytes), string(key.(*rsa.PrivateKey).D.Bytes())) {
		t.Error("the private key is in the log in clear")
	}
}

func TestDomainWithoutAddressesSaysSo(t *testing.T) {
	t.Parallel()
	f := newFixture(t)
	must[*control.Tenant](t)(f.AddTenant(ctx, operator, "acme", Change{}))
	d := must[DomainView](t)(f.AddDomain(ctx, operator, DomainRequest{Tenant: "acme", Name: "example.com"}, Change{}))
	if !strings.Contains(strings.Join(d.Notes, "\n"), "not complete") {
		t.Errorf("got notes %q", d.Notes)
	}
	if _, err := f.PutPolicy(ctx, operator, map[string]string{"inbound": "hosts = [\"in.example.net\"]\n"}, nil, Change{}); err != nil {
		t.Fatal(err)
	}
	d = must[DomainView](t)(f.Domain(viewer, "example.com"))
	if !slices.ContainsFunc(d.Records, func(r DNSRecord) bool { return r.Type == "MX" && r.Values[0] == "10 in.example.net." }) {
		t.Errorf("the inbound hosts of the policy are not published: %+v", d.Records)
	}
}

// TestSealedSecretsDoNotMove: ciphertext that is copied to another row or
// cluster does not open there.
func TestSealedSecretsDoNotMove(t *testing.T) {
	t.Parallel()
	f := newFixture(t)
	must[*control.Tenant](t)(f.AddTenant(ctx, operator, "acme", Change{}))
	d := must[DomainView](t)(f.AddDomain(ctx, operator, DomainRequest{Tenant: "acme", Name: "example.com"}, Change{}))
	if _, err := f.sealer.Open(d.DKIM[0].PrivateSealed, state.DKIMPurpose("example.org", d.DKIM[0].Selector)); err == nil {
		t.Error("a signing key opens for another domain")
	}
}
